"""Settings of reinforcement learning."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import MISSING

from verl.config.agent import AgentConfig, check_agent
from verl.config.algorithm import AlgorithmConfig
from verl.config.best import check_best
from verl.config.checks import check_dist, check_model, check_offload, check_optim, check_samples, check_trainer
from verl.config.distillation import check_teacher, is_alone
from verl.config.environment import EnvironmentConfig, check_environment
from verl.config.reward_models import RewardModelConfig as RewardModelConfig
from verl.config.reward_models import check_reward_models, names_of, reward_models
from verl.config.shared import DistConfig, ModelConfig, OptimConfig, TeacherConfig, TrainerConfig
from verl.config.workers import WorkersConfig, check_workers
from verl.errors import UserError, at_least, one_of
from verl.plugin import Plugins

MOST_OVERSAMPLED = 10.0  # prompts asked over those wanted


@dataclass
class RewardConfig(WorkersConfig):
    plugins: ClassVar[Plugins] = Plugins("verl.rewards", "reward", ("score", "score_group"), any_of=True)

    # Reward: a name in verl/rewards (gsm8k, math, format), a dotted module, path/to/file.py, or a list of these; null: only the reward
    # model, and the rewards of an environment. Rewards may have more keys.
    name: Any = "gsm8k"
    # Weights of the rewards, in the order of their names; null: 1 each.
    weights: list[float] | None = None
    # If a reward fails or is not a finite number: "stop" ends the run with an error that names the row, "zero" counts it as 0.
    on_error: str = "stop"
    # Rewards from which on an answer counts as right, by name, such as {f1: 0.5}: the reward is then 1, and below it 0.
    thresholds: dict[str, float] = field(default_factory=dict)
    # Rewards that an answer must reach, by name, such as {format: 1.0}: one that does not gets reward.gated in place of the whole sum.
    gates: dict[str, float] = field(default_factory=dict)
    # Reward of an answer that misses one of reward.gates.
    gated: float = 0.0


def check_rewards(reward: RewardConfig, model: RewardModelConfig, environment: str | None = None, *, needed: bool = True) -> None:
    """Check the keys of rewards. Raises UserError naming the key.

    Args:
        environment: name of the environment, or the agent's program, which give rewards too.
        needed: whether there must be one.
    """
    one_of("reward.on_error", reward.on_error, ("stop", "zero"))
    check_workers(reward)
    names = reward_names(reward)
    if needed and not names and model.path is None and environment is None:
        fix = "set reward.name, such as gsm8k, reward_model.path, environment.name, agent.program, or with distill teacher.partial_pretrain"
        raise UserError("there is neither a reward nor a reward model", where="reward.name", fix=fix)
    if not all(isinstance(name, str) and name for name in names):
        raise UserError(f"found {reward.name!r}", where="reward.name", fix="give a name such as gsm8k, or a list such as [gsm8k,format]")
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(f"names {twice[0]!r} twice", where="reward.name", fix="name each once; reward.weights gives it a larger weight")
    if reward.weights is not None and len(reward.weights) != len(names):
        what = f"{len(reward.weights)} weights for {len(names)} rewards"
        raise UserError(what, where="reward.weights", fix="give one number for each name in reward.name, or remove this key")
    numbers = [("reward.weights", weight) for weight in reward.weights or []] + [("reward.gated", reward.gated)]
    numbers += [(f"reward.{key}.{name}", limit) for key in ("gates", "thresholds") for name, limit in getattr(reward, key).items()]
    for key, weight in numbers:
        if not math.isfinite(weight):
            raise UserError(f"found {weight}", where=key, fix="give a finite number, such as 1.0")
    check_reward_models(model)


def reward_names(reward: RewardConfig) -> list[str]:
    """Return the names in `reward.name` as a list."""
    return [] if reward.name is None else list(reward.name) if isinstance(reward.name, list) else [reward.name]


def measured(reward: RewardConfig, model: RewardModelConfig, environment: str | None = None) -> list[str] | None:
    """Return what the validation may measure, without `val/`; None if users' files or an environment, whose names may be any, take part."""
    names = reward_names(reward)
    if environment is not None or any("." in str(name) for name in names):
        return None
    return ["reward", *(["exact_match"] if names else []), *map(str, names), *names_of(len(reward_models(model)))]


