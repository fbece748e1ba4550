"""Sample answers to prompts and score them. A tool may reply between the turns of an answer (see verl.tools), or an answer be an episode in
an environment (see verl.environments), or what an agent asks (see verl.rl.agents).

A reply is rendered with the chat template and appended to the answer's token ids. Sampled tokens are kept as they are, never tokenized
again from text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from verl import dist, signals
from verl.config.ppo import PPOConfig, RolloutConfig
from verl.config.workers import WorkersConfig
from verl.data.prompts import Prompt, Prompts
from verl.data.render import Renderer
from verl.rewards._scoring import Rewards, Scored
from verl.rl.agents import AgentAnswers
from verl.rl.ahead import Ahead, share_of
from verl.rl.ahead_partial import PartialAhead
from verl.rl.clock import Clock
from verl.rl.episodes import Episodes
from verl.rl.samples import Sample
from verl.rl.tool import Tool, tool_of
from verl.rollout import Completion, Rollout, Sampling
from verl.rollout.waves import cut
from verl.workers.pool import Watch

SEED_STRIDE = 1_000_003  # distance between the seeds of an answer's turns


@dataclass(frozen=True)
class Collected:
    """The answers of one step on this rank.

    Attributes:
        answered: all answers of this rank, including those of excluded prompts.
        samples: the answers to train on, in whole groups.
        drawn: number of prompts drawn since the run began, this step included, over all ranks.
        refills: number of times that more prompts were drawn in this step.
        without_spread: number of answered groups with equal rewards, over all ranks.
        groups: number of answered groups, over all ranks.
        kept: numbers of the prompts to train on, over all ranks, in ascending order.
        scored: results of this rank's graders.
        is_ahead: whether answers are drawn while the trainer learns, so that the time of generation is that of waiting.
        metrics: of over-sampling, the environment or the agent; empty without them.
        waiting: prompts that wait to be asked again, see `verl.engine.position.Position.abandoned`.
    """

    answered: list[Sample]
    samples: list[Sample]
    drawn: int
    refills: int
    without_spread: int
    groups: int
    kept: list[int]
    scored: list[Scored]
    is_ahead: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    waiting: dict[str, int] = field(default_factory=dict)

    @property
    def answers(self) -> int:
        """Number of answers to train on, over all ranks. Every rank calls it."""
        return int(dist.total([float(len(self.samples))])[0])


class Answerer:
    """Answers prompts with a rollout.

    Args:
        workers: settings of the processes that run a user's own tool.
        watch: is told if these processes are waited for.
        episodes: plays each answer in an environment, or has an agent give it; None: the model answers alone.
        seed: seed of sampling. An answer depends only on the seed, its prompt's number and its own number.
    Attributes:
        exact_grader: the first grader that compares answers with reference answers, or None.
        sampling: how the answers to train on are sampled.
        ahead: draws the answers of the next step while this one is trained; None: each step draws its own.
    Raises:
        UserError: there is no such tool.
    """

    def __init__(
        self,
        rollout: Rollout,
        config: RolloutConfig,
        scorer: Rewards,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        *,
        workers: WorkersConfig | None = None,
        watch: Watch | None = None,
        episodes: Episodes | AgentAnswers | None = None,
    ):
        self.rollout, self._episodes = rollout, episodes
        self._config, self._scorer, self._tokenizer = config, scorer, tokenizer
        self.exact_grader = scorer.exact
        self.sampling = Sampling(config.max_new_tokens, config.temperature, config.samples_per_prompt, seed)
        self.ahead: Ahead | PartialAhead | None = None
        self._tool = tool_of(config, workers or WorkersConfig(), watch)
        self._renderer = Renderer(tokenizer)

    def sampled(self, prompts: Sequence[tuple[int, Prompt]], *, drawn_ahead: bool = False) -> list[Sample]:
        """Sample `samples_per_prompt` answers to each numbered prompt. Answers to one prompt are adjacent.

        Args:
            drawn_ahead: whether the answers are those that were drawn ahead, if there are any.
        """
        drawn = self.ahead.take(prompts) if drawn_ahead and self.ahead is not None else None
        return self._answered(prompts, self.sampling, drawn)

    def begin_next(self, drawn: int) -> None:
        """Ask for the answers of the next step, if they are drawn ahead. `drawn` is the number of prompts drawn before it."""
        if self.ahead is not None:
            self.ahead.begin(drawn)

    def finish_next(self) -> None:
        """Wait for the answers of the next step, if they are drawn ahead."""
        if self.ahead is not None:
            self.ahead.finish()

    def greedy(self, prompts: Sequence[Prompt]) -> list[Sample]:
        """Decode one answer to each of this rank's prompts greedily. Every rank calls it."""
        numbers = range(dist.rank(), dist.rank() + len(prompts) * dist.world_size(), dist.world_size())
        return self._answered(list(zip(numbers, prompts, strict=True)), Sampling(self._config.max_new_tokens, logprobs=False))

    def score(self, samples: Sequence[Sample]) -> Scored:
        """Set the rewards of the answers. Ranks may have different numbers of answers. Answers to one prompt are adjacent.

        Raises:
            UserError: on all ranks, if a reward failed and reward.on_error=stop.
        """
        found: list[Scored] = []
        dist.together(lambda: found.append(self.scored(samples)))
        return found[0] if self._tool is None else replace(found[0], tool_errors=self._tool.take_errors())

    def close(self) -> None:
        """Free the rollout, and end the processes of users' rewards and tool."""
        self.rollout.close()
        self._scorer.close()
        if self._tool is not None:
            self._tool.close()
        if self._episodes is not None:
            self._episodes.close()

    def check_any_works(self, samples: Sequence[Sample]) -> None:
        """Raise UserError on every rank if all episodes of a step have failed, see `Episodes.check_any_works`. Every rank calls it."""
        if isinstance(self._episodes, Episodes):
            self._episodes.check_any_works(samples)

    def metrics_of(self, samples: Sequence[Sample]) -> tuple[dict[str, float], dict[str, float]]:
        """Return metrics of all ranks' episodes or runs of the agent, and the environment's own. Every rank calls it."""
        return ({}, {}) if self._episodes is None else self._episodes.metrics_of(samples)

    @property
    def scores_on_cpu(self) -> bool:
        """Whether the device has no work while answers are scored."""
        return self._scorer.model is None

    @property
    def scores_aside(self) -> bool:
        """Whether a thread may score answers while others are generated: all graders have processes of their own."""
        return self._scorer.has_processes

    def scored(self, samples: Sequence[Sample]) -> Scored:
        """Set the rewards of this rank's answers. Answers to one prompt are adjacent. Raises UserError: see `score`."""
        found = self._scorer.score(
            [sample.prompt.text for sample in samples],
            [sample.text for sample in samples],
            [sample.prompt.row for sample in samples],
            places=[sample.prompt.where for sample in samples],
            chats=[sample.prompt.messages for sample in samples],
            groups=[sample.group for sample in samples],
        )
        if self._episodes is not None:
            found = self._episodes.with_own(found, samples)
        for number, sample in enumerate(samples):
            sample.reward = float(found.reward_A[number])
            sample.parts = {name: float(values[number]) for name, values in found.each.items()}
        return found

    def _answered(self, prompts: Sequence[tuple[int, Prompt]], sampling: Sampling, drawn: list[Completion] | None = None) -> list[Sample]:
        if self._episodes is not None:
            return self._played(self._episodes, prompts, sampling)
        completions = drawn
        if completions is None:
            completions = self._generate([prompt.token_ids for _, prompt in prompts], sampling, [number for number, _ in prompts])
        owners = [owner for owner in prompts for _ in range(sampling.n)]
        samples = [self.sample_of(number, prompt, done) for (number, prompt), done in zip(owners, completions, strict=True)]
        if self._tool is not None:
            self._take_turns(samples, self._tool, sampling)
        return samples

    def _played(self, episodes: Episodes | AgentAnswers, prompts: Sequence[tuple[int, Prompt]], sampling: Sampling) -> list[Sample]:
        found: list[Sample] = []
        dist.together(lambda: found.extend(episodes.play(self.rollout, prompts, sampling)))
        return found

    def _generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int]) -> list[Completion]:
        """Generate with the rollout. Every rank calls it; an error on one rank is raised on all: AbandonedError after a signal."""
        found: list[Completion] = []

        def generate() -> None:
            with signals.abandoning():
                found.extend(self.rollout.generate(prompts, sampling, seeds))

        dist.together(generate)
        return found

    def sample_of(self, number: int, prompt: Prompt, done: Completion) -> Sample:
        """Return a response to a numbered prompt as an answer."""
        mask, logprobs = [True] * len(done.token_ids), None if done.logprobs is None else list(done.logprobs)
        text, versions = done.text(self._tokenizer), None if done.versions is None else list(done.versions)
        ids, reason = list(done.token_ids), done.finish_reason
        return Sample(prompt, number, prompt.token_ids, ids, mask, logprobs, text, reason, done.version, versions=versions)

    def _take_turns(self, samples: list[Sample], tool: Tool, sampling: Sampling) -> None:
        """Append tool replies and the model's next turns until no answer calls the tool."""
        asked = list(range(len(samples)))
        for turn in range(1, self._config.max_turns):
            waiting: list[int] = []
            dist.together(lambda: waiting.extend(self._replied(samples, asked, tool)))  # noqa: B023
            if dist.most(len(waiting)) == 0:
                return
            asked = waiting
            seed, calls = sampling.seed + turn * SEED_STRIDE, self._calls(samples, waiting)
            for place in range(dist.most(len(calls))):
                self._next_turns(samples, calls[place] if place < len(calls) else [], sampling, seed)

    def _calls(self, samples: list[Sample], waiting: list[int]) -> list[list[int]]:
        """Split the numbers of unfinished answers into calls of the rollout.

        All answers of a call share one token limit, that of the answer with the most room. No answer of a call may exceed the model's
        positions with this limit.
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
        turns = self._generate(
            [samples[number].prompt_ids + samples[number].answer_ids for number in numbers],
            replace(sampling, n=1, max_new_tokens=max(room, default=1), seed=seed),
            [samples[number].group * sampling.n + number % sampling.n for number in numbers],
        )
        for number, most, done in zip(numbers, room, turns, strict=True):
            self._append_turn(samples[number], cut(done, most))

    def _room(self, sample: Sample) -> int:
        """Return the number of tokens left for an answer."""
        return self._config.max_new_tokens - len(sample.answer_ids)

    def _replied(self, samples: list[Sample], asked: list[int], tool: Tool) -> list[int]:
        """Append the tool's replies to the numbered answers. Return the numbers of those for which the model gets another turn."""
        complete = [number for number in asked if samples[number].finish_reason == "stop"]
        replies = tool.replies([samples[number] for number in complete])
        said = [(number, reply) for number, reply in zip(complete, replies, strict=True) if reply is not None]
        return [number for number, reply in said if self._append_reply(samples[number], reply, tool.role)]

    def _append_reply(self, sample: Sample, reply: str, role: str) -> bool:
        """Append the tool's reply. Return whether the model gets another turn."""
        ids = self._renderer.turn_after({"role": role, "content": reply})
        if len(sample.answer_ids) + len(ids) >= self._config.max_new_tokens:
            sample.finish_reason = "length"
            return False
        sample.earlier += [sample.text, reply]
        sample.append(ids, sample.version if sample.versions is None else sample.versions[-1], trained=False)
        if sample.logprobs is not None:
            sample.logprobs += [0.0] * len(ids)
        return True

    def _append_turn(self, sample: Sample, done: Completion) -> None:
        sample.append(done.token_ids, done.version if done.versions is None else done.versions, trained=True)
        if sample.logprobs is not None:
            sample.logprobs += done.logprobs or [0.0] * len(done.token_ids)
        sample.text, sample.finish_reason = done.text(self._tokenizer), done.finish_reason
        sample.turns += 1


