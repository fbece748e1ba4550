"""Speed of fine-tuning: verl as its users run it and, with --peers, other trainers, on one machine, model and file.

    python benchmarks/sft.py --model 0.5b --tokenizer DIR --data train.jsonl --tokens 65536 --peers --out results.json

Each contestant is a process of its own. Counted are real tokens, without padding, of the steps after the warm-up; a trace of three steps
behind them says for which share of the time the GPU waited. Rows are taken in the file's order, again from the beginning where they
do not last, so that no step is cut short by the end of an epoch.
"""

import argparse
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from peers import settings  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.markup import escape  # noqa: E402
from rich.table import Table  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    OlmoeConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3_5TextConfig,
)

from verl.config.sft import DataConfig  # noqa: E402
from verl.config.shared import ModelConfig  # noqa: E402
from verl.data.documents import load_documents  # noqa: E402
from verl.data.tables import Columns  # noqa: E402
from verl.engine.outline import training_flops  # noqa: E402
from verl.errors import UserError, exit_on_user_error  # noqa: E402
from verl.models.adapters.lora import add_adapters  # noqa: E402
from verl.models.load import load_tokenizer  # noqa: E402
from verl.trainer.profile import STEPS as PROFILED_STEPS  # noqa: E402

# Shapes of published models; those with "tiny" are none of them.
# Qwen2.5: hidden, intermediate, layers, heads, key-value heads, tied embeddings, vocabulary.
QWEN2 = {
    "tiny": (128, 512, 2, 4, 2, True, 151936),
    "0.5b": (896, 4864, 24, 14, 2, True, 151936),
    "1.5b": (1536, 8960, 28, 12, 2, True, 151936),
    "7b": (3584, 18944, 28, 28, 4, False, 152064),
}
# Qwen3.5's text part, three of four layers with linear attention: hidden, intermediate, layers, heads, key-value heads, size of a head,
# heads of linear attention, their size.
QWEN3_5 = {"tiny-qwen3.5": (64, 128, 4, 4, 2, 16, 2, 16), "qwen3.5-0.5b": (1024, 3584, 24, 8, 2, 256, 16, 128)}
# OLMoE, a mixture of experts: hidden, intermediate of an expert, layers, heads, experts, experts of a token.
OLMOE = {"tiny-olmoe": (64, 32, 2, 4, 8, 2), "olmoe": (2048, 1024, 16, 16, 64, 8)}
VOCABULARY = 151936  # of Qwen2.5's tokenizer, in place of their own
SHAPES = {**QWEN2, **QWEN3_5, **OLMOE}
SPREAD = 3.5  # standard deviations of a step's tokens that the micro-batch's budget leaves room for
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "flash-attn", "flash-linear-attention")


@dataclass(frozen=True)
class Work:
    """What every contestant does.

    Attributes:
        data: the rows of all steps, none used twice by a contestant.
        rows: documents a step.
        packed_rows: rows of max_length tokens a step that hold about as many tokens.
        budget: tokens of a micro-batch, so large that nearly every step is one.
    """

    model: Path
    data: Path
    folder: Path
    max_length: int
    rows: int
    packed_rows: int
    budget: int
    warmup: int
    steps: int
    on_gpu: bool
    timeout: float

    @property
    def total_steps(self) -> int:
        """On a GPU with those of the trace, which is a step away from the timed ones."""
        return self.warmup + self.steps + (1 + PROFILED_STEPS if self.on_gpu else 0)


@dataclass(frozen=True)
class Contestant:
    """One trainer at one setting.

    Attributes:
        setting: in words.
        dtype: of the weights that the optimizer updates.
        arguments: of Python.
        folder: what it writes, emptied before it starts.
        starts: a file that appears there when the first step is done.
        read: the measured numbers, once the command has ended.
    """

    name: str
    setting: str
    dtype: str
    arguments: list[str]
    folder: Path
    starts: Path
    read: Callable[[], "Measured"]


@dataclass(frozen=True)
class Measured:
    """The timed steps, one entry each, and what was seen around them."""

    tokens: list[int]
    supervised_tokens: list[int]
    seconds: list[float]
    peak_gib: float | None
    busy_share: float | None
    compile_seconds: float | None = None


