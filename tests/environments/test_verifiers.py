"""Environments of the real package verifiers, compared with the package's own client: what the model reads, and the reward."""

import asyncio
import http.server
import importlib.util
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from verl.environments import Message, Step
from verl.environments import verifiers as adapter
from verl.environments.verifiers import Environment, Settings
from verl.errors import UserError

needs_package = pytest.mark.skipif(importlib.util.find_spec("verifiers") is None, reason="needs verifiers: make test-verifiers")
# What the package and its dependencies warn of is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")

PACKAGE = '''
import verifiers as vf
from datasets import Dataset

ROWS = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(1, 4)]
CLEANED = []


def text_of(completion):
    said = [one for one in completion if one["role"] == "assistant"]
    return said[-1]["content"] or ""


def right(completion, answer):
    return 1.0 if text_of(completion) == answer else 0.0


async def short(completion):
    return 1.0 / (1 + len(text_of(completion)))


class Hot(vf.MultiTurnEnv):
    """Guess a number: hotter or colder."""

    async def env_response(self, messages, state, **_):
        guess = messages[-1]["content"] if isinstance(messages[-1], dict) else messages[-1].content
        if guess == state["answer"]:
            state["final_env_response"] = [{"role": "user", "content": "right"}]
            return state["final_env_response"]
        return [{"role": "user", "content": f"not {guess}"}, {"role": "user", "content": "again"}]

    @vf.cleanup
    async def clean(self, state):
        CLEANED.append(state["answer"])


class Forgetful(Hot):
    """Rewrites what it has said."""

    async def get_prompt_messages(self, state):
        return [{"role": "user", "content": f"turn {len(state['trajectory'])}"}]


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: one
        b: another
    """
    return a + b


def spread(states):
    return [0.0 for _ in states]


def load_environment(kind="single"):
    if kind == "group":
        return vf.SingleTurnEnv(dataset=Dataset.from_list(ROWS), rubric=vf.Rubric(funcs=[right, spread]))
    given = {"dataset": Dataset.from_list(ROWS), "rubric": vf.Rubric(funcs=[right, short], weights=[1.0, 0.5])}
    if kind == "single":
        return vf.SingleTurnEnv(system_prompt="Answer with a number.", **given)
    if kind == "tool":
        return vf.ToolEnv(tools=[add], max_turns=5, **given)
    if kind == "forgetful":
        return Forgetful(max_turns=3, **given)
    return Hot(max_turns=4, **given)
'''
ROW = {"question": "What is 3 + 3?", "answer": "6"}
ADD = {"name": "add", "arguments": {"a": 3, "b": 3}}
TURNS: dict[str, list[Message]] = {
    "single": [{"role": "assistant", "content": "6"}],
    "tool": [
        {"role": "assistant", "content": "I add.", "tool_calls": [{"id": "call_0_0", "type": "function", "function": ADD}]},
        {"role": "assistant", "content": "6"},
    ],
    "hot": [{"role": "assistant", "content": text} for text in ("1", "2", "6")],
}


@pytest.fixture
def package(tmp_path: Path) -> str:
    path = tmp_path / "sums.py"
    path.write_text(PACKAGE)
    return str(path)


def played(package: str, kind: str, turns: list[Message]) -> tuple[list[Message], list[dict[str, Any]], list[Step]]:
    """Play an episode; return the first messages, the tools and the steps."""

    async def play() -> tuple[list[Message], list[dict[str, Any]], list[Step]]:
        environment = Environment(Settings(package, {"kind": kind}))
        start = await environment.reset(ROW, 0)
        steps = [await environment.step(turn) for turn in turns]
        await environment.close()
        return start.messages, start.tools, steps

    return asyncio.run(play())


