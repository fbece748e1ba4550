"""An index of the user's documents for BM25, on disk: it is made once, and mapped into memory by all processes that search."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from verl.data.source import content_hash, read_rows, resolve_files
from verl.disk import disk_errors_named
from verl.errors import UserError
from verl.rewards._words import CHARACTER

WORD = re.compile(r"\w+")
FORMAT = 1  # of the index; a new number makes all indexes anew
WHERE = "environment.documents"
MOST_WORDS, MOST_PLACES = 10**5, 200  # of a document that are looked at for the part that is shown


@dataclass(frozen=True)
class Document:
    """A document.

    Attributes:
        title: its title; the place of its row if it has none.
    """

    title: str
    text: str


class Index:
    """Finds documents by words. It may be used by several threads."""

    def __init__(self, folder: Path):
        import bm25s

        self._found = bm25s.BM25.load(folder, mmap=True, load_corpus=True, show_progress=False, verbosity=0)
        self._size: int = self._found.scores["num_docs"]

    def search(self, query: str, most: int) -> list[Document]:
        """Return the documents that fit a query best, the best first, and none without a word of it."""
        words = words_of(query)
        if not words:
            return []
        found, scores = self._found.retrieve([words], k=min(most, self._size), show_progress=False)
        fitting = [one for one, score in zip(found[0], scores[0], strict=True) if score > 0]
        return [Document(one["title"], one["text"]) for one in fitting]


def check_installed() -> None:
    """Raises UserError: bm25s is not installed."""
    if importlib.util.find_spec("bm25s") is None:
        raise UserError("bm25s is not installed", where="environment.name=search", fix='pip install "verl[search]"')


@cache
def open_index(documents: tuple[str, ...], text_key: str, title_key: str | None) -> Index:
    """Return the index of the documents; it is made if it is not on disk yet.

    Args:
        documents: files, as in `verl.data.source.resolve_entries`.
        text_key, title_key: columns of a document.
    Raises:
        UserError: a file or a row is wrong.
        DiskError: the index cannot be written.
    """
    sources = resolve_files(list(documents), WHERE)
    identity = [FORMAT, content_hash(sources), text_key, title_key, _version()]
    folder = _folder() / hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    if not _is_own(folder):
        with disk_errors_named(folder.parent, fix="make room, or set XDG_CACHE_HOME to another folder"):
            _make(folder, _read(documents, text_key, title_key))
    return Index(folder)


def words_of(text: str) -> list[str]:
    """Return the words of a text. In languages that are written without spaces, each character is one."""
    return WORD.findall(CHARACTER.sub(r" \g<0> ", unicodedata.normalize("NFKC", text).lower()))


def snippet(text: str, query: str, longest: int) -> str:
    """Return the part of a text, of at most `longest` characters, that has most of the words of a query; the first of equal ones."""
    if len(text) <= longest:
        return text
    wanted = set(words_of(query))
    found = [(match.start(), wanted & set(words_of(match[0]))) for match in islice(WORD.finditer(text), MOST_WORDS)]
    places = [(place, words) for place, words in found if words]
    starts = [0, *(max(place - longest // 5, 0) for place, _ in places[:MOST_PLACES])]
    within = [set().union(*(words for place, words in places if start <= place < start + longest)) for start in starts]
    start = starts[max(range(len(starts)), key=lambda index: len(within[index]))]
    if start:
        start = text.rfind(" ", start - longest // 5, start) + 1 or start  # at the beginning of a word
    part = text[start : start + longest]
    return f"{'… ' if start else ''}{part.strip()}{' …' if start + longest < len(text) else ''}"


def _read(documents: tuple[str, ...], text_key: str, title_key: str | None) -> list[Document]:
    found = []
    for row in read_rows(list(documents), WHERE):
        title = row.where if title_key is None else row.text(title_key, "environment.title_key")
        found.append(Document(title, row.text("text" if row.is_text else text_key, "environment.text_key")))
    return found


def _make(folder: Path, documents: Sequence[Document]) -> None:
    """Write an index into a folder of its own, and give it its name when it is complete. Another process may have been faster."""
    import bm25s

    folder.parent.mkdir(parents=True, exist_ok=True)
    words = [words_of(f"{one.title}\n{one.text}") for one in documents]
    index = bm25s.BM25()
    index.index(words, show_progress=False)
    unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder.parent))
    try:
        index.save(unfinished, corpus=[{"title": one.title, "text": one.text} for one in documents], show_progress=False)
        unfinished.rename(folder)
    except OSError:
        if not _is_own(folder):
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _is_own(folder: Path) -> bool:
    """Return whether there is an index that only this user can have written."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "verl" / "search"


def _version() -> Any:
    from importlib.metadata import version

    return version("bm25s")
