"""Settings that several trainers share: the model, the optimizer, and the run itself."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from omegaconf import MISSING


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


class RunConfig(Protocol):
    """The config of any trainer."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    trainer: TrainerConfig
