"""One episode: a model and an environment, turn by turn.

What the environment says is rendered with the chat template and appended to the token ids. Sampled tokens are kept as they are, never
tokenized again from text.
"""

import asyncio
import copy
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from verl.config.environment import EnvironmentConfig
from verl.data.chat import Message
from verl.data.tool_calls import read_turn
from verl.environments import Start
from verl.environments._results import start_of, step_of
from verl.errors import UserError
from verl.rewards._scoring import error_of
from verl.rl.environment import Host
from verl.rl.outcome import DONE, FAILED, HUNG, LATE, LENGTH, TURNS, Outcome
from verl.rl.replies import Replies
from verl.rl.samples import Sample
from verl.rollout import Completion, Sampling
from verl.rollout.live import Live
from verl.workers.calls import Failure, WrongResultError
from verl.workers.host import Late
from verl.workers.hosts import HostEndedError

MOST_TURNS = 2**16  # distance between the seeds of two answers
WORD = 2**64 - 1
FIX = "correct the environment or the row; environment.on_error=end ends only the episode, and counts it"


@dataclass(frozen=True)
class Table:
    """What all episodes have in common.

    Attributes:
        max_prompt_length: most tokens of the first messages.
        max_new_tokens: most tokens of all turns, with what the environment says between them.
        seed: seed of the run.
    """

    config: EnvironmentConfig
    tokenizer: PreTrainedTokenizerBase
    replies: Replies
    template: str
    max_prompt_length: int
    max_new_tokens: int
    seed: int


class _FailedError(Exception):
    """The environment has failed."""

    def __init__(self, failure: Failure):
        super().__init__(failure.what)
        self.failure = failure


