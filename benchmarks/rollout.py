"""Speed of generation: verl's native engine beside transformers' `generate`, on one machine, model and file, in one run.

    python benchmarks/rollout.py --model 0.5b --tokenizer DIR --data test.jsonl --out results.json

Every engine answers the same questions greedily, in a process of its own, and each answer has exactly --new-tokens tokens: nothing ends
it earlier. Of each engine the first run, which compiles and records, is reported by itself, and the median of those after it counts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from sft import machine, matrix_rate, prepare_model  # noqa: E402
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel  # noqa: E402

from verl.data.render import Renderer  # noqa: E402
from verl.errors import exit_on_user_error  # noqa: E402
from verl.models.load import load_tokenizer  # noqa: E402
from verl.rollout import Options, Sampling  # noqa: E402
from verl.rollout._model import generation_mode  # noqa: E402
from verl.rollout.hf import pad_left  # noqa: E402
from verl.rollout.native import NativeRollout  # noqa: E402

NEVER = -1  # a stop token that no model writes
Run = Callable[[], int]


@dataclass(frozen=True)
class Result:
    """A line of the table.

    Attributes:
        tokens_per_second: generated tokens over all seconds of a run, prompts included; the median of the runs.
        seconds: of each run after the first.
        first_seconds: of the first run, with what it compiles.
        failed: why there are no numbers.
    """

    name: str
    tokens_per_second: float | None = None
    seconds: list[float] | None = None
    first_seconds: float | None = None
    peak_gib: float | None = None
    failed: str | None = None


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model directory, or a shape with random weights: tiny, 0.5b, 1.5b, 7b")
    parser.add_argument("--tokenizer", help="directory of the tokenizer for a shape with random weights")
    parser.add_argument("--data", required=True, help="JSON lines with question")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0, help="of the native engine; the others are greedy")
    parser.add_argument("--only", help=f"some of {','.join(ENGINES)}")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that one engine may take, loading included")
    parser.add_argument("--work", help="where a model with random weights is kept; default: a temporary folder")
    parser.add_argument("--out", help="JSON file for the numbers")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)  # this process measures one engine alone
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = arguments(argv)
    if options.engine:
        measure_alone(options)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.work) if options.work else Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        run(options, folder)


def run(options: argparse.Namespace, folder: Path) -> None:
    on_gpu = torch.cuda.is_available()
    directory = prepare_model(options, folder, on_gpu)
    console, results = Console(soft_wrap=True), []
    for name in (options.only or ",".join(ENGINES)).split(","):
        results.append(in_a_process(name, directory, options, folder))
        console.print(line(results[-1]))
    where = machine(on_gpu, matrix_rate(torch.device("cuda" if on_gpu else "cpu")))
    kept = {name: value for name, value in vars(options).items() if name not in ("work", "out", "engine")}
    work = {**kept, "prompt_tokens": sum(map(len, read_prompts(directory, Path(options.data), options.prompts)))}
    found = {"machine": where, "work": work, "results": [asdict(result) for result in results]}
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    console.print(table(results))


def in_a_process(name: str, directory: Path, options: argparse.Namespace, folder: Path) -> Result:
    """One engine measured where no other has left anything behind."""
    out = folder / f"{name}.json"
    out.unlink(missing_ok=True)
    words = [f"--{key.replace('_', '-')}={getattr(options, key)}" for key in ("data", "prompts", "new_tokens", "repeats", "temperature")]
    command = [sys.executable, __file__, "--engine", name, "--model", str(directory), "--out", str(out), *words]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    try:
        done = subprocess.run(command, timeout=options.timeout, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
    except subprocess.TimeoutExpired:
        last = [f"not done after {options.timeout:g} s"]
    return Result(**json.loads(out.read_text(encoding="utf-8"))) if out.exists() else Result(name, failed=last[0][:300])


def measure_alone(options: argparse.Namespace) -> None:
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    directory = Path(options.model)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, device_map=device, attn_implementation="sdpa").eval()
    model.generation_config = GenerationConfig()
    prompts = read_prompts(directory, Path(options.data), options.prompts)
    result = measure(options.engine, ENGINES[options.engine](model, prompts, options), options.repeats, on_gpu)
    Path(options.out).write_text(json.dumps(asdict(result)), encoding="utf-8")


def read_prompts(directory: Path, data: Path, number: int) -> list[list[int]]:
    renderer = Renderer(load_tokenizer(str(directory)))
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [renderer.prompt([{"role": "user", "content": rows[i % len(rows)]["question"]}]) for i in range(number)]


def native(model: PreTrainedModel, prompts: list[list[int]], options: Any, *, compiles: bool = True) -> Run:
    rollout = NativeRollout(model, [NEVER], Options(compile=compiles and model.device.type == "cuda", max_sequences=len(prompts)))
    sampling = Sampling(options.new_tokens, options.temperature, logprobs=False)  # nor does generate say them
    return lambda: sum(len(completion.token_ids) for completion in rollout.generate(prompts, sampling))


def native_not_compiled(model: PreTrainedModel, prompts: list[list[int]], options: Any) -> Run:
    return native(model, prompts, options, compiles=False)


def generate(model: PreTrainedModel, prompts: list[list[int]], options: Any, **more: Any) -> Run:
    def answer() -> int:
        input_ids_BP, attention_mask_BP = (x.to(model.device) for x in pad_left(prompts, pad_token=0))
        config = GenerationConfig(max_new_tokens=options.new_tokens, do_sample=False, pad_token_id=0, **more)
        with torch.inference_mode(), generation_mode(model, "sdpa"):
            generate_: Any = model.generate
            output = generate_(input_ids_BP, attention_mask=attention_mask_BP, generation_config=config)
        return int((output.shape[1] - input_ids_BP.shape[1]) * len(prompts))

    return answer


def generate_compiled(model: PreTrainedModel, prompts: list[list[int]], options: Any) -> Run:
    return generate(model, prompts, options, cache_implementation="static")


ENGINES: dict[str, Callable[[PreTrainedModel, list[list[int]], Any], Run]] = {
    "native": native,
    "native-not-compiled": native_not_compiled,
    "generate": generate,
    "generate-static-compiled": generate_compiled,
}


def measure(name: str, answer: Run, repeats: int, on_gpu: bool) -> Result:
    """An engine that fails says why; the others go on."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        _, first = timed(answer, on_gpu)
        runs = [timed(answer, on_gpu) for _ in range(repeats)]
    except Exception as error:  # whatever another engine raises
        return Result(name, failed=f"{type(error).__name__}: {error}"[:300])
    rate = statistics.median(tokens / seconds for tokens, seconds in runs)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    return Result(name, rate, [seconds for _, seconds in runs], first, peak)


