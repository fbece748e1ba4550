"""Checks of settings across fields. Each raises a UserError that names the key."""

from typing import Protocol

from verl.config.shared import DistConfig, ModelConfig, OptimConfig, TrainerConfig
from verl.errors import UserError, at_least, is_share, one_of


def check_model(model: ModelConfig) -> None:
    """Check the keys of a trained model. Raises UserError naming the key."""
    one_of("model.enable_gradient_checkpointing", model.enable_gradient_checkpointing, (True, "selective", False))
    one_of("model.compile", model.compile, ("auto", True, False))
    one_of("model.cuda_graphs", model.cuda_graphs, ("auto", False))
    one_of("model.strategy", model.strategy, ("auto", "fsdp2", "fsdp", "ddp"))
    one_of("model.compute_dtype", model.compute_dtype, ("auto", "bfloat16", "float32"))
    one_of("model.param_dtype", model.param_dtype, ("float32", "bfloat16"))
    one_of("model.attn_implementation", model.attn_implementation, ("auto", "fa2", "fa3", "fa4", "short", "sdpa"))
    at_least("model.fsdp_config.shard_size", model.fsdp_config.shard_size, 1)
    at_least("model.router_aux_loss_coef", model.router_aux_loss_coef, 0)
    check_strategy(model)
    check_lora(model)


def check_optim(optim: OptimConfig, key: str = "optim") -> None:
    """Check the optimizer and its schedule. Raises UserError naming the key, which begins with `key`."""
    one_of(f"{key}.lr_scheduler", optim.lr_scheduler, ("cosine", "linear", "constant", "wsd"))
    at_least(f"{key}.lr", optim.lr, 0.0)
    at_least(f"{key}.weight_decay", optim.weight_decay, 0.0)
    for name in ("warmup_steps_ratio", "min_lr_ratio", "stable_ratio"):
        is_share(f"{key}.{name}", getattr(optim, name))
    if not optim.clip_grad > 0:
        raise UserError(f"{optim.clip_grad} is not positive", where=f"{key}.clip_grad", fix="give the largest allowed norm, such as 1.0")


def check_offload(model: ModelConfig, optim: OptimConfig, key: str = "optim") -> None:
    """Check that offloading fits the optimizer and dtype. Raises UserError naming the keys."""
    for name, value, with_offload in ((f"{key}.name", optim.name, "adamw"), ("model.param_dtype", model.param_dtype, "float32")):
        if model.fsdp_config.cpu_offload and value != with_offload:
            raise UserError(
                "with offloading, the optimizer is AdamW in float32",
                where=f"{name}={value} with model.fsdp_config.cpu_offload=true",
                fix=f"set {name}={with_offload}, or model.fsdp_config.cpu_offload=false",
            )


def check_dist(config: DistConfig) -> None:
    """Check the keys of several processes. Raises UserError naming the key."""
    at_least("dist.timeout_seconds", config.timeout_seconds, 5)


def check_trainer(trainer: TrainerConfig) -> None:
    """Check the keys of a run: length, loggers, checkpoints. Raises UserError naming the key."""
    from verl.config.secret_names import refuse_secret  # once in a run

    for key in ("project_name", "experiment_name"):
        refuse_secret(f"trainer.{key}", getattr(trainer, key))
    loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    if not all(isinstance(name, str) and name for name in loggers):
        fix = "give a name such as console, or a list such as [console,wandb]"
        raise UserError(f"found {trainer.logger!r}", where="trainer.logger", fix=fix)
    if not trainer.default_local_dir.strip():
        raise UserError("is empty", where="trainer.default_local_dir", fix="name a directory, or leave the key out for the default one")
    one_of("trainer.resume_mode", trainer.resume_mode, ("auto", "disable", "resume_path"))
    at_least("trainer.total_epochs", trainer.total_epochs, 1)
    at_least("trainer.total_training_steps", trainer.total_training_steps, 1)
    at_least("trainer.profile_step", trainer.profile_step, 1)
    at_least("trainer.seed", trainer.seed, 0)
    at_least("trainer.max_nonfinite_steps", trainer.max_nonfinite_steps, 1)
    at_least("trainer.max_seconds", trainer.max_seconds, 1)
    if trainer.max_seconds is not None and trainer.save_freq == "never":
        fix = "remove trainer.save_freq, or trainer.max_seconds (to try settings out: trainer.total_training_steps)"
        raise UserError(
            "the run would end at the time limit without a checkpoint", where="trainer.max_seconds with trainer.save_freq=never", fix=fix
        )
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
            f"step {trainer.profile_step} is after the last one, {trainer.total_training_steps}",
            where="trainer.profile_step",
            fix="give an earlier step, or raise trainer.total_training_steps",
        )
    if trainer.max_ckpt_to_keep is not None and trainer.max_ckpt_to_keep != -1:
        at_least("trainer.max_ckpt_to_keep", trainer.max_ckpt_to_keep, 1)


class Limited(Protocol):
    """Keys of data with limits on the number of rows."""

    train_max_samples: int | None
    val_max_samples: int | None


def check_samples(data: Limited) -> None:
    """Check the limits on the number of rows. Raises UserError naming the key."""
    for key, samples in (("train", data.train_max_samples), ("val", data.val_max_samples)):
        if samples is not None and samples != -1:
            at_least(f"data.{key}_max_samples", samples, 1)


def check_strategy(model: ModelConfig) -> None:
    """Check that "ddp" fits the other keys. Raises UserError naming the keys."""
    if model.strategy != "ddp":
        return
    for key, value, needed in (
        ("model.fsdp_config.cpu_offload", model.fsdp_config.cpu_offload, False),
        ("model.fsdp_config.shard_size", model.fsdp_config.shard_size, None),
        ("model.param_dtype", model.param_dtype, "float32"),
    ):
        if value != needed:
            why = "stochastic rounding makes the copies differ" if key == "model.param_dtype" else "ddp keeps all weights on each GPU"
            raise UserError(why, where=f"{key}={value} with model.strategy=ddp", fix="set model.strategy=fsdp2")


def check_lora(model: ModelConfig) -> None:
    """Check the keys of adapters. Raises UserError naming the key."""
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
                fix = "set model.lora_rank, such as 32, or remove this key"
                raise UserError("is only for adapters, but model.lora_rank=0 trains all weights", where=f"model.{key}", fix=fix)
    if model.load_in_4bit and model.fsdp_config.cpu_offload:
        raise UserError(
            "4-bit weights cannot be offloaded",
            where="model.load_in_4bit=true with model.fsdp_config.cpu_offload=true",
            fix="set one of them to false",
        )