class Episode:
    """One episode, which fills an answer.

    Args:
        sample: the answer; it has the prompt of its row, and no tokens yet.
        place: number of the answer among all answers of the run; its random numbers depend on it, on the turn and on `sampling.seed`.
    """

    def __init__(self, table: Table, host: Host, live: Live, sample: Sample, sampling: Sampling, place: int):
        self._table, self._host, self._live = table, host, live
        self._sample, self._sampling, self._place = sample, replace(sampling, n=1), place
        self._outcome = sample.outcome = Outcome()

    async def play(self) -> None:
        """Play to the end.

        Raises:
            UserError: the environment failed, and `environment.on_error=stop`; it cannot be used at all; or generation failed.
        """
        config = self._table.config
        task = asyncio.ensure_future(self._turns())
        try:
            done, _ = await asyncio.wait({task}, timeout=config.seconds)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
        if not done:
            self._fail(LATE, Failure(f"has not ended its episode within {config.seconds:g} s (environment.seconds)"))
        else:
            self._see_end(task)
        await self._close()

    def _see_end(self, task: "asyncio.Task[None]") -> None:
        try:
            task.result()
        except (_FailedError, HostEndedError) as error:
            self._fail(HUNG if isinstance(error.failure, Late) else FAILED, _with_limit(error.failure))

    def _fail(self, ending: str, failure: Failure) -> None:
        """End the episode with what it has. Raises UserError: `environment.on_error=stop`."""
        self._outcome.ending = ending
        self._tell(failure, self._outcome.errors)

    def _tell(self, failure: Failure, errors: list[UserError]) -> None:
        config = self._table.config
        error = error_of(f"environment {config.name}", failure, self._sample.prompt.where, FIX)
        if config.on_error == "stop":
            raise error
        errors.append(error)

    async def _close(self) -> None:
        """Close the environment's object, if its process still runs."""
        if self._host.has_ended:
            return
        try:
            found = await self._host.call("close", seconds=self._table.config.step_seconds)
        except HostEndedError as error:
            found = error.failure
        if isinstance(found, Failure) and self._outcome.ending not in (FAILED, HUNG):
            self._tell(replace(found, what=f"cannot be closed: it {_with_limit(found).what}"), self._outcome.unclosed)

    async def _turns(self) -> None:
        config, sample = self._table.config, self._sample
        self._begin(self._read(start_of, await self._call("reset", copy.copy(sample.prompt.row), self._world, seed=self._world)))
        for turn in range(config.max_turns):
            message = self._said(await self._draw(turn), turn)
            if message is None:
                self._outcome.ending = LENGTH
                return
            step = self._read(step_of, await self._call("step", message))
            self._outcome.rewards.append(step.reward)
            self._outcome.metrics |= step.metrics
            if step.done or not step.messages:
                self._outcome.ending = DONE
                return
            if turn + 1 < config.max_turns and not self._append(step.messages):
                self._outcome.ending = LENGTH
                return
        self._outcome.ending = TURNS

    # --- the environment

    @property
    def _world(self) -> int:
        """Seed of the environment, the same for all answers to a prompt."""
        return world_seed(self._table.seed, self._sample.group)

    async def _call(self, function: str, *arguments: Any, seed: int | None = None) -> Any:
        """Call a method of the environment.

        Raises:
            _FailedError: it failed.
            UserError: it cannot be used at all; with the row's place.
        """
        begun = time.monotonic()
        try:
            found = await self._host.call(function, *arguments, seconds=self._table.config.step_seconds, seed=seed)
        except UserError as error:
            where = ", ".join(filter(None, (self._sample.prompt.where, error.where)))
            raise UserError(error.what, where=where, fix=error.fix) from error
        finally:
            self._outcome.waited += time.monotonic() - begun
        if isinstance(found, Failure):
            raise _FailedError(_of(function, found))
        return found

    def _read(self, read: Any, value: object) -> Any:
        try:
            return read(value)
        except WrongResultError as error:
            raise _FailedError(_of("reset" if read is start_of else "step", Failure(str(error)))) from error

    # --- tokens

    def _begin(self, start: Start) -> None:
        """Begin with the environment's first messages, or those of the row."""
        sample, prompt = self._sample, self._sample.prompt
        if not start.messages and not start.tools:
            return
        messages = start.messages or prompt.messages
        ids = self._rendered(lambda: self._table.replies.prompt(messages, []), "reset")
        if start.tools:
            ids = self._with_tools(messages, start.tools)
        if len(ids) > self._table.max_prompt_length:
            what = f"begins with {len(ids):,} tokens, more than data.max_prompt_length"
            fix = f"set data.max_prompt_length={len(ids)}, or shorten its first messages and tools"
            raise _FailedError(Failure(what, fix=fix))
        sample.prompt = replace(prompt, messages=messages, text=_text_of(messages[-1]), token_ids=ids)
        sample.prompt_ids = ids

    def _with_tools(self, messages: list[Message], tools: list[dict[str, Any]]) -> list[int]:
        """Return the tokens of the first messages with tools. Raises UserError: the chat template cannot show the tools."""
        try:
            return self._table.replies.prompt(messages, tools)
        except (UserError, TypeError, ValueError) as error:
            what = f"environment {self._table.config.name} has tools that cannot be rendered: {getattr(error, 'what', error)}"
            fix = "set data.chat_template to one that prints tools, or take a model whose template does"
            raise UserError(what, where="chat template", fix=fix) from error

    async def _draw(self, turn: int) -> Completion:
        """Draw the model's next turn, and append it."""
        sample = self._sample
        sampling = replace(self._sampling, max_new_tokens=self._table.max_new_tokens - len(sample.answer_ids))
        done = await self._live.submit(sample.prompt_ids + sample.answer_ids, sampling, self._place * MOST_TURNS + turn)
        if turn == 0:
            sample.version, sample.logprobs = done.version, None if done.logprobs is None else []
        sample.append(done.token_ids, done.version if done.versions is None else done.versions, trained=True)
        if sample.logprobs is not None:
            sample.logprobs += done.logprobs or [0.0] * len(done.token_ids)
        sample.text, sample.finish_reason, sample.turns = done.text(self._table.tokenizer), done.finish_reason, turn + 1
        return done

    def _said(self, done: Completion, turn: int) -> Message | None:
        """Return the model's turn as a message; None if it was cut off."""
        return None if done.finish_reason == "length" else read_turn(self._sample.text, self._table.template, turn)

    def _append(self, messages: list[Message]) -> bool:
        """Append what the environment says. Return whether there is room for another turn."""
        sample = self._sample
        ids = self._rendered(lambda: self._table.replies.between(messages), "step")
        if len(sample.answer_ids) + len(ids) >= self._table.max_new_tokens:
            sample.finish_reason = "length"
            return False
        sample.earlier += [sample.text, "\n".join(map(_text_of, messages))]
        sample.append(ids, sample.version if sample.versions is None else sample.versions[-1], trained=False)
        if sample.logprobs is not None:
            sample.logprobs += [0.0] * len(ids)
        return True

    def _rendered(self, render: Any, function: str) -> list[int]:
        try:
            ids: list[int] = render()
        except (UserError, TypeError, ValueError) as error:
            what = f"returned messages that cannot be rendered: {getattr(error, 'what', error)}"
            raise _FailedError(_of(function, Failure(what))) from error
        return ids


def world_seed(seed: int, group: int) -> int:
    """Return the seed of the world of a prompt's answers.

    Args:
        seed: of the run.
    """
    return int(np.random.SeedSequence([seed & WORD, group]).generate_state(1)[0]) >> 1


def _with_limit(failure: Failure) -> Failure:
    """Return a failure with the key of the limit that it exceeded, if it did."""
    return replace(failure, what=f"{failure.what} (environment.step_seconds)") if isinstance(failure, Late) else failure


def _of(function: str, failure: Failure) -> Failure:
    return replace(failure, what=f"{failure.what}, in {function}")


def _text_of(message: Message) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else str(content or "")
