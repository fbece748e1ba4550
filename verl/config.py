"""Typed configurations, the only place where a default lives. Light to import: no torch.

A value stands here as the user typed it; what is derived from it has a name of its own where it is used.
Each comment above a field is its documentation (`verl sft --help` prints it).
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from verl.errors import UserError


@dataclass
class DataConfig:
    # Training rows: a path, a list of paths, a glob, or a Hub data set id. JSONL, JSON, CSV, text, Parquet, each also gzipped.
    train_files: Any = MISSING
    # Validation rows, named the same way; null: none.
    val_files: Any = None
    # Column of the question.
    prompt_key: str = "question"
    # Column of the answer.
    response_key: str = "answer"
    # Column of a chat, a list of {role, content}; when set, it is used in place of prompt_key and response_key.
    messages_key: str | None = None
    # Column of the tools that a chat may call, as JSON schemas.
    tools_key: str | None = None
    # Column of plain text that is trained whole; when set, it is used in place of prompt_key and response_key.
    text_key: str | None = None
    # A Jinja file that takes the place of the tokenizer's chat template.
    chat_template: str | None = None
    # Rows per optimizer step over all GPUs; null: micro_batch_size_per_gpu × the number of processes that take different rows.
    train_batch_size: int | None = None
    # Rows of max_length that one GPU, or those that share its micro-batches (model.context_parallel_size), hold at a time; with
    # packing their product is a budget of tokens.
    micro_batch_size_per_gpu: int = 4
    # Tokens that they hold at a time; null: micro_batch_size_per_gpu × max_length.
    max_tokens_per_micro_batch: int | None = None
    # Longest row, in tokens.
    max_length: int = 1024
    # A row over max_length: "error" stops before training, "left" cuts its beginning, "right" its end.
    truncation: str = "error"
    # Whole documents side by side up to the token budget; false: one row a line, padded to the longest of the micro-batch.
    packing: bool = True
    # Use only the first rows; null or -1: all.
    train_max_samples: int | None = None
    val_max_samples: int | None = None
    # Processes that tokenize; null: one per CPU core.
    num_workers: int | None = None
    # Where tokenized rows are kept between runs; null: ~/.cache/verl (or $XDG_CACHE_HOME/verl).
    cache_dir: str | None = None


@dataclass
class FsdpConfig:
    # Keep parameters, gradients and optimizer state in host memory.
    cpu_offload: bool = False
    # GPUs that share one copy of the weights, such as those of a node; groups of so many hold copies of each other. null: all.
    shard_size: int | None = None
    # Give a layer's whole weights away after its forward pass and get them again for the backward pass: less memory, more traffic.
    reshard_after_forward: bool = True


@dataclass
class ModelConfig:
    # A Hugging Face model directory or Hub name.
    partial_pretrain: str = MISSING
    # How the model is spread over GPUs: "fsdp2" (sharded; "fsdp" is read as fsdp2), "ddp" (all of it on each, faster where it is
    # small), or "auto" (ddp where weights, gradients and optimizer take no more than a quarter of a GPU).
    strategy: str = "auto"
    # GPUs that share each micro-batch, every document's tokens spread over them: for documents too long for one GPU.
    context_parallel_size: int = 1
    # Compute activations again in the backward pass: true (least memory), "selective" (some of them) or false (fastest).
    enable_gradient_checkpointing: Any = True
    # Compile the layers with torch.compile: true, false, or "auto" (on a GPU, when the run is long enough to earn it back).
    compile: Any = "auto"
    # Run micro-batches that are too small to keep a GPU busy as CUDA graphs: "auto" (with compiled layers, on one GPU) or false.
    cuda_graphs: Any = "auto"
    # Use Liger's kernels (pip install "verl[liger]").
    use_liger: bool = False
    # Rank of LoRA adapters; 0: train all weights.
    lora_rank: int = 0
    # Scale of LoRA adapters: their product is multiplied by lora_alpha / lora_rank.
    lora_alpha: float = 16
    # Modules that get adapters: "all-linear" (all but the output layer), a list of names, or a regular expression of whole names.
    target_modules: Any = "all-linear"
    # Share of what goes into an adapter that is dropped at random in training.
    lora_dropout: float = 0.0
    # Rank-stabilized LoRA: the scale is lora_alpha / sqrt(lora_rank).
    use_rslora: bool = False
    # DoRA: the length of each row of an adapted weight is trained by itself; slower.
    use_dora: bool = False
    # Go on from this adapter directory; its rank, scale and modules are then those of the run.
    lora_adapter_path: str | None = None
    # Tokens whose embeddings are trained beside the adapter: a list such as [<|im_end|>], or "stop", the token that ends an answer.
    trainable_tokens: Any = None
    # Keep the frozen weights of an adapter run in 4 bits (QLoRA's NF4; pip install "verl[4bit]").
    load_in_4bit: bool = False
    fsdp_config: FsdpConfig = field(default_factory=FsdpConfig)
    # Arithmetic of the forward and backward pass: "auto" (bfloat16 on CUDA, float32 on CPU), "bfloat16" or "float32".
    compute_dtype: str = "auto"
    # Weights that the optimizer updates: "float32", or "bfloat16", rounded stochastically, in half the memory (a CPU needs "verl[8bit]").
    param_dtype: str = "float32"
    # Attention on a GPU in bfloat16: "auto" (the newest FlashAttention that is installed and passes a trial), "fa2" (inside
    # PyTorch), "fa3", "fa4", "short" (kernels of our own for short documents), or "sdpa" (plain, one document at a time).
    attn_implementation: str = "auto"
    # Run Python code that comes with the model. Only for sources that you trust.
    trust_remote_code: bool = False


@dataclass
class OptimConfig:
    # "adamw" with moments in float32, or "adamw_8bit" with moments in a quarter of that (a CPU needs "verl[8bit]").
    name: str = "adamw"
    # Peak learning rate of AdamW.
    lr: float = 1e-5
    # AdamW's decay rates of the first and second moment.
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    # AdamW's decoupled weight decay, applied to every trained tensor of two or more dimensions.
    weight_decay: float = 0.01
    # Share of all steps over which the learning rate rises from 0 (upstream: lr_warmup_steps_ratio).
    warmup_steps_ratio: float = 0.1
    # After warm-up: "cosine", "linear", "constant" or "wsd" (warm-up, stable, decay).
    lr_scheduler: str = "cosine"
    # Where cosine, linear and wsd end, as a share of lr.
    min_lr_ratio: float = 0.0
    # wsd: share of the steps after warm-up at full learning rate.
    stable_ratio: float = 0.9
    # Largest global gradient norm; larger gradients are scaled down to it.
    clip_grad: float = 1.0


@dataclass
class TrainerConfig:
    # Passes over the training rows.
    total_epochs: int = 1
    # Stop after so many optimizer steps, over as many epochs as they take; null: total_epochs decides.
    total_training_steps: int | None = None
    # Names of the project and of this run in loggers and paths.
    project_name: str = "verl-sft"
    experiment_name: str = "run"
    # Where checkpoints, metrics and logs go.
    default_local_dir: str = "checkpoints/${trainer.project_name}/${trainer.experiment_name}"
    # A name, a list of names (console, wandb, tensorboard, trackio) or path/to/file.py. metrics.jsonl is always written.
    logger: Any = "console"
    # A checkpoint each so many steps; "epoch": at each epoch's end; -1: only at the end; "never": none, to try settings out.
    save_freq: int | str = "epoch"
    # Validation loss each so many steps; "epoch": at each epoch's end; -1: only at the end.
    test_freq: int | str = "epoch"
    # Keep so many newest checkpoints; null or -1: all.
    max_ckpt_to_keep: int | None = None
    # "auto" goes on from the newest checkpoint in default_local_dir, "disable" starts anew, "resume_path" goes on from resume_from_path.
    resume_mode: str = "auto"
    # A global_step_N directory, for resume_mode=resume_path.
    resume_from_path: str | None = None
    # Record where the time goes in this step, counted from 1 as logged, and the two after it, into default_local_dir/profile.
    profile_step: int | None = None
    # Print the plan of the run (steps and tokens; of fine-tuning also memory of a GPU, and what to change where it does not fit) and end.
    # No weights are read.
    dry_run: bool = False
    # Seed of row order, adapters and dropout.
    seed: int = 1


@dataclass
class SFTConfig:
    """`python -m verl.trainer.fsdp_sft_trainer`: supervised fine-tuning."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def check(self) -> None:
        """Cross-field checks. Raises UserError naming the key."""
        data = self.data
        check_model(self.model)
        check_optim(self.optim)
        check_offload(self.model, self.optim)
        check_trainer(self.trainer)
        one_of("data.truncation", data.truncation, ("error", "left", "right"))
        at_least("data.max_length", data.max_length, 2)
        at_least("data.micro_batch_size_per_gpu", data.micro_batch_size_per_gpu, 1)
        at_least("data.train_batch_size", data.train_batch_size, 1)
        at_least("data.num_workers", data.num_workers, 1)
        at_least("model.context_parallel_size", self.model.context_parallel_size, 1)
        check_samples(data)
        budget = data.max_tokens_per_micro_batch
        if budget is not None and budget < data.max_length:
            raise UserError(
                f"{budget} tokens cannot hold a row of data.max_length={data.max_length}",
                where="data.max_tokens_per_micro_batch",
                fix=f"give at least {data.max_length}, or a smaller data.max_length",
            )
        if data.messages_key and data.text_key:
            raise UserError("messages_key and text_key are both set", where="data", fix="name the one column that the rows have")
        if data.tools_key and not data.messages_key:
            raise UserError("tools_key needs messages_key", where="data.tools_key", fix="set data.messages_key to the column of the chat")


