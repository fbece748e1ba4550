"""The plan before the run: steps, tokens and memory of a GPU, from the config, the rows and the model's config alone.

It is for GPUs, whatever machine it is made on. The first lines to read are those of `make_plan`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from verl.config.sft import SFTConfig
from verl.config.shared import ModelConfig
from verl.data.loader import Packing, TokenizedRows, row_order
from verl.data.pack import TILE, pack, pad_groups
from verl.engine.build import BYTES_FROZEN, BYTES_TRAINED, SMALL_SHARE
from verl.engine.compile import WORTH_SECONDS
from verl.engine.cuda_graphs import filled_up, largest_tokens
from verl.engine.flops import PEAKS
from verl.engine.optim import state_bytes
from verl.errors import UserError
from verl.plan import memory
from verl.plan.memory import FLOAT32, GIB, Decoder, Moment, Work
from verl.plan.sizes import Model, read_model

CARDS = {16: 15.6, 24: 22.0, 40: 39.4, 80: 79.1, 141: 139.7}  # GiB that a card sold with so many GB has at least, but for a few of 16
ASSUMED_GIB, ASSUMED_PEAK = CARDS[80], PEAKS["H100"]  # where a choice depends on the GPU and none is here
LOOKED_AT = 1000  # steps whose micro-batches are made up to find the largest; steps of one run are much alike


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


def make_plan(config: SFTConfig, documents: TokenizedRows, *, gpus: int, gpu_gib: float | None = None, model: Model | None = None) -> Plan:
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
        state_bytes=state_bytes(config.optim),
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


def largest_micro_batch(
    config: SFTConfig, documents: TokenizedRows, rows_per_step: int, steps: int, *, groups: int
) -> tuple[int, int, int]:
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


def is_compiled(setting: Any, flops: float) -> bool:
    """As `verl.engine.compile` decides on a GPU, of a fast kind that is common; `flops` are those of the run on one GPU."""
    return flops / ASSUMED_PEAK >= WORTH_SECONDS if setting == "auto" else bool(setting)


def is_captured(sizes: Decoder, work: Work) -> bool:
    """Whether micro-batches become CUDA graphs, as `verl.engine.cuda_graphs` decides."""
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


# What is said.
