"""Loads the method of `algorithm.name` with its settings.

A method is a module of verl/algorithms, or a user's own file, with

    advantages(answers: Answers, settings: Settings) -> Advantages
    Loss(settings: Settings, max_new_tokens: int)                 an `Algorithm` of verl.engine.contract

and optionally

    Settings                                                      a dataclass of its keys in `algorithm`, see verl.config.plugin_settings
    needs_groups: bool                                            compares the answers to a prompt with each other
    needs_critic: bool                                            reads values; a critic is trained along with the actor
    needs_teacher: bool                                           learns from `teacher.partial_pretrain`; its keys, a
                                                                  verl.config.shared.TeacherConfig, are the third argument of Loss
    ValueLoss(settings: Settings)                                 the critic's loss, an `Algorithm`, such as that of verl.algorithms.ppo
    reference(settings: Settings, model: ModelConfig) -> path     the reference model; None: the model that the run starts from

An instance of `Loss` may set `skips_zero_advantage` and `entropy_gradient`, see `verl.algorithms._policy.PolicyLoss`.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from verl.algorithms._settings import PolicySettings
from verl.config.algorithm import AlgorithmConfig
from verl.config.distillation import is_alone
from verl.config.plugin_settings import fields_of, settings_class, settings_of
from verl.config.ppo import PPOConfig
from verl.config.shared import TeacherConfig
from verl.errors import UserError


@dataclass(frozen=True)
class Method:
    """A method with its settings.

    Attributes:
        shared: the keys that all methods share.
        settings: the method's own `Settings`.
        reference: path of the reference model; None: the model that the run starts from.
        teacher: keys of the teacher; None: it learns from none.
        skips_zero_advantage, entropy_gradient: see `verl.algorithms._policy.PolicyLoss`.
    """

    module: ModuleType
    shared: AlgorithmConfig
    settings: Any
    needs_critic: bool
    needs_groups: bool
    reference: str | None
    teacher: TeacherConfig | None
    skips_zero_advantage: bool
    entropy_gradient: bool

    @property
    def learns_from_rewards(self) -> bool:
        """Return whether rewards have a part in the loss; if not, they are only logged."""
        return self.teacher is None or not is_alone(self.teacher)

    @property
    def needs_old_logprobs(self) -> bool:
        """Return whether old log-probabilities must be computed before the update; if not, the update's own forward pass gives them."""
        if not self.learns_from_rewards:
            return False
        s = self.settings
        in_reward = isinstance(s, PolicySettings) and s.kl_coef > 0 and s.kl_in == "reward"
        return self.shared.updates_per_step > 1 or self.shared.old_logprobs == "rollout" or in_reward

    def describe(self) -> str:
        """Return the method's name and settings, for the first lines of the log."""
        everything = {**vars(self.shared), **vars(self.settings)}
        named = {name: value for name, value in everything.items() if name != "name" and value is not None}
        return f"method: {self.shared.name} ({', '.join(f'{name}={value}' for name, value in named.items())})"


def load_method(config: PPOConfig) -> Method:
    """Load the method that the config names.

    Raises:
        UserError: no such method; it is for other data, or incomplete; or it needs several answers to a prompt, and there is one.
    """
    shared, samples = config.algorithm, config.rollout.samples_per_prompt
    module = shared.plugins.load("algorithm.name", shared.name)
    if not all(hasattr(shared, key) for key in fields_of(settings_class(module))):
        raise UserError(
            f"the keys of {shared.name} are missing",
            where="algorithm",
            fix="complete the config: verl.config.load.config_of(PPOConfig, [config])",
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
            "with one answer to a prompt, rewards never differ, and every prompt would be excluded",
            where=f"algorithm.dynamic_sampling=true with rollout.samples_per_prompt={samples}",
            fix="give at least 2 answers to a prompt, or algorithm.dynamic_sampling=false",
        )
    if needs_critic and not hasattr(module, "ValueLoss"):
        fix = "write one, or: from verl.algorithms.ppo import ValueLoss"
        raise UserError("it needs a critic, and has no ValueLoss to train it", where=f"algorithm.name={shared.name}", fix=fix)
    teacher = _teacher(config, module, settings)
    _check_correction(config, settings)
    loss = make_loss(module, settings, config.rollout.max_new_tokens, teacher)
    flags = (bool(getattr(loss, name, False)) for name in ("skips_zero_advantage", "entropy_gradient"))
    return Method(module, shared, settings, needs_critic, needs_groups, _reference(config, module, settings), teacher, *flags)


