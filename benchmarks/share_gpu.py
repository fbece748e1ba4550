"""Run a command of verl as several processes on one GPU, which shows what two GPUs would compute and hold, though not how fast.

    torchrun --nproc_per_node=2 benchmarks/share_gpu.py [--activations] verl.trainer.fsdp_sft_trainer key=value ...

NCCL refuses two processes on a GPU, so that gloo carries the messages of tensors there, by way of host memory.
With --activations, rank 0 says at the end what layers kept for the backward pass, and what of the peak lay above the rest.
"""

import os
import runpy
import sys
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from verl import dist
from verl.engine.scorers import TokenScorer

GIB = 2**30


def share_gpu() -> None:
    """All processes take the first GPU, and gloo."""
    torch.cuda.init()
    start, memory = torch.distributed.init_process_group, torch.cuda.mem_get_info

    def first_gpu() -> torch.device:
        os.environ["LOCAL_RANK"] = "0"  # transformers and DTensor take "cuda" for the GPU of that number
        torch.cuda.set_device(0)
        return torch.device("cuda", 0)

    patch.object(dist, "_device", first_gpu).start()
    patch.object(torch.distributed, "init_process_group", lambda _, **words: start("cpu:gloo,cuda:gloo", **words)).start()
    patch.object(torch.cuda, "mem_get_info", lambda *_: memory(0)).start()
    patch.object(DTensor, "full_tensor", whole).start()


def whole(tensor: DTensor, **_: Any) -> Tensor:
    """In place of DTensor's own, whose wait ends the process where gloo carries a GPU's tensors (PyTorch 2.11)."""
    (placement,), local = tensor.placements, tensor.to_local()
    if placement.is_replicate():
        return local
    assert placement == Shard(0), placement
    processes = tensor.device_mesh.size()
    rows = -(-len(tensor) // processes)
    mine, gathered = local.new_zeros(rows, *local.shape[1:]), local.new_empty(processes * rows, *local.shape[1:])
    mine[: len(local)] = local
    torch.distributed.all_gather_into_tensor(gathered, mine, group=tensor.device_mesh.get_group())
    return gathered[: len(tensor)]


def tell_activations() -> None:
    """Measure each micro-batch's forward pass, and say at the end what the largest took."""
    forward, stop = TokenScorer.forward, dist.stop
    rest, kept = list[int](), [0]

    def measured(self: TokenScorer, *words: Any, **options: Any) -> Any:
        if not (torch.is_grad_enabled() and self.training):
            return forward(self, *words, **options)
        if not rest:
            rest.append(torch.cuda.memory_allocated())
            torch.cuda.reset_peak_memory_stats()
        before: list[int] = []
        decoder = self.model.get_decoder()
        hooks = [
            decoder.register_forward_pre_hook(lambda *_: before.append(torch.cuda.memory_allocated())),
            decoder.register_forward_hook(lambda *_: kept.append(torch.cuda.memory_allocated() - before[0])),
        ]
        try:
            return forward(self, *words, **options)
        finally:
            for hook in hooks:
                hook.remove()

    def told() -> None:
        if dist.is_main() and rest:
            above = torch.cuda.max_memory_allocated() - rest[0]
            print(f"layers kept {max(kept) / GIB:.2f} GiB, the peak lay {above / GIB:.2f} GiB above the rest", flush=True)
        stop()

    patch.object(TokenScorer, "forward", measured).start()
    patch.object(dist, "stop", told).start()


def main() -> None:
    words = sys.argv[1:]
    if words[0] == "--activations":
        words = words[1:]
        tell_activations()
    if not torch.cuda.is_available():
        sys.exit("error: there is no GPU to share")
    share_gpu()
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
