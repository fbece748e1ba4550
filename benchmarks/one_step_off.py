"""How much faster steps are if the next step's answers are drawn while the trainer learns, for answers of very unequal length.

    python benchmarks/one_step_off.py --runs both,ahead,partial [--out results.json]      two GPUs, over 200 s
    python benchmarks/one_step_off.py --device cpu --hidden 64 --layers 2 --prompts 4 --samples 4 --mean 40 --longest 200

GRPO on a model of Qwen2.5-0.5B's shape with random weights. Its tokens are nearly equally likely, and one in 400 of them is a stop token in
its generation_config.json: the lengths of answers are then geometric, with mean 400, and are cut off at 2,048. Four runs, one after the
other, each a `torchrun` of two processes with the same prompts and the same number of answers a step:

    both             all roles on both GPUs: each trains and generates (staleness 0, the default)
    split            one GPU trains, the other generates, in turns (staleness 0)
    ahead            rollout.staleness=1: the answers of the next step are drawn meanwhile
    partial          and rollout.partial=true: new weights do not wait for them

A run's first steps compile and record; the median of the others counts, from the end of a step to the end of the next. tokens/s are those
of answers and prompts that a step trains on, over whole steps.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from verl.demo.problems import make_problems  # noqa: E402
from verl.models.tiny import tiny_tokenizer  # noqa: E402

VOCABULARY, ORDINARY = 151_936, 1_024  # tokens of the model, and those that the tokenizer has and prompts are made of
SPLIT = [*(f"mapping.{role}=[0]" for role in ("actor", "critic", "reference", "reward")), "mapping.rollout=[1]"]
AHEAD = [*SPLIT, "rollout.staleness=1", "algorithm.importance_weights=truncate"]
RUNS = {"both": [], "split": SPLIT, "ahead": AHEAD, "partial": [*AHEAD, "rollout.partial=true"]}
REWARD = '''"""Differs among the answers to a prompt, whatever they say."""


def score(prompt: str, response: str, row: dict) -> float:
    return len(response) % 7 / 6
'''


@dataclass(frozen=True)
class Result:
    """A line of the table.

    Attributes:
        seconds: of a whole step, the median.
        tokens_per_second: prompts and answers that are trained, over all seconds of the steps that count.
        answer_tokens, longest: mean and largest number of tokens of an answer.
        lag: mean number of updates by which the weights that drew a token were older.
        difference: mean absolute difference between the log-probabilities of drawing and of learning; 0.01 or so is rounding.
        phases: seconds of the parts of a step on the first training process, medians.
        failed: why there are no numbers.
    """

    name: str
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    answer_tokens: float = 0.0
    longest: int = 0
    lag: float = 0.0
    difference: float = 0.0
    phases: dict[str, float] | None = None
    wall_seconds: float = 0.0
    failed: str | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="that count")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--prompts", type=int, default=48, help="of a step")
    parser.add_argument("--samples", type=int, default=8, help="answers to each")
    parser.add_argument("--mean", type=int, default=400, help="tokens of an answer")
    parser.add_argument("--longest", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--runs", default=",".join(RUNS), help="which of these")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    if options.device == "cuda" and torch.cuda.device_count() < 2:
        raise SystemExit(f"error: found {torch.cuda.device_count()} GPUs, and needs 2")
    with tempfile.TemporaryDirectory() as folder:
        prepare(options, Path(folder))
        results: list[Result] = []
        for name in options.runs.split(","):
            results.append(measure(name, options, Path(folder)))
            print(f"{name}: {results[-1].failed or f'{results[-1].tokens_per_second:,.0f} tokens/s'}", flush=True)
            if options.out:
                options.out.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    show(results, options)


def prepare(options: argparse.Namespace, folder: Path) -> None:
    """Write the model, its prompts and the reward."""
    problems, _ = make_problems(options.prompts * (options.warmup + options.steps), 1, seed=1)
    (folder / "train.jsonl").write_text("".join(json.dumps(problem.row()) + "\n" for problem in problems))
    (folder / "reward.py").write_text(REWARD)
    tokenizer = tiny_tokenizer((f"{p.question}\n{p.answer}" for p in problems), vocab_size=ORDINARY)
    vocabulary = VOCABULARY if options.device == "cuda" else 8_192
    heads, key_value_heads = max(1, options.hidden // 64), 2 if options.hidden >= 128 else 1
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 5 + options.hidden * 3 // 7,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=max(4096, 2 * options.longest),
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        model = Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16 if options.device == "cuda" else torch.float32)
    stops = range(vocabulary - vocabulary // options.mean, vocabulary)
    model.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id, *stops], pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def measure(name: str, options: argparse.Namespace, folder: Path) -> Result:
    """Train with the settings of a name, in processes of their own."""
    directory, steps = folder / name, options.warmup + options.steps
    words = [
        f"data.train_files={folder}/train.jsonl",
        f"data.prompts_per_step={options.prompts}",
        f"data.max_prompt_length={256}",
        "data.max_tokens_per_micro_batch=32768",
        f"model.partial_pretrain={folder}/model",
        "model.strategy=ddp",
        "algorithm.keep_reference=false",
        f"reward.name={folder}/reward.py",
        f"rollout.samples_per_prompt={options.samples}",
        f"rollout.max_new_tokens={options.longest}",
        "rollout.name=native",
        f"trainer.total_training_steps={steps}",
        "trainer.save_freq=never",
        "trainer.logger=[]",
        f"trainer.default_local_dir={directory}",
        *RUNS[name],
    ]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nnodes=1", "--nproc_per_node=2"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, **({"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {})}
    environment.setdefault("OMP_NUM_THREADS", "1" if options.device == "cpu" else "8")
    since = time.perf_counter()
    command = [sys.executable, *launcher, "-m", "verl.trainer.ppo_trainer", *words]
    process = subprocess.Popen(  # noqa: S603 - the command above
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    ends = watch(directory / "metrics.jsonl", process)
    said, _ = process.communicate()
    wall = time.perf_counter() - since
    if process.returncode:
        return Result(name, wall_seconds=wall, failed="\n".join(said.splitlines()[-25:]))
    return result_of(name, directory, ends, options, wall)


def watch(metrics: Path, process: "subprocess.Popen[str]") -> list[float]:
    """Return when each line of the metrics was written, on this process's clock."""
    ends: list[float] = []
    while process.poll() is None:
        lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        ends += [time.perf_counter()] * (lines - len(ends))
        time.sleep(0.005)
    return ends


