"""Padded rows to packed ones and back, as flash_attn has them. Dimensions: B rows, T tokens of one with padding, N tokens without."""

import torch
import torch.nn.functional as F
from torch import Tensor


def index_first_axis(values: Tensor, indices_N: Tensor) -> Tensor:
    return values[indices_N]


def unpad_input(hidden_BTX: Tensor, mask_BT: Tensor, unused_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The real tokens, where they were, the offsets of the rows, the longest row and the rows' lengths."""
    lengths_B = mask_BT.sum(-1, dtype=torch.int32)
    indices_N = mask_BT.flatten().nonzero().flatten()
    offsets = F.pad(torch.cumsum(lengths_B, 0, dtype=torch.int32), (1, 0))
    return hidden_BTX.flatten(0, 1)[indices_N], indices_N, offsets, int(lengths_B.max()), lengths_B


def pad_input(hidden_NX: Tensor, indices_N: Tensor, batch: int, seqlen: int) -> Tensor:
    """Each token back in its row, zeros in between."""
    padded = torch.zeros(batch * seqlen, *hidden_NX.shape[1:], device=hidden_NX.device, dtype=hidden_NX.dtype)
    padded[indices_N] = hidden_NX
    return padded.view(batch, seqlen, *hidden_NX.shape[1:])
