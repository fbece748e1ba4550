"""A stand-in for an OpenAI-style service, a real HTTP server on this machine."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from verl.rewards import _service
from verl.rewards._replies import Replies

KEY = "plain-words-42"  # no form by which a key is recognised
Reply = tuple[int, dict[str, str], Any]


class Service:
    """A stand-in that answers each request by `reply(number, body)`: a status, headers and a JSON value."""

    def __init__(self) -> None:
        self.reply: Callable[[int, dict[str, Any]], Reply] = lambda number, body: graded("Grade: 10")
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.most_at_a_time = self._now = 0
        self._lock = threading.Lock()
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                service.answer(self)

            def log_message(self, *_: object) -> None: ...

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            number = len(self.requests)
            self.requests.append((handler.path, dict(handler.headers), body))
            self._now += 1
            self.most_at_a_time = max(self.most_at_a_time, self._now)
        status, headers, value = self.reply(number, body)
        text = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        with self._lock:
            self._now -= 1
        handler.send_response(status)
        for name, content in {"Content-Length": str(len(text)), **headers}.items():
            handler.send_header(name, content)
        handler.end_headers()
        handler.wfile.write(text)

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


def graded(text: str) -> Reply:
    """As OpenAI documents the answer of /chat/completions."""
    return 200, {}, {"object": "chat.completion", "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}


@contextmanager
def served(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Service]:
    """A service, with nothing remembered of others, and an empty cache on disk."""
    forget(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    found = Service()
    try:
        yield found
    finally:
        found.close()


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the replies in memory, as a new process does."""
    monkeypatch.setattr(_service, "_replies", Replies())
    monkeypatch.setattr(_service, "failures", _service.Failures())


def prompt_of(body: dict[str, Any]) -> str:
    return str(body["messages"][0]["content"])
