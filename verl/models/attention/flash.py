"""FlashAttention over packed documents: 2 is inside PyTorch, 3 and 4 are packages that a person may install, and kernels of
our own serve documents that are short.

A package is taken only after a trial: it must be importable, and on this GPU, with the model's own heads, its output and its
gradients must be those of FlashAttention-2. So a run never stops over a package that does not fit; it says why it does without.

Dimensions: T tokens of the packed batch, N query heads, K key-value heads, D head size.
"""

import importlib
import inspect
import warnings
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
    """Where a kernel comes from.

    Attributes:
        name: as people call it.
        distribution: the installed package.
        module: what is imported.
        install: how to get it.
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

# By the major number of the compute capability, the preferred first. FlashAttention-3 is written for Hopper (9); 4 is written
# for Blackwell (10), and its kernels for Hopper are 3's, in Python.
PREFERRED: dict[int, tuple[Kernel, ...]] = {9: ("fa3", "fa4"), 10: ("fa4",)}

# By the same number: up to so many tokens a document the kernels for short ones are taken, being at least 1.2 times as fast as
# FlashAttention-2 (benchmarks/README.md).
SHORT_TOKENS = {9: 1024}
# Smaller micro-batches than this are bound by the host, which launches those kernels more slowly than what is inside PyTorch.
SHORT_BATCH_TOKENS = 16_384

NOT_INSTALLED = "not installed"
TOLERANCE = 0.02  # relative, of sums in bfloat16; a wrong mask or a wrong head gives 0.1 and more


@dataclass(frozen=True)
class Documents:
    """What a run puts through attention.

    Attributes:
        tokens: of the document that an average token lies in.
        batch_tokens: of a micro-batch, at most.
    """

    tokens: float
    batch_tokens: int


@dataclass(frozen=True)
class Heads:
    """What a kernel must be able to do for a model."""

    query: int
    key_value: int
    size: int


def refusals(device: torch.device, dtype: torch.dtype, *heads: Heads, documents: Documents | None = None) -> dict[Kernel, str | None]:
    """For each kernel beside FlashAttention-2 that this GPU may prefer, the best first: why it cannot be used, or None where it can.

    Args:
        heads: of each model that it is to serve.
        documents: of the run; None: nothing is known of them.
    """
    major, _ = torch.cuda.get_device_capability(device)
    found: dict[Kernel, str | None] = {}
    if documents is not None and documents.tokens <= SHORT_TOKENS.get(major, 0) and documents.batch_tokens >= SHORT_BATCH_TOKENS:
        found["short"] = refusal("short", device, dtype, *heads)
        if found["short"] is None:
            return found  # the others would only cost the time of their trials
    return found | {kernel: refusal(kernel, device, dtype, *heads) for kernel in PREFERRED.get(major, ())}


def preferred(refusals: dict[Kernel, str | None]) -> Kernel:
    """The first package that can be used, or else what is inside PyTorch."""
    return next((kernel for kernel, refusal in refusals.items() if refusal is None), "fa2")


def refusal(kernel: Kernel, device: torch.device, dtype: torch.dtype, *heads: Heads) -> str | None:
    """Why this package's kernel cannot be used here for each of these models, in one line; None where it can."""
    package = PACKAGES[kernel]
    try:
        importlib.import_module(package.module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        return NOT_INSTALLED if package.module.startswith(missing) else f"its requirement {missing} is not installed"
    except Exception as error:  # whatever a package raises that was built for another PyTorch, CUDA or Python
        return f"cannot be imported: {_first_line(error)}"
    if kernel == "fa3" and not hasattr(torch_attention, "activate_flash_attention_impl"):
        return f"PyTorch {torch.__version__} cannot call it"
    return next((found for each in heads if (found := _trial(kernel, device, dtype, each)) is not None), None)


def version(kernel: Kernel) -> str:
    """The name and, where a package is installed, its version."""
    if kernel == "fa2":
        return "FlashAttention-2, inside PyTorch"
    package = PACKAGES[kernel]
    try:
        return f"{package.name} {metadata.version(package.distribution)}"
    except metadata.PackageNotFoundError:
        return package.name


def is_fa3_active() -> bool:
    """Whether FlashAttention-3 takes the place of 2 behind PyTorch's own calls."""
    return bool(getattr(torch_attention, "current_flash_attention_impl", lambda: None)() == "FA3")


def activate(kernel: Kernel) -> None:
    """Prepare this process for `flash_attention(kernel=…)`. FlashAttention-3 takes the place of 2 behind PyTorch's own calls."""
    if kernel == "fa3" and not is_fa3_active():
        torch_attention.activate_flash_attention_impl("FA3")
    elif kernel != "fa3" and is_fa3_active():
        torch_attention.restore_flash_attention_impl()
    if kernel == "fa4":  # said of each kernel that it compiles, and of no use to anybody
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
    """Causal attention inside each document, on CUDA in bfloat16 or float16.

    Args:
        cu_seqlens: bounds of the documents, S + 1 of int32 from 0 to T.
        max_seqlen: tokens of the longest document, or more.
        scale: of the scores; None: 1 / √D.
        sliding_window: how many tokens, itself included, a token sees; None: all before it.
        kernel: an activated one.
    Returns:
        output_TND.
    """
    if kernel == "short" and sliding_window is None:
        output_TND, _ = _short(query_TND, key_TKD, value_TKD, cu_seqlens, max_seqlen, scale or query_TND.shape[-1] ** -0.5)
        return output_TND
    if kernel == "fa4":
        output_TND, _ = _flash4(query_TND, key_TKD, value_TKD, cu_seqlens, max_seqlen, scale, sliding_window)
        return output_TND
    return _inside_pytorch(query_TND, key_TKD, value_TKD, cu_seqlens, max_seqlen, scale, sliding_window)


# The signature moved between PyTorch 2.10 and 2.13.
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
    assert isinstance(output_TND, Tensor)  # a tuple only where auxiliary outputs are asked for
    return output_TND


# FlashAttention-4 as an operator of PyTorch, so that a compiled layer holds it as one node. PyTorch's own
# `activate_flash_attention_impl("FA4")` expects two results of the package's forward function; since 4.0.0b20 there are more.
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
    """output_TND and the logarithm of each row's sum of exponentials, [N, T] in float32."""
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
    query_TND: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    output_TND: Tensor,
    logsumexp_NT: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None = None,
    sliding_window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    query_TND, key_TKD, value_TKD = query_TND.contiguous(), key_TKD.contiguous(), value_TKD.contiguous()
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


# The kernels for short documents as an operator, for the same reason.
@torch.library.custom_op("verl::short_attention", mutates_args=())
def _short(
    query_TND: Tensor, key_TKD: Tensor, value_TKD: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor]:
    """output_TND and the logarithm of each row's sum of exponentials, [N, T] in float32."""
    from verl.models.attention import short_triton

    return short_triton.forward(query_TND, key_TKD, value_TKD, cu_seqlens, max_seqlen, scale)


@torch.library.custom_op("verl::short_attention_backward", mutates_args=())
def _short_backward(
    output_gradient_TND: Tensor,
    query_TND: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    output_TND: Tensor,
    logsumexp_NT: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from verl.models.attention import short_triton

    saved = (query_TND, key_TKD, value_TKD, output_TND, logsumexp_NT)
    return short_triton.backward(output_gradient_TND.contiguous(), *saved, cu_seqlens, max_seqlen, scale)


def _shapes(query_TND: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """Of an operator's two results, for tracing."""
    tokens, heads, _ = query_TND.shape
    return query_TND.new_empty(query_TND.shape), query_TND.new_empty((heads, tokens), dtype=torch.float32)


def _backward_shapes(
    output_gradient_TND: Tensor, query_TND: Tensor, key_TKD: Tensor, value_TKD: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query_TND.new_empty(query_TND.shape), key_TKD.new_empty(key_TKD.shape), value_TKD.new_empty(value_TKD.shape)


_flash4.register_fake(_shapes)
_short.register_fake(_shapes)
_flash4_backward.register_fake(_backward_shapes)
_short_backward.register_fake(_backward_shapes)


def _keep_short(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query_TND, key_TKD, value_TKD, cu_seqlens, ctx.max_seqlen, ctx.scale = inputs
    ctx.save_for_backward(query_TND, key_TKD, value_TKD, *output, cu_seqlens)


def _short_gradients(ctx: Any, output_gradient_TND: Tensor, logsumexp_gradient_NT: Tensor) -> tuple[Tensor | None, ...]:
    return (*_short_backward(output_gradient_TND, *ctx.saved_tensors, ctx.max_seqlen, ctx.scale), None, None, None)


_short.register_autograd(_short_gradients, setup_context=_keep_short)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query_TND, key_TKD, value_TKD, cu_seqlens, ctx.max_seqlen, ctx.scale, ctx.sliding_window = inputs
    ctx.save_for_backward(query_TND, key_TKD, value_TKD, *output, cu_seqlens)


def _gradients(ctx: Any, output_gradient_TND: Tensor, logsumexp_gradient_NT: Tensor) -> tuple[Tensor | None, ...]:
    """Of the output alone: nothing uses the logarithms of the sums."""
    gradients = _flash4_backward(output_gradient_TND, *ctx.saved_tensors, ctx.max_seqlen, ctx.scale, ctx.sliding_window)
    return (*gradients, None, None, None, None)


_flash4.register_autograd(_gradients, setup_context=_keep_for_backward)


def _tokens_before(sliding_window: int | None) -> int | None:
    return sliding_window - 1 if sliding_window else None


def _trial(kernel: Kernel, device: torch.device, dtype: torch.dtype, heads: Heads) -> str | None:
    """Output and gradients of three short documents beside FlashAttention-2's: what is wrong, or None."""
    expected = _results("fa2", device, dtype, heads)
    try:
        found = _results(kernel, device, dtype, heads)
    except Exception as error:  # whatever a package raises, the run can do without it, and says so
        return f"does not run here: {type(error).__name__}: {_first_line(error)}"
    finally:
        activate("fa2")
    difference = max(float((f - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True))
    return None if difference < TOLERANCE else f"differs from FlashAttention-2 by {difference:.2g}"


def _results(kernel: Kernel, device: torch.device, dtype: torch.dtype, heads: Heads) -> list[Tensor]:
    activate(kernel)
    cu_seqlens = torch.tensor([0, 1, 131, 431], dtype=torch.int32, device=device)
    generator = torch.Generator(device).manual_seed(0)  # not the run's own random numbers
    query_TND, key_TKD, value_TKD, output_gradient_TND = (
        torch.randn(431, number, heads.size, device=device, generator=generator).to(dtype).requires_grad_()
        for number in (heads.query, heads.key_value, heads.key_value, heads.query)
    )
    with torch.enable_grad():
        output_TND = flash_attention(query_TND, key_TKD, value_TKD, cu_seqlens, 300, kernel=kernel)
        gradients = torch.autograd.grad(output_TND, (query_TND, key_TKD, value_TKD), output_gradient_TND.detach())
    return [x.detach().float() for x in (output_TND, *gradients)]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
