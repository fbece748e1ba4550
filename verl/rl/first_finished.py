"""Over-sampling: a step asks more prompts than it needs, and takes the groups of answers that finish first.

Which groups finish first depends on the answers alone: those whose longest answer is shortest; of equal ones, that of the earlier prompt.
It is the order in which groups finish if all answers grow at the same pace, and it does not depend on the clock, the engine or the number
of ranks. Generation ends as soon as every unfinished group is known to have a longer answer than those that are taken.

The rest is abandoned, and its prompts wait. As soon as a step's number of prompts waits, the next step asks these, the oldest first, and
takes all of them: long answers are generated together (arXiv:2509.21009, tail batching). A prompt keeps its number, and with it the random
numbers of its answers, so that short answers are not preferred in the sum over a run: long ones are trained on later.
"""

import math
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from verl import dist, signals
from verl.config.ppo import PPOConfig
from verl.data.prompts import Prompt, Prompts
from verl.engine.position import Position
from verl.rewards._scoring import Scored
from verl.rl.answering import Answerer, Collected, collect
from verl.rl.clock import Clock
from verl.rl.samples import Sample
from verl.rollout import Completion, Rollout

CHECK_SECONDS = 0.5  # between two looks at what other ranks have; the result does not depend on it
NEVER = 2**62  # more tokens than any answer has


@dataclass(frozen=True, order=True)
class Finished:
    """A group whose answers have all ended, of any rank. They finish in this order.

    Attributes:
        longest: tokens of its longest answer.
        number: number of its prompt.
        has_spread: whether the rewards of its answers differ.
    """

    longest: int
    number: int
    has_spread: bool = field(compare=False)


@dataclass
class Round:
    """What one round of a step has brought.

    Attributes:
        finished: groups of all ranks that have finished before the round was decided, in this order.
        taken: numbers of those that count.
        groups: this rank's groups of `finished` by number, with their rewards.
        abandoned: tokens of this rank's other answers, as far as they were generated.
    """

    finished: list[Finished]
    taken: list[int]
    groups: dict[int, tuple[list[Sample], Scored]]
    abandoned: list[int]


@dataclass
class Step:
    """What a step has collected so far; numbers of groups and answers are over all ranks.

    Attributes:
        drawn: prompts drawn since the run began.
        waiting: abandoned prompts by number, as text, and the step that abandoned them; the oldest first.
        answered, scored: this rank's answers in groups that have finished, and their rewards.
        groups, flat: number of these groups, and of those with equal rewards.
        asked_again: number of prompts that had waited.
        abandoned: tokens of this rank's abandoned answers, as far as they were generated.
    """

    drawn: int
    waiting: dict[str, int]
    kept: list[int] = field(default_factory=list)
    answered: list[Sample] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    groups: int = 0
    flat: int = 0
    refills: int = 0
    asked_again: int = 0
    abandoned: list[int] = field(default_factory=list)

    def add(self, found: Round, asked: Sequence[int], step: int) -> None:
        """Add a round. Prompts that were asked and whose groups have not finished are waiting from now on."""
        self.kept = sorted([*self.kept, *found.taken])
        self.groups += len(found.finished)
        self.flat += sum(not group.has_spread for group in found.finished)
        over = {group.number for group in found.finished}
        self.waiting |= {str(number): step for number in asked if number not in over}
        self.abandoned += found.abandoned
        for _, (samples, scored) in sorted(found.groups.items()):
            self.answered += samples
            self.scored.append(scored)


def collect_step(answerer: Answerer, prompts: Prompts, here: Position, config: PPOConfig, clock: Clock) -> Collected:
    """Sample and score the answers of one step, with over-sampling if `rollout.oversample` asks for it. Every rank calls it."""
    if config.rollout.oversample == 0:
        return collect(answerer, prompts, here.drawn, config, clock)
    step, wanted = Step(here.drawn, dict(here.abandoned)), config.data.prompts_per_step
    with_spread = config.algorithm.dynamic_sampling
    refills = config.algorithm.max_refills if with_spread else 0
    while True:
        missing = wanted - len(step.kept)
        asked = _draw(step, missing, wanted, config.rollout.oversample)
        mine = [(number, prompts.drawn(number, config.trainer.seed)) for number in asked[dist.rank() :: dist.world_size()]]
        step.add(take_first(answerer, mine, missing, clock, with_spread=with_spread), asked, here.step + 1)
        if len(step.kept) == wanted or step.refills == refills:
            return _collected(step, answerer, here.drawn)
        step.refills += 1


def describe_oversampling(config: PPOConfig, rollout: Rollout) -> str | None:
    """Say what over-sampling does, for the first lines of a run; None without it."""
    wanted, share = config.data.prompts_per_step, config.rollout.oversample
    if share == 0:
        return None
    text = (
        f"over-sampling: a step asks {more_than(wanted, share):,} prompts and takes the {wanted:,} that finish first; the others are asked "
        f"again, together, in a later step (rollout.oversample={share:g})"
    )
    if hasattr(rollout, "unfinished_tokens"):
        return text
    why = "this engine does not tell how far unfinished answers are, so all are generated and over-sampling saves no time"
    return f"{text}\nwarning: {why}; use rollout.name=native or vllm"


