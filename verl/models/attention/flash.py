"""FlashAttention over packed documents. Version 2 is part of PyTorch, versions 3 and 4 are optional packages, and verl has its own kernels
for short documents.

A package is used only after a trial: it must be importable, and its output and gradients on this GPU, with the model's own heads, must
match FlashAttention-2. An unusable package never stops a run. The run reports why it does not use the package.

Dimensions: T tokens of the packed batch, N query heads, K key-value heads, D head size.
"""

import inspect
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.nn.attention.varlen import varlen_attn

from verl.errors import UserError

Kernel = Literal["fa2", "fa3", "fa4", "short"]


@dataclass(frozen=True)
class Package:
    """The package of a kernel.

    Attributes:
        name: display name.
        distribution: name of the installed distribution.
        module: module to import.
        install: how to install it.
    """

    name: str
    distribution: str
    module: str
    install: str


PACKAGES: dict[Kernel, Package] = {
    "fa3": Package("FlashAttention-3", "flash_attn_3", "flash_attn_interface", "build its repository's folder hopper"),
    "short": Package("kernels for short documents, Triton", "triton", "verl.models.attention.short_triton", "a PyTorch for GPUs has it"),
    "fa4": Package("FlashAttention-4", "flash-attn-4", "flash_attn.cute.interface", 'pip install "verl[fa4]"'),
}

NOT_INSTALLED = "not installed"
LARGEST_HEAD = 256  # numbers of a head, in every release of FlashAttention


