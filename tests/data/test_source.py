"""Files to rows: every format gives the same rows, and what is not right is an error at its place."""

import csv
import gzip
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pytest
from pyarrow import parquet

from verl.data.formats import stream
from verl.data.row import Row, notes_of
from verl.data.source import read_rows, read_rows_and_errors, resolve_files
from verl.errors import UserError

ROWS = [
    {"question": "What is 1 + 1?", "answer": "2\n#### 2"},
    {"question": 'Line\u2028separator, "quotes", a comma; and\ttab', "answer": "naïve 你好 🙂"},
    {"question": " spaces ", "answer": "x \n\ny"},
]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(rows: Sequence[Mapping[str, object]] = ROWS, end: str = "\n") -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


def write_csv(path: Path, rows: list[dict[str, str]] = ROWS, **options: Any) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)
    return path


def values(files: object) -> list[dict[str, object]]:
    return [row.values for row in read_rows(files)]


def errors(path: Path) -> list[UserError]:
    return [row for row in read_rows_and_errors(resolve_files(str(path))) if isinstance(row, UserError)]


def error_of(path: object) -> UserError:
    with pytest.raises(UserError) as caught:
        list(read_rows(path if isinstance(path, list) else str(path)))
    assert "Traceback" not in str(caught.value)
    return caught.value


def every_format(folder: Path) -> list[Path]:
    files = [
        write(folder / "a.jsonl", jsonl()),
        write(folder / "windows.jsonl", jsonl(end="\r\n")),
        write(folder / "bom.jsonl", b"\xef\xbb\xbf" + jsonl().encode()),
        write(folder / "no-last-line-end.jsonl", jsonl().rstrip("\n")),
        write(folder / "blank-lines.jsonl", jsonl(end="\n\n  \n")),
        write(folder / "array.json", json.dumps(ROWS)),
        write(folder / "indented.json", json.dumps(ROWS, indent=2, ensure_ascii=False)),
        write(folder / "array-named.jsonl", json.dumps(ROWS)),
        write(folder / "unnamed", jsonl()),
        write_csv(folder / "a.csv"),
        write_csv(folder / "unix.csv", lineterminator="\n"),
        write_csv(folder / "semicolons.csv", delimiter=";"),
        write_csv(folder / "a.tsv", delimiter="\t"),
        folder / "a.parquet",
    ]
    parquet.write_table(pa.Table.from_pylist(ROWS), folder / "a.parquet")
    gzipped = [write(folder / f"{path.name}.gz", gzip.compress(path.read_bytes())) for path in files]
    return [*files, *gzipped, write(folder / "gzipped-named.jsonl", gzip.compress(jsonl().encode()))]


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    for path in every_format(tmp_path):
        assert values(path) == ROWS, path.name


def test_rows_know_their_line(tmp_path: Path) -> None:
    places = {
        write(tmp_path / "a.jsonl", "\n" + jsonl()): ["a.jsonl:2", "a.jsonl:3", "a.jsonl:4"],
        write(tmp_path / "a.json", json.dumps(ROWS, indent=1)): ["a.json:2 (items[0])", "a.json:6 (items[1])", "a.json:10 (items[2])"],
        write_csv(tmp_path / "a.csv"): ["a.csv:2-3", "a.csv:4", "a.csv:5-7"],
        write(tmp_path / "a.txt", "one\ntwo\n\n\n three\n"): ["a.txt:1", "a.txt:5"],
    }
    for path, expected in places.items():
        assert [row.where for row in read_rows(str(path))] == [f"{tmp_path}/{place}" for place in expected]


def test_rows_of_parquet_are_numbered_across_batches(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"question": [str(i) for i in range(600)]}), tmp_path / "a.parquet")
    rows = list(read_rows(str(tmp_path / "a.parquet")))
    assert [row.where for row in rows] == [f"{tmp_path}/a.parquet row {i}" for i in range(1, 601)]
    assert [row.values["question"] for row in rows] == [str(i) for i in range(600)]


def test_nulls_that_parquet_puts_into_objects_are_left_out(tmp_path: Path) -> None:
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
    ]
    parquet.write_table(pa.Table.from_pylist([{"messages": chat, "tools": None}]), tmp_path / "a.parquet")
    (row,) = values(tmp_path / "a.parquet")
    assert row == {"messages": [chat[0], {"role": "assistant", "tool_calls": chat[1]["tool_calls"]}], "tools": None}


