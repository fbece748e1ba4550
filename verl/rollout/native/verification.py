"""Verify steps of speculation: the newest token of each row and its drafts go through the model together.

Sampling position j of a row uses the random number of token `generated + j`, and a draft is right if it is the token that is sampled there.
So the answers are those without drafts (exact, unlike rejection sampling, which keeps the distribution alone). Keys and values of drafts
are stored in the slot at their positions. Those of wrong drafts are overwritten later, and are not read before: a token attends to
positions up to its own, and all of these hold tokens that were kept.

Dimensions: S slots, L positions of a slot, B rows of a step (the first B slots), K drafts of a row, Q = K + 1 tokens of a row, T tokens of
a step, N query heads, J key-value heads, D head size, G maximum response length, Z stop tokens.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from verl.rollout.native.attention import LayerCache, has_kernel
from verl.rollout.native.slots import State

VERIFY = "verl_verify"


class VerifyBatch(NamedTuple):
    """Tokens of a verify step, as a batch of T sequences of one token, so that layers run as in a decode step.

    Attributes:
        row_T: row of each token.
        ahead_T: its distance from the newest token of its row.
        position_T: its position.
        place_2B: position of the newest token of each row, and its number of drafts, int64.
        width: Q; on a GPU there are `rows · width` tokens, and those behind the drafts of a row are not used.
        used_positions: all used positions are below this; None if the host does not know them.
    """

    row_T: Tensor
    ahead_T: Tensor
    position_T: Tensor
    place_2B: Tensor
    width: int
    used_positions: int | None

    @classmethod
    def whole(cls, state: State, rows: int, count_B: Tensor, width: int) -> "VerifyBatch":
        """Return a batch of `width` tokens for each row, without waiting for the device."""
        device, position_B = count_B.device, state.position_S[:rows]
        token_T = torch.arange(rows * width, device=device)
        row_T, ahead_T = token_T // width, token_T % width
        # Unused tokens have the position of the last draft: it is one that the model has.
        position_T = position_B[row_T] + torch.minimum(ahead_T, count_B[row_T])
        return cls(row_T, ahead_T, position_T, torch.stack([position_B, count_B]), width, None)

    @classmethod
    def packed(cls, state: State, rows: int, count_B: Tensor) -> "VerifyBatch":
        """Return a batch of the newest tokens and the drafts alone. This waits for the device."""
        position_B, width = state.position_S[:rows], int(count_B.max()) + 1
        row_T, ahead_T = (torch.arange(width, device=count_B.device) <= count_B[:, None]).nonzero(as_tuple=True)
        used = int((position_B + count_B).max()) + 1
        return cls(row_T, ahead_T, position_B[row_T] + ahead_T, torch.stack([position_B, count_B]), width, used)

    def tokens(self, state: State, draft_BK: Tensor) -> Tensor:
        """Return token_T, the inputs of the step."""
        token_BQ = torch.cat([state.token_S[: len(draft_BK), None], draft_BK], 1)
        return token_BQ[self.row_T, self.ahead_T]

    def uniforms(self, state: State) -> Tensor:
        """Return uniform_T, the random number of the token that is sampled at each position."""
        number_T = state.generated_S[self.row_T] + self.ahead_T
        return state.uniform_SG[self.row_T, number_T.clamp(max=state.uniform_SG.shape[1] - 1)]

    def spread(self, values_T: Tensor) -> Tensor:
        """Return values_BQ, 0 where a row has fewer tokens."""
        values_BQ = values_T.new_zeros(self.place_2B.shape[1], self.width, *values_T.shape[1:])
        values_BQ[self.row_T, self.ahead_T] = values_T
        return values_BQ


def accept(state: State, token_BQ: Tensor, logprob_BQ: Tensor | None, draft_BK: Tensor, count_B: Tensor) -> Tensor:
    """Append to each response its sampled tokens up to the first that differs from its draft, or that ends the response.

    Neither waits for the device nor depends on values in its shapes, so that it can be part of a CUDA graph.

    Args:
        token_BQ: token that was sampled behind the newest token and behind each draft.
        logprob_BQ: log-probability of each; None: they are not kept.
        draft_BK: drafts; more than Q - 1 of them are left out.
        count_B: drafts of each row that were tried.
    Returns:
        kept_B, number of tokens that were appended.
    """
    rows, width = token_BQ.shape
    ahead_Q = torch.arange(width, device=token_BQ.device)
    running_B, generated_B = state.active_S[:rows] > 0, state.generated_S[:rows]
    right_BK = (token_BQ[:, :-1] == draft_BK[:, : width - 1]) & (ahead_Q[:-1] < count_B[:, None])
    is_stop_BQ = (token_BQ[..., None] == state.stop_Z).any(-1)
    # A token is kept if all drafts before it were right, and none of the tokens before it ended the response.
    goes_on_BK = (right_BK & ~is_stop_BQ[:, :-1]).int().cumprod(1)
    kept_BQ = torch.cat([running_B[:, None], (goes_on_BK > 0) & running_B[:, None]], 1)
    kept_B = kept_BQ.sum(1)
    # Indices wrap around behind the end of a response, where nothing is kept, so that no two of a row are equal.
    index_BQ = (generated_B[:, None].long() + ahead_Q) % state.answer_SG.shape[1]
    for all_SG, new_BQ in ((state.answer_SG, token_BQ), (state.logprob_SG, logprob_BQ)):
        if new_BQ is not None:
            all_BG = all_SG[:rows]
            all_BG.scatter_(1, index_BQ, torch.where(kept_BQ, new_BQ.to(all_SG.dtype), all_BG.gather(1, index_BQ)))
    last_B1 = (kept_B - 1).clamp(min=0)[:, None]
    ended_B = is_stop_BQ.gather(1, last_B1).squeeze(1) | (generated_B + kept_B >= state.limit_S[:rows])
    going_B = running_B & ~ended_B
    generated_B += kept_B.int()
    state.active_S[:rows] = going_B.int()
    state.token_S[:rows] = torch.where(going_B, token_BQ.gather(1, last_B1).squeeze(1).long(), state.token_S[:rows])
    state.position_S[:rows] += kept_B * going_B
    return kept_B


def verify_attention(
    module: nn.Module,
    query_TN1D: Tensor,
    key_TJ1D: Tensor,
    value_TJ1D: Tensor,
    attention_mask: Tensor | None,
    *,
    slot_cache: LayerCache | None = None,
    slot_batch: VerifyBatch | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention of a verify step, with the signature of transformers' attention functions; see `attention.slot_attention`.

    Returns:
        output_T1ND and None (no attention weights).
    """
    assert slot_cache is not None and slot_batch is not None
    query_TND, key_TJD, value_TJD = query_TN1D[:, :, 0], key_TJ1D[:, :, 0], value_TJ1D[:, :, 0]
    scale, window = kwargs.get("scaling") or query_TND.shape[-1] ** -0.5, kwargs.get("sliding_window") or 0
    if has_kernel(query_TND.device):
        output_TND = _attend(query_TND, key_TJD, value_TJD, slot_cache.key, slot_cache.value, slot_batch.place_2B, scale, window)
    else:
        output_TND = attend_without_kernel(query_TND, key_TJD, value_TJD, slot_cache, slot_batch, scale, window)
    return output_TND.unsqueeze(1), None


