"""Builds the models of a run for their roles: actor, critic, reference, reward, rollout."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from verl import dist, plugin
from verl.config.ppo import PPOConfig, longest_sample
from verl.config.reward_models import reward_models
from verl.data.prompts import Prompt, Prompts
from verl.data.render import Renderer
from verl.engine.background import SavedModel
from verl.engine.build import Built, build
from verl.engine.build_heads import Critic, build_critic
from verl.engine.checkpoint import Position
from verl.engine.decisions import Decisions, Workload, choose_spread, decide, token_budget_of_answers
from verl.engine.engine import Engine
from verl.engine.hardware import Hardware
from verl.engine.logprobs import Entropy
from verl.engine.outline import Outline
from verl.engine.references import AdapterOffReference, build_reference
from verl.engine.scorers import TokenScorer
from verl.engine.shared_prompts import PromptSharing, choose_sharing
from verl.engine.teachers import Teacher, build_teacher, check_teacher_model, heads_of_teacher
from verl.engine.weights import ReplicatedWeights
from verl.errors import UserError
from verl.models.attention.flash import Heads
from verl.models.format_check import check_format
from verl.models.kind import CRITIC, LANGUAGE_MODEL, REWARD_MODEL, check_kind
from verl.models.load import load_tokenizer, read_adapter_config, read_config, resolve
from verl.models.per_layer import heads_of
from verl.models.prompt_format import system_of
from verl.pace import counted
from verl.rewards._model import check_scores
from verl.rewards._scoring import Rewards, check_combination
from verl.rl.agents import AgentAnswers, check_agent_program
from verl.rl.ahead import Ahead, SavedWithAnswers
from verl.rl.ahead_partial import PartialAhead
from verl.rl.answering import Answerer
from verl.rl.bridge import Bridge
from verl.rl.clock import Clock
from verl.rl.environment import check_environment
from verl.rl.episodes import Episodes
from verl.rl.method import Method
from verl.rl.remote_rollout import RemoteRollout, rollout_options
from verl.rl.schedule import Schedule, events_after
from verl.rl.still import hold_still
from verl.rl.tool import load_tool
from verl.rollout import Rollout, load_rollout, share
from verl.rollout._model import rope_limit
from verl.run import Run


@dataclass(frozen=True)
class Roles:
    """The models of a run.

    Attributes:
        critic: the critic; None if the method needs none.
        reference: the initial model, or the method's own choice; None with `algorithm.keep_reference=false`.
        teacher: the model that the actor learns from; None if the method learns from none.
        answerer: rollout and rewards.
        sleeps: whether the rollout frees memory while the other models work.
        sharing: whether the answers to a prompt share it in a micro-batch.
    """

    actor: Built
    critic: Critic | None
    reference: Engine | AdapterOffReference | None
    teacher: Teacher | None
    answerer: Answerer
    sleeps: bool
    sharing: PromptSharing

    def describe(self) -> str:
        """Return the models as lines for the log."""
        lines = [self.actor.describe()]
        if self.critic is not None:
            lines.append(
                f"critic: {type(self.critic.loaded.model).__name__}, {sum(p.numel() for p in self.critic.engine.trained):,} trained"
            )
        lines.append(f"reference: {'kept' if self.reference is not None else 'none (algorithm.keep_reference=false)'}")
        lines += [] if self.teacher is None else [self.teacher.describe()]
        return "\n".join([*lines, self.sharing.describe(), f"rollout: {self.answerer.rollout.describe()}"])

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Generate in this context. After it, the rollout frees memory if it `sleeps`."""
        yield
        if self.sleeps:
            self.answerer.rollout.sleep()

    def clock(self) -> Clock:
        """Return a clock of this run's steps."""
        idle = ("score",) if self.answerer.scores_on_cpu else ()
        # Ranks that draw answers ahead do so while the others train: only they know for how long.
        apart = isinstance(self.answerer.rollout, RemoteRollout) and self.answerer.ahead is None
        clock = Clock(self.actor.engine.device, idle=idle, rollout_apart=apart)
        for engine in self._engines():
            if isinstance(engine.weights, ReplicatedWeights):
                engine.weights.waiting = clock.gradients
        return clock

    @property
    def trained_weights(self) -> int:
        """Number of weights that are trained, over all ranks."""
        return sum(engine.trained_weights for engine in self._engines())

    def set_skipped(self, position: Position) -> None:
        """Set the numbers of skipped updates to those of the checkpoint which the run resumes from."""
        for engine, skipped in zip(self._engines(), (position.skipped, position.critic_skipped), strict=False):
            engine.set_skipped(skipped)

    def with_skipped(self, position: Position) -> Position:
        """Return the position with the current numbers of skipped updates."""
        actor, critic = self.actor.engine, self.critic
        return replace(position, skipped=actor.skipped, critic_skipped=0 if critic is None else critic.engine.skipped)

    def _engines(self) -> list[Engine]:
        return [self.actor.engine, *([] if self.critic is None else [self.critic.engine])]

    def draw_ahead(self, config: PPOConfig, prompts: Prompts, start: Position, run: Run) -> SavedModel:
        """With `rollout.staleness=1`, draw the answers of each next step ahead, from now on. Every rank calls it, with the first weights.

        Returns:
            what is saved as the actor: with answers that were drawn ahead, if there are any.
        """
        rollout = self.answerer.rollout
        if config.rollout.staleness == 0:
            return self.actor
        assert isinstance(rollout, RemoteRollout)
        if config.rollout.replay is not None:
            rollout.replay(events_after(config.rollout.replay, start.step))
        rollout.schedule = Schedule(run, start.step)
        kind = PartialAhead if config.rollout.partial else Ahead
        ahead = self.answerer.ahead = kind(rollout, self.answerer.sampling, prompts, config, start, run.total_steps)
        if run.checkpoint is not None:
            ahead.restore(run.checkpoint, start.drawn)
        return SavedWithAnswers(self.actor, ahead)

    def publish(self, version: int) -> None:
        """Copy the actor's current weights to the rollout."""
        self.answerer.rollout.update_weights(self.actor.named_weights(), version)

    def renew(self, version: int, clock: Clock) -> None:
        """Publish new weights, after the answers that are drawn ahead by those before."""
        with clock.phase("generate"):
            self.answerer.finish_next()
        with clock.phase("update_rollout"):
            self.publish(version)


