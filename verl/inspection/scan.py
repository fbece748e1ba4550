"""Reads all rows of a list of files once, in chunks that other processes examine, and adds up what they found.

Memory grows by 20 bytes a row, for the hashes that find copies; of texts, only the rows to show are kept.

Dimensions: R rows, N documents of the tokenized rows, C rows that were compared, P permutations of a sketch.
"""

import functools
import heapq
import itertools
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from verl.bar import Bar
from verl.data.encode import strings
from verl.data.row import Notes, ReadProgress, Row
from verl.data.source import Entry, read_rows_and_errors, sources_of
from verl.data.tables import ROWS_PER_TABLE, cpu_cores
from verl.data.tokenizing import in_processes
from verl.errors import UserError
from verl.inspection.examine import GREP_KEPT, LONGEST_KEPT, Chunk, Examiner, Findings, Seen, prepared
from verl.inspection.picks import Picks
from verl.inspection.reading import Reading
from verl.inspection.result import Finding
from verl.progress import open_console

CHARACTERS_PER_CHUNK = 8_000_000
CHARACTERS_FOR_PROCESSES = 8_000_000  # fewer are finished before other processes have started
CHARACTERS_TOKENIZED = 20_000_000  # of more, a sample is tokenized
ROWS_COMPARED = 20_000  # of more, a sample is compared for near copies

NOTHING = Seen(0, [], np.zeros(0, np.uint64), np.zeros(0, np.uint64))


@dataclass
class Scan:
    """What was found in a list of files. The fields of `Seen` are added up over its chunks."""

    rows: int = 0
    rows_by_source: list[int] = field(default_factory=list)
    one_in: int = 1
    compare_one_in: int = 1
    invalid: Findings = field(default_factory=Findings)
    dropped: Findings = field(default_factory=Findings)
    control: Findings = field(default_factory=Findings)
    characters: Findings = field(default_factory=Findings)
    notes: Notes = field(default_factory=Notes)
    tokenized: int = 0
    used: int = 0
    long: Finding = field(default_factory=lambda: Finding("too long"))
    stop_ids: set[int] = field(default_factory=set)
    matched: int = 0
    missing: set[str] = field(default_factory=set)  # of Picks.rows
    picked: dict[int, tuple[str, Row | UserError]] = field(default_factory=dict)  # why, and the row, by its number
    parts: list[Seen] = field(default_factory=list)
    longest: list[tuple[int, int, Row]] = field(default_factory=list)
    places: "Places" = field(default_factory=lambda: Places())

    def add(self, seen: Seen, picks: Picks) -> None:
        self.rows += seen.rows
        self.places.add(seen.places)
        for name in ("invalid", "dropped", "control", "characters"):
            getattr(self, name).merge(getattr(seen, name))
        self.notes.merge(Notes(seen.notes))
        self.tokenized, self.used, self.matched = self.tokenized + seen.tokenized, self.used + seen.used, self.matched + seen.matched
        self.long.add(seen.long.rows, seen.long.places)
        self.stop_ids |= seen.stop_ids
        if picks.longest:
            self.longest = heapq.nlargest(LONGEST_KEPT, [*self.longest, *seen.longest], key=lambda one: (one[0], -one[1]))
        if picks.text is not None:
            room = GREP_KEPT - sum(why.startswith("has") for why, _ in self.picked.values())
            self.picked |= {number: (f"has {picks.text!r}", row) for number, row in seen.matches[: max(0, room)]}
        seen.places, seen.longest, seen.matches = [], [], []
        self.parts.append(seen)

    def joined(self, name: str) -> np.ndarray:
        """Return an array of all rows, documents or sketches: the concatenation of a field of the chunks."""
        return np.concatenate([np.asarray(getattr(part, name)) for part in (NOTHING, *self.parts)])


class Places:
    """The location of each row. Consecutive lines of a file take a few bytes together."""

    def __init__(self) -> None:
        self._firsts: list[int] = []
        self._parts: list[tuple[str, int, str] | bytes] = []
        self._rows = 0

    def add(self, places: list[str]) -> None:
        self._firsts.append(self._rows)
        self._rows += len(places)
        self._parts.append(_run_of(places) or zlib.compress("\0".join(places).encode(), 1))

    def __getitem__(self, number: int) -> str:
        index = int(np.searchsorted(self._firsts, number, side="right")) - 1
        part, within = self._parts[index], number - self._firsts[index]
        if isinstance(part, bytes):
            return zlib.decompress(part).decode().split("\0")[within]
        return f"{part[0]}{part[1] + within}{part[2]}"


def _run_of(places: list[str]) -> tuple[str, int, str] | None:
    """Return what comes before the first line's number, the number, and what comes after it, if the lines are consecutive."""
    head, colon, digits = places[0].rpartition(":")
    if not digits.isdecimal():
        return None
    first, head = int(digits), head + colon
    is_run = all(place == f"{head}{number}" for number, place in enumerate(places, first))
    return (head, first, "") if is_run else None