@dataclass
class RewardConfig:
    # What an answer earns: a module of verl/rewards (gsm8k, math, format), a dotted module, path/to/file.py, or a list of these;
    # null: nothing but reward_model.
    name: Any = "gsm8k"
    # What each of them counts, in their order; null: 1 each.
    weights: list[float] | None = None
    # Regular expressions that an answer must match one after the other, for the reward "format"; null: its own, `#### number` at the end.
    format: list[str] | None = None
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
class AlgorithmConfig:
    # The method: a name in verl/algorithms (ppo, grpo, dr_grpo, rloo, reinforce, dapo, gspo) or path/to/file.py. A key below that
    # is null is what the method's own file says.
    name: str = "grpo"
    # Optimizer steps on the answers of one step, each on as many prompts.
    updates_per_step: int = 1
    # The ratio of new to old probability counts up to 1 - clip_ratio_low and 1 + clip_ratio_high.
    clip_ratio_low: float | None = None
    clip_ratio_high: float | None = None
    # A bound on the loss where the advantage is negative and the ratio large, such as 3.0; null: none.
    dual_clip: float | None = None
    # Discount of a reward for each token that it lies ahead.
    gamma: float = 1.0
    # How far the advantage looks ahead before it trusts the critic (GAE): 0 one token, 1 to the end.
    lam: float = 1.0
    # Shift and scale all advantages of a step to mean 0 and variance 1.
    whiten_advantages: bool | None = None
    # Divide a group's advantages by the standard deviation of its rewards.
    norm_by_std: bool | None = None
    # "token-mean" over all tokens of an update, "sequence-mean" over the answers' means, or "constant": sum / (answers × max_new_tokens).
    loss_aggregation: str | None = None
    # Keep the model that the run starts from, to log how far the actor has gone from it; false saves its memory and time.
    keep_reference: bool = True
    # Weight of the KL divergence from that reference.
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
    # A new value counts up to this far from the old one; null: any.
    value_clip: float | None = 0.2
    # Log-probabilities before the update: of the "trainer", or of the "rollout" as it drew the answers.
    old_logprobs: str = "trainer"
    # Correct for a rollout whose probabilities are not the trainer's: "truncate" weights at importance_cap, "mask" tokens above it.
    importance_weights: str | None = None
    importance_cap: float = 2.0
    # Leave out groups whose answers all have the same reward, and draw further prompts in their place.
    dynamic_sampling: bool | None = None
    # Times that further prompts are drawn in one step.
    max_refills: int = 3
    # Answers that come within so many tokens of max_new_tokens lose up to overlong_penalty of their reward; 0: none.
    overlong_buffer_tokens: int = 0
    overlong_penalty: float = 1.0


