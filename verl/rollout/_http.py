"""Client of a generation server: JSON requests over HTTP, and new weights in files that the server reads. Failures are UserErrors."""

import http.client
import json
import os
import socket
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from safetensors.torch import save_file
from torch import Tensor

from verl import dist
from verl.errors import UserError
from verl.one_answer import one_answer
from verl.redaction import redact_text
from verl.rollout._weights_folder import remove_abandoned, weights_folder

INFO_TIMEOUT = 30.0  # seconds for GET requests, which ask about the server itself
GENERATE_TIMEOUT = 1800.0  # seconds for a response
LARGEST_ANSWER = 256 * 2**20  # bytes
LARGEST_MESSAGE = 2**16  # bytes of the message of an HTTP error
KEY_VARIABLE = "VLLM_API_KEY"  # vLLM's own; keys come from the environment alone
WEIGHTS_TIMEOUT = 540.0  # seconds for a server to take new weights
SHARD_BYTES = 2**31  # weights in one file; they are copied to host memory first
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the files are in memory, and are deleted after use


class RefusedError(UserError):
    """The server answered with an HTTP error.

    Attributes:
        status: HTTP status, such as 404.
    """

    def __init__(self, status: int, what: str, *, where: str, fix: str):
        super().__init__(what, where=where, fix=fix)
        self.status = status


class Server:
    """A generation server.

    Args:
        url: address of the server, such as `http://localhost:8000`.
        start: command that starts such a server, for error messages.
        timeout: maximum seconds of a POST request.
    """

    def __init__(self, url: str, *, start: str, timeout: float = GENERATE_TIMEOUT):
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise UserError(f"{redact_text(url)!r} is not an address", where="rollout.url", fix="write http://HOST:PORT")
        if "@" in urlsplit(url).netloc:
            fix = f"write http://HOST:PORT, and put the server's key into the environment variable {KEY_VARIABLE}"
            raise UserError("has a user or a password in the address, which logs and other users would see", where="rollout.url", fix=fix)
        self.url, self.start, self.timeout = url.rstrip("/"), start, timeout

    def get(self, path: str) -> Any:
        """Send a GET request, and return the parsed JSON response. Raises the same errors as `post`."""
        return self._call(urllib.request.Request(self.url + path), INFO_TIMEOUT)  # noqa: S310 - http, checked above

    def post(self, path: str, body: dict[str, Any] | None = None, *, timeout: float = GENERATE_TIMEOUT) -> Any:
        """Send a JSON object in a POST request, and return the parsed JSON response; None if the response is empty.

        Args:
            timeout: maximum seconds; the server's `timeout` is used if it is smaller.
        Raises:
            RefusedError: the HTTP status is an error.
            UserError: the server cannot be reached, does not respond in time, or does not respond in JSON.
        """
        request = urllib.request.Request(  # noqa: S310 - http, checked above
            self.url + path, data=json.dumps(body or {}).encode(), headers={"Content-Type": "application/json"}
        )
        return self._call(request, min(self.timeout, timeout))

    def _call(self, request: urllib.request.Request, seconds: float) -> Any:
        url = request.full_url
        if KEY_VARIABLE in os.environ:
            request.add_unredirected_header("Authorization", f"Bearer {os.environ[KEY_VARIABLE]}")
        try:
            with one_answer(seconds) as opener, opener.open(request, timeout=seconds) as response:
                text = response.read(LARGEST_ANSWER + 1)
            if len(text) > LARGEST_ANSWER:
                fix = "check that it is such a server"
                raise UserError(f"sends more than {LARGEST_ANSWER // 2**20} MiB in one answer", where=url, fix=fix)
            return json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            raise _refused(error, url) from error
        except ValueError as error:
            raise UserError("did not answer in JSON", where=url, fix=f"give the address of such a server: {self.start}") from error
        except (OSError, http.client.HTTPException, RecursionError) as error:
            raise self._not_reached(error, url, seconds) from error

    def _not_reached(self, error: Exception, url: str, seconds: float) -> UserError:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError):
            return UserError(f"no answer within {seconds:.0f} s", where=url, fix="check whether the server hangs, and read its log")
        return UserError(f"cannot be reached: {reason}", where=url, fix=f"start the server, or correct the address: {self.start}")

    def is_local(self) -> bool:
        """Return whether the server is on this machine."""
        host = urlsplit(self.url).hostname or ""
        try:
            addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
        except OSError:
            return False
        return host == socket.gethostname() or any(address.startswith("127.") or address == "::1" for address in addresses)


