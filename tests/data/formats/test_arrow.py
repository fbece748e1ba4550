"""Parquet and Arrow: what cannot be decoded is an error of its row, and only where it is read."""

import datetime
import gzip
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pytest
from pyarrow import parquet

from verl.config.sft import DataConfig
from verl.data import source
from verl.data.formats import arrow
from verl.data.pairs import PairColumns
from verl.data.row import Row
from verl.data.source import read_rows
from verl.data.tables import Columns
from verl.errors import UserError


def not_utf8(values: list[bytes]) -> pa.Array:
    ends = [0]
    for value in values:
        ends.append(ends[-1] + len(value))
    offsets = b"".join(end.to_bytes(4, "little") for end in ends)
    return pa.Array.from_buffers(pa.string(), len(values), [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(values))])


BAD: dict[str, pa.Array] = {
    "latin-1": not_utf8([b"good", b"\xc9U"]),
    "latin-1 in objects": pa.StructArray.from_arrays([not_utf8([b"good", b"\xc9U"])], ["text"]),
    "latin-1 in lists": pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), not_utf8([b"good", b"\xc9U"])),
    "a date beyond 9999": pa.array([1, 9_000_000], pa.date32()),
    "an infinite timestamp": pa.array([1, 2**63 - 1], pa.timestamp("us")),
    "a time zone": pa.array([1, 2], pa.timestamp("us", tz="Mars/Olympus")),
    "a field twice": pa.StructArray.from_arrays([pa.array(["a", "b"]), pa.array(["c", "d"])], ["text", "text"]),
}


def rows_of(path: Path, table: pa.Table) -> list[Row]:
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    return list(read_rows(str(path)))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("kind", BAD)
def test_a_value_that_cannot_be_decoded_stops_only_who_reads_it(tmp_path: Path, kind: str, suffix: str) -> None:
    rows = rows_of(tmp_path / f"a{suffix}", pa.table({"question": ["q1", "q2"], "answer": BAD[kind]}))
    assert [row.text("question", "data.prompt_key") for row in rows] == ["q1", "q2"]
    assert "answer" not in rows[1].values or rows[1].values["answer"] == {}
    with pytest.raises(UserError) as caught:
        rows[1].value("answer", "data.response_key")
    assert caught.value.where == f"{tmp_path}/a{suffix} row 2" and "'answer'" in caught.value.what and caught.value.fix


def test_a_fault_inside_an_object_is_charged_to_its_key(tmp_path: Path) -> None:
    parts = {"ground_truth": pa.array(["3", "4"]), "source": BAD["latin-1"], "day": BAD["a date beyond 9999"]}
    objects = pa.StructArray.from_arrays(list(parts.values()), list(parts))
    _, row = rows_of(tmp_path / "a.parquet", pa.table({"reward_model": objects}))
    assert row.text("reward_model.ground_truth", "data.response_key") == "4"
    assert row.values == {"reward_model": {"ground_truth": "4"}}
    with pytest.raises(UserError, match=r"'reward_model\.source': not UTF-8: byte 0xc9"):
        row.text("reward_model.source", "data.response_key")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_column_that_a_join_leaves_twice_is_refused(tmp_path: Path, suffix: str) -> None:
    left, right = pa.table({"question": ["q"], "answer": ["good"]}), pa.table({"question": ["q"], "answer": ["bad"]})
    (row,) = rows_of(tmp_path / f"a{suffix}", left.join(right, keys="question"))
    assert row.values == {"question": "q"}
    with pytest.raises(UserError, match="occurs twice"):
        row.text("answer", "data.response_key")


def damaged(folder: Path) -> Path:
    """A Parquet file whose column `other` cannot be read."""
    path = folder / "a.parquet"
    table = pa.table({"question": [f"q{i}" for i in range(600)], "other": [f"{i}" * 50 for i in range(600)]})
    parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    chunk = parquet.ParquetFile(path).metadata.row_group(0).column(1)
    data = bytearray(path.read_bytes())
    start = chunk.data_page_offset + 40
    data[start : start + 200] = b"\xff" * 200
    path.write_bytes(data)
    return path


