"""Speed before and after a change: fine-tuning, generation and a step of GRPO, on one GPU, in one run.

    git worktree add .before COMMIT
    python benchmarks/before_after.py --before .before --tokenizer DIR --data train.jsonl --out results.json

Each measurement runs in both trees in turn, `--repeats` times; the best rate of each tree counts, and the ratio is after / before.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REWARD = '''"""1 where the bytes of an answer have an odd sum, so that groups differ."""


def score(prompt: str, response: str, row: dict) -> float:
    return float(sum(response.encode()) % 2)
'''
GRPO = (
    "data.prompts_per_step=64 rollout.samples_per_prompt=8 rollout.max_new_tokens=256 algorithm.name=grpo trainer.total_training_steps=16 "
    "trainer.save_freq=never model.enable_gradient_checkpointing=false model.compile=true data.max_tokens_per_micro_batch=32768 "
    "optim.lr=1e-6 algorithm.keep_reference=false"
)
WARM_UP = 3  # steps of GRPO that compile and record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a checkout of the project as it was")
    parser.add_argument("--model", default="0.5b", help="a shape of benchmarks/sft.py with random weights")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", type=Path, required=True, help="JSON lines with question and answer")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", default="sft,generation,grpo")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    words = parser.parse_args()
    trees = {"before": words.before.resolve(), "after": ROOT}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        found: dict[str, dict[str, list[float]]] = {}
        for name in words.only.split(","):
            found[name] = {tree: [] for tree in trees}
            for number in range(words.repeats):
                for tree, path in trees.items():
                    rate = MEASUREMENTS[name](path, words, work)
                    found[name][tree].append(rate)
                    print(f"{name} {tree} {number + 1}: {rate:,.1f}", flush=True)
    ratios = {name: max(rates["after"]) / max(rates["before"]) for name, rates in found.items()}
    for name, ratio in ratios.items():
        print(f"{name}: after / before = {ratio:.3f}")
    if words.out:
        words.out.write_text(json.dumps({"rates": found, "ratios": ratios, "device": device()}, indent=1) + "\n")


def sft(tree: Path, words: argparse.Namespace, work: Path) -> float:
    """Tokens/s of steps of 16 rows (the median)."""
    out = work / "sft.json"
    shape = f"--model {words.model} --rows 16 --warmup 40 --steps 60 --only verl"
    run(tree, "benchmarks/sft.py", *shape.split(), *inputs(words), "--work", str(work / "models"), "--out", str(out))
    return float(json.loads(out.read_text())["results"][0]["median_tokens_per_second"])


def generation(tree: Path, words: argparse.Namespace, work: Path) -> float:
    """Tokens/s of 256 answers of 256 tokens."""
    out = work / "rollout.json"
    shape = f"--model {words.model} --only native"
    run(tree, "benchmarks/rollout.py", *shape.split(), *inputs(words), "--work", str(work / "models"), "--out", str(out))
    return float(json.loads(out.read_text())["results"][0]["tokens_per_second"])


def grpo(tree: Path, words: argparse.Namespace, work: Path) -> float:
    """Steps of 64 prompts × 8 answers × 256 tokens in an hour."""
    reward, directory = work / "odd.py", Path(tempfile.mkdtemp(dir=work))
    reward.write_text(REWARD)
    if not any((work / "models").rglob(f"model-{words.model}")):
        sft(tree, words, work)  # makes the model
    model = next((work / "models").rglob(f"model-{words.model}"))
    places = [f"data.train_files={words.data.resolve()}", f"model.partial_pretrain={model}", f"reward.name={reward}"]
    run(tree, "-m", "verl.trainer.ppo_trainer", *GRPO.split(), *places, f"trainer.default_local_dir={directory}")
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return 3600 / statistics.median(line["perf/step_seconds"] for line in lines[WARM_UP:])


MEASUREMENTS: dict[str, Any] = {"sft": sft, "generation": generation, "grpo": grpo}


def inputs(words: argparse.Namespace) -> list[str]:
    return ["--tokenizer", str(Path(words.tokenizer).resolve()), "--data", str(words.data.resolve())]


def run(tree: Path, *command: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True)  # noqa: S603 - this command itself
    if done.returncode != 0:
        raise SystemExit(f"exit code {done.returncode} in {tree}: {' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


if __name__ == "__main__":
    main()
