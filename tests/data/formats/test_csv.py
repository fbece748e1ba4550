"""CSV and TSV as spreadsheets and scripts write them."""

from pathlib import Path

import pytest

from verl.data.source import read_rows
from verl.errors import UserError

ROW = {"question": "q1", "answer": "a1"}


def rows_of(folder: Path, content: str | bytes, name: str = "a.csv") -> list[dict[str, object]]:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return [row.values for row in read_rows(str(folder / name))]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\r\n"])
def test_any_line_end_ends_a_line(tmp_path: Path, end: str) -> None:
    assert rows_of(tmp_path, f"question,answer{end}q1,a1{end}") == [ROW]
    assert rows_of(tmp_path, f'question,answer{end}"q{end}1",a1') == [{"question": "q\n1", "answer": "a1"}]


def test_lines_that_end_with_carriage_returns_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('question,answer\r"q\r1",a1\rq2,a2\r', newline="")
    assert [row.where for row in read_rows(str(tmp_path / "a.csv"))] == [f"{tmp_path}/a.csv:2-3", f"{tmp_path}/a.csv:4"]
    (tmp_path / "a.jsonl").write_text('{"a": 1}\r{"a": 2}\r', newline="")
    assert [row.values for row in read_rows(str(tmp_path / "a.jsonl"))] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    "content",
    [
        "sep=;\nquestion;answer\nq1;a1\n",
        '"sep=;"\r\nquestion;answer\r\nq1;a1\r\n',
        "sep=|\nquestion|answer\nq1|a1\n",
        "\ufeffSEP=,\nquestion,answer\nq1,a1\n",
        "question;answer\nq1;a1\n",
        "question\tanswer\nq1\ta1\n",
        "question|answer\nq1|a1\n",
        "\ufeffquestion,answer\nq1,a1\n",
        "question,answer,,\nq1,a1,,\n",
        "question,answer,,\nq1,a1\n",
        "question,answer\nq1,a1,,\n",
        'question;answer;"a, b, c"\nq1;a1;\n',
        "question;answer;a, b, c\nq1;a1;\n",
        "answer;question, in full;question\na1;q;q1\n",
    ],
)
def test_what_spreadsheets_write_is_read(tmp_path: Path, content: str) -> None:
    (row,) = rows_of(tmp_path, content)
    assert {name: row[name] for name in ROW} == ROW


def test_a_semicolon_file_may_have_commas_in_its_texts(tmp_path: Path) -> None:
    assert rows_of(tmp_path, "question;answer\n1,5 + 1,5?;3,0\n") == [{"question": "1,5 + 1,5?", "answer": "3,0"}]


@pytest.mark.parametrize("name", ["a.tsv", "A.TSV"])
def test_tsv_is_split_at_tabs_whatever_else_is_in_it(tmp_path: Path, name: str) -> None:
    content = "id (a,b,c,d)\tquestion\tanswer\n1\tone, two; three\ta1\n"
    assert rows_of(tmp_path, content, name) == [{"id (a,b,c,d)": "1", "question": "one, two; three", "answer": "a1"}]
    assert rows_of(tmp_path, "text, all of it\na, b\n", name) == [{"text, all of it": "a, b"}]


def test_text_in_a_column_without_a_name_is_not_dropped_unseen(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="3 fields, the header has 2") as caught:
        rows_of(tmp_path, "question,answer,\nq1,a1, and more\n")
    assert "enclose fields that contain commas" in caught.value.fix
    with pytest.raises(UserError, match="3 fields, the header has 2") as caught:
        rows_of(tmp_path, "question;answer\nq1;a1;b1\n")
    assert "enclose fields that contain semicolons" in caught.value.fix


def test_a_fault_in_a_column_that_is_not_read_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"question,note,note,other\nq1,x,y,caf\xe9\nq2,x,y,a\0b\n")
    rows = list(read_rows(str(tmp_path / "a.csv")))
    assert [row.text("question", "prompt_key") for row in rows] == ["q1", "q2"]
    for column, row, what in (("note", 0, "twice"), ("other", 0, "not UTF-8"), ("other", 1, "NUL")):
        with pytest.raises(UserError, match=what) as caught:
            rows[row].text(column, "prompt_key")
        assert caught.value.where == f"{tmp_path}/a.csv:{row + 2}"


def test_a_name_that_is_not_utf8_is_an_error_only_if_a_column_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("question,été\nq1,a1\n".encode("latin-1"))
    (row,) = read_rows(str(tmp_path / "a.csv"))
    assert row.text("question", "prompt_key") == "q1" and row.values == {"question": "q1"}
    with pytest.raises(UserError, match="not UTF-8: byte 0xe9") as caught:
        row.text("zzz", "prompt_key")
    assert "CP1252 reads 'question,été'" in caught.value.fix


@pytest.mark.parametrize(
    "content",
    [
        "# exported on 2024-03-01\nquestion,answer\nq1,a1\n",
        "#questions of grade 3, by Ann, checked\nquestion,answer\nq1,a1\n",
        "# one comment\n# and another\nquestion,answer\nq1,a1\n",
        "\ufeff# made by a script\nquestion;answer\nq1;a1\n",
    ],
)
def test_a_comment_before_the_header_is_named(tmp_path: Path, content: str) -> None:
    for name in ("a.csv", "b.tsv"):
        with pytest.raises(UserError, match="the first line is a comment, expected column names: '#") as caught:
            rows_of(tmp_path, content.replace(",a", "\ta").replace(";a", "\ta") if name == "b.tsv" else content, name)
        assert caught.value.where == f"{tmp_path}/{name}:1" and "remove the comment" in (caught.value.fix or "")


@pytest.mark.parametrize("content", ["# of legs,answer\n4,cat\n", "#,answer\n#1,a1\n", "#id;answer\n1;a1\n"])
def test_a_name_of_a_column_may_begin_with_a_number_sign(tmp_path: Path, content: str) -> None:
    (row,) = rows_of(tmp_path, content)
    assert list(row)[1] == "answer" and len(row) == 2
