"""Parquet and Arrow. A value that cannot be decoded is a fault of its column and row."""

import gzip
import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from pyarrow import parquet

from verl.data.formats.stream import MAX_ROW_BYTES, File, whole
from verl.data.row import Fault, Rows, checked_row, first_line
from verl.errors import UserError

ROWS_PER_BATCH = 256
DENSE, DENSE_BYTES = 100, 2**20  # text is five times smaller in a file than in memory
TWICE = Fault("the column occurs twice", "rename one of them, or remove it")
Damaged = dict[str, Fault]  # columns that cannot be read at all
Batches = Iterator[tuple[pa.RecordBatch, Damaged]]


def parquet_rows(file: File) -> Rows:
    source = io.BytesIO(whole(file)) if isinstance(file.stream.raw, gzip.GzipFile) else file.path
    yield from _rows(file, "Parquet", lambda: _parquet(source, str(file.path)))


def arrow_rows(file: File) -> Rows:
    """Yield the rows of Arrow's file format, or of its stream format, in which `datasets` writes."""
    yield from _rows(file, "Arrow", lambda: _arrow(whole(file)))


def _rows(file: File, kind: str, opened: Callable[[], tuple[int, Batches]]) -> Rows:
    read = 0
    try:
        total, batches = opened()
        for batch, damaged in batches:
            for row in batch_rows(str(file.path), read, batch, damaged):
                read += 1
                file.share = _constant(read / max(1, total))
                yield row
    except (pa.ArrowException, OSError) as error:
        where = f"{file.path} row {read + 1}" if read else str(file.path)
        found = f"incomplete or damaged {kind} file: {first_line(error)}"
        raise UserError(found, where=where, fix="write it again, or copy it again") from error


def _constant(share: float) -> Callable[[], float]:
    return lambda: share


def _parquet(source: io.BytesIO | Path, name: str) -> tuple[int, Batches]:
    table = parquet.ParquetFile(source)
    dense = _dense_chunks(table.metadata)
    if dense:
        from verl.data.formats.dense import refuse_bomb  # few files are packed so densely

        refuse_bomb(dense, name)
        return table.metadata.num_rows, ((batch, {}) for batch in table.iter_batches(batch_size=1))
    return table.metadata.num_rows, _parquet_batches(table)


def _dense_chunks(metadata: parquet.FileMetaData) -> list[parquet.ColumnChunkMetaData]:
    """Return the column chunks that are more than DENSE times as small in the file as in memory, and large there."""
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    chunks = (group.column(number) for group in groups for number in range(group.num_columns))
    return [one for one in chunks if one.total_uncompressed_size > max(DENSE_BYTES, DENSE * one.total_compressed_size)]


def _parquet_batches(table: parquet.ParquetFile) -> Batches:
    """Yield the batches. If some columns cannot be read at all, go on with the others.

    Raises:
        pyarrow.ArrowException, OSError: no column can be read.
    """
    done = 0
    try:
        for batch in table.iter_batches(batch_size=ROWS_PER_BATCH):
            yield batch, {}
            done += len(batch)
    except (pa.ArrowException, OSError) as error:
        damaged = {name: fault for name in table.schema_arrow.names if (fault := _damage(table, name))}
        good = [name for name in table.schema_arrow.names if name not in damaged]
        if not good or not damaged:
            raise error
        for batch in table.iter_batches(batch_size=ROWS_PER_BATCH, columns=good):
            if done <= 0:
                yield batch, damaged
            done -= len(batch)


def _damage(table: parquet.ParquetFile, name: str) -> Fault | None:
    try:
        for _ in table.iter_batches(batch_size=ROWS_PER_BATCH, columns=[name]):
            pass
    except (pa.ArrowException, OSError) as error:
        return Fault(f"cannot be read: {first_line(error)}", "write the file again, or copy it again")
    return None


def _arrow(data: bytes) -> tuple[int, Batches]:
    opened = pa.ipc.open_file(data) if data.startswith(b"ARROW1") else pa.ipc.open_stream(data)
    table = opened.read_all()
    return len(table), ((batch, {}) for batch in table.to_batches(max_chunksize=ROWS_PER_BATCH))


def batch_rows(name: str, before: int, batch: pa.RecordBatch, damaged: Damaged | None = None) -> Rows:
    """Yield the rows of a batch; `before` is the number of rows before it, and `name` that of the file or data set."""
    names = batch.schema.names
    columns = {
        column: [TWICE] * len(batch) if names.count(column) > 1 else bounded(batch.column(index)) for index, column in enumerate(names)
    }
    columns |= {column: [fault] * len(batch) for column, fault in (damaged or {}).items()}
    for index in range(len(batch)):
        values = {column: present(items[index]) for column, items in columns.items()}
        yield checked_row(f"{name} row {before + index + 1}", values)


def bounded(column: pa.Array) -> list[Any]:
    """Return a column as `decoded` does, with a Fault in place of each value that is larger than any row may be."""
    if column.nbytes <= MAX_ROW_BYTES and not pa.types.is_dictionary(column.type):
        return decoded(column)
    from verl.data.formats.dense import one_by_one

    return one_by_one(column, decoded)


def decoded(column: pa.Array) -> list[Any]:
    """Return a column as Python values, with a Fault in place of each that cannot be decoded."""
    try:
        values: list[Any] = column.to_pylist()
    except Exception:  # text that is not UTF-8, a date that Python does not have, an unknown time zone, …
        values = [_value_or_fault(value) for value in column]
    if pa.types.is_float32(column.type) or pa.types.is_float16(column.type):
        # The shortest number that is this float32: 0.1, not 0.10000000149011612.
        values = [value if value is None else float(str(np.float32(value))) for value in values]
    return values


def _value_or_fault(value: pa.Scalar) -> Any:
    """Return a value as Python has it, with a Fault in place of what cannot be decoded: of an object, the single keys."""
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        found = f"not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start:,} of the text"
        fault = Fault(found, "write the file again with text in UTF-8")
    except Exception as error:  # whatever else `decoded` names
        fault = Fault(f"cannot be decoded: {first_line(error)}")
    if not isinstance(value, pa.StructScalar):
        return fault
    names = [value.type.field(index).name for index in range(value.type.num_fields)]
    return {name: TWICE if names.count(name) > 1 else _value_or_fault(value[index]) for index, name in enumerate(names)}


def present(value: Any) -> Any:
    """Remove the nulls inside a value: Arrow fills in null for each key that an object lacks."""
    if isinstance(value, dict):
        return {key: present(item) for key, item in value.items() if item is not None}
    return [present(item) for item in value] if isinstance(value, list) else value


def table_rows(name: str, batches: Iterable[pa.RecordBatch]) -> Rows:
    """Yield the rows of consecutive batches of a data set."""
    before = 0
    for batch in batches:
        yield from batch_rows(name, before, batch)
        before += len(batch)
