"""Policy loss on sampled answers: clipped ratios (PPO, arXiv:1707.06347), KL penalty, entropy bonus, and loss aggregation.

Dimensions: M trained positions; C positions of a chunk; S documents, one per answer, and filler.
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

# Ratio of new to old probability: of each token, of the whole answer, or the geometric mean over the answer's tokens.
Ratio: TypeAlias = Literal["token", "answer", "mean of answer"]


class PolicyLoss:
    """The clipped surrogate loss: minus advantage × ratio of new to old probability, with the ratio clipped.

    If a batch has no `old_logprob_M`, the current policy is the old policy; such a batch may be trained on only once.

    Attributes:
        ratio: kind of the ratio, see `Ratio`.
        kl_coef: weight of the KL penalty in the loss; 0 if the penalty is in the reward. With `kl_target`, the trainer adapts it.
        skips_zero_advantage: whether a token with advantage 0 adds nothing to the loss and its gradient. It is False if a subclass
            overrides `loss`; the subclass may set it.
        entropy_gradient: whether the loss has an entropy term, and needs the gradient of the entropy.
    """

    ratio: ClassVar[Ratio] = "token"

    def __init__(self, settings: PolicySettings, max_new_tokens: int):
        """
        Args:
            max_new_tokens: limit of an answer's length; `loss_aggregation=constant` divides by it.
        """
        self.settings = settings
        self.kl_coef = settings.kl_coef if settings.kl_in == "loss" else 0.0
        self.entropy_gradient = settings.entropy_coef > 0
        self.skips_zero_advantage = self.kl_coef == 0 and not self.entropy_gradient and type(self).loss is PolicyLoss.loss
        self._max_new_tokens = max_new_tokens

    def loss(self, out: TokenOut, batch: Batch) -> LossOut:
        """Compute the loss of one micro-batch, which must have advantages.

        Means over trained tokens: `clip_fraction`; `kl_k1` and `kl_k3`, if there is a reference; `entropy`, if it was computed;
        `rollout_difference`, the absolute difference between the rollout's and the trainer's log-probabilities, if the batch has the
        rollout's; `importance_weight`, if it is used. Maxima: `largest_ratio` and `largest_rollout_difference`.
        """
        tokens = self._tokens(out.logprob_M, batch)
        loss_M = tokens.loss_M
        metrics = {"clip_fraction": tokens.is_clipped_M.float().sum()}
        maxima = {"largest_ratio": _largest(tokens.ratio_M)}
        if batch.rollout_logprob_M is not None:
            # With old_logprobs=rollout, old_M is the rollout's own: the difference would be 0.
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
        """Return the slope as a tensor if the ratios are 1, as a function for ratios of tokens, else None.

        The ratios are 1 if the current policy is the old policy; the tensor also needs a loss without KL penalty and importance weights.
        None too with an entropy bonus, whose gradient depends on all logits, and for a subclass that overrides `loss`.
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
        """Return the number of trained tokens, or of answers, by `loss_aggregation`."""
        return len(batch.trained_M) if self.settings.loss_aggregation == "token-mean" else batch.documents / batch.parts

    def _tokens(self, logprob_M: Tensor, batch: Batch) -> "_Tokens":
        """Return each token's loss, without the entropy bonus. For ratios of tokens, only the per-token values of the batch are read."""
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
        """Return each token's weight in the loss. This and `count` implement `loss_aggregation`."""
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
        if dual is not None:  # dual clip (arXiv:1912.09729): bounds the ratio of tokens with a negative advantage
            is_bad_M = advantage_M < 0
            is_clipped_M = is_clipped_M | (is_bad_M & (ratio_M > dual))
            loss_M = torch.where(is_bad_M, torch.minimum(loss_M, -dual * advantage_M), loss_M)
        return loss_M, is_clipped_M

    def _importance(self, log_weight_M: Tensor) -> Tensor:
        """Return importance weights of trainer to rollout: truncated at the cap, or 0 outside [1 / cap, cap]."""
        weight_M, cap = log_weight_M.exp(), self.settings.importance_cap
        if self.settings.importance_weights == "truncate":
            return weight_M.clamp(max=cap)
        return torch.where((weight_M <= cap) & (weight_M >= 1 / cap), weight_M, 0.0)


@dataclass(frozen=True)
class _Tokens:
    """Values per trained token: differentiable loss, old log-probability, ratio, whether the ratio is clipped, importance weight."""

    loss_M: Tensor
    old_M: Tensor
    ratio_M: Tensor
    is_clipped_M: Tensor
    weight_M: Tensor | None


def _with_values_of(batch: Batch, rows: slice) -> Batch:
    """Return the batch with only some rows of its per-token values."""
    values: dict[str, Any] = {name: value[rows] for name in VALUES if (value := getattr(batch, name)) is not None}
    return replace(batch, **values)


def _largest(values_M: Tensor) -> Tensor:
    """Return the maximum; 0 if there are no values, as on a rank without answers."""
    return torch.cat([values_M.detach(), values_M.new_zeros(1)]).amax()
