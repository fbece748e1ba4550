"""Peak memory of preference training beside that of fine-tuning on the same tokens, in one process.

    python benchmarks/preference_memory.py --model 0.5b --out results.json
    python benchmarks/preference_memory.py --model tiny --pairs 2 --cpu

The model has a shape of benchmarks/sft.py with random weights; rows are digits, one token each, so that all documents are equally long.
Each contestant is verl's own command in a process of its own, whose steps are one micro-batch of the same documents: fine-tuning on both
answers of each pair, DPO and KTO with the reference's log-probabilities stored, and with adapters, whose reference is the model with the
adapter switched off. On a GPU, the peak is what PyTorch held in the steps; on a CPU, it is the process's resident memory, in which its
imports outweigh a small model.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from sft import QWEN2, config_of  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from verl.models.tiny import tiny_tokenizer  # noqa: E402

WANTED = 1.15  # peak of preference training over that of fine-tuning
GIB = 2**30
TEMPLATE_TOKENS = 32  # more than the chat template adds to a document
# Name, what it is compared with, trainer, its own keys.
CONTESTANTS = (
    ("sft", None, "fsdp_sft_trainer", ""),
    ("dpo, stored", "sft", "reward_trainer", "algorithm.name=dpo algorithm.reference=stored"),
    ("kto, stored", "sft", "reward_trainer", "algorithm.name=kto algorithm.reference=stored"),
    ("sft lora", None, "fsdp_sft_trainer", "model.lora_rank=16"),
    ("dpo lora, adapter off", "sft lora", "reward_trainer", "algorithm.name=dpo algorithm.reference=adapter_off model.lora_rank=16"),
)


@dataclass
class Result:
    """What a contestant took: tokens of a step, peak in GiB, and its ratio to that of fine-tuning; or why it failed."""

    name: str
    tokens: int = 0
    peak_gib: float = 0.0
    ratio: float | None = None
    failed: str | None = None


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="0.5b", choices=list(QWEN2), help="a shape of benchmarks/sft.py, with random weights")
    parser.add_argument("--pairs", type=int, default=32, help="pairs of a step")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--answer-tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", help="names of contestants, with semicolons between; by default all")
    parser.add_argument("--keys", nargs="*", default=[], help="further keys of all contestants")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = arguments(argv)
    on_gpu = torch.cuda.is_available() and not options.cpu
    names = [name for name, *_ in CONTESTANTS]
    wanted = names if options.only is None else [name.strip() for name in options.only.split(";")]
    if unknown := set(wanted) - set(names):
        raise SystemExit(f"--only: no contestant {', '.join(sorted(unknown))}; there are {'; '.join(names)}")
    with tempfile.TemporaryDirectory() as folder:
        results = measure(options, Path(folder), wanted, on_gpu)
    print(table(results, on_gpu))
    if options.out is not None:
        machine = torch.cuda.get_device_name() if on_gpu else "cpu"
        said = {
            "machine": machine,
            "torch": torch.__version__,
            "options": vars(options) | {"out": None},
            "results": list(map(asdict, results)),
        }
        options.out.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    return 1 if any(result.failed for result in results) else 0


def measure(options: argparse.Namespace, folder: Path, wanted: list[str], on_gpu: bool) -> list[Result]:
    prepare(options, folder, on_gpu)
    results: dict[str, Result] = {}
    for name, other, trainer, keys in CONTESTANTS:
        if name not in wanted:
            continue
        result = run(options, folder, name, trainer, keys.split(), on_gpu)
        if other in results and not result.failed and results[other].peak_gib:
            result.ratio = result.peak_gib / results[other].peak_gib
        results[name] = result
        print(f"{name}: {result.failed or f'{result.peak_gib:.2f} GiB'}", flush=True)
    return list(results.values())


def prepare(options: argparse.Namespace, folder: Path, on_gpu: bool) -> None:
    """Write the model, the pairs, and the same answers as rows of fine-tuning."""
    torch.manual_seed(0)
    config = config_of(options.model)
    with torch.device("cuda" if on_gpu else "cpu"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "model")
    tiny_tokenizer(["0 1 2 3 4 5 6 7 8 9"]).save_pretrained(folder / "model")
    draw = random.Random(0)

    def digits(many: int) -> str:
        return "".join(draw.choices("0123456789", k=many))

    pairs = [
        {"prompt": digits(options.prompt_tokens), "chosen": digits(options.answer_tokens), "rejected": digits(options.answer_tokens)}
        for _ in range(options.pairs * options.steps)
    ]
    answers = [{"question": pair["prompt"], "answer": pair[side]} for pair in pairs for side in ("chosen", "rejected")]
    for name, rows in (("pairs", pairs), ("answers", answers)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(options: argparse.Namespace, folder: Path, name: str, trainer: str, keys: list[str], on_gpu: bool) -> Result:
    """Run a contestant. Documents of a step, and the tokens of its micro-batch, are the same for all."""
    is_paired = trainer == "reward_trainer" and "algorithm.name=kto" not in keys
    longest = options.prompt_tokens + options.answer_tokens + TEMPLATE_TOKENS
    directory = folder / name.replace(" ", "-").replace(",", "")
    words = {
        "data.train_files": folder / ("pairs.jsonl" if trainer == "reward_trainer" else "answers.jsonl"),
        "data.train_batch_size": options.pairs * (1 if is_paired else 2),
        "data.max_length": longest,
        "data.max_tokens_per_micro_batch": 2 * options.pairs * longest,
        "data.cache_dir": folder / "cache",
        "model.partial_pretrain": folder / "model",
        "trainer.total_training_steps": options.steps,
        "trainer.save_freq": "never",
        "trainer.default_local_dir": directory,
    }
    words |= {"data.share_prompts": "never"} if trainer == "reward_trainer" else {}
    command = [sys.executable, "-m", f"verl.trainer.{trainer}", *(f"{key}={value}" for key, value in words.items()), *keys, *options.keys]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    environment |= {} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    log = folder / f"{directory.name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)  # noqa: S603
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return Result(name, failed=f"exit code {process.returncode}: {' '.join(lines[-2:])}")
    steps = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    resident = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB
    peak = max(step["perf/peak_memory_gib"] for step in steps) if on_gpu else resident
    return Result(name, tokens=int(steps[0]["train/tokens"]), peak_gib=peak)


def table(results: list[Result], on_gpu: bool) -> str:
    kind = "peak GiB" if on_gpu else "resident GiB"
    lines = [f"{'':24} {'tokens a step':>13} {kind:>12} {'÷ fine-tuning':>14}   wanted: at most {WANTED}"]
    for result in results:
        ratio = "" if result.ratio is None else f"{result.ratio:.3f}"
        verdict = "" if result.ratio is None else "yes" if result.ratio <= WANTED else "no"
        said = result.failed or f"{result.tokens:>13,} {result.peak_gib:>12.2f} {ratio:>14}   {verdict}"
        lines.append(f"{result.name:24} {said}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