@dataclass
class PromptConfig:
    # Rows with prompts: a path, a glob, a Hub data set or a list, as in fine-tuning, also with shares.
    train_files: Any = MISSING
    # Rows for validation, answered greedily; null: none.
    val_files: Any = None
    # Column of the question.
    prompt_key: str = "question"
    # Column of the right answer, which graders read as row["reference"]; null: there is none.
    response_key: str | None = "answer"
    # Column of a chat, a list of {role, content} that ends with a user's message; if set, it replaces prompt_key.
    messages_key: str | None = None
    # Column of the tools for the chat template, as JSON schemas; null: the column `tools` or `functions`, if it has schemas.
    tools_key: str | None = None
    # With prompt_key: system prompt before each question; null: the default of the chat template.
    system_prompt: str | None = None
    # A Jinja file that replaces the tokenizer's chat template.
    chat_template: str | None = None
    # Values of the chat template's variables, such as {enable_thinking: false}. The checkpoint's template has them as its defaults.
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    # Column of such values for single rows, an object; a row's own values come before chat_template_kwargs.
    chat_template_kwargs_key: str | None = None
    # Prompts per step, over all GPUs.
    prompts_per_step: int = 64
    # Longest prompt, in tokens.
    max_prompt_length: int = 512
    # Prompts over max_prompt_length: "error" stops before training, "drop" removes their rows.
    overlong_prompts: str = "error"
    # Tokens per micro-batch on one GPU, packed from whole answers with their prompts; null: 16384, or max_prompt_length + max_new_tokens
    # if that is more.
    max_tokens_per_micro_batch: int | None = None
    # The prompt in a micro-batch: "auto" packs it once for all of its answers where that is exact, "never" packs it with each answer.
    share_prompts: str = "auto"
    # Use only the first rows; null or -1: all.
    train_max_samples: int | None = None
    val_max_samples: int | None = None


@dataclass
class RolloutConfig:
    # Generation engine: "native", "hf" (transformers) or "vllm"; "auto" is native where its answers are those of the plain model, else hf.
    name: str = "auto"
    # Answers to each prompt.
    samples_per_prompt: int = 8
    # Over-sampling: a step asks this share of prompts more than data.prompts_per_step, and takes the groups whose longest answer is
    # shortest. The other prompts are asked again, together, in a later step. 0: none; 0.25 asks a quarter more.
    oversample: float = 0.0
    # Sampling temperature.
    temperature: float = 1.0
    # Longest answer, in tokens; with a tool or an environment, the total of all turns, and with an agent that of each of its chats.
    max_new_tokens: int = 512
    # Maximum number of answers generated at the same time; null: as many as memory allows.
    max_sequences: int | None = None
    # Address of a vLLM server; null: generate in this process.
    url: str | None = None
    # Folder for passing new weights to a server, which must see it under the same path; null: pass them in memory, if the server is on this
    # machine.
    weights_folder: str | None = None
    # vllm in this process: share of the GPU's memory that it may use while it generates.
    gpu_memory_utilization: float = 0.5
    # Exact speculation in the native engine, with the answers that it gives without: "auto" tries several tokens in a step where that pays,
    # "never" does not. They come from the prompt and from other answers to it.
    speculate: str = "never"
    # Free the engine's memory during training if that is worth the time to allocate it again; false: never.
    sleep: bool = True
    # Updates by which the weights that draw an answer may be older than those that learn from it: 0, or 1. With 1, ranks of its own
    # (mapping.rollout) draw the next step's answers while the trainer learns from those of this step.
    staleness: int = 0
    # With staleness=1: new weights do not wait for answers; unfinished ones go on under them, and answers of the next step begin as soon as
    # there is room. It needs the engine native. Two runs then differ by when weights came.
    partial: bool = False
    # With partial: repeat the run that wrote this schedule.jsonl, bit for bit.
    replay: str | None = None
    # Open a chat endpoint in OpenAI's format over the engine, on this machine's loopback, for an agent (agent.program) whose answers are
    # trained on in place of the model's alone.
    serve: bool = False
    # Tool that replies to the model's turns: a name in verl/tools, such as calculator, or path/to/file.py; null: an answer is one turn.
    tool: str | None = None
    # Maximum number of the model's turns in one answer.
    max_turns: int = 4
    # If the tool fails: "stop" ends the run with an error that names the row, "reply" gives the model the error as the tool's reply. The
    # keys reward.workers, reward.timeout_seconds, reward.secrets and reward.use_gpu are also those of your own tool.
    on_error: str = "stop"


