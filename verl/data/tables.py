"""Rows to tables of tokens, in this process or in many, and the errors of rows gathered into one."""

import functools
import itertools
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import pyarrow as pa  # type: ignore[import-untyped]
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from verl.data.cache import table_of
from verl.data.formats import Meter, Row
from verl.data.render import Renderer, or_error
from verl.data.source import Source, read_rows_and_errors, size_bytes
from verl.errors import UserError

ROWS_PER_TABLE = 1024
BYTES_FOR_PROCESSES = 32 * 2**20  # smaller files are done before other processes have started
ERRORS_SHOWN = 10

Chunk = list[Row | UserError]
Done = tuple[pa.RecordBatch, list[UserError]]  # the rows of a chunk that are right, and the errors of the others


@dataclass(frozen=True)
class Columns:
    """Which columns hold what, by the names that the config has for them."""

    prompt_key: str
    response_key: str
    messages_key: str | None
    tools_key: str | None
    text_key: str | None

    def read(self, row: Row) -> str | tuple[object, object]:
        """A plain text, or the messages and tools of a chat. Raises UserError: a column is not right."""
        if row.is_text or self.text_key:
            return row.text(self.text_key or "text", "data.text_key")
        if self.messages_key:
            tools = row.value(self.tools_key, "data.tools_key", may_be_null=True) if self.tools_key else None
            return row.value(self.messages_key, "data.messages_key"), tools
        question, answer = row.text(self.prompt_key, "data.prompt_key"), row.text(self.response_key, "data.response_key")
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], None


def tokenized(
    sources: list[Source],
    tokenizer: PreTrainedTokenizerBase,
    columns: Columns,
    *,
    limit: int | None,
    workers: int | None,
    console: Console | None,
    key: str,
) -> Iterator[pa.RecordBatch]:
    """Tables of ROWS_PER_TABLE rows, the last one of fewer, in the order of the rows.

    Args:
        limit: use only the first rows; None: all.
        workers: processes for large files; None: one per CPU core. Small files are done in this process.
        console: shows a progress bar if it is a terminal; None: standard error.
        key: the config key that names the sources, for errors.
    Raises:
        UserError: a file or rows of it are not right.
    """
    meter = Meter()
    chunks = _chunks(itertools.islice(read_rows_and_errors(sources, meter), limit))
    processes = 1 if size_bytes(sources) < BYTES_FOR_PROCESSES else workers or _cpu_cores()
    done = _in_this_process(tokenizer, columns, chunks) if processes == 1 else _in_processes(tokenizer, columns, chunks, processes)
    return _right(_with_progress(done, meter, console), key)


def _cpu_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chunks(rows: Iterator[Row | UserError]) -> Iterator[Chunk]:
    while chunk := list(itertools.islice(rows, ROWS_PER_TABLE)):
        yield chunk


def _render(renderer: Renderer, columns: Columns, chunk: Chunk) -> Done:
    inputs = [row if isinstance(row, UserError) else or_error(columns.read, row) for row in chunk]
    chats = iter(renderer.chats([value for value in inputs if isinstance(value, tuple)]))
    texts = iter(renderer.texts([value for value in inputs if isinstance(value, str)]))
    places, documents, errors = [], [], []
    for row, value in zip(chunk, inputs, strict=True):
        result = next(chats) if isinstance(value, tuple) else next(texts) if isinstance(value, str) else value
        if isinstance(row, Row) and not isinstance(result, UserError):
            places.append(row.where)
            documents.append(result)
        elif isinstance(result, UserError):
            errors.append(_located(result, row, columns) if isinstance(row, Row) and isinstance(value, tuple) else result)
    return table_of(places, documents), errors


def _located(error: UserError, row: Row, columns: Columns) -> UserError:
    """The error of a chat with its row's place; the message's place says nothing where a row is one question and its answer."""
    where = f"{row.where}: {error.where}" if error.where and columns.messages_key else row.where
    return UserError(error.what, where=where, fix=error.fix)


def _in_this_process(tokenizer: PreTrainedTokenizerBase, columns: Columns, chunks: Iterator[Chunk]) -> Iterator[Done]:
    return map(functools.partial(_render, Renderer(tokenizer), columns), chunks)


def _in_processes(tokenizer: PreTrainedTokenizerBase, columns: Columns, chunks: Iterator[Chunk], workers: int) -> Iterator[Done]:
    """In order. New interpreters, not forks: this process may hold threads and a GPU."""
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (tokenizer, columns))
    waiting: deque[Future[Done]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_render_in_worker, chunk))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        fix = "name fewer processes, each needs memory of its own"
        raise UserError("a process that tokenizes has died", where="data.num_workers", fix=fix) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker: Callable[[Chunk], Done]


def _start_worker(tokenizer: PreTrainedTokenizerBase, columns: Columns) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = functools.partial(_render, Renderer(tokenizer), columns)


def _render_in_worker(chunk: Chunk) -> Done:
    return _worker(chunk)


def _with_progress(done: Iterator[Done], meter: Meter, console: Console | None) -> Iterator[Done]:
    console = console or Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal or os.environ.get("RANK", "0") != "0") as progress:
        task = progress.add_task("tokenizing", total=1.0)
        for item in done:
            progress.update(task, completed=meter.share)
            yield item


def _right(done: Iterator[Done], key: str) -> Iterator[pa.RecordBatch]:
    """The tables, as long as every row is right.

    Raises:
        UserError: the errors of rows, after the chunk in which they have become many or at the end.
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
    lines = [f"  {error.where}: {error.what}" for error in errors[:ERRORS_SHOWN]]
    more = [f"  and {len(errors) - ERRORS_SHOWN:,} more"] if len(errors) > ERRORS_SHOWN else []
    fixes = list(dict.fromkeys(error.fix for error in errors if error.fix))[:3]
    what = "\n".join([f"{len(errors):,} of the first {rows:,} rows are not right:", *lines, *more])
    return UserError(what, where=key, fix="\n       ".join(fixes) or None)
