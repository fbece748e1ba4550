"""How the requests of one run of an agent are answered: each is sampled as the next turn of a trajectory (`verl.rl.trajectories`)."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from verl.data.tool_calls import OPEN, read_turn
from verl.endpoint.reply import Reply
from verl.endpoint.request import ChatRequest, RefusedError, Terms, check_texts, read_request
from verl.errors import UserError
from verl.rl.trajectories import Asked, Trajectories
from verl.rollout import Completion, Sampling
from verl.rollout.live import Live
from verl.rollout.waves import cut

LLAMA_END = "<|eot_id|>"  # of a template that prints calls as objects


@dataclass(frozen=True)
class Policy:
    """Who answers.

    Attributes:
        live: generates.
        sampling: how, but for the length and the temperature of a request.
        seed_of: returns the seed of a request's random numbers by its number in its run.
    """

    live: Live
    tokenizer: PreTrainedTokenizerBase
    terms: Terms
    sampling: Sampling
    seed_of: Callable[[int], int]


class Session:
    """Answers the requests of one run, in one event loop.

    Args:
        name: begins the ids of answers.
        most: number of requests that are answered.
    Attributes:
        asked: number of requests so far, refused ones among them.
        is_flooded: is set when there are too many.
    """

    def __init__(self, policy: Policy, trajectories: Trajectories, name: str, most: int):
        self._policy, self._trajectories, self._name, self._most = policy, trajectories, name, most
        self.model, self.loop = policy.terms.model, asyncio.get_running_loop()
        self.asked = 0
        self.is_flooded = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_closed = False

    async def answer(self, body: object) -> tuple[Reply, str]:
        """See `verl.endpoint.server.Session`."""
        if self._is_closed:
            raise RefusedError("the run of this agent has ended", status=503)
        if self.asked >= self._most:
            self.is_flooded.set()
            raise RefusedError(f"the run has asked {self._most} times, the most that it may (agent.requests)", status=429)
        self.asked += 1
        request = read_request(body, self._policy.terms)
        _check_tools(request, self._template(request))
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            reply = await self._reply(request)
        except UserError as error:
            raise RefusedError(str(error), param="messages") from error
        finally:
            self._tasks.discard(task)
        return reply, ("events with usage" if request.with_usage else "events") if request.stream else "json"

    async def close(self) -> None:
        """Answer no more: requests that are being answered are given up."""
        self._is_closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _reply(self, request: ChatRequest) -> Reply:
        with self._trajectories.asking(request) as asked:
            done = await self._generated(asked, request)
            text, done, is_cut = _stopped(done, request.stop, self._policy.tokenizer)
            message, calls = _message(text, request, self._template(request), asked.number)
            self._trajectories.append(asked, request, done, text, message, has_stop=done.finish_reason == "stop" and not is_cut)
        reason = "tool_calls" if calls else done.finish_reason
        return Reply(f"{self._name}-{asked.number}", self.model, message, reason, len(asked.prompt_ids), len(done.token_ids))

    async def _generated(self, asked: Asked, request: ChatRequest) -> Completion:
        """Sample a turn. Raises RefusedError: the engine has failed, which ends the step."""
        most = asked.room if request.max_tokens is None else min(asked.room, request.max_tokens)
        sampling = replace(self._policy.sampling, max_new_tokens=most, temperature=request.temperature)
        try:
            return await self._policy.live.submit(asked.prompt_ids, sampling, self._policy.seed_of(asked.number))
        except Exception as error:
            raise RefusedError(f"the engine has failed: {error}", status=503) from error

    def _template(self, request: ChatRequest) -> str:
        return str(self._policy.tokenizer.get_chat_template(None, request.tools))


def _check_tools(request: ChatRequest, template: str) -> None:
    """Raise RefusedError if a request has tools, and the calls of this model's template cannot be read."""
    if request.tools is not None and OPEN not in template and not ('"parameters"' in template and LLAMA_END in template):
        what = f"calls of tools cannot be read: the chat template of the model writes them neither in {OPEN} nor as Llama does"
        raise RefusedError(what, param="tools")


def _message(text: str, request: ChatRequest, template: str, turn: int) -> tuple[dict[str, Any], bool]:
    """Return a turn as the agent gets it, and whether it calls tools. A call that cannot be read stays a part of the text."""
    if request.tools is None:
        return {"role": "assistant", "content": text}, False
    found = read_turn(text, template, turn)
    try:
        check_texts(found.get("tool_calls", []))  # "\\ud800" in the JSON of a call is no text
    except RefusedError:
        return {"role": "assistant", "content": text}, False
    calls = [_call(call) for call in found.get("tool_calls", [])]
    if not calls:
        return {"role": "assistant", "content": text}, False
    return {"role": "assistant", "content": found["content"] or None, "tool_calls": calls}, True


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """Return a call as OpenAI's API writes it: its arguments are a JSON text."""
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _stopped(done: Completion, stops: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> tuple[str, Completion, bool]:
    """Return the text of a turn up to the first of the stop texts, its tokens up to the one that completes it, and whether it is cut."""
    text = done.text(tokenizer)
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    if not places:
        return text, done, False
    tokens = next(
        count
        for count in range(1, len(done.token_ids) + 1)
        if any(stop in tokenizer.decode(done.token_ids[:count], skip_special_tokens=True) for stop in stops)
    )
    return text[: min(places)], replace(cut(done, tokens), finish_reason="stop"), True
