"""The plan of a run: its steps, tokens and memory per GPU, computed only from the config, the rows and the model's config.

A plan is for GPUs, but any machine can make it. It uses the same decisions as the run (`verl.engine.decisions`). Read `make_plan` first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from verl.config.sft import SFTConfig
from verl.data.loader import Packing, TokenizedRows, epoch_lengths, epoch_order, epoch_rows, row_order
from verl.data.pack import pack, pad_groups
from verl.engine.cuda_graphs import filled_up
from verl.engine.decisions import Decisions, Workload, check_multiple, choose_spread, decide, packing_of
from verl.engine.hardware import Hardware
from verl.engine.optim import state_bytes
from verl.engine.outline import Outline
from verl.engine.teachers import weights_of_teacher
from verl.plan import memory
from verl.plan.memory import FLOAT32, Decoder, MemoryUse, Work
from verl.plan.sizes import decoder

STEPS_SCANNED = 1000  # steps that are packed to find the largest micro-batch; a sample is enough, because steps are similar


@dataclass(frozen=True)
class Plan:
    """Steps, tokens and memory of a run.

    Attributes:
        name: class name of the model.
        decoder: sizes of the model.
        work: settings of the step with the largest micro-batch.
        tokens_per_step: mean number of tokens per step, over all GPUs.
    """

    name: str
    decoder: Decoder
    decisions: Decisions
    work: Work
    steps: "Steps"
    tokens_per_step: float

    @property
    def hardware(self) -> Hardware:
        return self.decisions.hardware

    @property
    def peak(self) -> MemoryUse:
        return memory.peak(self.decoder, self.work)

    @property
    def needed(self) -> float:
        """Memory needed per GPU, in bytes, including an estimate of the overhead of CUDA and PyTorch."""
        return self.peak.total + memory.overhead_bytes(self.work, self.peak.total)

    def fits(self, gpu_bytes: float) -> bool:
        return self.needed <= gpu_bytes


def plan_run(config: SFTConfig, documents: TokenizedRows, outline: Outline, hardware: Hardware) -> Plan:
    """Make the decisions for the hardware, which may be another machine's, and plan the run.

    Raises:
        UserError: there is no such model, or the hardware cannot run this config.
    """
    check_multiple(hardware.processes, config.model.context_parallel_size, key="model.context_parallel_size")
    spread, steps = choose_spread(outline, hardware), steps_of(config, epoch_rows(documents), hardware)
    workload = Workload.of(epoch_lengths(documents, config.trainer.seed), steps.total, steps.per_epoch, packing_of(config.data, hardware))
    return make_plan(config, documents, outline, decide(outline, hardware, workload, spread))


def make_plan(config: SFTConfig, documents: TokenizedRows, outline: Outline, decisions: Decisions) -> Plan:
    """Plan a run from its decisions."""
    hardware, sizes, context = decisions.hardware, decoder(outline), config.model.context_parallel_size
    steps, packing = steps_of(config, epoch_rows(documents), hardware), packing_of(config.data, hardware)
    groups, seed = hardware.processes // context, config.trainer.seed
    largest = largest_micro_batch(documents, steps, packing, groups, context, seed)  # type: ignore[arg-type]  # hashed by identity
    tokens_per_step = float(epoch_lengths(documents, seed).sum()) / steps.per_epoch
    return Plan(type(outline.model).__name__, sizes, decisions, work_of(config, sizes, decisions, largest), steps, tokens_per_step)


class Steps(NamedTuple):
    """Length of a run.

    Attributes:
        rows: rows per step, over all processes.
        per_epoch: steps per epoch.
        total: steps of the run.
    """

    rows: int
    per_epoch: int
    total: int


def steps_of(config: SFTConfig, rows: int, hardware: Hardware) -> Steps:
    """Return the length of a run with `rows` rows per epoch."""
    groups = hardware.processes // config.model.context_parallel_size
    per_step = config.data.train_batch_size or config.data.micro_batch_size_per_gpu * groups
    per_epoch = -(-rows // per_step)
    return Steps(per_step, per_epoch, config.trainer.total_training_steps or per_epoch * config.trainer.total_epochs)


class MicroBatch(NamedTuple):
    """Size of a micro-batch.

    Attributes:
        tokens: number of tokens, filler included.
        in_step: number of micro-batches per process in the same step.
    """

    tokens: int
    trained_tokens: int
    in_step: int


@lru_cache(maxsize=32)  # most hints do not change the micro-batches
def largest_micro_batch(documents: TokenizedRows, steps: Steps, packing: Packing, groups: int, context: int, seed: int) -> MicroBatch:
    """Return the micro-batch with the most tokens among the first STEPS_SCANNED steps.

    Args:
        groups: data-parallel size.
        context: context-parallel size.
        seed: seed of the row order.
    """
    largest, epoch, order = MicroBatch(0, 0, 1), -1, row_order(0, 0, 0)
    fill = context * (packing.multiple_of_tokens if packing.token_budget else 1)
    for number in range(min(steps.total, STEPS_SCANNED)):
        if number // steps.per_epoch != epoch:
            epoch = number // steps.per_epoch
            order = epoch_order(documents, seed, epoch)
        first = number % steps.per_epoch * steps.rows
        rows = order[first : first + steps.rows]
        lengths, trained = documents.lengths_N[rows], documents.trained_N[rows]
        parts = cut(lengths.tolist(), packing, groups)
        for part in parts:
            longest = int(lengths[part].max(initial=0))
            tokens = int(lengths[part].sum()) if packing.token_budget else longest * len(part)
            largest = max(largest, MicroBatch(-(-tokens // fill) * fill, int(trained[part].sum()), len(parts) // groups))
    return largest


def cut(lengths: Sequence[int], packing: Packing, groups: int) -> list[list[int]]:
    """Divide the rows of a step into micro-batches. Returns the row indices of each."""
    if packing.token_budget is None:
        return pad_groups(lengths, rows=packing.rows, multiple_of=groups)
    return pack(lengths, token_budget=packing.token_budget, multiple_of=groups)


def work_of(config: SFTConfig, sizes: Decoder, decisions: Decisions, largest: MicroBatch) -> Work:
    """Return the settings of the step with the largest micro-batch, for the memory formulas."""
    spread, context = decisions.spread, config.model.context_parallel_size
    tokens, trained_tokens = -(-largest.tokens // context), -(-largest.trained_tokens // context)
    teacher = weights_of_teacher(config.teacher)
    captured = largest.in_step == 1 and 0 < tokens <= decisions.graph_tokens and not teacher
    if captured:
        tokens, trained_tokens = filled_up(tokens, trained_tokens)
    return Work(
        tokens=tokens,
        trained_tokens=trained_tokens,
        micro_batches=largest.in_step,
        param_bytes=FLOAT32 if sizes.frozen else decisions.param_dtype.itemsize,
        compute_bytes=decisions.compute_dtype.itemsize,
        state_bytes=state_bytes(config.optim),
        checkpointing=decisions.checkpointing,
        compiled=decisions.compiled,
        strategy=spread.strategy,
        gpus=decisions.hardware.processes,
        shards=decisions.shards,
        resharded=spread.sharding.reshard_after_forward,
        offload=spread.sharding.cpu_offload,
        captured=captured,
        teacher=teacher,
    )
