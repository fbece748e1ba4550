"""The plan before the run: steps, tokens and memory of a GPU, from the config, the rows and the model's config alone.

It is for GPUs, whatever machine it is made on. The first lines to read are those of `make_plan`.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from verl.config import ModelConfig, SFTConfig
from verl.data.loader import Documents, Packing, row_order
from verl.data.pack import pack, pad_groups
from verl.engine import memory
from verl.engine.build import BYTES_FROZEN, BYTES_TRAINED, SMALL_SHARE
from verl.engine.captured import filled_up, largest_tokens
from verl.engine.compile import WORTH_SECONDS
from verl.engine.flops import PEAKS, training_flops
from verl.engine.memory import FLOAT32, GIB, Decoder, Moment, Work
from verl.errors import UserError
from verl.models.attention import heads_of
from verl.models.load import cannot_load, resolve

TILE = 128  # a GPU's kernels work on blocks of so many tokens
CARDS = {16: 15.6, 24: 22.0, 40: 39.4, 80: 79.1, 141: 139.7}  # GiB that a card sold with so many GB has at least, but for a few of 16
ASSUMED_GIB, ASSUMED_PEAK = CARDS[80], PEAKS["H100"]  # where a choice depends on the GPU and none is here
LOOKED_AT = 1000  # steps whose micro-batches are made up to find the largest; steps of one run are much alike
MOST_GPUS = 1024

# Keys that save activations alone.
SPARES_ACTIVATIONS = ("data.max_tokens_per_micro_batch", "data.micro_batch_size_per_gpu", "model.enable_gradient_checkpointing")

Changes = dict[str, Any]  # of a config, by key


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
        name: of the model's class.
        tokens_per_step: over all GPUs, on average.
        rows_per_step: over all GPUs.
        gpu_gib: memory of the GPU that is here; None: there is none.
    """

    name: str
    decoder: Decoder
    work: Work
    steps: int
    steps_per_epoch: int
    rows_per_step: int
    tokens_per_step: float
    gpu_gib: float | None = None

    @property
    def peak(self) -> Moment:
        return memory.peak(self.decoder, self.work)

    @property
    def needed(self) -> float:
        """Bytes of a GPU that it needs, with an estimate of what CUDA and PyTorch take besides."""
        return self.peak.total + memory.beyond(self.work, self.peak.total)

    def fits(self, gib: float) -> bool:
        return self.needed <= gib * GIB


@dataclass(frozen=True)
class Model:
    """What a plan needs to know of the model.

    Attributes:
        name: of its class.
        flops: of a token, forward and backward.
    """

    name: str
    sizes: Decoder
    flops: float