@dataclass
class RolloutConfig:
    # What generates: "native", "hf" (transformers), "vllm" or "sglang".
    name: str = "native"
    # Answers to each prompt.
    samples_per_prompt: int = 8
    # Of the distribution that answers are drawn from.
    temperature: float = 1.0
    # Longest answer, in tokens; with a tool, of all turns together.
    max_new_tokens: int = 512
    # Answers side by side; null: what memory allows.
    max_sequences: int | None = None
    # A server's address (vllm, sglang); null: in this process.
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
        check_algorithm(self.algorithm)
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


@dataclass
class PairsConfig:
    # Pairs of answers, the better one chosen: a path, a list of paths, a glob, or a Hub data set id, as in fine-tuning.
    train_files: Any = MISSING
    # Pairs to validate with, named the same way; null: none.
    val_files: Any = None
    # Column of what was asked, as text or as a list of {role, content}. Rows whose answers are whole chats need none. null: there is none,
    # and answers that are texts are whole texts: without a chat template, and what both begin with is what was asked.
    prompt_key: str | None = "prompt"
    # Columns of the better and the worse answer: each a text, a list of {role, content} behind the prompt, or a whole chat, which without
    # a column of prompts may be text with "Human:" and "Assistant:" before its turns.
    chosen_key: str = "chosen"
    rejected_key: str = "rejected"
    # A Jinja file that takes the place of the tokenizer's chat template.
    chat_template: str | None = None
    # Pairs per optimizer step over all GPUs; null: micro_batch_size_per_gpu × the number of processes.
    train_batch_size: int | None = None
    # Pairs of twice max_length that one GPU holds at a time; their product is a budget of tokens.
    micro_batch_size_per_gpu: int = 4
    # Tokens that it holds at a time; null: micro_batch_size_per_gpu × 2 × max_length.
    max_tokens_per_micro_batch: int | None = None
    # Longest answer with what was asked, in tokens.
    max_length: int = 1024
    # A row with one over max_length: "error" stops before training, "left" cuts its beginning, "right" its end.
    truncation: str = "error"
    # Use only the first rows; null or -1: all.
    train_max_samples: int | None = None
    val_max_samples: int | None = None
    # Processes that tokenize; null: one per CPU core.
    num_workers: int | None = None
    # Where tokenized rows are kept between runs; null: ~/.cache/verl (or $XDG_CACHE_HOME/verl).
    cache_dir: str | None = None


