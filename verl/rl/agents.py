"""Answers of agents: programs that ask a chat endpoint over the run's engine (`rollout.serve`), each run once for an answer.

A run has a key of its own, by which its requests are known. What it has asked and got is joined into trajectories (`verl.rl.trajectories`),
which are the tokens of its answer. A run that fails, hangs or asks too often is ended; its answer is what it has until then.
"""

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from verl import dist
from verl.config.agent import AgentConfig
from verl.config.ppo import PPOConfig, longest_sample
from verl.config.workers import WorkersConfig
from verl.data.prompts import Prompt
from verl.data.render import Renderer
from verl.endpoint.request import Terms
from verl.endpoint.server import LOOPBACK, Endpoint, check_installed
from verl.errors import UserError
from verl.rewards._scoring import AGENT, Scored, error_of
from verl.rl.agent_session import Policy, Session
from verl.rl.episode import MOST_TURNS, world_seed
from verl.rl.outcome import DONE, FAILED, LATE, Outcome, with_outcomes
from verl.rl.own_loop import run_to_end, tell
from verl.rl.replies import Replies
from verl.rl.samples import Sample
from verl.rl.trajectories import Trajectories
from verl.rollout import Rollout, Sampling
from verl.rollout.live import Live
from verl.workers import nursery
from verl.workers.agents import Agents, Result, load_program
from verl.workers.calls import Failure
from verl.workers.pool import Unwatched, Watch

MODEL = "policy"  # its name in requests
FLOODED = "flooded"
REQUESTS = "requests"
FIX = "correct the agent, or set agent.on_error=end, which keeps what the model has answered until then"


def check_agent_program(config: AgentConfig) -> None:
    """Raise UserError if the agent's program, or a package of the endpoint, is missing."""
    if config.program is not None:
        load_program(config.program)
        check_installed()


@dataclass(frozen=True)
class _Run:
    """One run of the program.

    Attributes:
        prompt, group: its prompt and the prompt's number.
        place: number of the answer among all answers of the training run.
    """

    prompt: Prompt
    group: int
    place: int
    sampling: Sampling

    def seed_of(self, request: int) -> int:
        """Return the seed of a request's random numbers: as of a turn in an environment."""
        return self.place * MOST_TURNS + request