@dataclass(frozen=True)
class Result:
    """A line of the table.

    Attributes:
        tokens_per_second: all tokens of the timed steps over all their seconds.
        median_tokens_per_second: of the single steps.
        mfu: against the matrix rate measured in this run, with the FLOP that verl/engine/outline.py counts.
        peak_gib: on a GPU the allocator's, else resident memory.
        waiting_share: share of a step in which nothing ran on the GPU.
        seconds_to_first_step: from the command until its first step is done (verl: logged); caches of compiled code are as found.
        compile_seconds: of these, as far as the contestant tells.
        failed: why there are no numbers.
    """

    name: str
    setting: str
    dtype: str
    command: str
    tokens_per_second: float | None = None
    median_tokens_per_second: float | None = None
    supervised_tokens_per_second: float | None = None
    mfu: float | None = None
    peak_gib: float | None = None
    waiting_share: float | None = None
    seconds_to_first_step: float | None = None
    compile_seconds: float | None = None
    failed: str | None = None


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help=f"a model directory, or a shape with random weights: {', '.join(SHAPES)}")
    parser.add_argument("--tokenizer", help="directory of the tokenizer for a shape with random weights")
    parser.add_argument("--data", required=True, help="JSON lines with question and answer")
    parser.add_argument("--tokens", type=int, default=65536, help="of a step, about")
    parser.add_argument("--rows", type=int, help="of a step, in place of --tokens")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=12, help="that are timed")
    parser.add_argument("--warmup", type=int, default=6, help="steps before them")
    parser.add_argument("--keys", nargs="*", default=[], metavar="KEY=VALUE", help="more keys for verl")
    parser.add_argument("--lora-rank", type=int, help="measure adapters of this rank at all linear layers beside full fine-tuning")
    parser.add_argument("--lora-targets", default=settings.ALL_LINEAR, help="modules with adapters, with commas between")
    parser.add_argument("--peers", action="store_true", help="measure the other trainers too")
    parser.add_argument("--peer-dtypes", default="float32,bfloat16", help="of the weights that their optimizer updates")
    parser.add_argument("--only", help="names of contestants, with commas between")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--work", type=Path, help="keep the model, logs and traces in WORK/sft-benchmark")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that one contestant may take")
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = arguments(argv)
    check(options)
    if options.work is not None:
        folder = options.work.expanduser().resolve() / "sft-benchmark"  # of its own: what is in it is written over
        folder.mkdir(parents=True, exist_ok=True)
        run(options, folder)
    else:
        with tempfile.TemporaryDirectory(prefix="sft-benchmark-") as temporary:
            run(options, Path(temporary))


def check(options: argparse.Namespace) -> None:
    """Raises UserError for what could not be measured."""
    if options.model in SHAPES and options.tokenizer is None:
        raise UserError(f"{options.model} has random weights and no tokenizer", where="--tokenizer", fix="give the directory of one")
    for name in ("rows", "steps", "warmup", "lora_rank"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"found {value}", where=f"--{name.replace('_', '-')}", fix="give at least 1")
    if options.tokens < options.max_length:
        raise UserError(f"{options.tokens} tokens cannot hold a row of {options.max_length}", where="--tokens", fix="lower --max-length")


def run(options: argparse.Namespace, folder: Path) -> None:
    """Measure all contestants in turn, print the table and write the results."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    on_gpu = torch.cuda.is_available() and not options.cpu
    model = prepare_model(options, folder, on_gpu)
    work = prepare_work(options, model, folder, on_gpu)
    chosen = choose(contestants(options, work), options.only)
    rate = matrix_rate(torch.device("cuda" if on_gpu else "cpu"))
    flops = step_flops(model)
    adapted_flops = step_flops(model, options.lora_rank, targets_of(options)) if options.lora_rank else flops
    if on_gpu:
        torch.cuda.empty_cache()  # the contestants are to have all of it
    about = {**machine(on_gpu, rate), "command": shlex.join(["python", "benchmarks/sft.py", *sys.argv[1:]]), **describe(work)}
    console.print("\n".join(f"{key}: {value}" for key, value in about.items()), highlight=False, markup=False)
    results = []
    for contestant in chosen:
        results.append(measure(contestant, work, rate, adapted_flops if contestant.dtype == settings.ADAPTERS else flops))
        console.print(line(results[-1]), highlight=False, markup=False)
    ratios = compare(results)
    console.print(table(results))
    for sentence in ratios.values():
        console.print(sentence["text"], highlight=False, markup=False)
    if options.out is not None:
        content = {**about, "results": [asdict(result) for result in results], "ratios": {key: v["ratio"] for key, v in ratios.items()}}
        options.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def prepare_model(options: argparse.Namespace, folder: Path, on_gpu: bool) -> Path:
    """The model's directory; a shape is made once, in bfloat16, the weights random."""
    if options.model not in SHAPES:
        return Path(options.model).expanduser().resolve()
    directory = folder / f"model-{options.model}"
    if not (directory / "tokenizer_config.json").exists():
        torch.manual_seed(0)
        with torch.device("cuda" if on_gpu else "cpu"):
            AutoModelForCausalLM.from_config(config_of(options.model), dtype=torch.bfloat16).save_pretrained(directory)
        AutoTokenizer.from_pretrained(options.tokenizer).save_pretrained(directory)
    return directory


