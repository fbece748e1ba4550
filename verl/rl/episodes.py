"""The episodes of a step, side by side: none waits for another, neither for its environment nor for its turns.

All run in one event loop, which also generates (see `verl.rollout.live`). A user's environment runs in processes of its own.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from verl import dist
from verl.config.ppo import PPOConfig, longest_sample
from verl.data.prompts import Prompt
from verl.data.render import Renderer
from verl.errors import UserError
from verl.rewards._scoring import ENVIRONMENT, Scored
from verl.rl.environment import open_environment
from verl.rl.episode import FIX, Episode, Table
from verl.rl.outcome import FAILED, HUNG, Outcome, metrics_of, with_outcomes
from verl.rl.own_loop import run_to_end, tell
from verl.rl.replies import Replies
from verl.rl.samples import Sample
from verl.rollout import Rollout, Sampling
from verl.rollout.live import Live
from verl.workers.pool import Unwatched, Watch


class Episodes:
    """Plays episodes in the environment of `environment.name`.

    Args:
        watch: is told if episodes are waited for.
    Attributes:
        note: what is to be said about the chat template; None: nothing.
    Raises:
        UserError: there is no such environment, or the chat template cannot continue a chat.
    """

    def __init__(self, config: PPOConfig, tokenizer: PreTrainedTokenizerBase, watch: Watch | None = None):
        replies = Replies(Renderer(tokenizer))
        self.note = replies.note
        template = str(tokenizer.chat_template)
        lengths = config.data.max_prompt_length, config.rollout.max_new_tokens
        self._table = Table(config.environment, tokenizer, replies, template, *lengths, config.trainer.seed)
        self._positions, self._watch = longest_sample(config), watch or Unwatched()
        self._hosts = open_environment(config.environment)
        self._loop = asyncio.new_event_loop()

    @property
    def dropped(self) -> list[str]:
        """Names of the variables that look like secrets and that the environment does not get."""
        return self._hosts.dropped

    def play(self, rollout: Rollout, prompts: Sequence[tuple[int, Prompt]], sampling: Sampling) -> list[Sample]:
        """Play `sampling.n` episodes for each numbered prompt. Those of a prompt are adjacent.

        Call it in `dist.together`, so that all ranks learn of an error.

        Raises:
            UserError: see `Episode.play`.
            AbandonedError: a signal has asked the run to end.
        """
        samples = [self._sample(number, prompt) for number, prompt in prompts for _ in range(sampling.n)]
        run_to_end(self._loop, self._play_all(rollout, samples, sampling))
        return samples

    def with_own(self, scored: Scored, samples: Sequence[Sample]) -> Scored:
        """Return the scores with the rewards of the environment added, and with what has failed there."""
        outcomes = [sample.outcome or Outcome() for sample in samples]
        found, errors = with_outcomes(scored, outcomes, ENVIRONMENT)
        return replace(found, environment_errors=errors, unclosed=[error for outcome in outcomes for error in outcome.unclosed])

    def check_any_works(self, samples: Sequence[Sample]) -> None:
        """Check that not all episodes of a step have failed, on any rank: nothing can be learned from them. Every rank calls it.

        Raises:
            UserError: all have. It has the first failure.
        """
        outcomes = [sample.outcome for sample in samples if sample.outcome is not None]
        failed = [outcome.errors[0] for outcome in outcomes if outcome.ending in (FAILED, HUNG)]
        played, wrong = (int(number) for number in dist.total([float(len(outcomes)), float(len(failed))]))
        if not played or wrong < played:
            return
        first = next(error for of_rank in dist.gathered(failed[:1]) for error in of_rank)
        what = f"all {played:,} episodes of the step have failed, so there is nothing to learn; the first: {first.what}"
        raise UserError(what, where=first.where, fix="correct the environment or the rows" if first.fix == FIX else first.fix)

    def metrics_of(self, samples: Sequence[Sample]) -> tuple[dict[str, float], dict[str, float]]:
        """Return metrics of the episodes of all ranks, and those of the environment's own. Every rank calls it."""
        return metrics_of([sample.outcome for sample in samples if sample.outcome is not None], [sample.turns for sample in samples])

    def close(self) -> None:
        """End the environment's processes."""
        if not self._loop.is_closed():
            run_to_end(self._loop, self._hosts.close())
            self._loop.close()

    def _sample(self, number: int, prompt: Prompt) -> Sample:
        """Return an answer without tokens."""
        return Sample(prompt, number, prompt.token_ids, [], [], None, "", "stop", 0, turns=0, outcome=Outcome())

    async def _play_all(self, rollout: Rollout, samples: list[Sample], sampling: Sampling) -> None:
        most = self._table.max_new_tokens
        async with Live(rollout, max_new_tokens=most, positions=self._positions, at_once=max(1, len(samples))) as live:
            plays = [
                asyncio.ensure_future(self._play(live, sample, sampling, sample.group * sampling.n + place % sampling.n))
                for place, sample in enumerate(samples)
            ]
            watching = asyncio.ensure_future(tell(self._watch, "episodes", plays))
            try:
                await live.alongside(asyncio.gather(*plays))
            finally:
                for task in (watching, *plays):
                    task.cancel()
                await asyncio.gather(watching, *plays, return_exceptions=True)

    async def _play(self, live: Live, sample: Sample, sampling: Sampling, place: int) -> None:
        host = await self._hosts.begin()
        try:
            await Episode(self._table, host, live, sample, sampling, place).play()
        finally:
            host.release()
