"""Parquet and Arrow files that are far smaller than what they hold: a decompression bomb, or text that repeats."""

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
from pyarrow import parquet

from verl.data.formats.invalid import damage
from verl.data.formats.stream import MAX_ROW_BYTES
from verl.data.row import Fault
from verl.errors import UserError

BOMB = 1000  # times smaller in the file than in memory
TOO_LARGE = Fault(f"larger than {MAX_ROW_BYTES // 2**20} MiB", "split it into rows, or remove the row")


def refuse_bomb(chunks: Sequence[parquet.ColumnChunkMetaData], where: str) -> None:
    """Raise UserError if a column chunk needs far more memory than its part of the file, and more than any row."""
    for chunk in chunks:
        stored, in_memory = chunk.total_compressed_size, chunk.total_uncompressed_size
        if in_memory > max(MAX_ROW_BYTES, BOMB * stored):
            found = f"column {chunk.path_in_schema!r}: {stored:,} bytes hold {in_memory:,} bytes, as in a decompression bomb"
            raise UserError(found, where=where, fix="remove the file, or write its rows again in smaller row groups")


def one_by_one(column: pa.Array, decoded: Callable[[pa.Array], list[Any]]) -> list[Any]:
    """Return a column as `decoded` does, with a Fault for each value that is too large. A value of a dictionary is decoded once."""
    if not pa.types.is_dictionary(column.type):
        return [_bounded(column.slice(index, 1), decoded) for index in range(len(column))]
    known: dict[int | None, Any] = {None: None}
    numbers = column.indices.to_pylist()
    for number in set(numbers) - {None}:
        known[number] = _of_dictionary(column.dictionary, number, decoded)
    return [known[number] for number in numbers]


def _of_dictionary(dictionary: pa.Array, number: int, decoded: Callable[[pa.Array], list[Any]]) -> Any:
    """Return a value of a dictionary. Only those that are used are checked, because each batch has the whole dictionary."""
    if not 0 <= number < len(dictionary):
        return Fault(f"cannot be read: index {number} of a dictionary of {len(dictionary)}", "write the file again, or copy it again")
    one = dictionary.slice(number, 1)
    return damage(one) or _bounded(one, decoded)


def _bounded(one: pa.Array, decoded: Callable[[pa.Array], list[Any]]) -> Any:
    return decoded(one)[0] if one.nbytes <= MAX_ROW_BYTES else TOO_LARGE
