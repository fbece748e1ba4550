"""Run by test_vllm_gpu, alone or under torchrun: vllm_gpu.py MODEL FILE. Each process has an engine beside the trainer's model on its GPU.
It answers, sleeps, wakes and takes new weights; rank 0 saves what all ranks saw. It also runs on a CPU, where nothing sleeps."""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from served import STOP_IDS, differences, tokenizer_of
from transformers import PreTrainedModel

from verl import dist
from verl.models.load import load_for_training
from verl.rollout import Completion, Options, Rollout, Sampling, share

GREEDY, WARM = Sampling(64), Sampling(64, temperature=0.7, n=2)
UPDATES = 3
GIB = 2**30


def main(path: Path, file: Path) -> None:
    device = dist.start()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_for_training(str(path), device=device, dtype=dtype).model
    before = free_gib()
    options = Options(max_positions=512, max_sequences=64, gpu_memory_utilization=0.4)
    seconds, rollout = timed(lambda: share("vllm", model, str(path), tokenizer_of(path), STOP_IDS, options))
    seen: dict[str, Any] = {"engine": rollout.describe(), "seconds to start": seconds}
    for step in (answers, sleeps, learns):
        seen |= step(model, rollout)
    rollout.sleep()
    rollout.close()
    seen["GiB kept after close"] = before - free_gib()
    gathered = dist.gathered(seen)
    if dist.is_main():
        file.write_text(json.dumps(gathered))
    dist.stop()


def answers(model: PreTrainedModel, rollout: Rollout) -> dict[str, Any]:
    """Log-probabilities of the first weights. The trainer's at another temperature are the negative control."""
    warm = rollout.generate(prompts(), WARM)
    return {
        "greedy": mean_difference(model, rollout.generate(prompts(), GREEDY), 1.0),
        "at temperature 0.7": mean_difference(model, warm, 0.7),
        "scored at another": mean_difference(model, warm, 1.0),
        "largest": float(differences(model, prompts(), warm, temperature=0.7).max()),
    }


def sleeps(model: PreTrainedModel, rollout: Rollout) -> dict[str, Any]:
    """What sleep gives back is used, as training would, before the engine wakes and answers as before."""
    expected, awake = rollout.generate(prompts(), GREEDY), free_gib()
    to_sleep, _ = timed(rollout.sleep)
    asleep = free_gib()
    if asleep:
        used = torch.full((int(0.9 * asleep * GIB),), 7, dtype=torch.uint8, device="cuda")
        assert int(used[-1]) == 7
        del used
    to_wake, _ = timed(rollout.wake)
    found = rollout.generate(prompts(), GREEDY)
    same = sum(a.token_ids == b.token_ids for a, b in zip(expected, found, strict=True)) / len(found)
    return {
        "GiB free awake": awake,
        "GiB free asleep": asleep,
        "seconds to sleep": to_sleep,
        "seconds to wake": to_wake,
        "same answers after waking": same,
        "greedy after waking": mean_difference(model, found, 1.0),
    }


def learns(model: PreTrainedModel, rollout: Rollout) -> dict[str, Any]:
    """New weights, as between two steps: asleep, the trainer's weights move, the engine wakes for them, then answers the same prompts."""
    seen: dict[str, Any] = {}
    for version in range(1, UPDATES + 1):
        move(model, version)
        if version == 1:  # the negative control
            seen["old weights"] = mean_difference(model, rollout.generate(prompts(), WARM), 0.7)
        rollout.sleep()
        seen["seconds to update"], _ = timed(partial(rollout.update_weights, model.named_parameters(), version))
        found = rollout.generate(prompts(), WARM)
        assert {completion.version for completion in found} == {version}
        seen[f"update {version}"] = mean_difference(model, found, 0.7)
    return seen


def prompts() -> list[list[int]]:
    """Different ones on each rank, most longer than a block of vLLM's cache."""
    generator = torch.Generator().manual_seed(1 + dist.rank())
    return [torch.randint(5, 200, (5 + 12 * i,), generator=generator).tolist() for i in range(16)]


def mean_difference(model: PreTrainedModel, completions: list[Completion], temperature: float) -> float:
    return float(differences(model, prompts(), completions, temperature=temperature).mean())


@torch.no_grad()
def move(model: PreTrainedModel, seed: int) -> None:
    """Every matrix by a fifth of its spread. By more, the logits would grow, and with them their rounding."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.2 * parameter.std() * torch.randn_like(parameter))


def free_gib() -> float:
    """Memory of the GPU that no process has; 0 on a CPU."""
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] / GIB


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