@dataclass(frozen=True)
class RoleDecisions:
    """Decisions for the trained models. One attention kernel serves them and the reward model."""

    actor: Decisions
    critic: Decisions | None


def decide_roles(config: PPOConfig, method: Method, outline: Outline, hardware: Hardware, total_steps: int) -> RoleDecisions:
    """Decide for actor and critic.

    Args:
        outline: outline of the actor.
        total_steps: number of steps of the whole run; each has the method's number of updates.
    Raises:
        UserError: the hardware cannot run what the config asks for.
    """
    tokens_per_step = config.data.prompts_per_step * config.rollout.samples_per_prompt * longest_sample(config)
    workload = Workload(
        total_steps=total_steps * method.shared.updates_per_step,
        total_tokens=total_steps * tokens_per_step,
        document_tokens=float(longest_sample(config)),
        token_budget=token_budget(config),
    )
    of_critic = outline_of_critic(config, outline) if method.needs_critic else None
    heads = [*([] if of_critic is None else of_critic.heads), *heads_of_reward_model(config), *heads_of_teacher(config.teacher)]
    actor = decide(outline, hardware, workload, choose_spread(outline, hardware, holds_still=True), other_heads=heads)
    if of_critic is None:
        return RoleDecisions(actor, None)
    critic = decide(of_critic, hardware, workload, actor.spread, other_heads=[*outline.heads, *heads], scalar_head=True)
    return RoleDecisions(actor, critic)


def token_budget(config: PPOConfig) -> int:
    """Maximum tokens of a micro-batch of answers."""
    return token_budget_of_answers(config.data.max_tokens_per_micro_batch, longest_sample(config))


def outline_of_critic(config: PPOConfig, actor: Outline) -> Outline:
    """Return the outline of the critic's model: the actor's, unless the config names another model."""
    path = config.critic.partial_pretrain
    return actor if path in (None, config.model.partial_pretrain) else Outline(replace(config.model, partial_pretrain=path))


def heads_of_reward_model(config: PPOConfig) -> Sequence[Heads]:
    """Return the attention heads of the reward models."""
    models, trusted = reward_models(config.reward_model), config.reward_model.trust_remote_code
    return [heads for model in models for heads in heads_of(read_config(model.path, trust_remote_code=trusted))]