def more_than(wanted: int, share: float) -> int:
    """Return the number of prompts to draw where so many are wanted."""
    return wanted + math.ceil(wanted * share)


def _draw(step: Step, missing: int, wanted: int, share: float) -> list[int]:
    """Return the numbers of the prompts to ask: enough that wait, or new ones and more than are missing."""
    if step.refills == 0 and len(step.waiting) >= wanted:
        again = list(step.waiting)[:wanted]
        for number in again:
            del step.waiting[number]
        step.asked_again = wanted
        return [int(number) for number in again]
    first, step.drawn = step.drawn, step.drawn + more_than(missing, share)
    return list(range(first, step.drawn))


def take_first(answerer: Answerer, mine: Sequence[tuple[int, Prompt]], wanted: int, clock: Clock, *, with_spread: bool) -> Round:
    """Answer prompts until enough groups have finished. Every rank calls it.

    Groups are scored while others are generated: by users' graders in their processes, by others between steps of generation.

    Args:
        mine: this rank's prompts with their numbers.
        wanted: number of groups over all ranks; fewer if there are no more.
        with_spread: whether groups with equal rewards do not count.
    """
    finished: list[Finished] = []
    counted, bound = finished, None
    with closing(_Answers(answerer, mine)) as answers:
        while True:
            share = -(-max(1, wanted - len(counted)) // dist.world_size())
            with clock.phase("generate"):
                dist.together(partial(answers.advance, share, bound))
            with clock.phase("score"):
                dist.together(partial(answers.score, wait=not answers.can_advance(bound)))
            of_ranks = dist.gathered((answers.take_scored(), answers.least, answers.is_done))
            finished = sorted([*finished, *(group for found, _, _ in of_ranks for group in found)])
            counted = [group for group in finished if group.has_spread or not with_spread]
            bound = counted[wanted - 1].longest if len(counted) >= wanted else None
            if all(done or (bound is not None and least >= bound) for _, least, done in of_ranks):
                break
        if bound is not None:
            finished = [group for group in finished if group <= counted[wanted - 1]]
        groups = {group.number: answers.groups[group.number] for group in finished if group.number in answers.groups}
        return Round(finished, [group.number for group in counted[:wanted]], groups, answers.tokens_except(groups))


class _Answers:
    """This rank's answers while they are generated and scored.

    Attributes:
        groups: finished and scored groups by the number of their prompt.
    """

    def __init__(self, answerer: Answerer, prompts: Sequence[tuple[int, Prompt]]):
        self._answerer, self._prompts = answerer, prompts
        self._sampling = replace(answerer.sampling, progress=True)
        self._stream: Iterator[list[tuple[int, Completion]]] | None = answerer.rollout.stream(
            [prompt.token_ids for _, prompt in prompts], self._sampling, [number for number, _ in prompts]
        )
        self._done: list[dict[int, Completion]] = [{} for _ in prompts]
        self._unscored: list[int] = []  # places of prompts whose answers have all ended
        self._scoring: list[tuple[list[int], Future[list[tuple[list[Sample], Scored]]]]] = []
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="scoring") if answerer.scores_aside else None
        self._new: list[Finished] = []
        self.groups: dict[int, tuple[list[Sample], Scored]] = {}

    @property
    def is_done(self) -> bool:
        """Return whether all groups have finished and have been scored."""
        return self._stream is None and not self._unscored and not self._scoring

    @property
    def least(self) -> int:
        """Tokens that every group without a score has at least, less one, in its longest answer: of a group that is still growing, those
        that one of its answers has and will exceed."""
        tokens = self._tokens_of_unfinished()
        open_places = [place for place, (number, _) in enumerate(self._prompts) if number not in self.groups]
        return min((self._outgrown(place, tokens) for place in open_places), default=NEVER)

    def can_advance(self, bound: int | None) -> bool:
        """Return whether an answer is unfinished whose group may still be within `bound` tokens."""
        if self._stream is None or bound is None:
            return self._stream is not None
        tokens, n = self._tokens_of_unfinished(), self._sampling.n
        growing = (place for place, done in enumerate(self._done) if len(done) < n)
        return any(self._outgrown(place, tokens) < bound for place in growing)

    def tokens_except(self, numbers: Container[int]) -> list[int]:
        """Return the tokens, so far, of each answer to all other prompts than these."""
        tokens, n = self._tokens_of_unfinished(), self._sampling.n
        others = [place for place, (number, _) in enumerate(self._prompts) if number not in numbers]
        return [len(self._done[p][k].token_ids) if k in self._done[p] else tokens.get(p * n + k, 0) for p in others for k in range(n)]

    def advance(self, groups: int, bound: int | None) -> None:
        """Generate for a moment, until so many groups more have finished, or no unfinished group can be within `bound` tokens.

        Raises:
            AbandonedError: a signal has asked the run to end.
        """
        until = time.monotonic() + CHECK_SECONDS
        enough = len(self._unscored) + groups
        with signals.abandoning():
            while len(self._unscored) < enough and time.monotonic() < until and self.can_advance(bound):
                self._take()

    def _take(self) -> None:
        """Take what the rollout gives next."""
        assert self._stream is not None
        found = next(self._stream, None)
        if found is None:
            self._stream = None
        for number, completion in found or []:
            place, answer = divmod(number, self._sampling.n)
            self._done[place][answer] = completion
            if len(self._done[place]) == self._sampling.n:
                self._unscored.append(place)

    def score(self, *, wait: bool) -> None:
        """Score the groups that have finished, in a thread beside generation if graders have processes of their own.

        Args:
            wait: whether to wait for all rewards.
        """
        places, self._unscored = sorted(self._unscored), []
        if places and self._aside is None:
            self._add(places, self._scored(places))
        elif places and self._aside is not None:
            self._scoring.append((places, self._aside.submit(self._scored, places)))
        while self._scoring and (wait or self._scoring[0][1].done()):
            places, future = self._scoring.pop(0)
            self._add(places, future.result())

    def take_scored(self) -> list[Finished]:
        """Return the groups that have been scored since the last call."""
        found, self._new = self._new, []
        return found

    def close(self) -> None:
        """Abandon what is not finished."""
        if self._stream is not None:
            self._stream.close()  # type: ignore[attr-defined]
        if self._aside is not None:
            self._aside.shutdown(wait=True, cancel_futures=True)

    def _scored(self, places: Sequence[int]) -> list[tuple[list[Sample], Scored]]:
        groups = [
            [self._answerer.sample_of(*self._prompts[place], self._done[place][answer]) for answer in range(self._sampling.n)]
            for place in places
        ]
        return list(zip(groups, _split(self._answerer.scored([sample for group in groups for sample in group]), groups), strict=True))

    def _add(self, places: Sequence[int], scored: Sequence[tuple[list[Sample], Scored]]) -> None:
        for place, (samples, of_group) in zip(places, scored, strict=True):
            number = self._prompts[place][0]
            self.groups[number] = samples, of_group
            has_spread = len({sample.reward for sample in samples}) > 1
            self._new.append(Finished(self._longest(place), number, has_spread))

    def _longest(self, place: int) -> int:
        return max(len(completion.token_ids) for completion in self._done[place].values())

    def _outgrown(self, place: int, tokens: Mapping[int, int]) -> int:
        """Return the most tokens that a group's longest answer is known to exceed."""
        done, n = self._done[place], self._sampling.n
        return max(len(done[k].token_ids) - 1 if k in done else tokens.get(place * n + k, 0) for k in range(n))

    def _tokens_of_unfinished(self) -> Mapping[int, int]:
        tell = getattr(self._answerer.rollout, "unfinished_tokens", None)
        return {} if self._stream is None or tell is None else tell()


