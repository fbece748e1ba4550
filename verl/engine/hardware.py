"""The hardware of a run: measured on this machine, or assumed for a plan."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch

from verl import dist
from verl.dist import has_compiler

GIB = 2**30
# Smallest usable memory in GiB of GPUs sold with this many GB. A few GPUs of 16 GB have less.
CARDS = {16: 15.6, 24: 22.0, 40: 39.4, 80: 79.1, 141: 139.7}
# Dense bfloat16 peak from the data sheets, FLOP/s.
PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "4090": 165e12,
}

# (kernel, dtype, *heads), or ("fla", dtype, rule) → why the kernels cannot run here, or None
Refusal = Callable[..., str | None]


def no_refusal(kernel: str, dtype: torch.dtype, *shapes: Any) -> str | None:
    """Assume that every kernel runs."""
    return None


@dataclass(frozen=True)
class Hardware:
    """The processes of a run, and the machines that they run on.

    Attributes:
        device: device of this process.
        processes: number of processes, each with one GPU.
        local_processes: number of processes on this machine.
        gpu_bytes: memory of one GPU; 0 on a CPU.
        peak_flops: dense bfloat16 matmul rate of one GPU, FLOP/s; None: unknown.
        capability: major number of the GPU's compute capability; 0 on a CPU.
        host_bytes: memory that the processes of this machine may use together; None: unlimited.
        has_compiler: whether there is a C compiler, which torch.compile needs.
        is_here: whether it was measured on this machine; false if it is assumed.
        refusal: returns why an attention kernel cannot run here for models with the given heads, or the kernels "fla" for a delta rule,
            or None.
    """

    device: torch.device
    processes: int = 1
    local_processes: int = 1
    gpu_bytes: int = 0
    peak_flops: float | None = None
    capability: int = 0
    host_bytes: int | None = None
    has_compiler: bool = True
    is_here: bool = True
    refusal: Refusal = field(default=no_refusal, compare=False, repr=False)

    @property
    def has_gpu(self) -> bool:
        return self.device.type == "cuda"

    def planned(self, gpus: int) -> "Hardware":
        """Return this hardware with `gpus` GPUs, for a plan.

        No attention kernel is tried. If the number of GPUs changes, host memory is assumed to be unlimited.
        """
        there = self if gpus == self.processes else replace(self, processes=gpus, local_processes=gpus, host_bytes=None)
        return replace(there, refusal=no_refusal)


# The GPU that a plan assumes on a machine without a GPU.
ASSUMED = Hardware(torch.device("cuda"), gpu_bytes=int(CARDS[80] * GIB), peak_flops=PEAKS["H100"], capability=9, is_here=False)


def measure(device: torch.device) -> Hardware:
    """Measure the hardware of this run's processes.

    Args:
        device: result of `dist.start`.
    """
    here = Hardware(
        device,
        processes=dist.world_size(),
        local_processes=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        host_bytes=dist.host_memory(),
        has_compiler=has_compiler(),
    )
    if device.type != "cuda":
        return here
    return replace(
        here,
        gpu_bytes=torch.cuda.get_device_properties(device).total_memory,
        peak_flops=peak_flops(device),
        capability=torch.cuda.get_device_capability(device)[0],
        refusal=cache(partial(_refusal, device)),
    )


def peak_flops(device: torch.device) -> float | None:
    """Return the device's peak bfloat16 FLOP/s; None if unknown."""
    if device.type != "cuda":
        return None
    words = re.split(r"[\s-]", torch.cuda.get_device_name(device))  # compare whole words: an L40 is not an L4
    return next((peak for part, peak in PEAKS.items() if part in words), None)


def _refusal(device: torch.device, kernel: Any, dtype: torch.dtype, *shapes: Any) -> str | None:
    from verl.models.attention import delta_rule, flash_trial  # what only a GPU needs

    if kernel == "fla":
        (rule,) = shapes
        return delta_rule.refusal(rule, device, dtype)
    return flash_trial.refusal(kernel, device, dtype, *shapes)
