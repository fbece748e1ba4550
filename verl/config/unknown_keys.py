"""Errors about unknown keys: keys of other trainers and of other plugins, and misspelled ones."""

import difflib
from typing import NoReturn

from verl.config.assignments import Assignment
from verl.config.plugin_settings import fields_of, groups_of, settings_class
from verl.errors import UserError

# Upstream's keys that are rejected, with what to use instead.
REJECTED = {
    "data.micro_batch_size": "use data.micro_batch_size_per_gpu",
    "data.multiturn.enable": "set data.messages_key to the column of the chat; this turns multi-turn on",
    "data.prompt_dict_keys": "flatten the column first; data.prompt_key names a column of text",
    "data.response_dict_keys": "flatten the column first; data.response_key names a column of text",
    "data.balance_dp_token": "leave it out; the loss is always divided by the tokens of all GPUs",
    "data.custom_cls": "write the rows as JSONL; data.train_files reads it",
    "data.use_dynamic_bsz": "leave it out; rows are always packed to a token budget (data.packing)",
    "data.max_token_len_per_gpu": "use data.max_tokens_per_micro_batch",
    "data.pad_mode": "use data.packing=true or data.packing=false",
    "model.fsdp_config.model_dtype": "use model.param_dtype; model.compute_dtype sets the arithmetic",
    "model.fsdp_config.fsdp_size": "use model.fsdp_config.shard_size",
    "model.fsdp_config.offload_params": "use model.fsdp_config.cpu_offload",
    "model.fsdp_config.wrap_policy": "leave it out; every decoder layer is an FSDP unit",
    "model.external_lib": "install the package of the model; transformers finds it",
    "model.use_shm": "leave it out; safetensors are mapped, not copied",
    "model.use_remove_padding": "leave it out; there is no padding (data.packing)",
    "use_remove_padding": "leave it out; there is no padding (data.packing)",
    "ulysses_sequence_parallel_size": "use model.context_parallel_size",
    "optim.lr_scheduler_type": "use optim.lr_scheduler",
    "optim.warmup_style": "use optim.lr_scheduler",
    "optim.lr_warmup_steps": "use optim.warmup_steps_ratio",
    "optim.total_training_steps": "use trainer.total_training_steps",
    "trainer.default_hdfs_dir": "set trainer.default_local_dir to a mounted path",
    "trainer.nnodes": "torchrun sets it: torchrun --nnodes=N",
    "trainer.n_gpus_per_node": "torchrun sets it: torchrun --nproc_per_node=N",
    "trainer.device": "leave it out; the device is CUDA if available, else the CPU",
    "actor_rollout_ref": "use model, optim and rollout, such as model.partial_pretrain=…; verl ppo --help lists all keys",
    "trainer.checkpoint": "leave it out; a checkpoint always holds the model, the optimizer and the data position",
}


