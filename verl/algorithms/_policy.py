"""The loss of a policy on its own answers: clipped ratios (PPO, arXiv:1707.06347), KL divergence, entropy, and their sum.

Dimensions: M trained positions; S documents, one for each answer, and filler.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from verl.algorithms._documents import document_of_token, sum_by_document, trained_tokens
from verl.algorithms._kl import estimate
from verl.algorithms._settings import PolicySettings
from verl.data.batch import VALUES, Batch
from verl.engine.contract import LossOut, Slope, TokenOut

# What is compared of new and old policy: each token's probability, the answer's, or the geometric mean of its tokens'.
Ratio: TypeAlias = Literal["token", "answer", "mean of answer"]


class PolicyLoss:
    """Minus the advantage-weighted ratio of new to old probability, which counts within bounds alone.

    Without `old_logprob_M` the old policy is that of the batch itself, which then must be trained on once only.

    Attributes:
        ratio: what is compared of new and old policy.
        kl_coef: weight of the KL divergence where it is a part of the loss; a trainer that adapts it sets it.
        by_advantage_alone: whether a token whose advantage is 0 adds nothing to the loss, nor to its gradient. Of a loss of one's own
            that is not known, and it may say so.
        entropy_gradient: whether the loss has a term for the entropy, which then comes with a gradient.
    """

    ratio: ClassVar[Ratio] = "token"

    def __init__(self, settings: PolicySettings, max_new_tokens: int):
        """
        Args:
            max_new_tokens: of an answer; what `loss_aggregation=constant` divides by.
        """
        self.settings = settings
        self.kl_coef = settings.kl_coef if settings.kl_in == "loss" else 0.0
        self.entropy_gradient = settings.entropy_coef > 0
        self.by_advantage_alone = self.kl_coef == 0 and not self.entropy_gradient and type(self).loss is PolicyLoss.loss
        self._max_new_tokens = max_new_tokens

    def loss(self, out: TokenOut, batch: Batch) -> LossOut:
        """The loss of one micro-batch, whose advantages must be there.

        Metrics are means over trained tokens: `clip_fraction`; with a reference `kl_k1` and `kl_k3`; with entropies `entropy`; with the
        rollout's log-probabilities `rollout_difference`, their mean distance from the trainer's, and with importance weights
        `importance_weight`. And the largest `largest_ratio` and `largest_rollout_difference`.
        """
        tokens = self._tokens(out.logprob_M, batch)
        loss_M = tokens.loss_M
        metrics = {"clip_fraction": tokens.is_clipped_M.float().sum()}
        maxima = {"largest_ratio": _largest(tokens.ratio_M)}
        if batch.rollout_logprob_M is not None:
            # Where the old ones are the rollout's own, they say nothing of it.
            trainer_M = out.logprob_M.detach() if self.settings.old_logprobs == "rollout" else tokens.old_M
            difference_M = (trainer_M - batch.rollout_logprob_M).abs()
            metrics["rollout_difference"] = difference_M.sum()
            maxima["largest_rollout_difference"] = _largest(difference_M)
        if tokens.weight_M is not None:
            metrics["importance_weight"] = tokens.weight_M.sum()
        if batch.ref_logprob_M is not None:
            for estimator in ("k1", "k3"):
                metrics[f"kl_{estimator}"] = estimate(out.logprob_M.detach(), batch.ref_logprob_M, estimator).sum()
        if out.entropy_M is not None:
            if self.settings.entropy_coef > 0:
                loss_M = loss_M - self.settings.entropy_coef * out.entropy_M
            metrics["entropy"] = out.entropy_M.detach().sum()
        return LossOut((loss_M * self._share(batch)).sum(), metrics, metric_maxima=maxima)

    def slope(self, batch: Batch) -> Slope | None:
        """Known where the batch is its own old policy and nothing else counts: the ratios are 1. Else, of ratios of tokens, a function.

        An entropy bonus has a slope by the logits, not by the log-probabilities alone; and a loss of one's own has its own.
        """
        if self.settings.entropy_coef > 0 or type(self).loss is not PolicyLoss.loss:
            return None
        corrected = self.settings.importance_weights is not None and batch.rollout_logprob_M is not None
        if batch.old_logprob_M is not None or self.kl_coef > 0 or corrected:
            return self._slope_of_tokens(batch) if self.ratio == "token" else None
        assert batch.advantage_M is not None
        with torch.enable_grad():
            log_ratio_M = torch.zeros_like(batch.advantage_M, requires_grad=True)
            loss_M, _ = self._clipped(self._ratios(log_ratio_M, batch), batch.advantage_M)
            (slope_M,) = torch.autograd.grad((loss_M * self._share(batch)).sum(), log_ratio_M)
        return slope_M

    def _slope_of_tokens(self, batch: Batch) -> Slope:
        share = self._share(batch)

        @torch.enable_grad()
        def slope(logprob_C: Tensor, rows: slice) -> Tensor:
            logprob_C = logprob_C.detach().requires_grad_()
            loss_C = self._tokens(logprob_C, _with_values_of(batch, rows)).loss_M
            (slope_C,) = torch.autograd.grad((loss_C * (share[rows] if isinstance(share, Tensor) else share)).sum(), logprob_C)
            return slope_C

        return slope

    def count(self, batch: Batch) -> float:
        """Trained tokens, or answers."""
        return len(batch.trained_M) if self.settings.loss_aggregation == "token-mean" else batch.documents / batch.parts

    def _tokens(self, logprob_M: Tensor, batch: Batch) -> "_Tokens":
        """What each token adds to the loss, but for an entropy bonus. For ratios of tokens only the batch's values matter."""
        assert batch.advantage_M is not None
        old_M = logprob_M.detach() if batch.old_logprob_M is None else batch.old_logprob_M
        ratio_M, weight_M = self._ratios(logprob_M - old_M, batch), None
        loss_M, is_clipped_M = self._clipped(ratio_M, batch.advantage_M)
        if self.settings.importance_weights is not None and batch.rollout_logprob_M is not None:
            weight_M = self._importance(old_M - batch.rollout_logprob_M)
            loss_M = loss_M * weight_M
        if self.kl_coef > 0 and batch.ref_logprob_M is not None:
            loss_M = loss_M + self.kl_coef * estimate(logprob_M, batch.ref_logprob_M, self.settings.estimator)
        return _Tokens(loss_M, old_M, ratio_M, is_clipped_M, weight_M)

    def _share(self, batch: Batch) -> Tensor | float:
        """How much a token's loss counts; with `count` this is all that distinguishes the kinds of aggregation."""
        if self.settings.loss_aggregation == "token-mean":
            return 1.0
        if self.settings.loss_aggregation == "constant":
            return 1.0 / self._max_new_tokens
        return 1.0 / trained_tokens(batch)[document_of_token(batch)]

    def _ratios(self, log_ratio_M: Tensor, batch: Batch) -> Tensor:
        if self.ratio == "token":
            return log_ratio_M.exp()
        log_ratio_S = sum_by_document(log_ratio_M, batch)
        if self.ratio == "mean of answer":
            log_ratio_S = log_ratio_S / trained_tokens(batch).clamp(min=1)
        return log_ratio_S.exp()[document_of_token(batch)]

    def _clipped(self, ratio_M: Tensor, advantage_M: Tensor) -> tuple[Tensor, Tensor]:
        low, high, dual = self.settings.clip_ratio_low, self.settings.clip_ratio_high, self.settings.dual_clip
        plain_M, bounded_M = -advantage_M * ratio_M, -advantage_M * ratio_M.clamp(1 - low, 1 + high)
        loss_M, is_clipped_M = torch.maximum(plain_M, bounded_M), bounded_M > plain_M
        if dual is not None:  # arXiv:1912.09729: a large ratio makes a bad token no worse than so many times
            is_bad_M = advantage_M < 0
            is_clipped_M = is_clipped_M | (is_bad_M & (ratio_M > dual))
            loss_M = torch.where(is_bad_M, torch.minimum(loss_M, -dual * advantage_M), loss_M)
        return loss_M, is_clipped_M

    def _importance(self, log_weight_M: Tensor) -> Tensor:
        """Weights of tokens that other arithmetic or other weights drew: cut off at the cap, or 0 outside of 1 / cap to cap."""
        weight_M, cap = log_weight_M.exp(), self.settings.importance_cap
        if self.settings.importance_weights == "truncate":
            return weight_M.clamp(max=cap)
        return torch.where((weight_M <= cap) & (weight_M >= 1 / cap), weight_M, 0.0)


@dataclass(frozen=True)
class _Tokens:
    """Of trained tokens: their loss with its gradient, old log-probability, ratio, whether that is clipped, and importance weight."""

    loss_M: Tensor
    old_M: Tensor
    ratio_M: Tensor
    is_clipped_M: Tensor
    weight_M: Tensor | None


def _with_values_of(batch: Batch, rows: slice) -> Batch:
    """The batch with the values of some of its trained positions alone."""
    values: dict[str, Any] = {name: value[rows] for name in VALUES if (value := getattr(batch, name)) is not None}
    return replace(batch, **values)


def _largest(values_M: Tensor) -> Tensor:
    """0 of none, as a rank without answers has them."""
    return torch.cat([values_M.detach(), values_M.new_zeros(1)]).amax()
