"""Search over documents of one's own: the model asks for words, reads the parts that fit best, and answers when it is ready.

It calls the tool `search`. If its chat template has no tools (`environment.tool_calls=false`), it ends its turn with the line
`search what it looks for`. The documents are rows of `environment.documents`, in any format that training data may have; of a plain text
file, each paragraph is one. They are ranked by BM25 (pip install "verl[search]"): words that are rare in the documents count most. The
index is made once, and kept in the folder of caches.

It gives no rewards of its own: `reward.name` grades the answer. The metrics `episode/searches` and `episode/searches_without_hit`
count searches of an episode.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from verl.data.source import resolve_files
from verl.environments import Message, Start, Step, _index
from verl.environments._calls import calls_in, schema
from verl.errors import UserError, at_least

LINE = re.compile(r"^search\b[: \t]*(.+)\Z", re.MULTILINE)
TOOL = schema("search", "Search the documents.", "query", "words to look for")
NOTHING = "no document has any of these words"

check_installed = _index.check_installed


@dataclass
class Settings:
    # python, search: whether the model calls a tool in the format of its chat template; false: it writes the code or the search as text.
    tool_calls: bool = True
    # search: files of the documents that are searched: a path, a glob or a list of these, as in data.train_files.
    documents: Any = field(default_factory=list)
    # search: column with the text of a document.
    text_key: str = "text"
    # search: column with its title, which is searched and shown too; null: the file and line of the row.
    title_key: str | None = None
    # search: how many documents a search shows.
    hits: int = 3
    # search: how many characters of each document it shows, where most of the words stand.
    hit_characters: int = 500

    def check(self) -> None:
        """Raises UserError naming the key."""
        at_least("hits", self.hits, 1)
        at_least("hit_characters", self.hit_characters, 20)
        if not self.documents:
            raise UserError("names no file", where="documents", fix="give the files to search: environment.documents=wiki.jsonl")
        resolve_files(self.documents, _index.WHERE)


def prepare(settings: Settings) -> None:
    """Make the index, or open it."""
    _open(settings)


class Environment:
    """See `verl.environments`."""

    def __init__(self, settings: Settings):
        self._settings, self._index = settings, _open(settings)
        self._searches = {"searches": 0.0, "searches_without_hit": 0.0}

    def reset(self, row: dict[str, Any], seed: int) -> Start:
        """Begin with the question of the row."""
        return Start(tools=[TOOL] if self._settings.tool_calls else [])

    def step(self, message: Message) -> Step:
        """Answer each search; the turn without one is the last."""
        calls = calls_in(message, "search", "query", _line)
        replies = [call.reply(call.error if call.text is None else self._search(call.text)) for call in calls]
        return Step(replies, done=not calls, metrics=self._searches)

    def close(self) -> None:
        """Do nothing: all episodes share the index."""

    def _search(self, query: str) -> str:
        found = self._index.search(query, self._settings.hits)
        self._searches = {
            "searches": self._searches["searches"] + 1,
            "searches_without_hit": self._searches["searches_without_hit"] + (not found),
        }
        shown = [
            f"[{number}] {one.title}\n{_index.snippet(one.text, query, self._settings.hit_characters)}"
            for number, one in enumerate(found, 1)
        ]
        return "\n\n".join(shown) or NOTHING


def _open(settings: Settings) -> _index.Index:
    given = settings.documents
    return _index.open_index(tuple(given) if isinstance(given, list | tuple) else (given,), settings.text_key, settings.title_key)


def _line(text: str) -> str | None:
    found = LINE.search(text.rstrip())
    return found[1] if found else None
