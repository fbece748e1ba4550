"""Speed of the update and of scoring in reinforcement learning, with prompts shared by their answers and without, in one process.

    python benchmarks/shared_prompts.py --model 0.5b --prompts 16 --prompt-tokens 2048 --answers 8 --answer-tokens 256 --out results.json

The model has a shape of benchmarks/sft.py with random weights, and the tokens are random. Settings take turns, after a warm-up in which
layers are compiled. The learning rate is 0, so that both settings compute the same gradient: the table shows how far the gradient's norm
and single log-probabilities are apart, which is rounding.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from sft import SHAPES, config_of  # noqa: E402
from transformers import AutoModelForCausalLM, PretrainedConfig  # noqa: E402

from verl import dist  # noqa: E402
from verl.algorithms import grpo  # noqa: E402
from verl.config.shared import OptimConfig  # noqa: E402
from verl.data.prompts import Prompt  # noqa: E402
from verl.engine.decisions import ANSWER_TOKENS, Workload, choose_attention, choose_compute_dtype, multiple_of_tokens  # noqa: E402
from verl.engine.description import describe_attention  # noqa: E402
from verl.engine.engine import Engine  # noqa: E402
from verl.engine.hardware import Hardware, measure  # noqa: E402
from verl.engine.layers import Compiler  # noqa: E402
from verl.engine.scorers import TokenScorer  # noqa: E402
from verl.engine.weights import Spread  # noqa: E402
from verl.models.attention import shared_trial  # noqa: E402
from verl.models.attention.packed import PACKED, has_flash, use_attention, uses_short_kernels  # noqa: E402
from verl.models.per_layer import heads_of  # noqa: E402
from verl.rl.samples import PackedSamples, Sample, pack_samples  # noqa: E402

GIB = 2**30
SETTINGS = {"own prompts": False, "shared prompts": True}


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="0.5b", choices=list(SHAPES), help="a shape of benchmarks/sft.py, with random weights")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--answers", type=int, default=8, help="answers to each prompt")
    parser.add_argument("--answer-tokens", type=int, default=256)
    parser.add_argument("--budget", type=int, help="tokens of a micro-batch; by default that of a run")
    parser.add_argument("--attention", default="auto", help="model.attn_implementation")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="do not compile the layers")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    words = arguments(argv)
    device = dist.start()
    hardware, config = measure(device), config_of(words.model)
    engine, compiler = build(words, config, hardware)
    samples = draw(words, config.vocab_size)
    budget = words.budget or max(ANSWER_TOKENS, words.prompt_tokens + words.answer_tokens)
    options: dict[str, Any] = {"multiple_of_tokens": multiple_of_tokens(hardware)}
    packed = {
        name: with_values(pack_samples(samples, range(len(samples)), budget, share_prompts=share, **options))
        for name, share in SETTINGS.items()
    }
    if packed["own prompts"].batches[0].prefixes is not None or packed["shared prompts"].batches[0].prefixes is None:
        raise SystemExit("these sizes share no prompts, see verl/data/groups.py")
    results = measured(engine, packed, samples, words, device)
    if compiler is not None and (note := compiler.note()):
        print(note)
    report(results, words)
    dist.stop()


def build(words: argparse.Namespace, config: PretrainedConfig, hardware: Hardware) -> tuple[Engine, Compiler | None]:
    """Build the engine as a run does, and print what it computes with."""
    device, dtype = hardware.device, choose_compute_dtype("auto", hardware.device)
    tokens = float(words.prompt_tokens + words.answer_tokens)
    workload = Workload(total_steps=100, total_tokens=10**9, document_tokens=tokens, token_budget=words.budget or ANSWER_TOKENS)
    choice = choose_attention(words.attention, hardware, dtype, heads_of(config), workload)
    use_attention(choice)
    print(f"{dist.describe_device(device)}; PyTorch {torch.__version__}; {describe_attention(choice, device.type, dtype)}", flush=True)
    if has_flash(device.type, dtype):
        refusal = shared_trial.refusal(device, dtype, *heads_of(config), short=uses_short_kernels())
        print(f"trial of shared prompts: {refusal or 'passed'}", flush=True)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED, dtype=torch.float32).eval()
    compiler = Compiler(True, model) if device.type == "cuda" and not words.eager else None
    optim = OptimConfig(lr=0.0, lr_scheduler="constant", warmup_steps_ratio=0.0)
    options: dict[str, Any] = {"total_steps": 100, "device": device, "compute_dtype": dtype, "spread": Spread("ddp")}
    engine = Engine(TokenScorer(model, entropy=True), optim, **options)
    engine.scorer.eval()  # as in reinforcement learning
    return engine, compiler


def draw(words: argparse.Namespace, vocabulary: int) -> list[Sample]:
    """Return random answers to random prompts."""
    random, samples = np.random.default_rng(0), []
    nothing: dict[str, Any] = {"logprobs": None, "text": "", "finish_reason": "stop", "version": 0}
    for group in range(words.prompts):
        prompt = random.integers(0, vocabulary, words.prompt_tokens).tolist()
        for _ in range(words.answers):
            answer = random.integers(0, vocabulary, words.answer_tokens).tolist()
            asked = Prompt(str(group), "", [], prompt, {})
            samples.append(Sample(asked, group, prompt, answer, [True] * len(answer), **nothing))
    return samples


def with_values(packed: PackedSamples) -> PackedSamples:
    """Add an advantage to each answer, the same in both settings."""
    random = np.random.default_rng(1)
    each = random.standard_normal(len(packed.samples)).astype(np.float32)
    return packed.with_fields(advantage_M=[np.full(s.trained_tokens, each[n]) for n, s in enumerate(packed.samples)])


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return the seconds that work takes, and its result."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    found = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, found


def measured(
    engine: Engine, packed: dict[str, PackedSamples], samples: list[Sample], words: argparse.Namespace, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Return tokens, seconds, peak memory, gradient norm and log-probabilities of each setting."""
    loss = grpo.Loss(grpo.Settings(), words.answer_tokens)
    results: dict[str, dict[str, Any]] = {name: {"score_seconds": [], "update_seconds": []} for name in packed}
    for number in range(words.warmup + words.repeats):
        for name, mine in packed.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            score, outs = timed(lambda mine=mine: engine.score(mine.batches), device)
            logprobs = mine.per_answer([out.logprob_M for out in outs])
            known = mine.with_fields(old_logprob_M=[logprobs[n] for n in range(len(samples))])
            update, out = timed(lambda known=known: engine.train_step(known.batches, loss, 0), device)
            result = results[name]
            if number >= words.warmup:
                result["score_seconds"].append(score)
                result["update_seconds"].append(update)
            else:
                print(f"warm-up {number + 1}, {name}: scoring {score:.2f} s, update {update:.2f} s", flush=True)
            result["gradient_norm"], result["largest_ratio"] = float(out["grad_norm"]), float(out["largest_ratio"])
            result["peak_gib"] = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None
            result["logprobs"] = np.concatenate([logprobs[n] for n in range(len(samples))])
            result["tokens"] = sum(len(batch.input_ids_T) for batch in mine.batches)
            result["micro_batches"] = len(mine.batches)
    return results


