"""Runs of the trainers: their words, how a process of its own runs one, and what it leaves behind."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from places import ROOT

from verl.config.load import load_config
from verl.config.sft import SFTConfig
from verl.run import Run, read_metrics

SFT, PPO, REWARD = (("-m", f"verl.trainer.{name}") for name in ("fsdp_sft_trainer", "ppo_trainer", "reward_trainer"))
SECRET = "hf_abcdefghijklmnopqrstuvwxyz"
CLOCK = "perf/"  # metrics that depend on the clock


Metrics: TypeAlias = list[dict[str, float]]  # of each step


def as_words(keys: Mapping[str, object], changes: Mapping[str, object]) -> list[str]:
    """`key=value` of each key; a change is written as an argument of Python's, as in `optim__lr=1e-3`."""
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in {**keys, **changed}.items()]


def command(*words: object, processes: int = 0, env: Mapping[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python with these words and what they print kept, or torchrun with so many processes, to its end.

    Args:
        options: of `subprocess.run`.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nnodes=1", f"--nproc_per_node={processes}"] if processes else []
    own = {"PYTHONPATH": str(ROOT), "WANDB_MODE": "", "WANDB_API_KEY": "", **({"OMP_NUM_THREADS": "1"} if processes else {})}
    environment = {**os.environ, **own, **(env or {})}
    return subprocess.run([sys.executable, *launcher, *map(str, words)], capture_output=True, text=True, env=environment, **options)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics_of(directory: Path) -> Metrics:
    return read_metrics(directory)


def losses(metrics: Metrics) -> list[float]:
    return [line["train/loss"] for line in metrics]


def timeless(metrics: Metrics) -> Metrics:
    """Without what depends on the clock."""
    return [{name: value for name, value in line.items() if not name.startswith(CLOCK)} for line in metrics]


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def run_with(directory: Path, *words: str, total_steps: int = 500) -> Run:
    """A run that has not begun, of a config that holds a password and SECRET."""
    given = [
        "data.train_files=https://user:secret-word@host/train.jsonl",
        f"model.partial_pretrain={SECRET}",
        f"trainer.default_local_dir={directory}",
    ]
    run = Run(load_config(SFTConfig, [*given, *words]))
    run.directory.mkdir(parents=True, exist_ok=True)
    run.total_steps = total_steps
    return run
