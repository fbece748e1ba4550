"""Attention of generation, over keys and values that lie in slots: one slot a sequence, as long as the longest may become.

It is registered with transformers, as the packed attention of training is, so that unmodified models use it. Prompts go through
packed attention, side by side without padding, and leave their keys and values in the slots; then each sequence's newest
token attends to what its slot holds.

Dimensions: S slots, L positions of a slot, B slots in use, T packed tokens, R of them that are stored (a prompt of several
answers in several slots), N query heads, K key-value heads, G = N / K, D head size.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from verl.kernels import HAS_TRITON
from verl.models.attention.packed import packed_attention

SLOTS = "verl_slots"


class Shape(NamedTuple):
    """What a layer keeps of each token."""

    heads: int
    key_size: int
    value_size: int


class LayerCache(NamedTuple):
    """A layer's keys, key_SKLD, and values, value_SKLD."""

    key: Tensor
    value: Tensor


class Packed(NamedTuple):
    """Prompts side by side: their bounds, the longest, and where their tokens go: token source_R to position position_R of slot slot_R."""

    cu_seqlens: Tensor
    max_seqlen: int
    source_R: Tensor
    slot_R: Tensor
    position_R: Tensor


class Newest(NamedTuple):
    """One token of each of the first B slots, at its position; `longest` positions are in use, where the host knows it."""

    position_B: Tensor
    longest: int | None


@dataclass
class Probe:
    """Takes note of the shapes that layers ask to keep."""

    shapes: list[Shape]


def slot_attention(
    module: nn.Module,
    query_BNTD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    attention_mask: Tensor | None,
    *,
    slot_cache: LayerCache | Probe | None = None,
    slot_place: Packed | Newest | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in the form of transformers' functions.

    Args:
        slot_cache: of the layer.
        slot_place: which tokens these are: T packed ones with B = 1, or one of each slot with T = 1.
    Returns:
        output_BTND and None (no attention weights).
    Raises:
        UserError: the architecture asks for what packed attention does not compute.
    """
    assert slot_place is not None and slot_cache is not None, "the layer does not pass its arguments on to its attention"
    if isinstance(slot_place, Packed):
        _store(slot_cache, slot_place, key_BKTD[0], value_BKTD[0])
        bounds = {"cu_seq_lens_q": slot_place.cu_seqlens, "max_length_q": slot_place.max_seqlen, "context": ""}
        return packed_attention(module, query_BNTD, key_BKTD, value_BKTD, None, **{**kwargs, **bounds})
    assert isinstance(slot_cache, LayerCache)
    query_BND, key_BKD, value_BKD = query_BNTD[:, :, 0], key_BKTD[:, :, 0], value_BKTD[:, :, 0]
    scale, window = kwargs.get("scaling") or query_BND.shape[-1] ** -0.5, kwargs.get("sliding_window") or 0
    if has_kernel(query_BND.device):
        output_BND = _attend(query_BND, key_BKD, value_BKD, slot_cache.key, slot_cache.value, slot_place.position_B, scale, window)
    else:
        output_BND = _attend_plainly(query_BND, key_BKD, value_BKD, slot_cache, slot_place, scale, window)
    return output_BND.unsqueeze(1), None


def has_kernel(device: torch.device) -> bool:
    """Whether attention to slots runs as a kernel of our own, which reads of each slot only what is in use."""
    return HAS_TRITON and device.type == "cuda"


def _store(cache: LayerCache | Probe, place: Packed, key_KTD: Tensor, value_KTD: Tensor) -> None:
    if isinstance(cache, Probe):
        cache.shapes.append(Shape(key_KTD.shape[0], key_KTD.shape[2], value_KTD.shape[2]))
        return
    for slots_SKLD, x_KTD in ((cache.key, key_KTD), (cache.value, value_KTD)):
        slots_SKLD[place.slot_R, :, place.position_R] = x_KTD.transpose(0, 1)[place.source_R].to(slots_SKLD.dtype)


def _attend_plainly(
    query_BND: Tensor, key_BKD: Tensor, value_BKD: Tensor, cache: LayerCache, place: Newest, scale: float, window: int
) -> Tensor:
    """PyTorch's scaled dot product over the positions in use; query heads that share a key head are taken as its rows."""
    rows, heads, size = query_BND.shape
    row_B = torch.arange(rows, device=query_BND.device)
    cache.key[row_B, :, place.position_B] = key_BKD.to(cache.key.dtype)
    cache.value[row_B, :, place.position_B] = value_BKD.to(cache.value.dtype)
    used = cache.key.shape[2] if place.longest is None else place.longest
    distance_BL = place.position_B[:, None] - torch.arange(used, device=query_BND.device)
    seen_BL = distance_BL >= 0 if window <= 0 else (distance_BL >= 0) & (distance_BL < window)
    output_BKGD = F.scaled_dot_product_attention(
        query_BND.view(rows, key_BKD.shape[1], -1, size),
        cache.key[:rows, :, :used],
        cache.value[:rows, :, :used],
        attn_mask=seen_BL[:, None, None],
        scale=scale,
    )
    return output_BKGD.reshape(rows, heads, -1)


# As an operator, so that a compiled layer holds the kernel as one node. It writes the newest keys and values into the slots
# and does not say so: nothing else in a compiled layer reads them, and said, the compiler may copy whole caches to keep order.
@torch.library.custom_op("verl::slot_attention", mutates_args=())
def _attend(
    query_BND: Tensor,
    key_BKD: Tensor,
    value_BKD: Tensor,
    key_SKLD: Tensor,
    value_SKLD: Tensor,
    position_B: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    from verl.rollout import _attention_triton

    return _attention_triton.attend(query_BND, key_BKD, value_BKD, key_SKLD, value_SKLD, position_B, scale, window)


@_attend.register_fake
def _(query_BND: Tensor, key_BKD: Tensor, value_BKD: Tensor, *others: Any) -> Tensor:
    return query_BND.new_empty(*query_BND.shape[:2], value_BKD.shape[2])


# Without a mask function of the same name transformers makes no mask.
AttentionInterface.register(SLOTS, slot_attention)
