"""Tokenized rows on disk: a memory-mapped Arrow file, followed by its SHA-256 checksum. The metadata of each table is kept with it."""

import hashlib
import itertools
import os
import stat
import tempfile
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from verl.data.fingerprint import digest
from verl.data.render import Rendered
from verl.errors import DiskError, UserError

SCHEMA = pa.schema(
    [
        ("where", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.uint8())),
        ("has_control_text", pa.bool_()),
        ("ids_digest", pa.uint64()),
        ("mask_digest", pa.uint64()),
    ]
)
CHECKSUM_BYTES = 32


def table_of(places: Sequence[str], rows: Sequence[Rendered]) -> pa.RecordBatch:
    """Convert rendered rows to a record batch.

    Args:
        places: location of each row in the data, such as `train.jsonl:17`.
    """
    where = [place.encode() for place in places]
    ids = np.concatenate([np.array(row.input_ids, dtype=np.int32) for row in rows]) if rows else np.empty(0, np.int32)
    mask = np.concatenate([np.array(row.loss_mask, dtype=np.uint8) for row in rows]) if rows else np.empty(0, np.uint8)
    has_control_text = np.packbits(np.array([row.has_control_text for row in rows], dtype=bool), bitorder="little")
    ends = _ends(row.input_ids for row in rows)
    offsets = _column(pa.int32(), len(rows) + 1, ends)
    columns = [
        _column(pa.string(), len(rows), _ends(where), b"".join(where)),
        pa.ListArray.from_arrays(offsets, _column(pa.int32(), len(ids), ids)),
        pa.ListArray.from_arrays(offsets, _column(pa.uint8(), len(mask), mask)),
        _column(pa.bool_(), len(rows), has_control_text),
        _column(pa.uint64(), len(rows), digests(ids, ends)),
        _column(pa.uint64(), len(rows), digests(mask, ends)),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def digests(values_B: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return a hash of each row's values, uint64; rows are consecutive in B, and `ends` begins with 0."""
    data, size, bounds = values_B.tobytes(), values_B.itemsize, ends.tolist()
    return np.array([digest(data[size * start : size * end]) for start, end in itertools.pairwise(bounds)], dtype=np.uint64)


def _ends(parts: Iterable[Sized]) -> np.ndarray:
    """Cumulative lengths of the parts, beginning with 0."""
    return np.cumsum([0, *map(len, parts)], dtype=np.int32)


def _column(kind: pa.DataType, length: int, *buffers: np.ndarray | bytes) -> pa.Array:
    """Build a column without nulls from raw buffers: `pa.array` would first import pandas, which takes half a second."""
    return pa.Array.from_buffers(kind, length, [None, *map(pa.py_buffer, buffers)])


def written(path: Path, tables: Iterable[pa.RecordBatch]) -> list[pa.RecordBatch]:
    """Write tables to a temporary file, rename it once it is complete, and return them as `read` does.

    Raises:
        DiskError: the folder cannot be written, or what was written cannot be read back.
        UserError: the folder's name is that of a file; or an error of the tables.
    """
    from verl.disk import disk_errors_named  # only for new rows
    from verl.lock import mark_in_use, remove_abandoned

    fix = "make room, or set data.cache_dir to another folder"
    with disk_errors_named(path.parent, fix=fix):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"cannot write {path.parent}: {error.strerror}", where="data.cache_dir", fix="choose another folder") from error
        remove_abandoned(path.parent.glob("*.tmp"))
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, suffix=".tmp", delete=False) as file:
            mark_in_use(file.fileno())
            temporary = Path(file.name)
            try:
                _write(temporary, tables)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
    back = read(path)
    if back is None:
        raise DiskError("was written, but cannot be read back", where=str(path), fix=fix)
    return back


def _write(path: Path, tables: Iterable[pa.RecordBatch]) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for table in tables:
            writer.write_batch(table, custom_metadata=table.schema.metadata)
    with pa.memory_map(str(path)) as mapped, path.open("ab") as file:
        file.write(_checksum(mapped.read_buffer()))
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[pa.RecordBatch] | None:
    """Map a file into memory and return its tables; None if the file is missing, damaged, or another user's."""
    try:
        if not is_own(path):
            return None
        content = pa.memory_map(str(path)).read_buffer()
    except OSError:
        return None
    body, checksum = content.slice(0, max(0, content.size - CHECKSUM_BYTES)), content.slice(max(0, content.size - CHECKSUM_BYTES))
    if _checksum(body) != checksum.to_pybytes():
        return None
    reader = pa.ipc.open_file(pa.BufferReader(body))
    read_back = (reader.get_batch_with_custom_metadata(number) for number in range(reader.num_record_batches))
    return [table.replace_schema_metadata(dict(metadata or {})) for table, metadata in read_back]


def is_own(path: Path) -> bool:
    """Return whether only this user can have written a file. Its checksum has no key, so anybody could write another one.

    Raises:
        OSError: there is no such file.
    """
    found = path.lstat()
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def is_of_another(path: Path) -> bool:
    """Return whether there is a file that `read` leaves aside because another user may have written it."""
    return path.is_symlink() or (path.exists() and not is_own(path))


def _checksum(content: pa.Buffer) -> bytes:
    return hashlib.sha256(memoryview(content)).digest()
