"""What an agent asks the endpoint for one answer, joined into trajectories.

A request whose messages go on with an earlier chat is appended to it: the tokens that the model read and sampled stay as they are, and only
the new messages are made into tokens. If the chat has gone on otherwise meanwhile, the request begins a new trajectory, with the tokens of
the common part as its prompt. Any other request begins a new trajectory too.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from verl.data.prompts import Prompt
from verl.endpoint.request import ChatRequest, Message, RefusedError
from verl.rl.replies import Replies
from verl.rl.samples import Sample
from verl.rollout import Completion

Said = tuple[object, ...]  # a message as it is compared


@dataclass(frozen=True)
class Turn:
    """A turn of the model in a trajectory.

    Attributes:
        chat: the messages up to this turn, and with it.
        tokens: number of tokens of the answer up to its end.
        has_stop: whether it ends with a stop token.
    """

    chat: tuple[Said, ...]
    tokens: int
    has_stop: bool


@dataclass
class Trajectory:
    """A chat that is only appended to.

    Attributes:
        number: of the request that has begun it.
        tools: JSON of its tools.
        is_asked: whether its next turn is being sampled.
    """

    number: int
    sample: Sample
    tools: str
    turns: list[Turn] = field(default_factory=list)
    is_asked: bool = False


@dataclass(frozen=True)
class Asked:
    """A request that may be answered.

    Attributes:
        number: of the request among those that may be answered.
        trajectory: the one that goes on; None: a new one begins.
        before: tokens of the trajectory so far.
        added: tokens between them and the model's turn; of a new trajectory, all.
        room: maximum tokens of the turn.
    """

    number: int
    trajectory: Trajectory | None
    before: list[int]
    added: list[int]
    room: int

    @property
    def prompt_ids(self) -> list[int]:
        """Tokens that the model reads."""
        return self.before + self.added


class Trajectories:
    """The trajectories of one answer.

    Args:
        number: number of the prompt.
        stop_id: the token that ends a turn in the chat template.
        longest: maximum tokens of a trajectory.
        max_new_tokens: maximum tokens of a trajectory after its prompt.
    Attributes:
        found: the trajectories, in the order in which they began.
    """

    def __init__(self, prompt: Prompt, number: int, replies: Replies, stop_id: int, *, longest: int, max_new_tokens: int):
        self._prompt, self._number, self._replies, self._stop_id = prompt, number, replies, stop_id
        self._longest, self._max_new_tokens = longest, max_new_tokens
        self.found: list[Trajectory] = []
        self._last, self._asked_so_far = (-1, ""), 0

    @property
    def last_text(self) -> str:
        """The turn that was asked for last, of those that were answered."""
        return self._last[1]

    @contextmanager
    def asking(self, request: ChatRequest) -> Iterator[Asked]:
        """In this context, the request is answered. Raises RefusedError or UserError: it cannot be."""
        asked = self._asked(request, self._asked_so_far)
        self._asked_so_far += 1
        if asked.trajectory is not None:
            asked.trajectory.is_asked = True
        try:
            yield asked
        finally:
            if asked.trajectory is not None:
                asked.trajectory.is_asked = False

    def append(self, asked: Asked, request: ChatRequest, done: Completion, text: str, message: Message, *, has_stop: bool) -> None:
        """Append the answer to a request.

        Args:
            text: the turn without its stop token.
            message: the turn as the agent gets it.
            has_stop: whether the tokens end with a stop token.
        """
        trajectory = asked.trajectory
        if trajectory is None:
            sample = Sample(self._prompt, self._number, asked.prompt_ids, [], [], [], "", "stop", done.version, turns=0)
            trajectory = Trajectory(asked.number, sample, request.tools_key)
            self.found = sorted([*self.found, trajectory], key=lambda one: one.number)  # whichever is answered first
        else:
            _append(trajectory.sample, asked.added, trajectory.sample.version, None)
        sample = trajectory.sample
        _append(sample, done.token_ids, done.version if done.versions is None else done.versions, done)
        sample.earlier += [*([sample.text] if sample.turns else []), *_new_texts(request, sample.turns, trajectory)]
        sample.text, sample.finish_reason, sample.turns = text, done.finish_reason, sample.turns + 1
        chat = (*map(said, request.messages), said(message))
        trajectory.turns.append(Turn(chat, len(sample.answer_ids), has_stop))
        self._last = max(self._last, (asked.number, text))

    def _asked(self, request: ChatRequest, number: int) -> Asked:
        found = self._extended(tuple(map(said, request.messages)), request.tools_key)
        if found is None:
            ids = self._replies.prompt(request.messages, request.tools or [])
            return Asked(number, None, [], ids, self._room(ids, 0))
        trajectory, turn = found
        sample = trajectory.sample
        added = [] if turn.has_stop else [self._stop_id]  # a turn that was cut ends as the template ends it
        added += self._replies.between(request.messages[len(turn.chat) :])
        before = sample.prompt_ids + sample.answer_ids[: turn.tokens]
        if turn is not trajectory.turns[-1] or trajectory.is_asked:
            return Asked(number, None, before, added, self._room(before + added, 0))
        try:
            return Asked(number, trajectory, before, added, self._room(sample.prompt_ids, turn.tokens + len(added)))
        except RefusedError:
            sample.finish_reason = "length"
            raise

    def _extended(self, chat: tuple[Said, ...], tools: str) -> tuple[Trajectory, Turn] | None:
        """Return the longest chat that another one goes on with. Of equal ones, it is one that has not gone on otherwise."""
        turns = [
            (len(turn.chat), turn is trajectory.turns[-1] and not trajectory.is_asked, -number, trajectory, turn)
            for number, trajectory in enumerate(self.found)
            for turn in trajectory.turns
            if trajectory.tools == tools and len(turn.chat) < len(chat) and chat[: len(turn.chat)] == turn.chat
        ]
        *_, trajectory, turn = max(turns, key=lambda one: one[:3], default=(None, None))
        return None if trajectory is None or turn is None else (trajectory, turn)

    def _room(self, prompt_ids: list[int], answered: int) -> int:
        """Return the number of tokens that a turn may have. Raises RefusedError: there is room for none."""
        room = min(self._max_new_tokens, self._longest - len(prompt_ids)) - answered
        if room < 1:
            what = (
                f"the chat has {len(prompt_ids) + answered} tokens, and there is no room for an answer: it may have {self._longest} "
                f"(data.max_prompt_length + rollout.max_new_tokens), and {self._max_new_tokens} after its first messages"
            )
            raise RefusedError(what, param="messages", code="context_length_exceeded")
        return room


def said(message: Message) -> Said:
    """Return what a message says, without what agents change on the way: ids of calls, white space at the ends, forms of nothing."""
    calls = [call.get("function", {}) for call in message.get("tool_calls") or [] if isinstance(call, dict)]
    named = tuple((call.get("name"), _canonical(call.get("arguments"))) for call in calls if isinstance(call, dict))
    return message["role"], (message.get("content") or "").strip(), message.get("name"), named


def _canonical(arguments: object) -> str:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return str(arguments)
    return json.dumps(arguments, sort_keys=True)


def _append(sample: Sample, ids: list[int], version: int | list[int], done: Completion | None) -> None:
    """Append tokens that were sampled, or with `done=None` those of others."""
    sample.append(ids, version, trained=done is not None)
    if done is not None and done.logprobs is None:
        sample.logprobs = None
    if sample.logprobs is not None:
        sample.logprobs += [0.0] * len(ids) if done is None else list(done.logprobs or [])


def _new_texts(request: ChatRequest, turns: int, trajectory: Trajectory) -> list[Any]:
    """Return the texts of the messages since the last turn of a trajectory."""
    return [message["content"] for message in request.messages[len(trajectory.turns[-1].chat) :]] if turns else []