def _split(whole: Scored, groups: Sequence[Sequence[Sample]]) -> list[Scored]:
    """Return the part of each group. Failures name the row of their prompt."""
    ends = np.cumsum([len(group) for group in groups]).tolist()
    errors, found = list(whole.errors), []
    for group, end in zip(groups, ends, strict=True):
        part = slice(end - len(group), end)
        mine = [error for error in errors if error.where == group[0].prompt.where]
        errors = [error for error in errors if error not in mine]
        found.append(Scored(whole.reward_A[part], {name: values[part] for name, values in whole.each.items()}, mine))
    return found


def _collected(step: Step, answerer: Answerer, first: int) -> Collected:
    """Return what a step has collected, the same number of results on every rank. Every rank calls it.

    Args:
        first: number of prompts drawn before the step.
    """
    parts = [answerer.scored([]), *step.scored]
    scored = Scored(
        np.concatenate([part.reward_A for part in parts]),
        {name: np.concatenate([part.each[name] for part in parts]) for name in parts[0].each},
        [error for part in parts for error in part.errors],
    )
    finished = sum(sample.trained_tokens for sample in step.answered)
    counts = [len(step.abandoned), sum(step.abandoned), len(step.answered), finished]
    lost, lost_tokens, answers, tokens = dist.total([float(count) for count in counts])
    metrics = {
        "rl/abandoned_answers": lost,
        "rl/waiting_prompts": float(len(step.waiting)),
        "rl/asked_again": float(step.asked_again),
        "perf/abandoned_tokens": lost_tokens,
        "perf/drawn_response_tokens": (tokens + lost_tokens) / max(1.0, answers + lost),
    }
    kept = set(step.kept)
    samples = [sample for sample in step.answered if sample.group in kept]
    return Collected(
        step.answered, samples, step.drawn, step.refills, step.flat, step.groups, step.kept, [scored], metrics=metrics, waiting=step.waiting
    )
