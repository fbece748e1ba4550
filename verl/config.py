"""Typed configurations, the only place where a default lives. Light to import: no torch.

A value stands here as the user typed it; what is derived from it has a name of its own where it is used.
Each comment above a field is its documentation (`verl sft --help` prints it).
"""

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
    # Print the plan of the run (steps, tokens, memory of a GPU, what to change where it does not fit) and end; no weights are read.
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
        data, model, optim, trainer = self.data, self.model, self.optim, self.trainer
        one_of("data.truncation", data.truncation, ("error", "left", "right"))
        one_of("model.enable_gradient_checkpointing", model.enable_gradient_checkpointing, (True, "selective", False))
        one_of("model.compile", model.compile, ("auto", True, False))
        one_of("model.strategy", model.strategy, ("auto", "fsdp2", "fsdp", "ddp"))
        one_of("model.compute_dtype", model.compute_dtype, ("auto", "bfloat16", "float32"))
        one_of("model.param_dtype", model.param_dtype, ("float32", "bfloat16"))
        one_of("optim.name", optim.name, ("adamw", "adamw_8bit"))
        one_of("model.attn_implementation", model.attn_implementation, ("auto", "fa2", "fa3", "fa4", "short", "sdpa"))
        one_of("optim.lr_scheduler", optim.lr_scheduler, ("cosine", "linear", "constant", "wsd"))
        one_of("trainer.resume_mode", trainer.resume_mode, ("auto", "disable", "resume_path"))
        at_least("data.max_length", data.max_length, 2)
        at_least("data.micro_batch_size_per_gpu", data.micro_batch_size_per_gpu, 1)
        at_least("data.train_batch_size", data.train_batch_size, 1)
        at_least("data.num_workers", data.num_workers, 1)
        at_least("trainer.total_epochs", trainer.total_epochs, 1)
        at_least("trainer.total_training_steps", trainer.total_training_steps, 1)
        at_least("trainer.profile_step", trainer.profile_step, 1)
        at_least("trainer.seed", trainer.seed, 0)
        at_least("model.context_parallel_size", model.context_parallel_size, 1)
        at_least("model.fsdp_config.shard_size", model.fsdp_config.shard_size, 1)
        check_strategy(model)
        check_lora(model)
        at_least("optim.lr", optim.lr, 0.0)
        at_least("optim.weight_decay", optim.weight_decay, 0.0)
        for key, samples in (("train", data.train_max_samples), ("val", data.val_max_samples)):
            if samples is not None and samples != -1:
                at_least(f"data.{key}_max_samples", samples, 1)
        for key, share in (
            ("warmup_steps_ratio", optim.warmup_steps_ratio),
            ("min_lr_ratio", optim.min_lr_ratio),
            ("stable_ratio", optim.stable_ratio),
        ):
            if not 0.0 <= share <= 1.0:
                raise UserError(f"{share} is not a share", where=f"optim.{key}", fix="give a number from 0 to 1")
        if len(optim.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in optim.betas):
            raise UserError(f"found {list(optim.betas)}", where="optim.betas", fix="give two numbers from 0 to below 1, such as [0.9,0.95]")
        if not optim.clip_grad > 0:
            raise UserError(f"{optim.clip_grad} is not positive", where="optim.clip_grad", fix="give the largest allowed norm, such as 1.0")
        budget = data.max_tokens_per_micro_batch
        if budget is not None and budget < data.max_length:
            raise UserError(
                f"{budget} tokens cannot hold a row of data.max_length={data.max_length}",
                where="data.max_tokens_per_micro_batch",
                fix=f"give at least {data.max_length}, or a smaller data.max_length",
            )
        for key, value, with_offload in (("optim.name", optim.name, "adamw"), ("model.param_dtype", model.param_dtype, "float32")):
            if model.fsdp_config.cpu_offload and value != with_offload:
                raise UserError(
                    "both are there to save GPU memory, and the update in host memory is the plain one",
                    where=f"{key}={value} with model.fsdp_config.cpu_offload=true",
                    fix=f"set {key}={with_offload}, or model.fsdp_config.cpu_offload=false",
                )
        if data.messages_key and data.text_key:
            raise UserError("messages_key and text_key are both set", where="data", fix="name the one column that the rows have")
        if data.tools_key and not data.messages_key:
            raise UserError("tools_key needs messages_key", where="data.tools_key", fix="set data.messages_key to the column of the chat")
        if (trainer.resume_mode == "resume_path") != (trainer.resume_from_path is not None):
            raise UserError(
                f"resume_mode={trainer.resume_mode} and resume_from_path={trainer.resume_from_path} do not go together",
                where="trainer.resume_mode",
                fix="set trainer.resume_mode=resume_path and trainer.resume_from_path=…/global_step_N, or neither",
            )
        for key, every in (("save_freq", trainer.save_freq), ("test_freq", trainer.test_freq)):
            if every not in ("epoch", -1) and not (isinstance(every, int) and every > 0) and (key, every) != ("save_freq", "never"):
                raise UserError(
                    f"found {every!r}", where=f"trainer.{key}", fix='give a number of steps, "epoch", or -1 for only at the end'
                )
        if trainer.total_training_steps is not None and (trainer.profile_step or 0) > trainer.total_training_steps:
            raise UserError(
                f"step {trainer.profile_step} is behind the last one, {trainer.total_training_steps}",
                where="trainer.profile_step",
                fix="give a smaller step, or more in trainer.total_training_steps",
            )
        if trainer.max_ckpt_to_keep is not None and trainer.max_ckpt_to_keep != -1:
            at_least("trainer.max_ckpt_to_keep", trainer.max_ckpt_to_keep, 1)


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
    at_least("reward_model.max_tokens_per_micro_batch", model.max_tokens_per_micro_batch, 1)


def reward_names(reward: RewardConfig) -> list[str]:
    """The rewards of `reward.name`, one or several."""
    return [] if reward.name is None else [reward.name] if isinstance(reward.name, str) else list(reward.name)


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
    # Answers generated at a time.
    batch_size: int = 64
    # The grader: a name in verl/rewards or path/to/file.py.
    metric: str = "gsm8k"
    # Seed of sampling.
    seed: int = 1
    # Run Python code that comes with the model. Only for sources that you trust.
    trust_remote_code: bool = False

    def check(self) -> None:
        """Cross-field checks. Raises UserError naming the key."""
        at_least("max_new_tokens", self.max_new_tokens, 1)
        at_least("n", self.n, 1)
        at_least("batch_size", self.batch_size, 1)
        at_least("temperature", self.temperature, 0.0)
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
    # Problems to answer before and after, with numbers that were not trained.
    test_rows: int = 200
    # Seed of the problems, the weights and the order of rows.
    seed: int = 1

    def check(self) -> None:
        """Cross-field checks. Raises UserError naming the key."""
        at_least("train_rows", self.train_rows, 1)
        at_least("test_rows", self.test_rows, 1)
        at_least("seed", self.seed, 0)


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
