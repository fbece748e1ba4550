"""Which keys change what a run learns. A run that resumes is compared with the checkpoint's settings by them.

Every key of the trainers has one kind here, and a test holds the table complete. Keys that a plugin adds in its `Settings` are of the kind
`LEARNS`.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from verl.redaction import redact

# What is learned depends on it.
LEARNS = "learns"
# A model or adapter. It is compared by its content, or else by its name.
MODEL = "model"
# Which rows are trained, and in what order. The tokenized rows themselves are compared, so that files may move.
ROWS = "rows"
# The number of steps, by which the learning rate falls.
LENGTH = "length"
# Nothing that is learned depends on it, but for the order of floating-point sums.
NEUTRAL = "neutral"

KINDS = {
    LEARNS: """
        algorithm.name algorithm.updates_per_step algorithm.keep_reference algorithm.old_logprobs algorithm.dynamic_sampling
        algorithm.max_refills
        critic.warmup_steps
        data.max_length data.packing data.train_batch_size data.prompts_per_step data.max_prompt_length
        model.compute_dtype model.param_dtype model.load_in_4bit model.router_aux_loss_coef
        model.lora_rank model.lora_alpha model.lora_dropout model.target_modules model.trainable_tokens model.use_dora model.use_rslora
        optim.name optim.lr optim.weight_decay optim.clip_grad optim.lr_scheduler optim.warmup_steps_ratio optim.min_lr_ratio
        optim.stable_ratio
        reward.name reward.weights reward.thresholds reward.gates reward.gated reward_model.weight reward_model.label reward_model.reads
        rollout.name rollout.oversample rollout.samples_per_prompt rollout.temperature rollout.max_new_tokens rollout.staleness
        rollout.partial rollout.tool rollout.max_turns environment.name environment.max_turns
        rollout.serve agent.program agent.requests
        teacher.weight teacher.divergence teacher.beta teacher.top_k teacher.temperature
        trainer.seed
    """,
    MODEL: """
        model.partial_pretrain model.lora_adapter_path critic.partial_pretrain reward_model.path teacher.partial_pretrain
    """,
    ROWS: """
        data.train_files data.train_max_samples data.prompt_key data.response_key data.messages_key data.text_key data.text_is_rendered
        data.chosen_key data.rejected_key data.completion_key data.label_key data.margin_key data.tools_key data.train_turns data.truncation
        data.overlong_prompts data.system_prompt
        data.chat_template data.chat_template_kwargs data.chat_template_kwargs_key
    """,
    LENGTH: """
        trainer.total_epochs trainer.total_training_steps
    """,
    NEUTRAL: """
        data.val_files data.val_max_samples data.num_workers data.cache_dir data.micro_batch_size_per_gpu data.max_tokens_per_micro_batch
        data.share_prompts algorithm.reference environment.processes environment.secrets agent.processes agent.secrets
        mapping.actor mapping.critic mapping.reference mapping.reward mapping.rollout
        model.strategy model.context_parallel_size model.enable_gradient_checkpointing model.compile model.cuda_graphs model.use_liger
        model.attn_implementation model.trust_remote_code
        model.fsdp_config.cpu_offload model.fsdp_config.shard_size model.fsdp_config.reshard_after_forward
        reward.on_error reward.secrets reward.timeout_seconds reward.use_gpu reward.workers
        reward_model.max_tokens_per_micro_batch reward_model.trust_remote_code
        rollout.url rollout.gpu_memory_utilization rollout.max_sequences rollout.sleep rollout.speculate rollout.weights_folder
        rollout.on_error rollout.replay environment.step_seconds environment.seconds environment.on_error agent.seconds
        agent.on_error teacher.trust_remote_code
        dist.timeout_seconds trainer.max_seconds trainer.max_nonfinite_steps
        samples.rows samples.max_new_tokens samples.metric
        trainer.async_save trainer.best_metric trainer.best_mode trainer.patience
        trainer.default_local_dir trainer.dry_run trainer.experiment_name trainer.logger trainer.max_ckpt_to_keep trainer.profile_step
        trainer.project_name trainer.resume_from_path trainer.resume_mode trainer.resume_override trainer.save_freq trainer.test_freq
    """,
}
_KIND = {key: kind for kind, keys in KINDS.items() for key in keys.split()}
CONTENT = "content of "  # before the key of a model or of a user's file: what identifies its content
# Values that are one and the same: auto is native where native is exact.
SAME = {"rollout.name": {json.dumps("auto"), json.dumps("native")}}
PATHS = {"data.train_files", "data.chat_template", *KINDS[MODEL].split()}  # keys whose values may be paths; others are if they end in .py


def kind_of(key: str) -> str:
    """Return the kind of a key; the critic's optimizer has the kinds of the actor's."""
    return _KIND.get(key.removeprefix("critic.") if key.startswith("critic.optim.") else key, LEARNS)


@dataclass(frozen=True)
class Change:
    """A key whose value, as JSON, differs from that of a checkpoint."""

    key: str
    before: str
    now: str

    @property
    def kind(self) -> str:
        """The kind of the key. A user's own file is no kind: that it was edited is only said."""
        key = self.key.removeprefix(CONTENT)
        return kind_of(key) if key == self.key or kind_of(key) == MODEL else ""

    def __str__(self) -> str:
        return f"{self.key}: {self.before} -> {self.now}"


def values_of(config: object) -> dict[str, str]:
    """Return the values of all keys that are compared, as JSON. Paths are absolute."""
    return {key: _json(key, value) for key, value in _leaves(config) if kind_of(key) != NEUTRAL}


def _leaves(config: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield key and value of each key of a config: a dataclass, or its YAML file as nested dicts."""
    names = [field.name for field in fields(config)] if is_dataclass(config) else list(config)
    for name in names:
        value, key = (config[name] if isinstance(config, Mapping) else getattr(config, name)), f"{prefix}{name}"
        is_group = is_dataclass(value) or (isinstance(value, Mapping) and key not in _KIND and kind_of(key) == LEARNS)
        yield from _leaves(value, f"{key}.") if is_group else [(key, value)]


def _json(key: str, value: Any) -> str:
    return json.dumps(redact(_absolute(key, value), key), ensure_ascii=False, sort_keys=True, default=str)


def _absolute(key: str, value: Any) -> Any:
    """Return a value with paths of existing files made absolute."""
    if isinstance(value, Mapping):
        return {str(name): _absolute(key, child) for name, child in value.items()}
    if isinstance(value, list | tuple):
        return [_absolute(key, child) for child in value]
    if isinstance(value, str) and (key in PATHS or value.endswith(".py")):
        path = Path(value).expanduser()
        return str(path.resolve()) if path.exists() else value
    return value


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[Change]:
    """Return the keys that differ, in the order of `now`. A key that only one of the two has is not compared.

    Models are compared by content where it is known of both, whatever their names.
    """
    found = [Change(key, before[key], value) for key, value in now.items() if key in before and before[key] != value]
    found = [change for change in found if not {change.before, change.now} <= SAME.get(change.key, set())]
    return [change for change in found if not _same_content(change.key, before, now)]


def _same_content(key: str, before: Mapping[str, str], now: Mapping[str, str]) -> bool:
    """Return whether a key names a model of the same content as before."""
    there = before.get(CONTENT + key)
    return kind_of(key) == MODEL and there is not None and there == now.get(CONTENT + key)


def listed(found: Iterable[Change]) -> str:
    """Return changes as text, one on each line."""
    return "\n".join(f"    {change}" for change in found)
