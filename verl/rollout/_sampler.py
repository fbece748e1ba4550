"""Sample tokens from logits. Each response has its own random numbers.

The random numbers come from a counter-based generator (Philox, Salmon et al. 2011), whose counter depends on the prompt's seed and on the
index of the response. So the tokens of a response do not depend on the other responses of a batch. A number u in [0, 1) selects the first
token, in the order of the vocabulary, at which the cumulative probability exceeds u (inverse transform sampling).

Dimensions: B sequences, V vocabulary, C tokens of a vocabulary block, K blocks, G generated tokens, R subset of the sequences.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from verl.rollout import Sampling

BLOCK = 4096  # tokens of the vocabulary that are processed together, so that their logits stay in the CPU's cache
WORD = 2**64 - 1


def uniform_numbers(sampling: Sampling, prompt_seed: int, answer: int) -> np.ndarray:
    """Return uniform_G, float32: a number in [0, 1) for each token of response number `answer` to a prompt."""
    counter = np.array([0, 0, answer & WORD, prompt_seed & WORD], dtype=np.uint64)
    philox = np.random.Philox(key=np.array([sampling.seed & WORD, 0], dtype=np.uint64), counter=counter)
    return np.random.Generator(philox).random(sampling.max_new_tokens, dtype=np.float32)


def sample(logits: Iterable[Tensor], sampling: Sampling, uniform_B: Tensor) -> tuple[Tensor, Tensor | None]:
    """Sample one token for each sequence.

    Args:
        logits: blocks of logits_BC in float32, of BLOCK tokens each except the last; they are overwritten. At temperature 0, a block is no
            longer used when the next one is requested.
        sampling: sampling parameters; temperature 0 takes the first of the most likely tokens.
        uniform_B: a number in [0, 1) for each sequence; not used at temperature 0.
    Returns:
        token_B; and logprob_B at the sampling temperature (greedy: 1), before top_k and top_p, or None at temperature 0 without
        `sampling.logprobs`.
    """
    if sampling.temperature == 0:
        return _argmax(logits, with_logprobs=sampling.logprobs)
    blocks = [logits_BC.div_(sampling.temperature) for logits_BC in logits]
    highest_BK, sum_BK = _block_sums(blocks)
    normalizer_B = (highest_BK + sum_BK.log()).logsumexp(1).float()
    if sampling.is_filtered:
        kept = filter_logits(torch.cat(blocks, 1), sampling).split(BLOCK, 1)
        token_B = _select(kept, *_block_sums(kept), uniform_B)
    else:
        token_B = _select(blocks, highest_BK, sum_BK, uniform_B)
    chosen_BK = torch.cat([block.gather(1, (token_B[:, None] - start).clamp(0, block.shape[1] - 1)) for start, block in _starts(blocks)], 1)
    return token_B, chosen_BK.gather(1, token_B[:, None] // BLOCK).squeeze(1) - normalizer_B


def _argmax(logits: Iterable[Tensor], *, with_logprobs: bool) -> tuple[Tensor, Tensor | None]:
    highest, arg_highest, sums = [], [], []
    for logits_BC in logits:
        highest_B, arg_highest_B = logits_BC.max(-1)
        highest.append(highest_B)
        arg_highest.append(arg_highest_B)
        if with_logprobs:
            sums.append(logits_BC.sub_(highest_B[:, None]).exp_().sum(-1))
    highest_BK = torch.stack(highest, 1)
    value_B, block_B = highest_BK.max(1)
    token_B = torch.stack(arg_highest, 1).gather(1, block_B[:, None]).squeeze(1) + block_B * BLOCK
    if not with_logprobs:
        return token_B, None
    return token_B, value_B - (highest_BK + torch.stack(sums, 1).log()).logsumexp(1)


def _block_sums(blocks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return highest_BK, the highest logit of each block, and sum_BK, the block's sum of exp(logit - highest).

    The sum is 0 if all tokens of a block are excluded. Sums are in float64, so that the selected token depends as little as possible on the
    order of summation.
    """
    highest, sums = [], []
    for logits_BC in blocks:
        highest_B = logits_BC.amax(-1).clamp(min=torch.finfo(torch.float32).min)
        highest.append(highest_B)
        sums.append((logits_BC - highest_B[:, None]).exp_().sum(-1, dtype=torch.float64))
    return torch.stack(highest, 1), torch.stack(sums, 1)


def _select(blocks: Iterable[Tensor], highest_BK: Tensor, sum_BK: Tensor, uniform_B: Tensor) -> Tensor:
    """Find the token of each random number in the cumulative distribution: first its block, then the token in that block."""
    weight_BK = (highest_BK - highest_BK.amax(1, keepdim=True)).double().exp() * sum_BK
    cumulative_BK = weight_BK.cumsum(1)
    target_B1 = uniform_B[:, None].double() * cumulative_BK[:, -1:]
    block_B1 = torch.searchsorted(cumulative_BK, target_B1, right=True).clamp(max=weight_BK.shape[1] - 1)
    weight_B1 = weight_BK.gather(1, block_B1)
    share_B1 = (target_B1 - (cumulative_BK.gather(1, block_B1) - weight_B1)) / weight_B1
    token_B = torch.empty_like(uniform_B, dtype=torch.int64)
    for number, (start, logits_BC) in enumerate(_starts(blocks)):
        rows_R = (block_B1[:, 0] == number).nonzero().squeeze(1)
        if len(rows_R):
            weights_RC = (logits_BC[rows_R] - highest_BK[rows_R, number, None]).exp().double().cumsum(1)
            inside_R1 = torch.searchsorted(weights_RC, share_B1[rows_R] * weights_RC[:, -1:], right=True)
            last_R1 = torch.searchsorted(weights_RC, weights_RC[:, -1:].contiguous())  # the last token with nonzero probability
            token_B[rows_R] = (torch.minimum(inside_R1, last_R1) + start).squeeze(1)
    return token_B


def _starts(blocks: Iterable[Tensor]) -> Iterable[tuple[int, Tensor]]:
    return ((number * BLOCK, block) for number, block in enumerate(blocks))


def filter_logits(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Return the logits, with minus infinity for the tokens that top_k and top_p exclude.

    Args:
        logits_BV: logits divided by the temperature.
    """
    least_B1 = logits_BV.gather(1, lowest_kept_token(logits_BV, sampling)[:, None])
    return logits_BV.masked_fill(logits_BV < least_B1, float("-inf"))


def lowest_kept_token(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Return token_B, the least likely token that top_k and then top_p keep. The most likely token is always kept.

    Args:
        logits_BV: logits divided by the temperature.
    """
    sorted_BV, token_BV = logits_BV.sort(-1, descending=True)
    if 0 < sampling.top_k < sorted_BV.shape[1]:
        sorted_BV, token_BV = sorted_BV[:, : sampling.top_k], token_BV[:, : sampling.top_k]
    if sampling.top_p >= 1.0:
        return token_BV[:, -1]
    probability_BV = sorted_BV.softmax(-1)
    before_BV = probability_BV.cumsum(-1) - probability_BV  # a token is kept if the more likely tokens have a total probability below top_p
    kept_B1 = (before_BV < sampling.top_p).sum(-1, keepdim=True).clamp(min=1)
    return token_BV.gather(1, kept_B1 - 1).squeeze(1)
