"""Answers of agents: programs that ask a chat endpoint over the run's engine (`rollout.serve`), each run once for an answer.

A run has a key of its own, by which its requests are known. What it has asked and got is joined into trajectories (`verl.rl.trajectories`),
which are the tokens of its answer. A run that fails, hangs or asks too often is ended; its answer is what it has until then.
"""

import asyncio
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from verl import dist, signals
from verl.config.agent import AgentConfig
from verl.config.workers import WorkersConfig
from verl.data.prompts import Prompt
from verl.data.render import Renderer
from verl.endpoint.request import Terms
from verl.endpoint.server import LOOPBACK, Endpoint, check_installed
from verl.errors import AbandonedError, UserError
from verl.rewards._scoring import error_of
from verl.rl.agent_session import Policy, Session
from verl.rl.samples import Sample
from verl.rl.trajectories import Trajectories
from verl.rollout import Rollout, Sampling
from verl.rollout.live import Live
from verl.workers.agents import Agents, Result, load_program
from verl.workers.calls import Failure
from verl.workers.nursery import LATE

MODEL = "policy"  # its name in requests
KINDS = ("failed", "late", "flooded")  # of runs that are ended
LOOK_SECONDS = 0.2  # between two looks at signals and other ranks
FIX = "correct the agent, or set agent.on_error=end, which keeps what the model has answered until then"


def check_agent_program(config: AgentConfig) -> None:
    """Raise UserError if the agent's program, or a package of the endpoint, is missing."""
    assert config.program is not None
    load_program(config.program)
    check_installed()


@dataclass
class Outcomes:
    """How runs of the agent have ended since they were last told.

    Attributes:
        runs, requests, trajectories: their numbers.
        counts: number of runs that were ended, by kind.
        errors: of these, each with the place of its row.
    """

    runs: int = 0
    requests: int = 0
    trajectories: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    errors: list[UserError] = field(default_factory=list)

    def add(self, session: Session, trajectories: Trajectories, failure: Failure | None, where: str) -> None:
        """Count a run. `where` is the place of its row."""
        self.runs += 1
        self.requests += session.asked
        self.trajectories += len(trajectories.found)
        if failure is not None:
            kind = "flooded" if session.is_flooded.is_set() else "late" if failure.what.startswith(LATE) else "failed"
            self.counts[kind] += 1
            self.errors.append(error_of("the agent", failure, where, FIX))


@dataclass(frozen=True)
class _Call:
    """One run: for answer `answer` to a numbered prompt."""

    number: int
    prompt: Prompt
    answer: int


