"""flash_attn's functions on the FlashAttention-2 kernels that PyTorch ships: for peers that ask for the package where it is not installed.

Only what training needs is here; an argument that would change the result and is not supported is an error.
"""

from typing import Any

import torch
from torch import Tensor

__version__ = "2.8.3"


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    **others: Any,
) -> Tensor:
    """Attention within each document of a packed batch."""
    _check(window_size, softcap, others)
    lengths = (cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k))
    return torch.ops.aten._flash_attention_forward(q, k, v, *lengths, dropout_p, causal, False, scale=softmax_scale)[0]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    **others: Any,
) -> Tensor:
    """Attention within each row of a batch without padding."""
    _check(window_size, softcap, others)
    lengths = (None, None, q.shape[1], k.shape[1])
    return torch.ops.aten._flash_attention_forward(q, k, v, *lengths, dropout_p, causal, False, scale=softmax_scale)[0]


def flash_attn_with_kvcache(*_: Any, **__: Any) -> Tensor:
    """Generation, which no peer is measured at."""
    raise NotImplementedError("the stand-in for flash_attn only trains")


def _check(window_size: tuple[int, int], softcap: float, others: dict[str, Any]) -> None:
    wanted = {name: value for name, value in others.items() if value not in (None, False)}
    if tuple(window_size) != (-1, -1) or softcap or wanted:
        raise NotImplementedError(f"the stand-in for flash_attn has no window_size={window_size}, softcap={softcap}, {wanted}")
