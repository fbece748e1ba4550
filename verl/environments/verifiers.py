"""Environments of the package `verifiers` (PrimeIntellect), such as those of its Environments Hub, with their tools, turns and rubrics.

The package's own rollout runs, with a client that asks the model of this run: each of its requests is a turn. The reward is the rubric's,
at the end of the episode, and its metrics are `episode/NAME`. So an episode has to end by itself: let `environment.max_turns` be larger
than the environment's own number of turns. `write_rows` writes its data set as a file for `data.train_files`.

It needs verifiers from 0.1.11 to before 0.4, which no longer has these environments: its tasks are agents that ask an endpoint.
"""

import asyncio
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from verl import plugin
from verl.environments import Message, Start, Step
from verl.environments._results import is_taken
from verl.errors import UserError

OLDEST, TOO_NEW = "0.1.11", "0.4"
INSTALL = 'pip install "verl[verifiers]" in an environment of its own, without constraints.txt (docs/dependencies.md)'
MODEL = "verl"  # its name in requests


@dataclass
class Settings:
    # verifiers: name of an installed package of an environment, such as gsm8k, or path/to/file.py with `load_environment`.
    package: str | None = None
    # gymnasium, verifiers: arguments of gymnasium.make, or of the package's load_environment, such as {is_slippery: false}.
    arguments: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raises UserError naming the key."""
        if self.package is None:
            raise UserError("names no environment", where="package", fix="give its package: environment.package=gsm8k")


def check_installed() -> None:
    """Raises UserError: verifiers is not installed, or of another release."""
    from importlib.metadata import version

    from packaging.version import Version

    where = "environment.name=verifiers"
    if importlib.util.find_spec("verifiers") is None:
        raise UserError("verifiers is not installed", where=where, fix=INSTALL)
    found = version("verifiers")
    if not Version(OLDEST) <= Version(found) < Version(TOO_NEW):
        raise UserError(f"verifiers {found} is not from {OLDEST} to before {TOO_NEW}", where=where, fix=INSTALL)


def needs_limit(settings: Settings) -> bool:
    """Return true: its functions may wait for anything, so that they get processes of their own."""
    return True


def prepare(settings: Settings) -> None:
    """Load the environment, with its data set, once for all episodes."""
    _loaded(settings)


class Environment:
    """See `verl.environments`."""

    def __init__(self, settings: Settings):
        self._loaded = _loaded(settings)
        self._prompt: list[Message] = []
        self._asked: asyncio.Queue[tuple[list[Message], list[dict[str, Any]]]] = asyncio.Queue()
        self._said: asyncio.Queue[Message] = asyncio.Queue()
        self._rollout: asyncio.Task[Any] | None = None

    async def reset(self, row: dict[str, Any], seed: int) -> Start:
        """Begin the package's rollout of a row."""
        client = _client_class()(self._asked, self._said)
        played = self._loaded.run_rollout(_input_of(row, self._loaded), client, MODEL, {})
        self._rollout = asyncio.ensure_future(played)
        asked = await self._next()
        if asked is None:
            raise RuntimeError(f"the episode has ended before the model's first turn: {self._rollout.result().get('error')}")
        self._prompt, tools = asked
        return Start(self._prompt, tools)

    async def step(self, message: Message) -> Step:
        """Answer its request, and wait for the next one."""
        assert self._rollout is not None
        self._said.put_nowait(message)
        asked = await self._next()
        if asked is None:
            return _end_of(self._rollout.result())
        new = _new_messages(self._prompt, asked[0])
        self._prompt = asked[0]
        return Step(new)

    async def close(self) -> None:
        """End the rollout, so that it cleans up."""
        if self._rollout is not None and not self._rollout.done():
            self._rollout.cancel()
            await asyncio.wait({self._rollout})

    async def _next(self) -> tuple[list[Message], list[dict[str, Any]]] | None:
        """Return the next request's messages and tools; None: the episode has ended."""
        assert self._rollout is not None
        asked = asyncio.ensure_future(self._asked.get())
        await asyncio.wait({asked, self._rollout}, return_when=asyncio.FIRST_COMPLETED)
        if asked.done():
            return asked.result()
        asked.cancel()
        self._rollout.result()  # raises what it has raised
        return None


def write_rows(path: Path, package: str, arguments: Mapping[str, Any] | None = None, *, most: int = -1) -> None:
    """Write an environment's own data set as a file of rows.

    Args:
        most: number of rows; -1: all.
    """
    check_installed()
    rows = _loaded(Settings(package, dict(arguments or {}))).get_dataset(most)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**row, "prompt": [_plain(one) for one in row["prompt"]]}, ensure_ascii=False) + "\n")


def _loaded(settings: Settings) -> Any:
    return _load(str(settings.package), json.dumps(settings.arguments, sort_keys=True))