def test_a_paragraph_of_plain_text_is_a_row(tmp_path: Path) -> None:
    for name, end in (("a.txt", "\n"), ("a.md", "\r\n")):
        rows = list(read_rows(str(write(tmp_path / name, f"one{end}two{end} {end}{end}  three\u2028four"))))
        assert rows == [
            Row(f"{tmp_path}/{name}:1", {"text": "one\ntwo"}, is_text=True),
            Row(f"{tmp_path}/{name}:5", {"text": "  three\u2028four"}, is_text=True),
        ]


def test_files_are_a_path_a_list_or_a_glob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.jsonl", json.dumps({"name": name}))
    assert [row["name"] for row in values(f"{tmp_path}/[ab].jsonl")] == ["a", "b"]
    assert [row["name"] for row in values([f"{tmp_path}/c.jsonl", f"{tmp_path}/*.jsonl"])] == ["c", "a", "b", "c"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [row["name"] for row in values("~/a.jsonl")] == ["a"]
    bracketed = write(tmp_path / "d[1].jsonl", '{"name": "d"}')
    assert values(bracketed) == [{"name": "d"}]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"question": "a", "answer": "b', "not JSON: Unterminated string"),
        ('{"question": "a"} {"question": "b"}', "more text after the object"),
        ("What is 1 + 1?", "not JSON: Expecting value at column 1"),
        ("[1, 2]", "found a list ([1, 2]), expected an object"),
        ("42", "found a number (42), expected an object"),
        ('{"question": "a\0b"}', "not JSON: a NUL byte at column 16"),
        ('{"question": "a"}\ufeff{"question": "b"}', "a byte order mark (U+FEFF) inside the file"),
        ('{"question": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested more than 64 levels deep"),
    ],
)
def test_a_broken_line_is_an_error_at_its_place_and_the_next_rows_are_read(tmp_path: Path, line: str, what: str) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"question": "first"}}\n{line}\n{{"question": "last"}}\n')
    found = list(read_rows_and_errors(resolve_files(str(path))))
    assert [type(row) for row in found] == [Row, UserError, Row]
    assert isinstance(found[1], UserError) and found[1].where == f"{path}:2"
    assert what in found[1].what
    assert found[1].fix


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ('"a", "question": "b"', "the key 'question' occurs twice"),
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        ("NaN", "NaN is not a JSON number"),
        ("-Infinity", "-Infinity is not a JSON number"),
        ('[{"text": [NaN]}]', "NaN is not a JSON number"),
        ("1e999", "1e999 is too large"),
        ("1" * 5000, "Exceeds the limit"),
        ('"a\\ud800b"', "half of a surrogate pair in 'a\\ud800b'"),
        ('{"\\udc00": "a"}', "half of a surrogate pair"),
        ('"a\\u0000b"', "a NUL character in 'a\\x00b'"),
        ("[" * 100 + "]" * 100, "nested more than 64 levels deep"),
    ],
)
def test_a_value_that_cannot_be_used_is_an_error_only_where_it_is_read(tmp_path: Path, value: str, what: str) -> None:
    first, second = values_and_row(write(tmp_path / "a.jsonl", f'{{"answer": "x"}}\n{{"answer": "a", "question": {value}}}\n'))
    assert first == {"answer": "x"}
    assert second.text("answer", "data.response_key") == "a"
    with pytest.raises(UserError) as caught:
        second.value("question", "data.prompt_key")
    assert caught.value.where == f"{tmp_path}/a.jsonl:2" and what in caught.value.what and caught.value.fix


def values_and_row(path: Path) -> tuple[dict[str, object], Row]:
    first, second = read_rows(str(path))
    return first.values, second


