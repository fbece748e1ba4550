"""The keys of `algorithm` as a method takes them: what the user gave, else the method's own value."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from verl.config.ppo import AlgorithmConfig

# What a method's DEFAULTS start from.
COMMON: dict[str, object] = {
    "clip_ratio_low": 0.2,
    "clip_ratio_high": 0.2,
    "whiten_advantages": False,
    "norm_by_std": False,
    "loss_aggregation": "token-mean",
    "dynamic_sampling": False,
}


def filled(settings: AlgorithmConfig, defaults: Mapping[str, object]) -> AlgorithmConfig:
    """The settings with a value in place of each null that the method has one for.

    The KL divergence is estimated by k1 in the reward and by k3 in the loss, where the gradient of k1 is zero on average.
    """
    estimator = "k1" if settings.kl_in == "reward" else "k3"
    missing: dict[str, Any] = {"kl_estimator": estimator, **defaults}
    return replace(settings, **{key: value for key, value in missing.items() if getattr(settings, key) is None})
