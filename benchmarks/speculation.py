"""Speed of the native engine with and without speculation, in one process, on the same questions with the same random numbers.

    python benchmarks/speculation.py --model DIR --data test.jsonl --temperatures 0,1 --rows 1,8,64 --out results.json

Both engines take turns, and the best of the runs after the first counts, because other work on the machine slows single runs. On a CPU,
seconds are processor seconds. --never-ends lets no token end an answer, so that random weights have work to do: they have a shape of
`benchmarks/sft.py`. Without --data and --tokenizer, the demo's problems are asked, and no file is needed:

    python benchmarks/speculation.py --model 0.5b --never-ends --compile --new-tokens 256 --rows 1,8,64,256
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from rollout import NEVER, read_prompts  # noqa: E402
from sft import machine, matrix_rate, prepare_model  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: E402

from verl.data.render import Renderer  # noqa: E402
from verl.demo.problems import write_problems  # noqa: E402
from verl.errors import exit_on_user_error  # noqa: E402
from verl.models.load import load_tokenizer  # noqa: E402
from verl.models.tiny import tiny_tokenizer  # noqa: E402
from verl.rollout import Completion, Options, Sampling  # noqa: E402
from verl.rollout.native import NativeRollout  # noqa: E402


@dataclass(frozen=True)
class Result:
    """A line of the table.

    Attributes:
        plain, with_drafts: generated tokens per second of a run, prompts included.
        kept: tokens that a verify step adds to an answer, in the mean; None: there was none.
        verify_share: share of verify steps among all steps.
        equal: share of answers with the same tokens.
        logprob_difference: the largest of a token in these.
    """

    temperature: float
    rows: int
    answers: int
    plain: float
    with_drafts: float
    kept: float | None
    verify_share: float
    equal: float
    logprob_difference: float


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model directory, or a shape with random weights: tiny, 0.5b, 1.5b, 7b")
    parser.add_argument("--tokenizer", help="directory of the tokenizer for a shape with random weights")
    parser.add_argument("--data", help="JSON lines with question; default: the demo's problems")
    parser.add_argument("--prompts", type=int, help="default: twice as many as --rows")
    parser.add_argument("--answers", type=int, default=1, help="to each prompt; at temperature 0 there is one")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--temperatures", default="0,1")
    parser.add_argument("--rows", default="64", help="answers at a time, such as 1,8,64")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--never-ends", action="store_true")
    parser.add_argument("--float32", action="store_true", help="on a GPU, in place of bfloat16")
    parser.add_argument("--compile", action="store_true", help="compile the decoder layers, on a GPU")
    parser.add_argument("--work", help="where a model with random weights is kept; default: a temporary folder")
    parser.add_argument("--out", help="JSON file for the numbers")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = arguments(argv)
    on_gpu, console, results = torch.cuda.is_available(), Console(soft_wrap=True), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.work) if options.work else Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        prepare_data(options, folder)
        directory = prepare_model(options, folder, on_gpu)
        dtype = torch.bfloat16 if on_gpu and not options.float32 else torch.float32
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, device_map="cuda" if on_gpu else "cpu").eval()
        most = options.prompts or 2 * max(map(int, options.rows.split(",")))
        prompts = read_prompts(directory, Path(options.data), most)
        stop_ids = [NEVER] if options.never_ends else Renderer(load_tokenizer(str(directory))).stop_ids
    if options.never_ends:
        model.generation_config.eos_token_id = None
    for temperature in map(float, options.temperatures.split(",")):
        for rows in map(int, options.rows.split(",")):
            asked = prompts[: options.prompts or 2 * rows]
            results.append(measure(model, asked, stop_ids, temperature, rows, options))
            console.print(table(results[-1:]))
    console.print(table(results))
    where = machine(on_gpu, matrix_rate(torch.device("cuda" if on_gpu else "cpu")))
    found = {"machine": where, "work": vars(options), "results": [asdict(result) for result in results]}
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def prepare_data(options: argparse.Namespace, folder: Path) -> None:
    """Write the demo's problems, and a tokenizer for them, if none are given."""
    if options.data is None or options.tokenizer is None:
        problems, _ = write_problems(folder / "train.jsonl", folder / "test.jsonl", 1000, 200, seed=1)
    options.data = options.data or str(folder / "test.jsonl")
    if options.tokenizer is None:
        tiny_tokenizer(f"{problem.question}\n{problem.answer}" for problem in problems).save_pretrained(folder / "tokenizer")
        options.tokenizer = str(folder / "tokenizer")


def measure(
    model: PreTrainedModel, prompts: list[list[int]], stop_ids: list[int], temperature: float, rows: int, options: argparse.Namespace
) -> Result:
    sampling = Sampling(options.new_tokens, temperature, n=options.answers if temperature > 0 else 1)
    compiles = options.compile and model.device.type == "cuda"
    engines = [NativeRollout(model, stop_ids, Options(max_sequences=rows, compile=compiles, speculate=kind)) for kind in ("never", "auto")]
    rates: list[list[float]] = [[], []]
    for turn in range(options.repeats + 1):
        found = []
        for engine, own in zip(engines, rates, strict=True):
            answers, rate = timed(engine, prompts, sampling)
            found.append(answers)
            if turn > 0:
                own.append(rate)
    pace = engines[1].pace
    if pace is None:
        raise SystemExit(engines[1].describe())
    same = [(one, other) for one, other in zip(*found, strict=True) if one.token_ids == other.token_ids]
    difference = max((abs(x - y) for one, other in same for x, y in zip(one.logprobs or [], other.logprobs or [], strict=True)), default=0)
    verify_share = pace.total.steps / (pace.total.steps + pace.decode_steps)
    kept = pace.total.kept / pace.total.active if pace.total.active else None
    for engine in engines:
        engine.close()
    return Result(temperature, rows, len(found[0]), *map(max, rates), kept, verify_share, len(same) / len(found[0]), difference)


def timed(engine: NativeRollout, prompts: list[list[int]], sampling: Sampling) -> tuple[list[Completion], float]:
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    since = clock()
    answers = engine.generate(prompts, sampling)  # its tokens are on the host, so that the device is done
    return answers, sum(len(answer.token_ids) for answer in answers) / (clock() - since)


def table(results: list[Result]) -> Table:
    found = Table("T", "rows", "answers", "tokens/s", "with drafts", "ratio", "kept", "verify", "equal", "log-prob.")
    for r in results:
        numbers = (
            f"{r.temperature:g}",
            str(r.rows),
            str(r.answers),
            f"{r.plain:,.0f}",
            f"{r.with_drafts:,.0f}",
            f"{r.with_drafts / r.plain:.2f}",
        )
        kept = "" if r.kept is None else f"{r.kept:.2f}"
        found.add_row(*numbers, kept, f"{r.verify_share:.0%}", f"{r.equal:.1%}", f"{r.logprob_difference:.1g}")
    return found


if __name__ == "__main__":
    exit_on_user_error(main, sys.argv[1:])
