"""A step of GRPO by phase: verl with its own engine and with vLLM and, with --peers, TRL with vLLM in its process, on one GPU, in one call.

    python benchmarks/rl.py --tokenizer DIR --data train.jsonl --peers --only 0.5b-full,7b-lora --out results.json

A case is a shape with random weights, trained as a whole or with adapters. Each measurement is a process of its own, and the median of
its steps after the warm-up counts. TRL is measured at several settings, of which the fastest counts. What is not installed, and what fails,
is named, and the rest goes on. After each measurement, the results so far are written to --out. `--list` says how long each may take.
"""

import argparse
import importlib.util
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from before_after import REWARD  # noqa: E402
from peers import settings  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.markup import escape  # noqa: E402
from rich.table import Table  # noqa: E402
from sft import SHAPES, environment, execute, machine, matrix_rate, prepare_model  # noqa: E402

from verl.errors import UserError, exit_on_user_error  # noqa: E402
from verl.rl.clock import PHASES  # noqa: E402
from verl.trainer.profile import STEPS as PROFILED_STEPS  # noqa: E402

CASES = ("0.5b-full", "0.5b-lora", "1.5b-full", "1.5b-lora", "7b-lora")
ENGINES = ("native", "vllm", "trl")
NEEDS = {"native": (), "vllm": ("vllm",), "trl": ("trl", "datasets", "peft")}
MICRO_BATCH = {"0.5b": 32768, "1.5b": 24576, "7b": 16384}  # tokens, so that vLLM's share of the memory stays free
# Seconds of a measurement on one H200, its start included: of verl's engines, and of one of TRL's settings after vLLM's start.
EXPECTED = {"0.5b": (60, 120, 60), "1.5b": (70, 130, 80), "7b": (140, 200, 150)}
VLLM_STARTS = 100
PROMPT = 512  # tokens of the longest prompt


@dataclass(frozen=True)
class Result:
    """A row of the table: a case on an engine.

    Attributes:
        setting: in words.
        step_seconds: the median of `seconds`.
        tokens_per_second: tokens of prompts and answers of a step over its seconds, the median.
        phases: median seconds of each phase, under the names of `verl.rl.clock.PHASES`.
        peak_gib: the most that PyTorch held, on a GPU.
        device_gib: the most memory of the GPU in use, by all of the process, vLLM's too.
        seconds_to_first_step: from the command until its first step was done.
        tried: TRL's other settings, each with its step_seconds or why it failed.
        profile: with --phases, how long the GPU was busy, and its kernels.
        failed: why there are no numbers.
    """

    case: str
    engine: str
    setting: str
    command: str
    step_seconds: float | None = None
    seconds: list[float] = field(default_factory=list)
    tokens_per_second: float | None = None
    phases: dict[str, float] = field(default_factory=dict)
    peak_gib: float | None = None
    device_gib: float | None = None
    seconds_to_first_step: float | None = None
    tried: dict[str, Any] = field(default_factory=dict)
    profile: str | None = None
    failed: str | None = None


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="directory of the tokenizer for the shapes")
    parser.add_argument("--data", type=Path, help="JSON lines with question and answer")
    parser.add_argument("--only", help=f"cases, with commas between: SHAPE-full or SHAPE-lora; default: {','.join(CASES)}")
    parser.add_argument("--engines", default=",".join(ENGINES), help="with commas between; trl needs --peers")
    parser.add_argument("--peers", action="store_true", help="measure TRL too")
    parser.add_argument(
        "--peer-settings", nargs="+", metavar="SETTING", help="of TRL, as peers/trl_grpo.py takes them, in place of its best"
    )
    parser.add_argument("--prompts", type=int, default=64, help="of a step")
    parser.add_argument("--answers", type=int, default=8, help="to each prompt")
    parser.add_argument("--new-tokens", type=int, default=256, help="of an answer, at most; random weights hardly ever end one")
    parser.add_argument("--lora-rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8, help="of verl that are timed")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--peer-steps", type=int, default=3, help="of TRL that are timed")
    parser.add_argument("--peer-warmup", type=int, default=1, help="steps before them")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.3, help="vLLM's share of the GPU's memory, in both trainers")
    parser.add_argument("--keys", nargs="*", default=[], metavar="KEY=VALUE", help="more keys for verl")
    parser.add_argument("--phases", action="store_true", help="print the seconds of each phase, and profile three more steps of verl")
    parser.add_argument("--list", action="store_true", help="print what would be measured, and about how long it takes on one H200")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--work", type=Path, help="keep models, logs and runs in WORK/rl-benchmark")
    parser.add_argument("--timeout", type=float, default=500, help="seconds that one measurement may take")
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--prepare", metavar="SHAPE", help=argparse.SUPPRESS)  # this process makes a model, since it would keep GPU memory
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = arguments(argv)
    if options.prepare:
        prepare_alone(options)
        return
    chosen = list(choose(options))
    if options.list:
        list_expected(chosen, options)
        return
    with folder_of(options) as folder:
        run(options, chosen, folder)


