"""TRL's SFTTrainer on a model directory and a file of questions and answers, measured as benchmarks/sft.py measures.

Real tokens are counted (padding left out), on the device, so that counting does not make the host wait.
Writes DIR/first_step when the first step is done, DIR/measured.json, and on a GPU a trace of three steps after the timed ones.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from verl.trainer.profile import STEPS as PROFILED_STEPS
from verl.trainer.profile import Profile, Trace


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--dir", required=True, type=Path, help="where the results go")
    parser.add_argument("--rows", required=True, type=int, help="rows a step; with --packing: packed rows of --max-length tokens")
    parser.add_argument("--max-length", required=True, type=int)
    parser.add_argument("--warmup", required=True, type=int)
    parser.add_argument("--steps", required=True, type=int)
    parser.add_argument("--dtype", default="float32", help="of the weights that the optimizer updates")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--padding-free", action="store_true")
    parser.add_argument("--group-by-length", action="store_true")
    parser.add_argument("--liger", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--lora-rank", type=int, help="adapters through peft")
    parser.add_argument("--lora-targets", default="all-linear", help="modules with adapters, with commas between")
    parser.add_argument("--lean-host", action="store_true", help="collate in two workers, and leave out the check of each loss for NaN")
    return parser.parse_args()


class CountingTrainer(SFTTrainer):
    """Keeps each step's real and supervised tokens, as scalars on the device."""

    def __init__(self, **named: Any):
        super().__init__(**named)
        self.counts: list[tuple[torch.Tensor, torch.Tensor]] = []

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        mask, labels = inputs.get("attention_mask"), inputs["labels"]
        real = torch.tensor(labels.numel()) if mask is None else mask.sum()
        self.counts.append((real, (labels != -100).sum()))
        return super().training_step(model, inputs, *rest, **named)


class Clock(TrainerCallback):
    """Takes the time of each step, waits for the device at both ends of the timed ones, and traces a few after them."""

    def __init__(self, options: argparse.Namespace, device: torch.device):
        self.options, self.device = options, device
        self.ends: list[float] = []
        self.trace: Trace | None = None
        self.profile: Profile | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        done, timed = state.global_step, self.options.warmup + self.options.steps
        if done in (1, self.options.warmup, timed) and self.device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        if done == 1:
            (self.options.dir / "first_step").touch()
        if done == timed + 1:
            self.trace = Trace(self.device)
        if self.trace is not None and done == timed + 1 + PROFILED_STEPS:
            self.profile = self.trace.finish(self.options.dir / "profile" / "trace.json.gz")


def dataset(path: str) -> Dataset:
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    chats = [([{"role": "user", "content": r["question"]}], [{"role": "assistant", "content": r["answer"]}]) for r in rows]
    return Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in chats])


def settings(options: argparse.Namespace, on_gpu: bool) -> SFTConfig:
    chosen: dict[str, Any] = {}
    if options.group_by_length:
        chosen["train_sampling_strategy"] = "group_by_length"
    if options.lean_host:
        chosen |= {"dataloader_num_workers": 2, "logging_nan_inf_filter": False}
    return SFTConfig(
        output_dir=str(options.dir),
        per_device_train_batch_size=options.rows,
        max_steps=options.warmup + options.steps + (1 + PROFILED_STEPS if on_gpu else 0),
        max_length=None if options.padding_free and not options.packing else options.max_length,  # TRL's rule; no row is longer
        packing=options.packing,
        padding_free=options.padding_free,
        use_liger_kernel=options.liger,
        torch_compile=options.compile,
        gradient_checkpointing=False,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        learning_rate=1e-5,
        optim="adamw_torch_fused",
        report_to=[],
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
        **chosen,
    )


def adapters(rank: int, targets: str) -> LoraConfig:
    modules = targets if targets == "all-linear" else targets.split(",")
    return LoraConfig(r=rank, lora_alpha=16, target_modules=modules, task_type="CAUSAL_LM")


def main() -> None:
    options = arguments()
    options.dir.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dtype = getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, attn_implementation=options.attention)
    clock = Clock(options, device)
    trainer = CountingTrainer(
        model=model,
        args=settings(options, device.type == "cuda"),
        train_dataset=dataset(options.data),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        callbacks=[clock],
        peft_config=None if options.lora_rank is None else adapters(options.lora_rank, options.lora_targets),
    )
    trainer.train()
    timed = slice(options.warmup, options.warmup + options.steps)
    seconds = [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)]  # of steps 2 and on
    counts = [(int(real), int(supervised)) for real, supervised in trainer.counts[timed]]
    measured = {
        "tokens": [real for real, _ in counts],
        "supervised_tokens": [supervised for _, supervised in counts],
        "seconds": seconds[options.warmup - 1 : options.warmup - 1 + options.steps],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "busy_share": clock.profile.busy_share if clock.profile else None,
    }
    (options.dir / "measured.json").write_text(json.dumps(measured) + "\n", encoding="utf-8")
    if clock.profile is not None:
        first = options.warmup + options.steps + 2
        text = f"{clock.profile.describe(first, PROFILED_STEPS)}\n{clock.profile.table()}\n"
        (options.dir / "profile" / "trace.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