def test_a_column_that_cannot_be_read_at_all_stops_only_who_reads_it(tmp_path: Path) -> None:
    rows = list(read_rows(str(damaged(tmp_path))))
    assert [row.text("question", "data.prompt_key") for row in rows] == [f"q{i}" for i in range(600)]
    with pytest.raises(UserError, match="cannot be read"):
        rows[599].value("other", "data.prompt_key")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (pa.array([42]), "42"),
        (pa.array([2**63], pa.uint64()), "9223372036854775808"),
        (pa.array([0.1]), "0.1"),
        (pa.array([0.1], pa.float32()), "0.1"),
        (pa.array(["4.50"]).cast(pa.decimal128(10, 2)), "4.50"),
        (pa.array(["red"]).dictionary_encode(), "red"),
        (pa.array([["42"]]), "42"),
    ],
)
def test_numbers_become_text(tmp_path: Path, values: pa.Array, text: str) -> None:
    (row,) = rows_of(tmp_path / "a.parquet", pa.table({"answer": values}))
    assert row.text("answer", "data.response_key") == text


@pytest.mark.parametrize("value", [True, ["a", "b"], [], datetime.date(2024, 3, 15), b"bytes", float("nan")])
def test_what_is_no_text_is_refused_without_advice_about_quotes(tmp_path: Path, value: Any) -> None:
    (row,) = rows_of(tmp_path / "a.parquet", pa.table({"answer": [value]}))
    with pytest.raises(UserError, match="expected text") as caught:
        row.text("answer", "data.response_key")
    assert "quote" not in caught.value.fix


def test_the_stream_format_that_datasets_writes_is_read(tmp_path: Path) -> None:
    table = pa.table({"question": ["a", "b"]})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    assert [row.values for row in read_rows(str(tmp_path / "a.arrow"))] == table.to_pylist()


# Columns that nobody reads


def write(path: Path, table: pa.Table) -> Path:
    if path.suffix == ".gz":
        sink = pa.BufferOutputStream()
        parquet.write_table(table, sink)
        path.write_bytes(gzip.compress(sink.getvalue().to_pybytes()))
    elif path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        new = pa.ipc.new_stream if path.stem == "stream" else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
            writer.write_table(table)
    return path


FILES = ["a.parquet", "a.parquet.gz", "a.arrow", "stream.arrow"]


@pytest.mark.parametrize("name", FILES)
def test_only_the_wanted_columns_are_decoded(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"other": ["x"], "question": ["q"], "a.b": ["dotted"], "reward": [{"truth": "4", "style": "rule"}], "answer": ["a"]}
    path = write(tmp_path / name, pa.table(columns))
    decoded: list[pa.DataType] = []
    monkeypatch.setattr(arrow, "decoded", lambda column: decoded.append(column.type) or column.to_pylist())
    (row,) = read_rows(str(path), wanted=lambda names: ("question", "reward.truth", "a.b", "missing"))
    assert row.values == {"question": "q", "a.b": "dotted", "reward": {"truth": "4", "style": "rule"}}
    assert len(decoded) == 3 and row.unread == {"other": None, "answer": None}
    with pytest.raises(UserError) as caught:
        row.value("othr", "data.prompt_key")
    assert all(column in caught.value.what for column in columns) and caught.value.fix == "did you mean data.prompt_key=other?"


@pytest.mark.parametrize("name", FILES)
def test_a_table_without_the_wanted_columns_still_has_rows(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, pa.table({"first": [1, 2], "extra": [{"question": "q"}, {"question": "r"}]}))
    rows = list(read_rows(str(path), wanted=lambda names: ("question",)))
    assert len(rows) == 2
    with pytest.raises(UserError, match=r"'question' is missing \(found: first, extra\)") as caught:
        rows[0].value("question", "data.prompt_key")
    assert caught.value.fix == "did you mean data.prompt_key=extra.question?"


@pytest.mark.parametrize("kind", BAD)
def test_a_column_that_is_not_wanted_leaves_no_fault(tmp_path: Path, kind: str) -> None:
    for name in FILES:
        path = write(tmp_path / name, pa.table({"question": ["q1", "q2"], "other": BAD[kind]}))
        rows = list(read_rows(str(path), wanted=lambda names: ("question",)))
        assert [(row.values, row.faults) for row in rows] == [({"question": "q1"}, {}), ({"question": "q2"}, {})]


def test_a_damaged_column_that_is_not_wanted_is_not_noticed(tmp_path: Path) -> None:
    path = damaged(tmp_path)
    rows = list(read_rows(str(path), wanted=lambda names: ("question",)))
    assert len(rows) == 600 and not rows[0].faults
    with pytest.raises(UserError, match="incomplete or damaged Parquet file"):
        list(read_rows(str(path), wanted=lambda names: ("other",)))


def test_a_run_reads_a_column_beside_its_own_only_if_its_shape_needs_it() -> None:
    names = ("question", "answer", "messages", "system", "generations", "chosen", "prompt", "rejected")
    assert not {"messages", "generations", "chosen"} & set(Columns.of(DataConfig(train_files="x")).columns_read(names))
    assert {"messages", "prompt", "system"} <= set(Columns.of(DataConfig(train_files="x")).columns_read(names[2:]))
    chats = Columns.of(DataConfig(train_files="x", messages_key="messages")).columns_read(names)
    assert {"messages", "system", "tools"} <= set(chats) and not {"question", "answer"} & set(chats)
    assert set(Columns.of(DataConfig(train_files="x", text_key="text")).columns_read(names)) == {"text"}
    pairs = PairColumns("prompt", "chosen", "rejected")
    assert not {"messages", "label"} & set(pairs.columns_read(names)) and "conversations" in pairs.columns_read(("chosen",))


@pytest.mark.parametrize("name", FILES)
def test_a_wide_column_that_is_not_wanted_does_not_make_a_file_large(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "LARGE_BYTES", 1000)
    content = [random.Random(number).randbytes(2000).hex() for number in range(20)]
    path = write(tmp_path / name, pa.table({"question": ["q"] * 20, "other": content}))
    read, whole = source.size_bytes([path], lambda names: ("question",)), path.stat().st_size
    assert read == whole if name.endswith(".gz") else 0 < read < whole / 20
    assert source.size_bytes([path], lambda names: ("other",)) > whole / 4
    path.write_bytes(path.read_bytes()[:2000])
    assert source.size_bytes([path], lambda names: ("question",)) == 2000, "a damaged file has its size"


COLUMNS: dict[str, pa.Array] = {
    "texts": pa.array(["a", "b", "c"]),
    "lists": pa.array([["a"], ["b", "c"], []]),
    "objects": pa.array([{"a": ["first"]}, {"a": ["second"]}, {"a": []}]),
    "a dictionary": pa.array(["a", "b", "c"]).dictionary_encode(),
}
READS = """
import sys
from pathlib import Path
from verl.data.formats.arrow import read_bytes
from verl.data.source import read_rows
from verl.errors import UserError
read_bytes(Path(sys.argv[1]), None)
try:
    [row.value("answer", "data.response_key") for row in read_rows(sys.argv[1])]
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", COLUMNS)
def test_offsets_and_indices_that_lead_outside_are_an_error_of_the_file(tmp_path: Path, kind: str) -> None:
    """In a process of its own, because pyarrow crashes if it reads such a column."""
    file = tmp_path / "a.arrow"
    rows_of(file, pa.table({"question": ["q1", "q2", "q3"], "answer": COLUMNS[kind]}))
    column = COLUMNS[kind].indices if kind == "a dictionary" else COLUMNS[kind].field(0) if kind == "objects" else COLUMNS[kind]
    right = column.buffers()[1].to_pybytes()[:12]
    content = file.read_bytes()
    place = content.rfind(right)
    file.write_bytes(content[:place] + right[:4] + (2**30).to_bytes(4, "little") + content[place + 8 :])
    ended = subprocess.run([sys.executable, "-c", READS, str(file)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr[-500:]
    assert str(file) in ended.stdout and "cannot be read" in ended.stdout


def test_a_damaged_name_in_a_parquet_file_is_an_error_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    rows_of(file, pa.table({"question": ["q1"]}))
    file.write_bytes(file.read_bytes().replace(b"question", b"\xff\xfeestion"))
    with pytest.raises(UserError, match="damaged Parquet file"):
        list(read_rows(str(file)))