def choose(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Yield the cases and engines of a command. Raises UserError for what could not be measured."""
    engines = options.engines.split(",")
    if unknown := [name for name in engines if name not in ENGINES]:
        raise UserError(f"no engine {unknown[0]!r}", where="--engines", fix=", ".join(ENGINES))
    for name in ("prompts", "answers", "new_tokens", "lora_rank", "steps", "warmup", "peer_steps", "peer_warmup"):
        if getattr(options, name) < 1:
            raise UserError(f"found {getattr(options, name)}", where=f"--{name.replace('_', '-')}", fix="give at least 1")
    for case in (options.only or ",".join(CASES)).split(","):
        shape, _, method = case.rpartition("-")
        if shape not in SHAPES or method not in ("full", "lora"):
            raise UserError(f"no case {case!r}", where="--only", fix=f"SHAPE-full or SHAPE-lora, of {', '.join(SHAPES)}")
        if case == "7b-full":
            what = "7 billion weights with their gradients and Adam's moments in float32 take 113 GiB, and leave no room for activations"
            raise UserError(what, where="--only", fix="measure 7b-lora")
        yield from ((case, engine) for engine in engines if engine != "trl" or options.peers)
    if not options.list:
        for name in ("tokenizer", "data"):
            if getattr(options, name) is None:
                raise UserError("is missing", where=f"--{name}", fix="see --help")


def list_expected(chosen: Iterable[tuple[str, str]], options: argparse.Namespace) -> None:
    total = 0
    for case, engine in chosen:
        shape = case.rpartition("-")[0]
        native, vllm, setting = EXPECTED.get(shape, (60, 120, 60))
        tried = len(options.peer_settings or settings.trl_grpo(shape, on_gpu=True))
        seconds = {"native": native, "vllm": vllm, "trl": VLLM_STARTS + tried * setting}[engine]
        total += seconds
        print(f"{case:<12} {engine:<8} about {seconds} s")
    print(f"in all about {total} s, and half a minute for a 7B model's weights")


@contextmanager
def folder_of(options: argparse.Namespace) -> Iterator[Path]:
    if options.work is None:
        with tempfile.TemporaryDirectory(prefix="rl-benchmark-") as temporary:
            yield Path(temporary)
        return
    folder = options.work.expanduser().resolve() / "rl-benchmark"  # of its own: what is in it is written over
    folder.mkdir(parents=True, exist_ok=True)
    yield folder


def run(options: argparse.Namespace, chosen: list[tuple[str, str]], folder: Path) -> None:
    """Measure all in turn, print the table and write the results."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    (folder / "odd.py").write_text(REWARD, encoding="utf-8")
    about: dict[str, Any] = {}
    results: list[Result] = []
    for case, engine in chosen:
        missing = [package for package in NEEDS[engine] if importlib.util.find_spec(package) is None]
        if missing:
            result = Result(case, engine, "", "", failed=f"skipped: {' and '.join(missing)} not installed")
        else:
            made = prepare(case.rpartition("-")[0], options, folder)
            about = about or {**made["machine"], "command": shlex.join(["python", "benchmarks/rl.py", *sys.argv[1:]]), **describe(options)}
            measure = measure_trl if engine == "trl" else measure_verl
            result = measure(case, engine, Path(made["model"]), made["on_gpu"], options, folder)
        results.append(result)
        console.print(line(result), highlight=False, markup=False)
        if options.out is not None:
            content = {**about, "results": [asdict(result) for result in results], "ratios": ratios(results)}
            options.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    console.print("\n".join(f"{key}: {value}" for key, value in about.items()), highlight=False, markup=False)
    console.print(table(results))
    if options.phases:
        console.print(phases_table(results))
        for result in results:
            if result.profile:
                console.print(f"{result.case} {result.engine}: {result.profile}", highlight=False, markup=False)


def prepare(shape: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The model's directory and the machine, from a process of its own: this one takes no GPU memory from what it measures."""
    command = [sys.executable, __file__, "--prepare", shape, "--tokenizer", str(Path(options.tokenizer).expanduser().resolve())]
    command += ["--work", str(folder), *(["--cpu"] if options.cpu else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - this file
    if done.returncode != 0:
        raise UserError(f"the weights of {shape} cannot be made: {(done.stderr.strip().splitlines() or ['?'])[-1]}", where="--tokenizer")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def prepare_alone(options: argparse.Namespace) -> None:
    import torch

    on_gpu = torch.cuda.is_available() and not options.cpu
    options.model = options.prepare
    directory = prepare_model(options, options.work, on_gpu)
    known = options.work / "machine.json"
    if not known.exists():
        known.write_text(json.dumps(machine(on_gpu, matrix_rate(torch.device("cuda" if on_gpu else "cpu")))), encoding="utf-8")
    print(json.dumps({"model": str(directory), "on_gpu": on_gpu, "machine": json.loads(known.read_text(encoding="utf-8"))}))


def measure_verl(case: str, engine: str, model: Path, on_gpu: bool, options: argparse.Namespace, folder: Path) -> Result:
    """verl's own command, writing no checkpoint."""
    directory = folder / f"run-{case}-{engine}-{time.time_ns()}"
    keys = verl_keys(case, engine, on_gpu, options)
    places = [f"data.train_files={Path(options.data).expanduser().resolve()}", f"model.partial_pretrain={model}"]
    places += [f"reward.name={folder / 'odd.py'}", f"trainer.default_local_dir={directory}"]
    command = ["-m", "verl.trainer.ppo_trainer", *keys, *places]
    metrics = directory / "metrics.jsonl"
    first, device_gib, failed = watched(command, folder / f"{case}-{engine}.log", metrics, on_gpu, options)
    setting = " ".join([f"micro-batches of {micro_batch(case):,} tokens", *options.keys])
    result = Result(case, engine, setting, shlex.join(["python", *command]), seconds_to_first_step=first, failed=failed)
    if failed is not None:
        return result
    lines = [json.loads(text) for text in metrics.read_text(encoding="utf-8").splitlines()]
    steps = lines[options.warmup : options.warmup + options.steps]

    def median(key: str) -> float:
        return statistics.median(step[key] for step in steps)

    named = {phase: f"perf/seconds_{phase}" for phase in PHASES}
    profiles = sorted((directory / "profile").glob("*.txt"))
    found = {
        "step_seconds": median("perf/step_seconds"),
        "seconds": [step["perf/step_seconds"] for step in steps],
        "tokens_per_second": median("perf/tokens_per_second"),
        "phases": {phase: median(key) for phase, key in named.items() if key in steps[0]},
        "peak_gib": max(step["perf/peak_memory_gib"] for step in steps) if on_gpu else None,
        "device_gib": device_gib,
        "profile": profiles[0].read_text(encoding="utf-8") if profiles else None,
    }
    return Result(**{**asdict(result), **found})


def micro_batch(case: str) -> int:
    return MICRO_BATCH.get(case.rpartition("-")[0], 8192)


def verl_keys(case: str, engine: str, on_gpu: bool, options: argparse.Namespace) -> list[str]:
    """The settings of verl: its fastest, without activation checkpointing, as for the peers."""
    more = 1 + PROFILED_STEPS if options.phases else 0
    words: dict[str, Any] = {
        "algorithm.name": "grpo",
        "algorithm.keep_reference": "false",
        "data.prompts_per_step": options.prompts,
        "data.max_prompt_length": PROMPT,
        "data.overlong_prompts": "drop",
        "data.max_tokens_per_micro_batch": max(micro_batch(case), PROMPT + options.new_tokens),
        "rollout.name": engine,
        "rollout.samples_per_prompt": options.answers,
        "rollout.max_new_tokens": options.new_tokens,
        "model.enable_gradient_checkpointing": "false",
        "optim.lr": "1e-6",
        "trainer.total_training_steps": options.warmup + options.steps + more,
        "trainer.save_freq": "never",
        "trainer.resume_mode": "disable",
    }
    if on_gpu:
        words["model.compile"] = "true"  # as in a run as long as its users' would be; "auto" sees the few steps of this one
    if engine == "vllm":
        sequences = options.prompts * options.answers
        words |= {
            "rollout.gpu_memory_utilization": options.gpu_memory_utilization,
            "rollout.max_sequences": sequences,
            "rollout.sleep": "false",
        }
    if case.endswith("-lora"):
        words |= {"model.lora_rank": options.lora_rank}
    if options.phases:
        words["trainer.profile_step"] = options.warmup + options.steps + 2
    return [*(f"{key}={value}" for key, value in words.items()), *options.keys]


def measure_trl(case: str, engine: str, model: Path, on_gpu: bool, options: argparse.Namespace, folder: Path) -> Result:
    """TRL's trainer at its settings; with vLLM in its process where vLLM is installed, else with transformers' generation."""
    shape, _, method = case.rpartition("-")
    generation = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    directory = folder / f"trl-{case}-{time.time_ns()}"
    tried = options.peer_settings or settings.trl_grpo(shape, on_gpu=on_gpu)
    named: dict[str, Any] = {"model": model, "data": Path(options.data).expanduser().resolve(), "dir": directory, "generation": generation}
    named |= {
        "prompts": options.prompts,
        "answers": options.answers,
        "new-tokens": options.new_tokens,
        "max-length": PROMPT + options.new_tokens,
    }
    named |= {"warmup": options.peer_warmup, "steps": options.peer_steps, "gpu-memory-utilization": options.gpu_memory_utilization}
    named |= {"dtype": "bfloat16" if method == "lora" and on_gpu else "float32"}
    named |= {"lora-rank": options.lora_rank} if method == "lora" else {}
    words = [word for key, value in named.items() for word in (f"--{key}", str(value))]
    command = [str(ROOT / "benchmarks" / "peers" / "trl_grpo.py"), *words, "--settings", *tried]
    directory.mkdir()
    log = folder / f"{case}-{engine}.log"
    first, device_gib, failed = watched(command, log, directory / "first_step", on_gpu, options, stand_in=any("flash" in s for s in tried))
    measured = directory / "measured.json"
    found = json.loads(measured.read_text(encoding="utf-8")) if measured.exists() else []
    return best_of_trl(case, generation, shlex.join(["python", *command]), found, first, device_gib, failed)


def best_of_trl(
    case: str, generation: str, command: str, found: list[dict[str, Any]], first: float | None, device_gib: float | None, failed: str | None
) -> Result:
    """The fastest of TRL's settings, beside what the others gave. If it was stopped at one, those before it count."""
    tried = {setting["setting"]: setting.get("failed") or statistics.median(setting["seconds"]) for setting in found}
    if failed is not None:
        tried["the next one"] = failed
    done = [setting for setting in found if "failed" not in setting]
    if not done:
        reason = failed or "; ".join(f"{name}: {reason}" for name, reason in tried.items())
        return Result(case, f"trl, {generation}", "", command, tried=tried, failed=reason)
    best = min(done, key=lambda setting: statistics.median(setting["seconds"]))
    rates = [tokens / seconds for tokens, seconds in zip(best["tokens"], best["seconds"], strict=True)]
    return Result(
        case,
        f"trl, {generation}",
        best["setting"],
        command,
        step_seconds=statistics.median(best["seconds"]),
        seconds=best["seconds"],
        tokens_per_second=statistics.median(rates),
        phases=best["phases"],
        peak_gib=best["peak_gib"],
        device_gib=device_gib,
        seconds_to_first_step=first,
        tried=tried,
    )


def watched(
    command: list[str], log: Path, starts: Path, on_gpu: bool, options: argparse.Namespace, *, stand_in: bool = False
) -> tuple[float | None, float | None, str | None]:
    """Run a command; returns seconds to its first step, the GPU memory that it took at most, and why it failed."""
    env = environment(on_gpu)
    if not stand_in:  # vLLM would take it for the package
        folder = str(ROOT / "benchmarks" / "peers" / "flash_attn")
        env["PYTHONPATH"] = ":".join(path for path in env["PYTHONPATH"].split(":") if path != folder)
    used = used_bytes() if on_gpu else None
    before, most = used, used

    def watch() -> None:
        nonlocal most
        if most is not None:
            most = max(most, used_bytes() or 0)

    first, _, failed = execute(command, log, starts, timeout=options.timeout, on_gpu=on_gpu, env=env, watch=watch)
    return first, None if most is None or before is None else (most - before) / 2**30, failed


def used_bytes() -> int | None:
    """Memory of the first visible GPU that is in use by anyone, from the driver; None if its library is missing."""
    try:
        import pynvml

        pynvml.nvmlInit()
        first = int(os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0])
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(first)).used)
    except Exception:  # whatever a driver or its absence raises: the column stays empty
        return None


def describe(options: argparse.Namespace) -> dict[str, str]:
    work = f"{options.prompts} prompts × {options.answers} answers × {options.new_tokens} tokens, GRPO, no reference model"
    steps = f"verl: median of {options.steps} steps after {options.warmup}; TRL: of {options.peer_steps} after {options.peer_warmup}"
    return {"work": f"{work}; reward 1 for an odd sum of bytes; LoRA of rank {options.lora_rank} on all linear layers", "steps": steps}


def ratios(results: list[Result]) -> dict[str, float]:
    """Seconds of a step of verl over those of TRL, by case and engine."""
    base = {result.case: result.step_seconds for result in results if result.engine.startswith("trl") and result.step_seconds}
    own = [result for result in results if not result.engine.startswith("trl") and result.step_seconds and result.case in base]
    return {f"{result.case} {result.engine}": (result.step_seconds or 0.0) / base[result.case] for result in own}


def line(result: Result) -> str:
    tried = "".join(f"; {name}: {value if isinstance(value, str) else f'{value:.2f} s'}" for name, value in result.tried.items())
    if result.step_seconds is None:
        return f"{result.case} {result.engine}: {result.failed}{tried}"
    return f"{result.case} {result.engine}: {result.step_seconds:.2f} s a step{tried}"


def table(results: list[Result]) -> Table:
    shown = Table("case", "engine", "setting")
    for column in ("step s", "generate s", "train s", "weights s", "tokens/s", "peak GiB", "GPU GiB", "first step s", "step ÷ TRL's"):
        shown.add_column(column, justify="right")
    against = ratios(results)
    for r in results:
        if r.step_seconds is None:
            shown.add_row(r.case, r.engine, f"[red]{escape(r.failed or '')}[/red]")
            continue
        train = sum(seconds for phase, seconds in r.phases.items() if phase.startswith("update_a") or phase in ("logprobs", "values"))
        parts = [f"{value:.2f}" for value in (r.step_seconds, r.phases["generate"], train, r.phases.get("update_rollout", 0.0))]
        memory = ["" if gib is None else f"{gib:.1f}" for gib in (r.peak_gib, r.device_gib, r.seconds_to_first_step)]
        ratio = against.get(f"{r.case} {r.engine}")
        shown.add_row(r.case, r.engine, escape(r.setting), *parts, f"{r.tokens_per_second:,.0f}", *memory, f"{ratio:.3f}" if ratio else "")
    return shown


def phases_table(results: list[Result]) -> Table:
    shown = Table("case", "engine", title="seconds of a step, medians by phase")
    named = [phase for phase in PHASES if any(result.phases.get(phase, 0.0) >= 0.0005 for result in results)]
    for column in (*named, "rest", "step"):
        shown.add_column(column, justify="right")
    for r in results:
        if r.step_seconds is not None:
            rest = r.step_seconds - sum(r.phases.values())
            values = [*(r.phases.get(phase, 0.0) for phase in named), rest, r.step_seconds]
            shown.add_row(r.case, r.engine, *(f"{value:.3f}" for value in values))
    return shown


if __name__ == "__main__":
    exit_on_user_error(main, sys.argv[1:])
