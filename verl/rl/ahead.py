"""Answers that are drawn one step ahead, by rollout ranks of their own (`rollout.staleness=1`).

While the trainer learns from the answers of a step, the rollout draws those of the next one. New weights are published when they are there,
so all tokens of an answer are drawn by weights that are one update older than those that learn from it.

    step k       answers k are here; ask for answers k+1; learn from k -> weights k+1; wait for answers k+1; publish weights k+1
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from verl import dist
from verl.config.ppo import PPOConfig
from verl.data.prompts import Prompt, Prompts
from verl.engine.background import SavedModel
from verl.engine.engine import Engine
from verl.engine.position import Position
from verl.errors import UserError
from verl.rl.answers_file import NAME, read_answers, write_answers
from verl.rl.mapping import Layout
from verl.rl.remote_rollout import RemoteRollout
from verl.rl.schedule import events_after
from verl.rollout import Completion, Sampling


class Ahead:
    """The answers of the next step, from when they are asked for until they are learned from. Every training rank calls its methods.

    Args:
        start: position at which the run begins.
        total_steps: steps of the whole run; after the last one, nothing is asked for.
    """

    def __init__(self, rollout: RemoteRollout, sampling: Sampling, prompts: Prompts, config: PPOConfig, start: Position, total_steps: int):
        self._rollout, self._sampling, self._prompts = rollout, sampling, prompts
        self._per_step, self._seed = config.data.prompts_per_step, config.trainer.seed
        self._steps_left = total_steps - start.step
        self._asked: list[int] = []  # numbers of the prompts on this rank
        self._is_asked = self._is_here = False
        self._here: dict[int, list[Completion]] = {}

    def begin(self, drawn: int) -> None:
        """Ask for the answers of the next step, if there is one.

        Args:
            drawn: number of prompts drawn before it, over all ranks.
        """
        self._steps_left -= 1
        if self._steps_left == 0:
            return
        mine = share_of(self._prompts, range(drawn, drawn + self._per_step), self._seed)
        self._asked, self._is_asked = [number for number, _ in mine], True
        self._rollout.begin([prompt.token_ids for _, prompt in mine], self._sampling, self._asked)

    def finish(self) -> None:
        """Wait for the answers that were asked for.

        Raises:
            UserError: on all ranks: the rollout returns no log-probabilities.
        """
        if not self._is_asked:
            self._is_here = False
            return
        done = self._rollout.finish()
        check_logprobs(done)
        n = self._sampling.n
        self._here = {number: done[i * n : (i + 1) * n] for i, number in enumerate(self._asked)}
        self._is_asked, self._is_here = False, True

    def take(self, prompts: Sequence[tuple[int, Prompt]]) -> list[Completion] | None:
        """Return the answers to this rank's numbered prompts, for the step that begins; None if none were drawn ahead.

        They are kept until the step is done, for a checkpoint of the step before.
        """
        if not self._is_here:
            return None
        return [completion for number, _ in prompts for completion in self._here[number]]

    # --- checkpoints

    def restore(self, checkpoint: Path, drawn: int) -> None:
        """Take the answers of a checkpoint, whatever the number of ranks that wrote it.

        Args:
            drawn: number of prompts drawn before the step that begins.
        Raises:
            UserError: on all ranks: the file is damaged.
        """
        found = read_drawn(checkpoint, drawn, [self._per_step], self._sampling.n)
        if not all(answer.is_finished for answers in found.values() for answer in answers):
            fix = "set rollout.partial=true, as in the run of this checkpoint"
            raise UserError("has unfinished answers, which go on under newer weights", where=str(checkpoint), fix=fix)
        self._is_here = bool(found)
        self._here = {number: answers for number, answers in found.items() if number % dist.world_size() == dist.rank()}

    def gathered(self) -> dict[int, list[Completion]]:
        """Return the answers of all ranks that are here, by the number of their prompt. Every rank calls it."""
        of_ranks = dist.gathered(self._here if self._is_here else {})
        return {number: answers for of_rank in of_ranks for number, answers in of_rank.items()}


class Gathers(Protocol):
    """Draws answers ahead."""

    def gathered(self) -> dict[int, list[Completion]]:
        """Return the answers of all ranks for a checkpoint, by the number of their prompt. Every rank calls it."""
        ...


class SavedWithAnswers:
    """A model that is saved with the answers of the next step, see `verl.engine.background.SavedModel`."""

    def __init__(self, model: SavedModel, ahead: Gathers):
        self._model, self._ahead = model, ahead

    @property
    def engine(self) -> Engine:
        return self._model.engine

    def export(self, directory: Path) -> None:
        """Write the model's files and the answers. Every rank calls it."""
        self._model.export(directory)
        _write(directory, self._ahead.gathered())

    def gathered(self, copies: dict[str, Tensor]) -> Callable[[Path], None]:
        """Prepare `export`, and return the part that writes. Every rank calls it."""
        write, drawn = self._model.gathered(copies), self._ahead.gathered()

        def write_all(directory: Path) -> None:
            write(directory)
            _write(directory, drawn)

        return write_all


def _write(directory: Path, drawn: dict[int, list[Completion]]) -> None:
    if dist.is_main() and drawn:
        write_answers(directory / NAME, drawn)


def read_drawn(checkpoint: Path, drawn: int, expected: Sequence[int], samples: int) -> dict[int, list[Completion]]:
    """Return the answers that a checkpoint has, of all ranks; none if it has no file of them. Every rank calls it.

    Args:
        drawn: number of prompts drawn before the step that begins.
        expected: how many prompts may have answers.
        samples: number of answers to each.
    Raises:
        UserError: on all ranks: the file is damaged.
    """
    of_main: list[dict[int, list[Completion]]] = []
    dist.together(lambda: of_main.append(read_answers(checkpoint) if dist.is_main() else {}))
    found = dist.from_main(of_main[0])
    is_next = sorted(found) == list(range(drawn, drawn + len(found))) and len(found) in [0, *expected]
    if not is_next or any(len(answers) != samples for answers in found.values()):
        what = f"{NAME} has other answers than {samples} to each prompt that is drawn next, from number {drawn} on"
        raise UserError(what, where=str(checkpoint), fix="resume with the settings of its run, or from another checkpoint")
    return found


def share_of(prompts: Prompts, numbers: range, seed: int) -> list[tuple[int, Prompt]]:
    """Return the prompts of these numbers that this rank asks."""
    return [(number, prompts.drawn(number, seed)) for number in numbers if number % dist.world_size() == dist.rank()]


def check_staleness(config: PPOConfig, layout: Layout) -> None:
    """Raise UserError if answers cannot be drawn ahead, because the rollout has no ranks of its own, or no schedule can be repeated."""
    if config.rollout.replay is not None:
        events_after(config.rollout.replay, 0)
    if config.rollout.staleness > 0 and not layout.is_split:
        raise UserError(
            "the ranks that train also generate, so answers cannot be drawn while they train",
            where="rollout.staleness=1",
            fix="give the rollout ranks of its own, such as mapping.rollout=[1] and [0] for the other roles with 2 processes; or set 0",
        )


def check_logprobs(answers: Sequence[Completion]) -> None:
    """Raise UserError, on all ranks, if answers have no log-probabilities. Every rank calls it."""

    def check() -> None:
        if any(answer.logprobs is None and answer.token_ids for answer in answers):
            raise UserError(
                "the rollout returns no log-probabilities, by which answers of older weights are corrected",
                where="rollout.staleness=1",
                fix="set another rollout.name, or rollout.staleness=0",
            )

    dist.together(check)
