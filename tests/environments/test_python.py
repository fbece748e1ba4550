"""Python in the sandbox as an environment: what the model reads, what is kept from turn to turn, and what ends a program."""

import asyncio
import sys
from typing import Any

import pytest

from verl.environments import Message, Step
from verl.environments._calls import calls_in
from verl.environments.python import TOOL, Environment, Settings, check_installed
from verl.errors import UserError
from verl.sandbox.sandbox import Sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")


@pytest.fixture(scope="module", autouse=True)
def _sandbox() -> None:
    """Without what the sandbox needs, there is nothing to test: that it is refused then, tests/sandbox sees."""
    try:
        check_installed()
    except UserError as error:
        pytest.skip(str(error))


def called(*codes: str, name: str = "python") -> Message:
    calls = [
        {"id": f"call_{place}", "type": "function", "function": {"name": name, "arguments": {"code": code}}}
        for place, code in enumerate(codes)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def played(*turns: Message, seed: int = 0, **keys: Any) -> list[Step]:
    """Play an episode with these turns of the model; return what the environment answers to each."""

    async def play() -> list[Step]:
        environment = Environment(Settings(**keys))
        assert environment.reset({}, seed).tools == [TOOL]
        steps = [await environment.step(turn) for turn in turns]
        environment.close()
        return steps

    return asyncio.run(play())


def test_calls_of_an_episode_share_variables_and_the_turn_without_one_is_the_last() -> None:
    first, second, last = played(called("x = 6", "x * 7"), called("print(x)"), {"role": "assistant", "content": "It is 42."})
    assert first.messages == [
        {"role": "tool", "content": "(it printed nothing)", "tool_call_id": "call_0"},
        {"role": "tool", "content": "42", "tool_call_id": "call_1"},
    ]
    assert second.messages == [{"role": "tool", "content": "6", "tool_call_id": "call_0"}]
    assert last == Step(done=True, metrics={"programs": 3.0, "programs_ended": 0.0})
    assert not first.done and not second.done


def test_a_block_of_code_at_the_end_of_a_turn_is_a_call_too() -> None:
    block, elsewhere = played(
        {"role": "assistant", "content": "I compute:\n```python\n2 ** 10\n```\n"},
        {"role": "assistant", "content": "With\n```python\n2 ** 10\n```\nit is 1024."},
    )
    assert block.messages == [{"role": "tool", "content": "1024"}]
    assert elsewhere.done


def test_a_program_that_is_ended_says_so_and_the_next_one_begins_anew() -> None:
    slow, after = played(called("x = 1\nprint('begun')\nwhile True: pass"), called("x"), code_seconds=0.3)
    assert slow.messages[0]["content"] == "begun\n\n(the program ran longer than 0.3 s; its variables are lost)"
    assert "NameError: name 'x' is not defined" in after.messages[0]["content"]
    assert after.metrics == {"programs": 2.0, "programs_ended": 1.0}


def test_a_call_that_cannot_be_read_is_told_to_the_model() -> None:
    wrong, unread = played(called("1", name="bash"), {"role": "assistant", "content": "<tool_call>", "parse_error": "no JSON"})
    assert wrong.messages[0]["content"] == 'error: the only tool is python, with {"code": "…"}'
    assert unread.messages == [{"role": "tool", "content": "error: no JSON"}]
    assert not wrong.done and not unread.done


def test_programs_of_a_seed_draw_the_same_random_numbers() -> None:
    code = called("import random; random.random()")
    assert played(code, seed=3) == played(code, seed=3) != played(code, seed=4)


def test_episodes_do_not_see_each_others_files_and_variables() -> None:
    async def play() -> list[str]:
        first, second = Environment(Settings()), Environment(Settings())
        for each in (first, second):
            each.reset({}, 0)
        await first.step(called("x = 1; open('mine', 'w').write('x')"))
        step = await second.step(called("import os; print(os.listdir(), 'x' in globals())"))
        first.close()
        second.close()
        return [message["content"] for message in step.messages]

    assert asyncio.run(play()) == ["[] False"]


def test_the_keys_are_limits_of_the_program() -> None:
    memory, output, folder = (
        played(called("x = bytearray(2**28)"), memory_mib=192),
        played(called("print('x' * 100)"), output_bytes=10),
        played(called("open('f', 'wb').write(bytes(2 * 2**20))"), folder_mib=1),
    )
    assert "MemoryError" in memory[0].messages[0]["content"]
    assert output[0].messages[0]["content"] == "xxxxxxxxxx\n(the program printed more than 10 bytes; its variables are lost)"
    assert "Error" in folder[0].messages[0]["content"]


def test_modules_are_imported_before() -> None:
    assert played(called("import sys; 'fractions' in sys.modules"), modules=["fractions"])[0].messages[0]["content"] == "True"


@pytest.mark.parametrize(("key", "value"), [("code_seconds", 0), ("memory_mib", 1), ("modules", ["os; x"]), ("output_bytes", 0)])
def test_a_wrong_value_names_its_key(key: str, value: Any) -> None:
    with pytest.raises(UserError) as error:
        Settings(**{key: value}).check()
    assert error.value.where == key


def test_without_a_sandbox_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Sandbox, **_: object) -> None:
        raise UserError("this system can hold no programs")

    monkeypatch.setattr(Sandbox, "__init__", refused)
    monkeypatch.setattr("verl.sandbox.sandbox._shared", {})
    with pytest.raises(UserError, match="can hold no programs"):
        check_installed()


def test_text_is_a_call_only_if_there_is_none_in_the_format_of_the_template() -> None:
    message = {**called("1"), "content": "text"}
    assert [call.text for call in calls_in(message, "python", "code", lambda text: text)] == ["1"]
    assert [call.text for call in calls_in({"content": "text"}, "python", "code", lambda text: text)] == ["text"]