@cache
def _load(package: str, arguments: str) -> Any:
    given, where = json.loads(arguments), f"environment.package={package}"
    loaded = _made(package, given, where)
    if _compares_answers(loaded.rubric):
        what = "its rubric compares the answers to one prompt (group rewards), and here an episode is scored by itself"
        raise UserError(what, where=where, fix="take an environment whose rubric scores single answers")
    return loaded


def _made(package: str, given: dict[str, Any], where: str) -> Any:
    import verifiers

    try:
        if package.endswith(".py"):
            return plugin.load("verl.environments", package, needs=("load_environment",)).load_environment(**given)
        return verifiers.load_environment(package, **given)
    except UserError:
        raise
    except Exception as error:  # the environment's own code may raise anything
        fix = "install its package, or correct environment.arguments"
        raise UserError(f"{type(error).__name__}: {error}", where=where, fix=fix) from error


def _compares_answers(rubric: Any) -> bool:
    return bool(rubric._get_group_reward_funcs()) or any(map(_compares_answers, getattr(rubric, "rubrics", [])))


@cache
def _client_class() -> type:
    """Return a client of verifiers, in whose place the model of this run answers."""
    from verifiers.clients import Client
    from verifiers.types import Response, ResponseMessage, ToolCall

    class ClientOfThisRun(Client):
        def __init__(self, asked: "asyncio.Queue[Any]", said: "asyncio.Queue[Message]"):
            super().__init__(None)
            self._asked, self._said = asked, said

        async def get_response(self, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **_: Any) -> Any:
            functions = [one.model_dump(include={"name", "description", "parameters"}) for one in tools or []]
            schemas = [{"type": "function", "function": one} for one in functions]
            self._asked.put_nowait(([_plain(one.model_dump()) for one in prompt], schemas))
            said = await self._said.get()
            calls = [
                ToolCall(id=call["id"], name=call["function"]["name"], arguments=json.dumps(call["function"]["arguments"]))
                for call in said.get("tool_calls", [])
            ]
            finish = "tool_calls" if calls else "stop"
            answer = ResponseMessage(content=said["content"], tool_calls=calls or None, finish_reason=finish, is_truncated=False)
            return Response(id=MODEL, created=0, model=MODEL, message=answer)

        async def _unused(self, *_: Any, **__: Any) -> Any:
            raise NotImplementedError

        to_native_tool = to_native_prompt = get_native_response = raise_from_native_response = from_native_response = _unused

        def setup_client(self, config: Any) -> None: ...

        async def close(self) -> None: ...

    return ClientOfThisRun


def _input_of(row: dict[str, Any], environment: Any) -> dict[str, Any]:
    """Return a data row as verifiers wants it: with the messages of the prompt, and the right answer."""
    prompt = row.get("prompt")
    if not isinstance(prompt, list):
        question = prompt if isinstance(prompt, str) else row.get("question")
        if not isinstance(question, str):
            what = f"the row has no prompt and no question, but {', '.join(row)}"
            raise UserError(what, where="environment.name=verifiers", fix="write its rows with verl.environments.verifiers.write_rows")
        system = getattr(environment, "system_prompt", None)
        before = [{"role": "system", "content": system}] if system else []
        prompt = [*before, *(getattr(environment, "few_shot", None) or []), {"role": "user", "content": question}]
    answer = row.get("answer", row.get("reference"))
    others = {"example_id": 0, **row}
    return {**others, "prompt": prompt, "answer": "" if answer is None else answer, "info": row.get("info") or {}}


def _new_messages(before: list[Message], now: list[Message]) -> list[Message]:
    """Return what a request has after the one before and its answer. Raises ValueError: it has another past."""
    after = len(before) + 1
    if now[: len(before)] != before or len(now) < after or now[len(before)]["role"] != "assistant":
        raise ValueError("the environment changes earlier messages, and what the model has read cannot change")
    return now[after:]


def _plain(message: Mapping[str, Any]) -> Message:
    """Return a message without empty fields, its content as text."""
    found = {name: value for name, value in message.items() if value is not None}
    content = found.get("content", "")
    if isinstance(content, list):
        if any(part.get("type") != "text" for part in content):
            raise ValueError("a message has a part that is no text")
        content = "".join(part["text"] for part in content)
    return {**found, "content": content}


def _end_of(output: Mapping[str, Any]) -> Step:
    if output.get("error"):
        raise RuntimeError(f"the environment has failed: {output['error']}")
    found = {name: float(value) for name, value in (output.get("metrics") or {}).items() if value is not None}
    metrics = {f"rubric/{name}" if is_taken(name) else name: value for name, value in found.items()}
    return Step(reward=float(output.get("reward") or 0.0), done=True, metrics=metrics)
