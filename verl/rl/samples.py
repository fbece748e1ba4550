"""Answers, and the packed batches that they become.

Dimensions: A answers, M trained positions of a micro-batch.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from verl import dist
from verl.data.batch import VALUES, Batch
from verl.data.pack import collate, pack
from verl.data.prompts import Prompt


@dataclass
class Sample:
    """One answer to a prompt: the token ids of a chat as the model saw and drew them, appended and never made again from text.

    Attributes:
        prompt: what was answered.
        group: number of the prompt among all that were drawn since the run began; its answers have the same.
        prompt_ids: tokens before the answer.
        answer_ids: tokens of the answer; with tools, of all turns, the others' too.
        answer_mask: whether each of them was drawn by the model, and is trained.
        logprobs: of each of them, natural log, as the rollout drew it at its temperature; 0 where it was not drawn.
            None where the rollout does not tell.
        text: the answer without its stop token; with tools, of the last turn.
        earlier: the turns before the last, the model's and the tool's by turns.
        finish_reason: "stop", or "length" where the answer was cut.
        version: of the weights that drew it.
        reward: what it earned.
        parts: what each grader gave, by name.
        turns: that the model took.
    """

    prompt: Prompt
    group: int
    prompt_ids: list[int]
    answer_ids: list[int]
    answer_mask: list[bool]
    logprobs: list[float] | None
    text: str
    finish_reason: str
    version: int
    reward: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    turns: int = 1
    earlier: list[str] = field(default_factory=list)

    @property
    def document(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and whether each is trained."""
        ids = np.array(self.prompt_ids + self.answer_ids, dtype=np.int32)
        return ids, np.array([False] * len(self.prompt_ids) + self.answer_mask, dtype=bool)

    @property
    def trained_tokens(self) -> int:
        return sum(self.answer_mask)

    @property
    def trained_logprobs(self) -> np.ndarray | None:
        """The rollout's log-probabilities of the trained tokens, float32; of no token they are always known."""
        if self.trained_tokens == 0:
            return np.zeros(0, dtype=np.float32)
        if self.logprobs is None:
            return None
        trained: np.ndarray = np.array(self.logprobs, dtype=np.float32)[np.array(self.answer_mask, dtype=bool)]
        return trained


@dataclass(frozen=True)
class PackedSamples:
    """The micro-batches of one update on this rank, and which answers lie in each.

    Attributes:
        samples: all answers of the step on this rank.
        members: for each micro-batch the numbers of its answers in `samples`, in the order of its documents.
        multiple_of_tokens: what each micro-batch is filled up to.
    """

    samples: list[Sample]
    members: list[list[int]]
    batches: list[Batch]
    multiple_of_tokens: int = 1

    def per_answer(self, values: Sequence[Tensor]) -> dict[int, np.ndarray]:
        """Values of the trained positions of each micro-batch, cut into those of each answer, by its number."""
        found: dict[int, np.ndarray] = {}
        for numbers, values_M in zip(self.members, values, strict=True):
            ends = np.cumsum([self.samples[number].trained_tokens for number in numbers])
            parts = np.split(values_M.float().cpu().numpy(), ends)
            found |= dict(zip(numbers, parts, strict=False))
        return found

    def with_fields(self, **fields: list[np.ndarray] | None) -> "PackedSamples":
        """The same with a value for each trained position, given as one array for each answer of `samples`; None: the field stays away."""
        given = {name: arrays for name, arrays in fields.items() if arrays is not None}
        batches = []
        for numbers, batch in zip(self.members, self.batches, strict=True):
            values: dict[str, Any] = {name: _joined([arrays[number] for number in numbers]) for name, arrays in given.items()}
            batches.append(replace(batch, **values))
        return replace(self, batches=batches)

    def by_advantage(self) -> tuple[list[Batch], list[Batch]]:
        """Micro-batches in which a token has an advantage, as many on every rank, and those in which none has.

        Where no rank has an advantage, all and none. Every rank calls it.
        """
        has_some = [bool(batch.advantage_M.any()) for batch in self.batches if batch.advantage_M is not None]
        some = [batch for batch, has in zip(self.batches, has_some, strict=True) if has]
        none = [batch for batch, has in zip(self.batches, has_some, strict=True) if not has]
        most = dist.most(len(some))
        if most == 0:
            return self.batches, []
        return some + [_filler(self.batches[0], self.multiple_of_tokens)] * (most - len(some)), none


def _filler(like: Batch, tokens: int) -> Batch:
    """A micro-batch without answers, with the fields of another."""
    fields: dict[str, Any] = {name: value[:0] for name in VALUES if (value := getattr(like, name)) is not None}
    return replace(collate([], [], multiple_of_tokens=tokens), **fields)


def _joined(arrays: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.float32), *arrays]).astype(np.float32))


def pack_samples(
    samples: list[Sample], chosen: Sequence[int], token_budget: int, *, multiple_of_tokens: int = 1, apart: Container[int] = ()
) -> PackedSamples:
    """Micro-batches of whole answers with their prompts; as many on every rank, filler where one has fewer. Every rank calls it.

    Args:
        samples: all answers of the step on this rank.
        chosen: numbers of those that are packed.
        token_budget: most tokens of a micro-batch.
        apart: numbers of those that share no micro-batch with the others.
    """
    kinds = ([number for number in chosen if number not in apart], [number for number in chosen if number in apart])
    members = [numbers for kind in kinds for numbers in _members(samples, kind, token_budget)] or [[]]
    batches = [collate([samples[i].document for i in numbers], numbers, multiple_of_tokens=multiple_of_tokens) for numbers in members]
    return PackedSamples(samples, members, batches, multiple_of_tokens)


def _members(samples: list[Sample], chosen: Sequence[int], token_budget: int) -> list[list[int]]:
    """Which of the chosen answers share a micro-batch. As many lists on every rank, none where no rank has any answer."""
    if dist.most(len(chosen)) == 0:
        return []
    lengths = [len(samples[number].prompt_ids) + len(samples[number].answer_ids) for number in chosen]
    groups = pack(lengths, token_budget=token_budget, multiple_of=1)
    most = dist.most(len(groups))
    return [[chosen[i] for i in group] for group in groups] + [[] for _ in range(most - len(groups))]