def attend_without_kernel(
    query_TND: Tensor, key_TJD: Tensor, value_TJD: Tensor, cache: LayerCache, batch: VerifyBatch, scale: float, window: int
) -> Tensor:
    """Same as `verification_triton.attend`, in plain PyTorch. The tokens and query heads of a key head are its query rows."""
    (position_B, count_B), width, key_heads = batch.place_2B, batch.width, key_TJD.shape[1]
    rows, tried_T = len(position_B), batch.ahead_T <= count_B[batch.row_T]
    row_R, position_R = batch.row_T[tried_T], batch.position_T[tried_T]
    cache.key[row_R, :, position_R] = key_TJD[tried_T].to(cache.key.dtype)
    cache.value[row_R, :, position_R] = value_TJD[tried_T].to(cache.value.dtype)
    used = cache.key.shape[2] if batch.used_positions is None else batch.used_positions
    position_BQ = position_B[:, None] + torch.minimum(torch.arange(width, device=query_TND.device), count_B[:, None])
    distance_BQL = position_BQ[..., None] - torch.arange(used, device=query_TND.device)
    seen_BQL = distance_BQL >= 0 if window <= 0 else (distance_BQL >= 0) & (distance_BQL < window)
    group = query_TND.shape[1] // key_heads
    query_BJQGD = batch.spread(query_TND).unflatten(2, (key_heads, group)).transpose(1, 2)
    output_BJRD = F.scaled_dot_product_attention(
        query_BJQGD.flatten(2, 3),
        cache.key[:rows, :, :used],
        cache.value[:rows, :, :used],
        attn_mask=seen_BQL.repeat_interleave(group, 1)[:, None],
        scale=scale,
    )
    output_BQND: Tensor = output_BJRD.unflatten(2, (width, group)).transpose(1, 2).flatten(2, 3)
    return output_BQND[batch.row_T, batch.ahead_T]


# A custom operator, and without a declared mutation, for the same reasons as `attention._attend`.
@torch.library.custom_op("verl::verify_attention", mutates_args=())
def _attend(
    query_TND: Tensor,
    key_TJD: Tensor,
    value_TJD: Tensor,
    key_SJLD: Tensor,
    value_SJLD: Tensor,
    place_2B: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    from verl.rollout.native import verification_triton

    return verification_triton.attend(query_TND, key_TJD, value_TJD, key_SJLD, value_SJLD, place_2B, scale, window)


@_attend.register_fake
def _(query_TND: Tensor, key_TJD: Tensor, value_TJD: Tensor, *others: Any) -> Tensor:
    return query_TND.new_empty(*query_TND.shape[:2], value_TJD.shape[2])


# transformers makes no attention mask, because no mask function is registered under this name.
AttentionInterface.register(VERIFY, verify_attention)
