"""Settings of reinforcement learning."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import MISSING

from verl.config.algorithm import AlgorithmConfig
from verl.config.checks import check_model, check_offload, check_optim, check_samples, check_trainer
from verl.config.shared import ModelConfig, OptimConfig, TrainerConfig
from verl.config.values import at_least, one_of
from verl.errors import UserError
from verl.plugin import Plugins


@dataclass
class RewardConfig:
    plugins: ClassVar[Plugins] = Plugins("verl.rewards", "reward", ("score",))

    # What an answer earns: a module of verl/rewards (gsm8k, math, format), a dotted module, path/to/file.py, or a list of these;
    # null: nothing but reward_model. Those named may have keys of their own.
    name: Any = "gsm8k"
    # What each of them counts, in their order; null: 1 each.
    weights: list[float] | None = None
    # A reward that fails, or is not a number: "stop" ends the run with the row's place, "zero" counts it as 0.
    on_error: str = "stop"


@dataclass
class RewardModelConfig:
    # A model that scores answers, a sequence classifier with one label: a directory or Hub name; null: none.
    path: str | None = None
    # What its score counts beside the rewards of reward.name.
    weight: float = 1.0
    # Tokens of questions and answers that it reads at a time.
    max_tokens_per_micro_batch: int = 16384
    # Run Python code that comes with it. Only for sources that you trust.
    trust_remote_code: bool = False


def check_rewards(reward: RewardConfig, model: RewardModelConfig) -> None:
    """What answers earn. Raises UserError naming the key."""
    one_of("reward.on_error", reward.on_error, ("stop", "zero"))
    names = reward_names(reward)
    if not names and model.path is None:
        fix = "set reward.name, such as gsm8k, or reward_model.path"
        raise UserError("there is neither a reward nor a reward model", where="reward.name", fix=fix)
    if not all(isinstance(name, str) and name for name in names):
        raise UserError(f"found {reward.name!r}", where="reward.name", fix="give a name such as gsm8k, or a list such as [gsm8k,format]")
    if reward.weights is not None and len(reward.weights) != len(names):
        what = f"{len(reward.weights)} weights for {len(names)} rewards"
        raise UserError(what, where="reward.weights", fix="give one number for each name in reward.name, or leave it out")
    for key, weight in (("reward_model.weight", model.weight), *(("reward.weights", weight) for weight in reward.weights or [])):
        if not math.isfinite(weight):
            raise UserError(f"found {weight}", where=key, fix="give a finite number, such as 1.0")
    at_least("reward_model.max_tokens_per_micro_batch", model.max_tokens_per_micro_batch, 1)


def reward_names(reward: RewardConfig) -> list[str]:
    """The rewards of `reward.name`, one or several."""
    return [] if reward.name is None else list(reward.name) if isinstance(reward.name, list) else [reward.name]


@dataclass
class PromptConfig:
    # Rows to answer: a path, a list of paths, a glob, or a Hub data set id, as in fine-tuning.
    train_files: Any = MISSING
    # Rows that are answered greedily to see how far the model is; null: none.
    val_files: Any = None
    # Column of the question.
    prompt_key: str = "question"
    # Column of the right answer, which graders read as row["reference"]; null: the rows have none.
    response_key: str | None = "answer"
    # Column of a chat, a list of {role, content} that ends with the user; when set, it is used in place of prompt_key.
    messages_key: str | None = None
    # With messages_key: column of the tools that the chat template shows.
    tools_key: str | None = None
    # With prompt_key: what the model is told before each question; null: what its template says by itself.
    system_prompt: str | None = None
    # A Jinja file that takes the place of the tokenizer's chat template.
    chat_template: str | None = None
    # Prompts of one step over all GPUs.
    prompts_per_step: int = 64
    # Longest prompt, in tokens.
    max_prompt_length: int = 512
    # A prompt over max_prompt_length: "error" stops before training, "drop" leaves its row out.
    overlong_prompts: str = "error"
    # Tokens that one GPU trains on at a time, whole answers with their prompts side by side; null: 16384, or the longest that may occur.
    max_tokens_per_micro_batch: int | None = None
    # Use only the first rows; null or -1: all.
    train_max_samples: int | None = None
    val_max_samples: int | None = None


@dataclass
class RolloutConfig:
    # What generates: "native", "hf" (transformers) or "vllm".
    name: str = "native"
    # Answers to each prompt.
    samples_per_prompt: int = 8
    # Of the distribution that answers are drawn from.
    temperature: float = 1.0
    # Longest answer, in tokens; with a tool, of all turns together.
    max_new_tokens: int = 512
    # Answers side by side; null: what memory allows.
    max_sequences: int | None = None
    # Address of a vLLM server; null: generate in this process.
    url: str | None = None
    # Where new weights are put for a server to read, a folder that it sees under the same path; null: the memory of this machine,
    # if the server is on it.
    weights_folder: str | None = None
    # vllm in this process: the share of a GPU's memory that it may take while it generates.
    gpu_memory_utilization: float = 0.5
    # Let the engine give memory back while the model trains, where it is worth the time of taking it again; false: never.
    sleep: bool = True
    # What replies to the model's turns: a name in verl/tools, such as calculator, or path/to/file.py; null: an answer is one turn.
    tool: str | None = None
    # Most turns of the model in one answer.
    max_turns: int = 4


@dataclass
class CriticConfig:
    # What the critic of ppo starts from; null: model.partial_pretrain.
    partial_pretrain: str | None = None
    # Its optimizer.
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5, lr_scheduler="constant", warmup_steps_ratio=0.0))
    # First steps in which the critic learns alone.
    warmup_steps: int = 0


@dataclass
class MappingConfig:
    # Processes of each role: "all", or a list of ranks such as [0,1]. The roles that train share theirs; those of the rollout are the
    # same, or others.
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
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    mapping: MappingConfig = field(default_factory=MappingConfig)

    def check(self) -> None:
        """Cross-field checks. Raises UserError naming the key."""
        check_model(self.model)
        for optim, key in ((self.optim, "optim"), (self.critic.optim, "critic.optim")):
            check_optim(optim, key)
            check_offload(self.model, optim, key)
        check_trainer(self.trainer)
        check_samples(self.data)
        check_batches(self)
        one_of("algorithm.old_logprobs", self.algorithm.old_logprobs, ("trainer", "rollout"))
        at_least("algorithm.max_refills", self.algorithm.max_refills, 0)
        check_rewards(self.reward, self.reward_model)
        check_mapping(self.mapping)
        check_engine(self.rollout, self.mapping)
        one_of("data.overlong_prompts", self.data.overlong_prompts, ("error", "drop"))
        if self.data.tools_key and not self.data.messages_key:
            raise UserError("tools_key needs messages_key", where="data.tools_key", fix="set data.messages_key to the column of the chat")
        at_least("rollout.max_sequences", self.rollout.max_sequences, 1)
        at_least("rollout.max_turns", self.rollout.max_turns, 1)
        at_least("critic.warmup_steps", self.critic.warmup_steps, 0)
        if not 0.0 < self.rollout.temperature < float("inf"):
            what = f"{self.rollout.temperature} is not positive, and answers that are all the same teach nothing"
            raise UserError(what, where="rollout.temperature", fix="give a number above 0, such as 1.0")
        if self.model.lora_dropout > 0:
            what = "answers are learned under the probabilities that they were drawn with, and nothing is dropped there"
            raise UserError(what, where="model.lora_dropout", fix="leave it out")
        if self.model.context_parallel_size != 1:
            what = "answers are not spread over several GPUs in reinforcement learning"
            raise UserError(what, where="model.context_parallel_size", fix="set it to 1")


def check_batches(config: PPOConfig) -> None:
    """How prompts, answers and updates of a step fit together. Raises UserError naming the key."""
    data, rollout, updates = config.data, config.rollout, config.algorithm.updates_per_step
    at_least("data.prompts_per_step", data.prompts_per_step, 1)
    at_least("data.max_prompt_length", data.max_prompt_length, 1)
    at_least("rollout.samples_per_prompt", rollout.samples_per_prompt, 1)
    at_least("rollout.max_new_tokens", rollout.max_new_tokens, 1)
    at_least("algorithm.updates_per_step", updates, 1)
    if data.prompts_per_step % updates:
        fits = [str(n) for n in range(1, data.prompts_per_step + 1) if data.prompts_per_step % n == 0]
        raise UserError(
            f"{data.prompts_per_step} prompts cannot be cut into {updates} equal updates",
            where="algorithm.updates_per_step",
            fix=f"give one of {', '.join(fits)}, or another data.prompts_per_step",
        )
    budget, longest = data.max_tokens_per_micro_batch, longest_sample(config)
    if budget is not None and budget < longest:
        raise UserError(
            f"{budget} tokens cannot hold a prompt of {data.max_prompt_length} with an answer of {longest - data.max_prompt_length}",
            where="data.max_tokens_per_micro_batch",
            fix=f"give at least {longest}, or less in data.max_prompt_length or rollout.max_new_tokens",
        )


def longest_sample(config: PPOConfig) -> int:
    """Tokens of the longest prompt with the longest answer."""
    return config.data.max_prompt_length + config.rollout.max_new_tokens


def check_mapping(mapping: MappingConfig) -> None:
    """Whether each role has a list of ranks. Raises UserError naming the key."""
    for role in ("actor", "critic", "reference", "reward", "rollout"):
        ranks = getattr(mapping, role)
        if ranks != "all" and not (isinstance(ranks, list) and ranks and all(isinstance(r, int) and r >= 0 for r in ranks)):
            raise UserError(f"found {ranks!r}", where=f"mapping.{role}", fix='give "all" or a list of ranks, such as [0,1]')


def check_engine(rollout: RolloutConfig, mapping: MappingConfig) -> None:
    """Whether what generates can do so where it is to. Raises UserError naming the key."""
    if rollout.url is not None:
        return
    if rollout.name == "vllm" and mapping.rollout != mapping.actor:
        fix = "give mapping.rollout the ranks of mapping.actor, or start a server and set rollout.url"
        raise UserError("vllm in this process generates on the ranks that train, all of them", where="mapping.rollout", fix=fix)