def test_a_fault_inside_an_object_is_charged_to_its_key(tmp_path: Path) -> None:
    line = '{"reward_model": {"ground_truth": "74", "score": NaN}, "tags": ["a", Infinity]}'
    (row,) = read_rows(str(write(tmp_path / "a.jsonl", line)))
    assert row.text("reward_model.ground_truth", "data.response_key") == "74"
    assert row.values == {"reward_model": {"ground_truth": "74"}}  # what a reward gets
    assert list(row.faults) == ["reward_model.score", "tags"]
    for column in ("reward_model.score", "reward_model", "tags", "tags.first"):
        with pytest.raises(UserError, match="is not a JSON number"):
            row.value(column, "data.response_key")
    lines = notes_of([row, row])
    assert len(lines) == 2
    assert lines[0] == (
        f"column 'reward_model.score' is left out of rows where it cannot be read: 2 rows, the first {tmp_path}/a.jsonl:1 "
        "(NaN is not a JSON number)"
    )


def test_a_surrogate_pair_is_one_character(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"question": "\\ud83d\\ude42"}')
    assert values(path) == [{"question": "🙂"}]


def test_bytes_that_are_not_utf8_are_named_by_their_offset(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"question": "a"}\n{"question": "caf\xe9"}\n{"question": "b"}\n')
    error = error_of_column(path)
    assert (error.where, error.what) == (f"{path}:2", "column 'question': not UTF-8: byte 0xe9 at offset 35")
    assert path.read_bytes()[35] == 0xE9
    latin = write(tmp_path / "a.csv", "question\ncafé\n".encode("latin-1"))
    assert "not UTF-8: byte 0xe9 at offset 12" in str(error_of_column(latin))


def error_of_column(path: Path, column: str = "question") -> UserError:
    with pytest.raises(UserError) as caught:
        [row.text(column, "data.prompt_key") for row in read_rows(str(path))]
    return caught.value


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ('[{"a": 1}, {"a": }]', ":1 (items[1])", "not JSON"),
        ('[\n{"a": 1}\n{"a": 2}]', ":2 (items[0])", "no ',' or ']'"),
        ('[{"a": 1},]', ":1 (items[1])", "not JSON"),
        ('[{"a": 1}', ":1 (items[0])", "no ',' or ']'"),
        ('[{"a": 1}] {"a": 2}', "", "more text after the array"),
        ('[{"a": 1}, 2]', ":1 (items[1])", "found a number (2), expected an object"),
        ("[]", "", "has no rows"),
        ("[ ] ", "", "has no rows"),
    ],
)
def test_a_broken_array_is_an_error_at_its_item(tmp_path: Path, text: str, where: str, what: str) -> None:
    path = write(tmp_path / "a.json", text)
    error = error_of(path)
    assert error.where == f"{path}{where}"
    assert what in error.what


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("question,answer\na,b\nc\n", ":3", "1 fields, the header has 2"),
        ('question,answer\n"a\nb",c,d\n', ":2-3", "3 fields, the header has 2"),
        ("question,answer\nquestion,answer\n", ":2", "the header again"),
        ("question,answer\na,b\n\ufeffquestion,answer\n", ":3", "a byte order mark"),
        ("question,answer\na,b\rc,d\n", ":2", "a carriage return (CR)"),
        ("question,answer,,\na,b,,c\n", ":2", "4 fields, the header has 2"),
        (",,\na,b,c\n", ":1", "the first line is blank"),
        ("\nquestion,answer\n", ":1", "the first line is blank"),
        ('question,answer\n"a"b,c\n', ":2", "not CSV"),
        ('question,answer\n"a,b\n', ":2", "not CSV"),
        ("question,answer\n", "", "has no rows"),
    ],
)
def test_a_broken_csv_is_an_error_at_its_lines(tmp_path: Path, text: str, where: str, what: str) -> None:
    path = write(tmp_path / "a.csv", text)
    error = error_of(path)
    assert error.where == f"{path}{where}"
    assert what in error.what


def test_a_line_that_is_no_row_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MAX_ROW_BYTES", 1000)
    bomb = write(tmp_path / "a.jsonl.gz", gzip.compress(b'{"question": "' + b"a" * 10**6))
    assert "longer than" in error_of(bomb).what
    monkeypatch.setattr(stream, "MAX_WHOLE_FILE_BYTES", 1000)
    assert "must fit into memory" in error_of(write(tmp_path / "a.json.gz", gzip.compress(b"[" + b" " * 10**6))).what


