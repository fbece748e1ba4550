"""Responses in waves, for an engine that takes no requests while it generates: all that wait are generated together."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from verl import dist, signals
from verl.rollout import Completion, Rollout, Sampling
from verl.rollout._model import check_positions
from verl.rollout.drawing import Drawing


@dataclass(frozen=True)
class _Wave:
    drawings: list[Drawing]
    limits: list[int]


class Waves:
    """See `verl.rollout.drawing.Continuous`. Each step is a whole wave.

    Args:
        is_collective: whether every rank takes part in each call of the engine. All ranks then take the same number of steps.
    """

    def __init__(self, rollout: Rollout, sampling: Sampling, *, is_collective: bool):
        self._rollout, self._sampling, self._is_collective = rollout, replace(sampling, n=1), is_collective
        self._waiting: deque[Drawing] = deque()
        self.steps = 0

    @property
    def has_work(self) -> bool:
        """See `verl.rollout.drawing.Continuous`."""
        return bool(self._waiting)

    def add(self, drawings: Sequence[Drawing]) -> None:
        """See `verl.rollout.drawing.Continuous.add`. Raises UserError: a prompt with its response exceeds the model's positions."""
        for drawing in drawings:
            check_positions(
                [drawing.prompt], replace(self._sampling, max_new_tokens=drawing.limit(self._sampling)), self._rollout.positions
            )
        self._waiting += drawings

    def step(self) -> None:
        """Generate all that wait."""
        calls = self._calls()
        self._waiting.clear()
        self.steps += 1
        for place in range(dist.most(len(calls)) if self._is_collective else len(calls)):
            self._generate(calls[place] if place < len(calls) else _Wave([], []))

    def stop(self) -> None:
        """Forget what waits."""
        self._waiting.clear()

    def _generate(self, wave: _Wave) -> None:
        sampling = replace(self._sampling, max_new_tokens=max(wave.limits, default=1))
        prompts, seeds = [drawing.prompt for drawing in wave.drawings], [drawing.seed for drawing in wave.drawings]
        with signals.abandoning():
            found = self._rollout.generate(prompts, sampling, seeds)
        for drawing, limit, done in zip(wave.drawings, wave.limits, found, strict=True):
            drawing.so_far = cut(done, limit)

    def _calls(self) -> list[_Wave]:
        """Divide what waits into calls.

        All responses of a call share one token limit, the largest of them. None may exceed the model's positions with it.
        """
        calls: list[_Wave] = []
        positions = self._rollout.positions
        limits = {id(drawing): drawing.limit(self._sampling) for drawing in self._waiting}
        for drawing in sorted(self._waiting, key=lambda drawing: -limits[id(drawing)]):
            fits = (call for call in calls if positions is None or len(drawing.prompt) + call.limits[0] <= positions)
            call = next(fits, None)
            if call is None:
                calls.append(call := _Wave([], []))
            call.drawings.append(drawing)
            call.limits.append(limits[id(drawing)])
        return calls


def cut(done: Completion, most: int) -> Completion:
    """Return the first `most` tokens of a response, if it has more."""
    if len(done.token_ids) <= most:
        return done
    logprobs = None if done.logprobs is None else done.logprobs[:most]
    versions = None if done.versions is None else done.versions[:most]
    return replace(done, token_ids=done.token_ids[:most], logprobs=logprobs, versions=versions, finish_reason="length")