@dataclass
class PreferenceConfig:
    # "bradley_terry" trains a reward model, a classifier with one score for a whole answer; "dpo" trains the answering model itself.
    name: str = "bradley_terry"
    # dpo: how close the model is held to the one that it starts from; the larger the closer.
    beta: float = 0.1
    # dpo: the share of pairs that are thought to be the wrong way round.
    label_smoothing: float = 0.0


@dataclass
class RewardTrainerConfig:
    """`python -m verl.trainer.reward_trainer`: a reward model, or by algorithm.name=dpo a policy, from pairs of answers."""

    data: PairsConfig = field(default_factory=PairsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    algorithm: PreferenceConfig = field(default_factory=PreferenceConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(project_name="verl-reward"))

    def check(self) -> None:
        """Cross-field checks. Raises UserError naming the key."""
        data, model = self.data, self.model
        one_of("algorithm.name", self.algorithm.name, ("bradley_terry", "dpo"))
        check_model(model)
        check_optim(self.optim)
        check_offload(model, self.optim)
        check_trainer(self.trainer)
        check_samples(data)
        one_of("data.truncation", data.truncation, ("error", "left", "right"))
        at_least("data.max_length", data.max_length, 2)
        at_least("data.micro_batch_size_per_gpu", data.micro_batch_size_per_gpu, 1)
        at_least("data.train_batch_size", data.train_batch_size, 1)
        at_least("data.num_workers", data.num_workers, 1)
        if not 0.0 < self.algorithm.beta < float("inf"):
            raise UserError(f"{self.algorithm.beta} is not positive", where="algorithm.beta", fix="give a positive number, such as 0.1")
        if not 0.0 <= self.algorithm.label_smoothing < 0.5:
            what, fix = f"{self.algorithm.label_smoothing} is not below a half", "give a share from 0 to below 0.5"
            raise UserError(what, where="algorithm.label_smoothing", fix=fix)
        if data.max_tokens_per_micro_batch is not None and data.max_tokens_per_micro_batch < 2 * data.max_length:
            raise UserError(
                f"{data.max_tokens_per_micro_batch} tokens cannot hold a pair of data.max_length={data.max_length} each",
                where="data.max_tokens_per_micro_batch",
                fix=f"give at least {2 * data.max_length}, or a smaller data.max_length",
            )
        if self.model.context_parallel_size != 1:
            raise UserError("pairs are not spread over several GPUs", where="model.context_parallel_size", fix="set it to 1")
        if self.algorithm.name == "bradley_terry" and (model.lora_rank > 0 or model.lora_adapter_path is not None):
            fix = "leave model.lora_rank and model.lora_adapter_path out, or set algorithm.name=dpo"
            key = "model.lora_rank" if model.lora_rank > 0 else "model.lora_adapter_path"
            raise UserError("a reward model is trained whole, without adapters", where=key, fix=fix)


@dataclass
class EngineConfig:
    # What generates: "native", "hf" (transformers), "vllm" or "sglang".
    name: str = "native"
    # A server's address (vllm, sglang); null: in this process.
    url: str | None = None
    # vllm in this process: the share of a GPU's memory that it may take.
    gpu_memory_utilization: float = 0.5


@dataclass
class EvalConfig:
    """`python -m verl.eval.sft_evaluator`: exact match of a checkpoint on a file of questions and answers."""

    # A checkpoint: a Hugging Face model directory, a LoRA adapter directory, or a Hub name.
    model_path: str = MISSING
    # Rows to answer, named as in data.train_files.
    test_file: Any = MISSING
    # Column of the question.
    prompt_key: str = "question"
    # Column of the reference answer.
    response_key: str = "answer"
    # Column of a chat to answer, in place of prompt_key: a list of messages, whose last answer is the reference where response_key is no
    # column.
    messages_key: str | None = None
    # With messages_key: column of the tools that the chat template shows.
    tools_key: str | None = None
    # What the model is told before each question; null: what its template says by itself.
    system_prompt: str | None = None
    # Where results.json and predictions.jsonl go.
    output_dir: str = MISSING
    # Longest answer, in tokens.
    max_new_tokens: int = 512
    # Use only the first rows; null or -1: all.
    max_samples: int | None = None
    # Answers per question; exact match is their mean.
    n: int = 1
    # 0: the most likely token each time; above: sample.
    temperature: float = 0.0
    # Keep only so many of the most likely tokens in the draws; 0: all.
    top_k: int = 0
    # Keep only the most likely tokens that have this share of the probability; 1: all.
    top_p: float = 1.0
    # Answers generated at a time; null: what memory allows.
    batch_size: int | None = None
    rollout: EngineConfig = field(default_factory=EngineConfig)
    # The grader: a name in verl/rewards or path/to/file.py.
    metric: str = "gsm8k"
    # Seed of sampling.
    seed: int = 1
    # Run Python code that comes with the model. Only for sources that you trust.
    trust_remote_code: bool = False

    def check(self) -> None:
        """Cross-field checks. Raises UserError naming the key."""
        if self.tools_key and not self.messages_key:
            raise UserError("tools_key needs messages_key", where="tools_key", fix="set messages_key to the column of the chat")
        if self.system_prompt is not None and self.messages_key:
            what = "messages_key and system_prompt are both set"
            raise UserError(what, where="system_prompt", fix="leave it out: a chat begins with its own")
        at_least("max_new_tokens", self.max_new_tokens, 1)
        at_least("n", self.n, 1)
        at_least("batch_size", self.batch_size, 1)
        at_least("temperature", self.temperature, 0.0)
        at_least("top_k", self.top_k, 0)
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"{self.top_p} is not a share", where="top_p", fix="give a number above 0, up to 1")
        if self.max_samples is not None and self.max_samples != -1:
            at_least("max_samples", self.max_samples, 1)
        if self.n > 1 and self.temperature == 0:
            raise UserError(f"n={self.n} answers at temperature=0 are all the same", where="n", fix="set temperature=1, or n=1")


