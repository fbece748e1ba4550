"""A calculator as an environment: the model calls the tool `calculate` as often as it wants, and answers then.

It gives no rewards of its own: `reward.name` grades the answer. A model whose chat template has no calls of tools writes the line
`calculate 48+24` at the end of its turn, as with `rollout.tool=calculator`.
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
        said = calculator.reply(message["content"], "", {})
        return Step(done=True) if said is None else Step([_reply(said)])

    def close(self) -> None:
        """Do nothing: an episode holds nothing."""


def _result(call: dict[str, Any]) -> str:
    expression = call["arguments"].get("expression")
    if call["name"] != "calculate" or not isinstance(expression, str):
        return 'error: the only tool is calculate, with {"expression": "48+24"}'
    return calculator.reply(f"calculate {expression}", "", {}) or calculator.CANNOT


def _reply(text: str, call: str | None = None) -> Message:
    return {"role": "tool", "content": text, **({} if call is None else {"tool_call_id": call})}
