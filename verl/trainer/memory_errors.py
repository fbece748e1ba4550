"""What is said when memory runs out in a step: the step, its longest row, what was planned, and what to change."""

from collections.abc import Iterator
from contextlib import contextmanager

from verl import dist
from verl.config.ppo import PPOConfig, longest_sample
from verl.config.sft import SFTConfig
from verl.data.loader import Loader, Step
from verl.engine.build import Built
from verl.engine.outline import Outline
from verl.errors import UserError
from verl.out_of_memory import FIXES, GIB, is_out_of_memory, memory_error
from verl.run import Run


@contextmanager
def memory_errors_named(step: Step, loader: Loader, built: Built, run: Run) -> Iterator[None]:
    """Train a step in this context. Raises a UserError in place of an error that memory ran out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if (found := step_error(error, step, loader, built, run)) is None:
            raise
        raise found from error


def step_error(error: BaseException, step: Step, loader: Loader, built: Built, run: Run) -> UserError | None:
    """Return the one-line error of a step in which memory ran out; None if the exception is something else."""
    if not is_out_of_memory(error):
        return None
    largest = max((len(batch.input_ids_T) for batch in step.micro_batches), default=0)
    found = f"the longest row of the step has {longest_row(step):,} tokens, its largest micro-batch {largest:,}"
    planned, fix = plan_and_advice(loader, built, run)
    return memory_error(error, where=f"step {step.number + 1}", what=f"{found}{planned}", fix=fix)


def rl_error(error: BaseException, config: PPOConfig, run: Run) -> UserError | None:
    """Return the one-line error of a step of reinforcement learning; None if the exception is something else."""
    longest, answers = longest_sample(config), config.data.prompts_per_step * config.rollout.samples_per_prompt
    what = f"a prompt with its answer may have {longest:,} tokens, and the step has {answers:,} answers"
    fix = (
        f"lower data.max_tokens_per_micro_batch towards {longest} and rollout.max_sequences; or rollout.max_new_tokens; or set "
        "model.enable_gradient_checkpointing=true, or train adapters (model.lora_rank=32)"
    )
    return memory_error(error, where=f"step {run.step + 1}", what=what, fix=fix)


def longest_row(step: Step) -> int:
    """Return the tokens of the longest document among this process's micro-batches."""
    found = [
        int(batch.cu_seqlens.diff().max()) if batch.prefixes is None else batch.prefixes.longest_document for batch in step.micro_batches
    ]
    return max(found, default=0)


def plan_and_advice(loader: Loader, built: Built, run: Run) -> tuple[str, str]:
    """Return what the plan says a step needs, and what to change; of runs that have no plan, only the keys that lower the memory."""
    config = run.settings
    if not isinstance(config, SFTConfig):
        return "", FIXES
    from verl.plan.plan import make_plan
    from verl.plan.remedies import adviser

    try:
        outline = Outline(config.model)
        plan = make_plan(config, loader.documents, outline, built.decisions)
        room = plan.hardware.gpu_bytes or dist.host_memory()
        advice = adviser(config, loader.documents, outline, plan)
        # If the plan fits, its estimate was too low: plan for less.
        found = advice(min(room, 0.8 * plan.needed))
        return f"; the plan's figure is {plan.needed / GIB:.1f} of {room / GIB:.1f} GiB", found if "=" in found else FIXES
    except Exception:  # the memory error counts, whatever the plan cannot do for this model
        return "", FIXES
