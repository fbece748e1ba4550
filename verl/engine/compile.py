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

from verl.engine.flops import peak_flops, training_flops
from verl.engine.fsdp import decoder_layers
from verl.errors import UserError
from verl.kernels import has_compiler

# Compiling takes about 10 seconds. A run that is not compiled reaches about a fifth of the data sheet's rate, so that this much
# arithmetic lasts over a minute.
WORTH_SECONDS = 15.0


class Compiler:
    """Compiles layers where `model.compile` asks for it, and tells what that took.

    Attributes:
        on: whether layers are compiled.
        why: in a few words, for the first lines of a run.
    """

    def __init__(self, setting: str | bool, model: PreTrainedModel, device: torch.device, tokens: int):
        """
        Args:
            setting: `model.compile`.
            tokens: that the run puts through this process.
        Raises:
            UserError: asked for on a machine without a C compiler.
        """
        self.on, self.why = _decide(setting, model, device, tokens)
        self._graphs, self._said = counters["stats"]["unique_graphs"], False  # an earlier run of this process counts for itself
        if self.on:
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


def _decide(setting: str | bool, model: PreTrainedModel, device: torch.device, tokens: int) -> tuple[bool, str]:
    if setting is False:
        return False, "model.compile=false"
    if setting != "auto":
        if not has_compiler():
            raise UserError("torch.compile needs a C compiler", where="model.compile=true", fix="install gcc, or set model.compile=false")
        return True, "model.compile=true"
    peak = peak_flops(device)
    if peak is None:
        return False, "auto: no GPU whose speed is known"
    if not has_compiler():
        return False, "auto: torch.compile needs a C compiler, such as gcc"
    seconds = training_flops(model)(tokens, tokens) / peak
    if seconds < WORTH_SECONDS:
        return False, "auto: the run is too short to earn it back"
    return True, "auto"
