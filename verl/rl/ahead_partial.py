"""Answers that are drawn one step ahead without a pause (`rollout.partial=true`), see `verl.rl.partial_server`.

The answers of step k+1 begin under weights k, as soon as these are published, while answers of step k are still drawn. New weights do not
wait for answers: unfinished ones go on under them. So the weights that draw a token are at most one update older than those that learn
from it.

    step k       ask for answers k+1; wait for answers k, which are drawn since step k-1; learn from k -> weights k+1; publish them
"""

from collections.abc import Sequence
from pathlib import Path

from verl import dist
from verl.config.ppo import PPOConfig
from verl.data.prompts import Prompt, Prompts
from verl.engine.position import Position
from verl.rl.ahead import check_logprobs, read_drawn, share_of
from verl.rl.remote_rollout import RemoteRollout
from verl.rollout import Completion, Sampling


class PartialAhead:
    """The answers of this step and the next. Every training rank calls its methods; see `verl.rl.ahead.Ahead`.

    Args:
        start: position at which the run begins.
        total_steps: steps of the whole run; after the last one, nothing is asked for.
    """

    def __init__(self, rollout: RemoteRollout, sampling: Sampling, prompts: Prompts, config: PPOConfig, start: Position, total_steps: int):
        self._rollout, self._sampling, self._prompts = rollout, sampling, prompts
        self._per_step, self._seed = config.data.prompts_per_step, config.trainer.seed
        self._drawn, self._steps_left = start.drawn, total_steps - start.step
        self._begun: list[list[int]] = []  # for each step whose answers are being drawn, numbers of the prompts on this rank
        self._known: dict[int, list[Completion]] = {}  # answers so far of the checkpoint, of all ranks

    def begin(self, drawn: int) -> None:
        """Do nothing: `take` has begun them."""

    def finish(self) -> None:
        """Do nothing: new weights do not wait for answers."""

    def take(self, prompts: Sequence[tuple[int, Prompt]]) -> list[Completion]:
        """Begin the answers of the next step, and wait for those to this rank's prompts of the step that begins.

        Raises:
            AbandonedError: on all ranks: a signal came.
        """
        if not self._begun:
            self._begin(self._drawn, is_again=bool(self._known))
        if self._steps_left > 1 and len(self._begun) == 1:
            self._begin(self._drawn + self._per_step)
        done = self._rollout.finish()
        check_logprobs(done)
        self._begun.pop(0)
        self._drawn, self._steps_left, self._known = self._drawn + self._per_step, self._steps_left - 1, {}
        return done

    def _begin(self, first: int, *, is_again: bool = False) -> None:
        mine = share_of(self._prompts, range(first, first + self._per_step), self._seed)
        numbers = [number for number, _ in mine]
        so_far = {number: self._known[number] for number in numbers if number in self._known}
        self._rollout.begin([prompt.token_ids for _, prompt in mine], self._sampling, numbers, so_far, is_again=is_again)
        self._begun.append(numbers)

    # --- checkpoints

    def restore(self, checkpoint: Path, drawn: int) -> None:
        """Take the answers of a checkpoint as they were, whatever the number of ranks that wrote it. See `verl.rl.ahead.Ahead.restore`."""
        self._known = read_drawn(checkpoint, drawn, [self._per_step, 2 * self._per_step], self._sampling.n)

    def gathered(self) -> dict[int, list[Completion]]:
        """Return what the answers of all ranks have so far, by the number of their prompt. They stop, and go on from there."""
        if not self._begun:
            return self._known
        n, mine = self._sampling.n, dict[int, list[Completion]]()
        for numbers, answers in zip(self._begun, self._rollout.cut(), strict=True):
            mine |= {number: answers[i * n : (i + 1) * n] for i, number in enumerate(numbers)}
        return {number: answers for of_rank in dist.gathered(mine) for number, answers in of_rank.items()}
