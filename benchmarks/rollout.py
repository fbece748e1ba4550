"""Speed of generation: verl's native engine beside transformers' `generate` and vLLM, on one machine, model and file, in one run.

    python benchmarks/rollout.py --model 0.5b --tokenizer DIR --data test.jsonl --out results.json
    python benchmarks/rollout.py --model 7b --tokenizer DIR --data test.jsonl --only native,vllm --sizes 256x256,512x512,64x2048

Every engine answers the same questions greedily, in a process of its own, and each answer has exactly as many tokens as the size says:
nothing ends it earlier. Of each engine and size the first run, which compiles and records, is reported by itself, and the median of those
after it counts. As after an update of the weights, no run reuses keys and values of the one before, unless --keep-prompts is given.
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
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from sft import machine, matrix_rate, prepare_model  # noqa: E402
from transformers import AutoModelForCausalLM, GenerationConfig  # noqa: E402

from verl.data.render import Renderer  # noqa: E402
from verl.errors import exit_on_user_error  # noqa: E402
from verl.models.load import load_tokenizer  # noqa: E402
from verl.rollout import Options, Sampling  # noqa: E402
from verl.rollout._model import generation_mode  # noqa: E402
from verl.rollout.hf import pad_left  # noqa: E402
from verl.rollout.native import NativeRollout  # noqa: E402

NEVER = -1  # a stop token that no model writes
Prompts = list[list[int]]
Answer = Callable[[Prompts, int], int]  # answers prompts with so many tokens each, and returns the number of generated tokens


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
    size: str
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
    parser.add_argument("--sizes", default="256x256", help="prompts x tokens of an answer, several separated by commas")
    parser.add_argument("--keep-prompts", action="store_true", help="let runs reuse keys and values of the prompts, as with fixed weights")
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
        for result in in_a_process(name, directory, options, folder):
            results.append(result)
            console.print(line(result))
    where = machine(on_gpu, matrix_rate(torch.device("cuda" if on_gpu else "cpu")))
    kept = {name: value for name, value in vars(options).items() if name not in ("work", "out", "engine")}
    numbers = {size: sum(map(len, read_prompts(directory, Path(options.data), prompts))) for size, prompts, _ in sizes(options)}
    work = {**kept, "prompt_tokens": numbers}
    found = {"machine": where, "work": work, "results": [asdict(result) for result in results]}
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    console.print(table(results))


def sizes(options: argparse.Namespace) -> list[tuple[str, int, int]]:
    """Name, number of prompts, and tokens of an answer."""
    return [(size, *map(int, size.split("x"))) for size in options.sizes.split(",")]  # type: ignore[misc]


def in_a_process(name: str, directory: Path, options: argparse.Namespace, folder: Path) -> list[Result]:
    """One engine measured where no other has left anything behind."""
    out = folder / f"{name}.json"
    out.unlink(missing_ok=True)
    words = [f"--{key}={getattr(options, key)}" for key in ("data", "sizes", "repeats", "temperature")]
    words += ["--keep-prompts"] * options.keep_prompts
    command = [sys.executable, __file__, "--engine", name, "--model", str(directory), "--out", str(out), *words]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    try:
        done = subprocess.run(command, timeout=options.timeout, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
    except subprocess.TimeoutExpired:
        last = [f"not done after {options.timeout:g} s"]
    found = [Result(**one) for one in json.loads(out.read_text(encoding="utf-8"))] if out.exists() else []
    return found + [Result(name, size, failed=last[0][:300]) for size, _, _ in sizes(options)[len(found) :]]


def measure_alone(options: argparse.Namespace) -> None:
    answer, results = ENGINES[options.engine](options), []
    for size, number, tokens in sizes(options):
        prompts = read_prompts(Path(options.model), Path(options.data), number)
        results.append(asdict(measure(options.engine, size, partial(answer, prompts, tokens), options.repeats)))
        Path(options.out).write_text(json.dumps(results), encoding="utf-8")


def read_prompts(directory: Path, data: Path, number: int) -> list[list[int]]:
    renderer = Renderer(load_tokenizer(str(directory)))
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [renderer.prompt([{"role": "user", "content": rows[i % len(rows)]["question"]}]) for i in range(number)]


def load(options: argparse.Namespace) -> Any:
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, device_map=device, attn_implementation="sdpa").eval()
    model.generation_config = GenerationConfig()
    return model


def native(options: argparse.Namespace, *, compiles: bool = True) -> Answer:
    model = load(options)
    most = max(number for _, number, _ in sizes(options))
    rollout = NativeRollout(model, [NEVER], Options(compile=compiles and model.device.type == "cuda", max_sequences=most))

    def answer(prompts: Prompts, tokens: int) -> int:
        if not options.keep_prompts:
            rollout.update_weights((), 0)
        sampling = Sampling(tokens, options.temperature, logprobs=False)  # the others do not say them
        return sum(len(completion.token_ids) for completion in rollout.generate(prompts, sampling))

    return answer


def native_not_compiled(options: argparse.Namespace) -> Answer:
    return native(options, compiles=False)


def generate(options: argparse.Namespace, **more: Any) -> Answer:
    model = load(options)

    def answer(prompts: Prompts, tokens: int) -> int:
        input_ids_BP, attention_mask_BP = (x.to(model.device) for x in pad_left(prompts, pad_token=0))
        config = GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=0, **more)
        with torch.inference_mode(), generation_mode(model, "sdpa"):
            output = model.generate(input_ids_BP, attention_mask=attention_mask_BP, generation_config=config)
        return int((output.shape[1] - input_ids_BP.shape[1]) * len(prompts))

    return answer


def generate_compiled(options: argparse.Namespace) -> Answer:
    return generate(options, cache_implementation="static")


def vllm(options: argparse.Namespace) -> Answer:
    """vLLM in this process, with half of the GPU's memory and as many sequences at a time as there are prompts."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    most, longest = (max(size[place] for size in sizes(options)) for place in (1, 2))
    asked = read_prompts(Path(options.model), Path(options.data), most)
    room = {"max_model_len": max(map(len, asked)) + longest, "max_num_seqs": most, "gpu_memory_utilization": 0.5}
    engine = LLM(model=options.model, dtype="bfloat16", **room)

    def answer(prompts: Prompts, tokens: int) -> int:
        if not options.keep_prompts:
            engine.reset_prefix_cache()
        sampling = SamplingParams(temperature=options.temperature, max_tokens=tokens, ignore_eos=True, detokenize=False)
        done = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return sum(len(one.outputs[0].token_ids) for one in done)

    return answer


