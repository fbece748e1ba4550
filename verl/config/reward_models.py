"""Settings of reward models in reinforcement learning: one, or several at the same time."""

import math
from dataclasses import dataclass
from typing import Any

from verl.errors import UserError, at_least, one_of

READS = ("chat", "answer")


@dataclass
class RewardModelConfig:
    # Reward model, a sequence classifier with one label, or a classifier with reward_model.label: a directory or Hub name, or a list of
    # these, which are all asked; null: none.
    path: Any = None
    # Weight of its score in the sum with the rewards of reward.name; of several models, a list.
    weight: Any = 1.0
    # Of a classifier: the label whose probability is the score; null: the model has one label. Of several models, a list.
    label: Any = None
    # What it reads: "chat", question and answer in its own chat template, or "answer", the text of the answer alone. Of several, a list.
    reads: Any = "chat"
    # Token budget of its micro-batches, for questions and answers together.
    max_tokens_per_micro_batch: int = 16384
    # Run Python code that comes with the reward model. Set it only for sources that you trust.
    trust_remote_code: bool = False


@dataclass(frozen=True)
class OneModel:
    """One of the reward models.

    Attributes:
        path, weight, label, reads: as in RewardModelConfig.
        where: the key that names the model, with its path, for errors.
    """

    path: str
    weight: float
    label: str | None
    reads: str
    where: str


def reward_models(config: RewardModelConfig) -> list[OneModel]:
    """Return the reward models of a config.

    Raises:
        UserError: a value is wrong, or a list has another length than that of the paths.
    """
    given = [] if config.path is None else config.path if isinstance(config.path, list) else [config.path]
    if (config.path is not None and not given) or not all(isinstance(path, str) and path for path in given):
        raise UserError(f"found {config.path!r}", where="reward_model.path", fix="give a directory, a Hub name, or a list of these")
    paths = [str(path) for path in given]
    weights, labels, reads = (_of_each(config, key, max(1, len(paths))) for key in ("weight", "label", "reads"))
    for weight in weights:
        if not math.isfinite(_number(weight)):
            raise UserError(f"found {weight}", where="reward_model.weight", fix="give a finite number, such as 1.0")
    for what in reads:
        one_of("reward_model.reads", what, READS)
    for label in labels:
        if label is not None and not isinstance(label, (str, int)):
            raise UserError(f"found {label!r}", where="reward_model.label", fix="give the name of a label, or null")
    called = [None if label is None else str(label) for label in labels]
    places = [f"reward_model.path={path}" for path in paths]
    return [OneModel(*one) for one in zip(paths, map(_number, weights), called, reads, places, strict=False)]


def _number(weight: object) -> float:
    """Return a weight as a number; NaN if it is none."""
    try:
        return math.nan if isinstance(weight, bool) or not isinstance(weight, (int, float, str)) else float(weight)
    except ValueError:
        return math.nan


def _of_each(config: RewardModelConfig, key: str, models: int) -> list[Any]:
    """Return a key's value for each model: the items of a list, or the one value for all."""
    value = getattr(config, key)
    if not isinstance(value, list):
        return [value] * models
    if len(value) != models:
        what = f"{len(value)} values for {models} reward model{'s' * (models > 1)}"
        raise UserError(what, where=f"reward_model.{key}", fix="give one for each path in reward_model.path, or one for all")
    return list(value)


def names_of(models: int) -> list[str]:
    """Return the names of the models' scores among the rewards: `model`, `model_2`, …"""
    return ["model", *(f"model_{number}" for number in range(2, models + 1))][:models]


def check_reward_models(config: RewardModelConfig) -> None:
    """Check the keys of reward models. Raises UserError naming the key."""
    reward_models(config)
    at_least("reward_model.max_tokens_per_micro_batch", config.max_tokens_per_micro_batch, 1)