@dataclass
class ChatConfig:
    """`verl chat DIR`: talk with a checkpoint in the terminal."""

    # A checkpoint: a Hugging Face model directory, a LoRA adapter directory, or a Hub name. `verl chat DIR` says the same.
    model_path: str = MISSING
    # 0: the most likely token each time; above: sample.
    temperature: float = 0.7
    # Longest answer, in tokens.
    max_new_tokens: int = 512
    # What the model is told before the chat; null: what its template says by itself.
    system: str | None = None
    rollout: EngineConfig = field(default_factory=EngineConfig)
    # Run Python code that comes with the model. Only for sources that you trust.
    trust_remote_code: bool = False

    def check(self) -> None:
        """Cross-field checks. Raises UserError naming the key."""
        at_least("temperature", self.temperature, 0.0)
        at_least("max_new_tokens", self.max_new_tokens, 1)


@dataclass
class ExportConfig:
    """`verl export SRC DIR`: a checkpoint as one Hugging Face directory, an adapter merged into its base."""

    # What to export: a LoRA adapter directory, a model directory, or a run's directory, of which the newest checkpoint is taken.
    source: str = MISSING
    # Where to; must not exist yet, or be empty. `verl export SRC DIR` says the same as source=SRC directory=DIR.
    directory: str = MISSING
    # Numbers of the weights: "bfloat16", "float16" or "float32"; null: those of the base.
    dtype: str | None = None
    # Largest file of weights.
    max_shard_size: str = "5GB"
    # Run Python code that comes with the model. Only for sources that you trust.
    trust_remote_code: bool = False

    def check(self) -> None:
        """Cross-field checks. Raises UserError naming the key."""
        one_of("dtype", self.dtype, (None, "bfloat16", "float16", "float32"))
        if re.fullmatch(r"[1-9]\d*(\.\d+)? *(KB|MB|GB|TB)", self.max_shard_size, re.IGNORECASE) is None:
            raise UserError(f"found {self.max_shard_size!r}", where="max_shard_size", fix="give a size such as 5GB or 500MB")


