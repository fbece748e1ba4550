"""The native engine for responses that are added, stopped and gone on with, see `verl.rollout.drawing`.

Dimensions: G generated tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from verl.rollout import Completion, Sampling
from verl.rollout._sampler import uniform_numbers
from verl.rollout.drawing import Drawing
from verl.rollout.native.scheduler import Request, Scheduler


class Engine(Protocol):
    """What `verl.rollout.native.engine.NativeRollout` does here."""

    scheduler: Scheduler

    def check_lengths(self, prompts: Sequence[list[int]], sampling: Sampling) -> int: ...

    def prepare(self, sampling: Sampling, responses: int, positions: int, *, at_most: int) -> None: ...

    def advance(self, sampling: Sampling) -> list[tuple[int, Completion]]: ...

    def so_far(self, sampling: Sampling) -> list[tuple[int, Completion]]: ...


class NativeContinuous:
    """See `verl.rollout.drawing.Continuous`.

    Args:
        responses: number of responses at the same time.
        positions: maximum tokens of a prompt with its response.
    """

    def __init__(self, engine: Engine, sampling: Sampling, responses: int, positions: int):
        engine.scheduler.forget_prompts()  # so that what was generated before changes nothing, not even the rounding
        engine.prepare(sampling, responses, positions, at_most=responses)
        self._engine, self._sampling = engine, sampling
        self._drawings: dict[int, Drawing] = {}  # by the number of their request
        self._added = 0

    @property
    def steps(self) -> int:
        """Decode steps so far."""
        return self._engine.scheduler.steps

    @property
    def has_work(self) -> bool:
        """Return whether a response is not finished."""
        return self._engine.scheduler.has_work

    def add(self, drawings: Sequence[Drawing]) -> None:
        """See `verl.rollout.drawing.Continuous.add`."""
        due = [drawing for drawing in drawings if not drawing.so_far.is_finished]
        for drawing in due:
            self._engine.check_lengths([drawing.prompt], replace(self._sampling, max_new_tokens=drawing.limit(self._sampling)))
        numbers = range(self._added, self._added + len(due))
        self._added += len(due)
        self._drawings |= dict(zip(numbers, due, strict=True))
        self._engine.scheduler.add(_request(number, drawing, self._sampling) for number, drawing in zip(numbers, due, strict=True))

    def step(self) -> None:
        """See `verl.rollout.drawing.Continuous.step`."""
        for number, completion in self._engine.advance(self._sampling):
            self._drawings.pop(number).append(completion)

    def stop(self) -> None:
        """See `verl.rollout.drawing.Continuous.stop`."""
        for number, completion in self._engine.so_far(self._sampling):
            self._drawings.pop(number).append(completion)
        self._drawings.clear()


def _request(number: int, drawing: Drawing, sampling: Sampling) -> Request:
    """Return the request for the tokens that are left, after those so far."""
    so_far = drawing.so_far.token_ids
    uniform_G = np.zeros(0, dtype=np.float32)
    if sampling.temperature > 0:
        uniform_G = np.zeros(sampling.max_new_tokens, dtype=np.float32)  # of equal length in all requests
        uniform_G[: sampling.max_new_tokens - len(so_far)] = uniform_numbers(sampling, drawing.seed, drawing.number)[len(so_far) :]
    return Request(number, (*drawing.prompt, *so_far), drawing.limit(sampling) - len(so_far), uniform_G)