def build_roles(
    config: PPOConfig,
    method: Method,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    bridge: Bridge | None,
    decisions: RoleDecisions,
    run: Run,
) -> Roles:
    """Load every model of the run.

    Args:
        prompts: of training and validation; their right answers are checked.
        bridge: communication with the rollout's processes; None: the rollout is in this process.
    Raises:
        UserError: a model or a grader cannot be used, or prompts and answers exceed the model's positions.
    """
    warn_of_dropout(config, run)
    stop_ids = Renderer(tokenizer).stop_ids
    systems = [system_of(prompt.messages) for prompt in prompts]
    trained = config.model.lora_adapter_path or config.model.partial_pretrain
    check_format(trained, tokenizer, stop_ids, systems, key="data.system_prompt")
    scorer = Rewards(config.reward, config.reward_model, tokenizer=tokenizer, device=decisions.actor.device, say=run.say, watch=run)
    dist.together(lambda: scorer.check_references([prompt.row for prompt in prompts], [prompt.where for prompt in prompts]))
    seed = config.trainer.seed
    actor = build(
        config.model, config.optim, tokenizer, decisions.actor, stop_ids=stop_ids, system_prompts=systems, seed=seed, dropout=False
    )
    score_at(actor.engine, config.rollout.temperature, entropy="gradient" if method.entropy_gradient else True)
    _still(actor.engine, f"model.partial_pretrain={config.model.partial_pretrain}", run)
    critic = None
    if decisions.critic is not None:
        path = config.critic.partial_pretrain or config.model.partial_pretrain
        critic = build_critic(config.model, config.critic.optim, path, actor, decisions.critic, seed=seed)
        _still(critic.engine, f"critic.partial_pretrain={path}", run)
    reference = build_reference(config.model, actor, method.reference) if method.shared.keep_reference else None
    teacher = None if method.teacher is None else build_teacher(method.teacher, actor)
    rollout = build_rollout(config, actor, tokenizer, stop_ids, bridge)
    check_positions(config, rollout)
    check_rope(config, actor.engine.scorer.model)
    episodes = build_episodes(config, tokenizer, run)
    answerer = Answerer(rollout, config.rollout, scorer, tokenizer, seed, workers=config.reward, watch=run, episodes=episodes)
    others = (critic and critic.engine, reference, teacher and teacher.engine)
    sharing = share_prompts(config, actor, [engine for engine in others if isinstance(engine, Engine)])
    return Roles(actor, critic, reference, teacher, answerer, config.rollout.sleep, sharing)


def build_episodes(config: PPOConfig, tokenizer: PreTrainedTokenizerBase, run: Run) -> Episodes | AgentAnswers | None:
    """Open the environment, or what answers by an agent; None: there is neither.

    Raises:
        UserError: it cannot be used, or the chat template cannot continue a chat.
    """
    if config.environment.name is None and not config.rollout.serve:
        return None
    of = "agent" if config.rollout.serve else "environment"
    episodes = AgentAnswers(config, tokenizer, run, run.say) if config.rollout.serve else Episodes(config, tokenizer, run)
    if episodes.note is not None:
        run.say(episodes.note)
    if episodes.dropped:
        run.say(f"{of}: its processes have no {', '.join(episodes.dropped)}; {of}.secrets passes on such variables")
    return episodes


def share_prompts(config: PPOConfig, actor: Built, others: Sequence[Engine]) -> PromptSharing:
    """Decide whether the answers to a prompt share it. Every rank calls it.

    Args:
        others: the models that compute the actor's micro-batches, too.
    """
    if config.rollout.samples_per_prompt == 1:
        return PromptSharing("rollout.samples_per_prompt=1")
    options = {"trusted": config.model.trust_remote_code}
    return choose_sharing(config.data.share_prompts, [actor.engine, *others], actor.decisions, longest_sample(config), **options)


def warn_of_dropout(config: PPOConfig, run: Run) -> None:
    """Log that dropout is off if the actor starts from an adapter that was trained with dropout."""
    path = config.model.lora_adapter_path
    share = 0.0 if path is None else (read_adapter_config(path) or {}).get("lora_dropout") or 0.0
    if share > 0:
        run.say(f"model.lora_adapter_path={path}: its dropout of {share} is off; it would change ratios of new to old probability")


def _still(engine: Engine, where: str, run: Run) -> None:
    """Switch off whatever is random in a model, and log it. Raises UserError if the model stays random."""
    if found := hold_still(engine, where=where):
        listed = ", ".join(f"{name}={value:g}" for name, value in found.items())
        run.say(f"{where}: what is random in training is off: {listed} in config.json; it would change ratios of new to old probability")


def score_at(engine: Engine, temperature: float, *, entropy: Entropy = False) -> None:
    """Let an engine score tokens at the temperature that they are sampled at."""
    assert isinstance(engine.scorer, TokenScorer)
    engine.scorer.temperature, engine.scorer.entropy = temperature, entropy


