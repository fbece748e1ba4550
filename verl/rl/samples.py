"""Answers, and packed batches of them.

Dimensions: A answers, M trained positions of a micro-batch.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from verl import dist
from verl.data.batch import VALUES, Batch
from verl.data.groups import Group, collate_groups, numbers_of, pack_groups, pieces_of
from verl.data.pack import Document, collate
from verl.data.prompts import Prompt
from verl.rl.outcome import Outcome


@dataclass
class Sample:
    """One answer to a prompt. Its token ids are those that the model read and sampled, never tokenized again from text.

    Attributes:
        group: number of the prompt among all drawn since the run began. Answers to one prompt have the same number.
        prompt_ids: tokens before the answer.
        answer_ids: tokens of the answer; with a tool, all turns, including the tool's replies.
        answer_mask: whether each answer token was sampled, and so is trained.
        logprobs: log-probability of each answer token at the rollout's temperature, natural log; 0 for tokens that were not sampled.
            None if the rollout does not return them.
        text: the answer without its stop token; with a tool, the model's last turn.
        earlier: texts of the turns before the last, model and tool in turn.
        finish_reason: "stop", or "length" if the answer was cut off.
        version: version of the weights that sampled the answer; of its first token, if `versions` are several.
        versions: version of the weights for each token of the answer; None: `version` for all.
        parts: reward of each grader, by name.
        turns: number of the model's turns.
        outcome: how its episode ended, if it acted in an environment.
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
    versions: list[int] | None = None
    outcome: Outcome | None = None

    @property
    def document(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, and whether each is trained."""
        ids = np.array(self.prompt_ids + self.answer_ids, dtype=np.int32)
        return ids, np.array([False] * len(self.prompt_ids) + self.answer_mask, dtype=bool)

    @property
    def trained_tokens(self) -> int:
        return sum(self.answer_mask)

    @property
    def trained_versions(self) -> list[int]:
        """Version of the weights that sampled each trained token."""
        if self.versions is None:
            return [self.version] * self.trained_tokens
        return [version for version, is_trained in zip(self.versions, self.answer_mask, strict=True) if is_trained]

    def append(self, token_ids: list[int], version: int | list[int], *, trained: bool) -> None:
        """Append tokens to the answer, with the version of the weights that sampled them."""
        added = version if isinstance(version, list) else [version] * len(token_ids)
        if self.versions is None and any(each != self.version for each in added):
            self.versions = [self.version] * len(self.answer_ids)
        if self.versions is not None:
            self.versions += added
        self.answer_ids += token_ids
        self.answer_mask += [trained] * len(token_ids)

    @property
    def trained_logprobs(self) -> np.ndarray | None:
        """The rollout's log-probabilities of the trained tokens, float32; None if it returns none. Empty if no token is trained."""
        if self.trained_tokens == 0:
            return np.zeros(0, dtype=np.float32)
        if self.logprobs is None:
            return None
        trained: np.ndarray = np.array(self.logprobs, dtype=np.float32)[np.array(self.answer_mask, dtype=bool)]
        return trained


@dataclass(frozen=True)
class PackedSamples:
    """The micro-batches of one update on this rank.

    Attributes:
        samples: all answers of the step on this rank.
        members: for each micro-batch, the indices of its answers in `samples`, in the order of its documents.
        multiple_of_tokens: micro-batches are filled to a multiple of this.
    """

    samples: list[Sample]
    members: list[list[int]]
    batches: list[Batch]
    multiple_of_tokens: int = 1

    def per_answer(self, values: Sequence[Tensor]) -> dict[int, np.ndarray]:
        """Split values per trained position of each micro-batch into arrays per answer, by the answer's number."""
        found: dict[int, np.ndarray] = {}
        for numbers, values_M in zip(self.members, values, strict=True):
            ends = np.cumsum([self.samples[number].trained_tokens for number in numbers])
            parts = np.split(values_M.float().cpu().numpy(), ends)
            found |= dict(zip(numbers, parts, strict=False))
        return found

    def with_fields(self, **fields: list[np.ndarray] | None) -> "PackedSamples":
        """Return a copy with fields of values per trained position.

        Args:
            fields: one array per answer of `samples` for each field, by field name; None: the field is not set.
        """
        given = {name: arrays for name, arrays in fields.items() if arrays is not None}
        batches = []
        for numbers, batch in zip(self.members, self.batches, strict=True):
            values: dict[str, Any] = {name: _joined([arrays[number] for number in numbers]) for name, arrays in given.items()}
            batches.append(replace(batch, **values))
        return replace(self, batches=batches)

    def by_advantage(self) -> tuple[list[Batch], list[Batch]]:
        """Split micro-batches into those with a non-zero advantage and those without any. Every rank calls it.

        Filler makes the first list equally long on all ranks. If no rank has a non-zero advantage, all micro-batches are in the first list.
        """
        has_some = [bool(batch.advantage_M.any()) for batch in self.batches if batch.advantage_M is not None]
        some = [batch for batch, has in zip(self.batches, has_some, strict=True) if has]
        none = [batch for batch, has in zip(self.batches, has_some, strict=True) if not has]
        most = dist.most(len(some))
        if most == 0:
            return self.batches, []
        return some + [_filler(self.batches[0], self.multiple_of_tokens)] * (most - len(some)), none


def _filler(like: Batch, tokens: int) -> Batch:
    """Return a micro-batch without answers, with the fields of another."""
    fields: dict[str, Any] = {name: value[:0] for name in VALUES if (value := getattr(like, name)) is not None}
    return replace(collate([], [], multiple_of_tokens=tokens), **fields)


def _joined(arrays: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.float32), *arrays]).astype(np.float32))