@dataclass
class DemoConfig:
    """`verl demo`: from made-up word problems to a small model that answers them, offline. Its files are in ./demo-run."""

    # Problems to train on, each once.
    train_rows: int = 24000
    # Steps of reinforcement learning from an early checkpoint.
    rl_steps: int = 60
    # Problems to answer before and after, with numbers that were not trained.
    test_rows: int = 200
    # Seed of the problems, the weights and the order of rows.
    seed: int = 1

    def check(self) -> None:
        """Cross-field checks. Raises UserError naming the key."""
        at_least("train_rows", self.train_rows, 1)
        at_least("rl_steps", self.rl_steps, 1)
        at_least("test_rows", self.test_rows, 1)
        at_least("seed", self.seed, 0)


def check_model(model: ModelConfig) -> None:
    """The keys of a model that is trained. Raises UserError naming the key."""
    one_of("model.enable_gradient_checkpointing", model.enable_gradient_checkpointing, (True, "selective", False))
    one_of("model.compile", model.compile, ("auto", True, False))
    one_of("model.cuda_graphs", model.cuda_graphs, ("auto", False))
    one_of("model.strategy", model.strategy, ("auto", "fsdp2", "fsdp", "ddp"))
    one_of("model.compute_dtype", model.compute_dtype, ("auto", "bfloat16", "float32"))
    one_of("model.param_dtype", model.param_dtype, ("float32", "bfloat16"))
    one_of("model.attn_implementation", model.attn_implementation, ("auto", "fa2", "fa3", "fa4", "short", "sdpa"))
    at_least("model.fsdp_config.shard_size", model.fsdp_config.shard_size, 1)
    check_strategy(model)
    check_lora(model)


def check_optim(optim: OptimConfig, key: str = "optim") -> None:
    """An optimizer and its schedule. Raises UserError naming the key, which begins with `key`."""
    one_of(f"{key}.name", optim.name, ("adamw", "adamw_8bit"))
    one_of(f"{key}.lr_scheduler", optim.lr_scheduler, ("cosine", "linear", "constant", "wsd"))
    at_least(f"{key}.lr", optim.lr, 0.0)
    at_least(f"{key}.weight_decay", optim.weight_decay, 0.0)
    for name in ("warmup_steps_ratio", "min_lr_ratio", "stable_ratio"):
        share = getattr(optim, name)
        if not 0.0 <= share <= 1.0:
            raise UserError(f"{share} is not a share", where=f"{key}.{name}", fix="give a number from 0 to 1")
    if len(optim.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in optim.betas):
        raise UserError(f"found {list(optim.betas)}", where=f"{key}.betas", fix="give two numbers from 0 to below 1, such as [0.9,0.95]")
    if not optim.clip_grad > 0:
        raise UserError(f"{optim.clip_grad} is not positive", where=f"{key}.clip_grad", fix="give the largest allowed norm, such as 1.0")


