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
from verl.pace import counted
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
        counts: whether it is one of those that are wanted.
    """

    longest: int
    number: int
    counts: bool = field(compare=False)


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
        groups: number of these groups.
        flat: number of this rank's groups with equal rewards.
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
        over = {group.number for group in found.finished}
        self.waiting |= {str(number): step for number in asked if number not in over}
        self.abandoned += found.abandoned
        for _, (samples, scored) in sorted(found.groups.items()):
            self.answered += samples
            self.scored.append(scored)
            self.flat += not has_spread(samples)


def collect_step(answerer: Answerer, prompts: Prompts, here: Position, config: PPOConfig, clock: Clock) -> Collected:
    """Sample and score the answers of one step, with over-sampling if `rollout.oversample` asks for it. Every rank calls it."""
    if config.rollout.oversample == 0:
        return replace(collect(answerer, prompts, here.drawn, config, clock), waiting=here.abandoned)
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


def describe_oversampling(config: PPOConfig, rollout: Rollout, start: Position) -> str | None:
    """Say what over-sampling does, for the first lines of a run; None without it."""
    wanted, share = config.data.prompts_per_step, config.rollout.oversample
    if share == 0:
        left = f"{counted(len(start.abandoned), 'prompt')} that over-sampling has abandoned"
        return f"warning: {left} are asked again only with rollout.oversample" if start.abandoned else None
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
    return wanted + math.ceil(round(wanted * share, 6))  # 30 × 0.1 is slightly more than 3


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

    Users' graders score groups in their processes while others are generated.

    Args:
        mine: this rank's prompts with their numbers.
        wanted: number of groups over all ranks; fewer if there are no more.
        with_spread: whether groups with equal rewards do not count.
    """
    finished: list[Finished] = []
    counted, bound = finished, None
    with closing(_Answers(answerer, mine, with_spread=with_spread)) as answers:
        while True:
            share = -(-max(1, wanted - len(counted)) // dist.world_size())
            with clock.phase("generate"):
                dist.together(partial(answers.advance, share, bound))
            with clock.phase("score"):
                dist.together(partial(answers.score, wait=with_spread and not answers.can_advance(bound)))
            of_ranks = dist.gathered((answers.take_finished(), answers.least, answers.is_done))
            finished = sorted([*finished, *(group for found, _, _ in of_ranks for group in found)])
            counted = [group for group in finished if group.counts]
            bound = counted[wanted - 1].longest if len(counted) >= wanted else None
            if all(done or (bound is not None and least >= bound) for _, least, done in of_ranks):
                break
        if bound is not None:
            finished = [group for group in finished if group <= counted[wanted - 1]]
        over = {group.number for group in finished}
        with clock.phase("score"):
            dist.together(partial(answers.score, wait=True, only=over))
        groups = {number: group for number, group in answers.groups.items() if number in over}
        return Round(finished, [group.number for group in counted[:wanted]], groups, answers.tokens_except(over))


def has_spread(samples: Sequence[Sample]) -> bool:
    """Return whether the rewards of answers differ."""
    return len({sample.reward for sample in samples}) > 1


class _Answers:
    """This rank's answers while they are generated and scored.

    Args:
        with_spread: whether groups with equal rewards do not count, so that a group has finished only when it is scored.
    Attributes:
        groups: scored groups by the number of their prompt.
    """

    def __init__(self, answerer: Answerer, prompts: Sequence[tuple[int, Prompt]], *, with_spread: bool):
        self._answerer, self._prompts, self._with_spread = answerer, prompts, with_spread
        self._sampling = replace(answerer.sampling, progress=True)
        self._stream: Iterator[list[tuple[int, Completion]]] | None = answerer.rollout.stream(
            [prompt.token_ids for _, prompt in prompts], self._sampling, [number for number, _ in prompts]
        )
        self._done: list[dict[int, Completion]] = [{} for _ in prompts]
        self._ended = 0  # groups whose answers have all ended
        self._unscored: list[int] = []  # their places among the prompts, until they are being scored
        self._places: list[int] = []  # of the groups that are being scored
        self._scoring: Future[list[tuple[list[Sample], Scored]]] | None = None
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="scoring") if answerer.scores_aside else None
        self._new: list[Finished] = []
        self._finished: set[int] = set()
        self.groups: dict[int, tuple[list[Sample], Scored]] = {}

    @property
    def is_done(self) -> bool:
        """Return whether all groups have finished."""
        return self._stream is None and len(self._finished) == len(self._prompts)

    @property
    def least(self) -> int:
        """The most tokens that the longest answer of every unfinished group is known to exceed."""
        tokens = self._tokens_of_unfinished()
        open_places = [place for place, (number, _) in enumerate(self._prompts) if number not in self._finished]
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
        enough = self._ended + groups
        with signals.abandoning():
            while self._ended < enough and self.can_advance(bound):
                self._take()
                if time.monotonic() >= until:
                    return

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
                self._ended += 1
                self._unscored.append(place)
                if not self._with_spread:
                    self._finish(place, counts=True)
        if self._aside is not None:
            self.score(wait=False)

    def score(self, *, wait: bool, only: Container[int] | None = None) -> None:
        """Score groups whose answers have all ended: in a thread beside generation if graders have processes of their own.

        Args:
            wait: whether to wait for the rewards. Without it, groups are not scored here if they count whatever their rewards are.
            only: numbers of the groups that are needed; None: all.
        """
        if self._aside is None:
            if wait or self._with_spread:
                self._add(self._scored(self._next(only)))
            return
        while True:
            if self._scoring is not None and (self._scoring.done() or (wait and self._is_needed(only))):
                scoring, self._scoring = self._scoring, None
                self._add(scoring.result())
            if self._scoring is None and (places := self._next(only)):
                self._scoring = self._aside.submit(self._scored, places)
            elif not wait or not self._is_needed(only):
                return

    def _next(self, only: Container[int] | None) -> list[int]:
        """Take the places of the groups to score next."""
        places = sorted(place for place in self._unscored if only is None or self._prompts[place][0] in only)
        self._unscored, self._places = [], places
        return places

    def _is_needed(self, only: Container[int] | None) -> bool:
        """Return whether a group that is being scored is needed."""
        return self._scoring is not None and (only is None or any(self._prompts[place][0] in only for place in self._places))

    def take_finished(self) -> list[Finished]:
        """Return the groups that have finished since the last call."""
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
        if not groups:
            return []
        return list(zip(groups, _split(self._answerer.scored([sample for group in groups for sample in group]), groups), strict=True))

    def _add(self, found: Sequence[tuple[list[Sample], Scored]]) -> None:
        for place, (samples, scored) in zip(self._places, found, strict=True):
            self.groups[self._prompts[place][0]] = samples, scored
            if self._with_spread:
                self._finish(place, counts=has_spread(samples))

    def _finish(self, place: int, *, counts: bool) -> None:
        number = self._prompts[place][0]
        self._finished.add(number)
        self._new.append(Finished(self._longest(place), number, counts))

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
    counts = [len(step.abandoned), sum(step.abandoned), len(step.answered), finished, step.flat]
    lost, lost_tokens, answers, tokens, flat = dist.total([float(count) for count in counts])
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
        step.answered, samples, step.drawn, step.refills, int(flat), step.groups, step.kept, [scored], metrics=metrics, waiting=step.waiting
    )
