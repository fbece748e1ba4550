"""Replies of services, each asked for once: in memory, and on disk by what was asked.

A file has the reply to one request, and its name is a hash of the request: address, model, settings and prompt. The prompt itself is not
kept. Only the owner can read the files.
"""

import hashlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

from verl.durable import replace_text

REMEMBERED = 50_000  # replies in memory
LARGEST = 2**22  # bytes of a file that is read

logger = logging.getLogger(__name__)


class Replies:
    """Replies by what was asked. It may be used in several threads, and several processes may share the files."""

    def __init__(self) -> None:
        self._known = OrderedDict[str, str]()
        self._lock = Lock()
        self._unwritable: set[Path] = set()

    def get(self, what: dict[str, Any], ask: Callable[[], str], *, folder: str | None) -> str:
        """Return the reply to a request, from memory, from the disk, or by asking for it.

        Args:
            what: all that the reply depends on.
            ask: sends the request.
            folder: "auto" for the usual place, or a folder; None: nothing is kept on disk.
        """
        key = hashlib.sha256(json.dumps(what, sort_keys=True, ensure_ascii=False).encode(errors="surrogatepass")).hexdigest()
        with self._lock:
            if key in self._known:
                return self._known[key]
        path = None if folder is None else _folder(folder) / key[:2] / f"{key[2:]}.json"
        reply = None if path is None else _read(path)
        if reply is None:
            reply = ask()
            if path is not None:
                self._write(path, reply, str(what.get("model")))
        with self._lock:
            self._known[key] = reply
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return reply

    def _write(self, path: Path, reply: str, model: str) -> None:
        """Keep a reply on disk; if that fails, say so once and go on."""
        root = path.parent.parent
        if root in self._unwritable:
            return
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.parent.mkdir(exist_ok=True, mode=0o700)
            replace_text(path, json.dumps({"model": model, "reply": reply}, ensure_ascii=True), private=True)
        except OSError as error:
            self._unwritable.add(root)
            logger.warning("replies of the judge are not kept on disk: %s: %s (reward.judge_cache)", root, error.strerror or error)


def _folder(name: str) -> Path:
    if name != "auto":
        return Path(name).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "verl" / "judge"


def _read(path: Path) -> str | None:
    """Return the reply in a file; None if there is none, or it is damaged, or another user could have written it."""
    try:
        found = path.stat()
        if found.st_uid != os.geteuid() or found.st_mode & 0o022 or found.st_size > LARGEST:
            return None
        reply = json.loads(path.read_text(encoding="utf-8"))["reply"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return reply if isinstance(reply, str) else None