class AgentAnswers:
    """Answers prompts by runs of an agent's program.

    Args:
        longest: maximum tokens of a trajectory.
        max_new_tokens: maximum tokens of a trajectory after its prompt.
        workers: what the agent's processes get.
        seed: of the run.
    Raises:
        UserError: there is no such program.
    """

    def __init__(
        self,
        config: AgentConfig,
        tokenizer: PreTrainedTokenizerBase,
        workers: WorkersConfig,
        *,
        longest: int,
        max_new_tokens: int,
        seed: int,
    ):
        assert config.program is not None
        self._config, self._tokenizer, self._seed = config, tokenizer, seed
        self._longest, self._max_new_tokens = longest, max_new_tokens
        self._renderer = Renderer(tokenizer)
        self._agents = Agents(load_program(config.program), config.seconds, replace(workers, secrets=config.secrets))
        self._endpoint: Endpoint | None = None
        self._outcomes = Outcomes()

    @property
    def dropped(self) -> list[str]:
        """Names of the environment variables that look like secrets and that the agent does not get."""
        return self._agents.dropped

    def answers(self, rollout: Rollout, prompts: Sequence[tuple[int, Prompt]], sampling: Sampling) -> list[Sample]:
        """Run the agent `sampling.n` times for each numbered prompt. Answers to one prompt are adjacent. Every rank calls it.

        Raises:
            UserError: on all ranks, if the program cannot be used, a run has failed with agent.on_error=stop, or the engine fails.
            AbandonedError: on all ranks, after a signal.
        """
        if self._endpoint is None:
            self._endpoint = Endpoint()
        calls = [_Call(number, prompt, answer) for number, prompt in prompts for answer in range(sampling.n)]
        found: list[Sample] = []
        dist.together(lambda: found.extend(asyncio.run(self._all(rollout, calls, sampling))))
        return found

    def take_errors(self) -> list[UserError]:
        """Return the failures since the last call."""
        errors, self._outcomes.errors = self._outcomes.errors, []
        return errors

    def take_metrics(self) -> dict[str, float]:
        """Return metrics of the runs since the last call, over all ranks. Every rank calls it."""
        outcomes, self._outcomes = self._outcomes, Outcomes(errors=self._outcomes.errors)
        counts = [outcomes.runs, outcomes.requests, outcomes.trajectories, *(outcomes.counts[kind] for kind in KINDS)]
        runs, requests, trajectories, *ended = dist.total([float(count) for count in counts])
        means = {"agent/requests": requests / max(runs, 1.0), "agent/trajectories": trajectories / max(runs, 1.0)}
        return {**means, **{f"agent/{kind}": count for kind, count in zip(KINDS, ended, strict=True)}}

    def close(self) -> None:
        """End the endpoint and all runs."""
        self._agents.close()
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None

    async def _all(self, rollout: Rollout, calls: Sequence[_Call], sampling: Sampling) -> list[Sample]:
        async with Live(rollout, max_new_tokens=self._max_new_tokens, positions=self._longest) as live:
            room = asyncio.Semaphore(self._config.processes)
            runs = [asyncio.create_task(self._answer(live, call, sampling, room, getattr(rollout, "version", 0))) for call in calls]
            watch = asyncio.create_task(_watch(live))
            try:
                ended = asyncio.gather(*runs)
                waited: set[asyncio.Future[Any]] = {ended, watch}
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                if watch.done():
                    await watch
                return await ended
            finally:
                for task in (*runs, watch):
                    task.cancel()
                await asyncio.gather(*runs, watch, return_exceptions=True)

    async def _answer(self, live: Live, call: _Call, sampling: Sampling, room: asyncio.Semaphore, version: int) -> Sample:
        async with room:
            trajectories = Trajectories(
                call.prompt, call.number, self._renderer, longest=self._longest, max_new_tokens=self._max_new_tokens
            )
            terms = Terms(MODEL, sampling.temperature, is_fixed=sampling.temperature > 0)
            policy = Policy(live, self._tokenizer, terms, replace(sampling, n=1), partial(seed_of, call.number, call.answer, sampling.n))
            session = Session(policy, trajectories, f"chatcmpl-{call.number}-{call.answer}", self._config.requests)
            with self._opened(session) as variables:
                try:
                    result = await self._ended(session, call, variables)
                finally:
                    await session.close()
        failure = result if isinstance(result, Failure) else None
        self._outcomes.add(session, trajectories, failure, call.prompt.where)
        if failure is not None and self._config.on_error == "stop":
            raise self._outcomes.errors[-1]
        return _sample(trajectories, call, result if isinstance(result, Result) else Result(), version, sampling)

    @contextmanager
    def _opened(self, session: Session) -> Iterator[dict[str, str]]:
        """In this context, the session has a key. Yield the environment variables of its run, but for its seed."""
        assert self._endpoint is not None
        key = self._endpoint.open(session)
        local = {
            name: ",".join(filter(None, (os.environ.get(name), LOOPBACK))) for name in ("NO_PROXY", "no_proxy")
        }  # a proxy does not know this machine
        try:
            yield {"OPENAI_BASE_URL": self._endpoint.url, "OPENAI_API_KEY": key, "OPENAI_MODEL": MODEL, **local}
        finally:
            self._endpoint.shut(key)

    async def _ended(self, session: Session, call: _Call, variables: dict[str, str]) -> Result | Failure:
        """Run the program until it ends, or asks too often. Raises what the engine has raised."""
        world, own = world_seed(self._seed, call.number), self._seed + call.number * 1_000_003 + call.answer
        run = asyncio.create_task(self._agents.run(call.prompt.row, {**variables, "AGENT_SEED": str(world)}, own))
        flood = asyncio.create_task(session.is_flooded.wait())
        try:
            waited: set[asyncio.Future[Any]] = {run, flood, session.broken}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if session.broken.done():
                session.broken.result()
            if session.is_flooded.is_set():
                return Failure(f"has asked more than {self._config.requests} times (agent.requests)")
            return run.result()
        finally:
            for task in (run, flood):
                task.cancel()
                with suppress(asyncio.CancelledError, UserError):
                    await task


async def _watch(live: Live) -> None:
    """Return when the engine has failed. Raises AbandonedError after a signal, and RankError if another rank is lost."""
    while not live.has_failed:
        if signals.received() is not None:
            raise AbandonedError("given up, because the run stops")
        dist.check_others()
        await asyncio.sleep(LOOK_SECONDS)


def _sample(trajectories: Trajectories, call: _Call, result: Result, version: int, sampling: Sampling) -> Sample:
    """Return a run's answer: its first trajectory, with the others as `more`."""
    found = [trajectory.sample for trajectory in trajectories.found]
    if not found:
        logprobs: list[float] | None = [] if sampling.logprobs else None
        found = [Sample(call.prompt, call.number, call.prompt.token_ids, [], [], logprobs, "", "stop", version, turns=0)]
    first, first.more = found[0], found[1:]
    text = trajectories.last_text if result.text is None else result.text
    if text != first.text and first.turns:
        first.earlier.append(first.text)
    first.text, first.own_reward = text, result.reward
    if any(sample.finish_reason == "length" for sample in found):
        first.finish_reason = "length"
    return first


def seed_of(number: int, answer: int, answers: int, request: int) -> int:
    """Return the seed of the random numbers of a request."""
    return number * answers + answer + (request << 40)


def world_seed(seed: int, number: int) -> int:
    return seed * 1_000_003 + number
