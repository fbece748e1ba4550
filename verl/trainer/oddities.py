"""What is odd about a run, though it can be done: said on its first lines, or when it shows. What cannot come right is an error."""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from verl import dist
from verl.config.ppo import PPOConfig
from verl.config.shared import OptimConfig
from verl.engine.outline import Outline
from verl.errors import UserError
from verl.pace import counted
from verl.rl.method import load_method
from verl.run import Run

HIGH_LEARNING_RATE = 1e-2
TIMES_FIRST_LOSS = 3
SMALL_LOSS = 0.3  # the losses of a model that knows the rows already may well treble


class Rows(Protocol):
    """Training or validation rows: documents, or prompts."""

    @property
    def row_digests_R(self) -> np.ndarray: ...  # noqa: N802

    def place(self, index: int) -> str: ...


def say_oddities(run: Run, rows: Rows, validation: Rows | None, outline: Outline, rows_per_step: int, total_steps: int) -> None:
    """Say what is odd about the settings and the rows of a run. Every rank calls it.

    Raises:
        UserError: the run cannot come right.
    """
    config: Any = run.settings
    warnings = [
        *_of_rate(config.optim, "optim"),
        *_of_schedule(config),
        *_of_batches(config, rows, rows_per_step, total_steps),
        *_of_rows(rows, validation, per_row=getattr(rows, "documents_per_row", 1)),
        *(_of_policy(config, total_steps) if isinstance(config, PPOConfig) else _of_positions(rows, outline, config.data.max_length)),
    ]
    for warning in warnings:
        run.say(f"warning: {warning}")


def _of_rate(optim: OptimConfig, key: str) -> Iterator[str]:
    if optim.lr == 0:
        yield f"{key}.lr=0: nothing is learned"
    elif optim.lr > HIGH_LEARNING_RATE:
        yield f"{key}.lr={optim.lr:g} is very high, and the loss is likely to rise; 1e-5 is usual, with adapters 1e-4 to 1e-3"


def _of_schedule(config: Any) -> Iterator[str]:
    if config.optim.warmup_steps_ratio == 1:
        yield "optim.warmup_steps_ratio=1: the whole run is warm-up, so only its last step has optim.lr"
    if config.data.val_files is None and config.trainer.test_freq not in (-1, "epoch"):
        yield f"trainer.test_freq={config.trainer.test_freq} has no effect: there is no data.val_files"


def _of_batches(config: Any, rows: Rows, rows_per_step: int, total_steps: int) -> Iterator[str]:
    many, processes = len(rows.row_digests_R), dist.data_size()
    if isinstance(config, PPOConfig):
        return  # the plan says how often each prompt is asked
    if many < processes:
        idle = processes - many
        yield f"data.train_files has {counted(many, 'row')} for {processes:,} processes, so {idle:,} of them get nothing to train"
    elif many < rows_per_step:
        rows_there = counted(many, "row")
        yield (
            f"data.train_batch_size={rows_per_step:,} is more than the {rows_there} of data.train_files, so each step is one epoch: "
            f"{counted(total_steps, 'step')} of {rows_there}"
        )


def _of_rows(rows: Rows, validation: Rows | None, *, per_row: int) -> Iterator[str]:
    """Say how many rows are copies. The digests are those of the fingerprint, so this costs a sort of numbers."""
    digests_R = rows.row_digests_R
    _, first = np.unique(digests_R, return_index=True)
    if copies := len(digests_R) - len(first):
        is_copy_R = np.ones(len(digests_R), dtype=bool)
        is_copy_R[first] = False
        place = rows.place(int(np.flatnonzero(is_copy_R)[0]) * per_row)
        yield f"data.train_files: {copies:,} of {len(digests_R):,} rows are copies of earlier rows, the first {place}"
    if validation is None:
        return
    is_trained_R = np.isin(validation.row_digests_R, digests_R)
    if shared := int(is_trained_R.sum()):
        place = validation.place(int(np.flatnonzero(is_trained_R)[0]) * per_row)
        yield (
            f"data.val_files: {shared:,} of {len(is_trained_R):,} rows are training rows too, the first {place}; "
            "the validation does not measure what is new to the model"
        )


def _of_positions(rows: Any, outline: Outline, max_length: int) -> Iterator[str]:
    """Compare lengths with the positions that the model was made for."""
    config = outline.config.get_text_config()
    positions, longest = getattr(config, "max_position_embeddings", None), int(rows.lengths_N.max())
    if not isinstance(positions, int) or positions <= 0 or max_length <= positions:
        return
    rotates = any(getattr(config, name, None) for name in ("rope_parameters", "rope_theta", "rope_scaling"))
    if longest > positions and not rotates:
        raise UserError(
            f"the longest row has {longest:,} tokens, and the model has {positions:,} positions",
            where=f"data.max_length={max_length}",
            fix=f"set data.max_length={positions}, and data.truncation=right or left, or choose a model with more positions",
        )
    found = f"the longest row has {longest:,} tokens" if longest > positions else "no row is that long"
    yield f"data.max_length={max_length:,} is beyond the model's {positions:,} positions (max_position_embeddings); {found}"


def _of_policy(config: PPOConfig, total_steps: int) -> Iterator[str]:
    settings: Any = config.algorithm
    method = load_method(config)
    if getattr(settings, "clip_ratio_low", None) == 0 and getattr(settings, "clip_ratio_high", None) == 0:
        yield "algorithm.clip_ratio_low=0 and clip_ratio_high=0: an answer is not trained further once its probability has changed"
    if config.rollout.samples_per_prompt == 1 and method.needs_groups:
        yield f"rollout.samples_per_prompt=1: {settings.name} compares the answers to a prompt, and one answer has no other"
    if not method.needs_critic:
        return
    yield from _of_rate(config.critic.optim, "critic.optim")
    if config.critic.warmup_steps >= total_steps:
        first = counted(config.critic.warmup_steps, "step")
        raise UserError(
            f"the first {first} would train only the critic, and the run has {counted(total_steps, 'step')}",
            where="critic.warmup_steps",
            fix=f"give less than {total_steps:,}, or train for longer (trainer.total_training_steps)",
        )


class LossWatch:
    """Warns, once in a run, that the loss is a multiple of the first one."""

    def __init__(self, run: Run):
        self._run = run
        self._limit: float | None = None

    def see(self, step: int, loss: float) -> None:
        """Look at the loss of a step."""
        if self._limit is None:
            self._first = loss
            self._limit = TIMES_FIRST_LOSS * max(abs(loss), SMALL_LOSS)
        elif loss > self._limit:
            self._limit = float("inf")
            self._run.say(
                f"warning: step {step}: the loss is {loss:.4g}, over {TIMES_FIRST_LOSS} times the first one ({self._first:.4g}); "
                "if it stays there, lower optim.lr"
            )


class RewardWatch:
    """Warns of rewards that do not differ: when this begins, and once more when it lasts; not after each step."""

    LASTS = 3  # steps

    def __init__(self, run: Run):
        self._run = run
        self._since: int | None = None

    def see(self, step: int, found: str | None) -> None:
        """Look at a step.

        Args:
            found: what is equal; None if rewards differ.
        """
        if found is None:
            self._since = None
        elif self._since is None:
            self._since = step
            self._run.say(f"warning: step {step}: {found}")
        elif step - self._since == self.LASTS - 1:
            self._run.say(
                f"warning: step {step}: the same for {self.LASTS} steps: all advantages are zero, so nothing is learned, and this is not "
                "said again; look at rollouts/*.jsonl, at reward.name and at the reference answers"
            )