class _Scripted(http.server.BaseHTTPRequestHandler):
    """An OpenAI-style endpoint that says the turns one after the other."""

    turns: ClassVar[list[Message]] = []
    requests: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        self.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        said = self.turns[len(self.requests) - 1]
        calls = [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            for call in said.get("tool_calls", [])
        ]
        message = {"role": "assistant", "content": said["content"], **({"tool_calls": calls} if calls else {})}
        choice = {"index": 0, "finish_reason": "tool_calls" if calls else "stop", "message": message}
        body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        data = json.dumps({**body, "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Scripted)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def by_its_own_client(package: str, kind: str, url: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Let verifiers ask the endpoint by its own client. Return its requests and what it gives at the end."""
    from openai import AsyncOpenAI
    from verifiers.clients import OpenAIChatCompletionsClient

    _Scripted.turns, _Scripted.requests = TURNS[kind], []

    async def play() -> dict[str, Any]:
        async with AsyncOpenAI(base_url=url, api_key="none") as connection:
            loaded = adapter._loaded(Settings(package, {"kind": kind}))
            given = adapter._input_of(ROW, loaded)
            found: dict[str, Any] = await loaded.run_rollout(given, OpenAIChatCompletionsClient(connection), "m", {})
        return found

    return _Scripted.requests, asyncio.run(play())


@needs_package
@pytest.mark.parametrize("kind", TURNS)
def test_an_episode_is_that_of_the_packages_own_client(kind: str, package: str, endpoint: str) -> None:
    first, tools, steps = played(package, kind, TURNS[kind])
    requests, output = by_its_own_client(package, kind, endpoint)
    read = [[(one["role"], one["content"]) for one in request["messages"]] for request in requests]
    ours = [(one["role"], one["content"]) for one in first]
    for step, turn, request in zip(steps, TURNS[kind], read, strict=True):
        assert ours == request
        ours += [("assistant", turn["content"]), *((one["role"], one["content"]) for one in step.messages)]
    assert (steps[-1].reward, steps[-1].done) == (output["reward"], True)
    assert steps[-1].reward == 1.0 + 0.5 / 2  # of the rubric's two functions
    assert {name: steps[-1].metrics[name] for name in ("right", "short")} == {"right": 1.0, "short": 0.5}
    assert [tool["function"]["name"] for tool in tools] == [tool["function"]["name"] for tool in requests[0].get("tools", [])]


@needs_package
def test_tools_are_called_by_the_package_and_their_results_are_read(package: str) -> None:
    _, (tool,), steps = played(package, "tool", TURNS["tool"])
    assert tool["function"]["parameters"]["required"] == ["a", "b"]
    assert steps[0].messages == [{"role": "tool", "tool_call_id": "call_0_0", "content": "6"}]
    assert steps[1].metrics["add_calls"] == 1.0


@needs_package
def test_the_system_prompt_of_the_environment_comes_first(package: str) -> None:
    first, _, _ = played(package, "single", TURNS["single"])
    assert first == [{"role": "system", "content": "Answer with a number."}, {"role": "user", "content": "What is 3 + 3?"}]


@needs_package
def test_an_environment_that_rewrites_the_past_fails(package: str) -> None:
    with pytest.raises(ValueError, match="what the model has read cannot change"):
        played(package, "forgetful", TURNS["hot"])


@needs_package
def test_an_episode_that_is_closed_early_is_cleaned_up(package: str) -> None:
    async def play() -> list[str]:
        environment = Environment(Settings(package, {"kind": "hot"}))
        await environment.reset(ROW, 0)
        await environment.step({"role": "assistant", "content": "1"})
        await environment.close()
        cleaned: list[str] = type(environment._loaded).clean.__globals__["CLEANED"]
        return cleaned

    assert asyncio.run(play()) == ["6"]


@needs_package
def test_its_own_data_set_is_written_as_rows(package: str, tmp_path: Path) -> None:
    adapter.write_rows(tmp_path / "rows.jsonl", package, most=2)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == ["2", "4"]
    loaded = adapter._loaded(Settings(package))
    assert (
        adapter._input_of(rows[0], loaded)["prompt"] == adapter._input_of({"question": "What is 1 + 1?", "answer": "2"}, loaded)["prompt"]
    )


@needs_package
@pytest.mark.parametrize(("name", "said"), [("no-such-environment", "no_such|no-such"), ("PACKAGE", "unexpected keyword")])
def test_an_environment_that_cannot_be_loaded_names_its_key(name: str, said: str, package: str) -> None:
    given = Settings(package, {"sort": "x"}) if name == "PACKAGE" else Settings(name)
    with pytest.raises(UserError, match=said) as error:
        Environment(given)
    assert str(error.value.where).startswith("environment.package=")


@needs_package
def test_a_rubric_that_compares_answers_is_refused(package: str) -> None:
    with pytest.raises(UserError, match="compares the answers to one prompt"):
        Environment(Settings(package, {"kind": "group"}))


@needs_package
def test_a_row_without_a_question_is_refused(package: str) -> None:
    async def play() -> None:
        await Environment(Settings(package)).reset({"text": "x"}, 0)

    with pytest.raises(UserError, match="has no prompt and no question, but text"):
        asyncio.run(play())


def test_without_the_package_or_with_another_release_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="verifiers is not installed"):
        adapter.check_installed()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there")
    for release in ("0.1.10", "0.4.0"):
        monkeypatch.setattr("importlib.metadata.version", lambda name, release=release: release)
        with pytest.raises(UserError, match=rf"verifiers {release} is not from 0.1.11 to before 0.4"):
            adapter.check_installed()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.3.1")
    adapter.check_installed()


def test_no_environment_is_named() -> None:
    with pytest.raises(UserError) as error:
        Settings().check()
    assert error.value.where == "package"
