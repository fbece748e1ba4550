"""All technical choices of a run: weight distribution, compilation, CUDA graphs, attention kernel and dtypes.

`choose_spread` needs no data and is called before the data is read. `decide` makes the other choices once the length of the run is known.
`build` follows the resulting `Decisions`, `verl plan` plans with it, and the first lines of a run print it. No other module chooses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from verl.data.loader import Packing
from verl.data.pack import TILE
from verl.engine.hardware import GIB, Hardware
from verl.engine.outline import Outline
from verl.engine.weights import Sharding, Spread
from verl.errors import UserError
from verl.models.attention import flash
from verl.models.attention.flash import Heads, Kernel
from verl.models.attention.packed import PACKED_PATH, AttentionChoice, ForwardPath, has_flash

if TYPE_CHECKING:
    from verl.config.pairs import PairsConfig
    from verl.config.sft import DataConfig
    from verl.models.attention.delta_rule import Rule, RuleChoice

# For model.strategy=auto: bytes per trained parameter (weight, working copy, gradient and moments), bytes per frozen parameter, and the
# share of a GPU's memory up to which replicating the weights is faster than sharding them.
BYTES_TRAINED, BYTES_FROZEN, SMALL_SHARE = 18, 2, 0.25
# Bytes of host memory per offloaded parameter: weight, gradient and two moments in float32; and the most that pinning weight and gradient
# adds.
BYTES_OFFLOADED, BYTES_PINNED = 16, 8
# Compiling takes about 10 seconds. An uncompiled run reaches about a fifth of the peak rate, so arithmetic that takes this many seconds at
# the peak rate takes over a minute.
WORTH_SECONDS = 15.0
# Limits for CUDA graphs. Launching the kernels of one layer, forward and backward, takes about 2.5 ms. A micro-batch with more work than
# LARGEST_WORK keeps the GPU busy without a graph.
LARGEST_WORK = 2e11  # tokens × parameters per layer
LARGEST_TOKENS = 16384
LARGEST_GRADIENTS = 2**32  # bytes; graphs keep the gradients in memory between steps
# Attention packages by the major number of the compute capability, the preferred one first. FlashAttention-3 is written for Hopper (9) and
# FlashAttention-4 for Blackwell (10). On Hopper, FlashAttention-4 runs the kernels of FlashAttention-3, rewritten in Python.
PREFERRED: dict[int, tuple[Kernel, ...]] = {9: ("fa3", "fa4"), 10: ("fa4",)}
# Up to this mean document length the kernels for short documents are at least 1.2 times as fast as FlashAttention-2
# (benchmarks/README.md).
SHORT_TOKENS = {9: 1024}
# Smaller micro-batches are bound by kernel launches on the host, and these kernels launch more slowly than those inside PyTorch.
SHORT_BATCH_TOKENS = 16_384
# Default token budget of a micro-batch of responses. A longer prompt with its response raises it.
ANSWER_TOKENS = 16_384

Checkpointing = Literal["none", "selective", "full"]


CHECKPOINTING: dict[Any, Checkpointing] = {False: "none", "selective": "selective", True: "full"}  # in order of memory saved


@dataclass(frozen=True)
class Workload:
    """The length of a run and its documents.

    Attributes:
        total_steps: optimizer steps of the whole run.
        total_tokens: approximate number of tokens of the whole run, over all processes.
        document_tokens: mean document length, weighted by tokens.
        token_budget: maximum tokens of a micro-batch; None: rows are padded.
    """

    total_steps: int
    total_tokens: int
    document_tokens: float
    token_budget: int | None

    @classmethod
    def of(cls, lengths_N: np.ndarray, total_steps: int, steps_per_epoch: int, packing: Packing) -> "Workload":
        """Return the workload of `total_steps` optimizer steps over documents of these lengths in tokens."""
        tokens = int(lengths_N.sum())
        document_tokens = float((lengths_N.astype(float) ** 2).sum() / tokens)
        return cls(total_steps, tokens * total_steps // steps_per_epoch, document_tokens, packing.token_budget)


@dataclass(frozen=True)
class Decisions:
    """The choices for one model of a run, and the hardware and workload that they were made for.

    Attributes:
        compute_dtype: dtype of the forward and backward pass.
        param_dtype: dtype of the weights that the optimizer updates; adapters are always float32.
        checkpointing: activation checkpointing: none, selective or full.
        compiled: whether the layers are compiled.
        why_compiled: the reason for `compiled`, in a few words.
        graph_tokens: largest micro-batch that is captured in a CUDA graph, in tokens; 0: none.
        attention: attention kernel of this process in half precision.
        multiple_of_tokens: the number of tokens of a micro-batch is padded to a multiple of this.
        path: how the model computes a batch.
        rule: how this process computes the model's delta rule; None: it has none.
    """

    hardware: Hardware
    workload: Workload
    spread: Spread
    compute_dtype: torch.dtype
    param_dtype: torch.dtype
    checkpointing: Checkpointing
    compiled: bool
    why_compiled: str
    graph_tokens: int
    attention: AttentionChoice
    multiple_of_tokens: int
    path: ForwardPath = PACKED_PATH
    rule: "RuleChoice | None" = None

    @property
    def device(self) -> torch.device:
        return self.hardware.device

    @property
    def is_sharded(self) -> bool:
        """Return whether FSDP2 shards or offloads the weights."""
        return self.spread.strategy == "fsdp2" and (self.hardware.processes > 1 or self.spread.sharding.cpu_offload)

    @property
    def shards(self) -> int:
        """Number of processes that share one copy of the weights."""
        return 1 if self.spread.strategy == "ddp" else self.spread.sharding.size or self.hardware.processes


def decide(
    outline: Outline,
    hardware: Hardware,
    workload: Workload,
    spread: Spread,
    *,
    other_heads: Sequence[Heads] = (),
    scalar_head: bool = False,
) -> Decisions:
    """Make all choices that `choose_spread` has not made.

    Args:
        spread: result of `choose_spread`.
        other_heads: attention heads of the other models of this process; one attention kernel serves all of them.
        scalar_head: whether the model has a scalar head, as a critic or a reward model has.
    Raises:
        UserError: the hardware cannot run what the config asks for.
    """
    settings = outline.settings
    dtype = choose_compute_dtype(settings.compute_dtype, hardware.device)
    compiled, why = _choose_compiling(outline, hardware, workload, scalar_head=scalar_head)
    own_heads = [heads.of_each(settings.context_parallel_size) for heads in outline.heads]
    heads = tuple(dict.fromkeys([*own_heads, *other_heads]))
    return Decisions(
        hardware=hardware,
        workload=workload,
        spread=spread,
        compute_dtype=dtype,
        param_dtype=getattr(torch, settings.param_dtype),
        checkpointing=CHECKPOINTING[settings.enable_gradient_checkpointing],
        compiled=compiled,
        why_compiled=why,
        graph_tokens=_graph_tokens(outline, hardware, spread, dtype) if compiled and outline.path.fused and not scalar_head else 0,
        attention=choose_attention(settings.attn_implementation, hardware, dtype, heads, workload),
        multiple_of_tokens=multiple_of_tokens(hardware),
        path=outline.path,
        rule=choose_rule(outline.path.rule, hardware, dtype),
    )


def choose_compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of `model.compute_dtype`; "auto" is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


# Token budgets.


def multiple_of_tokens(hardware: Hardware) -> int:
    """Return the multiple that the tokens of a micro-batch are padded to. GPU matmuls are faster on whole tiles."""
    return TILE if hardware.has_gpu else 1


def packing_of(data: "DataConfig", hardware: Hardware) -> Packing:
    """Return the packing of rows for supervised fine-tuning."""
    budget = data.max_tokens_per_micro_batch or data.micro_batch_size_per_gpu * data.max_length
    return Packing(data.micro_batch_size_per_gpu, budget if data.packing else None, multiple_of_tokens(hardware))


def packing_of_pairs(data: "PairsConfig", hardware: Hardware) -> Packing:
    """Return the packing of preference pairs."""
    budget = data.max_tokens_per_micro_batch or data.micro_batch_size_per_gpu * 2 * data.max_length
    return Packing(data.micro_batch_size_per_gpu, budget, multiple_of_tokens(hardware))


def token_budget_of_answers(asked: int | None, longest: int) -> int:
    """Return the token budget of a micro-batch of responses.

    Args:
        asked: data.max_tokens_per_micro_batch; None: choose it.
        longest: tokens of the longest prompt with the longest response.
    """
    return asked or max(ANSWER_TOKENS, longest)


# Sharding.


def choose_spread(outline: Outline, hardware: Hardware, *, holds_still: bool = False) -> Spread:
    """Choose between replicating the weights on each process and sharding them. "auto" replicates models that are small for a GPU.

    Args:
        holds_still: whether nothing in the model is random in training, as in reinforcement learning.
    Raises:
        UserError: the number of processes is not a multiple of the shard size; host memory is too small for offloading; or processes that
            share weights or documents would leave out different layers.
    """
    spread = _choose_spread(outline, hardware)
    if hardware.processes > 1 and not holds_still:
        from verl.engine.left_out import check_layers  # of several processes alone

        check_layers(outline.config, outline.settings, spread)
    return spread


def _choose_spread(outline: Outline, hardware: Hardware) -> Spread:
    settings, fsdp = outline.settings, outline.settings.fsdp_config
    check_multiple(hardware.processes, fsdp.shard_size or 1, key="model.fsdp_config.shard_size")
    pin = fsdp.cpu_offload and hardware.has_gpu and _may_pin(outline, hardware)
    sharding = Sharding(fsdp.shard_size, fsdp.reshard_after_forward, fsdp.cpu_offload, pin)
    if settings.strategy == "ddp" or (settings.strategy == "auto" and _is_small(outline, hardware)):
        return Spread("ddp", sharding)
    return Spread("fsdp2", sharding)


def check_multiple(processes: int, size: int, *, key: str) -> None:
    """Raise UserError if the processes cannot be divided into groups of this size."""
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
    """Return whether host memory is large enough to pin the shards of weights and gradients, which may double their size.

    Raises:
        UserError: even without pinning, it is too small for the shards of weights, gradients and moments.
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
    """Return the host memory that the processes of this machine need, in bytes."""
    each = (BYTES_FROZEN if outline.has_adapters else BYTES_OFFLOADED) + (BYTES_PINNED if pinned else 0)
    shards = outline.settings.fsdp_config.shard_size or hardware.processes
    return outline.parameters * each * hardware.local_processes // shards