def scan(
    entries: list[Entry],
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading,
    picks: Picks,
    *,
    limit: int | None,
    workers: int | None,
    exact: bool,
    console: Console | None = None,
) -> Scan:
    """Read and examine the rows of the files. A file that cannot be read to its end is a finding too.

    Args:
        limit: number of rows to use, from the start; None: all.
        workers: processes for large files; None: one per CPU core.
        exact: whether to tokenize and compare all rows, however many.
    Raises:
        UserError: no row of a file can be read, or a row to show may be in the part of a file that cannot be read.
    """
    progress, found = ReadProgress(), Scan()
    every = read_rows_and_errors(sources_of(entries), progress, reading.columns_read)
    rows = _Rows(itertools.islice(every, limit), progress, found, picks)
    chunks = _chunks(rows, progress, found, exact)
    first = next(chunks, None)
    bar = Bar(*Progress.get_default_columns(), console=console or open_console(stderr=True), transient=True)
    bar.start(1.0, description="inspecting")
    try:
        for seen in _examined([first] if first else [], chunks, tokenizer, reading, picks, workers if rows.is_large(progress) else 1):
            found.add(seen, picks)
            bar.update(progress.share)
    finally:
        bar.stop()
    found.rows_by_source = progress.rows_by_source
    rows.finish()
    return found


def _examined(
    first: list[Chunk], chunks: Iterator[Chunk], tokenizer: PreTrainedTokenizerBase, reading: Reading, picks: Picks, workers: int | None
) -> Iterator[Seen]:
    every = itertools.chain(first, chunks)
    processes = workers or cpu_cores()
    if processes == 1:
        return map(Examiner(tokenizer, reading, picks.text), every)
    return in_processes(functools.partial(prepared, tokenizer, reading, picks.text), every, processes)


class _Rows:
    """The rows of the files, of which it keeps those to show. An error that ends the reading is the last row."""

    def __init__(self, rows: Iterator[Row | UserError], progress: ReadProgress, found: Scan, picks: Picks):
        self._rows, self._progress, self._found, self._picks = rows, progress, found, picks
        self._wanted = set(picks.rows)
        found.missing = set(picks.rows)
        self._drawn: list[tuple[int, Row | UserError]] = []
        self._random = random.Random(0)
        self.characters = 0
        self.number = 0

    def __iter__(self) -> Iterator[tuple[Row | UserError, int]]:
        """Yield each row, and about how many characters it has."""
        try:
            for row in self._rows:
                self._keep(row)
                self.number += 1
                size = 0 if isinstance(row, UserError) else sum(map(len, strings(row.values)))
                self.characters += size
                yield row, size
        except UserError as error:
            # Of a file that begins, what is in it is shown; a file of which nothing can be read is the trainer's error. So is one whose
            # rest may have a row that was asked for.
            if not self._progress.rows_by_source[self._progress.source] or self._found.missing:
                raise
            self._found.invalid.note_error(error, "")

    def _keep(self, row: Row | UserError) -> None:
        if self._wanted and not self._wanted.isdisjoint(_names(self.number, row)):
            self._found.picked[self.number] = ("asked for", row)
            self._found.missing -= set(_names(self.number, row))
        if self.number == 0 and self._picks.is_empty:
            self._found.picked[0] = ("first", row)
        if len(self._drawn) < self._picks.random:
            self._drawn.append((self.number, row))
        elif self._picks.random and (place := self._random.randint(0, self.number)) < self._picks.random:
            self._drawn[place] = (self.number, row)

    def is_large(self, progress: ReadProgress) -> bool:
        """Return whether there is work for several processes, as far as the first chunk tells."""
        return self.characters / max(progress.share, 1e-9) > CHARACTERS_FOR_PROCESSES

    def finish(self) -> None:
        found = self._found
        for number, row in sorted(self._drawn, key=lambda one: one[0]):
            found.picked.setdefault(number, ("random", row))
        for _, number, row in found.longest:
            found.picked.setdefault(number, ("longest", row))


def _names(number: int, row: Row | UserError) -> tuple[str, ...]:
    """Return what a row may be called: its number from 1, and its location, with or without the folder."""
    place = row.where or ""
    return (str(number + 1), place, place.rpartition("/")[2])


def _chunks(rows: _Rows, progress: ReadProgress, found: Scan, exact: bool) -> Iterator[Chunk]:
    """Yield chunks of at most ROWS_PER_TABLE rows. After the first one, it decides which rows are tokenized and compared."""
    first, size, several = 0, 0, []
    every = iter(rows)
    while True:
        item = next(every, None)
        if item is not None:
            several.append(item[0])
            size += item[1]
        if several and (item is None or len(several) == ROWS_PER_TABLE or size > CHARACTERS_PER_CHUNK):
            if first == 0 and not exact:
                share = max(progress.share, 1e-9)
                found.one_in = max(1, round(rows.characters / share / CHARACTERS_TOKENIZED))
                found.compare_one_in = max(1, round(len(several) / share / ROWS_COMPARED))
            yield Chunk(first, several, found.one_in, found.compare_one_in)
            first, size, several = first + len(several), 0, []
        if item is None:
            return
