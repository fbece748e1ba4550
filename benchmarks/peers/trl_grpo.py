"""TRL's GRPOTrainer on a model directory and a file of questions, measured as benchmarks/rl.py measures.

It trains at one setting after another, each with a model, an optimizer and a trainer of its own; vLLM, which takes a minute to start, is
started once, and gets the weights of each. After each setting, the results so far are written to DIR/measured.json. DIR/first_step appears
when the first step is done.
"""

import sys

if sys.path[0].endswith("peers"):
    sys.path.pop(0)  # beside this file lies a folder flash_attn, which vLLM would take for the package

import argparse
import gc
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import GRPOConfig, GRPOTrainer
from trl.generation import vllm_generation


@dataclass(frozen=True)
class Setting:
    """What is tried, written as words with colons between, such as 32:liger:flash_attention_2.

    Attributes:
        rows: answers of a micro-batch, the first word.
        liger: Liger's kernels for norms, rotary embeddings and MLPs.
        correction: importance sampling between vLLM's log-probabilities and the trainer's, which costs a forward pass; it is TRL's default.
        compiled: the model through torch.compile.
        attention: of transformers, the remaining word; sdpa if there is none.
    """

    rows: int
    liger: bool
    correction: bool
    compiled: bool
    attention: str

    @classmethod
    def parse(cls, text: str) -> "Setting":
        rows, *words = text.split(":")
        rest = [word for word in words if word not in ("liger", "correction", "compiled")]
        return cls(int(rows), "liger" in words, "correction" in words, "compiled" in words, rest[0] if rest else "sdpa")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="JSON lines with question")
    parser.add_argument("--dir", required=True, type=Path, help="where the results go")
    parser.add_argument("--prompts", required=True, type=int, help="of a step")
    parser.add_argument("--answers", required=True, type=int, help="to each prompt")
    parser.add_argument("--new-tokens", required=True, type=int)
    parser.add_argument("--max-length", required=True, type=int, help="tokens of the longest prompt with its answer, for vLLM")
    parser.add_argument("--warmup", required=True, type=int)
    parser.add_argument("--steps", required=True, type=int)
    parser.add_argument(
        "--settings", required=True, nargs="+", help="tried in this order: ROWS[:liger][:correction][:compiled][:ATTENTION]"
    )
    parser.add_argument("--generation", choices=("vllm", "transformers"), default="vllm")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.3, help="vLLM's share of the GPU's memory")
    parser.add_argument("--dtype", default="float32", help="of the weights that the optimizer updates; of frozen ones with adapters")
    parser.add_argument("--lora-rank", type=int, help="adapters through peft, at all linear layers")
    return parser.parse_args()


class Clock(TrainerCallback):
    """Takes the time of each step and of its parts. On a GPU, it waits for the device at both ends of each."""

    def __init__(self, on_gpu: bool, first_step: Path):
        self._on_gpu, self._first_step = on_gpu, first_step
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.parts: list[dict[str, float]] = []

    def now(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def times(self, owner: Any, method: str, part: str) -> None:
        """Count the time of a method as that of a part."""
        real: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **named: Any) -> Any:
            since = self.now()
            result = real(*args, **named)
            parts = self.parts[-1]
            parts[part] = parts.get(part, 0.0) + self.now() - since
            return result

        setattr(owner, method, timed)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.parts.append({})
        self._tokens = int(state.num_input_tokens_seen)
        self._since = self.now()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds.append(self.now() - self._since)
        self.tokens.append(int(state.num_input_tokens_seen) - self._tokens)
        self._first_step.touch()
        print(f"step {len(self.seconds)}: {self.seconds[-1]:.2f} s", flush=True)