def result_of(name: str, directory: Path, ends: list[float], options: argparse.Namespace, wall: float) -> Result:
    lines: list[dict[str, Any]] = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    counted, last = lines[options.warmup :], options.warmup - 1
    ends = (ends + [time.perf_counter()] * len(lines))[: len(lines)]
    each = [end - begin for begin, end in zip(ends[last:], ends[options.warmup :], strict=False)]
    answers = [
        json.loads(line)["tokens"]
        for number in range(options.warmup, len(lines))
        for line in (directory / "rollouts" / f"step_{number + 1}.jsonl").read_text().splitlines()
    ]
    tokens = lines[-1]["train/tokens"] - lines[last]["train/tokens"]
    phases = sorted({phase for line in counted for phase in line if phase.startswith("perf/seconds_")})
    return Result(
        name,
        statistics.median(each),
        tokens / sum(each),
        statistics.mean(answers),
        max(answers),
        statistics.mean(line["rl/weight_lag"] for line in counted),
        statistics.mean(line["rl/rollout_difference"] for line in counted),
        {phase.removeprefix("perf/seconds_"): statistics.median(line.get(phase, 0.0) for line in counted) for phase in phases},
        wall,
    )


def show(results: list[Result], options: argparse.Namespace) -> None:
    console = Console(width=None if sys.stdout.isatty() else 170)
    work = f"{options.prompts} prompts × {options.samples} answers a step, {options.steps} steps after {options.warmup}"
    title = f"{work}, on 2 × {device(options)}"
    table = Table(
        "run", "s a step", "tokens/s", "× both", "answer tokens", "longest", "lag", "difference", "seconds of phases", "wall s", title=title
    )
    base = next((result.tokens_per_second for result in results if result.name == "both"), 0.0)
    for result in results:
        if result.failed is not None:
            table.add_row(result.name, "failed", *[""] * 7, f"{result.wall_seconds:.0f}")
            continue
        phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in (result.phases or {}).items())
        faster = f"{result.tokens_per_second / base:.2f}" if base else ""
        row = [result.name, f"{result.seconds:.2f}", f"{result.tokens_per_second:,.0f}", faster, f"{result.answer_tokens:.0f}"]
        table.add_row(*row, f"{result.longest:,}", f"{result.lag:.2f}", f"{result.difference:.4f}", phases, f"{result.wall_seconds:.0f}")
    console.print(table)
    for result in results:
        if result.failed is not None:
            print(f"--- {result.name}\n{result.failed}", file=sys.stderr)


def device(options: argparse.Namespace) -> str:
    return torch.cuda.get_device_name(0) if options.device == "cuda" else "one thread of a CPU"


if __name__ == "__main__":
    main()