def test_damaged_files_say_what_is_damaged(tmp_path: Path) -> None:
    whole = gzip.compress(jsonl(ROWS * 1000).encode())
    assert "gzip stream is damaged" in error_of(write(tmp_path / "a.jsonl.gz", whole[: len(whole) // 2])).what
    assert "gzip stream is damaged" in error_of(write(tmp_path / "b.jsonl.gz", whole[:500] + b"\0\0\0\0" + whole[504:])).what
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    table = (tmp_path / "a.parquet").read_bytes()
    assert "damaged Parquet file" in error_of(write(tmp_path / "b.parquet", table[:-10])).what
    assert "does not begin with PAR1" in error_of(write(tmp_path / "c.parquet", jsonl())).what


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.jsonl", b"", "the file is empty"),
        ("a.jsonl", b"\n \n", "has no rows"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "has no rows"),
        ("a.csv.gz", gzip.compress(b"", mtime=0), "the first line is blank"),
        ("a.txt", b"\n\n", "has no rows"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd....", "compressed with Zstandard"),
        ("a.csv", b"PK\x03\x04....", "a ZIP archive, or a spreadsheet"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("a.docx", b"hello", "unknown file format: 'a.docx'"),
        ("a.yaml", b"- role: user\n  content: Hello\n", "the file is YAML, which is not read as data"),
        ("a.yml", b"---\nquestion: a\nanswer: b\n", "the file is YAML, which is not read as data"),
        ("a.yaml", b"", "the file is empty"),
    ],
)
def test_what_is_no_data_is_named(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    error = error_of(write(tmp_path / name, content))
    assert what in error.what
    assert error.where
    assert error.fix or "blank" in what


def test_a_missing_file_is_answered_with_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", jsonl())
    error = error_of(tmp_path / "trian.jsonl")
    assert error.where == "data.train_files"
    assert error.what == f"no file '{tmp_path}/trian.jsonl'"
    assert f"did you mean {tmp_path}/train.jsonl?" in error.fix
    assert str(Path.cwd()) in error.fix
    assert f"there is no folder {tmp_path}/nowhere" in error_of(tmp_path / "nowhere" / "train.jsonl").fix
    assert "no file matches" in error_of(tmp_path / "*.csv").what
    assert "write data.train_files=openai/gsm8k:main" in error_of(Path("openai/gsm8k/main")).fix
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "b.jsonl").write_text("{}")
    if not (tmp_path / "A.jsonl").exists():  # a file system that tells them apart
        assert f"did you mean {tmp_path}/a.jsonl?" in error_of(tmp_path / "A.jsonl").fix


def fix_of_folder(folder: Path, names: str, key: str = "data.train_files") -> str:
    for name in names.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, "x")
    with pytest.raises(UserError) as caught:
        resolve_files(str(folder), key)
    return (caught.value.fix or "").replace(str(folder), "d")


@pytest.mark.parametrize(
    ("names", "fix"),
    [
        ("README.md main/train-0.parquet main/test-0.parquet", "name its files with a glob, such as 'd/main/*train*.parquet'"),
        ("dataset_dict.json train/a.arrow train/state.json test/a.arrow", "name its files with a glob, such as 'd/train/*.arrow'"),
        ("state.json dataset_info.json a.arrow", "name its files with a glob, such as 'd/*.arrow'"),
        ("data/a.jsonl data/b.jsonl c.csv", "name its files with a glob, such as 'd/*.csv' or 'd/**/*.jsonl', or several in a list"),
        ("LICENSE.txt README.md a.jsonl.gz .cache/b.json", "name its files with a glob, such as 'd/*.jsonl.gz'"),
        ("README.md book.txt", "name its files with a glob, such as 'd/*.txt'"),
        ("a.json state.json", "name its files with a glob, such as 'd/a.json'"),
        ("README.md", "put data files into it"),
    ],
)
def test_a_folder_is_answered_with_its_data_files_and_never_with_its_readme(names: str, fix: str, tmp_path: Path) -> None:
    assert fix_of_folder(tmp_path, names).startswith(fix)


def test_a_folder_is_answered_with_the_files_of_the_key(tmp_path: Path) -> None:
    assert "'d/*test*.jsonl'" in fix_of_folder(tmp_path, "train.jsonl test.jsonl", "data.val_files")


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", jsonl())
    error = error_of(tmp_path)
    assert "is a directory" in error.what and f"{tmp_path}/*.jsonl" in error.fix
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "not a regular file" in error_of(tmp_path / "pipe.jsonl").what
    (tmp_path / "broken.jsonl").symlink_to(tmp_path / "gone.jsonl")
    assert f"a link to '{tmp_path}/gone.jsonl'" in error_of(tmp_path / "broken.jsonl").what
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    assert "cannot be opened" in error_of(tmp_path / "loop.jsonl").what
    values: list[object] = [None, 3, "", [], [None]]
    for value in values:
        with pytest.raises(UserError, match="give a path"):
            resolve_files(value)


@pytest.mark.parametrize("separator", [",", ", ", ";", " "])
def test_several_files_in_one_text_are_answered_with_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, jsonl())
    error = error_of(f"a.jsonl{separator}b.jsonl")
    assert error.what == f"'a.jsonl{separator}b.jsonl' is one text with 2 files"
    assert error.fix == "write a list: 'data.train_files=[a.jsonl,b.jsonl]'"
    assert error_of(f"*.csv{separator}b/*.jsonl").fix == "write a list: 'data.train_files=[*.csv,b/*.jsonl]'"
    write(tmp_path / f"a.jsonl{separator}b.jsonl", jsonl())
    assert values(f"a.jsonl{separator}b.jsonl") == ROWS  # a file of that name


@pytest.mark.parametrize(
    ("address", "fix"),
    [
        ("https://huggingface.co/datasets/openai/gsm8k", "name the data set: data.train_files=openai/gsm8k"),
        ("hf://datasets/openai/gsm8k/main/train.parquet", "name the data set: data.train_files=openai/gsm8k"),
        ("s3://bucket/train.jsonl", "download it, and give its path"),
    ],
)
def test_an_address_is_not_a_file(address: str, fix: str) -> None:
    error = error_of([address])
    assert error.what == f"{address!r} is an address, expected a file" and error.fix == fix


def test_a_directory_is_answered_with_a_glob_that_finds_its_files(tmp_path: Path) -> None:
    (tmp_path / "data" / "part").mkdir(parents=True)
    assert "put data files into it" in error_of(tmp_path / "data").fix
    write(tmp_path / "data" / "part" / "a.jsonl.gz", gzip.compress(jsonl().encode()))
    assert f"'{tmp_path}/data/**/*.jsonl.gz'" in error_of(tmp_path / "data").fix
    assert values(f"{tmp_path}/data/**/*.jsonl.gz") == ROWS


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_shows_its_mode(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", jsonl())
    path.chmod(0)
    assert "its mode is ----------" in error_of(path).what


def test_a_data_set_of_the_hub_is_not_found_without_network() -> None:
    error = error_of("nobody/no-such-data-set")
    assert error.where == "nobody/no-such-data-set"
    assert "cannot be loaded" in error.what


def test_a_path_that_only_looks_like_a_data_set_is_a_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no file 'data/train.jsonl'" in error_of("data/train.jsonl").what
    (tmp_path / "data").mkdir()
    assert "no file 'data/train'" in error_of("data/train").what


def test_a_column_that_is_missing_null_or_of_a_wrong_type_is_named() -> None:
    row = Row("train.jsonl:17", {"qestion": "a", "answer": None, "flag": True, "blank": " \n", "chat": [{"role": "user"}]})
    found = "qestion, answer, flag, blank, chat"

    def error(column: str, key: str = "data.prompt_key") -> UserError:
        with pytest.raises(UserError) as caught:
            row.text(column, key)
        return caught.value

    missing = error("question")
    fix = "did you mean data.prompt_key=qestion?"
    assert str(missing) == f"train.jsonl:17: column 'question' is missing (found: {found})\n  fix: {fix}"
    assert error("answer").what == "column 'answer' is null"
    assert error("flag").what == "column 'flag' is a boolean (True), expected text"
    assert error("blank").what == "column 'blank' is empty"
    assert error("chat").fix == "data.messages_key=chat reads chats"
    assert row.text("qestion", "data.prompt_key") == "a"
