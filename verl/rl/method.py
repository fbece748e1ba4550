"""The method of `algorithm.name`: its settings, and what it makes of a step's answers.

A method is a module of verl/algorithms, or a file of one's own, with

    needs_critic, needs_groups: bool              whether values are estimated; whether an answer is compared with others to its prompt
    DEFAULTS: dict                                its values of the keys of `algorithm` that are null
    advantages(answers: Answers, settings: AlgorithmConfig) -> Advantages
    Loss(settings: AlgorithmConfig, max_new_tokens: int)          an `Algorithm` of verl.engine.engine
"""

from dataclasses import dataclass
from types import ModuleType

from verl import plugin
from verl.algorithms._settings import COMMON, filled
from verl.config.ppo import AlgorithmConfig, PPOConfig
from verl.errors import UserError

REINFORCEMENT = ("advantages", "Loss")


@dataclass(frozen=True)
class Method:
    """A method with its settings.

    Attributes:
        settings: `algorithm` with the method's own values where it was null.
    """

    module: ModuleType
    settings: AlgorithmConfig
    needs_critic: bool
    needs_groups: bool

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether log-probabilities before the update must be known before it; else they are the update's own, from its one pass."""
        s = self.settings
        return s.updates_per_step > 1 or s.old_logprobs == "rollout" or (s.kl_coef > 0 and s.kl_in == "reward")

    def describe(self) -> str:
        """Its settings, for the run's first lines."""
        named = {name: value for name, value in vars(self.settings).items() if name != "name" and value is not None}
        return f"method: {self.settings.name} ({', '.join(f'{name}={value}' for name, value in named.items())})"


def load_method(config: PPOConfig) -> Method:
    """The method that the config names.

    Raises:
        UserError: no such method, one for other data, one that needs several answers to a prompt and has one, or settings that its
            loss refuses.
    """
    name, samples = config.algorithm.name, config.rollout.samples_per_prompt
    module = plugin.load("verl.algorithms", name)
    if not all(callable(getattr(module, function, None)) for function in REINFORCEMENT):
        known = [other for other in plugin.names("verl.algorithms") if hasattr(plugin.load("verl.algorithms", other), "advantages")]
        fix = f"{', '.join(known)}, or a file with {' and '.join(REINFORCEMENT)}"
        raise UserError("is no method of reinforcement learning", where=f"algorithm.name={name}", fix=fix)
    needs_groups = bool(getattr(module, "needs_groups", False))
    if needs_groups and samples < 2:
        raise UserError(
            f"{name} compares the answers to one prompt with each other, and there is {samples}",
            where=f"rollout.samples_per_prompt={samples}",
            fix="give at least 2, such as 8, or a method that needs no groups: algorithm.name=ppo or reinforce",
        )
    settings = filled(config.algorithm, getattr(module, "DEFAULTS", COMMON))
    if settings.dynamic_sampling and samples < 2:
        raise UserError(
            "a prompt's only answer never differs from the others, so that every prompt would be left out",
            where=f"algorithm.dynamic_sampling=true with rollout.samples_per_prompt={samples}",
            fix="give at least 2 answers to a prompt, or algorithm.dynamic_sampling=false",
        )
    module.Loss(settings, config.rollout.max_new_tokens)  # for its errors, before anything is loaded
    return Method(module, settings, bool(getattr(module, "needs_critic", False)), needs_groups)