def report(results: dict[str, dict[str, Any]], words: argparse.Namespace) -> None:
    """Print the table and the ratios, and write them."""
    print(f"{'':<16}{'tokens':>10}{'micro-batches':>15}{'scoring s':>11}{'update s':>10}{'peak GiB':>10}{'gradient norm':>16}{'ratio':>8}")
    for name, found in results.items():
        found["score"], found["update"] = (statistics.median(found[f"{kind}_seconds"]) for kind in ("score", "update"))
        peak = "" if found["peak_gib"] is None else f"{found['peak_gib']:.1f}"
        print(
            f"{name:<16}{found['tokens']:>10,}{found['micro_batches']:>15}{found['score']:>11.3f}{found['update']:>10.3f}{peak:>10}"
            f"{found['gradient_norm']:>16.6f}{found['largest_ratio']:>8.4f}"
        )
    own, shared = results["own prompts"], results["shared prompts"]
    difference = np.abs(own.pop("logprobs") - shared.pop("logprobs"))
    ratios = {kind: own[kind] / shared[kind] for kind in ("score", "update")}
    ratios["score and update"] = (own["score"] + own["update"]) / (shared["score"] + shared["update"])
    norm = abs(own["gradient_norm"] - shared["gradient_norm"]) / own["gradient_norm"]
    for kind, ratio in ratios.items():
        print(f"{kind}: {ratio:.2f} x as fast with shared prompts")
    print(f"gradient norms differ by {norm:.2g} of the norm; log-probabilities by {difference.mean():.2g}, at most {difference.max():.2g}")
    if words.out:
        found = {"results": results, "ratios": ratios, "gradient_norm_difference": norm, "words": sys.argv[1:]}
        words.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
