"""What a step learns from: its answers in micro-batches, with log-probabilities, values and advantages.

Dimensions: A answers of this rank, M trained positions of a micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from verl.algorithms.answers import Advantages, Answers
from verl.config.algorithm import AlgorithmConfig
from verl.engine.engine import Engine
from verl.engine.references import AdapterOffReference
from verl.errors import UserError
from verl.rl.answering import Collected, groups_with_spread
from verl.rl.method import Method
from verl.rl.samples import PackedSamples, Sample, pack_samples

Values = list[np.ndarray]  # for each answer, one float32 value for each of its trained tokens


@dataclass
class Experience:
    """The answers of a step on this rank. Lists hold an array for each answer, with a value for each trained token.

    Attributes:
        updates: micro-batches of each update.
        old_logprobs: before the updates, as the trainer has them; None where the one update has them itself.
        ref_logprobs: of the reference, if there is one.
        values: of the critic, if there is one.
        learned: advantages and returns.
    """

    samples: list[Sample]
    updates: list[PackedSamples]
    old_logprobs: Values | None = None
    ref_logprobs: Values | None = None
    values: Values | None = None
    learned: Advantages | None = field(default=None)

    @property
    def rollout_logprobs(self) -> Values | None:
        """As they were when the tokens were drawn; None where the rollout does not tell."""
        found = [sample.trained_logprobs for sample in self.samples]
        return None if any(logprobs is None for logprobs in found) else found  # type: ignore[return-value]

    def logprobs_before(self, actor: Engine, shared: AlgorithmConfig) -> Values:
        """Of the trainer, or as the rollout drew the tokens, whichever the method takes for the old policy's."""
        if shared.old_logprobs == "trainer":
            return self.scored(actor, "logprob_M")
        if self.rollout_logprobs is None:
            fix = "set algorithm.old_logprobs=trainer, or another rollout.name"
            raise UserError("the rollout does not tell its log-probabilities", where="algorithm.old_logprobs=rollout", fix=fix)
        return self.rollout_logprobs

    def scored(self, engine: Engine | AdapterOffReference, name: str) -> Values:
        """What an engine says of all trained tokens: `logprob_M` or `value_M`. Every rank calls it."""
        outs = iter(engine.score([batch for packed in self.updates for batch in packed.batches]))
        found: dict[int, np.ndarray] = {}
        for packed in self.updates:
            found |= packed.per_answer([getattr(next(outs), name) for _ in packed.batches])
        return [found[number] for number in range(len(self.samples))]

    def advantages(self, method: Method, settings: Any, max_new_tokens: int) -> Advantages:
        """What the method makes of the answers, with settings that may have changed since the run began. Every rank calls it."""
        answers = Answers(
            reward_A=np.array([sample.reward for sample in self.samples], dtype=np.float32),
            group_A=np.array([sample.group for sample in self.samples], dtype=np.int64),
            lengths_A=np.array([sample.trained_tokens for sample in self.samples], dtype=np.int64),
            truncated_A=np.array([sample.finish_reason == "length" for sample in self.samples], dtype=bool),
            max_new_tokens=max_new_tokens,
            old_logprobs=self.old_logprobs,
            ref_logprobs=self.ref_logprobs,
            values=self.values,
        )
        learned: Advantages = method.module.advantages(answers, settings)
        return learned

    def packed(self) -> list[PackedSamples]:
        """The micro-batches of each update, with all that a loss may ask for."""
        assert self.learned is not None
        fields = {
            "advantage_M": self.learned.advantages,
            "return_M": self.learned.returns,
            "old_logprob_M": self.old_logprobs,
            "ref_logprob_M": self.ref_logprobs,
            "rollout_logprob_M": self.rollout_logprobs,
            "value_M": self.values,
        }
        return [packed.with_fields(**fields) for packed in self.updates]


def in_micro_batches(collected: Collected, updates: int, token_budget: int, *, fill: int, apart: bool) -> Experience:
    """Answers cut into the step's updates, as many prompts in each, whatever rank answered them. Every rank calls it.

    Args:
        token_budget: of a micro-batch, at most.
        fill: micro-batches are filled up to a multiple of so many tokens, which GPUs multiply faster.
        apart: answers of groups without spread, which may have no advantage, share no micro-batch with others.
    """
    place = {number: position * updates // len(collected.kept) for position, number in enumerate(collected.kept)}
    samples = collected.samples
    chosen: list[Sequence[int]] = [[i for i, s in enumerate(samples) if place[s.group] == update] for update in range(updates)]
    spread = set(groups_with_spread(samples)) if apart else place.keys()
    alone = {i for i, s in enumerate(samples) if s.group not in spread}
    packed = [pack_samples(samples, numbers, token_budget, multiple_of_tokens=fill, apart=alone) for numbers in chosen]
    return Experience(samples, packed)