def odd(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    """1 where the bytes of an answer have an odd sum, so that groups differ."""
    return [float(sum(completion[0]["content"].encode()) % 2) for completion in completions]


def config(options: argparse.Namespace, setting: Setting, on_gpu: bool) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(options.dir),
        per_device_train_batch_size=setting.rows,
        gradient_accumulation_steps=options.prompts * options.answers // setting.rows,
        num_generations=options.answers,
        max_completion_length=options.new_tokens,
        max_steps=options.warmup + options.steps,
        learning_rate=1e-6,
        beta=0.0,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        gradient_checkpointing=False,
        torch_compile=setting.compiled,
        use_liger_kernel=setting.liger,
        use_vllm=options.generation == "vllm",
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=options.gpu_memory_utilization,
        vllm_max_model_length=options.max_length,
        vllm_importance_sampling_correction=setting.correction,
        optim="adamw_torch_fused",
        report_to=[],
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
    )


def measure(options: argparse.Namespace, words: str, on_gpu: bool) -> dict[str, Any]:
    """Train at a setting; returns what `measured.json` says of it."""
    setting = Setting.parse(words)
    clock = Clock(on_gpu, options.dir / "first_step")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype), attn_implementation=setting.attention, device_map="cuda" if on_gpu else "cpu"
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=odd,
        args=config(options, setting, on_gpu),
        train_dataset=dataset(options.data),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        callbacks=[clock],
        peft_config=adapters(options.lora_rank) if options.lora_rank else None,
    )
    clock.times(trainer, "_generate_and_score_completions", "experience")
    clock.times(trainer, "_generate", "generate_and_weights")
    clock.times(trainer, "_calculate_rewards", "score")
    if options.generation == "vllm":
        clock.times(trainer.vllm_generation, "sync_weights", "update_rollout")
    trainer.train()
    steps = slice(options.warmup, None)
    return {
        "setting": words,
        "seconds": clock.seconds[steps],
        "tokens": clock.tokens[steps],
        "phases": phases(clock.seconds[steps], clock.parts[steps]),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    }


def phases(seconds: list[float], parts: list[dict[str, float]]) -> dict[str, float]:
    """The median seconds of each phase, under verl's names: `logprobs` is all of the experience that is neither generation nor reward."""

    def of(total: float, part: dict[str, float]) -> dict[str, float]:
        weights, generation, score = part.get("update_rollout", 0.0), part["generate_and_weights"], part["score"]
        return {
            "generate": generation - weights,
            "score": score,
            "logprobs": part["experience"] - generation - score,
            "update_actor": total - part["experience"],
            "update_rollout": weights,
        }

    steps = [of(total, part) for total, part in zip(seconds, parts, strict=True)]
    return {name: statistics.median(step[name] for step in steps) for name in steps[0]}


def dataset(path: str) -> Dataset:
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    return Dataset.from_list([{"prompt": [{"role": "user", "content": row["question"]}]} for row in rows])


def adapters(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def start_vllm_once() -> None:
    """Trainers after the first get the engine of the first: they ask for the same one, and send it their weights before each generation."""
    engines: dict[str, Any] = {}
    real = vllm_generation.LLM

    def engine(**named: Any) -> Any:
        key = repr(sorted(named.items()))
        if key not in engines:
            engines[key] = real(**named)
        return engines[key]

    vllm_generation.LLM = engine


def main() -> None:
    options = arguments()
    options.dir.mkdir(parents=True, exist_ok=True)
    on_gpu = torch.cuda.is_available()
    if options.generation == "vllm":
        start_vllm_once()
    before, found = dict(os.environ), []
    for words in options.settings:
        try:
            found.append(measure(options, words, on_gpu))
        except Exception as error:  # whatever a setting raises; the others go on
            traceback.print_exc()
            found.append({"setting": words, "failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]})
        (options.dir / "measured.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
        print(json.dumps(found[-1]), flush=True)
        for name in set(os.environ) - set(
            before
        ):  # TRL sets RANK for vLLM; the next trainer would take it for a launcher's, and wrap its model
            if name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
                del os.environ[name]
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
