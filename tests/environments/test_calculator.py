"""The calculator as an environment, with calls of a tool."""

from verl.environments import Step
from verl.environments.calculator import CALCULATE, Environment
from verl.tools import calculator


def step(**message: object) -> Step:
    environment = Environment()
    assert environment.reset({}, 1).tools == [CALCULATE]
    return environment.step({"role": "assistant", "content": "", **message})


def called(name: str, arguments: dict[str, object]) -> Step:
    return step(tool_calls=[{"id": "call_0_0", "type": "function", "function": {"name": name, "arguments": arguments}}])


def test_a_call_is_answered() -> None:
    assert called("calculate", {"expression": "48+24"}) == Step([{"role": "tool", "content": "72", "tool_call_id": "call_0_0"}])


def test_a_turn_without_a_call_is_the_last() -> None:
    assert step(content="#### 72") == Step(done=True)


def test_a_wrong_call_is_told() -> None:
    for found in (called("add", {"expression": "1+1"}), called("calculate", {"x": 1}), called("calculate", {"expression": 3})):
        assert found.messages[0]["content"].startswith("error: the only tool is calculate") and not found.done
    assert called("calculate", {"expression": "1/0"}).messages[0]["content"] == calculator.CANNOT
    assert called("calculate", {"expression": "1+1\n2+2"}).messages[0]["content"] == calculator.CANNOT
    assert step(parse_error="the call is not JSON").messages[0]["content"] == "error: the call is not JSON"
