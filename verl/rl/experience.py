"""The training data of a step: answers in micro-batches, with log-probabilities, values and advantages.

An agent's answer may have several trajectories. A method's `advantages` sees an answer as one: the trained tokens of its trajectories one
after the other, with one reward. A loss sees the trajectories, each as a document of its own.

Dimensions: A answers of this rank, M trained positions of a micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from verl.algorithms.answers import Advantages, Answers
from verl.config.algorithm import AlgorithmConfig
from verl.engine.engine import Engine
from verl.engine.references import AdapterOffReference
from verl.errors import UserError
from verl.rl.answering import Collected, groups_with_spread
from verl.rl.balance import balanced, trained_on
from verl.rl.method import Method
from verl.rl.samples import PackedSamples, Sample, pack_samples

Values = list[np.ndarray]  # one float32 array per trajectory, with one value per trained token


@dataclass
class Experience:
    """The answers of a step on this rank.

    Attributes:
        answers: the answers.
        samples: all trajectories of all answers, answer by answer.
        updates: micro-batches of each update.
        tokens: number of tokens that all updates compute, on this rank.
        old_logprobs: log-probabilities before the updates; None if the forward pass of the only update computes them.
        ref_logprobs: log-probabilities under the reference model, if there is one.
        values: values of the critic, if there is one.
        learned: advantages and returns, set before the updates.
    """

    answers: list[Sample]
    samples: list[Sample]
    updates: list[PackedSamples]
    tokens: int = 0
    old_logprobs: Values | None = None
    ref_logprobs: Values | None = None
    values: Values | None = None
    learned: Advantages | None = field(default=None)

    @property
    def rollout_logprobs(self) -> Values | None:
        """Log-probabilities at sampling time; None if the rollout does not return them."""
        found = [sample.trained_logprobs for sample in self.samples]
        return None if any(logprobs is None for logprobs in found) else found  # type: ignore[return-value]

    def logprobs_before(self, actor: Engine, shared: AlgorithmConfig) -> Values:
        """Return log-probabilities under the old policy, from the trainer or from the rollout as `algorithm.old_logprobs` says."""
        if shared.old_logprobs == "trainer":
            return self.score(actor, "logprob_M")
        if self.rollout_logprobs is None:
            fix = "set algorithm.old_logprobs=trainer, or another rollout.name"
            raise UserError("the rollout does not return log-probabilities", where="algorithm.old_logprobs=rollout", fix=fix)
        return self.rollout_logprobs

    def score(self, engine: Engine | AdapterOffReference, name: str) -> Values:
        """Compute `logprob_M` or `value_M` of all trained tokens with an engine. Every rank calls it."""
        outs = iter(engine.score([batch for packed in self.updates for batch in packed.batches]))
        found: dict[int, np.ndarray] = {}
        for packed in self.updates:
            found |= packed.per_answer([getattr(next(outs), name) for _ in packed.batches])
        return [found[number] for number in range(len(self.samples))]

    def advantages(self, method: Method, settings: Any, max_new_tokens: int) -> Advantages:
        """Compute the method's advantages. Every rank calls it.

        Args:
            settings: the method's settings, with the current KL coefficient.
        """
        lengths = [sum(trajectory.trained_tokens for trajectory in answer.trajectories) for answer in self.answers]
        answers = Answers(
            reward_A=np.array([answer.reward for answer in self.answers], dtype=np.float32),
            group_A=np.array([answer.group for answer in self.answers], dtype=np.int64),
            lengths_A=np.array(lengths, dtype=np.int64),
            truncated_A=np.array([answer.finish_reason == "length" for answer in self.answers], dtype=bool),
            max_new_tokens=max_new_tokens,
            old_logprobs=self._of_answers(self.old_logprobs),
            ref_logprobs=self._of_answers(self.ref_logprobs),
            values=self._of_answers(self.values),
        )
        learned: Advantages = method.module.advantages(answers, settings)
        returns = None if learned.returns is None else self._of_trajectories(learned.returns)
        return replace(learned, advantages=self._of_trajectories(learned.advantages), returns=returns)

    def _of_answers(self, values: Values | None) -> list[np.ndarray] | None:
        """Join the values of each answer's trajectories."""
        if values is None or len(self.answers) == len(self.samples):
            return values
        each = iter(values)
        return [np.concatenate([next(each) for _ in answer.trajectories]) for answer in self.answers]

    def _of_trajectories(self, values: list[np.ndarray]) -> Values:
        """Divide the values of each answer among its trajectories."""
        if len(self.answers) == len(self.samples):
            return values
        ends = [np.cumsum([trajectory.trained_tokens for trajectory in answer.trajectories])[:-1] for answer in self.answers]
        return [part for of_answer, end in zip(values, ends, strict=True) for part in np.split(of_answer, end)]

    def packed(self) -> list[PackedSamples]:
        """Return the micro-batches of each update, with all fields that a loss may read."""
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


def pack_experience(
    collected: Collected, updates: int, token_budget: int, *, multiple_of_tokens: int, separate: bool, share_prompts: bool
) -> Experience:
    """Split the answers into updates of equally many prompts over all ranks, balance them over ranks, and pack them. Every rank calls it.

    Args:
        token_budget: maximum number of tokens of a micro-batch.
        multiple_of_tokens: micro-batches are filled to a multiple of this, which makes matmuls faster.
        separate: whether groups with equal rewards, whose advantages may be 0, get micro-batches of their own.
        share_prompts: whether a micro-batch has a prompt once for all of its answers.
    """
    collected = balanced(collected, updates, separate=separate, share_prompts=share_prompts)
    place = {number: position * updates // len(collected.kept) for position, number in enumerate(collected.kept)}
    samples = [trajectory for answer in collected.samples for trajectory in answer.trajectories]
    chosen: list[Sequence[int]] = [[i for i, s in enumerate(samples) if place[s.group] == update] for update in range(updates)]
    spread = set(groups_with_spread(collected.samples)) if separate else place.keys()
    flat = {i for i, s in enumerate(samples) if s.group not in spread}
    options: dict[str, Any] = {"multiple_of_tokens": multiple_of_tokens, "separate": flat, "share_prompts": share_prompts}
    packed = [pack_samples(samples, numbers, token_budget, **options) for numbers in chosen]
    return Experience(collected.samples, samples, packed, trained_on(collected.samples, share_prompts=share_prompts))