def timed(answer: Run, on_gpu: bool) -> tuple[int, float]:
    if on_gpu:
        torch.cuda.synchronize()
    since = time.perf_counter()
    tokens = answer()
    if on_gpu:
        torch.cuda.synchronize()
    return tokens, time.perf_counter() - since


def line(result: Result) -> str:
    if result.tokens_per_second is None:
        return f"{result.name}: {result.failed}"
    return f"{result.name}: {result.tokens_per_second:,.0f} tokens/s, first run {result.first_seconds:.1f} s"


def table(results: list[Result]) -> Table:
    found = Table("engine", "tokens/s", "× generate, compiled", "seconds", "first run, s", "peak GiB")
    base = next((r.tokens_per_second for r in results if r.name == "generate-static-compiled"), None)
    for r in results:
        if r.tokens_per_second is None or r.seconds is None:
            found.add_row(r.name, "failed")
            continue
        times = f"{r.tokens_per_second / base:.2f}" if base else ""
        peak = f"{r.peak_gib:.1f}" if r.peak_gib else ""
        found.add_row(r.name, f"{r.tokens_per_second:,.0f}", times, f"{statistics.median(r.seconds):.2f}", f"{r.first_seconds:.1f}", peak)
    return found


if __name__ == "__main__":
    exit_on_user_error(main, sys.argv[1:])
