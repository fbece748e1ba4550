"""Every choice of a run, made once: how weights are spread, what is compiled and recorded, which attention, which dtypes.

`choose_spread` is called before the data is read, for its errors, and `decide` once the run's length is known. Engines are built from
the `Decisions`, and a plan and what a run prints are read from it; nothing else chooses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from verl.config.pairs import PairsConfig
from verl.config.ppo import PPOConfig, longest_sample
from verl.config.sft import DataConfig
from verl.data.loader import Packing
from verl.data.pack import TILE
from verl.engine.fsdp import Sharding
from verl.engine.hardware import GIB, Hardware
from verl.engine.outline import Outline
from verl.engine.weights import Spread
from verl.errors import UserError
from verl.models.attention import flash
from verl.models.attention.flash import Heads, Kernel
from verl.models.attention.packed import AttentionChoice, has_flash
from verl.models.attention.ulysses import heads_of_each

# model.strategy=auto: bytes of a parameter with working copy, gradient and moments, or frozen; and the share of a GPU below which
# whole weights on each GPU are faster than shards.
BYTES_TRAINED, BYTES_FROZEN, SMALL_SHARE = 18, 2, 0.25
# Of a parameter in host memory: weight, gradient and two moments in float32, and what pinning weight and gradient may add.
BYTES_OFFLOADED, BYTES_PINNED = 16, 8
# Compiling takes about 10 seconds. A run that is not compiled reaches about a fifth of the data sheet's rate, so that this much
# arithmetic lasts over a minute.
WORTH_SECONDS = 15.0
# CUDA graphs. A layer's launches take about 2.5 ms, forward and backward: micro-batches with more arithmetic keep a GPU busy anyway.
LARGEST_WORK = 2e11  # tokens × parameters, for each layer
LARGEST_TOKENS = 16384
LARGEST_GRADIENTS = 2**32  # bytes, which are kept from step to step
# Attention, by the major number of the compute capability. Packages, the preferred first: FlashAttention-3 is written for Hopper (9);
# 4 is written for Blackwell (10), and its kernels for Hopper are 3's, in Python.
PREFERRED: dict[int, tuple[Kernel, ...]] = {9: ("fa3", "fa4"), 10: ("fa4",)}
# Up to so many tokens a document the kernels for short ones are taken, being at least 1.2 times as fast as FlashAttention-2
# (benchmarks/README.md).
SHORT_TOKENS = {9: 1024}
# Smaller micro-batches than this are bound by the host, which launches those kernels more slowly than what is inside PyTorch.
SHORT_BATCH_TOKENS = 16_384
# Tokens of a micro-batch of answers, where the config does not say and none is longer.
ANSWER_TOKENS = 16_384

Checkpointing = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Workload:
    """What a run puts through its model.

    Attributes:
        total_steps: optimizer steps of the whole run.
        total_tokens: about as many as the whole run sees, over all processes.
        document_tokens: length of the document that an average token lies in.
        token_budget: tokens of a micro-batch, at most; None: rows are padded.
    """

    total_steps: int
    total_tokens: int
    document_tokens: float
    token_budget: int | None

    @classmethod
    def of(cls, lengths_N: np.ndarray, total_steps: int, steps_per_epoch: int, packing: Packing) -> "Workload":
        """Epochs over documents of these lengths."""
        tokens = int(lengths_N.sum())
        of_token = float((lengths_N.astype(float) ** 2).sum() / tokens)
        return cls(total_steps, tokens * total_steps // steps_per_epoch, of_token, packing.token_budget)


@dataclass(frozen=True)
class Decisions:
    """What was chosen for one model of a run, and what for.

    Attributes:
        compute_dtype: of the forward and backward pass.
        param_dtype: of the weights that the optimizer updates; an adapter's are float32.
        checkpointing: what of a layer's activations is computed again: nothing, some, or all.
        compiled: whether the layers are compiled, and `why`, in a few words.
        graph_tokens: micro-batches of up to so many tokens run as CUDA graphs; 0: none.
        attention: what the process calls in half precision.
        multiple_of_tokens: micro-batches are filled up to a multiple of so many.
    """

    hardware: Hardware
    workload: Workload
    spread: Spread
    compute_dtype: torch.dtype
    param_dtype: torch.dtype
    checkpointing: Checkpointing
    compiled: bool
    why: str
    graph_tokens: int
    attention: AttentionChoice
    multiple_of_tokens: int

    @property
    def device(self) -> torch.device:
        return self.hardware.device

    @property
    def is_sharded(self) -> bool:
        """Whether a process has a part of the weights, or has them in host memory."""
        return self.spread.strategy == "fsdp2" and (self.hardware.processes > 1 or self.spread.sharding.cpu_offload)

    @property
    def shards(self) -> int:
        """Processes that share one copy of the weights."""
        return 1 if self.spread.strategy == "ddp" else self.spread.sharding.size or self.hardware.processes


def decide(
    outline: Outline, hardware: Hardware, workload: Workload, spread: Spread, *, beside: Sequence[Heads] = (), scores: bool = False
) -> Decisions:
    """Choose all the rest.

    Args:
        spread: as `choose_spread` chose it.
        beside: attention heads of the process's other models. One attention serves all of them.
        scores: the model gives one number for a token, or for a document, in place of a distribution: a critic, or a reward model.
    Raises:
        UserError: what the config asks for cannot run on this hardware.
    """
    settings = outline.settings
    dtype = choose_compute_dtype(settings.compute_dtype, hardware)
    compiled, why = _choose_compiling(outline, hardware, workload, scores=scores)
    heads = tuple(dict.fromkeys([heads_of_each(outline.heads, settings.context_parallel_size), *beside]))
    return Decisions(
        hardware=hardware,
        workload=workload,
        spread=spread,
        compute_dtype=dtype,
        param_dtype=getattr(torch, settings.param_dtype),
        checkpointing=CHECKPOINTING[settings.enable_gradient_checkpointing],
        compiled=compiled,
        why=why,
        graph_tokens=_largest_recorded(outline, hardware, spread, dtype) if compiled and not scores else 0,
        attention=choose_attention(settings.attn_implementation, hardware, dtype, heads, workload),
        multiple_of_tokens=multiple_of_tokens(hardware),
    )


CHECKPOINTING: dict[Any, Checkpointing] = {False: "none", "selective": "selective", True: "full"}


def choose_compute_dtype(name: str, hardware: Hardware) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if hardware.has_gpu else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


# How rows become micro-batches.


def multiple_of_tokens(hardware: Hardware) -> int:
    """Tokens that micro-batches are filled up to a multiple of, which a GPU multiplies faster."""
    return TILE if hardware.has_gpu else 1


def packing_of(data: DataConfig, hardware: Hardware) -> Packing:
    """Of fine-tuning."""
    budget = data.max_tokens_per_micro_batch or data.micro_batch_size_per_gpu * data.max_length
    return Packing(data.micro_batch_size_per_gpu, budget if data.packing else None, multiple_of_tokens(hardware))


def packing_of_pairs(data: PairsConfig, hardware: Hardware) -> Packing:
    """Of pairs of answers."""
    budget = data.max_tokens_per_micro_batch or data.micro_batch_size_per_gpu * 2 * data.max_length
    return Packing(data.micro_batch_size_per_gpu, budget, multiple_of_tokens(hardware))


def token_budget_of_answers(config: PPOConfig) -> int:
    """Tokens of a micro-batch of answers, at most."""
    return config.data.max_tokens_per_micro_batch or max(ANSWER_TOKENS, longest_sample(config))


# How weights are spread.


def choose_spread(outline: Outline, hardware: Hardware) -> Spread:
    """How the weights are to lie on the processes; "auto" puts all of them on each GPU where they take a small part of it.

    Raises:
        UserError: the number of processes is no multiple of the shards' number, or what is offloaded has no room.
    """
    settings, fsdp = outline.settings, outline.settings.fsdp_config
    check_multiple(hardware.processes, fsdp.shard_size or 1, key="model.fsdp_config.shard_size")
    pin = fsdp.cpu_offload and hardware.has_gpu and _may_pin(outline, hardware)
    sharding = Sharding(fsdp.shard_size, fsdp.reshard_after_forward, fsdp.cpu_offload, pin)
    if settings.strategy == "ddp" or (settings.strategy == "auto" and _is_small(outline, hardware)):
        return Spread("ddp", sharding)
    return Spread("fsdp2", sharding)


def check_multiple(processes: int, size: int, *, key: str) -> None:
    """Raises UserError if so many processes cannot be parted into groups of this size."""
    if processes % size:
        sizes = ", ".join(str(n) for n in range(1, processes + 1) if processes % n == 0)
        what = f"{processes} processes are not a multiple of {size}"
        raise UserError(what, where=f"{key}={size}", fix=f"give one of {sizes}, or start another number of processes")


def _is_small(outline: Outline, hardware: Hardware) -> bool:
    settings, fsdp = outline.settings, outline.settings.fsdp_config
    if not hardware.has_gpu or fsdp.cpu_offload or fsdp.shard_size is not None or settings.param_dtype != "float32":
        return False
    needed = outline.parameters * (BYTES_FROZEN if outline.has_adapters else BYTES_TRAINED)
    return needed <= SMALL_SHARE * hardware.gpu_bytes


def _may_pin(outline: Outline, hardware: Hardware) -> bool:
    """Whether this machine's memory has room for pinned shards of weights and gradients, which may take twice their size.

    Raises:
        UserError: it has none for those of weights, gradients and moments that are not pinned either.
    """
    if hardware.host_bytes is None:
        return True
    needed, there = _bytes_offloaded(outline, hardware), hardware.host_bytes
    if needed > there:
        raise UserError(
            f"weights, gradients and optimizer state of {outline.parameters:,} parameters take {needed / GIB:.1f} GiB "
            f"of this machine's memory, which has {there / GIB:.1f}",
            where="model.fsdp_config.cpu_offload=true",
            fix="use more machines, model.lora_rank=64, or model.param_dtype=bfloat16 optim.name=adamw_8bit without offloading",
        )
    return _bytes_offloaded(outline, hardware, pinned=True) <= there


def _bytes_offloaded(outline: Outline, hardware: Hardware, *, pinned: bool = False) -> int:
    """What this machine's processes keep in host memory."""
    each = (BYTES_FROZEN if outline.has_adapters else BYTES_OFFLOADED) + (BYTES_PINNED if pinned else 0)
    shards = outline.settings.fsdp_config.shard_size or hardware.processes
    return outline.parameters * each * hardware.local_processes // shards