@dataclass(frozen=True)
class Heads:
    """The attention heads that a kernel must support: number of query and key-value heads, and head size."""

    query: int
    key_value: int
    size: int

    def of_each(self, ranks: int) -> "Heads":
        """Return the heads that each of these ranks computes. A key head is on every rank that has one of its query heads."""
        return Heads(self.query // ranks, math.lcm(self.key_value, ranks) // ranks, self.size)


def version(kernel: Kernel) -> str:
    """Return the kernel's display name, with the version of an installed package."""
    if kernel == "fa2":
        return "PyTorch's FlashAttention-2"
    package = PACKAGES[kernel]
    try:
        return f"{package.name} {metadata.version(package.distribution)}"
    except metadata.PackageNotFoundError:
        return package.name


def is_fa3_active() -> bool:
    """Return whether FlashAttention-3 replaces version 2 inside PyTorch's own functions."""
    return bool(getattr(torch_attention, "current_flash_attention_impl", lambda: None)() == "FA3")


def activate(kernel: Kernel) -> None:
    """Prepare this process for `flash_attention(kernel=…)`. FlashAttention-3 replaces version 2 inside PyTorch's own functions."""
    if kernel == "fa3" and not is_fa3_active():
        torch_attention.activate_flash_attention_impl("FA3")
    elif kernel != "fa3" and is_fa3_active():
        torch_attention.restore_flash_attention_impl()
    if kernel == "fa4":  # a harmless warning for each kernel that it compiles
        warnings.filterwarnings("ignore", message="Argument .* cannot be converted to a JitArgument", category=UserWarning)


def flash_attention(
    query_TND: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    kernel: Kernel = "fa2",
) -> Tensor:
    """Compute causal attention within each document, on CUDA in bfloat16 or float16.

    Args:
        cu_seqlens: S + 1 offsets of the documents, int32, from 0 to T.
        max_seqlen: length of the longest document, or more.
        scale: factor of the scores; None uses 1 / √D.
        sliding_window: number of tokens that a token attends to, itself included; None for all tokens before it.
        kernel: an activated kernel.
    Returns:
        output_TND.
    """
    output_TND: Tensor
    if kernel == "short" and sliding_window is None:
        output_TND, _ = _short(query_TND, key_TKD, value_TKD, cu_seqlens, max_seqlen, scale or query_TND.shape[-1] ** -0.5)
        return output_TND
    if kernel == "fa4":
        output_TND, _ = _flash4(query_TND, key_TKD, value_TKD, cu_seqlens, max_seqlen, scale, sliding_window)
        return output_TND
    return _inside_pytorch(query_TND, key_TKD, value_TKD, cu_seqlens, max_seqlen, scale, sliding_window)


# The signature changed between PyTorch 2.10 and 2.13.
_VARLEN_PARAMETERS = inspect.signature(varlen_attn).parameters


def _inside_pytorch(
    query_TND: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None,
    sliding_window: int | None,
) -> Tensor:
    options: dict[str, Any] = {"scale": scale}
    if "window_size" in _VARLEN_PARAMETERS:
        options["window_size"] = (sliding_window - 1 if sliding_window else -1, 0)
    elif sliding_window:
        raise UserError("this PyTorch's variable-length attention has no sliding window", fix="install torch>=2.11")
    else:
        options["is_causal"] = True
    if "enable_gqa" in _VARLEN_PARAMETERS:
        options["enable_gqa"] = query_TND.shape[1] != key_TKD.shape[1]
    output_TND = varlen_attn(query_TND, key_TKD, value_TKD, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
    assert isinstance(output_TND, Tensor)  # it is a tuple only with auxiliary outputs
    return output_TND


# FlashAttention-4 is a custom operator, so that it is one node in a compiled layer. PyTorch's own `activate_flash_attention_impl("FA4")`
# expects two results from the package's forward function, which returns more since 4.0.0b20.
@torch.library.custom_op("verl::flash4", mutates_args=())
def _flash4(
    query_TND: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None = None,
    sliding_window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return output_TND and logsumexp_NT, float32."""
    from flash_attn.cute.interface import flash_attn_varlen_func

    output_TND, logsumexp_NT = flash_attn_varlen_func(
        query_TND.contiguous(),
        key_TKD.contiguous(),
        value_TKD.contiguous(),
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        softmax_scale=scale,
        causal=True,
        window_size=(_tokens_before(sliding_window), None),
        return_lse=True,
    )
    return output_TND, logsumexp_NT


@torch.library.custom_op("verl::flash4_backward", mutates_args=())
def _flash4_backward(
    output_gradient_TND: Tensor,
    saved: Sequence[Tensor],
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None = None,
    sliding_window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value. `saved` has query, key, value, output_TND and logsumexp_NT."""
    from flash_attn.cute.interface import _flash_attn_bwd

    query_TND, key_TKD, value_TKD = (tensor.contiguous() for tensor in saved[:3])
    output_TND, logsumexp_NT = saved[3:]
    gradients: tuple[Tensor, Tensor, Tensor] = _flash_attn_bwd(
        query_TND,
        key_TKD,
        value_TKD,
        output_TND,
        output_gradient_TND.contiguous(),
        logsumexp_NT,
        softmax_scale=scale,
        causal=True,
        window_size_left=_tokens_before(sliding_window),
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return gradients


# The kernels for short documents are a custom operator for the same reason.
@torch.library.custom_op("verl::short_attention", mutates_args=())
def _short(
    query_TND: Tensor, key_TKD: Tensor, value_TKD: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return output_TND and logsumexp_NT, float32."""
    from verl.models.attention import short_triton

    return short_triton.forward(query_TND, key_TKD, value_TKD, cu_seqlens, max_seqlen, scale)


@torch.library.custom_op("verl::short_attention_backward", mutates_args=())
def _short_backward(
    output_gradient_TND: Tensor, saved: Sequence[Tensor], cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value. `saved` has query, key, value, output_TND and logsumexp_NT."""
    from verl.models.attention import short_triton

    query_TND, key_TKD, value_TKD, output_TND, logsumexp_NT = saved
    kept = query_TND, key_TKD, value_TKD, output_TND, logsumexp_NT
    return short_triton.backward(output_gradient_TND.contiguous(), *kept, cu_seqlens, max_seqlen, scale)


def _shapes(query_TND: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """Return empty tensors of the shapes of an operator's two results, for tracing."""
    tokens, heads, _ = query_TND.shape
    return query_TND.new_empty(query_TND.shape), query_TND.new_empty((heads, tokens), dtype=torch.float32)


def _backward_shapes(output_gradient_TND: Tensor, saved: Sequence[Tensor], *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    query_TND, key_TKD, value_TKD = saved[:3]
    return query_TND.new_empty(query_TND.shape), key_TKD.new_empty(key_TKD.shape), value_TKD.new_empty(value_TKD.shape)


_flash4.register_fake(_shapes)
_short.register_fake(_shapes)
_flash4_backward.register_fake(_backward_shapes)
_short_backward.register_fake(_backward_shapes)


def _save_for_short_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query_TND, key_TKD, value_TKD, cu_seqlens, ctx.max_seqlen, ctx.scale = inputs
    ctx.save_for_backward(query_TND, key_TKD, value_TKD, *output, cu_seqlens)


def _short_gradients(ctx: Any, output_gradient_TND: Tensor, logsumexp_gradient_NT: Tensor) -> tuple[Tensor | None, ...]:
    *saved, cu_seqlens = ctx.saved_tensors
    return (*_short_backward(output_gradient_TND, saved, cu_seqlens, ctx.max_seqlen, ctx.scale), None, None, None)


_short.register_autograd(_short_gradients, setup_context=_save_for_short_backward)


def _save_for_flash4_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query_TND, key_TKD, value_TKD, cu_seqlens, ctx.max_seqlen, ctx.scale, ctx.sliding_window = inputs
    ctx.save_for_backward(query_TND, key_TKD, value_TKD, *output, cu_seqlens)


def _flash4_gradients(ctx: Any, output_gradient_TND: Tensor, logsumexp_gradient_NT: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of the inputs. The gradient of logsumexp_NT is ignored, because nothing uses that output."""
    *saved, cu_seqlens = ctx.saved_tensors
    gradients = _flash4_backward(output_gradient_TND, saved, cu_seqlens, ctx.max_seqlen, ctx.scale, ctx.sliding_window)
    return (*gradients, None, None, None, None)


_flash4.register_autograd(_flash4_gradients, setup_context=_save_for_flash4_backward)


def _tokens_before(sliding_window: int | None) -> int | None:
    return sliding_window - 1 if sliding_window else None