def make_plan(config: SFTConfig, documents: Documents, *, gpus: int, gpu_gib: float | None = None, model: Model | None = None) -> Plan:
    """The plan of a run.

    Args:
        gpus: processes, one a GPU, that need not be here.
        gpu_gib: memory of the GPU that is here.
        model: what `read_model` says, where it is known already.
    Raises:
        UserError: no such model, or GPUs that cannot be shared out as the config asks for.
    """
    model = model or read_model(config.model)
    context, shards = config.model.context_parallel_size, config.model.fsdp_config.shard_size
    for key, size in (("model.context_parallel_size", context), ("model.fsdp_config.shard_size", shards)):
        if size is not None and gpus % size:
            raise UserError(f"{gpus} GPUs are not a multiple of {size}", where=f"{key}={size}", fix="change it, or the number of GPUs")
    rows_per_step = config.data.train_batch_size or config.data.micro_batch_size_per_gpu * (gpus // context)
    steps_per_epoch = -(-len(documents) // rows_per_step)
    steps = config.trainer.total_training_steps or steps_per_epoch * config.trainer.total_epochs
    tokens_per_step = float(documents.lengths_N.sum()) / steps_per_epoch
    tokens, trained_tokens, micro_batches = largest_micro_batch(config, documents, rows_per_step, steps, groups=gpus // context)
    tokens, trained_tokens = -(-tokens // context), -(-trained_tokens // context)
    strategy = choose_strategy(config.model, model.sizes, gpu_gib or ASSUMED_GIB)
    work = Work(
        tokens=tokens,
        trained_tokens=trained_tokens,
        micro_batches=micro_batches,
        param_bytes=2 if config.model.param_dtype == "bfloat16" and not model.sizes.frozen else 4,
        compute_bytes=4 if config.model.compute_dtype == "float32" else 2,
        eight_bit=config.optim.name == "adamw_8bit",
        checkpointing=CHECKPOINTING[config.model.enable_gradient_checkpointing],
        compiled=is_compiled(config.model.compile, model.flops * tokens_per_step * steps / gpus),
        strategy=strategy,
        gpus=gpus,
        shards=1 if strategy == "ddp" else shards or gpus,
        resharded=config.model.fsdp_config.reshard_after_forward,
        offload=config.model.fsdp_config.cpu_offload,
    )
    if config.model.cuda_graphs == "auto" and config.model.attn_implementation != "sdpa" and is_captured(model.sizes, work):
        tokens, trained_tokens = filled_up(work.tokens, work.trained_tokens)
        work = replace(work, tokens=tokens, trained_tokens=trained_tokens, captured=True)
    return Plan(model.name, model.sizes, work, steps, steps_per_epoch, rows_per_step, tokens_per_step, gpu_gib)


CHECKPOINTING: dict[Any, Literal["none", "selective", "full"]] = {False: "none", "selective": "selective", True: "full"}


def largest_micro_batch(config: SFTConfig, documents: Documents, rows_per_step: int, steps: int, *, groups: int) -> tuple[int, int, int]:
    """Tokens with filler, trained tokens, and micro-batches of one process in that step, of the largest one of the run.

    Args:
        groups: of processes that take different rows.
    """
    packing, largest = packing_of(config), (0, 0, 1)
    steps_per_epoch = -(-len(documents) // rows_per_step)
    epoch, order = -1, row_order(0, 0, 0)
    for number in range(min(steps, LOOKED_AT)):
        if number // steps_per_epoch != epoch:
            epoch = number // steps_per_epoch
            order = row_order(len(documents), config.trainer.seed, epoch)
        first = number % steps_per_epoch * rows_per_step
        rows = order[first : first + rows_per_step]
        lengths, trained = documents.lengths_N[rows], documents.trained_N[rows]
        parts = cut(lengths.tolist(), packing, groups)
        for part in parts:
            longest = int(lengths[part].max(initial=0))
            tokens = int(lengths[part].sum()) if packing.token_budget else longest * len(part)
            tokens = -(-tokens // packing.multiple_of_tokens) * packing.multiple_of_tokens
            largest = max(largest, (tokens, int(trained[part].sum()), len(parts) // groups))
    return largest


def packing_of(config: SFTConfig) -> Packing:
    """As on a GPU."""
    data, context = config.data, config.model.context_parallel_size
    budget = data.max_tokens_per_micro_batch or data.micro_batch_size_per_gpu * data.max_length
    return Packing(data.micro_batch_size_per_gpu, budget if data.packing else None, context * (TILE if data.packing else 1))


def cut(lengths: Sequence[int], packing: Packing, groups: int) -> list[list[int]]:
    if packing.token_budget is None:
        return pad_groups(lengths, rows=packing.rows, multiple_of=groups)
    return pack(lengths, token_budget=packing.token_budget, multiple_of=groups)


# The model.


def read_model(settings: ModelConfig) -> Model:
    """A model's sizes and arithmetic, from its config.

    Raises:
        UserError: no such model, or adapters that it cannot have.
    """
    model = model_without_values(settings)
    flops = training_flops(model)(1, 1)  # before adapters are put into it
    return Model(type(model).__name__, decoder(model, settings), flops)


def model_without_values(settings: ModelConfig) -> PreTrainedModel:
    """A model of the right shapes, on no device.

    Raises:
        UserError: no such model.
    """
    source = resolve(settings.partial_pretrain)
    try:
        shape = AutoConfig.from_pretrained(source, trust_remote_code=settings.trust_remote_code)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(shape, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise cannot_load("model", settings.partial_pretrain, error) from error
    return model


def decoder(model: PreTrainedModel, settings: ModelConfig) -> Decoder:
    """Sizes of a model without values, into which the adapters that the settings ask for are put."""
    text, heads = model.config.get_text_config(), heads_of(model.config)
    inner = model.get_decoder()
    assert isinstance(inner, nn.Module)
    layers: Any = inner.layers
    tables = {id(p): p for end in (model.get_input_embeddings(), model.get_output_embeddings()) for p in end.parameters()}
    everything, in_layers = numel(model.parameters()), numel(layers.parameters())
    sizes = Decoder(
        layers=len(layers),
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=heads.query,
        key_heads=heads.key_value,
        head_size=heads.size,
        vocabulary=text.vocab_size,
        trained=everything,
        root=everything - in_layers,
        root_trained=everything - in_layers,
        tied=len(tables) == 1,
    )
    if settings.lora_rank == 0 and settings.lora_adapter_path is None:
        return sizes
    linear = sum(m.weight.numel() for m in layers.modules() if isinstance(m, nn.Linear))
    frozen = replace(sizes, frozen=everything, quantized=linear if settings.load_in_4bit else 0, root_trained=0, head_trained=False)
    return with_adapters(frozen, model, settings)


def with_adapters(frozen: Decoder, model: PreTrainedModel, settings: ModelConfig) -> Decoder:
    """Sizes of a model with adapters, which are put into it; they are in its layers, nearly always."""
    from peft import get_peft_model  # it takes its time

    from verl.models.adapted import use_operators
    from verl.models.lora import lora_config

    with torch.device("meta"):
        adapted: Any = get_peft_model(model, lora_config(model, settings, None, ()), autocast_adapter_dtype=False)
    kinds = {name: type(module) for name, module in adapted.named_modules() if hasattr(module, "gate_proj")}
    use_operators(adapted)
    adapters = {name: module.r["default"] for name, module in adapted.named_modules() if "default" in getattr(module, "lora_A", ())}
    is_one = any(type(module) is not kinds[name] for name, module in adapted.named_modules() if name in kinds)
    return replace(
        frozen,
        trained=numel(p for p in adapted.parameters() if p.requires_grad),
        ranks=sum(adapters.values()) / frozen.layers,
        mlp_trained=not kinds or any(name.rpartition(".")[0] in kinds for name in adapters),
        mlp_is_one=is_one and not settings.load_in_4bit,
    )


def numel(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)


def is_compiled(setting: Any, flops: float) -> bool:
    """As `verl.engine.compile` decides on a GPU, of a fast kind that is common; `flops` are those of the run on one GPU."""
    return flops / ASSUMED_PEAK >= WORTH_SECONDS if setting == "auto" else bool(setting)


def is_captured(sizes: Decoder, work: Work) -> bool:
    """Whether micro-batches become CUDA graphs, as `verl.engine.captured` decides."""
    largest = largest_tokens(
        layers=sizes.layers, parameters=sizes.trained + sizes.frozen, gradient_bytes=float(work.compute_bytes * sizes.trained)
    )
    halves = work.compute_bytes < FLOAT32  # FlashAttention takes nothing else
    return halves and work.compiled and work.gpus == 1 and not work.offload and work.micro_batches == 1 and work.tokens <= largest


def choose_strategy(settings: ModelConfig, sizes: Decoder, gpu_gib: float) -> Literal["ddp", "fsdp2"]:
    """As `verl.engine.build` chooses."""
    if settings.strategy != "auto":
        return "ddp" if settings.strategy == "ddp" else "fsdp2"
    fsdp = settings.fsdp_config
    needed = sizes.frozen * BYTES_FROZEN if sizes.frozen else sizes.trained * BYTES_TRAINED
    alone = not fsdp.cpu_offload and fsdp.shard_size is None and settings.param_dtype == "float32"
    return "ddp" if alone and needed <= SMALL_SHARE * gpu_gib * GIB else "fsdp2"


# What to do where it does not fit.


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

    def __init__(self, config: SFTConfig, documents: Documents, plan: Plan):
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


# What is said.


def describe(plan: Plan, config: SFTConfig, documents: Documents) -> str:
    """The plan's lines."""
    return "\n".join([*_sizes(plan), *_memory(plan), *_cards(plan, Advisor(config, documents, plan))])


def _sizes(plan: Plan) -> Iterator[str]:
    model, work = plan.decoder, plan.work
    spread = "" if work.gpus == 1 else " with all weights on each" if work.strategy == "ddp" else f", weights sharded over {work.shards}"
    yield (
        f"model: {plan.name}, {model.trained + model.frozen:,} parameters, {model.trained:,} trained, "
        f"layers {'compiled' if work.compiled else 'not compiled'}; {work.gpus} GPU{'s' if work.gpus > 1 else ''}{spread}"
    )
    yield (
        f"steps: {plan.steps:,} ({plan.steps_per_epoch:,} an epoch) of {plan.rows_per_step:,} rows, "
        f"{plan.tokens_per_step:,.0f} tokens on average; a GPU's largest micro-batch {work.tokens:,} tokens, {work.micro_batches} a step"
    )


def _memory(plan: Plan) -> Iterator[str]:
    peak = plan.peak
    yield f"memory of a GPU in GiB, {peak.name}:"
    for kind in memory.KINDS:
        yield f"  {kind:<12}{getattr(peak, kind) / GIB:>8.2f}"
    yield f"  {'peak':<12}{peak.total / GIB:>8.2f}"
    yield f"  {'besides':<12}{(plan.needed - peak.total) / GIB:>8.2f}  estimated: CUDA itself, cuBLAS, and memory that PyTorch holds unused"
    yield f"  {'needed':<12}{plan.needed / GIB:>8.2f}"


def _cards(plan: Plan, advisor: Advisor) -> Iterator[str]:
    rooms = {f"{size} GB": gib for size, gib in CARDS.items()}
    if plan.gpu_gib is not None:
        rooms["this GPU"] = plan.gpu_gib
    for name, gib in rooms.items():
        yield f"{name:>8}: {'fits' if plan.fits(gib) else 'does not fit; ' + advisor.advice(gib)}"


def check_room(plan: Plan, config: SFTConfig, documents: Documents) -> str | None:
    """A warning where the plan exceeds the GPU that is here; an estimate stops nobody.

    Raises:
        UserError: weights, gradients and optimizer state alone exceed it.
    """
    gib = plan.gpu_gib
    if gib is None or plan.fits(gib):
        return None
    advice = Advisor(config, documents, plan).advice(gib)
    certain = memory.certain(plan.decoder, plan.work)
    if certain > gib * GIB:
        what = f"weights, gradients and optimizer state take {certain / GIB:.1f} GiB of a GPU that has {gib:.1f}"
        raise UserError(what, where=config.model.partial_pretrain, fix=advice)
    return f"warning: a step is planned to need {plan.needed / GIB:.1f} GiB of a GPU that has {gib:.1f}; if it runs out of memory: {advice}"
