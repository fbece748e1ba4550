"""Golden values: what training and evaluation give on a small model, number by number, to see that a change changes none of them.

    python tests/golden.py             compare with tests/golden.json, bit for bit
    python tests/golden.py --record    write tests/golden.json anew, after a change that is meant to change a number

It runs fine-tuning (full and with adapters, in one process and in two), GRPO, PPO, DPO, a reward model and the evaluator through
their command lines, and keeps each step's metrics, a hash of the saved weights, and a hash of the answers. Floating-point results
depend on the processor and on PyTorch, so the file names both: on another machine, record the values of the commit before yours first.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).with_suffix(".json")
ROOT = Path(__file__).resolve().parent.parent
SFT, PPO, REWARD = (f"verl.trainer.{name}" for name in ("fsdp_sft_trainer", "ppo_trainer", "reward_trainer"))
CLOCK = "perf/"  # metrics that depend on the clock
VOWELS = '''"""The share of letters in the answer that are vowels."""


def score(prompt: str, response: str, row: dict) -> float:
    return sum(c in "aeiou" for c in response.lower()) / max(1, len(response))
'''
TRAINING = "model.partial_pretrain=model trainer.save_freq=-1 trainer.logger=[] trainer.seed=3"
FINE_TUNING = f"{TRAINING} data.train_files=train.jsonl data.val_files=test.jsonl data.max_length=128 optim.lr=1e-3"
TWENTY = f"{FINE_TUNING} data.train_batch_size=8 data.micro_batch_size_per_gpu=2 trainer.total_training_steps=20 trainer.test_freq=10"
ADAPTERS = "model.lora_rank=8 model.lora_alpha=16"
ANSWERS = (
    f"{TRAINING} data.train_files=train.jsonl data.prompts_per_step=4 data.max_prompt_length=128 rollout.samples_per_prompt=4 "
    "rollout.max_new_tokens=12 reward.name=vowels.py optim.lr=1e-3 trainer.total_training_steps=3"
)
PAIRS = f"{TRAINING} data.train_files=pairs.jsonl data.max_length=160 data.train_batch_size=8 optim.lr=1e-3 trainer.total_training_steps=3"
# Name, processes, module, words.
RUNS: list[tuple[str, int, str, str]] = [
    ("sft", 1, SFT, TWENTY),
    ("sft-lora", 1, SFT, f"{TWENTY} {ADAPTERS}"),
    ("sft-2", 2, SFT, f"{TWENTY} model.strategy=fsdp2"),
    ("sft-lora-2", 2, SFT, f"{TWENTY} {ADAPTERS} model.strategy=ddp"),
    ("grpo", 1, PPO, f"{ANSWERS} algorithm.name=grpo algorithm.updates_per_step=2 algorithm.kl_coef=0.01"),
    ("ppo", 1, PPO, f"{ANSWERS} algorithm.name=ppo critic.optim.lr=1e-3"),
    ("dpo", 1, REWARD, f"{PAIRS} algorithm.name=dpo"),
    ("reward-model", 1, REWARD, PAIRS),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write tests/golden.json")
    record = parser.parse_args().record
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    if record:
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"recorded {len(found['runs'])} runs in {GOLDEN}")
        return 0
    differences = compare(json.loads(GOLDEN.read_text(encoding="utf-8")), found)
    print("\n".join(differences) or f"{len(found['runs'])} runs are the same, bit for bit")
    return 1 if differences else 0


def measure(folder: Path) -> dict[str, Any]:
    """Values of every run, by its name."""
    write_inputs(folder)
    with ThreadPoolExecutor(2) as two:  # each process computes on one core, so that the order of sums is always the same
        found = dict(two.map(lambda run: (run[0], train(folder, *run)), sorted(RUNS, key=lambda run: -run[1])))
    found["eval"] = evaluate(folder, "sft")
    return {"machine": machine(), "runs": {name: found[name] for name in [*(run[0] for run in RUNS), "eval"]}}


def machine() -> dict[str, str]:
    import torch
    import transformers

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"processor": processor, "torch": torch.__version__, "transformers": transformers.__version__}


def write_inputs(folder: Path) -> None:
    """Problems of the demo, pairs of a right and a wrong answer, a reward, and a small model."""
    from verl.demo.problems import write_problems
    from verl.models.tiny import write_tiny_model

    train, _ = write_problems(folder / "train.jsonl", folder / "test.jsonl", 160, 20, seed=5)
    write_tiny_model(folder / "model", [f"{p.question}\n{p.answer}" for p in train])
    pairs = [{"prompt": problem.question, "chosen": problem.answer, "rejected": other.answer} for problem, other in pairwise(train)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "vowels.py").write_text(VOWELS)


def train(folder: Path, name: str, processes: int, module: str, words: str) -> dict[str, Any]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    run(folder, [*launcher, "-m", module, *words.split(), f"trainer.default_local_dir={folder / name}"])
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return {
        "metrics": [{key: value for key, value in line.items() if not key.startswith(CLOCK)} for line in lines],
        "weights": {path.name: digest(path) for path in sorted((folder / name).glob("global_step_*/*.safetensors"))},
    }


def evaluate(folder: Path, name: str) -> dict[str, Any]:
    """Answers of a checkpoint, greedy ones and drawn ones."""
    found = {}
    for kind, words in (("greedy", ""), ("drawn", "n=2 temperature=1.0")):
        output = folder / f"eval-{kind}"
        step = next((folder / name).glob("global_step_*"))
        run(
            folder,
            f"-m verl.eval.sft_evaluator model_path={step} test_file=test.jsonl output_dir={output} max_new_tokens=24 {words}".split(),
        )
        predictions = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
        text = json.dumps([prediction["response"] for prediction in predictions])
        found[kind] = {
            "exact_match": json.loads((output / "results.json").read_text())["exact_match"],
            "responses": hashlib.sha256(text.encode()).hexdigest(),
        }
    return found


def run(folder: Path, words: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder)}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"exit code {done.returncode}: {' '.join(words)}\n{done.stdout}\n{done.stderr}")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def compare(golden: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """A line for each value that differs."""
    lines = (
        [f"recorded on another machine: {golden['machine']}, this is {found['machine']}"] if golden["machine"] != found["machine"] else []
    )
    before, after = leaves(golden["runs"]), leaves(found["runs"])
    return lines + [
        f"{key}: was {before.get(key)!r}, is {after.get(key)!r}" for key in {**before, **after} if before.get(key) != after.get(key)
    ]


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        return {prefix: tree}
    return {name: value for key, child in items for name, value in leaves(child, f"{prefix}/{key}" if prefix else str(key)).items()}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    raise SystemExit(main())
