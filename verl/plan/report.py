"""The plan in words."""

from collections.abc import Iterator

from verl.config.sft import SFTConfig
from verl.data.loader import TokenizedRows
from verl.errors import UserError
from verl.plan import memory
from verl.plan.memory import GIB
from verl.plan.plan import CARDS, Plan
from verl.plan.remedies import Advisor


def describe(plan: Plan, config: SFTConfig, documents: TokenizedRows) -> str:
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


def check_room(plan: Plan, config: SFTConfig, documents: TokenizedRows) -> str | None:
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