# Keys of other trainers; only for the hint "did you mean …?". Of several keys, the first that the command has is meant.
HINTS: dict[str, tuple[str, ...]] = {
    "learning_rate": ("optim.lr",),
    "num_train_epochs": ("trainer.total_epochs",),
    "num_epochs": ("trainer.total_epochs",),
    "epochs": ("trainer.total_epochs",),
    "max_steps": ("trainer.total_training_steps",),
    "batch_size": ("data.train_batch_size", "data.prompts_per_step", "batch_size"),
    "per_device_train_batch_size": ("data.micro_batch_size_per_gpu", "data.prompts_per_step"),
    "micro_batch_size": ("data.micro_batch_size_per_gpu",),
    "train_batch_size": ("data.train_batch_size", "data.prompts_per_step"),
    "max_seq_length": ("data.max_length", "data.max_prompt_length"),
    "max_seq_len": ("data.max_length", "data.max_prompt_length"),
    "cutoff_len": ("data.max_length", "data.max_prompt_length"),
    "model": ("model.partial_pretrain", "model_path", "source"),
    "model_name": ("model.partial_pretrain", "model_path", "source"),
    "model_name_or_path": ("model.partial_pretrain", "model_path", "source"),
    "base_model": ("model.partial_pretrain", "model_path", "source"),
    "partial_pretrain": ("model_path", "source"),
    "checkpoint": ("model_path", "source", "model.partial_pretrain"),
    "dataset": ("data.train_files", "test_file"),
    "train_file": ("data.train_files",),
    "data_path": ("data.train_files", "test_file"),
    "eval_dataset": ("data.val_files", "test_file"),
    "test_files": ("test_file", "data.val_files"),
    "dataset_num_proc": ("data.num_workers",),
    "output_dir": ("trainer.default_local_dir", "output_dir", "directory"),
    "save_dir": ("trainer.default_local_dir", "output_dir", "directory"),
    "max_grad_norm": ("optim.clip_grad",),
    "warmup_ratio": ("optim.warmup_steps_ratio",),
    "warmup_steps": ("optim.warmup_steps_ratio",),
    "scheduler": ("optim.lr_scheduler",),
    "optimizer": ("optim.name",),
    "adam_beta1": ("optim.betas",),
    "lora": ("model.lora_rank",),
    "lora_r": ("model.lora_rank",),
    "use_lora": ("model.lora_rank",),
    "lora_target_modules": ("model.target_modules",),
    "quantization_bit": ("model.load_in_4bit",),
    "qlora": ("model.load_in_4bit",),
    "bf16": ("model.compute_dtype",),
    "flash_attn": ("model.attn_implementation",),
    "sequence_parallel_size": ("model.context_parallel_size",),
    "gradient_checkpointing": ("model.enable_gradient_checkpointing",),
    "torch_compile": ("model.compile",),
    "save_steps": ("trainer.save_freq",),
    "save_strategy": ("trainer.save_freq",),
    "save_total_limit": ("trainer.max_ckpt_to_keep",),
    "eval_steps": ("trainer.test_freq",),
    "eval_strategy": ("trainer.test_freq",),
    "metric_for_best_model": ("trainer.best_metric",),
    "load_best_model_at_end": ("trainer.best_metric",),
    "report_to": ("trainer.logger",),
    "run_name": ("trainer.experiment_name",),
    "resume_from_checkpoint": ("trainer.resume_from_path",),
    "resume": ("trainer.resume_mode",),
    "template": ("data.chat_template",),
    "system_message": ("system_prompt", "system"),
    "max_response_length": ("rollout.max_new_tokens",),
    "max_tokens": ("rollout.max_new_tokens", "max_new_tokens"),
    "max_length": ("data.max_length", "max_new_tokens"),
    "adv_estimator": ("algorithm.name",),
    "n": ("rollout.samples_per_prompt",),
    "num_generations": ("rollout.samples_per_prompt",),
    "kl_loss_coef": ("algorithm.kl_coef",),
    "beta": ("algorithm.kl_coef", "algorithm.beta"),
    "reward_funcs": ("reward.name",),
    "reward_function": ("reward.name", "metric"),
}
# What other trainers have, and there is not here: the keys that come nearest, and what is there in place of it.
ABSENT = (
    (("logging_steps", "log_every", "log_freq"), "leave it out: each step is in metrics.jsonl and train.log"),
    (("gradient_accumulation_steps", "grad_accum", "accumulate_grad_batches"), "set data.train_batch_size: it is cut into micro-batches"),
    (("fp16", "mixed_precision"), "there is no float16: model.compute_dtype=bfloat16, or float32"),
    (
        ("deepspeed", "zero_stage"),
        "there is no DeepSpeed: model.strategy=fsdp2 shards, model.fsdp_config.cpu_offload=true offloads",
    ),
    (("tensor_parallel_size", "tensor_model_parallel_size", "pipeline_parallel_size"), "there is none in training: model.strategy=fsdp2"),
    (("neftune_noise_alpha", "neftune"), "there is no NEFTune; model.lora_dropout is against overfitting, too"),
    (("label_smoothing_factor", "label_smoothing"), "there is no label smoothing; leave it out"),
    (("num_gpus", "gpus", "num_processes", "nproc_per_node"), "it is an option: write --gpus N after the name of the command"),
)