def config_of(shape: str) -> PretrainedConfig:
    if shape in QWEN3_5:
        return qwen3_5_config(shape)
    return olmoe_config(shape) if shape in OLMOE else qwen2_config(shape)


def qwen3_5_config(shape: str) -> Qwen3_5TextConfig:
    hidden, intermediate, layers, heads, key_value_heads, size, linear_heads, linear_size = QWEN3_5[shape]
    return Qwen3_5TextConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=size,
        linear_num_key_heads=linear_heads,
        linear_num_value_heads=linear_heads,
        linear_key_head_dim=linear_size,
        linear_value_head_dim=linear_size,
        tie_word_embeddings=True,
        vocab_size=VOCABULARY,
    )


def olmoe_config(shape: str) -> OlmoeConfig:
    hidden, intermediate, layers, heads, experts, chosen = OLMOE[shape]
    return OlmoeConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_experts=experts,
        num_experts_per_tok=chosen,
        vocab_size=VOCABULARY,
        pad_token_id=None,
        eos_token_id=None,
    )


def qwen2_config(shape: str) -> Qwen2Config:
    hidden, intermediate, layers, heads, key_value_heads, tied, vocabulary = QWEN2[shape]
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        tie_word_embeddings=tied,
        vocab_size=vocabulary,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )


def prepare_work(options: argparse.Namespace, model: Path, folder: Path, on_gpu: bool) -> Work:
    """Rows a step, the budget that holds them, and a file of as many rows as all steps take."""
    data = DataConfig(max_length=options.max_length, cache_dir=str(folder / "cache-of-lengths"))
    lengths_N = load_documents(data, Columns.of(data), options.data, load_tokenizer(str(model)), key="--data").lengths_N
    mean, deviation = float(np.mean(lengths_N)), float(np.std(lengths_N))
    rows = options.rows or max(1, round(options.tokens / mean))
    budget = max(options.max_length, mean * rows + SPREAD * deviation * math.sqrt(rows))
    work = Work(
        model=model,
        data=folder / "rows.jsonl",
        folder=folder,
        max_length=options.max_length,
        rows=rows,
        packed_rows=max(1, round(mean * rows / options.max_length)),
        budget=math.ceil(budget / 256) * 256,
        warmup=options.warmup,
        steps=options.steps,
        on_gpu=on_gpu,
        timeout=options.timeout,
    )
    needed = math.ceil(1.1 * work.total_steps * rows)  # packed rows may hold a few more documents
    lines = Path(options.data).expanduser().read_text(encoding="utf-8").splitlines()
    repeated = (lines * math.ceil(needed / len(lines)))[:needed]
    work.data.write_text("".join(f"{text}\n" for text in repeated), encoding="utf-8")
    return work


def contestants(options: argparse.Namespace, work: Work) -> list[Contestant]:
    """verl first, then the peers."""
    rank, everyone = options.lora_rank, [verl(work, options.keys)]
    if rank is not None:
        targets = targets_of(options)
        keys = [] if targets == settings.ALL_LINEAR else [f"model.target_modules=[{','.join(targets)}]"]
        everyone.append(verl(work, [f"model.lora_rank={rank}", "optim.lr=1e-4", *keys, *options.keys], adapters=True))
    if options.peers:
        dtypes = options.peer_dtypes.split(",")
        shape = {"on_gpu": work.on_gpu, "fixed_rows": options.rows is not None}
        everyone += [trl(work, s) for s in settings.trl(**shape, dtypes=dtypes)]
        if rank is not None:
            beside = settings.trl(**shape, dtypes=["bfloat16"])
            everyone += [trl(work, settings.with_adapters(s, rank, options.lora_targets)) for s in beside]
    return everyone