def make_loss(module: ModuleType, settings: Any, max_new_tokens: int, teacher: TeacherConfig | None) -> Any:
    """Return the method's loss.

    Args:
        settings: the method's settings, with the current KL coefficient.
        teacher: `Method.teacher`.
    """
    return module.Loss(settings, max_new_tokens, *([] if teacher is None else [teacher]))


def _teacher(config: PPOConfig, module: ModuleType, settings: Any) -> TeacherConfig | None:
    """Return the keys of the method's teacher; None if it learns from none.

    Raises:
        UserError: it needs one, and there is none, or the other way round; or other keys have no effect beside the teacher's weight.
    """
    teacher, name = config.teacher, config.algorithm.name
    if not getattr(module, "needs_teacher", False):
        if teacher.partial_pretrain is None:
            return None
        where = f"teacher.partial_pretrain with algorithm.name={name}"
        raise UserError("this method learns from no teacher", where=where, fix="set algorithm.name=distill, or remove the keys of teacher")
    if teacher.partial_pretrain is None:
        what, fix = f"algorithm.name={name} learns from a teacher", "give a model with the student's tokenizer: a directory or Hub name"
        raise UserError(what, where="teacher.partial_pretrain", fix=fix)
    if not is_alone(teacher):
        if (samples := config.rollout.samples_per_prompt) < 2:
            what = f"the reward's part of the loss compares the answers to one prompt with each other, and there is {samples}"
            fix = "give at least 2, such as 8, or teacher.weight=1, which learns from the teacher alone"
            raise UserError(what, where=f"rollout.samples_per_prompt={samples} with teacher.weight={teacher.weight:g}", fix=fix)
        return teacher
    for key, value in (("dynamic_sampling", config.algorithm.dynamic_sampling), ("kl_coef", getattr(settings, "kl_coef", 0.0))):
        if value:
            what = "the rewards have no part in the loss, and this key is one of theirs"
            fix = f"give a smaller teacher.weight, such as 0.5, or remove algorithm.{key}"
            raise UserError(what, where=f"algorithm.{key}={value} with teacher.weight=1", fix=fix)
    return teacher


def _check_correction(config: PPOConfig, settings: Any) -> None:
    """Raise UserError if answers of older weights would be taken for those of the weights that learn. A user's own method sees to it.

    A teacher alone needs no correction: it says at each token what the student should do there, whoever drew the token.
    """
    if config.rollout.staleness == 0 or not isinstance(settings, PolicySettings) or is_alone(config.teacher):
        return
    if settings.importance_weights is None and settings.old_logprobs == "trainer":
        raise UserError(
            "answers drawn by older weights would be taken for answers of the weights that learn from them",
            where="rollout.staleness=1",
            fix="set algorithm.importance_weights=truncate, which weighs each token by its probability now over that when it was drawn, at "
            "most algorithm.importance_cap; or algorithm.old_logprobs=rollout, which clips the ratio to when it was drawn",
        )


def _reference(config: PPOConfig, module: ModuleType, settings: Any) -> str | None:
    """Return the method's own reference. Raises UserError: it has one, and `keep_reference` is false."""
    choose = getattr(module, "reference", None)
    path: str | None = None if choose is None else choose(settings, config.model)
    if path is not None and not config.algorithm.keep_reference:
        where = f"algorithm.keep_reference=false with algorithm.name={config.algorithm.name}"
        raise UserError(f"the method needs log-probabilities under {path}", where=where, fix="set algorithm.keep_reference=true")
    return path
