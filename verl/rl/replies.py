"""Tokens of what a model reads: a chat that begins, and what is said between its turns."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from verl.data.chat import Message
from verl.data.render import PROBE, Renderer
from verl.errors import UserError

KEPT = 4096  # texts whose tokens are kept, because environments say the same again and again
# Some templates let a tool speak only after a call.
CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "call00001", "type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}],
}


class Replies:
    """Renders with one renderer."""

    def __init__(self, renderer: Renderer):
        self._renderer = renderer
        self._kept_prompt, self._kept_reply = lru_cache(KEPT)(self._prompt), lru_cache(KEPT)(self._reply)

    def check(self) -> None:
        """Raise UserError if the chat template cannot continue a chat."""
        self.between([{"role": "user", "content": PROBE.messages[0]["content"]}])

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[int]:
        """Return the tokens of a chat with its generation prompt. Raises UserError: it cannot be rendered."""
        return list(self._kept_prompt(json.dumps([list(messages), list(tools) or None])))

    def between(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens between the end of a turn and the next one, see `Renderer.turn_after`."""
        return list(self._kept_reply(json.dumps(list(messages))))

    def _prompt(self, chat: str) -> list[int]:
        messages, tools = json.loads(chat)
        return self._renderer.prompt(messages, tools)

    def _reply(self, said: str) -> list[int]:
        messages = json.loads(said)
        try:
            return self._renderer.turn_after(*messages)
        except UserError:
            if messages[0]["role"] != "tool":
                raise
            return self._renderer.turn_after(*messages, answer=CALL)