def refuse(given: Assignment, known: list[str], defaults: object) -> NoReturn:
    """Raise the UserError of a key that a config does not have.

    Args:
        known: the keys that it has.
        defaults: the config with default values and the keys of its plugins.
    """
    key, place = given.key, None if given.where == given.key else given.where
    for rejected, fix in REJECTED.items():
        if key == rejected or key.startswith(f"{rejected}."):
            raise UserError(f"{key} is not supported here", where=place, fix=fix)
    if any(name.startswith(f"{key}.") for name in known):
        fix = f"write one of its keys: {', '.join(name for name in known if name.startswith(f'{key}.'))}"
        raise UserError(f"{key} is a group of keys", where=place, fix=fix)
    _refuse_key_of_another(given, defaults)
    near, is_absent = nearest(key, known)
    meant = f"did you mean {near}?" if near else "--help lists all keys"
    raise UserError(f"unknown key {key!r}", where=place, fix=near if is_absent else meant)


def nearest(key: str, known: list[str]) -> tuple[str, bool]:
    """Return the known key that is meant, or what there is in its place, and which of both; an empty text if nothing is similar enough.

    A key is compared with those in its group, with the last parts of all keys, and with the names that other trainers have for them. Within
    a group, only the last parts are compared, because the group's name would make all of its keys similar.
    """
    path, _, last = key.rpartition(".")
    last = last.lower().replace("-", "_")
    meant = {name: next((one for one in keys if one in known), "") for name, keys in HINTS.items()}
    meant = {name: one for name, one in meant.items() if one}
    absent = {name: text for names, text in (*ABSENT, *_in_this_version(known)) for name in names}
    last_parts = {name.rpartition(".")[2]: name for name in reversed(known)}
    beside = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == path}
    if last not in beside and (slip := difflib.get_close_matches(last, beside, n=1, cutoff=0.85)):
        return beside[slip[0]], False  # closer than the same name in another group
    for names in (beside, last_parts, meant, absent):
        if last in names:
            return names[last], names is absent
    found: list[tuple[float, str, bool]] = []
    for names, cutoff, bonus in ((beside, 0.7, 0.1), (meant, 0.8, 0.05), (absent, 0.8, 0.05), (last_parts, 0.8, 0.0)):
        near = difflib.get_close_matches(last, names, n=1, cutoff=cutoff)
        found += [(difflib.SequenceMatcher(None, last, name).ratio() + bonus, names[name], names is absent) for name in near]
    if found:
        _, text, is_absent = max(found, key=lambda one: one[0])
        return text, is_absent
    begun = [full for name, full in beside.items() if len(last) > 2 and name.startswith(last)]
    whole = begun[:1] if len(begun) == 1 else difflib.get_close_matches(key, known, n=1, cutoff=0.85)
    return (whole[0] if whole else ""), False


def _in_this_version(known: list[str]) -> list[tuple[tuple[str, ...], str]]:
    """Return what is said of names for which there is a key or a command, or is none, by what this version has."""
    from dataclasses import fields

    from verl.config.commands import ExportConfig

    stops = "trainer.patience ends a run that gets no better" if "trainer.patience" in known else "there is no early stopping here"
    pushes = "hub" in {field.name for field in fields(ExportConfig)}
    push = "it is done after training: verl export DIR --hub NAME" if pushes else "there is none here: hf upload NAME DIR"
    return [
        (("early_stopping", "early_stopping_patience", "early_stop"), f"{stops}; trainer.best_metric=val/loss keeps the best checkpoint"),
        (("push_to_hub", "hub_model_id", "hub_token", "hub_strategy"), push),
    ]


def _refuse_key_of_another(given: Assignment, defaults: object) -> None:
    """Raises UserError: the key belongs to another plugin."""
    path, _, name = given.key.rpartition(".")
    for group in groups_of(defaults):
        others = [other for other, module in group.plugins.built_in().items() if name in fields_of(settings_class(module))]
        if path == group.path and others:
            lack = f"{' and '.join(group.names)} {'have' if len(group.names) > 1 else 'has'} no such key"
            what = f"is a key of {', '.join(others)}; {lack if group.names else f'{group.named_by} is not set'}"
            raise UserError(what, where=given.place, fix=f"leave it out, or set {group.named_by}={others[0]}")