def targets_of(options: argparse.Namespace) -> str | list[str]:
    """The modules that get adapters, as verl and peft name them."""
    return options.lora_targets if options.lora_targets == settings.ALL_LINEAR else options.lora_targets.split(",")


def choose(everyone: list[Contestant], only: str | None) -> list[Contestant]:
    names = [contestant.name for contestant in everyone]
    wanted = only.split(",") if only else names
    if unknown := [name for name in wanted if name not in names]:
        raise UserError(f"no contestant {unknown[0]!r}", where="--only", fix=f"{', '.join(names)}; all but verl need --peers")
    return [contestant for contestant in everyone if contestant.name in wanted]


def verl(work: Work, keys: list[str], *, adapters: bool = False) -> Contestant:
    """The product's own command, writing no checkpoint."""
    name = "verl-lora" if adapters else "verl"
    directory = work.folder / name
    words = {
        "data.train_files": work.data,
        "data.max_length": work.max_length,
        "data.train_batch_size": work.rows,
        "data.max_tokens_per_micro_batch": work.budget,
        "data.cache_dir": directory / "cache",
        "model.partial_pretrain": work.model,
        "model.enable_gradient_checkpointing": "false",
        "trainer.total_training_steps": work.total_steps,
        "trainer.save_freq": "never",
        "trainer.default_local_dir": directory / "run",
        "trainer.resume_mode": "disable",
    }
    if work.on_gpu:
        words["trainer.profile_step"] = work.warmup + work.steps + 2
        words["model.compile"] = "true"  # a run as long as its users' would be; "auto" sees the few steps of this one
    pairs = [*(f"{key}={value}" for key, value in words.items()), *keys]
    dtype = next((key.partition("=")[2] for key in keys if key.startswith("model.param_dtype=")), "float32")
    dtype = settings.ADAPTERS if adapters else dtype
    setting = " ".join([f"{work.rows} rows, micro-batches of {work.budget:,} tokens, {dtype} weights", *keys])
    command = ["-m", "verl.trainer.fsdp_sft_trainer", *pairs]
    started = directory / "run" / "metrics.jsonl"
    return Contestant(name, setting, dtype, command, directory, started, lambda: read_verl(directory / "run", work))


