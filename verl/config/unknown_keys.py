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
    "trainer.checkpoint": "leave it out; a checkpoint always holds the model, the optimizer and the data position",
}


# Keys of other trainers; only for the hint "did you mean …?".
HINTS = {
    "learning_rate": "optim.lr",
    "num_train_epochs": "trainer.total_epochs",
    "epochs": "trainer.total_epochs",
    "max_steps": "trainer.total_training_steps",
    "batch_size": "data.train_batch_size",
    "per_device_train_batch_size": "data.micro_batch_size_per_gpu",
    "max_seq_length": "data.max_length",
    "model_name_or_path": "model.partial_pretrain",
    "output_dir": "trainer.default_local_dir",
    "max_grad_norm": "optim.clip_grad",
    "warmup_ratio": "optim.warmup_steps_ratio",
    "lora_r": "model.lora_rank",
    "gradient_checkpointing": "model.enable_gradient_checkpointing",
    "train_batch_size": "data.prompts_per_step",
    "max_response_length": "rollout.max_new_tokens",
    "adv_estimator": "algorithm.name",
    "num_generations": "rollout.samples_per_prompt",
    "kl_loss_coef": "algorithm.kl_coef",
    "beta": "algorithm.kl_coef",
}


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
        raise UserError(f"{key} is a group of keys", where=place, fix=", ".join(name for name in known if name.startswith(f"{key}.")))
    _refuse_key_of_another(given, defaults)
    last = key.rpartition(".")[2]
    near = [name for name in known if name == HINTS.get(last) or name.rpartition(".")[2] == last]
    near = near[:1] or _nearest(key, known)
    raise UserError(f"unknown key {key!r}", where=place, fix=f"did you mean {near[0]}?" if near else "--help lists all keys")


def _nearest(key: str, known: list[str]) -> list[str]:
    """Return the known key that is most similar, as a list of at most one: in its group, by the name that another
    trainer has for it, by its last part, or by its full name.

    Within a group, only the last parts are compared, because the group's name would make all of its keys similar.
    """
    path, _, last = key.rpartition(".")
    last_parts = {name.rpartition(".")[2]: name for name in known}
    beside = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == path}
    other_trainers = {name: meant for name, meant in HINTS.items() if meant in known}
    for names, cutoff in ((beside, 0.75), (other_trainers, 0.8), (last_parts, 0.75), (beside, 0.6)):
        if found := difflib.get_close_matches(last, names, n=1, cutoff=cutoff):
            return [names[found[0]]]
    return difflib.get_close_matches(key, known, n=1, cutoff=0.8)


def _refuse_key_of_another(given: Assignment, defaults: object) -> None:
    """Raises UserError: the key belongs to another plugin."""
    path, _, name = given.key.rpartition(".")
    for group in groups_of(defaults):
        others = [other for other, module in group.plugins.built_in().items() if name in fields_of(settings_class(module))]
        if path == group.path and others:
            lack = f"{' and '.join(group.names)} {'have' if len(group.names) > 1 else 'has'} no such key"
            what = f"is a key of {', '.join(others)}; {lack if group.names else f'{group.named_by} is not set'}"
            raise UserError(what, where=given.place, fix=f"leave it out, or set {group.named_by}={others[0]}")
