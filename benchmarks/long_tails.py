"""What over-sampling (rollout.oversample) saves when answers have long tails, and what it costs.

    python benchmarks/long_tails.py                                                                         simulated, on any machine
    python benchmarks/long_tails.py --model 0.5b --tokenizer DIR --data train.jsonl                         verl's own command

Simulated: lengths are drawn as in packing.py, and all answers of a step grow at the same pace. Each line is the mean over many steps:

    decode steps   of a step, until its groups have finished; the time of generation follows them
    generated      tokens over those that are trained on
    short steps    mean length of the answers of steps without abandoned prompts
    all steps      mean length of all answers that are trained on
    waiting        most prompts that wait at the end of a step

Measured: a model with random weights, which stops at each token with the same probability. Each line is the mean over the steps after the
first, of a run of its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402
from packing import draw  # noqa: E402

from verl.run import read_metrics  # noqa: E402

SHARES = (0.0, 0.125, 0.25, 0.5)


def simulate(share: float, options: argparse.Namespace) -> dict[str, float]:
    """Return the numbers of a line."""
    random, wanted = np.random.default_rng(0), options.answers // options.samples
    waiting: list[np.ndarray] = []
    steps, trained, short, generated, most = [], [], [], 0, 0
    for _ in range(options.steps):
        if share > 0 and len(waiting) >= wanted:
            groups, waiting = waiting[:wanted], waiting[wanted:]
        else:
            more = argparse.Namespace(**{**vars(options), "answers": (wanted + int(np.ceil(wanted * share))) * options.samples})
            groups = sorted(map(np.array, draw(random, more)), key=lambda lengths: int(lengths.max()))
            waiting += groups[wanted:]
            short += [group.mean() for group in groups[:wanted]]
        steps.append(int(groups[:wanted][-1].max()) if len(groups) > wanted else max(int(group.max()) for group in groups))
        trained += [group.mean() for group in groups[:wanted]]
        generated += sum(int(np.minimum(group, steps[-1]).sum()) for group in groups)
        most = max(most, len(waiting))
    of_trained = float(np.mean(trained)) * options.samples * wanted * options.steps
    return {
        "decode steps": float(np.mean(steps)),
        "generated": generated / of_trained,
        "short steps": float(np.mean(short)),
        "all steps": float(np.mean(trained)),
        "waiting": float(most),
    }


def measure(share: float, model: Path, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Run verl ppo, and return the means of its steps after the first."""
    directory = folder / f"run-{share:g}"
    keys = {
        "data.train_files": options.data,
        "data.prompts_per_step": options.answers // options.samples,
        "model.partial_pretrain": model,
        "optim.lr": 1e-7,
        "reward.name": "format",
        "rollout.samples_per_prompt": options.samples,
        "rollout.max_new_tokens": options.longest,
        "rollout.oversample": share,
        "algorithm.keep_reference": "false",
        "trainer.total_training_steps": options.steps,
        "trainer.save_freq": "never",
        "trainer.default_local_dir": directory,
    }
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={options.processes}", "-m"] if options.processes > 1 else []
    command = [sys.executable, "-m", *launcher, "verl.trainer.ppo_trainer", *(f"{key}={value}" for key, value in keys.items())]
    subprocess.run(command, cwd=ROOT, check=True)  # noqa: S603
    lines = read_metrics(directory)[1:]
    names = "step_seconds seconds_generate waiting_share waiting_update fullest_rank abandoned_tokens drawn_response_tokens".split()
    shown = [*(f"perf/{name}" for name in names), "rl/response_tokens", "rl/asked_again"]
    return {name.partition("/")[2]: float(np.mean([line[name] for line in lines])) for name in shown if name in lines[0]}


def prepare(options: argparse.Namespace, folder: Path) -> Path:
    """Return a model with random weights whose answers end after `--mean` tokens on average."""
    import torch
    from sft import prepare_model

    model = Path(prepare_model(options, folder, torch.cuda.is_available()))
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    config = model / "generation_config.json"
    generation = json.loads(config.read_text()) if config.exists() else {}
    stops = list(range(100, 100 + max(1, vocabulary // options.mean)))
    config.write_text(json.dumps({**generation, "eos_token_id": stops}))
    return model


def table(lines: dict[float, dict[str, float]]) -> None:
    names = list(dict.fromkeys(name for line in lines.values() for name in line))
    print("oversample  " + "  ".join(names))
    for share, line in lines.items():
        print(f"{share:>10g}  " + "  ".join(f"{line.get(name, 0.0):>{len(name)}.4g}" for name in names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a shape with random weights, as in sft.py: tiny, 0.5b, …; without it, lengths are simulated")
    parser.add_argument("--tokenizer", help="directory of the tokenizer")
    parser.add_argument("--data", help="JSON lines with question and answer")
    numbers = {"answers": 512, "samples": 8, "mean": 400, "longest": 2048, "prompt": 0, "steps": 0, "processes": 1}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--spread", type=float, default=1.0, help="simulated: standard deviation of the logarithm of a length")
    parser.add_argument("--shares", default=",".join(map(str, SHARES)), help="values of rollout.oversample")
    options = parser.parse_args()
    shares = [float(share) for share in options.shares.split(",")]
    if options.model is None:
        options.steps = options.steps or 200
        table({share: simulate(share, options) for share in shares})
        return
    options.steps = options.steps or 6
    with tempfile.TemporaryDirectory() as temporary:
        model = prepare(options, Path(temporary))
        table({share: measure(share, model, options, Path(temporary)) for share in shares})


if __name__ == "__main__":
    main()