# What is compiled, and recorded.


def _choose_compiling(outline: Outline, hardware: Hardware, workload: Workload, *, scores: bool) -> tuple[bool, str]:
    """Whether layers are compiled, and why.

    Raises:
        UserError: asked for on a machine without a C compiler.
    """
    setting = outline.settings.compile
    if setting is False:
        return False, "model.compile=false"
    if setting != "auto":
        if not hardware.has_compiler:
            raise UserError("torch.compile needs a C compiler", where="model.compile=true", fix="install gcc, or set model.compile=false")
        return True, "model.compile=true"
    if hardware.peak_flops is None:
        return False, "auto: no GPU whose speed is known"
    if not hardware.has_compiler:
        return False, "auto: torch.compile needs a C compiler, such as gcc"
    seconds = outline.flops(workload.total_tokens // hardware.processes, scores=scores) / hardware.peak_flops
    if seconds < WORTH_SECONDS:
        return False, "auto: the run is too short to earn it back"
    return True, "auto"


def _largest_recorded(outline: Outline, hardware: Hardware, spread: Spread, dtype: torch.dtype) -> int:
    """The largest micro-batch of compiled layers that becomes a CUDA graph; 0: none does."""
    settings = outline.settings
    alone = hardware.processes == 1 and not spread.sharding.cpu_offload
    flash_takes_it = has_flash(hardware.device.type, dtype) and settings.attn_implementation != "sdpa"
    if settings.cuda_graphs is False or not alone or not flash_takes_it or dtype.itemsize * outline.trained_parameters > LARGEST_GRADIENTS:
        return 0
    return min(LARGEST_TOKENS, int(LARGEST_WORK * outline.layers / outline.stored_numbers))


# Which attention.


def choose_attention(wanted: str, hardware: Hardware, dtype: torch.dtype, heads: Sequence[Heads], workload: Workload) -> AttentionChoice:
    """What this process calls in half precision.

    Raises:
        UserError: what is wanted does not run here, and why.
    """
    if wanted == "sdpa":
        return AttentionChoice("sdpa")
    if not has_flash(hardware.device.type, dtype):
        if wanted != "auto":
            raise UserError(f"{wanted} needs a GPU and bfloat16", where="model.attn_implementation", fix="leave it at auto")
        return AttentionChoice()
    if wanted == "auto":
        found = refusals(hardware, dtype, heads, workload)
        best = next((kernel for kernel, refusal in found.items() if refusal is None), None)
        return AttentionChoice(best or "fa2", {kernel: refusal for kernel, refusal in found.items() if refusal is not None})
    kernel = next((kernel for kernel in flash.PACKAGES if kernel == wanted), None)
    if kernel is None:
        return AttentionChoice("fa2")
    refusal = hardware.refusal(kernel, dtype, *heads)
    if refusal is not None:
        package = flash.PACKAGES[kernel]
        fix = package.install if refusal == flash.NOT_INSTALLED else "leave it at auto"
        raise UserError(f"{package.name}: {refusal}", where="model.attn_implementation", fix=fix)
    return AttentionChoice(kernel)


def refusals(hardware: Hardware, dtype: torch.dtype, heads: Sequence[Heads], workload: Workload | None = None) -> dict[Kernel, str | None]:
    """For each kernel beside FlashAttention-2 that this GPU may prefer, the best first: why it cannot be used, or None where it can.

    Args:
        heads: of each model that it is to serve.
        workload: None: nothing is known of the documents.
    """
    found: dict[Kernel, str | None] = {}
    if workload is not None and _are_short(workload, hardware):
        found["short"] = hardware.refusal("short", dtype, *heads)
        if found["short"] is None:
            return found  # the others would only cost the time of their trials
    return found | {kernel: hardware.refusal(kernel, dtype, *heads) for kernel in PREFERRED.get(hardware.capability, ())}


def _are_short(workload: Workload, hardware: Hardware) -> bool:
    short = SHORT_TOKENS.get(hardware.capability, 0)
    return workload.document_tokens <= short and (workload.token_budget or 0) >= SHORT_BATCH_TOKENS
