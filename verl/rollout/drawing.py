"""Responses that are drawn piece by piece: while they run, others are added, and they can be stopped and go on under newer weights.

An engine that can do this has a method

    continuous(sampling, responses, positions) -> Continuous      begin, with nothing to draw

and goes on with a response as with a prompt: the tokens so far are computed anew with the weights of now, so that nothing that older
weights have computed has a part in the tokens that follow.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from verl.rollout import Completion, Rollout, Sampling


@dataclass
class Drawing:
    """A response while it is drawn.

    Attributes:
        seed, number: of the prompt, and of the response among those to it: its random numbers depend on them, and on the position of a
            token, but not on where it was stopped.
        so_far: its tokens until now.
        max_new_tokens: maximum tokens of the response; None: those of the sampling, which are never fewer.
    """

    prompt: list[int]
    seed: int
    number: int
    so_far: Completion = field(default_factory=lambda: Completion([], "length", [], is_finished=False))
    max_new_tokens: int | None = None

    def limit(self, sampling: Sampling) -> int:
        """Return the maximum tokens of the response."""
        return sampling.max_new_tokens if self.max_new_tokens is None else self.max_new_tokens

    def append(self, more: Completion) -> None:
        """Append tokens that were drawn by the weights of `more.version`."""
        before, added = self.so_far, [more.version] * len(more.token_ids)
        versions = [*versions_of(before), *added]
        first = versions[0] if versions else more.version
        self.so_far = Completion(
            before.token_ids + more.token_ids,
            more.finish_reason,
            [*(before.logprobs or []), *(more.logprobs or [])],
            first,
            None if set(versions) <= {first} else versions,
            more.is_finished,
        )


def versions_of(completion: Completion) -> list[int]:
    """Return the version of the weights of each token."""
    return completion.versions or [completion.version] * len(completion.token_ids)


class Continuous(Protocol):
    """Responses that are being drawn.

    Attributes:
        steps: decode steps so far.
        has_work: whether a response is not finished.
    """

    steps: int

    @property
    def has_work(self) -> bool: ...

    def add(self, drawings: Sequence[Drawing]) -> None:
        """Draw these too; those that are finished are left alone. They start in this order, as soon as there is room."""
        ...

    def step(self) -> None:
        """Take one decode step or a few. Responses that are finished then have their tokens."""
        ...

    def stop(self) -> None:
        """Give every response the tokens that it has so far, and end. The engine can then be used for something else."""
        ...


def can_continue(rollout: Rollout) -> bool:
    """Return whether an engine can stop a response and go on with it."""
    return hasattr(rollout, "continuous")


def begin(rollout: Any, sampling: Sampling, responses: int, positions: int) -> Continuous:
    """Begin to draw with an engine that can continue.

    Args:
        responses: number of responses at the same time.
        positions: maximum tokens of a prompt with its response.
    """
    drawing: Continuous = rollout.continuous(sampling, responses, positions)
    return drawing
