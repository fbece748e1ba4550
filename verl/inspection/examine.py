"""Examines a chunk of rows, in this process or another: the texts of all rows, and the tokens of those that are sampled."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from verl.data.chat import ChatInput, RenderedText
from verl.data.encode import strings
from verl.data.fingerprint import digest
from verl.data.render import Renderer
from verl.data.row import Notes, Row
from verl.errors import UserError
from verl.inspection import characters
from verl.inspection.near import PERMUTATIONS, sketch
from verl.inspection.reading import Reading, Tokens
from verl.inspection.result import Finding

GREP_KEPT = 5  # rows with the text that was asked for that are shown
LONGEST_KEPT = 3
KINDS_KEPT = 50  # reasons, names and characters that are told apart; more would be as many as there are rows
OTHERS = "other reasons"
# Names of control tokens of other tokenizers, which somebody's template has left in the text.
FOREIGN = re.compile(
    r"<\|[A-Za-z_0-9]{2,30}\|>|<｜[^<>｜\n]{2,30}｜>|\[/?INST\]|<</?SYS>>|</?(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>|</s>"
)
SPECIFIC = re.compile(r"'[^']{30,}'|0x[0-9a-f]+|(?<![\w-])\d[\d.,]*(?!\w)")


class Findings(dict[str, Finding]):
    """Findings by what was found."""

    def note(self, what: str, place: str, example: str = "", fix: str = "") -> None:
        key = what if what in self or len(self) < KINDS_KEPT else OTHERS
        self.setdefault(key, Finding(what if key != OTHERS else OTHERS, fix=fix)).add(1, [place], example)

    def merge(self, other: "Findings") -> None:
        for key, one in other.items():
            key = key if key in self or len(self) < KINDS_KEPT else OTHERS
            self.setdefault(key, Finding(one.what if key != OTHERS else OTHERS, fix=one.fix)).add(one.rows, one.places, one.example)

    def note_error(self, error: UserError, place: str) -> None:
        """Note an invalid row. Errors that differ in their numbers alone are of one kind."""
        kind = SPECIFIC.sub("…", error.what)
        self.note(kind, error.where or place, "" if kind == error.what else error.what, error.fix or "")

    def sorted(self) -> list[Finding]:
        return sorted(self.values(), key=lambda one: -one.rows)


@dataclass
class Chunk:
    """Consecutive rows.

    Attributes:
        first: number of the first one, from 0.
        one_in: one row in so many is tokenized; `compare_one_in`: is compared for near copies.
    """

    first: int
    rows: list[Row | UserError]
    one_in: int
    compare_one_in: int


@dataclass
class Seen:
    """What was found in a chunk.

    Attributes:
        digests, asked: 64-bit hash of each row's text, and of its question alone; 0: none.
        used: number of used rows, of those that were tokenized; `long`: rows over the limit.
        whole: length of each document, before it is cut.
        lengths, trained: tokens of each used document, and those of them that are trained.
        sketches: of the compared rows, whose numbers are in `compared`.
        longest: the longest rows, as (tokens, number, row); `matches`: rows with the text that was asked for.
    """

    rows: int
    places: list[str]
    digests: np.ndarray
    asked: np.ndarray
    invalid: Findings = field(default_factory=Findings)
    dropped: Findings = field(default_factory=Findings)
    control: Findings = field(default_factory=Findings)
    characters: Findings = field(default_factory=Findings)
    notes: dict[str, tuple[int, str, str]] = field(default_factory=dict)
    tokenized: int = 0
    used: int = 0
    long: Finding = field(default_factory=lambda: Finding("too long"))
    whole: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    lengths: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    trained: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    stop_ids: set[int] = field(default_factory=set)
    compared: list[int] = field(default_factory=list)
    sketches: np.ndarray = field(default_factory=lambda: np.empty((0, PERMUTATIONS), np.uint32))
    longest: list[tuple[int, int, Row]] = field(default_factory=list)
    matches: list[tuple[int, Row]] = field(default_factory=list)
    matched: int = 0


class Examiner:
    """Examines chunks with one tokenizer.

    Args:
        reading: how a trainer reads these rows.
        text: rows that contain it are kept; None: none are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, reading: Reading, text: str | None):
        self._renderer, self._reading, self._text = Renderer(tokenizer), reading, text
        names = sorted(self._renderer.encoder.control, key=len, reverse=True)
        self._names = re.compile("|".join([*map(re.escape, names), FOREIGN.pattern]))
        self._own = frozenset(names)
        self._first = tuple({name[0] for name in names} | {"<", "["})

    def __call__(self, chunk: Chunk) -> Seen:
        rows = chunk.rows
        places = [row.where or "" if isinstance(row, UserError) else row.where for row in rows]
        seen = Seen(len(rows), places, np.zeros(len(rows), np.uint64), np.zeros(len(rows), np.uint64))
        notes, sampled, sketches = Notes(), [], []
        for index, row in enumerate(rows):
            number = chunk.first + index
            if isinstance(row, UserError):
                seen.invalid.note_error(row, places[index])
                continue
            try:
                values = self._reading.read(row)
            except UserError as error:
                seen.invalid.note_error(error, row.where)
                continue
            texts = [text for value in values for text in texts_of(value)]
            self._examine(seen, chunk.first, index, row, values, texts)
            if is_drawn(number, chunk.compare_one_in):
                seen.compared.append(number)
                sketches.append(sketch("\n".join(texts)))
            if is_drawn(number, chunk.one_in):
                sampled.append((number, row))
            else:
                notes.add_row(row)
        self._tokenize(seen, sampled, notes)
        seen.notes, seen.sketches = notes.found, np.array(sketches, dtype=np.uint32).reshape(-1, PERMUTATIONS)
        return seen

    def _examine(self, seen: Seen, first: int, index: int, row: Row, values: Sequence[object], texts: list[str]) -> None:
        """Examine the texts of a valid row."""
        seen.digests[index] = digest("\0".join(texts).encode())
        seen.asked[index] = digest("\0".join(texts[:-1]).encode()) if len(texts) > 1 and len(self._reading.names) == 1 else 0
        whole = "\n".join(texts)
        for kind, example in characters.odd_characters(whole):
            seen.characters.note(kind, row.where, example, characters.FIXES[kind])
        if any(map(whole.__contains__, self._first)) and not any(isinstance(value, RenderedText) for value in values):
            for name in dict.fromkeys(found[0] for found in self._names.finditer(whole)):
                place = whole.index(name)
                own = "it is encoded as plain text, not as the token" if name in self._own else "not a token of this tokenizer"
                seen.control.note(name, row.where, characters.excerpt(whole, place, place + len(name)), own)
        if self._text is not None and any(self._text in text for text in strings(row.values)):
            seen.matched += 1
            seen.matches += [(first + index, row)][: GREP_KEPT - len(seen.matches)]

    def _tokenize(self, seen: Seen, sampled: list[tuple[int, Row]], notes: Notes) -> None:
        found: Tokens = self._reading.tokens(self._renderer, [row for _, row in sampled])
        seen.tokenized = len(sampled)
        for error in found.errors:
            seen.invalid.note_error(error, "")
        for what, place in found.dropped:
            seen.dropped.note(what, place)
        notes.merge(Notes(found.notes))
        seen.long.add(len(found.long), found.long)
        seen.used, seen.whole, seen.lengths, seen.trained = sum(found.used), found.whole, found.lengths, found.trained
        seen.stop_ids = found.stop_ids
        by_place = {row.where: (number, row) for number, row in sampled}
        per_row = found.whole.reshape(len(found.places), -1).sum(1) if found.places else found.whole
        for place in np.argsort(-per_row, kind="stable")[:LONGEST_KEPT].tolist():
            seen.longest.append((int(per_row[place]), *by_place[found.places[place]]))


def is_drawn(number: int, one_in: int) -> bool:
    """Return whether a row belongs to a sample of one row in `one_in`: always the same ones, without a pattern in their order."""
    return one_in == 1 or (number * 0x9E3779B97F4A7C15 % 2**64 >> 32) % one_in == 0


def texts_of(value: object) -> Iterator[str]:
    """Yield the texts of a document: of a chat, what each message says."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, ChatInput) and isinstance(value.messages, list):
        for message in value.messages:
            content = message.get("content") if isinstance(message, dict) else None
            if isinstance(content, str) and len(message) == 2:
                yield content
            else:
                yield "\n".join(strings(message))
    elif isinstance(value, ChatInput):
        yield str(value.messages)
    else:
        yield from strings(value)


def prepared(tokenizer: PreTrainedTokenizerBase, reading: Reading, text: str | None) -> Examiner:
    """Return the examiner of a process that examines only."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return Examiner(tokenizer, reading, text)
