"""Settings that several trainers share: the model, the optimizer, and the run itself."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from omegaconf import MISSING

from verl.plugin import Plugins


@dataclass
class FsdpConfig:
    # Keep parameters, gradients and optimizer state in host memory.
    cpu_offload: bool = False
    # Number of GPUs that share one copy of the weights, such as those of a node; the groups are replicas (HSDP). null: all GPUs.
    shard_size: int | None = None
    # Free a layer's gathered weights after its forward pass, and gather them again for the backward pass: less memory, more traffic.
    reshard_after_forward: bool = True


@dataclass
class ModelConfig:
    # A Hugging Face model directory or Hub name.
    partial_pretrain: str = MISSING
    # Distribution of the model over GPUs: "fsdp2" (sharded; "fsdp" means the same), "ddp" (a full copy on each GPU, faster for small
    # models), or "auto" (ddp if weights, gradients and optimizer take at most a quarter of a GPU's memory).
    strategy: str = "auto"
    # Number of GPUs that share each micro-batch, each with a part of every document's tokens: for documents too long for one GPU.
    context_parallel_size: int = 1
    # Recompute activations in the backward pass: true (least memory), "selective" (only some), or false (fastest).
    enable_gradient_checkpointing: Any = True
    # Compile the layers with torch.compile: true, false, or "auto" (on a GPU, if the run is long enough to be faster with it).
    compile: Any = "auto"
    # Run micro-batches that are too small to keep a GPU busy as CUDA graphs: "auto" (with compiled layers, on one GPU), or false.
    cuda_graphs: Any = "auto"
    # Use Liger's kernels (pip install "verl[liger]").
    use_liger: bool = False
    # Rank of LoRA adapters; 0 trains all weights.
    lora_rank: int = 0
    # Scale of LoRA adapters: B A is multiplied by lora_alpha / lora_rank.
    lora_alpha: float = 16
    # Modules that get adapters: "all-linear" (no output layer, no routers), a list of names, or a regular expression for full names.
    target_modules: Any = "all-linear"
    # Dropout probability of the adapters' inputs in training.
    lora_dropout: float = 0.0
    # Rank-stabilized LoRA: the scale is lora_alpha / sqrt(lora_rank).
    use_rslora: bool = False
    # DoRA: train the magnitude of each row of an adapted weight separately; slower.
    use_dora: bool = False
    # Continue from the adapter in this directory, with its rank, scale and modules.
    lora_adapter_path: str | None = None
    # Tokens whose embeddings are trained with the adapter: a list such as [<|im_end|>], or "stop", the token that ends an answer.
    trainable_tokens: Any = None
    # Keep the frozen weights of an adapter run in 4 bits (QLoRA's NF4; pip install "verl[4bit]").
    load_in_4bit: bool = False
    fsdp_config: FsdpConfig = field(default_factory=FsdpConfig)
    # Dtype of the forward and backward pass: "auto" (bfloat16 on CUDA, float32 on CPU), "bfloat16" or "float32".
    compute_dtype: str = "auto"
    # Dtype of the trained weights: "float32", or "bfloat16" with stochastic rounding, in half the memory (a CPU needs "verl[8bit]").
    param_dtype: str = "float32"
    # Attention on a GPU in bfloat16: "auto" (the newest installed FlashAttention that passes a trial), "fa2" (part of PyTorch), "fa3",
    # "fa4", "short" (verl's own kernels for short documents), or "sdpa" (PyTorch's, one document at a time).
    attn_implementation: str = "auto"
    # Mixtures of experts: weight of the routers' load-balancing loss; null: as the model's config says (output_router_logits), 0: none.
    router_aux_loss_coef: float | None = None
    # Run Python code that comes with the model. Only for sources that you trust.
    trust_remote_code: bool = False


@dataclass
class OptimConfig:
    plugins: ClassVar[Plugins] = Plugins("verl.engine.optimizers", "optimizer", ("build", "state_bytes"))

    # "adamw" with moments in float32, "adamw_8bit" with moments in a quarter of that (a CPU needs "verl[8bit]"), or path/to/file.py. The
    # optimizer has keys of its own.
    name: str = "adamw"
    # Peak learning rate.
    lr: float = 1e-5
    # Weight decay of every trained tensor of two or more dimensions; AdamW's is decoupled.
    weight_decay: float = 0.01
    # Fraction of all steps in which the learning rate rises from 0 (in upstream verl: lr_warmup_steps_ratio).
    warmup_steps_ratio: float = 0.1
    # Schedule after warm-up: "cosine", "linear", "constant" or "wsd" (warmup-stable-decay).
    lr_scheduler: str = "cosine"
    # Final learning rate of cosine, linear and wsd, as a fraction of lr.
    min_lr_ratio: float = 0.0
    # wsd: fraction of the steps after warm-up that keep the peak learning rate.
    stable_ratio: float = 0.9
    # Maximum global gradient norm; larger gradients are scaled down to it.
    clip_grad: float = 1.0


@dataclass
class TeacherConfig:
    # Teacher, a model with the student's tokenizer: a directory, of an adapter too, or a Hub name; null: none.
    partial_pretrain: str | None = None
    # Share of the divergence from the teacher in the loss, above 0 and up to 1; the rest is the cross-entropy of the answers in verl sft,
    # and the loss of the rewards in verl ppo.
    weight: float = 1.0
    # Divergence of the student from the teacher at each token: "reverse" (KL of the student from the teacher), "forward" (KL of the teacher
    # from the student), or "mix" (generalised Jensen-Shannon).
    divergence: str = "reverse"
    # With "mix": share of the teacher in the mixture, above 0 and below 1. Near 0 it is like "forward", near 1 like "reverse".
    beta: float = 0.5
    # Compare only the likeliest tokens of the teacher, so many at each position, and all others together as one; null: all tokens.
    top_k: int | None = None
    # Divisor of both models' logits before they are compared.
    temperature: float = 1.0
    # Run Python code that comes with the teacher. Only for sources that you trust.
    trust_remote_code: bool = False


@dataclass
class DistConfig:
    # With several processes: seconds after which one that gives no sign of life, or does not get on in a step that all take together, ends
    # the run. Work of one process alone, such as tokenizing, verifying a checkpoint or a slow reward, has no limit.
    timeout_seconds: float = 600.0


@dataclass
class TrainerConfig:
    # Passes over the training rows.
    total_epochs: int = 1
    # Number of optimizer steps, over as many epochs as they need; null: total_epochs decides.
    total_training_steps: int | None = None
    # Names of the project and of this run, in loggers and paths.
    project_name: str = "verl-sft"
    experiment_name: str = "run"
    # Directory of checkpoints, metrics and logs. If it is not given, a run with other settings than the one that is there gets a directory
    # of its own: run-2, run-3, …
    default_local_dir: str = "checkpoints/${trainer.project_name}/${trainer.experiment_name}"
    # Loggers: console, wandb, tensorboard, trackio, mlflow, swanlab, path/to/file.py, or a list. metrics.jsonl is always written.
    logger: Any = "console"
    # Save a checkpoint every N steps; "epoch": at the end of each epoch; -1: only at the end; "never": none, to try settings out.
    save_freq: int | str = "epoch"
    # Compute the validation loss every N steps; "epoch": at the end of each epoch; -1: only at the end.
    test_freq: int | str = "epoch"
    # Number of newest checkpoints to keep; null or -1: all. Damaged ones do not count, and the best one (best_metric) is kept besides.
    max_ckpt_to_keep: int | None = None
    # Write checkpoints beside training, from a copy of weights and optimizer in host memory, which each process keeps for the whole run.
    async_save: bool = False
    # Metric of the validation, such as val/loss, by which the best checkpoint is kept as default_local_dir/best. A step that improves it
    # is saved, also between two steps of save_freq. null: none.
    best_metric: str | None = None
    # Whether best_metric is best where it is smallest ("min") or largest ("max"); null: known from its name.
    best_mode: str | None = None
    # End the run after so many validations without a better best_metric. null: never.
    patience: int | None = None
    # "auto" resumes from the newest checkpoint in default_local_dir, "resume_path" from resume_from_path; "disable" starts a new run, in a
    # directory without checkpoints.
    resume_mode: str = "auto"
    # A global_step_N directory, for resume_mode=resume_path.
    resume_from_path: str | None = None
    # Go on from a checkpoint though settings or rows differ from those that it was trained with.
    resume_override: bool = False
    # Profile this step (counted from 1, as in the log) and the next two; the traces go to default_local_dir/profile.
    profile_step: int | None = None
    # Print the plan of the run and exit, without reading weights: steps and tokens; for fine-tuning also GPU memory, and what to change
    # if it does not fit.
    dry_run: bool = False
    # End the run with a checkpoint (exit code 75) before it has taken this time, in seconds; it counts from the start of the process, and a
    # step and a save are left time for. null: no limit.
    max_seconds: float | None = None
    # An update whose loss or gradient is not finite is skipped, and its rows are written to default_local_dir/skipped. So many in a row end
    # the run.
    max_nonfinite_steps: int = 3
    # Seed of row order, adapters and dropout.
    seed: int = 1


class RunConfig(Protocol):
    """The config of any trainer."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    model: ModelConfig
    optim: OptimConfig
    trainer: TrainerConfig
    dist: DistConfig