# Compiling and CUDA graphs.


def _choose_compiling(outline: Outline, hardware: Hardware, workload: Workload, *, scalar_head: bool) -> tuple[bool, str]:
    """Return whether to compile the layers, and the reason.

    Raises:
        UserError: the config requires it, but there is no C compiler.
    """
    setting = outline.settings.compile
    if not outline.path.packed:
        return False, "documents run one at a time"
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
    seconds = outline.flops(workload.total_tokens // hardware.processes, scalar_head=scalar_head) / hardware.peak_flops
    if seconds < WORTH_SECONDS:
        return False, "auto: the run is too short to repay the compile time"
    return True, "auto"


def _graph_tokens(outline: Outline, hardware: Hardware, spread: Spread, dtype: torch.dtype) -> int:
    """Return the largest micro-batch to capture in a CUDA graph if the layers are compiled, in tokens; 0: none."""
    settings = outline.settings
    alone = hardware.processes == 1 and not spread.sharding.cpu_offload
    flash_attention = has_flash(hardware.device.type, dtype) and settings.attn_implementation != "sdpa" and not _too_large(outline.heads)
    if settings.cuda_graphs is False or not alone or not flash_attention or dtype.itemsize * outline.trained_parameters > LARGEST_GRADIENTS:
        return 0
    from verl.models.randomness import left_out_layers  # once in a run

    # Kernels of a rule read the lengths of the documents on the host; a graph would leave out the same layers in each step.
    if outline.path.rule is not None or left_out_layers(outline.config):
        return 0
    return min(LARGEST_TOKENS, int(LARGEST_WORK * outline.layers / outline.stored_numbers))


# Attention.


def choose_attention(wanted: str, hardware: Hardware, dtype: torch.dtype, heads: Sequence[Heads], workload: Workload) -> AttentionChoice:
    """Choose the attention kernel of this process in half precision.

    Args:
        wanted: `model.attn_implementation`.
        heads: attention heads of every model of this process.
    Raises:
        UserError: the kernel does not run here; the message has the reason.
    """
    if wanted == "sdpa":
        return AttentionChoice("sdpa")
    if not has_flash(hardware.device.type, dtype):
        if wanted != "auto":
            raise UserError(f"{wanted} needs a GPU and bfloat16", where="model.attn_implementation", fix="leave it at auto")
        return AttentionChoice()
    too_large, heads = _too_large(heads), [each for each in heads if each.size <= flash.LARGEST_HEAD]
    if wanted == "auto":
        found = refusals(hardware, dtype, heads, workload)
        best = next((kernel for kernel, refusal in found.items() if refusal is None), None)
        refused = {kernel: refusal for kernel, refusal in found.items() if refusal is not None}
        return AttentionChoice(best or "fa2", refused, too_large)
    kernel = next((kernel for kernel in flash.PACKAGES if kernel == wanted), None)
    if kernel is None:
        return AttentionChoice("fa2", too_large=too_large)
    refusal = hardware.refusal(kernel, dtype, *heads)
    if refusal is not None:
        package = flash.PACKAGES[kernel]
        fix = package.install if refusal == flash.NOT_INSTALLED else "leave it at auto"
        raise UserError(f"{package.name}: {refusal}", where="model.attn_implementation", fix=fix)
    return AttentionChoice(kernel, too_large=too_large)


def _too_large(heads: Sequence[Heads]) -> tuple[int, ...]:
    """Return the sizes of heads that FlashAttention does not have."""
    return tuple(sorted({each.size for each in heads if each.size > flash.LARGEST_HEAD}))


def choose_rule(rule: "Rule | None", hardware: Hardware, dtype: torch.dtype) -> "RuleChoice | None":
    """Choose between flash-linear-attention and the model's own code for a delta rule."""
    if rule is None:
        return None
    from verl.models.attention import delta_rule  # only some models have one

    return delta_rule.choose(rule, hardware.refusal, hardware.device.type, dtype)


def refusals(hardware: Hardware, dtype: torch.dtype, heads: Sequence[Heads], workload: Workload | None = None) -> dict[Kernel, str | None]:
    """Return, for each kernel that is preferred to FlashAttention-2 on this GPU, why it cannot be used, or None if it can.

    The best kernel comes first.

    Args:
        heads: attention heads of every model of this process.
        workload: length of the documents; None if unknown.
    """
    found: dict[Kernel, str | None] = {}
    if workload is not None and _are_short(workload, hardware):
        found["short"] = hardware.refusal("short", dtype, *heads)
        if found["short"] is None:
            return found  # trying the others would only take time
    return found | {kernel: hardware.refusal(kernel, dtype, *heads) for kernel in PREFERRED.get(hardware.capability, ())}


def _are_short(workload: Workload, hardware: Hardware) -> bool:
    short = SHORT_TOKENS.get(hardware.capability, 0)
    return workload.document_tokens <= short and (workload.token_budget or 0) >= SHORT_BATCH_TOKENS
