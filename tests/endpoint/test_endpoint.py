"""The endpoint, as the `openai` package sees it: answers, events, errors, and who may ask."""

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from verl.endpoint.reply import Reply
from verl.endpoint.request import RefusedError
from verl.endpoint.server import Endpoint

CALL = {"id": "call_0_0", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CHAT: list[Any] = [{"role": "user", "content": "Hi."}]


class Parrot:
    """A session whose loop runs in a thread. It says what the last message says."""

    model = "policy"

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.bodies: list[Any] = []
        self.given_up = threading.Event()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    async def answer(self, body: Any) -> tuple[Reply, str]:
        self.bodies.append(body)
        said = body["messages"][-1]["content"]
        if said == "refuse":
            raise RefusedError("no room", param="messages", code="context_length_exceeded")
        if said.startswith("break"):
            raise TypeError(f"no such thing\nas {said}")
        if said == "surrogate":
            said = "\ud800"
        if said == "wait":
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.given_up.set()
                raise
        message: dict[str, Any] = {"role": "assistant", "content": said}
        if body.get("tools"):
            message = {"role": "assistant", "content": None, "tool_calls": [CALL]}
        kind = ("events with usage" if body.get("stream_options") else "events") if body.get("stream") else "json"
        return Reply("chatcmpl-0-0-0", "policy", message, "tool_calls" if body.get("tools") else "stop", 7, 2), kind

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture(scope="module")
def told() -> list[str]:
    """What the endpoint writes to the run's log."""
    return []


@pytest.fixture(scope="module")
def endpoint(told: list[str]) -> Iterator[Endpoint]:
    made = Endpoint(told.append)
    yield made
    made.close()


@pytest.fixture
def parrot() -> Iterator[Parrot]:
    made = Parrot()
    yield made
    made.close()


@pytest.fixture
def client(endpoint: Endpoint, parrot: Parrot) -> Iterator[openai.OpenAI]:
    key = endpoint.open(parrot)
    with openai.OpenAI(base_url=endpoint.url, api_key=key, max_retries=0, timeout=20) as made:
        yield made
    endpoint.shut(key)


def test_an_answer_is_what_the_openai_package_expects(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(model="policy", messages=CHAT)
    assert (found.choices[0].message.content, found.choices[0].finish_reason, found.model) == ("Hi.", "stop", "policy")
    assert found.usage is not None and (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (7, 2, 9)


def test_a_call_of_a_tool_is_what_the_openai_package_expects(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "add", "parameters": {}}}
    found = client.chat.completions.create(model="policy", messages=CHAT, tools=[tool])
    [call] = found.choices[0].message.tool_calls or []
    assert call.type == "function" and (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 1})
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == (None, "tool_calls")


def test_events_say_the_same(client: openai.OpenAI) -> None:
    events = list(client.chat.completions.create(model="policy", messages=CHAT, stream=True, stream_options={"include_usage": True}))
    assert "".join(event.choices[0].delta.content or "" for event in events if event.choices) == "Hi."
    assert [event.choices[0].finish_reason for event in events if event.choices][-1] == "stop"
    assert events[-1].usage is not None and events[-1].usage.total_tokens == 9
    tool: Any = {"type": "function", "function": {"name": "add", "parameters": {}}}
    called = [event.choices[0].delta for event in client.chat.completions.create(model="policy", messages=CHAT, tools=[tool], stream=True)]
    [call] = [call for delta in called for call in delta.tool_calls or []]
    assert call.function is not None and (call.index, call.function.name, call.function.arguments) == (0, "add", '{"a": 1}')


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["policy"]
    assert client.models.retrieve("policy").owned_by == "verl"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-5'"):
        client.models.retrieve("gpt-5")


def test_an_error_has_the_form_of_the_api(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="policy", messages=[{"role": "user", "content": "refuse"}])
    assert (caught.value.code, caught.value.param, caught.value.type) == ("context_length_exceeded", "messages", "invalid_request_error")
    assert client.chat.completions.create(model="policy", messages=CHAT).choices[0].message.content == "Hi."


def test_whatever_a_session_raises_is_an_error_of_the_api_and_told_once(
    client: openai.OpenAI, told: list[str], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    told.clear()
    for said in ("break 1", "break 2", "break 2"):
        with pytest.raises(openai.InternalServerError, match="the endpoint has failed: TypeError: no such thing") as caught:
            client.chat.completions.create(model="policy", messages=[{"role": "user", "content": said}])
        assert (caught.value.status_code, caught.value.type) == (500, "server_error")
    [line] = told
    assert "TypeError: no such thing as break 1 (test_endpoint.py:" in line and "\n" not in line
    assert "Traceback" not in "".join([*capfd.readouterr(), caplog.text])
    assert client.chat.completions.create(model="policy", messages=CHAT).choices[0].message.content == "Hi."


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_cannot_be_encoded_is_an_error_of_the_api(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.InternalServerError, match="UnicodeEncodeError"):
        client.chat.completions.create(model="policy", messages=[{"role": "user", "content": "surrogate"}], stream=stream)


def test_what_the_endpoint_has_not_is_told(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="has no POST /v1/responses: it has /v1/chat/completions"):
        client.responses.create(model="policy", input="Hi.")


def test_who_has_no_key_of_a_run_is_refused(endpoint: Endpoint, parrot: Parrot) -> None:
    key = endpoint.open(parrot)
    for wrong in ("sk-1234", key[:-1], key + "x"):
        with (
            openai.OpenAI(base_url=endpoint.url, api_key=wrong, max_retries=0) as other,
            pytest.raises(openai.AuthenticationError) as caught,
        ):
            other.chat.completions.create(model="policy", messages=CHAT)
        assert caught.value.code == "invalid_api_key"
    endpoint.shut(key)
    with openai.OpenAI(base_url=endpoint.url, api_key=key, max_retries=0) as late, pytest.raises(openai.AuthenticationError):
        late.chat.completions.create(model="policy", messages=CHAT)
    assert parrot.bodies == [], "none of them was answered"


def test_it_listens_on_loopback_alone(endpoint: Endpoint) -> None:
    assert endpoint.url.startswith("http://127.0.0.1:") and endpoint._listener.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize(("body", "said"), [(b"{", "is no JSON"), (b"[" * 100_000, "is no JSON"), (b" " * 2**25, "more than 16 MiB")])
def test_a_body_that_is_no_json_or_too_large_is_refused(endpoint: Endpoint, parrot: Parrot, body: bytes, said: str) -> None:
    key = endpoint.open(parrot)
    connection = http.client.HTTPConnection(urlsplit(endpoint.url).netloc, timeout=20)
    connection.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {key}"})
    answer = connection.getresponse()
    assert answer.status in (400, 413) and said in json.loads(answer.read())["error"]["message"]
    connection.close()
    endpoint.shut(key)


def test_a_request_is_given_up_if_its_client_goes_away(client: openai.OpenAI, parrot: Parrot) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).chat.completions.create(model="policy", messages=[{"role": "user", "content": "wait"}])
    assert parrot.given_up.wait(10)


def test_many_ask_at_the_same_time(endpoint: Endpoint, parrot: Parrot) -> None:
    key = endpoint.open(parrot)

    async def ask(client: openai.AsyncOpenAI, number: int) -> str | None:
        found = await client.chat.completions.create(model="policy", messages=[{"role": "user", "content": str(number)}])
        return found.choices[0].message.content

    async def ask_all() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=endpoint.url, api_key=key, max_retries=0) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(50)))

    began = time.monotonic()
    assert asyncio.run(ask_all()) == [str(number) for number in range(50)]
    assert time.monotonic() - began < 20
    endpoint.shut(key)
