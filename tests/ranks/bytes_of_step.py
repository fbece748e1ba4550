"""Run by test_scaling: what FSDP2 hands to its collectives in one step, on the first of N processes; the others are imagined.

bytes_of_step.py N TOKENS FILE, with at most so many tokens in a micro-batch.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tiny import RandomDocuments, qwen2_config
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2ForCausalLM

from verl.algorithms import sft
from verl.config.shared import OptimConfig
from verl.data.loader import Packing, micro_batches
from verl.engine.engine import Engine
from verl.engine.scorers import TokenScorer
from verl.models.attention.packed import PACKED


class Counting(TorchDispatchMode):
    """Counts the collectives, and the bytes that one rank receives in them from the others."""

    def __init__(self, ranks: int):
        super().__init__()
        self.ranks, self.counted = ranks, Counter[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "c10d" and "base" in func.__name__:
            whole = max((argument for argument in args if isinstance(argument, Tensor)), key=Tensor.numel)
            kind = f"{func.__name__.partition('.')[0].strip('_')} {whole.dtype}"
            self.counted[f"{kind} bytes"] += whole.numel() * whole.element_size() * (self.ranks - 1) // self.ranks
            self.counted[f"{kind} calls"] += 1
        return func(*args, **(kwargs or {}))


def main(ranks: int, tokens: int, file: str) -> None:
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    model = Qwen2ForCausalLM._from_config(qwen2_config(tie_word_embeddings=False), attn_implementation=PACKED)
    engine = Engine(TokenScorer(model), OptimConfig(), total_steps=1, device=torch.device("cpu"), compute_dtype=torch.bfloat16)
    batches = micro_batches(RandomDocuments(8), np.arange(8), Packing(1, tokens), rank=0, world_size=ranks)
    with Counting(ranks) as counting:
        engine.backward(batches, sft)
    found = {"micro_batches": len(batches), "parameters": model.num_parameters(), **counting.counted}
    Path(file).write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
