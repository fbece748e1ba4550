"""The machine that a run is decided for: the one that is here, or one that a plan assumes."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial

import torch

from verl import dist
from verl.engine.flops import PEAKS, peak_flops
from verl.kernels import has_compiler
from verl.models.attention import flash

GIB = 2**30
# GiB of memory that a card sold with so many GB has at least, but for a few of 16.
CARDS = {16: 15.6, 24: 22.0, 40: 39.4, 80: 79.1, 141: 139.7}

Refusal = Callable[..., str | None]  # of (kernel, dtype, *heads): why the kernel cannot run here, or None


def no_refusal(kernel: flash.Kernel, dtype: torch.dtype, *heads: flash.Heads) -> str | None:
    """Every attention kernel runs: nothing is known to the contrary."""
    return None


@dataclass(frozen=True)
class Hardware:
    """Processes and their devices.

    Attributes:
        device: of this process.
        processes: of the run, each with a GPU of its own.
        local_processes: those of them on this machine.
        gpu_bytes: memory of one GPU; 0 on a CPU.
        peak_flops: dense bfloat16 matrix rate of one GPU, FLOP/s; None: not known.
        capability: major number of the GPU's compute capability; 0 on a CPU.
        host_bytes: memory that the processes of this machine may take together; None: enough.
        has_compiler: whether there is a C compiler, which torch.compile needs.
        is_here: whether it was measured, not assumed.
        refusal: why an attention kernel cannot run here for models with such heads; None where it can.
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
        """So many of these GPUs, for a plan: no kernel is tried, and machines that are not here have host memory enough."""
        there = self if gpus == self.processes else replace(self, processes=gpus, local_processes=gpus, host_bytes=None)
        return replace(there, refusal=no_refusal)


# What a plan is made for where there is no GPU.
ASSUMED = Hardware(
    torch.device("cuda"), gpu_bytes=int(CARDS[80] * GIB), peak_flops=PEAKS["H100"], capability=9, has_compiler=True, is_here=False
)


def measure(device: torch.device) -> Hardware:
    """The hardware of this process's group.

    Args:
        device: of this process, as `dist.start` chose it.
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


def _refusal(device: torch.device, kernel: flash.Kernel, dtype: torch.dtype, *heads: flash.Heads) -> str | None:
    return flash.refusal(kernel, device, dtype, *heads)
