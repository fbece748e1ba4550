"""From prompts to answers with their rewards: generate, let a tool reply where there is one, and score.

A tool is a module with one function,

    reply(response: str, prompt: str, row: dict) -> str | None

which reads a turn of the model, as text, and gives what the tool says to it, or None where the answer is complete. What it says is
appended to the answer's token ids as the chat template writes such a turn; no token of the model's is ever made again from text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType

from transformers import PreTrainedTokenizerBase

from verl import dist, plugin
from verl.config.ppo import PPOConfig, RolloutConfig
from verl.data.prompts import Prompt, Prompts
from verl.data.render import Renderer
from verl.errors import UserError
from verl.rewards._scoring import Scored, Scorer
from verl.rl.clock import Clock
from verl.rl.samples import Sample
from verl.rollout import Completion, Rollout, Sampling

SEEDS_OF_A_TURN = 1_000_003  # turns of one answer are drawn from seeds that lie so far apart


@dataclass(frozen=True)
class Collected:
    """The answers of one step on this rank.

    Attributes:
        answered: all of this rank, also those of prompts that are left out.
        samples: those to train on; groups are whole.
        drawn: prompts drawn since the run began, over all ranks, with those of this step.
        refills: times that further prompts were drawn in this step.
        without_spread: groups among all that were answered, over all ranks, whose answers earned the same.
        groups: that were answered, over all ranks.
        kept: numbers of the prompts to train on, over all ranks, in ascending order.
        scored: what this rank's graders said.
    """

    answered: list[Sample]
    samples: list[Sample]
    drawn: int
    refills: int
    without_spread: int
    groups: int
    kept: list[int]
    scored: list[Scored]

    @property
    def answers(self) -> int:
        """Those to train on, over all ranks. Every rank calls it."""
        return int(dist.total([float(len(self.samples))])[0])


class Answerer:
    """Answers prompts with a rollout.

    Args:
        seed: of the draws; an answer depends on it, its prompt's number and its own number alone.
    Attributes:
        exact_grader: the first grader that compares answers with right ones; None: none does.
    Raises:
        UserError: no such tool.
    """

    def __init__(self, rollout: Rollout, config: RolloutConfig, scorer: Scorer, tokenizer: PreTrainedTokenizerBase, seed: int):
        self.rollout = rollout
        self._config, self._scorer, self._tokenizer, self._seed = config, scorer, tokenizer, seed
        self.exact_grader = scorer.exact
        self._tool = None if config.tool is None else plugin.load("verl.tools", config.tool, needs=("reply",))
        self._renderer = Renderer(tokenizer)

    def sampled(self, prompts: Sequence[tuple[int, Prompt]]) -> list[Sample]:
        """`samples_per_prompt` answers to each of the numbered prompts, those to one prompt side by side."""
        sampling = Sampling(self._config.max_new_tokens, self._config.temperature, self._config.samples_per_prompt, self._seed)
        return self._answered(prompts, sampling)

    def greedy(self, prompts: Sequence[Prompt]) -> list[Sample]:
        """One answer to each, of the most likely tokens."""
        return self._answered(list(enumerate(prompts)), Sampling(self._config.max_new_tokens, logprobs=False))

    def score(self, samples: Sequence[Sample]) -> Scored:
        """Give the answers their rewards. Ranks may have different numbers of them.

        Raises:
            UserError: on all ranks: a reward failed and reward.on_error=stop.
        """
        found: list[Scored] = []
        dist.together(lambda: found.append(self._scored(samples)))
        for number, sample in enumerate(samples):
            sample.reward = float(found[0].reward_A[number])
            sample.parts = {name: float(values[number]) for name, values in found[0].each.items()}
        return found[0]

    def _scored(self, samples: Sequence[Sample]) -> Scored:
        return self._scorer.score(
            [sample.prompt.text for sample in samples],
            [sample.text for sample in samples],
            [sample.prompt.row for sample in samples],
            places=[sample.prompt.where for sample in samples],
            chats=[sample.prompt.messages for sample in samples],
        )

    def _answered(self, prompts: Sequence[tuple[int, Prompt]], sampling: Sampling) -> list[Sample]:
        completions = self._generated([prompt.token_ids for _, prompt in prompts], sampling, [number for number, _ in prompts])
        owners = [owner for owner in prompts for _ in range(sampling.n)]
        samples = [self._begun(number, prompt, done) for (number, prompt), done in zip(owners, completions, strict=True)]
        if self._tool is not None:
            self._take_turns(samples, self._tool, sampling)
        return samples

    def _generated(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int]) -> list[Completion]:
        """What the rollout answers. Every rank calls it, so that what goes wrong on one of them ends all."""
        found: list[Completion] = []
        dist.together(lambda: found.extend(self.rollout.generate(prompts, sampling, seeds)))
        return found

    def _begun(self, number: int, prompt: Prompt, done: Completion) -> Sample:
        mask, logprobs = [True] * len(done.token_ids), None if done.logprobs is None else list(done.logprobs)
        text = done.text(self._tokenizer)
        return Sample(prompt, number, prompt.token_ids, list(done.token_ids), mask, logprobs, text, done.finish_reason, done.version)

    def _take_turns(self, samples: list[Sample], tool: ModuleType, sampling: Sampling) -> None:
        """Until no answer waits for the tool: its reply to each that does, and the model's next turn."""
        for turn in range(1, self._config.max_turns):
            waiting: list[int] = []
            dist.together(lambda: waiting.extend(number for number, sample in enumerate(samples) if self._reply(sample, tool)))  # noqa: B023
            if dist.most(len(waiting)) == 0:
                return
            seed, calls = sampling.seed + turn * SEEDS_OF_A_TURN, self._calls(samples, waiting)
            for place in range(dist.most(len(calls))):
                self._next_turns(samples, calls[place] if place < len(calls) else [], sampling, seed)

    def _calls(self, samples: list[Sample], waiting: list[int]) -> list[list[int]]:
        """Numbers of the answers that go on, cut into those that the rollout is asked for at once.

        It is asked for as many tokens as the one with the most room may have, and beside that one the others must not be too long.
        """
        calls: list[list[int]] = []
        positions = self.rollout.positions
        for number in sorted(waiting, key=lambda number: -self._room(samples[number])):
            tokens = len(samples[number].prompt_ids) + len(samples[number].answer_ids)
            fits = (call for call in calls if positions is None or tokens + self._room(samples[call[0]]) <= positions)
            call = next(fits, None)
            calls.append([number]) if call is None else call.append(number)
        return calls

    def _next_turns(self, samples: list[Sample], numbers: list[int], sampling: Sampling, seed: int) -> None:
        room = [self._room(samples[number]) for number in numbers]
        turns = self._generated(
            [samples[number].prompt_ids + samples[number].answer_ids for number in numbers],
            replace(sampling, n=1, max_new_tokens=max(room, default=1), seed=seed),
            [samples[number].group * sampling.n + number % sampling.n for number in numbers],
        )
        for number, most, done in zip(numbers, room, turns, strict=True):
            self._go_on(samples[number], done if len(done.token_ids) <= most else _cut(done, most))

    def _room(self, sample: Sample) -> int:
        """Tokens that an answer may still have."""
        return self._config.max_new_tokens - len(sample.answer_ids)

    def _reply(self, sample: Sample, tool: ModuleType) -> bool:
        """Append the tool's reply to the model's last turn, and say whether the model goes on."""
        if sample.finish_reason != "stop":
            return False
        said = _called(tool, sample)
        if said is None:
            return False
        ids = self._renderer.turn_after({"role": getattr(tool, "ROLE", "tool"), "content": said})
        if len(sample.answer_ids) + len(ids) >= self._config.max_new_tokens:
            sample.finish_reason = "length"
            return False
        sample.earlier += [sample.text, said]
        sample.answer_ids += ids
        sample.answer_mask += [False] * len(ids)
        if sample.logprobs is not None:
            sample.logprobs += [0.0] * len(ids)
        return True

    def _go_on(self, sample: Sample, done: Completion) -> None:
        sample.answer_ids += done.token_ids
        sample.answer_mask += [True] * len(done.token_ids)
        if sample.logprobs is not None:
            sample.logprobs += done.logprobs or [0.0] * len(done.token_ids)
        sample.text, sample.finish_reason = done.text(self._tokenizer), done.finish_reason
        sample.turns += 1