ENGINES: dict[str, Callable[[argparse.Namespace], Answer]] = {
    "native": native,
    "native-not-compiled": native_not_compiled,
    "generate": generate,
    "generate-static-compiled": generate_compiled,
    "vllm": vllm,
}


def measure(name: str, size: str, answer: Callable[[], int], repeats: int) -> Result:
    """An engine that fails says why; the others go on."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        _, first = timed(answer, on_gpu)
        runs = [timed(answer, on_gpu) for _ in range(repeats)]
    except Exception as error:  # whatever another engine raises
        return Result(name, size, failed=f"{type(error).__name__}: {error}"[:300])
    rate = statistics.median(tokens / seconds for tokens, seconds in runs)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    return Result(name, size, rate, [seconds for _, seconds in runs], first, peak)


def timed(answer: Callable[[], int], on_gpu: bool) -> tuple[int, float]:
    if on_gpu:
        torch.cuda.synchronize()
    since = time.perf_counter()
    tokens = answer()
    if on_gpu:
        torch.cuda.synchronize()
    return tokens, time.perf_counter() - since


def line(result: Result) -> str:
    if result.tokens_per_second is None:
        return f"{result.name}, {result.size}: {result.failed}"
    return f"{result.name}, {result.size}: {result.tokens_per_second:,.0f} tokens/s, first run {result.first_seconds:.1f} s"


def table(results: list[Result]) -> Table:
    found = Table("engine", "size", "tokens/s", "× generate, compiled", "× vLLM", "seconds", "first run, s", "peak GiB")
    rates = {(r.name, r.size): r.tokens_per_second for r in results}
    for r in results:
        if r.tokens_per_second is None or r.seconds is None:
            found.add_row(r.name, r.size, "failed")
            continue
        bases = [rates.get((name, r.size)) for name in ("generate-static-compiled", "vllm")]
        times = [f"{r.tokens_per_second / base:.2f}" if base else "" for base in bases]
        peak = f"{r.peak_gib:.1f}" if r.peak_gib else ""
        seconds = f"{statistics.median(r.seconds):.2f}"
        found.add_row(r.name, r.size, f"{r.tokens_per_second:,.0f}", *times, seconds, f"{r.first_seconds:.1f}", peak)
    return found


if __name__ == "__main__":
    exit_on_user_error(main, sys.argv[1:])
