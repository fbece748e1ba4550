"""Parquet and Arrow. A value that cannot be decoded is a fault of its column and row."""

import gzip
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from pyarrow import parquet

from verl.data.formats.stream import MAX_ROW_BYTES, File, whole
from verl.data.row import Fault, Rows, Wanted, checked_row, first_line
from verl.errors import UserError

ROWS_PER_BATCH = 256
DENSE, DENSE_BYTES = 100, 2**20  # text is five times smaller in a file than in memory
TWICE = Fault("the column occurs twice", "rename one of them, or remove it")
Damaged = dict[str, Fault]  # columns that cannot be read at all
Batches = Iterator[tuple[pa.RecordBatch, Damaged]]
Unread = dict[str, Any]  # as in Row
UNREADABLE = pa.ArrowException, OSError, UnicodeError, LookupError, OverflowError  # what pyarrow raises for damaged files


@dataclass(frozen=True)
class _Opened:
    """An open table: its number of rows, its batches, and the columns that these leave out."""

    rows: int
    batches: Batches
    unread: Unread


def parquet_rows(file: File) -> Rows:
    yield from _rows(file, "Parquet", _parquet)


def arrow_rows(file: File) -> Rows:
    """Yield the rows of Arrow's file format, or of its stream format, in which `datasets` writes."""
    yield from _rows(file, "Arrow", _arrow)


def _rows(file: File, kind: str, opened: Callable[[File], _Opened]) -> Rows:
    read = 0
    try:
        table = opened(file)
        for batch, damaged in table.batches:
            for row in batch_rows(str(file.path), read, batch, damaged, table.unread):
                read += 1
                file.share = _constant(read / max(1, table.rows))
                yield row
    except UNREADABLE as error:
        where = f"{file.path} row {read + 1}" if read else str(file.path)
        found = f"incomplete or damaged {kind} file: {first_line(error)}"
        raise UserError(found, where=where, fix="write it again, or copy it again") from error


def _constant(share: float) -> Callable[[], float]:
    return lambda: share


def used_columns(schema: pa.Schema, wanted: Wanted | None) -> tuple[list[str], Unread]:
    """Return the columns of a table to read, and those that are not read.

    If the table has none of the columns, its first one is read, so that there are rows, whose errors say what is missing.

    Args:
        wanted: as in `verl.data.source.read_rows_and_errors`.
    """
    names = list(dict.fromkeys(schema.names))
    paths = names if wanted is None else wanted(names)
    used = [name for name in names if any(path == name or path.startswith(f"{name}.") for path in paths)] or names[:1]
    return used, {name: _keys(schema.field(schema.names.index(name)).type) for name in names if name not in used}


def _keys(kind: pa.DataType) -> Unread | None:
    """Return the keys of an object, and of objects in it; None for values of another type."""
    if not pa.types.is_struct(kind):
        return None
    return {field.name: _keys(field.type) for field in map(kind.field, range(kind.num_fields))}