def read_verl(directory: Path, work: Work) -> Measured:
    steps = [json.loads(text) for text in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    timed = slice(work.warmup, work.warmup + work.steps)

    def each(key: str) -> list[int]:
        totals = [int(step[key]) for step in steps]
        return np.diff(totals, prepend=0)[timed].tolist()

    profiles = sorted((directory / "profile").glob("*.txt"))
    busy = re.search(r"GPU busy ([\d.]+)%", profiles[0].read_text(encoding="utf-8")) if profiles else None
    compiled = re.search(r"compiled the layers in ([\d.]+) s", (directory / "train.log").read_text(encoding="utf-8"))
    return Measured(
        tokens=each("train/tokens"),
        supervised_tokens=each("train/supervised_tokens"),
        seconds=[step["perf/step_seconds"] for step in steps[timed]],
        peak_gib=max(step.get("perf/peak_memory_gib", 0.0) for step in steps) if work.on_gpu else None,
        busy_share=float(busy[1]) / 100 if busy else None,
        compile_seconds=float(compiled[1]) if compiled else None,
    )


def trl(work: Work, setting: settings.Setting) -> Contestant:
    directory = work.folder / setting.name
    rows = work.packed_rows if setting.packs else work.rows
    words = f"{rows} rows{f' of {work.max_length:,} tokens' if setting.packs else ''}, {setting.words}, {setting.dtype} weights"
    named = {"model": work.model, "data": work.data, "dir": directory, "rows": rows, "max-length": work.max_length}
    named |= {"warmup": work.warmup, "steps": work.steps}
    pairs = [word for key, value in named.items() for word in (f"--{key}", str(value))]
    command = [str(ROOT / "benchmarks" / "peers" / "trl_sft.py"), *pairs, *setting.options]

    def read() -> Measured:
        return Measured(**json.loads((directory / "measured.json").read_text(encoding="utf-8")))

    return Contestant(setting.name, words, setting.dtype, command, directory, directory / "first_step", read)


def measure(contestant: Contestant, work: Work, rate: float, flops: Callable[[int, int], float]) -> Result:
    """Run a contestant to its end; one that fails gives a result that says why."""
    shown = shlex.join(["python", *contestant.arguments])
    result = Result(contestant.name, contestant.setting, contestant.dtype, shown)
    log = work.folder / f"{contestant.name}.log"
    shutil.rmtree(contestant.folder, ignore_errors=True)
    seconds_to_first_step, resident_gib, failed = execute(
        contestant.arguments, log, contestant.starts, timeout=work.timeout, on_gpu=work.on_gpu
    )
    if failed is not None:
        return Result(**{**asdict(result), "failed": failed})
    seen = contestant.read()
    seconds = sum(seen.seconds)
    return Result(
        **{
            **asdict(result),
            "tokens_per_second": sum(seen.tokens) / seconds,
            "median_tokens_per_second": statistics.median(t / s for t, s in zip(seen.tokens, seen.seconds, strict=True)),
            "supervised_tokens_per_second": sum(seen.supervised_tokens) / seconds,
            "mfu": flops(sum(seen.tokens), sum(seen.supervised_tokens)) / seconds / rate,
            "peak_gib": seen.peak_gib if work.on_gpu else resident_gib,
            "waiting_share": None if seen.busy_share is None else 1 - seen.busy_share,
            "seconds_to_first_step": seconds_to_first_step,
            "compile_seconds": seen.compile_seconds,
        }
    )


def execute(
    arguments: list[str],
    log: Path,
    starts: Path,
    *,
    timeout: float,
    on_gpu: bool,
    env: dict[str, str] | None = None,
    watch: Callable[[], None] = lambda: None,
) -> tuple[float | None, float, str | None]:
    """Run Python with these arguments.

    Args:
        starts: a file that appears when the first step is done.
        env: in place of `environment(on_gpu)`.
        watch: called a few dozen times a second while it runs.
    Returns:
        seconds until its first step was done, peak resident GiB, and why it failed (None: it did not).
    """
    since, first, late = time.perf_counter(), None, False
    with log.open("wb") as output:
        command, env = [sys.executable, *arguments], env or environment(on_gpu)
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True)  # noqa: S603 - as above
    try:
        while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            watch()
            if first is None and starts.exists():
                first = time.perf_counter() - since
            if not late and time.perf_counter() - since > timeout:
                late = True
                os.killpg(process.pid, signal.SIGKILL)  # its session holds its own processes alone
            time.sleep(0.02)
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    process.returncode, usage = os.waitstatus_to_exitcode(ended[1]), ended[2]  # waited for here, for the sake of its memory
    resident_gib = usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    if late:
        return first, resident_gib, f"did not end within {timeout:.0f} s"
    return first, resident_gib, why(log, process.returncode) if process.returncode else None


def environment(on_gpu: bool) -> dict[str, str]:
    """The project and, where flash_attn is not installed, its stand-in for the peers on PYTHONPATH; on the CPU no GPU is seen."""
    paths = [str(ROOT)]
    if on_gpu and not installed("flash-attn"):
        paths.append(str(ROOT / "benchmarks" / "peers" / "flash_attn"))
    paths += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    changes = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "true"}
    return {**os.environ, **changes, **({} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""})}


def why(log: Path, code: int) -> str:
    """The line of a log that names the error, else its last one."""
    text = re.sub(r"^\[rank\d+\]: ?", "", log.read_text(encoding="utf-8", errors="replace"), flags=re.MULTILINE)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(error: |[\w.]*(Error|Exception|Interrupt)\b)", line)]
    found = (named or lines or ["it said nothing"])[-1]
    return f"{found[:300]} (exit code {code})"


def matrix_rate(device: torch.device) -> float:
    """FLOP/s of the fastest of a few square products of random numbers: bfloat16 on a GPU, float32 on a CPU."""
    on_gpu = device.type == "cuda"
    best = 0.0
    for size in (4096, 8192) if on_gpu else (1024, 2048):
        left, right = (torch.randn(size, size, device=device).to(torch.bfloat16 if on_gpu else torch.float32) for _ in range(2))
        seconds = []
        for _ in range(13):
            since = time.perf_counter()
            left @ right
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - since)
        best = max(best, 2 * size**3 / statistics.median(seconds[3:]))
    return best