def check_offload(model: ModelConfig, optim: OptimConfig, key: str = "optim") -> None:
    """What offloading cannot be together with."""
    for name, value, with_offload in ((f"{key}.name", optim.name, "adamw"), ("model.param_dtype", model.param_dtype, "float32")):
        if model.fsdp_config.cpu_offload and value != with_offload:
            raise UserError(
                "both are there to save GPU memory, and the update in host memory is the plain one",
                where=f"{name}={value} with model.fsdp_config.cpu_offload=true",
                fix=f"set {name}={with_offload}, or model.fsdp_config.cpu_offload=false",
            )


def check_trainer(trainer: TrainerConfig) -> None:
    """Length, files and checkpoints of a run. Raises UserError naming the key."""
    loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    if not all(isinstance(name, str) and name for name in loggers):
        fix = "give a name such as console, or a list such as [console,wandb]"
        raise UserError(f"found {trainer.logger!r}", where="trainer.logger", fix=fix)
    one_of("trainer.resume_mode", trainer.resume_mode, ("auto", "disable", "resume_path"))
    at_least("trainer.total_epochs", trainer.total_epochs, 1)
    at_least("trainer.total_training_steps", trainer.total_training_steps, 1)
    at_least("trainer.profile_step", trainer.profile_step, 1)
    at_least("trainer.seed", trainer.seed, 0)
    if (trainer.resume_mode == "resume_path") != (trainer.resume_from_path is not None):
        raise UserError(
            f"resume_mode={trainer.resume_mode} and resume_from_path={trainer.resume_from_path} do not go together",
            where="trainer.resume_mode",
            fix="set trainer.resume_mode=resume_path and trainer.resume_from_path=…/global_step_N, or neither",
        )
    for key, every in (("save_freq", trainer.save_freq), ("test_freq", trainer.test_freq)):
        if every not in ("epoch", -1) and not (isinstance(every, int) and every > 0) and (key, every) != ("save_freq", "never"):
            raise UserError(f"found {every!r}", where=f"trainer.{key}", fix='give a number of steps, "epoch", or -1 for only at the end')
    if trainer.total_training_steps is not None and (trainer.profile_step or 0) > trainer.total_training_steps:
        raise UserError(
            f"step {trainer.profile_step} is behind the last one, {trainer.total_training_steps}",
            where="trainer.profile_step",
            fix="give a smaller step, or more in trainer.total_training_steps",
        )
    if trainer.max_ckpt_to_keep is not None and trainer.max_ckpt_to_keep != -1:
        at_least("trainer.max_ckpt_to_keep", trainer.max_ckpt_to_keep, 1)


def check_samples(data: DataConfig | PromptConfig | PairsConfig) -> None:
    """Limits on the number of rows. Raises UserError naming the key."""
    for key, samples in (("train", data.train_max_samples), ("val", data.val_max_samples)):
        if samples is not None and samples != -1:
            at_least(f"data.{key}_max_samples", samples, 1)


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