def pack_samples(
    samples: list[Sample],
    chosen: Sequence[int],
    token_budget: int,
    *,
    multiple_of_tokens: int = 1,
    separate: Container[int] = (),
    share_prompts: bool = False,
) -> PackedSamples:
    """Pack whole answers with their prompts into micro-batches; filler makes their number equal on all ranks. Every rank calls it.

    Args:
        samples: all answers of the step on this rank.
        chosen: numbers of the answers to pack.
        token_budget: maximum number of tokens of a micro-batch.
        multiple_of_tokens: micro-batches are filled to a multiple of this.
        separate: numbers of answers that get micro-batches of their own.
        share_prompts: whether a micro-batch has a prompt once for all of its answers.
    """
    kinds = ([number for number in chosen if number not in separate], [number for number in chosen if number in separate])
    documents = {number: samples[number].document for number in chosen}
    of_prompt = {number: samples[number].group if share_prompts else number for number in chosen}
    bins = [groups for kind in kinds for groups in _bins(documents, kind, of_prompt, token_budget)] or [[]]
    batches = [collate_groups(groups, documents.__getitem__, multiple_of_tokens=multiple_of_tokens) for groups in bins]
    return PackedSamples(samples, [numbers_of(groups) for groups in bins], batches, multiple_of_tokens)


def _bins(documents: Mapping[int, Document], chosen: Sequence[int], of_prompt: Mapping[int, int], token_budget: int) -> list[list[Group]]:
    """Return the answers of each micro-batch in groups: equally many lists on all ranks, none if no rank has answers.

    Args:
        of_prompt: for each answer, a number that those which may share their prompt have in common.
    """
    if dist.most(len(chosen)) == 0:
        return []
    together: dict[int, list[int]] = {}
    for number in chosen:
        together.setdefault(of_prompt[number], []).append(number)
    groups = [piece for numbers in together.values() for piece in pieces_of(numbers, documents.__getitem__, token_budget)]
    bins = pack_groups(groups, token_budget=token_budget, multiple_of=1)
    return bins + [[] for _ in range(dist.most(len(bins)) - len(bins))]