@dataclass
class CriticConfig:
    # Model that the critic of ppo starts from; null: model.partial_pretrain.
    partial_pretrain: str | None = None
    # The critic's optimizer.
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5, lr_scheduler="constant", warmup_steps_ratio=0.0))
    # Number of first steps in which only the critic is trained.
    warmup_steps: int = 0


@dataclass
class MappingConfig:
    # Ranks of each role: "all", or a list such as [0,1]. All roles but the rollout have the same ranks; the rollout has the same ranks, or
    # all others.
    actor: Any = "all"
    critic: Any = "all"
    reference: Any = "all"
    reward: Any = "all"
    rollout: Any = "all"


@dataclass
class PPOConfig:
    """`python -m verl.trainer.ppo_trainer`: reinforcement learning from a fine-tuned checkpoint."""

    data: PromptConfig = field(default_factory=PromptConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-6, lr_scheduler="constant", warmup_steps_ratio=0.0))
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(project_name="verl-rl", save_freq=-1, test_freq=-1))
    dist: DistConfig = field(default_factory=DistConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    mapping: MappingConfig = field(default_factory=MappingConfig)

    def check(self) -> None:
        """Cross-field checks. Raises UserError naming the key."""
        check_model(self.model)
        for optim, key in ((self.optim, "optim"), (self.critic.optim, "critic.optim")):
            check_optim(optim, key)
            check_offload(self.model, optim, key)
        check_trainer(self.trainer)
        check_agent(self.agent, self.rollout, self.environment.name)  # an agent gives a reward too, so it is named first if it is missing
        check_best(self.trainer, self.data.val_files, measured(self.reward, self.reward_model, self.environment.name or self.agent.program))
        check_dist(self.dist)
        check_samples(self.data)
        check_batches(self)
        one_of("algorithm.old_logprobs", self.algorithm.old_logprobs, ("trainer", "rollout"))
        at_least("algorithm.max_refills", self.algorithm.max_refills, 0)
        check_teacher(self.teacher, TeacherConfig())
        of_episodes = self.environment.name or self.agent.program
        check_environment(self.environment, self.rollout)
        check_rewards(self.reward, self.reward_model, of_episodes, needed=not is_alone(self.teacher))
        check_mapping(self.mapping)
        check_engine(self.rollout, self.mapping)
        check_oversampling(self.rollout, self.mapping)
        one_of("data.overlong_prompts", self.data.overlong_prompts, ("error", "drop"))
        one_of("data.share_prompts", self.data.share_prompts, ("auto", "never"))
        at_least("rollout.max_sequences", self.rollout.max_sequences, 1)
        at_least("rollout.max_turns", self.rollout.max_turns, 1)
        check_staleness(self.rollout, self.algorithm)
        one_of("rollout.on_error", self.rollout.on_error, ("stop", "reply"))
        at_least("critic.warmup_steps", self.critic.warmup_steps, 0)
        if not 0.0 < self.rollout.temperature < float("inf"):
            what = f"{self.rollout.temperature} is not positive: equal answers have no advantages to learn from"
            raise UserError(what, where="rollout.temperature", fix="give a number above 0, such as 1.0")
        if self.model.lora_dropout > 0:
            what = "dropout is off in reinforcement learning: it would make new log-probabilities differ from old ones"
            raise UserError(what, where="model.lora_dropout", fix="remove this key")
        if self.model.context_parallel_size != 1:
            what = "context parallelism is not supported in reinforcement learning"
            raise UserError(what, where="model.context_parallel_size", fix="set it to 1")


def check_batches(config: PPOConfig) -> None:
    """Check the batch sizes of a step. Raises UserError naming the key."""
    data, rollout, updates = config.data, config.rollout, config.algorithm.updates_per_step
    at_least("data.prompts_per_step", data.prompts_per_step, 1)
    at_least("data.max_prompt_length", data.max_prompt_length, 1)
    at_least("rollout.samples_per_prompt", rollout.samples_per_prompt, 1)
    at_least("rollout.max_new_tokens", rollout.max_new_tokens, 1)
    at_least("algorithm.updates_per_step", updates, 1)
    if data.prompts_per_step % updates:
        fits = [str(n) for n in range(1, data.prompts_per_step + 1) if data.prompts_per_step % n == 0]
        raise UserError(
            f"{data.prompts_per_step} prompts cannot be split into {updates} equal updates",
            where="algorithm.updates_per_step",
            fix=f"give one of {', '.join(fits)}, or another data.prompts_per_step",
        )
    budget, longest = data.max_tokens_per_micro_batch, longest_sample(config)
    if budget is not None and budget < longest:
        raise UserError(
            f"{budget} tokens cannot hold a prompt of {data.max_prompt_length} with an answer of {longest - data.max_prompt_length}",
            where="data.max_tokens_per_micro_batch",
            fix=f"give at least {longest}, or lower data.max_prompt_length or rollout.max_new_tokens",
        )


def longest_sample(config: PPOConfig) -> int:
    """Return the number of tokens of the longest prompt with the longest answer."""
    return config.data.max_prompt_length + config.rollout.max_new_tokens


def check_mapping(mapping: MappingConfig) -> None:
    """Check that each role has "all" or a list of ranks. Raises UserError naming the key."""
    for role in ("actor", "critic", "reference", "reward", "rollout"):
        ranks = getattr(mapping, role)
        if ranks != "all" and not (isinstance(ranks, list) and ranks and all(type(r) is int and r >= 0 for r in ranks)):
            raise UserError(f"found {ranks!r}", where=f"mapping.{role}", fix='give "all" or a list of ranks, such as [0,1]')


def check_staleness(rollout: RolloutConfig, algorithm: AlgorithmConfig) -> None:
    """Check the keys of answers that are drawn ahead. Raises UserError naming the key."""
    one_of("rollout.staleness", rollout.staleness, (0, 1))
    if rollout.replay is not None and not rollout.partial:
        what = "without rollout.partial, the schedule does not depend on time: the same command repeats a run"
        raise UserError(what, where="rollout.replay", fix="remove this key")
    if not rollout.partial:
        return
    if rollout.staleness == 0:
        what = "unfinished answers would go on under newer weights, which are not those of one step"
        raise UserError(what, where="rollout.partial=true", fix="set rollout.staleness=1, or rollout.partial=false")
    if rollout.name in ("hf", "vllm"):
        what = f"{rollout.name} cannot stop an answer and go on with it under new weights"
        raise UserError(what, where="rollout.partial=true", fix="set rollout.name=native, or rollout.partial=false")
    if algorithm.dynamic_sampling:
        what = "which prompts are drawn next depends on the rewards of this step's answers, but they are begun before"
        raise UserError(what, where="rollout.partial=true", fix="set algorithm.dynamic_sampling=false, or rollout.partial=false")


def check_oversampling(rollout: RolloutConfig, mapping: MappingConfig) -> None:
    """Check that answers which are not needed can be abandoned. Raises UserError naming the key."""
    where = f"rollout.oversample={rollout.oversample:g}"
    if not 0.0 <= rollout.oversample <= MOST_OVERSAMPLED:
        fix = f"give a share from 0 to {MOST_OVERSAMPLED:g}, such as 0.25, which asks a quarter more prompts than a step needs"
        raise UserError(f"found {rollout.oversample}", where="rollout.oversample", fix=fix)
    if rollout.oversample == 0:
        return
    fix = "set rollout.oversample=0, or "
    if rollout.tool is not None:
        what = "an answer of several turns ends when its last turn does, and generation takes one turn at a time"
        raise UserError(what, where=f"{where} with rollout.tool={rollout.tool}", fix=f"{fix}rollout.tool=null")
    if rollout.url is not None:
        what = "a server does not tell how long unfinished answers are, so none could be abandoned before it has ended"
        raise UserError(what, where=f"{where} with rollout.url", fix=f"{fix}rollout.url=null")
    if mapping.rollout != mapping.actor:
        what = "ranks that only generate send all answers at once, so none could be abandoned"
        raise UserError(what, where=f"{where} with mapping.rollout={mapping.rollout}", fix=f"{fix}give all roles the same ranks")


def check_engine(rollout: RolloutConfig, mapping: MappingConfig) -> None:
    """Check that the generation engine can run on its ranks. Raises UserError naming the key."""
    if not 0.0 < rollout.gpu_memory_utilization <= 1.0:
        fix = "give a number above 0, up to 1, such as 0.5"
        raise UserError(f"found {rollout.gpu_memory_utilization}", where="rollout.gpu_memory_utilization", fix=fix)
    one_of("rollout.speculate", rollout.speculate, ("auto", "never"))
    if rollout.url is not None:
        return
    if rollout.name == "vllm" and mapping.rollout != mapping.actor:
        fix = "give mapping.rollout the ranks of mapping.actor, or start a server and set rollout.url"
        raise UserError("vllm in this process generates on all ranks that train, and on no others", where="mapping.rollout", fix=fix)