def step_flops(path: Path, lora_rank: int | None = None, targets: str | list[str] = settings.ALL_LINEAR) -> Callable[[int, int], float]:
    """FLOP of (tokens, trained tokens), from the model's shape alone; with adapters of that rank, or trained as a whole."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    if lora_rank is not None:
        with torch.device("meta"):
            add_adapters(model, ModelConfig(lora_rank=lora_rank, target_modules=targets), compute_dtype=torch.bfloat16, seed=1)
    return training_flops(model)


def machine(on_gpu: bool, rate: float) -> dict[str, str]:
    """Where, when and with what."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    name = torch.cuda.get_device_name() if on_gpu else f"{cpu[1] if cpu else platform.processor()}, {os.cpu_count()} CPU cores"
    versions = [f"{package} {metadata.version(package)}" for package in PACKAGES if installed(package)]
    stand_in = ["flash_attn: a stand-in on PyTorch's own kernels"] if on_gpu and not installed("flash-attn") else []
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{name}; {platform.system()} {platform.machine()}",
        "versions": ", ".join([f"Python {platform.python_version()}", *versions, *stand_in]),
        "matrix rate": f"{rate / 1e12:,.3g} TFLOP/s {'bfloat16' if on_gpu else 'float32'}",
    }


def installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def describe(work: Work) -> dict[str, str]:
    return {
        "work": (
            f"{work.rows} rows a step, rows of up to {work.max_length:,} tokens; {work.steps} steps are timed after {work.warmup}; "
            f"verl's micro-batch of {work.budget:,} tokens leaves room for {SPREAD} standard deviations of a step's tokens"
        )
    }


def line(result: Result) -> str:
    if result.failed is not None:
        return f"{result.name}: {result.failed}"
    return f"{result.name}: {result.tokens_per_second:,.0f} tokens/s"


def compare(results: list[Result]) -> dict[str, dict[str, Any]]:
    """verl's speed over that of the fastest peer, by the peers' weights, and that of adapters over full fine-tuning."""
    own = {r.name: r for r in results if r.name in ("verl", "verl-lora") and r.tokens_per_second}
    ratios: dict[str, dict[str, Any]] = {}
    for dtype in dict.fromkeys(result.dtype for result in results):
        peers = [r for r in results if r.name not in ("verl", "verl-lora") and r.dtype == dtype and r.tokens_per_second]
        ours = own.get("verl-lora" if dtype == settings.ADAPTERS else "verl")
        if ours is not None and peers:
            best = max(peers, key=lambda peer: peer.tokens_per_second or 0.0)
            ratios[dtype] = _ratio(ours, best, f"the fastest peer with {dtype} weights, {best.name}")
    if len(own) == 2:
        ratios["full"] = _ratio(own["verl-lora"], own["verl"], "full fine-tuning, verl")
    return ratios


def _ratio(ours: Result, other: Result, words: str) -> dict[str, Any]:
    ratio = (ours.tokens_per_second or 0.0) / (other.tokens_per_second or 1.0)
    memory = f", {ours.peak_gib:.1f} GiB against {other.peak_gib:.1f}" if ours.peak_gib and other.peak_gib else ""
    return {"ratio": ratio, "text": f"{ours.name}: {ratio:.2f} × {words}{memory}"}


def table(results: list[Result]) -> Table:
    shown = Table(title=None)
    shown.add_column("name", no_wrap=True)
    shown.add_column("setting")
    for column in ("tokens/s", "median", "supervised/s", "MFU", "peak GiB", "GPU waits", "first step s", "compile s", "× verl"):
        shown.add_column(column, justify="right")
    ours = next((r.tokens_per_second for r in results if r.name == "verl"), None)
    for r in results:
        if r.failed is not None:
            shown.add_row(r.name, f"{escape(r.setting)}: [red]{escape(r.failed)}[/red]")
            continue
        assert r.tokens_per_second is not None
        relative = "" if ours is None else f"{r.tokens_per_second / ours:.2f}"
        rates = [f"{value:,.0f}" for value in (r.tokens_per_second, r.median_tokens_per_second, r.supervised_tokens_per_second) if value]
        waits = "" if r.waiting_share is None else f"{r.waiting_share:.1%}"
        start, compiling = ("" if value is None else f"{value:.1f}" for value in (r.seconds_to_first_step, r.compile_seconds))
        shown.add_row(r.name, escape(r.setting), *rates, f"{r.mfu:.1%}", f"{r.peak_gib:.1f}", waits, start, compiling, relative)
    return shown


if __name__ == "__main__":
    exit_on_user_error(main, sys.argv[1:])