class AgentAnswers:
    """Answers prompts by runs of the agent's program.

    Args:
        watch: is told if runs are waited for.
        say: writes a line to the run's log.
    Attributes:
        note: what is to be said about the chat template; None: nothing.
    Raises:
        UserError: there is no such program, or the chat template cannot continue a chat.
    """

    def __init__(
        self, config: PPOConfig, tokenizer: PreTrainedTokenizerBase, watch: Watch | None = None, say: Callable[[str], None] = print
    ):
        self._config, self._tokenizer, self._seed = config.agent, tokenizer, config.trainer.seed
        self._longest, self._max_new_tokens = longest_sample(config), config.rollout.max_new_tokens
        renderer = Renderer(tokenizer)
        self._replies, self._stop_id = Replies(renderer), renderer.stop_ids[0]
        self.note = self._replies.note
        assert self._config.program is not None
        self._agents = Agents(load_program(self._config.program), self._config.seconds, WorkersConfig(secrets=self._config.secrets))
        self._watch, self._say = watch or Unwatched(), say
        self._endpoint: Endpoint | None = None

    @property
    def dropped(self) -> list[str]:
        """Names of the environment variables that look like secrets and that the agent does not get."""
        return self._agents.dropped

    def play(self, rollout: Rollout, prompts: Sequence[tuple[int, Prompt]], sampling: Sampling) -> list[Sample]:
        """Run the agent `sampling.n` times for each numbered prompt. Answers to one prompt are adjacent.

        Call it in `dist.together`, so that all ranks learn of an error.

        Raises:
            UserError: the program cannot be used, a run has failed with agent.on_error=stop, or the engine fails.
            AbandonedError: a signal has asked the run to end.
        """
        if self._endpoint is None:
            self._endpoint = Endpoint(self._say)
        runs = [_Run(prompt, group, group * sampling.n + number, sampling) for group, prompt in prompts for number in range(sampling.n)]
        found: list[Sample] = []
        loop = asyncio.new_event_loop()
        try:
            run_to_end(loop, self._play_all(rollout, runs, found))
        except BaseException:
            self.close()  # the training run ends, and may not get to it
            raise
        finally:
            loop.close()
        return found

    def with_own(self, scored: Scored, samples: Sequence[Sample]) -> Scored:
        """Return the scores with the agent's own rewards added, and with what has failed."""
        found, errors = with_outcomes(scored, [sample.outcome or Outcome() for sample in samples], AGENT)
        return replace(found, agent_errors=errors)

    def metrics_of(self, samples: Sequence[Sample]) -> tuple[dict[str, float], dict[str, float]]:
        """Return metrics of the runs of all ranks, and what the agent counts itself: nothing. Every rank calls it."""
        outcomes = [sample.outcome for sample in samples if sample.outcome is not None]
        requests = sum(outcome.metrics[REQUESTS] for outcome in outcomes)
        trajectories = float(sum(len(sample.trajectories) for sample in samples))
        ended = [float(sum(outcome.ending == ending for outcome in outcomes)) for ending in (FAILED, LATE, FLOODED)]
        runs, requests, trajectories, *counts = dist.total([float(len(outcomes)), requests, trajectories, *ended])
        means = {"agent/requests": requests / max(runs, 1.0), "agent/trajectories": trajectories / max(runs, 1.0)}
        return {**means, **{f"agent/{name}": count for name, count in zip((FAILED, LATE, FLOODED), counts, strict=True)}}, {}

    def close(self) -> None:
        """End the endpoint and all runs."""
        self._agents.close()
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None

    async def _play_all(self, rollout: Rollout, runs: Sequence[_Run], found: list[Sample]) -> None:
        at_once = max(1, min(self._config.processes, len(runs)))
        async with Live(rollout, max_new_tokens=self._max_new_tokens, positions=self._longest, at_once=at_once) as live:
            room = asyncio.Semaphore(self._config.processes)
            plays = [asyncio.ensure_future(self._play(live, run, room)) for run in runs]
            watching = asyncio.ensure_future(tell(self._watch, "runs of the agent", plays))
            try:
                found += await live.alongside(asyncio.gather(*plays))
            finally:
                for task in (watching, *plays):
                    task.cancel()
                await asyncio.gather(watching, *plays, return_exceptions=True)

    async def _play(self, live: Live, run: _Run, room: asyncio.Semaphore) -> Sample:
        async with room:
            limits = {"longest": self._longest, "max_new_tokens": self._max_new_tokens}
            trajectories = Trajectories(run.prompt, run.group, self._replies, self._stop_id, **limits)
            terms = Terms(MODEL, run.sampling.temperature, is_fixed=run.sampling.temperature > 0)
            policy = Policy(live, self._tokenizer, terms, replace(run.sampling, n=1), run.seed_of)
            session = Session(policy, trajectories, f"chatcmpl-{run.place}", self._config.requests)
            with self._opened(session) as variables:
                try:
                    result = await self._ended(session, run, variables)
                finally:
                    await session.close()
        sample = _sample(trajectories, run, result)
        sample.outcome = self._outcome(session, run, result)
        return sample

    @contextmanager
    def _opened(self, session: Session) -> Iterator[dict[str, str]]:
        """In this context, the session has a key. Yield the environment variables of its run, but for its seed."""
        assert self._endpoint is not None
        key = self._endpoint.open(session)
        # A proxy does not know this machine.
        local = {name: ",".join(filter(None, (os.environ.get(name), LOOPBACK))) for name in ("NO_PROXY", "no_proxy")}
        try:
            yield {"OPENAI_BASE_URL": self._endpoint.url, "OPENAI_API_KEY": key, "OPENAI_MODEL": MODEL, **local}
        finally:
            self._endpoint.shut(key)

    async def _ended(self, session: Session, run: _Run, variables: dict[str, str]) -> Result | Failure:
        """Run the program until it ends, or asks too often."""
        world = {"AGENT_SEED": str(world_seed(self._seed, run.group))}
        running = asyncio.ensure_future(self._agents.run(run.prompt.row, {**variables, **world}, world_seed(self._seed, run.place)))
        flood = asyncio.ensure_future(session.is_flooded.wait())
        waited: set[asyncio.Future[Any]] = {running, flood}
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if session.is_flooded.is_set():
                return Failure(f"has asked more than {self._config.requests} times (agent.requests)")
            return running.result()
        finally:
            for task in waited:
                task.cancel()
                with suppress(asyncio.CancelledError, UserError):
                    await task

    def _outcome(self, session: Session, run: _Run, result: Result | Failure) -> Outcome:
        """Return how a run has ended. Raises UserError: it has failed, and `agent.on_error=stop`."""
        outcome = Outcome(DONE, metrics={REQUESTS: float(session.asked)})
        if isinstance(result, Failure):
            is_late = result.what.startswith(nursery.LATE)
            outcome.ending = FLOODED if session.is_flooded.is_set() else LATE if is_late else FAILED
            error = error_of("the agent", result, run.prompt.where, FIX)
            if self._config.on_error == "stop":
                raise error
            outcome.errors.append(error)
        elif result.reward is not None:
            outcome.rewards.append(result.reward)
        return outcome


def _sample(trajectories: Trajectories, run: _Run, result: Result | Failure) -> Sample:
    """Return a run's answer: its first trajectory, with the others as `more`. Its text is that of the agent, or else the last turn."""
    found = [trajectory.sample for trajectory in trajectories.found]
    if not found:
        logprobs: list[float] | None = [] if run.sampling.logprobs else None
        found = [Sample(run.prompt, run.group, run.prompt.token_ids, [], [], logprobs, "", "stop", 0, turns=0)]
    first, first.more = found[0], found[1:]
    text = result.text if isinstance(result, Result) and result.text is not None else trajectories.last_text
    if text != first.text and first.turns:
        first.earlier.append(first.text)
    first.text = text
    if any(sample.finish_reason == "length" for sample in found):
        first.finish_reason = "length"
    return first
