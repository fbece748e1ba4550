"""HTTP requests whose whole answer has a time limit, and which go to one server only."""

import http.client
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def one_answer(seconds: float) -> Iterator[urllib.request.OpenerDirector]:
    """Yield an opener for one request, which ends after `seconds` however slowly the server sends; redirects are not followed.

    A socket's own timeout begins again with each byte that arrives, so a thread shuts the connection.

    Raises:
        TimeoutError: the answer is not complete in time.
    """
    connections: list[socket.socket] = []
    is_late = threading.Event()

    def shut() -> None:
        is_late.set()
        for connection in connections:
            with suppress(OSError):  # it is closed already
                connection.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, shut)
    timer.daemon = True
    timer.start()
    try:
        yield urllib.request.build_opener(_Noted(connections), _NotedTLS(connections), _NoRedirects)
        if is_late.is_set():  # what has been read may be a part only
            raise TimeoutError
    except (OSError, http.client.HTTPException, ValueError) as error:  # what an incomplete answer raises
        if is_late.is_set():
            raise TimeoutError from error
        raise
    finally:
        timer.cancel()


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Return no new request, so that the redirect is an HTTPError."""
        return


class _Noted(urllib.request.HTTPHandler):
    """Opens connections, and keeps their sockets in a list."""

    def __init__(self, connections: list[socket.socket]):
        super().__init__()
        self._connections = connections

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_kept(http.client.HTTPConnection, self._connections), request)


class _NotedTLS(urllib.request.HTTPSHandler):
    def __init__(self, connections: list[socket.socket]):
        super().__init__()
        self._connections = connections

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_kept(http.client.HTTPSConnection, self._connections), request)


def _kept(kind: type[http.client.HTTPConnection], connections: list[socket.socket]) -> type[http.client.HTTPConnection]:
    class Connection(kind):  # type: ignore[valid-type, misc]
        def connect(self) -> None:
            super().connect()
            connections.append(self.sock)

    return Connection
