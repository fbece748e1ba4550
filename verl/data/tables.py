"""Tokenize rows into tables, in this process or in several, and report all invalid rows in one error."""

import functools
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import pyarrow as pa  # type: ignore[import-untyped]
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from verl.config.sft import DataConfig
from verl.data.cache import table_of
from verl.data.chat import BESIDES, ChatInput, RenderedText
from verl.data.render import Rendered, Renderer, or_error
from verl.data.row import UNREAD, Notes, ReadProgress, Row
from verl.data.source import LARGE_BYTES, Source, read_rows_and_errors, size_bytes
from verl.errors import UserError

ROWS_PER_TABLE = 1024
BYTES_FOR_PROCESSES = LARGE_BYTES  # smaller files are finished before other processes have started
ERRORS_SHOWN = 10

Chunk = list[Row | UserError]
Done = tuple[pa.RecordBatch, list[UserError]]  # the valid rows of a chunk, and the errors of the others


class RowReader(Protocol):
    """The mapping from a row's columns to its documents. It is a dataclass, because its fields are part of the cache's name."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def documents_per_row(self) -> int: ...

    def columns_read(self, names: Collection[str]) -> Collection[str]:
        """Return names and paths of the columns that `read` uses of a table with these columns."""
        ...

    def read(self, row: Row) -> "Sequence[str | ChatInput]":
        """Return the row's documents, plain texts or chats. Raises UserError if a column is invalid."""
        ...


@dataclass(frozen=True)
class Columns:
    """The columns of fine-tuning data; the fields have the names of the config keys."""

    prompt_key: str
    response_key: str
    messages_key: str | None
    tools_key: str | None
    text_key: str | None
    chat_template_kwargs_key: str | None = None
    text_is_rendered: bool = False
    train_turns: str = "all"
    documents_per_row: int = 1

    @staticmethod
    def of(data: DataConfig) -> "Columns":
        return Columns(**{field.name: getattr(data, field.name) for field in fields(Columns) if field.name != "documents_per_row"})

    def columns_read(self, names: Collection[str]) -> Collection[str]:
        """Return the columns that the config names; if these are the default ones and missing, those of the shapes that are recognised."""
        if self.text_key:
            return (self.text_key, *UNREAD.intersection(names))
        from verl.data.shapes import columns_of_shapes  # whoever has the rows in the cache reads none

        return columns_of_shapes(self, names)

    def read(self, row: Row) -> "list[str | ChatInput]":
        """Return a plain text or a chat. Raises UserError if a column is invalid."""
        if not UNREAD.isdisjoint(row.values):
            from verl.data.beside import check_beside  # most data has no such columns

            check_beside(row, (self.prompt_key, self.response_key, self.messages_key, self.text_key, self.chat_template_kwargs_key))
        if row.is_text or self.text_key:
            text = row.text(self.text_key or "text", "data.text_key")
            if row.is_text:
                row.note("read as plain text, every token is trained")
            return [RenderedText(text) if self.text_is_rendered else text]
        question, answer = row.values.get(self.prompt_key), row.values.get(self.response_key)
        is_plain = isinstance(question, str) and isinstance(answer, str) and question[:1] != "[" and answer[:1] != "["
        is_plain = is_plain and BESIDES.isdisjoint(row.values)
        if is_plain and not (self.messages_key or self.tools_key or self.chat_template_kwargs_key or self.text_is_rendered):
            question, answer = row.text(self.prompt_key, "data.prompt_key"), row.text(self.response_key, "data.response_key")
            return [ChatInput([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])]
        from verl.data.shapes import read_example  # chats, and columns that the user did not name

        return [read_example(row, self)]


def tokenized(
    sources: list[Source],
    tokenizer: PreTrainedTokenizerBase,
    columns: RowReader,
    *,
    limit: int | None,
    workers: int | None,
    console: Console | None,
    key: str,
) -> Iterator[pa.RecordBatch]:
    """Yield tables of ROWS_PER_TABLE documents, in the order of the rows; the last table may have fewer.

    The metadata of a table's schema has its rows' notes, and the number of rows read so far from each source: in the last table, of all.

    Args:
        limit: number of rows to use, from the start; None uses all.
        workers: processes for large files; None starts one per CPU core. Small files are tokenized in this process.
        console: console of the progress bar, which is drawn only in a terminal; None uses standard error.
        key: config key that names the sources, for errors.
    Raises:
        UserError: a file or a row is invalid.
    """
    progress = ReadProgress()
    rows = ROWS_PER_TABLE // columns.documents_per_row
    chunks = _chunks(itertools.islice(read_rows_and_errors(sources, progress, columns.columns_read), limit), rows)
    processes = 1 if size_bytes(sources, columns.columns_read) < BYTES_FOR_PROCESSES else workers or cpu_cores()
    done = _in_this_process(tokenizer, columns, chunks) if processes == 1 else _in_processes(tokenizer, columns, chunks, processes)
    for table in _valid(_with_progress(done, progress, console), key):
        yield table.replace_schema_metadata({**table.schema.metadata, "rows_by_source": json.dumps(progress.rows_by_source)})


def cpu_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chunks(rows: Iterator[Row | UserError], size: int) -> Iterator[Chunk]:
    while chunk := list(itertools.islice(rows, size)):
        yield chunk


