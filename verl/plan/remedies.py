"""Hints for a run that does not fit into GPU memory: config changes to try, the mildest first."""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

from verl.config.sft import SFTConfig
from verl.data.loader import TokenizedRows
from verl.engine.decisions import CHECKPOINTING
from verl.engine.hardware import GIB
from verl.engine.outline import Outline
from verl.errors import UserError
from verl.plan.plan import Plan, plan_run

MOST_GPUS = 1024
CHECKPOINTS, BUDGET = "model.enable_gradient_checkpointing", "data.max_tokens_per_micro_batch"

Changes = dict[str, Any]  # new values by config key


def hints(config: SFTConfig, gpus: int) -> Iterator[tuple[Changes, int]]:
    """Yield config changes with a number of GPUs.

    For each way to reduce weights, gradients and optimizer state, yield each way to reduce activations; then yield more GPUs.
    """
    activations = list(lighter_activations(config))
    for state in lighter_state(config, gpus):
        yield state, gpus
        for change in activations:
            yield state | change, gpus
    sharded: Changes = {"model.strategy": "fsdp2", "model.fsdp_config.shard_size": None}
    while gpus < MOST_GPUS:
        gpus = max(2, 2 * gpus)
        for change in ({}, *activations):
            yield sharded | change, gpus


def lighter_activations(config: SFTConfig) -> Iterator[Changes]:
    """Yield changes that reduce activations: recompute more; then halve the token budget, down to data.max_length.

    Without packing, the last change is one row per micro-batch instead.
    """
    data, kinds = config.data, list(CHECKPOINTING)
    for value in kinds[kinds.index(config.model.enable_gradient_checkpointing) + 1 :]:
        yield {CHECKPOINTS: value}
    if not data.packing:
        yield {CHECKPOINTS: True, "data.micro_batch_size_per_gpu": 1}
        return
    budget = data.max_tokens_per_micro_batch or data.micro_batch_size_per_gpu * data.max_length
    least = max(data.max_length, min(1024, budget))
    while budget > least:
        budget = max(least, budget // 2)
        yield {CHECKPOINTS: True, BUDGET: budget}


def lighter_state(config: SFTConfig, gpus: int) -> Iterator[Changes]:
    """Yield changes that reduce weights, gradients and moments on a GPU: shard, use fewer bytes, offload, or train only adapters."""
    model = config.model
    shared: Changes = {"model.strategy": "fsdp2"} if model.strategy == "ddp" else {}
    plain: Changes = {"optim.name": "adamw", "model.param_dtype": "float32", "model.load_in_4bit": False}
    offloaded: Changes = {**shared, **plain, "model.fsdp_config.cpu_offload": True}
    adapters: Changes = {}
    yield {}
    if gpus > 1:
        yield shared
    if model.lora_rank == 0 and model.lora_adapter_path is None:
        adapters = {"model.lora_rank": 32}
        yield {**shared, "optim.name": "adamw_8bit"}
        yield {**shared, "optim.name": "adamw_8bit", "model.param_dtype": "bfloat16"}
        yield offloaded
        yield {**shared, **adapters}
    if gpus == 1:
        yield {**shared, **adapters, "model.load_in_4bit": True}
    yield {**offloaded, **adapters}


def adviser(config: SFTConfig, documents: TokenizedRows, outline: Outline, plan: Plan) -> Callable[[float], str]:
    """Return a function that takes a GPU's memory in bytes and returns the first hint that fits. Each hint is planned at most once."""
    by_difference = ((tuple(_new(config, changes).items()), there) for changes, there in hints(config, plan.hardware.processes))
    tried = list(dict.fromkeys(by_difference))[1:]  # without duplicates, and without the first, which changes nothing

    @cache
    def planned(number: int) -> Plan | None:
        changes, gpus = tried[number]
        new = changed(config, dict(changes))
        try:
            new.check()
            return plan_run(new, documents, outline.with_settings(new.model), plan.hardware.planned(gpus))
        except UserError:  # the keys exclude each other, or this machine has another limit
            return None

    def advice(gpu_bytes: float) -> str:
        for number, (changes, _) in enumerate(tried):
            there = planned(number)
            if there is not None and there.fits(gpu_bytes):
                return words(dict(changes), there, before=plan)
        return "a smaller model, or shorter rows"

    return advice


def _new(config: SFTConfig, changes: Changes) -> Changes:
    """Return the changes without those that the config has already."""
    return {key: value for key, value in changes.items() if value_of(config, key) != value}


def words(changes: Changes, plan: Plan, *, before: Plan) -> str:
    """Return the changes as command-line arguments, with the memory that they save."""
    keys = " ".join(f"{key}={_typed(value)}" for key, value in changes.items())
    if plan.hardware.processes > before.hardware.processes:
        return f"{plan.hardware.processes} GPUs{f' with {keys}' if keys else ''}"
    return f"{keys} (-{(before.needed - plan.needed) / GIB:.1f} GiB, needs {plan.needed / GIB:.1f})"


def _typed(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def changed(config: SFTConfig, changes: Changes) -> SFTConfig:
    """Return a copy of the config with the changes."""
    new = copy.deepcopy(config)
    for key, value in changes.items():
        *path, name = key.split(".")
        setattr(_at(new, path), name, value)
    return new


def value_of(config: SFTConfig, key: str) -> Any:
    *path, name = key.split(".")
    return getattr(_at(config, path), name)


def _at(config: Any, path: Sequence[str]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config