def collect(answerer: Answerer, prompts: Prompts, drawn: int, config: PPOConfig, clock: Clock) -> Collected:
    """Sample and score the answers of one step. Every rank calls it and answers its share of the prompts.

    With dynamic sampling, groups with equal rewards are excluded, and new prompts replace them, up to `max_refills` times. If answers are
    drawn ahead, those of the next step are asked for: before this step's are scored, or with dynamic sampling, whose number of prompts
    depends on the scores, after.

    Args:
        drawn: number of prompts drawn before this step.
    Raises:
        UserError: on every rank, as of one of them; or all episodes of the step have failed.
    """
    answered: list[Sample] = []
    scored: list[Scored] = []
    kept: list[int] = []
    wanted, with_spread = config.data.prompts_per_step, config.algorithm.dynamic_sampling
    refills = config.algorithm.max_refills if with_spread else 0
    flat, first, refill = 0, drawn, 0
    while True:
        numbers = range(drawn, drawn + wanted - len(kept))
        mine = share_of(prompts, numbers, config.trainer.seed)
        with clock.phase("generate"):
            answers = answerer.sampled(mine, drawn_ahead=refill == 0)
            if not with_spread:
                answerer.begin_next(numbers.stop)
        answered += answers
        answerer.check_any_works(answered)
        with clock.phase("score"):
            scored.append(answerer.score(answers))
        spread = groups_with_spread(answers)
        drawn += len(numbers)
        flat += len(numbers) - len(spread)
        kept = sorted({*kept, *(spread if with_spread else numbers)})
        if len(kept) == wanted or refill == refills:
            if with_spread:
                answerer.begin_next(drawn)
            samples = [sample for sample in answered if sample.group in kept]
            metrics, own = answerer.metrics_of(answered)
            metrics |= {f"episode/{name}": value for name, value in own.items()}
            ahead = answerer.ahead is not None
            return Collected(answered, samples, drawn, refill, flat, drawn - first, kept, scored, ahead, metrics)
        refill += 1


def groups_with_spread(samples: Sequence[Sample]) -> list[int]:
    """Return the numbers of the prompts, over all ranks, whose answers have different rewards."""
    rewards: dict[int, set[float]] = {}
    for sample in samples:
        rewards.setdefault(sample.group, set()).add(sample.reward)
    mine = [number for number, found in rewards.items() if len(found) > 1]
    return sorted(number for numbers in dist.gathered(mine) for number in numbers)
