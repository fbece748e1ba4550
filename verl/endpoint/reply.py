"""The answer to a request for a chat completion, in OpenAI's format: as one object, or as events."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        id: of the answer.
        message: the assistant's: `content`, and `tool_calls` if there are any, whose arguments are JSON texts.
        finish_reason: "stop", "length" or "tool_calls".
        prompt_tokens, completion_tokens: number of tokens that the model read and sampled.
    """

    id: str
    model: str
    message: dict[str, Any]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int

    def body(self) -> dict[str, Any]:
        """Return the answer as one object."""
        choice = {"index": 0, "message": self.message, "logprobs": None, "finish_reason": self.finish_reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self._usage()}

    def events(self, *, with_usage: bool) -> Iterator[str]:
        """Yield the answer as server-sent events. Its content is one of them: the endpoint answers when the answer is whole."""
        content, calls = self.message["content"], self.message.get("tool_calls", [])
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": "" if content is not None else None}]
        deltas += [{"content": content}] if content else []
        deltas += [{"tool_calls": [{"index": number, **call}]} for number, call in enumerate(calls)]
        for delta in deltas:
            yield self._event([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}])
        yield self._event([{"index": 0, "delta": {}, "logprobs": None, "finish_reason": self.finish_reason}])
        if with_usage:
            yield self._event([], usage=self._usage())
        yield "data: [DONE]\n\n"

    def _event(self, choices: list[dict[str, Any]], **more: object) -> str:
        body = {**self._head("chat.completion.chunk"), "choices": choices, **more}
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": int(time.time()), "model": self.model}

    def _usage(self) -> dict[str, int]:
        tokens = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        return {**tokens, "total_tokens": self.prompt_tokens + self.completion_tokens}