def collect(answerer: Answerer, prompts: Prompts, drawn: int, config: PPOConfig, clock: Clock) -> Collected:
    """The answers of one step. Every rank calls it, and answers its share of the prompts.

    With dynamic sampling, groups without spread are left out, and further prompts are drawn for them up to `max_refills` times.

    Args:
        drawn: prompts drawn before this step.
    """
    answered: list[Sample] = []
    scored: list[Scored] = []
    kept: list[int] = []
    wanted, with_spread = config.data.prompts_per_step, config.algorithm.dynamic_sampling
    refills = config.algorithm.max_refills if with_spread else 0
    flat, first, refill = 0, drawn, 0
    while True:
        numbers = range(drawn, drawn + wanted - len(kept))
        mine = [(number, prompts.drawn(number, config.trainer.seed)) for number in numbers if number % dist.world_size() == dist.rank()]
        with clock.phase("generate"):
            answers = answerer.sampled(mine)
        with clock.phase("score"):
            scored.append(answerer.score(answers))
        spread = groups_with_spread(answers)
        drawn += len(numbers)
        flat += len(numbers) - len(spread)
        kept = sorted({*kept, *(spread if with_spread else numbers)})
        answered += answers
        if len(kept) == wanted or refill == refills:
            samples = [sample for sample in answered if sample.group in kept]
            return Collected(answered, samples, drawn, refill, flat, drawn - first, kept, scored)
        refill += 1


def groups_with_spread(samples: Sequence[Sample]) -> list[int]:
    """Numbers of the prompts, over all ranks, whose answers did not all earn the same."""
    rewards: dict[int, set[float]] = {}
    for sample in samples:
        rewards.setdefault(sample.group, set()).add(sample.reward)
    mine = [number for number, found in rewards.items() if len(found) > 1]
    return sorted(number for numbers in dist.gathered(mine) for number in numbers)


def _called(tool: ModuleType, sample: Sample) -> str | None:
    try:
        said: str | None = tool.reply(sample.text, sample.prompt.text, sample.prompt.row)
    except Exception as error:  # a user's own program, which fails as it likes
        what = f"the tool raised {type(error).__name__}: {error}"
        raise UserError(
            what, where=sample.prompt.where, fix="mend rollout.tool; what a tool cannot do it should say in its reply"
        ) from error
    if said is not None and not isinstance(said, str):
        raise UserError(f"the tool gave {said!r}, expected text or None", where=sample.prompt.where, fix="mend rollout.tool")
    return said


def _cut(done: Completion, most: int) -> Completion:
    logprobs = None if done.logprobs is None else done.logprobs[:most]
    return replace(done, token_ids=done.token_ids[:most], finish_reason="length", logprobs=logprobs)
