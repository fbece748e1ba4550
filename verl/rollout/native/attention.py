"""Attention during generation, over a KV cache in slots. Each sequence has one slot, with space for its prompt and longest response.

It is registered with transformers, like the packed attention of training, so that models need no changes. Prefill runs packed attention
over the prompts, without padding, and stores their keys and values in the slots. In a decode step, the newest token of each
sequence attends to its slot.

Dimensions: S slots, L positions of a slot, B slots in use, T packed tokens, R stored tokens (a prompt with several responses is stored in
several slots), P slots with a prompt, N query heads, K key-value heads, G = N / K, D head size.
"""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from verl.dist import HAS_TRITON
from verl.errors import UserError
from verl.models.attention.packed import packed_attention

SLOTS = "verl_slots"


class KVShape(NamedTuple):
    """Shape of a layer's keys and values of one token: number of key-value heads, and sizes of a key and a value."""

    heads: int
    key_size: int
    value_size: int


class StateShape(NamedTuple):
    """Shape and dtype of a state of one sequence."""

    sizes: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize


class RecurrentShape(NamedTuple):
    """What a layer without attention carries from token to token: last inputs of its convolution, and state of its rule; None: nothing."""

    convolution: StateShape | None
    rule: StateShape | None

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self if state is not None)


class LayerCache(NamedTuple):
    """KV cache of a layer: key_SKLD and value_SKLD."""

    key: Tensor
    value: Tensor


class StateCache(NamedTuple):
    """State of a layer without attention, for each slot; see `RecurrentShape`."""

    convolution: Tensor | None
    rule: Tensor | None


class PrefillBatch(NamedTuple):
    """Packed prompts and their places in the slots.

    Token source_R is stored at position position_R of slot slot_R. Slot slot_P has prompt prompt_P of the batch.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    source_R: Tensor
    slot_R: Tensor
    position_R: Tensor
    prompt_P: Tensor
    slot_P: Tensor


class DecodeBatch(NamedTuple):
    """One token for each of the first B slots, at position_B.

    All used positions of these slots are below `used_positions`; it is None if the host does not know them.
    """

    position_B: Tensor
    used_positions: int | None


@dataclass
class ShapeProbe:
    """Stand-in for the cache of a layer that records the shapes of its keys and values, and of its states by name."""

    shapes: list[KVShape] = field(default_factory=list)
    states: list[tuple[str, StateShape]] = field(default_factory=list)

    def found(self) -> KVShape | RecurrentShape | None:
        """Return what the layer keeps; None if it is neither one attention, nor one convolution or rule or both."""
        states = dict(self.states)
        if len(self.shapes) == 1 and not states:
            return self.shapes[0]
        if self.shapes or not states or len(states) < len(self.states):
            return None
        return RecurrentShape(states.get("convolution"), states.get("rule"))


def slot_attention(
    module: nn.Module,
    query_BNTD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    attention_mask: Tensor | None,
    *,
    slot_cache: LayerCache | ShapeProbe | None = None,
    slot_batch: PrefillBatch | DecodeBatch | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention, with the signature of transformers' attention functions.

    Args:
        slot_cache: KV cache of the layer.
        slot_batch: places of the tokens; T packed tokens with B = 1 (prefill), or one token per slot with T = 1 (decode).
    Returns:
        output_BTND and None (no attention weights).
    Raises:
        UserError: the architecture needs an option that packed attention does not support.
    """
    if slot_batch is None or slot_cache is None:
        raise UserError(f"{type(module).__name__} is not given the arguments of its layer")
    for option, name in (("softcap", "soft-capping"), ("s_aux", "attention sinks")):
        if kwargs.get(option) is not None:  # packed attention has them, decoding does not
            raise UserError(f"{type(module).__name__} needs {name}, which decoding does not have")
    scale, window = kwargs.get("scaling") or query_BNTD.shape[-1] ** -0.5, kwargs.get("sliding_window") or 0
    if isinstance(slot_batch, PrefillBatch):
        if torch.compiler.is_compiling() and isinstance(slot_cache, LayerCache):
            places = (slot_batch.cu_seqlens, slot_batch.max_seqlen, slot_batch.source_R, slot_batch.slot_R, slot_batch.position_R)
            output_TND = _prefill(query_BNTD[0], key_BKTD[0], value_BKTD[0], slot_cache.key, slot_cache.value, *places, scale, window)
            return output_TND.unsqueeze(0), None
        _store(slot_cache, slot_batch, key_BKTD[0], value_BKTD[0])
        bounds = {"cu_seq_lens_q": slot_batch.cu_seqlens, "max_length_q": slot_batch.max_seqlen, "context": ""}
        return packed_attention(module, query_BNTD, key_BKTD, value_BKTD, None, **{**kwargs, **bounds})
    assert isinstance(slot_cache, LayerCache)
    query_BND, key_BKD, value_BKD = query_BNTD[:, :, 0], key_BKTD[:, :, 0], value_BKTD[:, :, 0]
    if has_kernel(query_BND.device):
        output_BND = _attend(query_BND, key_BKD, value_BKD, slot_cache.key, slot_cache.value, slot_batch.position_B, scale, window)
    else:
        output_BND = _attend_without_kernel(query_BND, key_BKD, value_BKD, slot_cache, slot_batch, scale, window)
    return output_BND.unsqueeze(1), None


