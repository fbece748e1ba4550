"""Generation: one file an engine, each with the contract below."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        max_new_tokens: longest answer, its stop token included.
        temperature: 0 takes the most likely token each time; above it, the distribution is that of the logits divided by it, uncut.
        n: answers to each prompt.
        seed: of the draws; the same call on the same machine draws the same answers.
    """

    max_new_tokens: int
    temperature: float = 0.0
    n: int = 1
    seed: int = 1


@dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
        token_ids: the generated tokens, with the stop token that ended them.
        finish_reason: "stop", or "length" when it was cut at max_new_tokens.
    """

    token_ids: list[int]
    finish_reason: Literal["stop", "length"]


class Rollout(Protocol):
    """An engine that generates."""

    def stream(self, prompts: Sequence[list[int]], sampling: Sampling) -> Iterator[list[tuple[int, Completion]]]:
        """Answers as they are done, in any order.

        Args:
            prompts: token ids, at least one each.
        Yields:
            numbered answers; `sampling.n` answers to prompt i have the numbers from `i * n` to `i * n + n - 1`.
        """
        ...

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[Completion]:
        """All answers, in the order of their numbers: those to one prompt side by side, prompts in the caller's order."""
        ...
