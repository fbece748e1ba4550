"""Text of a plan, and the check of a run's plan against the GPU of this machine."""

from collections.abc import Callable, Iterator

from verl import dist
from verl.config.sft import SFTConfig
from verl.data.documents import Documents
from verl.data.loader import TokenizedRows, describe_steps, epoch_rows
from verl.engine.decisions import Decisions
from verl.engine.hardware import CARDS, GIB
from verl.engine.outline import Outline
from verl.errors import UserError
from verl.models.experts import describe_parameters
from verl.plan import memory
from verl.plan.plan import Plan, make_plan
from verl.plan.remedies import adviser
from verl.run import Run


def describe(plan: Plan, config: SFTConfig, documents: TokenizedRows, outline: Outline) -> str:
    """Return the text that `verl plan` prints."""
    return "\n".join(
        [*_sizes(plan, epoch_rows(documents), outline), *_memory(plan), *_cards(plan, adviser(config, documents, outline, plan))]
    )


def _sizes(plan: Plan, rows: int, outline: Outline) -> Iterator[str]:
    model, work, steps = plan.decoder, plan.work, plan.steps
    with_teacher = f", with a teacher of {work.teacher:,} weights" if work.teacher else ""
    spread = "" if work.gpus == 1 else ", weights replicated" if work.strategy == "ddp" else f", weights sharded over {work.shards}"
    yield (
        f"model: {plan.name}, {describe_parameters(model.trained + model.frozen, outline.adapted)}, {model.trained:,} trained, "
        f"layers {'compiled' if work.compiled else 'not compiled'}{with_teacher}; {work.gpus} GPU{'s' if work.gpus > 1 else ''}{spread}"
    )
    yield (
        f"steps: {steps.total:,} ({steps.per_epoch:,} per epoch) of {describe_steps(rows, steps.rows)}, "
        f"{plan.tokens_per_step:,.0f} tokens on average; "
        f"largest micro-batch {work.tokens:,} tokens, micro-batches per GPU and step {work.micro_batches}"
    )


def _memory(plan: Plan) -> Iterator[str]:
    peak = plan.peak
    yield f"memory per GPU in GiB at its peak, {peak.name}:"
    for kind in memory.KINDS:
        yield f"  {kind:<12}{getattr(peak, kind) / GIB:>8.2f}"
    yield f"  {'peak':<12}{peak.total / GIB:>8.2f}"
    yield f"  {'overhead':<12}{(plan.needed - peak.total) / GIB:>8.2f}  estimate: CUDA context, cuBLAS workspace, fragmentation"
    yield f"  {'needed':<12}{plan.needed / GIB:>8.2f}"


def _cards(plan: Plan, advice: Callable[[float], str]) -> Iterator[str]:
    rooms = {f"{size} GB": gib * GIB for size, gib in CARDS.items()}
    if plan.hardware.is_here:
        rooms["this GPU"] = plan.hardware.gpu_bytes
    for name, room in rooms.items():
        yield f"{name:>8}: {'fits' if plan.fits(room) else 'does not fit; ' + advice(room)}"


def check_room(plan: Plan, config: SFTConfig, documents: TokenizedRows, outline: Outline) -> str | None:
    """Return a warning if the plan exceeds the memory of this machine's GPU, else None. An estimate alone does not stop a run.

    Raises:
        UserError: weights, gradients and optimizer state alone exceed the memory.
    """
    room = plan.hardware.gpu_bytes
    if plan.fits(room):
        return None
    advice = adviser(config, documents, outline, plan)(room)
    state = memory.state_bytes(plan.decoder, plan.work)
    if state > room:
        what = f"weights, gradients and optimizer state take {state / GIB:.1f} GiB, and the GPU has {room / GIB:.1f}"
        raise UserError(what, where=config.model.partial_pretrain, fix=advice)
    needed = plan.needed / GIB
    return f"warning: a step needs about {needed:.1f} GiB, and the GPU has {room / GIB:.1f}; if it runs out of memory, try {advice}"


def warn_of_memory(config: SFTConfig, train: Documents, outline: Outline, decisions: Decisions, run: Run) -> None:
    """Log a warning, before weights are loaded, if the run is likely to exceed the GPU's memory.

    Raises:
        UserError: on all ranks, if weights, gradients and optimizer state alone exceed it.
    """

    def look() -> None:
        if text := check_room(make_plan(config, train, outline, decisions), config, train, outline):
            run.say(text)

    dist.together(look)
