"""Other names of keys: accepted aliases, and keys of other trainers with hints on what to use instead."""

# Upstream's keys that are accepted, with the keys that they stand for.
ALIASES = {
    "optim.lr_warmup_steps_ratio": "optim.warmup_steps_ratio",
    "model.path": "model.partial_pretrain",
    "data.multiturn.messages_key": "data.messages_key",
    "data.multiturn.tools_key": "data.tools_key",
    "data.apply_chat_template_kwargs": "data.chat_template_kwargs",
}


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
