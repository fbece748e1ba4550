"""The trial of an installed FlashAttention on this GPU: it must compute what PyTorch's FlashAttention-2 does.

Dimensions: T tokens of the packed batch, N query heads, K key-value heads, D head size.
"""

import importlib

import torch
from torch import Tensor

from verl.models.attention import flash

TOLERANCE = 0.02  # relative error of bfloat16 sums; a wrong mask or head gives 0.1 and more


def refusal(kernel: flash.Kernel, device: torch.device, dtype: torch.dtype, *heads: flash.Heads) -> str | None:
    """Return why this kernel cannot be used here for models with these heads, in one line; None if it can be used."""
    package = flash.PACKAGES[kernel]
    try:
        importlib.import_module(package.module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        return flash.NOT_INSTALLED if package.module.startswith(missing) else f"its dependency {missing} is not installed"
    except Exception as error:  # a package built for another PyTorch, CUDA or Python may raise anything
        return f"cannot be imported: {_first_line(error)}"
    if kernel == "fa3" and not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        return f"not supported by PyTorch {torch.__version__}"
    return next((found for each in heads if (found := _trial(kernel, device, dtype, each)) is not None), None)


def _trial(kernel: flash.Kernel, device: torch.device, dtype: torch.dtype, heads: flash.Heads) -> str | None:
    """Compare output and gradients on three short documents with FlashAttention-2. Return what is wrong, or None."""
    expected = _results("fa2", device, dtype, heads)
    try:
        found = _results(kernel, device, dtype, heads)
    except Exception as error:  # whatever the package raises, the run continues without it and reports why
        return f"fails on this machine: {type(error).__name__}: {_first_line(error)}"
    finally:
        flash.activate("fa2")
    difference = max(float((f - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True))
    return None if difference < TOLERANCE else f"differs from FlashAttention-2 by {difference:.2g}"


def _results(kernel: flash.Kernel, device: torch.device, dtype: torch.dtype, heads: flash.Heads) -> list[Tensor]:
    flash.activate(kernel)
    cu_seqlens = torch.tensor([0, 1, 131, 431], dtype=torch.int32, device=device)
    generator = torch.Generator(device).manual_seed(0)  # does not advance the run's random state
    query_TND, key_TKD, value_TKD, output_gradient_TND = (
        torch.randn(431, number, heads.size, device=device, generator=generator).to(dtype).requires_grad_()
        for number in (heads.query, heads.key_value, heads.key_value, heads.query)
    )
    with torch.enable_grad():
        output_TND = flash.flash_attention(query_TND, key_TKD, value_TKD, cu_seqlens, 300, kernel=kernel)
        gradients = torch.autograd.grad(output_TND, (query_TND, key_TKD, value_TKD), output_gradient_TND.detach())
    return [x.detach().float() for x in (output_TND, *gradients)]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