def render_rows(renderer: Renderer, columns: RowReader, chunk: Chunk) -> Done:
    inputs = [row if isinstance(row, UserError) else or_error(columns.read, row) for row in chunk]
    values = [value for of_row in inputs if not isinstance(of_row, UserError) for value in of_row]
    chats = iter(renderer.chats([value for value in values if isinstance(value, ChatInput)]))
    texts = iter(renderer.texts([value for value in values if isinstance(value, str)]))
    places, documents, errors, notes = [], [], [], Notes()
    for row, of_row in zip(chunk, inputs, strict=True):
        if isinstance(row, UserError) or isinstance(of_row, UserError):
            errors += [error for error in (row, of_row) if isinstance(error, UserError)][:1]
            continue
        results = [_located(next(chats if isinstance(value, ChatInput) else texts), row, value) for value in of_row]
        if columns.documents_per_row > 1 and all(isinstance(value, str) for value in of_row):
            results = _without_common_prefix(results, row)
        wrong = [result for result in results if isinstance(result, UserError)]
        errors += wrong[:1]
        if not wrong:
            _note(notes, row, results)
            places += [row.where] * len(results)
            documents += [result for result in results if not isinstance(result, UserError)]
    return table_of(places, documents).replace_schema_metadata({"notes": json.dumps(notes.found)}), errors


def _note(notes: Notes, row: Row, results: Sequence[Rendered | UserError]) -> None:
    """Count what the readers of the row and the renderer noticed, once for each row."""
    for result in results:
        for what in result.notes if isinstance(result, Rendered) else ():
            row.note(what)
    notes.add_row(row)


def _located(result: Rendered | UserError, row: Row, value: str | ChatInput) -> Rendered | UserError:
    """Return a rendered document, or its error with the row's location."""
    if isinstance(result, Rendered):
        return result
    place = value.place if isinstance(value, ChatInput) else ""
    where = f"{row.where}: {place}{result.where}" if result.where and place is not None else row.where
    return UserError(result.what, where=where, fix=result.fix)


def _without_common_prefix(texts: Sequence[Rendered | UserError], row: Row) -> list[Rendered | UserError]:
    """Return the plain texts of one row with their common first tokens untrained, or an error if they have none."""
    ids = [text.input_ids for text in texts if isinstance(text, Rendered)]
    shared = sum(1 for _ in itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*ids, strict=False)))
    if shared == 0:
        return [UserError("the texts have no common beginning", where=row.where, fix="pair two answers to the same question")]
    context = min(shared, min(map(len, ids)) - 1)  # equal texts keep one trained token
    return [text.without_first(context) if isinstance(text, Rendered) else text for text in texts]


def _in_this_process(tokenizer: PreTrainedTokenizerBase, columns: RowReader, chunks: Iterator[Chunk]) -> Iterator[Done]:
    return map(functools.partial(render_rows, Renderer(tokenizer), columns), chunks)


def _in_processes(tokenizer: PreTrainedTokenizerBase, columns: RowReader, chunks: Iterator[Chunk], workers: int) -> Iterator[Done]:
    from verl.data.tokenizing import in_processes  # small files need no processes

    return in_processes(functools.partial(_prepared, tokenizer, columns), chunks, workers)


def _prepared(tokenizer: PreTrainedTokenizerBase, columns: RowReader) -> Callable[[Chunk], Done]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return functools.partial(render_rows, Renderer(tokenizer), columns)


def _with_progress(done: Iterator[Done], progress: ReadProgress, console: Console | None) -> Iterator[Done]:
    from rich.progress import Progress

    from verl.bar import Bar  # where all rows are tokenized already, nothing is drawn
    from verl.progress import open_console

    hidden = os.environ.get("RANK", "0") != "0"
    bar = Bar(*Progress.get_default_columns(), console=console or open_console(stderr=True), transient=True, hidden=hidden)
    bar.start(1.0, description="tokenizing")
    try:
        for item in done:
            bar.update(progress.share)
            yield item
    finally:
        bar.stop()


def _valid(done: Iterator[Done], key: str) -> Iterator[pa.RecordBatch]:
    """Yield the tables as long as every row is valid.

    Raises:
        UserError: the errors of invalid rows, raised once there are ERRORS_SHOWN of them, or at the end.
    """
    errors: list[UserError] = []
    rows = 0
    for table, found in done:
        rows += len(table) + len(found)
        errors += found
        if not errors:
            yield table
        if len(errors) >= ERRORS_SHOWN:
            break
    if errors:
        raise errors[0] if len(errors) == 1 else _together(errors, rows, key)


def _together(errors: list[UserError], rows: int, key: str) -> UserError:
    fixes = list(dict.fromkeys(error.fix for error in errors if error.fix))[:3]
    if len(errors) > 3 and len({error.what for error in errors}) == 1:  # told once
        what = f"{errors[0].what}, as in {len(errors) - 1:,} more of the first {rows:,} rows"
        return UserError(what, where=errors[0].where, fix=fixes[0] if fixes else None)
    lines = [f"  {error.where}: {error.what}" for error in errors[:ERRORS_SHOWN]]
    more = [f"  and {len(errors) - ERRORS_SHOWN:,} more"] if len(errors) > ERRORS_SHOWN else []
    what = "\n".join([f"{len(errors):,} of the first {rows:,} rows are invalid:", *lines, *more])
    return UserError(what, where=key, fix="\n       ".join(fixes) or None)
