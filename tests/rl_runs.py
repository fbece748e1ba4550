"""A small model with problems to answer, and a reward that its random answers differ in, for tests of reinforcement learning."""

import json
from pathlib import Path
from typing import Any

from tiny import write_problems_and_model

from verl.trainer import ppo_trainer

REWARD = '''"""The share of letters in the answer that are vowels."""


def score(prompt: str, response: str, row: dict) -> float:
    return sum(c in "aeiou" for c in response.lower()) / max(1, len(response))
'''
# What depends on the clock alone.
TIMES = ("perf/",)


def write_folder(folder: Path) -> Path:
    write_problems_and_model(folder)
    (folder / "vowels.py").write_text(REWARD)
    return folder


def words(folder: Path, output: str, **changes: object) -> list[str]:
    keys: dict[str, object] = {
        "data.train_files": folder / "train.jsonl",
        "data.prompts_per_step": 4,
        "data.max_prompt_length": 128,
        "data.max_tokens_per_micro_batch": 600,
        "model.partial_pretrain": folder / "model",
        "model.enable_gradient_checkpointing": "false",
        "optim.lr": 1e-4,
        "critic.optim.lr": 1e-3,
        "reward.name": folder / "vowels.py",
        "rollout.samples_per_prompt": 4,
        "rollout.max_new_tokens": 12,
        "trainer.default_local_dir": folder / output,
        "trainer.total_training_steps": 4,
    }
    keys |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in keys.items()]


def train(folder: Path, output: str, **changes: object) -> list[dict[str, float]]:
    """Run in this process; the metrics of each step."""
    ppo_trainer.main(words(folder, output, **changes))
    return metrics_of(folder / output)


def metrics_of(directory: Path) -> list[dict[str, float]]:
    return lines_of(directory / "metrics.jsonl")


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(metrics: list[dict[str, float]]) -> list[dict[str, float]]:
    """Without what depends on the clock."""
    return [{name: value for name, value in line.items() if not name.startswith(TIMES)} for line in metrics]