def has_kernel(device: torch.device) -> bool:
    """Return whether decoding runs verl's Triton kernels, which read only the used positions of a slot."""
    return HAS_TRITON and device.type == "cuda"


def _store(cache: LayerCache | ShapeProbe, batch: PrefillBatch, key_KTD: Tensor, value_KTD: Tensor) -> None:
    if isinstance(cache, ShapeProbe):
        cache.shapes.append(KVShape(key_KTD.shape[0], key_KTD.shape[2], value_KTD.shape[2]))
        return
    for cache_SKLD, x_KTD in ((cache.key, key_KTD), (cache.value, value_KTD)):
        cache_SKLD[batch.slot_R, :, batch.position_R] = x_KTD.transpose(0, 1)[batch.source_R].to(cache_SKLD.dtype)


def _attend_without_kernel(
    query_BND: Tensor, key_BKD: Tensor, value_BKD: Tensor, cache: LayerCache, batch: DecodeBatch, scale: float, window: int
) -> Tensor:
    """Same as `_attend`, with PyTorch's scaled dot-product attention. The query heads of a key head are its query rows (G)."""
    rows, heads, size = query_BND.shape
    row_B = torch.arange(rows, device=query_BND.device)
    cache.key[row_B, :, batch.position_B] = key_BKD.to(cache.key.dtype)
    cache.value[row_B, :, batch.position_B] = value_BKD.to(cache.value.dtype)
    used = cache.key.shape[2] if batch.used_positions is None else batch.used_positions
    distance_BL = batch.position_B[:, None] - torch.arange(used, device=query_BND.device)
    seen_BL = distance_BL >= 0 if window <= 0 else (distance_BL >= 0) & (distance_BL < window)
    output_BKGD = F.scaled_dot_product_attention(
        query_BND.view(rows, key_BKD.shape[1], -1, size),
        cache.key[:rows, :, :used],
        cache.value[:rows, :, :used],
        attn_mask=seen_BL[:, None, None],
        scale=scale,
    )
    return output_BKGD.reshape(rows, heads, -1)


# A custom operator, so that the kernel is one node in a compiled layer. It also writes the newest keys and values into the cache, but does
# not declare this mutation: nothing else in a compiled layer reads the cache, and for a declared mutation, the compiler might copy whole
# caches to keep the order.
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
    from verl.rollout.native import attention_triton

    return attention_triton.attend(query_BND, key_BKD, value_BKD, key_SKLD, value_SKLD, position_B, scale, window)


@_attend.register_fake
def _(query_BND: Tensor, key_BKD: Tensor, value_BKD: Tensor, *others: Any) -> Tensor:
    return query_BND.new_empty(*query_BND.shape[:2], value_BKD.shape[2])


# A node in a compiled layer for the same reasons. Options that it does not pass on were refused before, in the trial without compilation.
@torch.library.custom_op("verl::prefill_attention", mutates_args=())
def _prefill(
    query_NTD: Tensor,
    key_KTD: Tensor,
    value_KTD: Tensor,
    key_SKLD: Tensor,
    value_SKLD: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    source_R: Tensor,
    slot_R: Tensor,
    position_R: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    nothing = cu_seqlens[:0]
    batch = PrefillBatch(cu_seqlens, max_seqlen, source_R, slot_R, position_R, nothing, nothing)
    _store(LayerCache(key_SKLD, value_SKLD), batch, key_KTD, value_KTD)
    options: dict[str, Any] = {"cu_seq_lens_q": cu_seqlens, "max_length_q": max_seqlen, "scaling": scale, "sliding_window": window or None}
    output_1TND, _ = packed_attention(nn.Identity(), query_NTD[None], key_KTD[None], value_KTD[None], None, **options, context="")
    return output_1TND[0].contiguous()


@_prefill.register_fake
def _(query_NTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, *others: Any) -> Tensor:
    return query_NTD.new_empty(query_NTD.shape[1], query_NTD.shape[0], value_KTD.shape[2])


# transformers makes no attention mask, because no mask function is registered under this name.
AttentionInterface.register(SLOTS, slot_attention)