def check_algorithm(algorithm: AlgorithmConfig) -> None:
    """A method's own keys. Raises UserError naming the key."""
    one_of("algorithm.loss_aggregation", algorithm.loss_aggregation, (None, "token-mean", "sequence-mean", "constant"))
    one_of("algorithm.kl_in", algorithm.kl_in, ("loss", "reward"))
    one_of("algorithm.kl_estimator", algorithm.kl_estimator, (None, "k1", "k2", "k3"))
    one_of("algorithm.old_logprobs", algorithm.old_logprobs, ("trainer", "rollout"))
    one_of("algorithm.importance_weights", algorithm.importance_weights, (None, "truncate", "mask"))
    for key in ("clip_ratio_low", "clip_ratio_high", "kl_coef", "kl_target", "value_clip", "overlong_penalty", "entropy_coef"):
        at_least(f"algorithm.{key}", getattr(algorithm, key), 0.0)
    for key in ("dual_clip", "importance_cap", "kl_horizon"):
        at_least(f"algorithm.{key}", getattr(algorithm, key), 1.0)
    at_least("algorithm.max_refills", algorithm.max_refills, 0)
    at_least("algorithm.overlong_buffer_tokens", algorithm.overlong_buffer_tokens, 0)
    for key in ("gamma", "lam"):
        if not 0.0 <= getattr(algorithm, key) <= 1.0:
            raise UserError(f"{getattr(algorithm, key)} is not a share", where=f"algorithm.{key}", fix="give a number from 0 to 1")
    if algorithm.kl_coef > 0 and not algorithm.keep_reference:
        fix = "set algorithm.keep_reference=true, or algorithm.kl_coef=0"
        raise UserError("the divergence needs a reference", where="algorithm.kl_coef with algorithm.keep_reference=false", fix=fix)
    if algorithm.kl_target == 0:
        raise UserError("a divergence is never 0", where="algorithm.kl_target", fix="give a positive number, such as 0.01")
    if algorithm.kl_target is not None and algorithm.kl_coef == 0:
        fix = "give algorithm.kl_coef to begin with, such as 0.01"
        raise UserError("an adaptive coefficient cannot start from 0", where="algorithm.kl_target with algorithm.kl_coef=0", fix=fix)
    if algorithm.old_logprobs == "rollout" and algorithm.importance_weights is not None:
        raise UserError(
            "the old log-probabilities are the rollout's own, so that nothing is left to correct",
            where=f"algorithm.importance_weights={algorithm.importance_weights} with algorithm.old_logprobs=rollout",
            fix="set algorithm.old_logprobs=trainer, or algorithm.importance_weights=null",
        )


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
    if rollout.name == "sglang":
        raise UserError("sglang generates in a server of its own", where="rollout.url", fix="start one, and give its address")
    if rollout.name == "vllm" and mapping.rollout != mapping.actor:
        fix = "give mapping.rollout the ranks of mapping.actor, or start a server and set rollout.url"
        raise UserError("vllm in this process generates on the ranks that train, all of them", where="mapping.rollout", fix=fix)


def check_strategy(model: ModelConfig) -> None:
    """What "ddp" cannot be together with."""
    if model.strategy != "ddp":
        return
    for key, value, needed in (
        ("model.fsdp_config.cpu_offload", model.fsdp_config.cpu_offload, False),
        ("model.fsdp_config.shard_size", model.fsdp_config.shard_size, None),
        ("model.param_dtype", model.param_dtype, "float32"),
    ):
        if value != needed:
            why = "copies that are rounded at random would part ways" if key == "model.param_dtype" else "ddp keeps all weights on each GPU"
            raise UserError(why, where=f"{key}={value} with model.strategy=ddp", fix="set model.strategy=fsdp2")


def check_lora(model: ModelConfig) -> None:
    """The adapter's keys. Raises UserError naming the key."""
    if model.lora_rank < 0:
        fix = "give a positive rank, such as 32, or 0 to train all weights without an adapter"
        raise UserError(f"found {model.lora_rank}", where="model.lora_rank", fix=fix)
    if not 0 < model.lora_alpha < float("inf"):
        raise UserError(f"{model.lora_alpha} is not positive", where="model.lora_alpha", fix="give a positive number, such as 16")
    if not 0.0 <= model.lora_dropout < 1.0:
        raise UserError(f"{model.lora_dropout} is not a share", where="model.lora_dropout", fix="give a number from 0 to below 1")
    if model.lora_rank == 0 and model.lora_adapter_path is None:
        for key in ("lora_dropout", "use_rslora", "use_dora", "trainable_tokens", "load_in_4bit"):
            if getattr(model, key):
                fix = "set model.lora_rank, such as 32, or leave this key out"
                raise UserError("is for adapters, and model.lora_rank=0 trains all weights", where=f"model.{key}", fix=fix)
    if model.load_in_4bit and model.fsdp_config.cpu_offload:
        raise UserError(
            "weights in 4 bits stay on the GPU",
            where="model.load_in_4bit=true with model.fsdp_config.cpu_offload=true",
            fix="set one of them to false",
        )


def one_of(key: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise UserError(f"found {value!r}", where=key, fix=f"one of {', '.join(str(a) for a in allowed)}")


def at_least(key: str, value: float | None, least: float) -> None:
    if value is not None and not (least <= value < float("inf")):
        raise UserError(f"found {value}", where=key, fix=f"give a number of at least {least}")
