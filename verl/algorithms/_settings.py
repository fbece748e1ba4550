"""Keys that methods share: those of the clipped policy loss with a reference, and those of group baselines.

A method's `Settings` derives from one of these and redeclares the keys for which it has other defaults.
"""

from dataclasses import dataclass

from verl.config.algorithm import AlgorithmConfig
from verl.errors import UserError, at_least, one_of


@dataclass
class PolicySettings(AlgorithmConfig):
    """Keys that `verl.algorithms._policy` and `verl.algorithms._advantage` read."""

    # The ratio of new to old probability is clipped to [1 - clip_ratio_low, 1 + clip_ratio_high].
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    # Upper bound on the ratio if the advantage is negative (dual clip), such as 3.0; null: none.
    dual_clip: float | None = None
    # Whiten the advantages of a step: shift and scale them to mean 0 and variance 1.
    whiten_advantages: bool = False
    # "token-mean" (mean over all tokens of an update), "sequence-mean" (mean over answers of the mean over their tokens), or "constant"
    # (sum / (answers × max_new_tokens)).
    loss_aggregation: str = "token-mean"
    # Weight of the KL penalty, the KL divergence from the reference.
    kl_coef: float = 0.0
    # Where the KL penalty applies: in the "loss", or in the "reward" of each token.
    kl_in: str = "loss"
    # KL estimator: "k1", "k2" or "k3"; null: k3 in the loss, k1 in the reward.
    kl_estimator: str | None = None
    # Adapt kl_coef to keep the mean KL per token near this value; null: kl_coef is fixed.
    kl_target: float | None = None
    # Number of answers over which kl_coef adapts: the larger, the slower.
    kl_horizon: int = 10000
    # Weight of the entropy bonus.
    entropy_coef: float = 0.0
    # Importance weights that correct for differences between the rollout's and the trainer's probabilities: "truncate" (weights are at most
    # importance_cap), "mask" (weights outside [1 / importance_cap, importance_cap] are 0), or null (none).
    importance_weights: str | None = None
    # Upper bound of the importance weights.
    importance_cap: float = 2.0
    # Answers that end within this many tokens of max_new_tokens lose up to overlong_penalty of their reward; 0: no penalty.
    overlong_buffer_tokens: int = 0
    # Penalty of an answer that reaches max_new_tokens.
    overlong_penalty: float = 1.0

    @property
    def estimator(self) -> str:
        """The KL estimator, or its default. The default in the loss is not k1, because its gradient is zero on average."""
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
        self._check_kl()
        if self.old_logprobs == "rollout" and self.importance_weights is not None:
            raise UserError(
                "the old log-probabilities are the rollout's own, so all importance weights would be 1",
                where=f"importance_weights={self.importance_weights} with algorithm.old_logprobs=rollout",
                fix="set algorithm.old_logprobs=trainer, or algorithm.importance_weights=null",
            )

    def _check_kl(self) -> None:
        if self.kl_coef > 0 and not self.keep_reference:
            fix = "set algorithm.keep_reference=true, or algorithm.kl_coef=0"
            raise UserError("the KL penalty needs a reference", where="kl_coef with algorithm.keep_reference=false", fix=fix)
        if self.kl_target == 0:
            raise UserError("the KL divergence cannot be held at 0", where="kl_target", fix="give a positive number, such as 0.01")
        if self.kl_target is not None and self.kl_coef == 0:
            fix = "set algorithm.kl_coef to the initial value, such as 0.01"
            raise UserError("an adaptive coefficient cannot start from 0", where="kl_target with algorithm.kl_coef=0", fix=fix)
        if self.kl_coef > 0 and (self.kl_in, self.kl_estimator) == ("loss", "k1"):
            raise UserError(
                "the gradient of k1 in the loss is zero on average",
                where="kl_estimator=k1 with algorithm.kl_in=loss",
                fix="set algorithm.kl_estimator=k3 or k2, or algorithm.kl_in=reward",
            )


@dataclass
class GroupSettings(PolicySettings):
    """Keys of methods that compare the answers to a prompt with each other."""

    # Divide the advantages by the standard deviation of the rewards: of the group, or of the step for methods without groups.
    norm_by_std: bool = False
