"""Compiling a model's layers one by one with torch.compile, and seeing to it that this happens once.

Shapes are dynamic: steps of whole rows differ in tokens, and one set of kernels serves them all without filling each step
up to the longest. Layers of one class share their code, so compile time does not grow with depth.
"""

import os
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch._dynamo.utils import calculate_time_spent, counters
from transformers import PreTrainedModel

from verl.engine.fsdp import decoder_layers


class Compiler:
    """Compiles the layers of a model if `on`, and reports what that took."""

    def __init__(self, on: bool, model: PreTrainedModel):
        self.on = on
        self._graphs, self._said = counters["stats"]["unique_graphs"], False  # an earlier run of this process counts for itself
        if on:
            compile_layers(model)

    def note(self) -> str | None:
        """What a step that has just ended compiled, if that is worth a line: expected of a run's first step, a warning later."""
        before, self._graphs = self._graphs, counters["stats"]["unique_graphs"]
        first, self._said = not self._said, True
        if not self.on or (self._graphs == before and not first):
            return None
        if not first:
            return "warning: the layers were compiled again in this step; if that goes on, model.compile=false may be faster"
        if self._graphs == before:
            return "warning: torch.compile made nothing of these layers, which run as they are written (TORCH_LOGS=graph_breaks says why)"
        seconds = calculate_time_spent().get("total_wall_time", 0.0)
        kept = os.environ.get("TORCHINDUCTOR_CACHE_DIR")  # PyTorch sets it where a person has not
        return f"compiled the layers in {seconds:.1f} s{f', kept for the next run in {kept}' if kept else ''}"


def compile_layers(model: PreTrainedModel, backend: Any = "inductor") -> None:
    """Let each decoder layer be compiled when it is first called, in place and before it is sharded."""
    # A layer's numbers, such as a norm's epsilon, never change. Taken for variables, they are tensors in host
    # memory, and a checkpointed layer gets kernels for the CPU, which take longest of all to compile.
    torch._dynamo.config.specialize_float = True
    for layer in decoder_layers(model):
        layer.compile(dynamic=True, backend=backend)


def uncompiled() -> AbstractContextManager[object]:
    """While this lasts, layers run as they are written: what is run a few times does not earn back its compiling."""
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance
