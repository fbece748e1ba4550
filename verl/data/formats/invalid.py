"""Columns whose offsets, sizes or indices cannot be right. Reading their values would read memory that is not the column's."""

import pyarrow as pa  # type: ignore[import-untyped]

from verl.data.row import Fault, first_line

# Types in which single values may be invalid, and types of the same layout in which each value is valid.
PLAIN = (
    (pa.types.is_string, pa.binary()),
    (pa.types.is_large_string, pa.large_binary()),
    (pa.types.is_string_view, pa.binary_view()),
    (pa.types.is_time32, pa.int32()),
    (pa.types.is_time64, pa.int64()),
    (pa.types.is_date64, pa.int64()),
    (pa.types.is_decimal128, pa.binary(16)),
    (pa.types.is_decimal256, pa.binary(32)),
)


def damage(column: pa.Array) -> Fault | None:
    """Return why no value of an invalid column may be read; None if only single values are invalid, such as text that is not UTF-8."""
    try:
        column.validate()
        column.view(_plain(column.type)).validate(full=True)
    except (pa.ArrowException, OverflowError, IndexError) as error:
        return Fault(f"cannot be read: {first_line(error)}", "write the file again, or copy it again")
    return None


def _plain(kind: pa.DataType) -> pa.DataType:
    """Return the type of the same layout in which each value is valid."""
    for is_kind, plain in PLAIN:
        if is_kind(kind):
            return plain
    if pa.types.is_struct(kind):
        return pa.struct([kind.field(index).with_type(_plain(kind.field(index).type)) for index in range(kind.num_fields)])
    if pa.types.is_map(kind):
        return pa.map_(kind.key_field.with_type(_plain(kind.key_type)), kind.item_field.with_type(_plain(kind.item_type)))
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_plain(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_plain(kind.value_type)))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(_plain(kind.value_type)), kind.list_size)
    if pa.types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, _plain(kind.value_type), kind.ordered)
    return kind
