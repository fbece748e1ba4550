"""Tokens of what a model reads: a chat that begins, and what is said between its turns.

What environments and agents say is plain text, whatever it looks like: the text of a control token does not become one.
"""

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
CHANGES = (
    "the chat template changes the model's earlier turns when a chat goes on, such as by leaving out thoughts; in an episode and in an "
    "agent's chat they stay as they were sampled"
)


class Replies:
    """Renders with one renderer.

    Attributes:
        note: what is to be said about the chat template; None: nothing.
    Raises:
        UserError: the chat template cannot continue a chat.
    """

    def __init__(self, renderer: Renderer):
        self._renderer = renderer
        self._kept_prompt, self._kept_reply = lru_cache(KEPT)(self._prompt), lru_cache(KEPT)(self._reply)
        self.note: str | None = None
        try:
            renderer.turn_after(PROBE.messages[0])
        except UserError:
            self.after_stop([PROBE.messages[0]])
            self.note = CHANGES

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[int]:
        """Return the tokens of a chat with its generation prompt. Raises UserError: it cannot be rendered."""
        return list(self._kept_prompt(json.dumps([list(messages), list(tools) or None])))

    def between(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens between the end of a turn and the next one, see `Renderer.turn_after`."""
        return list(self._kept_reply(json.dumps(list(messages))))

    def _prompt(self, chat: str) -> list[int]:
        messages, tools = json.loads(chat)
        return self._renderer.prompt(messages, tools, is_data=False)

    def _reply(self, said: str) -> list[int]:
        messages = json.loads(said)
        try:
            return self._renderer.turn_after(*messages)
        except UserError:
            if messages[0]["role"] == "tool":
                return self._renderer.turn_after(*messages, answer=CALL)
            return self.after_stop(messages)

    def after_stop(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens after the stop token of a fixed answer, for a template that changes the answer when others follow.

        The turn that is continued keeps its tokens, so what the template makes of the answer does not matter.
        """
        stop = self._renderer.stop_ids[0]
        before = self._renderer.prompt([PROBE.messages[0]]).count(stop)
        ids = self._renderer.prompt([*PROBE.messages, *messages], is_data=False)
        ends = [place for place, token in enumerate(ids) if token == stop]
        if len(ends) <= before:
            what = "the chat template does not end an answer with its stop token when the chat continues"
            raise UserError(what, where="chat template", fix="set data.chat_template to one that only appends")
        return ids[ends[before] + 1 :]