def read_bytes(path: Path, wanted: Wanted | None) -> int:
    """Return the size of the columns of a file that are read; of a file of another format, or a damaged one, its whole size."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            head = file.read(4)
        if head == b"PAR1":
            table = parquet.ParquetFile(path)
            used, groups = used_columns(table.schema_arrow, wanted)[0], map(table.metadata.row_group, range(table.num_row_groups))
            columns = (group.column(index) for group in groups for index in range(group.num_columns))
            return sum(column.total_compressed_size for column in columns if column.path_in_schema.split(".")[0] in used)
        if head == b"ARRO" or path.suffix == ".arrow":
            return int(_mapped(pa.memory_map(str(path)).read_buffer(), wanted)[0].get_total_buffer_size())
    except UNREADABLE:
        pass  # whoever reads the file says what is wrong
    return size


def _parquet(file: File) -> _Opened:
    table = parquet.ParquetFile(io.BytesIO(whole(file)) if _is_gzip(file) else file.path)
    used, unread = used_columns(table.schema_arrow, file.wanted)
    if dense := _dense_chunks(table.metadata, used):
        from verl.data.formats.dense import refuse_bomb  # few files are packed so densely

        refuse_bomb(dense, str(file.path))
        batches = ((batch, Damaged()) for batch in table.iter_batches(batch_size=1, columns=used))
        return _Opened(table.metadata.num_rows, batches, unread)
    return _Opened(table.metadata.num_rows, _parquet_batches(table, used), unread)


def _dense_chunks(metadata: parquet.FileMetaData, used: list[str]) -> list[parquet.ColumnChunkMetaData]:
    """Return the used column chunks that are more than DENSE times as small in the file as in memory, and large there."""
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    chunks = (group.column(number) for group in groups for number in range(group.num_columns))
    read = (one for one in chunks if one.path_in_schema.split(".")[0] in used)
    return [one for one in read if one.total_uncompressed_size > max(DENSE_BYTES, DENSE * one.total_compressed_size)]


def _is_gzip(file: File) -> bool:
    return isinstance(file.stream.raw, gzip.GzipFile)


def _parquet_batches(table: parquet.ParquetFile, used: list[str]) -> Batches:
    """Yield the batches of the used columns. If some columns cannot be read at all, go on with the others.

    Raises:
        pyarrow.ArrowException, OSError: no column can be read.
    """
    done = 0
    try:
        for batch in table.iter_batches(batch_size=ROWS_PER_BATCH, columns=used):
            yield batch, {}
            done += len(batch)
    except UNREADABLE as error:
        damaged = {name: fault for name in used if (fault := _damage(table, name))}
        good = [name for name in used if name not in damaged]
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
    except UNREADABLE as error:
        return Fault(f"cannot be read: {first_line(error)}", "write the file again, or copy it again")
    return None


def _arrow(file: File) -> _Opened:
    """Open a table. Its file is mapped into memory, so that columns that are not used stay on the disk."""
    data = pa.py_buffer(whole(file)) if _is_gzip(file) else pa.memory_map(str(file.path)).read_buffer()
    table, unread = _mapped(data, file.wanted)
    return _Opened(len(table), ((batch, {}) for batch in table.to_batches(max_chunksize=ROWS_PER_BATCH)), unread)


def _mapped(data: pa.Buffer, wanted: Wanted | None) -> tuple[pa.Table, Unread]:
    """Return the table in a buffer, without the columns that are not read, and these."""
    opened = pa.ipc.open_file if data[:6].to_pybytes() == b"ARROW1" else pa.ipc.open_stream
    schema = opened(data).schema
    used, unread = used_columns(schema, wanted)
    fields = [index for index, name in enumerate(schema.names) if name in used]
    return opened(data, options=pa.ipc.IpcReadOptions(included_fields=fields)).read_all(), unread


def batch_rows(name: str, before: int, batch: pa.RecordBatch, damaged: Damaged | None = None, unread: Unread | None = None) -> Rows:
    """Yield the rows of a batch; `before` is the number of rows before it, and `name` that of the file or data set."""
    names = batch.schema.names
    columns = {
        column: [TWICE] * len(batch) if names.count(column) > 1 else bounded(batch.column(index)) for index, column in enumerate(names)
    }
    columns |= {column: [fault] * len(batch) for column, fault in (damaged or {}).items()}
    for index in range(len(batch)):
        values = {column: present(items[index]) for column, items in columns.items()}
        yield checked_row(f"{name} row {before + index + 1}", values, unread=unread)


def bounded(column: pa.Array) -> list[Any]:
    """Return a column as `decoded` does, with a Fault in place of each value that is larger than any row may be."""
    is_dictionary = pa.types.is_dictionary(column.type)
    try:
        column.validate(full=not is_dictionary)  # offsets and indices that lead elsewhere would crash the process
    except (pa.ArrowException, IndexError):
        from verl.data.formats.invalid import damage  # files are rarely damaged

        if (fault := damage(column)) is not None:
            return [fault] * len(column)
    if not is_dictionary and column.nbytes <= MAX_ROW_BYTES:
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


def table_rows(name: str, batches: Iterable[pa.RecordBatch], unread: Unread) -> Rows:
    """Yield the rows of consecutive batches of a data set."""
    before = 0
    for batch in batches:
        yield from batch_rows(name, before, batch, unread=unread)
        before += len(batch)