def build_rollout(
    config: PPOConfig, actor: Built, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int], bridge: Bridge | None
) -> Rollout:
    """Build the rollout. It shares the actor's weights if this process has all of them; otherwise it is a copy, updated after each step."""
    if bridge is not None:
        return RemoteRollout(bridge, is_partial=config.rollout.partial)
    name, path, options = config.rollout.name, config.model.partial_pretrain, rollout_options(config)
    if actor.is_whole:
        return share(name, actor.loaded.model, path, tokenizer, stop_ids, options)
    return load_rollout(name, path, tokenizer, stop_ids, options)


def check_names(config: PPOConfig, method: Method) -> None:
    """Check everything that the config names, before data is read or a model loaded.

    Raises:
        UserError: a rollout engine, tool, environment, agent, grader or model does not exist, or is of the wrong kind.
    """
    plugin.load("verl.rollout", config.rollout.name, needs=("load", "share"))
    if config.rollout.tool is not None:
        load_tool(config.rollout.tool)
    check_environment(config.environment)
    check_agent_program(config.agent)
    check_combination(config.reward, config.reward_model)
    check_checkpoint(config)
    check_kind(config.model.partial_pretrain, (LANGUAGE_MODEL,), where=f"model.partial_pretrain={config.model.partial_pretrain}")
    check_scores(config.reward_model)
    if method.needs_critic and config.critic.partial_pretrain is not None:
        resolve(path := config.critic.partial_pretrain)
        check_kind(path, (CRITIC, LANGUAGE_MODEL, REWARD_MODEL), where=f"critic.partial_pretrain={path}")
    if method.reference is not None:
        resolve(method.reference)
        check_kind(method.reference, (LANGUAGE_MODEL,), where=f"the reference, {method.reference}")
    if method.teacher is not None:
        check_teacher_model(method.teacher, load_tokenizer(config.model.partial_pretrain, trust_remote_code=config.model.trust_remote_code))


def check_checkpoint(config: PPOConfig) -> None:
    """Raise UserError if the actor is to start from an adapter directory, which is not a whole model."""
    path = config.model.partial_pretrain
    adapter = read_adapter_config(path)
    if adapter is not None:
        base = adapter.get("base_model_name_or_path")
        fix = f"merge it: verl export {path} DIR; or continue training it: model.partial_pretrain={base} model.lora_adapter_path={path}"
        raise UserError("is an adapter, not a whole model", where=f"model.partial_pretrain={path}", fix=fix)


def check_positions(config: PPOConfig, rollout: Rollout) -> None:
    """Raise UserError if the longest prompt with the longest answer exceeds the model's positions."""
    longest = longest_sample(config)
    if rollout.positions is not None and longest > rollout.positions:
        raise UserError(
            f"prompts of {config.data.max_prompt_length:,} and answers of {config.rollout.max_new_tokens:,} tokens do not fit into the "
            f"model's {rollout.positions:,} positions",
            where="rollout.max_new_tokens",
            fix="lower it, or data.max_prompt_length",
        )


def check_rope(config: PPOConfig, model: PreTrainedModel) -> None:
    """Raise UserError if an answer may grow beyond the length from which the model's rotary embeddings are others, at all positions.

    The tokens before this length are drawn with the first embeddings and would be scored with the others.
    """
    limit, longest = rope_limit(model), longest_sample(config)
    if limit is not None and longest > limit.tokens:
        raise UserError(
            f"the model's rotary embeddings change for a text longer than {limit.tokens:,} tokens, and prompts of "
            f"{config.data.max_prompt_length:,} with answers of {config.rollout.max_new_tokens:,} tokens may cross this length: tokens "
            "would be drawn with other probabilities than they are scored with",
            where="rollout.max_new_tokens",
            fix=f"keep it and data.max_prompt_length within {limit.tokens:,} tokens together",
        )


def describe_steps(config: PPOConfig, total_steps: int) -> str:
    """Return the numbers of prompts, answers, updates and tokens of a step, as one line for the log."""
    prompts, samples, updates = config.data.prompts_per_step, config.rollout.samples_per_prompt, config.algorithm.updates_per_step
    many = f"{dist.world_size()} processes" if dist.world_size() > 1 else "1 process"
    steps = counted(total_steps, "step")
    return (
        f"{steps} of {counted(prompts, 'prompt')} × {counted(samples, 'answer')} = {counted(prompts * samples, 'answer')}; "
        f"{counted(updates, 'update')} per step with {counted(prompts // updates * samples, 'answer')} each; "
        f"prompts of up to {config.data.max_prompt_length:,} and answers of up to {config.rollout.max_new_tokens:,} tokens, "
        f"in micro-batches of up to {token_budget(config):,} tokens on each of {many}"
    )