def _refused(error: urllib.error.HTTPError, url: str) -> RefusedError:
    target = urlsplit(error.headers.get("Location") or "")
    if 300 <= error.code < 400 and target.hostname:
        what = f"answered {error.code}: it sends to {target.hostname}, and requests do not follow to other addresses"
        return RefusedError(error.code, what, where=url, fix="give the address of the server itself in rollout.url")
    return RefusedError(error.code, f"answered {error.code}: {_reason(error)}", where=url, fix="read the server's log")


def _reason(error: urllib.error.HTTPError) -> str:
    """Return the error message of an HTTP response, from the fields that servers usually put it in."""
    try:
        text = error.read(LARGEST_MESSAGE).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return str(error.reason)
    try:
        answer = json.loads(text)
    except ValueError:
        return text.strip()[:500] or error.reason
    error_value = answer.get("error", answer) if isinstance(answer, dict) else answer
    if isinstance(error_value, dict):
        error_value = error_value.get("message") or error_value.get("detail") or error_value
    return str(error_value)[:500]


def find_weights_folder(server: Server, folder: str | None) -> Path:
    """Return the folder for files with new weights.

    Args:
        folder: folder that the server can read under the same path; None: a folder in this machine's memory, if the server runs on this
            machine.
    Raises:
        UserError: the server runs on another machine and no folder is given, or the folder cannot be created.
    """
    if folder is not None:
        place = Path(folder).expanduser()
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot be created: {error}", where=f"rollout.weights_folder={folder}", fix="give another folder") from error
        return place.resolve()
    if not server.is_local():
        raise UserError(
            "the server runs on another machine and cannot read new weights from this machine's memory",
            where=server.url,
            fix="set rollout.weights_folder to a folder that both machines can read under the same path",
        )
    place = SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    if dist.is_main():
        remove_abandoned(place)
    return place


def send_weights(named_tensors: Iterable[tuple[str, Tensor]], place: Path, load: Callable[[Path], None]) -> None:
    """Write weights to files, let the server load them, and delete the files.

    Every process calls this and iterates over the tensors, because gathering them may be collective. Rank 0 writes the files and calls the
    server.

    Args:
        place: folder in which to create a temporary folder for the files.
        load: tells the server to load the weights of a folder, and returns when it has.
    Raises:
        UserError: `load` raised one; it is raised on all processes.
    """
    dist.barrier()  # wait until no process generates with the old weights
    if not dist.is_main():
        for _ in named_tensors:
            pass
        dist.together(lambda: None)
        return
    with weights_folder(place) as folder:
        for number, shard in enumerate(_shards(named_tensors)):
            save_file(shard, folder / f"model-{number:05}.safetensors")
        dist.together(lambda: load(folder))


def _shards(named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Copy the tensors to host memory, and yield those of one file at a time."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in named_tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()  # safetensors saves no shared memory, such as tied weights
        size += tensor.nbytes
    if shard:
        yield shard


def check_served_model(path: str, served: Iterable[str], *, start: str, url: str) -> None:
    """Raise UserError if the server does not serve this model.

    Args:
        path: directory or Hub name of the model.
        served: names and directories under which the server knows its model.
    """
    wanted = {path.rstrip("/"), str(Path(path).expanduser().resolve())}
    found = [name.rstrip("/") for name in served]
    if not wanted & {*found, *(str(Path(name).expanduser().resolve()) for name in found)}:
        raise UserError(
            f"serves {' and '.join(dict.fromkeys(found)) or 'no model'}, expected {path}",
            where=url,
            fix=f"start it with: {start}; if it is the same model under another name, add --served-model-name {path}",
        )
