"""The endpoint's HTTP server: it listens on loopback alone, and answers those who have a key, each with the session of that key.

It has a thread of its own, so that requests are read and answers are sent while the engine computes. What a session does, it does in the
event loop of its own. Whatever a session raises is answered in the API's format, and told once.
"""

import asyncio
import contextlib
import importlib.util
import json
import secrets
import socket
import threading
import time
import traceback
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from verl.endpoint.reply import Reply
from verl.endpoint.request import RefusedError
from verl.errors import UserError

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

LOOPBACK = "127.0.0.1"
PACKAGES = ("starlette", "uvicorn")
INSTALL = 'pip install -c constraints.txt -e ".[serve]"'
MOST_BYTES = 2**24  # of a request
START_SECONDS, END_SECONDS = 30.0, 3.0


class Session(Protocol):
    """Who has a key.

    Attributes:
        loop: the event loop in which it answers.
        model: name of its model.
    """

    loop: asyncio.AbstractEventLoop
    model: str

    async def answer(self, body: object) -> tuple[Reply, str]:
        """Answer a request for a chat completion. Return the answer, and how it is sent: as "json", "events" or "events with usage".

        Raises:
            RefusedError: it cannot be answered.
        """
        ...


def check_installed() -> None:
    """Raise UserError if the packages of the server are missing."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"the endpoint needs {' and '.join(missing)}", where="rollout.serve=true", fix=INSTALL)


class Endpoint:
    """A server that is running.

    Args:
        say: is given a line if a session fails, which it should not.
    Attributes:
        url: its address, for OPENAI_BASE_URL.
    """

    def __init__(self, say: Callable[[str], None] = lambda _: None) -> None:
        check_installed()
        import uvicorn

        self._sessions: dict[str, Session] = {}
        self._listener = socket.socket()
        self._listener.bind((LOOPBACK, 0))
        self._listener.listen(1024)
        self.url = f"http://{LOOPBACK}:{self._listener.getsockname()[1]}/v1"
        settings = uvicorn.Config(
            _application(self._session_of, _Faults(say)),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]}, name="endpoint", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + START_SECONDS
        while not self._server.started and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        if not self._server.started:
            raise UserError("the endpoint does not start", where="rollout.serve=true", fix="see what it says above")

    def open(self, session: Session) -> str:
        """Return a new key, with which the session answers."""
        key = f"verl-{secrets.token_urlsafe(24)}"
        self._sessions[key] = session
        return key

    def shut(self, key: str) -> None:
        """Refuse the key from now on."""
        self._sessions.pop(key, None)

    def close(self) -> None:
        """End the server."""
        self._sessions.clear()
        self._server.should_exit = True
        self._thread.join(END_SECONDS)
        self._listener.close()

    def _session_of(self, key: str) -> Session:
        session = self._sessions.get(key)
        if session is None:
            what = "the key is none of a run that goes on: give the client OPENAI_API_KEY of the agent's environment"
            raise RefusedError(what, code="invalid_api_key", status=401)
        return session


class _Faults:
    """Tells of what sessions raise: of each place in the code once, because an agent may ask the same again and again."""

    def __init__(self, say: Callable[[str], None]):
        self._say, self._told = say, set[tuple[str, str]]()

    def refusal(self, error: Exception) -> RefusedError:
        """Tell of an error, and return it as it is answered."""
        what = f"{type(error).__name__}: {error}".encode(errors="backslashreplace").decode()
        frames = traceback.extract_tb(error.__traceback__)
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        if (type(error).__name__, place) not in self._told:
            self._told.add((type(error).__name__, place))
            line = " ".join(what.split())
            self._say(
                f"warning: a request of an agent failed in the endpoint: {line} ({place}); it is answered with status 500, and told once"
            )
        return RefusedError(f"the endpoint has failed: {what}", status=500)


def _application(session_of: Callable[[str], Session], faults: _Faults) -> Any:
    """Return the ASGI application."""
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    def refused(error: RefusedError) -> "Response":
        return JSONResponse(error.body(), error.status)

    async def chat(request: "Request") -> "Response":
        try:
            session = session_of(_key(request))
            return _response(*await _answered(session, await _body(request), request))
        except RefusedError as error:
            return refused(error)
        except ClientDisconnect:
            return refused(RefusedError("the client went away before the request was complete"))
        except Exception as error:  # whatever it is, this request alone fails
            return refused(faults.refusal(error))

    async def models(request: "Request") -> "Response":
        try:
            session = session_of(_key(request))
            model = {"id": session.model, "object": "model", "created": 0, "owned_by": "verl"}
            if (asked := request.path_params.get("model", session.model)) != session.model:
                raise RefusedError(f"there is no model {asked!r}", code="model_not_found", status=404)
        except RefusedError as error:
            return refused(error)
        return JSONResponse(model if "model" in request.path_params else {"object": "list", "data": [model]})

    async def other(request: "Request", _: Exception) -> "Response":
        what = f"the endpoint has no {request.method} {request.url.path}: it has /v1/chat/completions and /v1/models"
        return refused(RefusedError(what, code="unknown_url", status=404))

    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{model:path}", models, methods=["GET"]),
    ]
    return Starlette(routes=routes, exception_handlers={404: other, 405: other})


def _response(reply: Reply, kind: str) -> "Response":
    """Return an answer that is encoded as a whole, so that whatever is wrong with it is known before any of it is sent."""
    from starlette.responses import JSONResponse, StreamingResponse

    if kind == "json":
        return JSONResponse(reply.body())
    events = [event.encode() for event in reply.events(with_usage=kind == "events with usage")]
    return StreamingResponse(iter(events), media_type="text/event-stream")


def _key(request: "Request") -> str:
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else ""


async def _body(request: "Request") -> object:
    """Return the JSON of a request. Raises RefusedError: it is too large, or no JSON."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise RefusedError(f"the request has more than {MOST_BYTES // 2**20} MiB", status=413)
    try:
        found: object = json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"the body is no JSON: {error}") from error
    return found


async def _answered(session: Session, body: object, request: "Request") -> tuple[Reply, str]:
    """Have the session answer in its own loop. If the client goes away, or the session's loop ends, the request does too."""
    answering: asyncio.Future[tuple[Reply, str]] = asyncio.wrap_future(_started(session.answer(body), session.loop))
    leaving = asyncio.ensure_future(_left(request))
    waited: set[asyncio.Future[Any]] = {answering, leaving}
    try:
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            answering.cancel()
        return await answering
    except (asyncio.CancelledError, CancelledError) as error:
        raise RefusedError("the run of this agent has ended", status=503) from error
    finally:
        leaving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await leaving


def _started(work: Coroutine[Any, Any, Any], loop: asyncio.AbstractEventLoop) -> Any:
    try:
        return asyncio.run_coroutine_threadsafe(work, loop)
    except RuntimeError as error:  # the loop is closed
        work.close()
        raise RefusedError("the run of this agent has ended", status=503) from error


async def _left(request: "Request") -> None:
    """Wait until the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
