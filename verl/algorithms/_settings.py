"""Keys that methods share: those of a clipped policy with a reference, and those of answers that are compared in groups.

A method's own `Settings` derives from one of these, and gives the keys whose defaults are its own once more.
"""

from dataclasses import dataclass

from verl.config.algorithm import AlgorithmConfig
from verl.config.values import at_least, one_of
from verl.errors import UserError


@dataclass
class PolicySettings(AlgorithmConfig):
    """What `verl.algorithms._policy` and the deductions of `verl.algorithms._advantage` read."""

    # The ratio of new to old probability is clipped to [1 - clip_ratio_low, 1 + clip_ratio_high].
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    # A bound on the loss where the advantage is negative and the ratio large, such as 3.0; null: none.
    dual_clip: float | None = None
    # Shift and scale all advantages of a step to mean 0 and variance 1.
    whiten_advantages: bool = False
    # "token-mean" over all tokens of an update, "sequence-mean" over the answers' means, or "constant": sum / (answers × max_new_tokens).
    loss_aggregation: str = "token-mean"
    # Weight of the KL divergence from the reference.
    kl_coef: float = 0.0
    # Where it counts: in the "loss", or taken from the "reward" of each token.
    kl_in: str = "loss"
    # Its estimator: "k1", "k2" or "k3"; null: k3 in the loss, k1 in the reward.
    kl_estimator: str | None = None
    # Adapt kl_coef so that the divergence of an answer's token stays near this; null: kl_coef is fixed.
    kl_target: float | None = None
    # Answers over which it adapts: the larger the slower.
    kl_horizon: int = 10000
    # Weight of the entropy of the next token's distribution, which is raised.
    entropy_coef: float = 0.0
    # Correct for a rollout whose probabilities are not the trainer's: "truncate" weights at importance_cap, "mask" tokens above it.
    importance_weights: str | None = None
    importance_cap: float = 2.0
    # Answers that come within so many tokens of max_new_tokens lose up to overlong_penalty of their reward; 0: none.
    overlong_buffer_tokens: int = 0
    overlong_penalty: float = 1.0

    @property
    def estimator(self) -> str:
        """Of the divergence: in the loss, the gradient of k1 is zero on average."""
        return self.kl_estimator or ("k1" if self.kl_in == "reward" else "k3")

    def check(self) -> None:
        """Raises UserError naming the key."""
        one_of("loss_aggregation", self.loss_aggregation, ("token-mean", "sequence-mean", "constant"))
        one_of("kl_in", self.kl_in, ("loss", "reward"))
        one_of("kl_estimator", self.kl_estimator, (None, "k1", "k2", "k3"))
        one_of("importance_weights", self.importance_weights, (None, "truncate", "mask"))
        for key in ("clip_ratio_low", "clip_ratio_high", "kl_coef", "kl_target", "overlong_penalty", "entropy_coef"):
            at_least(key, getattr(self, key), 0.0)
        for key in ("dual_clip", "importance_cap", "kl_horizon"):
            at_least(key, getattr(self, key), 1.0)
        at_least("overlong_buffer_tokens", self.overlong_buffer_tokens, 0)
        self._check_divergence()
        if self.old_logprobs == "rollout" and self.importance_weights is not None:
            raise UserError(
                "the old log-probabilities are the rollout's own, so that nothing is left to correct",
                where=f"importance_weights={self.importance_weights} with algorithm.old_logprobs=rollout",
                fix="set algorithm.old_logprobs=trainer, or algorithm.importance_weights=null",
            )

    def _check_divergence(self) -> None:
        if self.kl_coef > 0 and not self.keep_reference:
            fix = "set algorithm.keep_reference=true, or algorithm.kl_coef=0"
            raise UserError("the divergence needs a reference", where="kl_coef with algorithm.keep_reference=false", fix=fix)
        if self.kl_target == 0:
            raise UserError("a divergence is never 0", where="kl_target", fix="give a positive number, such as 0.01")
        if self.kl_target is not None and self.kl_coef == 0:
            fix = "give algorithm.kl_coef to begin with, such as 0.01"
            raise UserError("an adaptive coefficient cannot start from 0", where="kl_target with algorithm.kl_coef=0", fix=fix)
        if self.kl_coef > 0 and (self.kl_in, self.kl_estimator) == ("loss", "k1"):
            raise UserError(
                "the gradient of k1 in the loss is zero on average",
                where="kl_estimator=k1 with algorithm.kl_in=loss",
                fix="set algorithm.kl_estimator=k3 or k2, or algorithm.kl_in=reward",
            )


@dataclass
class GroupSettings(PolicySettings):
    """The same, of methods that compare an answer with the others to its prompt."""

    # Divide the advantages by the standard deviation of the rewards that they are compared with.
    norm_by_std: bool = False
