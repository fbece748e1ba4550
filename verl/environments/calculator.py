"""A calculator as an environment: the model calls the tool `calculate` as often as it wants, and answers then.

It gives no rewards of its own: `reward.name` grades the answer. For a model whose chat template has no tools there is
`rollout.tool=calculator`, which reads the line `calculate 48+24`.
"""

from typing import Any

from verl.environments import Message, Start, Step
from verl.tools import calculator

CALCULATE = {
    "type": "function",
    "function": {
        "name": "calculate",
        "description": "Calculate with two whole numbers.",
        "parameters": {
            "type": "object",
            "properties": {
                "expression": {"type": "string", "description": "two whole numbers with + - * or / between them, such as 48+24"}
            },
            "required": ["expression"],
        },
    },
}


class Environment:
    """See `verl.environments`."""

    def reset(self, row: dict[str, Any], seed: int) -> Start:
        """Begin with the question of the row."""
        return Start(tools=[CALCULATE])

    def step(self, message: Message) -> Step:
        """Answer each call; the turn without one is the last."""
        if "parse_error" in message:
            return Step([_reply(f"error: {message['parse_error']}")])
        if calls := message.get("tool_calls"):
            return Step([_reply(_result(call["function"]), call["id"]) for call in calls])
        return Step(done=True)

    def close(self) -> None:
        """Do nothing: an episode holds nothing."""


def _result(call: dict[str, Any]) -> str:
    expression = call["arguments"].get("expression")
    if call["name"] != "calculate" or not isinstance(expression, str):
        return 'error: the only tool is calculate, with {"expression": "48+24"}'
    return calculator.reply(f"calculate {expression}", "", {}) or calculator.CANNOT


def _reply(text: str, call: str | None = None) -> Message:
    return {"role": "tool", "content": text, **({} if call is None else {"tool_call_id": call})}
