"""Attention over packed batches, registered with transformers so that every architecture uses it unmodified.

A model that is loaded with `attn_implementation=PACKED` is called with one row of T tokens, positions that restart in each
document, and `packed_kwargs(batch)`. No token sees another document. Two exact paths:

- CUDA in half precision: FlashAttention with variable lengths, which is inside PyTorch (`torch.nn.attention.varlen`);
- anything else: PyTorch's scaled dot product, one document at a time.

Dimensions: T tokens of the packed batch, N query heads, K key-value heads, D head size; a leading 1 is transformers' batch.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from verl.data.batch import Batch
from verl.errors import UserError

PACKED = "verl_packed"

# The signature moved between PyTorch 2.10 and 2.13.
_VARLEN_PARAMETERS = inspect.signature(varlen_attn).parameters


def packed_kwargs(batch: Batch) -> dict[str, Any]:
    """What a transformers model passes down to its attention; the names are transformers' own for packed batches."""
    return {
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
        "max_length_q": batch.max_seqlen,
        "max_length_k": batch.max_seqlen,
    }


def describe_attention(device_type: str, dtype: torch.dtype) -> str:
    """Which path a run on this device takes, and why."""
    if _has_varlen(device_type, dtype):
        return "FlashAttention with variable lengths, inside PyTorch"
    reason = "no GPU" if device_type != "cuda" else "it needs bfloat16 or float16"
    return f"PyTorch's scaled dot product, one document at a time (no FlashAttention: {reason})"


def _has_varlen(device_type: str, dtype: torch.dtype) -> bool:
    return device_type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def packed_attention(
    module: nn.Module,
    query_1NTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document, in the form of transformers' attention functions.

    Returns:
        output_1TND and None (no attention weights).
    Raises:
        UserError: the architecture asks for what neither path computes, or does not pass the documents' bounds on.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise UserError(f"{type(module).__name__} does not pass document bounds to its attention", fix=_USE_ANOTHER)
    if dropout or kwargs.get("softcap") or kwargs.get("s_aux") is not None or kwargs.get("is_causal") is False:
        raise UserError(f"{type(module).__name__} needs dropout, soft-capping, sinks or two-way attention", fix=_USE_ANOTHER)
    if _has_varlen(query_1NTD.device.type, query_1NTD.dtype):
        return _varlen(query_1NTD, key_1KTD, value_1KTD, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    return _per_document(query_1NTD, key_1KTD, value_1KTD, cu_seq_lens_q, scaling, sliding_window), None


_USE_ANOTHER = "this architecture cannot be trained in packed batches yet; choose a model such as Qwen2, Qwen3, Llama or Mistral"


def _varlen(
    query_1NTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    query_TND, key_TKD, value_TKD = (x.squeeze(0).transpose(0, 1) for x in (query_1NTD, key_1KTD, value_1KTD))
    options: dict[str, Any] = {"scale": scaling}
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
    return output_TND.unsqueeze(0)


def _per_document(
    query_1NTD: Tensor, key_1KTD: Tensor, value_1KTD: Tensor, cu_seqlens: Tensor, scaling: float | None, sliding_window: int | None
) -> Tensor:
    lengths = cu_seqlens.diff().tolist()
    outputs = [
        F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=_window_mask(query.shape[2], sliding_window, query.device),
            is_causal=sliding_window is None or query.shape[2] <= sliding_window,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        # `split`, not slices: its backward is one concatenation, where each slice would fill a gradient of all T tokens.
        for query, key, value in zip(*(x.split(lengths, dim=2) for x in (query_1NTD, key_1KTD, value_1KTD)), strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _window_mask(length: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    if sliding_window is None or length <= sliding_window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < sliding_window)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The bounds of the documents say all that a mask would."""


AttentionInterface.register(PACKED, packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(PACKED, _no_mask)
