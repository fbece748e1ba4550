"""Talking to a generation server: JSON over HTTP, every failure an error that a user can mend, and weights in a folder it reads."""

import http.client
import json
import shutil
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

QUESTION_SECONDS = 30.0  # what a server is, how it was started
WORK_SECONDS = 1800.0  # an answer
WEIGHTS_SECONDS = 0.9 * dist.TIMEOUT.total_seconds()  # new weights: before the other processes, which wait, give up with less to say
SHARD_BYTES = 2**31  # host memory for weights on their way into a file
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - files in it are memory, and are deleted at once


class RefusedError(UserError):
    """The server answered with an error.

    Attributes:
        status: of HTTP, such as 404.
    """

    def __init__(self, status: int, what: str, *, where: str, fix: str):
        super().__init__(what, where=where, fix=fix)
        self.status = status


class Server:
    """A server's address.

    Args:
        url: such as `http://localhost:8000`.
        start: the command that starts such a server, for errors.
        work_seconds: after so long without an answer it is taken to hang.
    """

    def __init__(self, url: str, *, start: str, work_seconds: float = WORK_SECONDS):
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise UserError(f"{url!r} is not an address", where="rollout.url", fix="write http://HOST:PORT")
        self.url, self.start, self.work_seconds = url.rstrip("/"), start, work_seconds

    def get(self, path: str) -> Any:
        """What the server answers, read as JSON."""
        return self._call(urllib.request.Request(self.url + path), QUESTION_SECONDS)  # noqa: S310 - http, checked above

    def post(self, path: str, body: dict[str, Any] | None = None, *, at_most_seconds: float = WORK_SECONDS) -> Any:
        """What the server answers to a JSON object; None where it answers without a word.

        Args:
            at_most_seconds: of waiting, if that is less than `work_seconds`.
        Raises:
            RefusedError: an HTTP status that says so.
            UserError: not reached, no answer in time, or one that is not JSON.
        """
        request = urllib.request.Request(  # noqa: S310 - http, checked above
            self.url + path, data=json.dumps(body or {}).encode(), headers={"Content-Type": "application/json"}
        )
        return self._call(request, min(self.work_seconds, at_most_seconds))

    def _call(self, request: urllib.request.Request, seconds: float) -> Any:
        place = request.full_url
        try:
            with urllib.request.urlopen(request, timeout=seconds) as response:  # noqa: S310 - http, checked above
                text = response.read()
            return json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            fix = "the server's log says more"
            raise RefusedError(error.code, f"answered {error.code}: {_reason(error)}", where=place, fix=fix) from error
        except ValueError as error:
            raise UserError("did not answer in JSON", where=place, fix=f"give the address of a server of: {self.start}") from error
        except (OSError, http.client.HTTPException) as error:
            raise self._not_reached(error, place, seconds) from error

    def _not_reached(self, error: Exception, place: str, seconds: float) -> UserError:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError):
            return UserError(f"no answer within {seconds:.0f} s", where=place, fix="look whether the server hangs; its log says more")
        return UserError(f"cannot be reached: {reason}", where=place, fix=f"start the server, or mend the address: {self.start}")

    def is_here(self) -> bool:
        """Whether the server is on this machine."""
        host = urlsplit(self.url).hostname or ""
        try:
            addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
        except OSError:
            return False
        return host == socket.gethostname() or any(address.startswith("127.") or address == "::1" for address in addresses)


def _reason(error: urllib.error.HTTPError) -> str:
    """What the server says is wrong, in its own words where they are in one of the usual places."""
    text = error.read().decode(errors="replace")
    try:
        answer = json.loads(text)
    except ValueError:
        return text.strip()[:500] or error.reason
    said = answer.get("error", answer) if isinstance(answer, dict) else answer
    return str(said.get("message") or said.get("detail") or said) if isinstance(said, dict) else str(said)


def place_for_weights(server: Server, folder: str | None) -> Path:
    """Where files with new weights are to lie.

    Args:
        folder: one that the server sees too; None: the memory of this machine, if the server is on it.
    Raises:
        UserError: the server is on another machine and there is no folder, or it cannot be made.
    """
    if folder is not None:
        place = Path(folder).expanduser()
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot be made: {error}", where=f"rollout.weights_folder={folder}", fix="give another") from error
        return place.resolve()
    if not server.is_here():
        raise UserError(
            "the server is on another machine and cannot read new weights from this one's memory",
            where=server.url,
            fix="set rollout.weights_folder to a folder that both machines see under the same path",
        )
    return SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())


def publish(named_tensors: Iterable[tuple[str, Tensor]], place: Path, load: Callable[[Path], None]) -> None:
    """Let a server load weights: written to files, which are deleted once it has them.

    Every process calls it and reads the tensors, which may be collected from all of them; the first writes and asks the server.

    Args:
        place: where the folder of the files is made.
        load: asks the server to load that folder's weights, and comes back when it has.
    Raises:
        UserError: on all processes, what `load` raises.
    """
    dist.barrier()  # nobody's answers are drawn with the old weights any more
    if not dist.is_main():
        for _ in named_tensors:
            pass
        dist.together(lambda: None)
        return
    folder = Path(tempfile.mkdtemp(prefix="verl-weights-", dir=place))
    try:
        folder.chmod(0o755)  # the server may be another user's
        for number, shard in enumerate(_shards(named_tensors)):
            save_file(shard, folder / f"model-{number:05}.safetensors")
        dist.together(lambda: load(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _shards(named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Copies in host memory, a file's worth at a time."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in named_tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()  # tied tensors share memory, which the format does not know
        size += tensor.nbytes
    if shard:
        yield shard


def check_model(path: str, served: Iterable[str], *, start: str, url: str) -> None:
    """Raises UserError unless the server's model is the one that is wanted.

    Args:
        path: the directory or Hub name that is wanted.
        served: names and directories that the server gives its model.
    """
    wanted = {path.rstrip("/"), str(Path(path).expanduser().resolve())}
    found = [name.rstrip("/") for name in served]
    if not wanted & {*found, *(str(Path(name).expanduser().resolve()) for name in found)}:
        raise UserError(
            f"serves {' and '.join(dict.fromkeys(found)) or 'no model'}, wanted {path}",
            where=url,
            fix=f"start it with: {start}; where it knows the same model under another name, add --served-model-name {path}",
        )
