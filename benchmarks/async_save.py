"""How long checkpoints hold up training: the longest step without saves, with saves, and with saves beside training.

    python benchmarks/async_save.py --model DIR --data train.jsonl [--before CHECKOUT] [--out results.json]

Prints JSON. Each run is a process of its own with the same steps. With `--before`, another checkout of the project runs too, whose saves
and starts are the measure for ours. Times are seconds on the host's clock; the device is waited for at the end of each step.

    longest_step    longest time between the ends of two steps, saves included
    median_step     median of these times
    stall           longest_step of the run - median_step of the run without saves
    saves           time of each save: until it is committed
    start           from the start of the process to its first step, in a run that resumes from the run with saves
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 2  # steps that compile and allocate
MODES = {
    "none": "trainer.save_freq=never",
    "sync": "trainer.save_freq={every}",
    "async": "trainer.save_freq={every} trainer.async_save=true",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of the project as it was")
    parser.add_argument("--model", type=Path, required=True, help="a model directory")
    parser.add_argument("--data", type=Path, required=True, help="JSON lines with question and answer")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=20, help="steps between saves; while one is written, another waits")
    parser.add_argument("--rows", type=int, default=16, help="rows of a step")
    parser.add_argument("--work", type=Path, help="where checkpoints are written; a temporary directory by default")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("words", nargs="*", help="further key=value for the trainer")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=words.work) as folder:
        found = measure(words, Path(folder))
    text = json.dumps(found, indent=1)
    print(text)
    if words.out:
        words.out.write_text(text + "\n")


def measure(words: argparse.Namespace, work: Path) -> dict[str, Any]:
    trees = {"after": ROOT, **({} if words.before is None else {"before": words.before.resolve()})}
    found: dict[str, Any] = {"device": device(), "steps": words.steps, "every": words.every}
    for name, tree in trees.items():
        modes = MODES if name == "after" else {"sync": MODES["sync"]}
        runs = {mode: run(tree, words, work / f"{name}-{mode}", keys.format(every=words.every)) for mode, keys in modes.items()}
        more = f"{MODES['none']} trainer.total_training_steps={words.steps + 1}"
        start = run(tree, words, work / f"{name}-sync", more)["start"]
        found[name] = {**runs, "start": start}
    plain = found["after"]["none"]["median_step"]
    for tree in trees:
        for mode in ("sync", "async"):
            if mode in found[tree]:
                found[tree][mode]["stall"] = found[tree][mode]["longest_step"] - plain
    return found


def run(tree: Path, words: argparse.Namespace, directory: Path, keys: str) -> dict[str, Any]:
    """Train in a process of its own, and return its times."""
    out = directory.with_suffix(".json")
    argv = [
        f"data.train_files={words.data.resolve()}",
        f"data.train_batch_size={words.rows}",
        f"model.partial_pretrain={words.model.resolve()}",
        f"trainer.default_local_dir={directory}",
        f"trainer.total_training_steps={words.steps}",
        "trainer.max_ckpt_to_keep=1",
        "trainer.logger=[]",
        *keys.split(),  # after the steps: the last word counts
        *words.words,
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, __file__, "--worker", str(out), *argv]
    environment["STARTED"] = str(time.time())
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)  # noqa: S603 - this file itself
    if done.returncode != 0:
        raise SystemExit(f"exit code {done.returncode} in {tree}: {' '.join(argv)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(out.read_text())
    print(f"{tree} {keys}: {found}", file=sys.stderr, flush=True)
    return found


def worker(out: Path, argv: list[str]) -> None:
    """Train with a watch on the ends of steps and on saves."""
    import torch

    from verl.engine import checkpoint
    from verl.engine.engine import Engine
    from verl.trainer import fsdp_sft_trainer

    ends: list[float] = []
    saves: list[float] = []
    started = float(os.environ["STARTED"])
    first: list[float] = []

    def step(self: Engine, *arguments: Any) -> Any:
        first.append(time.time() - started)
        result = train_step(self, *arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        return result

    def save(*arguments: Any) -> Any:
        since = time.perf_counter()
        result = save_now(*arguments)
        saves.append(time.perf_counter() - since)
        return result

    train_step, save_now = Engine.train_step, checkpoint.save
    Engine.train_step, checkpoint.save = step, save  # type: ignore[method-assign, assignment]
    if any(word == "trainer.async_save=true" for word in argv):
        watch_background(saves)
    fsdp_sft_trainer.train(fsdp_sft_trainer.load_config(fsdp_sft_trainer.SFTConfig, argv))
    times = [after - before for before, after in itertools.pairwise(ends)][WARM_UP:]
    found = {"longest_step": max(times, default=0), "median_step": statistics.median(times or [0]), "saves": saves, "start": first[0]}
    out.write_text(json.dumps(found))


def watch_background(saves: list[float]) -> None:
    """Measure saves beside training, from the copy to the commit."""
    from verl.engine.background import Background
    from verl.engine.draft import Draft

    since: list[float] = []

    def start(self: Background, *arguments: Any) -> None:
        since.append(time.perf_counter())
        start_now(self, *arguments)

    def commit(self: Draft, *arguments: Any) -> Path:
        saved = commit_now(self, *arguments)
        saves.append(time.perf_counter() - since[-1])
        return saved

    start_now, commit_now = Background.start, Draft.commit
    Background.start, Draft.commit = start, commit  # type: ignore[method-assign]


def device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


if __name__ == "__main__":
    worker(Path(sys.argv[2]), sys.argv[3:]) if sys.argv[1:2] == ["--worker"] else main()
