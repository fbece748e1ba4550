"""The episodes of a step, side by side: none waits for another, neither for its environment nor for its turns.

All run in one event loop, which also generates (see `verl.rollout.live`). A user's environment runs in processes of its own.
"""

import asyncio
import threading
import time
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from verl.config.ppo import PPOConfig, longest_sample
from verl.data.prompts import Prompt
from verl.data.render import Renderer
from verl.rewards._scoring import ENVIRONMENT, Scored
from verl.rl.environment import open_environment
from verl.rl.episode import Episode, Table
from verl.rl.outcome import Outcome
from verl.rl.replies import Replies
from verl.rl.samples import Sample
from verl.rollout import Rollout, Sampling
from verl.rollout.live import Live
from verl.workers.pool import SECONDS_BEFORE_LINE, Unwatched, Watch


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
        self._run(self._play_all(rollout, samples, sampling))
        return samples

    def close(self) -> None:
        """End the environment's processes."""
        if not self._loop.is_closed():
            self._run(self._hosts.close())
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
            watching = asyncio.ensure_future(self._tell(plays))
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

    async def _tell(self, plays: "Sequence[asyncio.Future[None]]") -> None:
        """Tell once a second how many episodes have ended."""
        begun, next_line = time.monotonic(), SECONDS_BEFORE_LINE
        try:
            while True:
                await asyncio.sleep(1.0)
                seconds = time.monotonic() - begun
                is_due = seconds >= next_line
                next_line = 2 * max(next_line, seconds) if is_due else next_line
                ended = sum(play.done() for play in plays)
                self._watch.waiting(f"episodes: {ended:,} of {len(plays):,} have ended, {seconds:.0f} s", line_is_due=is_due)
        finally:
            if time.monotonic() - begun >= 1.0:
                self._watch.waiting(None)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run in this object's loop; in a thread of its own if this one runs a loop, as notebooks do."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self._loop.run_until_complete(work)
            return
        errors: list[BaseException] = []

        def run() -> None:
            try:
                self._loop.run_until_complete(work)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, name="episodes")
        thread.start()
        thread.join()
        if errors:
            raise errors[0]


def with_episodes(scored: Scored, samples: Sequence[Sample]) -> Scored:
    """Return the scores with the rewards of the environment added, and with what has failed there."""
    outcomes = [sample.outcome or Outcome() for sample in samples]
    reward_A = np.array([outcome.reward for outcome in outcomes], dtype=np.float32)
    errors = [error for outcome in outcomes for error in outcome.errors]
    each = {**scored.each, ENVIRONMENT: reward_A}
    return replace(scored, reward_A=scored.reward_A + reward_A, each=each, environment_errors=errors)
