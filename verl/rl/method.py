"""The method of `algorithm.name`: its settings, and what it makes of a step's answers.

A method is a module of verl/algorithms, or a file of one's own, with

    advantages(answers: Answers, settings: Settings) -> Advantages
    Loss(settings: Settings, max_new_tokens: int)                 an `Algorithm` of verl.engine.contract

and, where it needs them,

    Settings                                                      a dataclass: its keys in `algorithm`, see verl.config.own_keys
    needs_groups: bool                                            an answer is compared with others to its prompt
    needs_critic: bool                                            values are estimated, by a critic that learns along
    ValueLoss(settings: Settings)                                 an `Algorithm`, such as that of verl.algorithms.ppo
    reference(settings: Settings, model: ModelConfig) -> path     the reference model; None: the one that the run starts from

An instance of `Loss` may say `by_advantage_alone` and `entropy_gradient`, as `verl.algorithms._policy.PolicyLoss` explains.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from verl.algorithms._settings import PolicySettings
from verl.config.algorithm import AlgorithmConfig
from verl.config.own_keys import fields_of, settings_class, settings_of
from verl.config.ppo import PPOConfig
from verl.errors import UserError


@dataclass(frozen=True)
class Method:
    """A method with its settings.

    Attributes:
        shared: the keys that every method has.
        settings: its own `Settings`.
        reference: path of the reference model; None: the one that the run starts from.
        by_advantage_alone, entropy_gradient: see `verl.algorithms._policy.PolicyLoss`.
    """

    module: ModuleType
    shared: AlgorithmConfig
    settings: Any
    needs_critic: bool
    needs_groups: bool
    reference: str | None
    by_advantage_alone: bool
    entropy_gradient: bool

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether log-probabilities before the update must be known before it; else they are the update's own, from its one pass."""
        s = self.settings
        in_reward = isinstance(s, PolicySettings) and s.kl_coef > 0 and s.kl_in == "reward"
        return self.shared.updates_per_step > 1 or self.shared.old_logprobs == "rollout" or in_reward

    def describe(self) -> str:
        """Its settings, for the run's first lines."""
        everything = {**vars(self.shared), **vars(self.settings)}
        named = {name: value for name, value in everything.items() if name != "name" and value is not None}
        return f"method: {self.shared.name} ({', '.join(f'{name}={value}' for name, value in named.items())})"


def load_method(config: PPOConfig) -> Method:
    """The method that the config names.

    Raises:
        UserError: no such method, one for other data, one that needs several answers to a prompt and has one, or that lacks a part.
    """
    shared, samples = config.algorithm, config.rollout.samples_per_prompt
    module = shared.plugins.load("algorithm.name", shared.name)
    if not all(hasattr(shared, key) for key in fields_of(settings_class(module))):
        raise UserError(
            f"has not the keys of {shared.name}", where="algorithm", fix="complete the config: verl.config.load.checked(config)"
        )
    settings = settings_of(shared, module)
    needs_critic, needs_groups = (bool(getattr(module, name, False)) for name in ("needs_critic", "needs_groups"))
    if needs_groups and samples < 2:
        raise UserError(
            f"{shared.name} compares the answers to one prompt with each other, and there is {samples}",
            where=f"rollout.samples_per_prompt={samples}",
            fix="give at least 2, such as 8, or a method that needs no groups: algorithm.name=ppo or reinforce",
        )
    if shared.dynamic_sampling and samples < 2:
        raise UserError(
            "a prompt's only answer never differs from the others, so that every prompt would be left out",
            where=f"algorithm.dynamic_sampling=true with rollout.samples_per_prompt={samples}",
            fix="give at least 2 answers to a prompt, or algorithm.dynamic_sampling=false",
        )
    if needs_critic and not hasattr(module, "ValueLoss"):
        fix = "write one, or: from verl.algorithms.ppo import ValueLoss"
        raise UserError("needs a critic, and has no ValueLoss for it", where=f"algorithm.name={shared.name}", fix=fix)
    loss = module.Loss(settings, config.rollout.max_new_tokens)
    of_loss = (bool(getattr(loss, name, False)) for name in ("by_advantage_alone", "entropy_gradient"))
    return Method(module, shared, settings, needs_critic, needs_groups, _reference(config, module, settings), *of_loss)


def _reference(config: PPOConfig, module: ModuleType, settings: Any) -> str | None:
    """Raises UserError: the method has a reference of its own, and none is to be kept."""
    choose = getattr(module, "reference", None)
    path: str | None = None if choose is None else choose(settings, config.model)
    if path is not None and not config.algorithm.keep_reference:
        where = f"algorithm.keep_reference=false with algorithm.name={config.algorithm.name}"
        raise UserError(f"the method reads what {path} says", where=where, fix="set algorithm.keep_reference=true")
    return path
