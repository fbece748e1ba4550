"""What to change where a run does not fit into a GPU."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from verl.config.sft import SFTConfig
from verl.data.loader import TokenizedRows
from verl.plan.memory import GIB
from verl.plan.plan import CHECKPOINTING, Plan, make_plan
from verl.plan.sizes import Model, read_model

MOST_GPUS = 1024


# Keys that save activations alone.
SPARES_ACTIVATIONS = ("data.max_tokens_per_micro_batch", "data.micro_batch_size_per_gpu", "model.enable_gradient_checkpointing")


Changes = dict[str, Any]  # of a config, by key


def remedies(config: SFTConfig, gpus: int) -> Iterator[Changes]:
    """Changes of the config that take less memory, the mildest first, each to be tried as a whole."""
    model, order = config.model, list(CHECKPOINTING)
    stronger = order[order.index(model.enable_gradient_checkpointing) + 1 :]
    least: Changes = {}
    for value in stronger:
        least = {"model.enable_gradient_checkpointing": value}
        yield least
    recomputed = least
    for smaller in smaller_micro_batches(config):
        yield smaller
        if recomputed:
            yield {**recomputed, **smaller}
        least = {**recomputed, **smaller}
    if gpus > 1 and model.strategy == "ddp":
        least = {**least, "model.strategy": "fsdp2"}
        yield least
    if model.lora_rank == 0 and model.lora_adapter_path is None:
        yield from remedies_of_optimizer(config, least)
        least = {**least, "model.lora_rank": 32}
        yield least
    if model.fsdp_config.cpu_offload:
        return
    if gpus == 1 and not model.load_in_4bit:
        yield {**least, "model.load_in_4bit": True}
    yield {**least, **back_to_plain(config), "model.fsdp_config.cpu_offload": True}


def remedies_of_optimizer(config: SFTConfig, least: Changes) -> Iterator[Changes]:
    """Smaller weights and moments, or both in host memory, beside changes that are there already."""
    if config.model.fsdp_config.cpu_offload:
        return
    small: Changes = {"optim.name": "adamw_8bit", "model.param_dtype": "bfloat16"}
    missing = {key: value for key, value in small.items() if value_of(config, key) != value}
    for key in missing:
        if config.model.strategy != "ddp" or key != "model.param_dtype":
            least_now = {other: missing[other] for other in list(missing)[: list(missing).index(key) + 1]}
            yield {**least, **least_now}
    yield {**least, **back_to_plain(config), "model.fsdp_config.cpu_offload": True}


def back_to_plain(config: SFTConfig) -> Changes:
    """What offloading cannot be together with, undone."""
    allowed: dict[str, tuple[object, ...]] = {
        "optim.name": ("adamw",),
        "model.param_dtype": ("float32",),
        "model.strategy": ("fsdp2", "fsdp", "auto"),
        "model.load_in_4bit": (False,),
    }
    return {key: values[0] for key, values in allowed.items() if value_of(config, key) not in values}


def smaller_micro_batches(config: SFTConfig) -> Iterator[Changes]:
    """Halves, down to data.max_length, or a row a micro-batch."""
    data = config.data
    if not data.packing:
        if data.micro_batch_size_per_gpu > 1:
            yield {"data.micro_batch_size_per_gpu": 1}
        return
    budget = data.max_tokens_per_micro_batch or data.micro_batch_size_per_gpu * data.max_length
    least = max(data.max_length, min(1024, budget))
    while budget > least:
        budget = max(least, budget // 2)
        yield {"data.max_tokens_per_micro_batch": budget}


def changed(config: SFTConfig, changes: Changes) -> SFTConfig:
    """A copy with other values."""
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


def words(changes: Changes) -> str:
    """As a person types them."""
    return " ".join(f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in changes.items())


class Advisor:
    """Finds what makes a run fit; each change is planned once.

    Args:
        config: of the run.
    """

    def __init__(self, config: SFTConfig, documents: TokenizedRows, plan: Plan):
        self._config, self._documents, self._plan = config, documents, plan
        self._remedies = remedies(config, plan.work.gpus)
        self._tried: list[tuple[Changes, Plan]] = []
        self._models: dict[tuple[int, bool], Model] = {}

    def advice(self, gib: float) -> str:
        """The mildest change that makes the run fit so much memory, and what it takes then."""
        for changes, plan in self._plans():
            if plan.fits(gib):
                changes, plan = self._without_needless(changes, plan, gib)
                saved = (self._plan.needed - plan.needed) / GIB
                return f"{words(changes)} (-{saved:.1f} GiB, needs {plan.needed / GIB:.1f})"
        return self._more_gpus(gib)

    def _without_needless(self, changes: Changes, plan: Plan, gib: float) -> tuple[Changes, Plan]:
        """Less of a step at a time is no use where weights are what takes the room."""
        for key in SPARES_ACTIVATIONS:
            fewer = {other: value for other, value in changes.items() if other != key}
            if fewer and fewer != changes:
                without = self._make(changed(self._config, fewer), plan.work.gpus)
                changes, plan = (fewer, without) if without.fits(gib) else (changes, plan)
        return changes, plan

    def _plans(self) -> Iterator[tuple[Changes, Plan]]:
        yield from list(self._tried)
        for changes in self._remedies:
            plan = self._make(changed(self._config, changes), self._plan.work.gpus)
            self._tried.append((changes, plan))
            yield changes, plan

    def _more_gpus(self, gib: float) -> str:
        least: Changes = {"model.strategy": "fsdp2", "model.enable_gradient_checkpointing": True}
        for smaller in smaller_micro_batches(self._config):
            least |= smaller
        sharded = changed(self._config, {**least, "data.train_batch_size": None, "model.fsdp_config.shard_size": None})
        gpus = max(2, 2 * self._plan.work.gpus)
        while gpus <= MOST_GPUS:
            if self._make(sharded, gpus).fits(gib):
                return f"{gpus} GPUs with {words(least)}"
            gpus *= 2
        return "a smaller model, or shorter rows"

    def _make(self, config: SFTConfig, gpus: int) -> Plan:
        key = config.model.lora_rank, config.model.load_in_4bit  # of what is changed, that alone changes the model
        if key not in self._models:
            self._models[key] = read_model(config.model)
        return make_plan(config, self._documents, gpus=gpus, gpu_gib=self._plan.gpu_gib, model=self._models[key])
