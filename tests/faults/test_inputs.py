"""Bad inputs: each is answered by one error with its place and a fix, exit code 2, before anything is trained.

The catalogue is that of docs/reliability.md: data files (D1 to D44), settings and launches (C1 to C24), and model directories.
"""

import gzip
import itertools
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from faults.input_commands import Ended, assert_refused, is_empty_run, run_command
from safetensors.torch import load_file, save_file
from tiny import write_problems_and_model

from verl import chat
from verl.eval import sft_evaluator
from verl.models import export
from verl.trainer import fsdp_sft_trainer, ppo_trainer, reward_trainer

GOOD = {"question": "What is 1 + 1?", "answer": "1 + 1 = 2\n#### 2"}
ROW = json.dumps(GOOD).encode()
AT_ONCE = 2  # of each group, `make test` tries so many, and `make faults` all
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def each(cases: Iterable[Any]) -> list[Any]:
    """The cases of a group as parameters; all but the first are left to `make faults`."""
    many = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=[pytest.mark.faults] if number >= AT_ONCE else []) for number, case in enumerate(many)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems and a small model."""
    return write_problems_and_model(tmp_path_factory.mktemp("inputs"))


def sft_words(folder: Path, *words: object) -> list[str]:
    return [
        f"data.train_files={folder / 'train.jsonl'}",
        f"model.partial_pretrain={folder / 'model'}",
        f"data.cache_dir={folder / 'cache'}",
        f"trainer.default_local_dir={folder / 'out'}",
        "data.max_length=256",
        *map(str, words),
    ]


def sft(folder: Path, *words: object) -> Ended:
    return run_command(fsdp_sft_trainer.main, sft_words(folder, *words))


def refused(folder: Path, pattern: str, *words: object) -> None:
    assert_refused(sft(folder, *words), pattern)
    assert is_empty_run(folder / "out")


# Data files


def lines(*rows: object) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def row(**values: object) -> dict[str, object]:
    return {**GOOD, **values}


def chat_row(*messages: object) -> dict[str, object]:
    return {"messages": list(messages)}


DEEP = b'{"question": ' + b"[" * 10_000 + b"]" * 10_000 + b', "answer": "x"}'
# By name: what the file is called, what it holds, and what the error says.
DATA: dict[str, tuple[str, bytes, str]] = {
    "D1 empty": ("a.jsonl", b"", "the file is empty"),
    "D1 blank lines": ("a.jsonl", b"\n\n  \n", "no rows|empty"),
    "D1 empty array": ("a.json", b"[]", "no rows"),
    "D1 header only": ("a.csv", b"question,answer\n", "no rows"),
    "D8 unknown suffix": ("a.dat", b"question: 1", "unknown file format"),
    "D8 an object in a JSON file": ("a.json", b'{"question": 1}', "column 'answer' is missing|no columns|question"),
    "D9 cut gzip": ("a.jsonl.gz", gzip.compress(lines(*[GOOD] * 99))[:-20], "gzip stream is damaged at byte"),
    "D9 gzip of nothing": ("a.jsonl.gz", b"\x1f\x8b\x08\x00broken", "gzip stream is damaged"),
    "D9 zstandard": ("a.jsonl.zst", b"\x28\xb5\x2f\xfd1234", "compressed with Zstandard"),
    "D9 bzip2": ("a.jsonl.bz2", b"BZh91AY", "compressed with bzip2"),
    "D9 zip": ("a.jsonl.zip", b"PK\x03\x04...", "ZIP archive"),
    "D13 UTF-16 without a mark": ("a.jsonl", ROW.decode().encode("utf-16-le"), "UTF-16"),
    "D13 Latin-1": ("a.jsonl", lines(b'{"question": "caf\xe9 au lait", "answer": "x"}'), "not UTF-8: byte 0xe9 at offset"),
    "D13 cut UTF-8": ("a.jsonl", lines(b'{"question": "\xe2\x82", "answer": "x"}'), "not UTF-8"),
    "D14 lone surrogate": ("a.jsonl", lines(b'{"question": "\\ud800", "answer": "x"}'), "half of a surrogate pair"),
    "D16 NUL byte": ("a.jsonl", lines(b'{"question": "a\x00b", "answer": "x"}'), "NUL"),
    "D16 NUL escape": ("a.jsonl", lines(b'{"question": "a\\u0000b", "answer": "x"}'), "NUL"),
    "D16 NUL in CSV": ("a.csv", b"question,answer\na\x00b,x\n", "NUL"),
    "D16 NUL in a header": ("a.csv", b"quest\x00ion,answer\na,x\n", "NUL"),
    "D18 cut last line": ("a.jsonl", lines(GOOD) + ROW[:-9], ":2: not JSON"),
    "D18 cut array": ("a.json", b"[" + ROW + b"," + ROW[:-5], "not JSON"),
    "D18 text after the array": ("a.json", b"[" + ROW + b"] x", "more text after the array"),
    "D18 comma after the last item": ("a.json", b"[" + ROW + b",]", "not JSON"),
    "D20 missing column": ("a.jsonl", lines({"question": "x", "anwser": "y"}), "did you mean"),
    "D20 no columns": ("a.jsonl", lines({}), "no columns"),
    "D20 an empty name": ("a.jsonl", lines({"": "x"}), "is missing"),
    "D21 null": ("a.jsonl", lines(row(answer=None)), "column 'answer' is null|null"),
    "D21 null question": ("a.jsonl", lines(row(question=None)), "null"),
    "D22 list for text": ("a.jsonl", lines(row(answer=["a", "b"])), "expected text"),
    "D22 object for text": ("a.jsonl", lines(row(answer={"text": "x"})), "expected text"),
    "D22 boolean for text": ("a.jsonl", lines(row(answer=True)), "expected text"),
    "D22 a list for a row": ("a.jsonl", lines([1, 2]), "expected an object|item"),
    "D22 a number for a row": ("a.jsonl", lines(b"{}", b"3"), "no columns|found a number"),
    "D22 a text for a row": ("a.jsonl", lines(GOOD, b'"x"'), ":2: found text"),
    "D23 mixed columns": ("a.jsonl", lines(GOOD, {"prompt": "x", "response": "y"}, {"q": 1}), ":3"),
    "D23 mixed types": ("a.jsonl", lines(GOOD, row(answer=[1, 2])), ":2"),
    "D24 duplicate keys": ("a.jsonl", lines(b'{"question": "a", "question": "b", "answer": "x"}'), "occurs twice"),
    "D24 duplicate keys, equal": ("a.jsonl", lines(b'{"question": "a", "answer": "x", "answer": "x"}'), "occurs twice"),
    "D25 NaN": ("a.jsonl", lines(b'{"question": NaN, "answer": "x"}'), "NaN"),
    "D25 Infinity": ("a.jsonl", lines(b'{"question": -Infinity, "answer": "x"}'), "Infinity"),
    "D25 1e999": ("a.jsonl", lines(b'{"question": 1e999, "answer": "x"}'), "too large"),
    "D25 digits without end": ("a.jsonl", lines(b'{"question": ' + b"1" * 5000 + b', "answer": "x"}'), "digits|limit"),
    "D26 deep": ("a.jsonl", lines(DEEP), "nested more than"),
    "D26 deep text": ("a.json", b"[" * 10_000, "nested|not JSON|expected an object"),
    "D27 empty answer": ("a.jsonl", lines(row(answer="")), "column 'answer' is empty"),
    "D27 spaces": ("a.jsonl", lines(row(answer=" \n\t ")), "column 'answer' is empty"),
    "D28 empty question": ("a.jsonl", lines(row(question="")), "column 'question' is empty"),
    "D37 uneven": ("a.csv", b"question,answer\na,b,c\n", "3 fields, the header has 2"),
    "D37 too few": ("a.csv", b"question,answer\na\n", "1 field"),
    "D37 open quote": ("a.csv", b'question,answer\n"a,b\n', "not CSV"),
    "D37 duplicate header": ("a.csv", b"question,question,answer\na,b,c\n", "this column twice"),
    "D37 blank header": ("a.csv", b"\nquestion,answer\n", "first line is blank"),
    "D38 text in Parquet's place": ("a.parquet", b"not parquet", "not a Parquet file"),
    "D38 Parquet without its end": ("a.parquet", b"PAR1" + b"\0" * 100, "a.parquet"),
    "D38 Arrow without its end": ("a.arrow", b"ARROW1\0\0" + b"\0" * 100, "a.arrow"),
    "D38 Arrow that is text": ("a.arrow", b"hello", "a.arrow"),
    "LFS pointer": ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
    "a web page": ("a.jsonl", b"<!DOCTYPE html><html></html>", "web page"),
    "byte order marks inside": ("a.jsonl", lines(GOOD) + b"\xef\xbb\xbf\xef\xbb\xbf" + lines(GOOD), "byte order mark|not JSON"),
    "the header again": ("a.csv", b"question,answer\na,b\nquestion,answer\n", "the header again"),
    "two objects in a line": ("a.jsonl", ROW + ROW + b"\n", "more text after the object|not JSON"),
    "Python's quotes": ("a.jsonl", b"{'question': 'a', 'answer': 'b'}\n", "not JSON"),
    "a comment": ("a.jsonl", b"// rows\n" + lines(GOOD), "not JSON"),
}
CHATS: dict[str, tuple[object, str]] = {
    "D29 unknown role": (chat_row({"role": "<|system|>", "content": "x"}, *CHAT), "unknown role"),
    "D29 a number as role": (chat_row({"role": 3, "content": "x"}), "unknown role"),
    "D29 no role": (chat_row({"content": "x"}), "'role' is missing"),
    "D29 no assistant": (chat_row({"role": "user", "content": "x"}), "no assistant turn"),
    "D29 no messages": (chat_row(), "expected a list of messages"),
    "D29 an object in place of a list": ({"messages": {"role": "user"}}, "expected a list of messages"),
    "D29 a text in place of a list": ({"messages": "hello"}, "not JSON"),
    "D29 a number in place of a list": ({"messages": 3}, "expected a list of messages"),
    "D29 a text in place of a message": (chat_row("hello"), "expected an object"),
    "D29 null in place of a message": (chat_row(None), "expected an object"),
    "D21 content missing": (chat_row({"role": "user"}, CHAT[1]), "missing or null|content"),
    "D21 content null": (chat_row({"role": "user", "content": None}, CHAT[1]), "missing or null"),
    "D22 content a number list": (chat_row({"role": "user", "content": [1, 2]}, CHAT[1]), "expected a part of text"),
    "D22 content an object": (chat_row({"role": "user", "content": {"a": 1}}, CHAT[1]), "expected text"),
    "D22 an image": (
        chat_row({"role": "user", "content": [{"type": "image", "image": "../../etc/passwd"}]}, CHAT[1]),
        "only text is trained",
    ),
    "D27 empty assistant": (chat_row(CHAT[0], {"role": "assistant", "content": " "}), "text is empty"),
    "a weight of 0.5": (chat_row(CHAT[0], {**CHAT[1], "weight": 0.5}), "expected 0 or 1"),
    "every turn untrained": (chat_row(CHAT[0], {**CHAT[1], "weight": 0}), "no turn is trained"),
    "tool calls that are text": (chat_row(CHAT[0], {"role": "assistant", "tool_calls": "x"}), "not JSON"),
    "a tool call without a name": (chat_row(CHAT[0], {"role": "assistant", "tool_calls": [{"arguments": {}}]}), "name"),
    "arguments that are a list": (
        chat_row(CHAT[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}),
        "expected an object",
    ),
    "tools that are no schemas": (
        {**chat_row(CHAT[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}), "tools": [3]},
        "not clear which column has the schemas",
    ),
    "reserved variables": ({**chat_row(*CHAT), "chat_template_kwargs": {"messages": []}}, "set by verl"),
    "NUL in JSON text": ({"messages": json.dumps([{"role": "user", "content": "a\0b"}, CHAT[1]])}, "NUL"),
    "NUL in a name in JSON text": ({"messages": json.dumps([{"role": "user", "content": "a", "k\0": 1}, CHAT[1]])}, "NUL"),
    "duplicate keys in JSON text": ({"messages": '[{"role": "user", "role": "assistant", "content": "x"}]'}, "occurs twice"),
    "NaN in JSON text": ({"messages": '[{"role": "user", "content": NaN}]'}, "NaN"),
    "1e999 in JSON text": ({"messages": '[{"role": "user", "content": 1e999}]'}, "too large"),
    "half a surrogate in JSON text": ({"messages": '[{"role": "user", "content": "\\ud800"}]'}, "surrogate"),
    "deep JSON text": ({"messages": '[{"role": "user", "content": ' + "[" * 5000 + "]" * 5000 + "}]"}, "nested"),
}
# The same inside the JSON text of a column that no key names, which is recognised.
RECOGNISED: dict[str, tuple[object, str]] = {
    "a chat with a duplicate key": ({"conversations": '[{"from": "human", "from": "gpt", "value": "x"}]'}, "occurs twice"),
    "a chat with NaN": ({"conversations": '[{"from": "human", "value": NaN}, {"from": "gpt", "value": "x"}]'}, "NaN"),
    "a chat with NUL": ({"conversations": json.dumps([{"from": "human", "value": "a\0"}, {"from": "gpt", "value": "x"}])}, "NUL"),
    "a question with a duplicate key": ({"question": '[{"role": "user", "role": "user", "content": "x"}]', "answer": "y"}, "occurs twice"),
    "an answer with NUL": ({"question": "x", "answer": json.dumps([{"role": "assistant", "content": "a\0"}])}, "NUL"),
    "two ways to read a row": ({"prompt": "a", "query": "b", "response": "c"}, "not clear which columns"),
    "a label": ({"prompt": "a", "completion": "b", "label": False}, "labelled good or bad"),
    "a pair": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "pair of answers"),
}


@pytest.mark.parametrize("name", each(DATA))
def test_a_bad_file_is_refused_with_its_place(folder: Path, tmp_path: Path, name: str) -> None:
    file, content, pattern = DATA[name]
    (tmp_path / file).write_bytes(content)
    refused(folder, pattern, f"data.train_files={tmp_path / file}")


@pytest.mark.parametrize("name", each(CHATS))
def test_a_bad_chat_is_refused_with_its_row_and_message(folder: Path, tmp_path: Path, name: str) -> None:
    value, pattern = CHATS[name]
    (tmp_path / "chats.jsonl").write_bytes(lines(chat_row(*CHAT), value))
    refused(folder, rf"chats\.jsonl:2(?s:.*)({pattern})", f"data.train_files={tmp_path / 'chats.jsonl'}", "data.messages_key=messages")


@pytest.mark.parametrize("name", each(RECOGNISED))
def test_a_bad_row_of_a_recognised_shape_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    value, pattern = RECOGNISED[name]
    (tmp_path / "rows.jsonl").write_bytes(lines(value))
    refused(folder, rf"rows\.jsonl:1(?s:.*)({pattern})", f"data.train_files={tmp_path / 'rows.jsonl'}")


@pytest.mark.parametrize(
    ("value", "pattern"),
    [('{"q": "a", "q": "b"}', "occurs twice"), ('{"q": NaN}', "NaN"), ('{"q": "a\\u0000"}', "NUL"), ('{"q": 1e999}', "too large")],
)
def test_json_text_that_a_path_reads_is_checked_too(folder: Path, tmp_path: Path, value: str, pattern: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines({"extra": value, "answer": "x"}))
    refused(folder, pattern, f"data.train_files={tmp_path / 'rows.jsonl'}", "data.prompt_key=extra.q")


def _directory(place: Path) -> Path:
    (place / "rows").mkdir()
    (place / "rows" / "a.jsonl").write_bytes(lines(GOOD))
    return place / "rows"


def _unreadable(place: Path) -> Path:
    (place / "a.jsonl").write_bytes(lines(GOOD))
    (place / "a.jsonl").chmod(0)
    return place / "a.jsonl"


def _link(place: Path, target: str) -> Path:
    (place / "a.jsonl").symlink_to(target)
    return place / "a.jsonl"


def _pipe(place: Path) -> Path:
    os.mkfifo(place / "a.jsonl")
    return place / "a.jsonl"


def _socket(place: Path) -> Path:
    os.chdir(place)  # a socket's name is short
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind("a.jsonl")
    return place / "a.jsonl"


def _parquet(place: Path, table: Any) -> Path:
    pq.write_table(table, place / "a.parquet")
    return place / "a.parquet"


PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "D2 missing": (lambda p: p / "trian.jsonl", "no file"),
    "D2 missing folder": (lambda p: p / "no" / "train.jsonl", "there is no folder"),
    "D2 misspelt": (lambda p: ((p / "train.jsonl").write_bytes(lines(GOOD)), p / "trian.jsonl")[1], "did you mean"),
    "D3 directory": (_directory, "is a directory(?s:.*)name its files with a glob"),
    "D3 empty directory": (lambda p: ((p / "d").mkdir(), p / "d")[1], "is a directory"),
    "D4 glob": (lambda p: p / "*.jsonl", "no file matches"),
    "D6 loop": (lambda p: _link(p, "a.jsonl"), "cannot be opened|link"),
    "D6 dangling": (lambda p: _link(p, "gone"), "is a link to 'gone'"),
    "D7 pipe": (_pipe, "not a regular file"),
    "D7 device": (lambda p: "/dev/zero", "not a regular file"),
    "D7 socket": (_socket, "not a regular file"),
    "an address": (lambda p: "https://example.com/a.jsonl", "is an address"),
    "two files in one text": (lambda p: "a.jsonl,b.jsonl", "one text with 2 files"),
    "no name": (lambda p: "''", "data.train_files"),
    "an empty list": (lambda p: "[]", "names no file"),
    "a number": (lambda p: "[3]", "data.train_files"),
    "a list in a list": (lambda p: "[[a.jsonl]]", "data.train_files"),
    "a share of nothing": (lambda p: f"[{{path: {p}, weight: 0}}]", "weight"),
    "an unknown share": (lambda p: f"[{{path: {p}, wieght: 1}}]", "wieght|weight"),
    "a file name with NUL": (lambda p: '"a\\0.jsonl"', "NUL"),
    "D38 no rows": (lambda p: _parquet(p, pa.table({"question": pa.array([], pa.string())})), "no rows"),
    "D38 other columns": (lambda p: _parquet(p, pa.table({"q": ["a"]})), "is missing"),
    "D38 bytes for text": (lambda p: _parquet(p, pa.table({"question": [b"\xff"], "answer": ["x"]})), "question"),
    "D38 null": (lambda p: _parquet(p, pa.table({"question": ["a"], "answer": pa.array([None], pa.string())})), "null"),
    "D38 nested": (lambda p: _parquet(p, pa.table({"question": [[["a"]]], "answer": ["x"]})), "question"),
}


@pytest.mark.parametrize("name", each(PLACES))
def test_a_name_that_names_no_rows_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    make, pattern = PLACES[name]
    monkeypatch.chdir(tmp_path)
    refused(folder, pattern, f"data.train_files={make(tmp_path)}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read any file")
def test_a_file_that_may_not_be_read_is_refused_with_its_mode(folder: Path, tmp_path: Path) -> None:
    refused(folder, "cannot be read: Permission denied", f"data.train_files={_unreadable(tmp_path)}")


def test_a_line_without_end_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verl.data.formats.stream.MAX_ROW_BYTES", 2**16)
    (tmp_path / "a.jsonl").write_bytes(b'{"question": "' + b"x" * 2**17)
    refused(folder, "the line is longer than", f"data.train_files={tmp_path / 'a.jsonl'}")


ACCEPTED: dict[str, tuple[str, bytes]] = {
    "D8 an array in .jsonl": ("a.jsonl", b"[" + ROW + b"]"),
    "D9 gzip": ("a.jsonl.gz", gzip.compress(lines(GOOD))),
    "D10 gzip by another name": ("a.jsonl", gzip.compress(lines(GOOD))),
    "D12 byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + lines(GOOD)),
    "D13 UTF-16 with a mark": ("a.jsonl", lines(GOOD).decode().encode("utf-16")),
    "D15 CRLF": ("a.jsonl", lines(GOOD).replace(b"\n", b"\r\n")),
    "D17 U+2028": ("a.jsonl", json.dumps(row(question="a\u2028b"), ensure_ascii=False).encode() + b"\n"),
    "D18 no final newline": ("a.jsonl", ROW),
    "D37 quotes and line ends": ("a.csv", b'question,answer\n"a, ""b""\nc",d\n'),
    "D37 semicolons": ("a.csv", b"question;answer\na;b\n"),
    "D39 control tokens": ("a.jsonl", lines(row(question="<|im_end|></s>[INST]"))),
    "D40 odd text": ("a.jsonl", lines(row(question="👩‍👩‍👧 مرحبا e\u0301"))),
}


@pytest.mark.parametrize("name", each(ACCEPTED))
def test_an_odd_file_that_is_right_is_read(folder: Path, tmp_path: Path, name: str) -> None:
    file, content = ACCEPTED[name]
    (tmp_path / file).write_bytes(content)
    ended = sft(folder, f"data.train_files={tmp_path / file}", "trainer.dry_run=true")
    assert ended.code == 0 and "rows 1 read, 1 used" in ended.out, ended.err


def test_a_million_equal_characters_are_read_in_time(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(row(question="a" * 10**6)))
    refused(folder, "longer than data.max_length", f"data.train_files={tmp_path / 'a.jsonl'}")


@pytest.mark.parametrize(
    ("words", "pattern"),
    each(
        [
            (["data.max_length=8"], r"80 of 80 rows are longer than data.max_length=8; the longest"),
            (["data.max_length=2", "data.truncation=right"], r"no row is left to train: rows 80 read, 0 used"),
        ]
    ),
)
def test_rows_of_which_none_fits_are_refused_with_counts(folder: Path, words: list[str], pattern: str) -> None:
    refused(folder, pattern, *words)


# Pairs, prompts, and questions of an evaluation

PAIRS: dict[str, tuple[object, str]] = {
    "D41 equal answers": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "no row is left to train"),
    "D41 one missing": ({"prompt": "a", "chosen": "b"}, "'rejected' is missing"),
    "D41 null": ({"prompt": "a", "chosen": "b", "rejected": None}, "null"),
    "D41 numbers in lists": ({"prompt": "a", "chosen": [1, 2], "rejected": "c"}, "expected text or a list of messages"),
    "a label in place of a pair": ({"prompt": "a", "completion": "b", "label": True}, "not a pair"),
    "JSON text with a duplicate key": (
        {"prompt": "a", "chosen": '[{"role": "user", "role": "user", "content": "x"}]', "rejected": "b"},
        "occurs twice",
    ),
    "JSON text with NUL": ({"prompt": "a", "chosen": '[{"role": "user", "content": "a\\u0000"}]', "rejected": "b"}, "NUL"),
}


@pytest.mark.parametrize("name", each(PAIRS))
def test_a_bad_pair_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    value, pattern = PAIRS[name]
    (tmp_path / "pairs.jsonl").write_bytes(lines(value))
    words = sft_words(folder, f"data.train_files={tmp_path / 'pairs.jsonl'}")
    assert_refused(run_command(reward_trainer.main, words), pattern)


def ppo_words(folder: Path, *words: object) -> list[str]:
    return [
        f"data.train_files={folder / 'train.jsonl'}",
        f"model.partial_pretrain={folder / 'model'}",
        f"trainer.default_local_dir={folder / 'out'}",
        "rollout.max_new_tokens=8",
        "data.max_prompt_length=96",
        *map(str, words),
    ]


@pytest.mark.parametrize(
    ("rows", "words", "pattern"),
    each(
        [
            ([row(answer="no number")], [], "a.jsonl:1"),  # D42
            ([row(answer=None)], [], "null"),
            ([{"question": "x"}], [], "'answer' is missing"),
            ([GOOD], ["data.max_prompt_length=2"], "longer than data.max_prompt_length=2"),
            ([GOOD], ["data.max_prompt_length=2", "data.overlong_prompts=drop"], "longer than data.max_prompt_length=2"),
        ]
    ),
)
def test_bad_prompts_are_refused(folder: Path, tmp_path: Path, rows: list[object], words: list[str], pattern: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(*rows))
    assert_refused(run_command(ppo_trainer.main, ppo_words(folder, f"data.train_files={tmp_path / 'a.jsonl'}", *words)), pattern)


@pytest.mark.parametrize(
    ("words", "pattern"),
    each(
        [
            (["test_file=nowhere.jsonl"], "no file"),
            (["metric=gsm9k"], "gsm9k"),  # C22
            (["output_dir=/dev/null/x"], "output_dir=/dev/null/x: /dev/null is a file, so there can be no directory in it"),
            (["seed=-1"], "seed"),
            (["n=4"], "n=4 answers at temperature=0 are all equal"),
            (["rollout.name=natve"], "natve"),
            (["rollout.gpu_memory_utilization=1.5"], "rollout.gpu_memory_utilization"),
            (["model_path="], "the name of the model is empty|model_path"),
            (["max_new_tokens=99999999999"], "too large"),
            (["reward.name=x"], "reward.name"),
        ]
    ),
)
def test_a_bad_evaluation_is_refused(folder: Path, tmp_path: Path, words: list[str], pattern: str) -> None:
    given = [f"model_path={folder / 'model'}", f"test_file={folder / 'test.jsonl'}", f"output_dir={tmp_path / 'results'}"]
    assert_refused(run_command(sft_evaluator.main, [*given, *words]), pattern)


@pytest.mark.parametrize(
    ("main", "words", "pattern"),
    each(
        [
            (chat.main, ["nowhere/at/all"], "no such model directory"),
            (chat.main, ["{model}", "temperature=hot"], "temperature"),
            (chat.main, ["{model}", "max_new_tokens=0"], "max_new_tokens"),
            (export.main, ["nowhere/at/all", "{out}"], "no such model directory"),
            (export.main, ["{model}"], "directory"),
            (export.main, ["{model}", "{model}"], "not empty"),
            (export.main, ["{model}", "{model}/config.json"], "is a file"),
            (export.main, ["{model}", "{out}", "dtype=int8"], "dtype"),
            (export.main, ["{model}", "{out}", "max_shard_size=5"], "max_shard_size"),
        ]
    ),
)
def test_a_bad_chat_or_export_is_refused(
    folder: Path, tmp_path: Path, main: Callable[[list[str]], object], words: list[str], pattern: str
) -> None:
    assert_refused(run_command(main, [word.format(model=folder / "model", out=tmp_path / "out") for word in words]), pattern)


# Settings

SETTINGS: dict[str, str] = {
    "optim.learing_rate=1": r"unknown key 'optim.learing_rate'(?s:.*)did you mean optim\.lr\?",
    "learning_rate=1": r"did you mean optim\.lr\?",
    "optim.weight_decya=1": "did you mean optim.weight_decay",
    "optim.xyzzy=1": "--help lists all keys",
    "data.lr=1": r"did you mean optim\.lr",
    "optim=1": "is a group of keys",
    "optim.lr": "'optim.lr' has no value",
    "--lr=1": r"there is no option '--lr=1'(?s:.*)write optim\.lr=1",
    "=1": "unknown key",
    "optim.lr=": "optim.lr",
    "optim.lr=auto": "optim.lr",
    "optim.lr=-1": "optim.lr",
    "optim.lr=.nan": "found nan",
    "optim.lr=.inf": "optim.lr",
    "optim.lr=[1]": "optim.lr",
    "optim.lr={a: 1}": "optim.lr",
    "optim.lr=true": "optim.lr",
    "optim.clip_grad=0": "optim.clip_grad",
    "optim.clip_grad=.nan": "optim.clip_grad",
    "optim.warmup_steps_ratio=2": "not a share",
    "optim.betas=[1,2,3]": "betas",
    "optim.betas=[[1,2],3]": "betas",
    "optim.betas=${trainer.seed}": "betas",
    "optim.betas=[${trainer.seed},0.9]": "betas",
    "optim.betas=0.9": "betas",
    "optim.name=adamx": "no optimizers named 'adamx'",
    "model.trust_remote_code=yes": "expected true or false",
    "model.trust_remote_code=on": "expected true or false",
    "model.trust_remote_code=1": "expected true or false",
    "model.trust_remote_code=maybe": "expected true or false",
    "model.trust_remote_code=null": "model.trust_remote_code",
    "data.packing=off": "expected true or false",
    "data.chat_template_kwargs={enable_thinking: no}": "expected true or false",
    "model.compile=yes": "expected true or false",
    "data.max_length=0": "data.max_length",
    "data.max_length=1.5": "data.max_length",
    "data.max_length=1e3": "data.max_length",
    "data.max_length=010x": "data.max_length",
    "data.max_length=1180591620717411303424": "too large",
    "data.train_batch_size=0": "data.train_batch_size",
    "data.train_max_samples=0": "data.train_max_samples",
    "data.num_workers=0": "data.num_workers",
    "data.max_tokens_per_micro_batch=1": "cannot hold a row",
    "data.prompt_key=": "data.prompt_key|column",
    "data.prompt_key=nope": "column 'nope' is missing",
    "data.messages_key=question": "not JSON",
    "data.truncation=middle": "one of error, left or right",
    "data.chat_template=nowhere.jinja": "no such file",
    "model.lora_rank=-1": "model.lora_rank",
    "model.lora_rank=8 model.lora_alpha=0": "model.lora_alpha",
    "model.lora_rank=8 model.lora_dropout=1": "model.lora_dropout",
    "model.lora_rank=8 model.target_modules=[nothing]": "nothing",
    "model.lora_rank=8 model.target_modules=[${trainer.seed}]": "target_modules",
    "model.lora_rank=8 model.target_modules=[[q_proj]]": "target_modules",
    "model.lora_rank=8 model.target_modules=(": "target_modules",
    "model.lora_adapter_path=nowhere": "nowhere",
    "model.strategy=zero3": "model.strategy",
    "model.attn_implementation=fa9": "model.attn_implementation",
    "model.compute_dtype=int4": "model.compute_dtype",
    "model.context_parallel_size=3": "model.context_parallel_size",
    "model.fsdp_config.shard_size=3": "shard_size",
    "trainer.seed=-1": "trainer.seed",
    "trainer.seed=1180591620717411303424": "too large",
    "trainer.seed=1.5": "trainer.seed",
    "trainer.total_epochs=0": "trainer.total_epochs",
    "trainer.total_training_steps=0": "trainer.total_training_steps",
    "trainer.save_freq=0": "trainer.save_freq",
    "trainer.save_freq=sometimes": "trainer.save_freq",
    "trainer.max_ckpt_to_keep=0": "trainer.max_ckpt_to_keep",
    "trainer.logger=[console,3]": "trainer.logger",
    "trainer.logger=${trainer.seed}": "trainer.logger",
    "trainer.logger=[${trainer.seed}]": "trainer.logger",
    "trainer.logger=[[console]]": "trainer.logger",
    "trainer.logger=wandbb": "wandbb",
    "trainer.resume_mode=maybe": "trainer.resume_mode",
    "trainer.resume_mode=resume_path": "do not go together",
    "data.chat_template_kwargs={a: {b.c: 1}}": "data.chat_template_kwargs: the name 'b.c' has a dot",
    "trainer.default_local_dir=/dev/null/x": "/dev/null/x",
    "trainer.default_local_dir=${nothing}": "nothing",
    "trainer.experiment_name=${oc.env:HOME}": r"supports only \$\{key\}",
    "trainer.experiment_name=${trainer.experiment_name}": "trainer.experiment_name",
    "trainer.experiment_name=hf_abcdefghijklmnopqrstuvwxyz012345": "looks like a secret",
    "trainer.project_name=sk-abcdefghijklmnopqrstuvwxyz012345": "looks like a secret",
    "model.partial_pretrain=${": "model.partial_pretrain",
    "trainer.profile_step=0": "trainer.profile_step",
    "model.partial_pretrain=~no-such-user/model": "there is no user of that name",
    "data.train_files=${0} data.train_file=x": "unknown key",
    "--config": "--config names no file",
    "--config=nowhere.yaml": "no such config file",
}


@pytest.mark.parametrize("words", each(SETTINGS))
def test_a_bad_setting_is_refused_with_its_key(folder: Path, words: str) -> None:
    given = [words] if "{a" in words or "{enable" in words else words.split(" ")
    refused(folder, SETTINGS[words], *given)


RL_SETTINGS: dict[str, str] = {
    "reward.name=[gsm8k,gsm8k]": "names 'gsm8k' twice",
    "reward.name=[]": "neither a reward nor a reward model",
    "reward.name=[3]": "reward.name",
    "reward.name=gsm9k": "gsm9k",
    "reward.weights=[1,2]": "2 weights for 1 rewards",
    "reward.weights=[.nan]": "found nan",
    "reward.weights=[[1]]": "reward.weights",
    "reward.weights=${trainer.seed}": "reward.weights",
    "reward.secrets=[[A]]": "reward.secrets",
    "reward.secrets=A": "reward.secrets",
    "reward.timeout_seconds=0": "reward.timeout_seconds",
    "algorithm.kl_coef=-1": "algorithm.kl_coef",
    "algorithm.name=gppo": "gppo",
    "algorithm.updates_per_step=7": "cannot be split into 7 equal updates",
    "rollout.max_new_tokens=0": "rollout.max_new_tokens",
    "rollout.temperature=0": "rollout.temperature",
    "rollout.samples_per_prompt=0": "rollout.samples_per_prompt",
    "rollout.gpu_memory_utilization=0": "rollout.gpu_memory_utilization",
    "rollout.max_new_tokens=5000": "do not fit into the model's",
    "data.prompts_per_step=0": "data.prompts_per_step",
    "mapping.actor=[x]": "mapping.actor",
    "mapping.actor=[9]": "mapping.actor",
    "algorithm.name=ppo critic.warmup_steps=99999": "train only the critic",
    "reward_model.path=nowhere/at/all": "no such model directory",
    "critic.partial_pretrain=nowhere/at/all algorithm.name=ppo": "no such model directory",
}


@pytest.mark.parametrize("words", each(RL_SETTINGS))
def test_a_bad_setting_of_reinforcement_learning_is_refused_with_its_key(folder: Path, words: str) -> None:
    assert_refused(run_command(ppo_trainer.main, ppo_words(folder, *words.split(" "))), RL_SETTINGS[words])


YAML: dict[str, tuple[str, str]] = {
    "C2 a key twice": ("optim:\n  lr: 1\n  lr: 2\n", r"config.yaml:3: not YAML: 'lr' is given twice, first on line 2"),
    "a section twice": ("optim:\n  lr: 1\noptim:\n  lr: 2\n", "'optim' is given twice"),
    "C5 yes": ("model:\n  trust_remote_code: yes\n", "expected true or false"),
    "C5 tab": ("optim:\n\tlr: 1\n", "not YAML"),
    "C20 a Python object": ("optim: !!python/object/apply:os.system [ls]\n", "not YAML"),
    "a list at the top": ("- 1\n", "expected keys and values"),
    "a text at the top": ("hello\n", "expected keys and values"),
    "a value with a wrong tag": ("optim:\n  lr: !!int x\n", "not YAML: a value cannot be read"),
    "a date with a wrong tag": ("trainer:\n  seed: !!timestamp x\n", "config.yaml"),
    "complex keys": ("? [a, b]\n: 1\n", "a key must be a text"),
    "a mapping as a key": ("? {a: b}\n: 1\n", "a key must be a text"),
    "nested deep": ("a: " + "[" * 5000 + "]" * 5000, "nested too deep"),
    "nested deep in mappings": ("".join(" " * n + f"k{n}:\n" for n in range(2000)), "nested too deep|k0"),
    "a value that contains itself": ("data:\n  train_files: &a [*a]\n", "contains itself"),
    "a mapping that contains itself": ("optim: &a\n  lr: *a\n", "contains itself"),
    "a bomb of aliases": (
        "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in itertools.pairwise("abcdefghi")),
        "more than",
    ),
    "an anchor that is missing": ("optim: *nothing\n", "not YAML"),
    "two documents": ("optim: {lr: 1}\n---\noptim: {lr: 2}\n", "second YAML document"),
    "not UTF-8": ("\udcff\udcfe", "cannot be read"),
    "NUL": ("optim:\n  lr: \0\n", "not YAML"),
    "an unknown section": ("optimm:\n  lr: 1\n", "unknown key 'optimm.lr'"),
    "a merge of nothing": ("<<: 3\n", "not YAML"),
    "a key that is null": ("null: 1\n", "unknown key"),
    "an empty key": ("'': 1\n", "unknown key"),
    "a set": ("data:\n  train_files: !!set {a, b}\n", "data.train_files"),
    "bytes": ("data:\n  train_files: !!binary aGVsbG8=\n", "data.train_files"),
}


@pytest.mark.parametrize("name", each(YAML))
def test_a_bad_file_of_settings_is_refused_with_its_line(folder: Path, tmp_path: Path, name: str) -> None:
    text, pattern = YAML[name]
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8", errors="surrogateescape")
    words = [
        f"--config={tmp_path / 'config.yaml'}",
        *(word for word in sft_words(folder) if "train_files" not in word or "bytes" not in name),
    ]
    words = [word for word in words if not (word.startswith("data.train_files") and "train_files" in text)]
    assert_refused(run_command(fsdp_sft_trainer.main, words), pattern)


# Models


def changed_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def cut(bytes_less: int) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - bytes_less)


def remove(*names: str) -> Callable[[Path], object]:
    return lambda folder: [path.unlink() for name in names for path in folder.glob(name)]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
EMBEDDING = "model.embed_tokens.weight"
INDEX = json.dumps({"weight_map": {EMBEDDING: "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}}).encode()


def nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[EMBEDDING].view(-1)[:] = float("nan")


def wide(tensors: dict[str, torch.Tensor]) -> None:
    tensors[EMBEDDING] = torch.zeros(len(tensors[EMBEDDING]), 3 + tensors[EMBEDDING].shape[1])


def token_id(folder: Path, part: str) -> None:
    found = json.loads((folder / "tokenizer.json").read_text())
    if part == "model":
        found["model"]["vocab"]["zzz"] = 2**31
    else:
        found["added_tokens"].append({**found["added_tokens"][0], "id": 2**31, "content": "<zzz>"})
    (folder / "tokenizer.json").write_text(json.dumps(found))


MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "config.json that is a list": (write("config.json", b"[]"), r"config\.json: is a list, expected an object"),
    "config.json that is text": (write("config.json", b'"qwen2"'), "is a text, expected an object"),
    "config.json that is null": (write("config.json", b"null"), "is null, expected an object"),
    "config.json that is empty": (write("config.json", b""), "is empty"),
    "config.json that is cut": (write("config.json", b'{"model_type": "qwen'), "is not JSON"),
    "config.json that is not UTF-8": (write("config.json", b"\xff\xfe{}"), "is not JSON"),
    "config.json that is a pointer": (write("config.json", POINTER), "Git LFS pointer"),
    "config.json without a type": (write("config.json", b"{}"), "cannot load the model|model_type"),
    "config.json of an unknown type": (lambda f: changed_config(f, model_type="qwen99"), "qwen99"),
    "hidden_size 0": (lambda f: changed_config(f, hidden_size=0), "hidden_size is 0, expected a positive number"),
    "hidden_size that is text": (lambda f: changed_config(f, hidden_size="64"), "hidden_size is '64'"),
    "no layers": (lambda f: changed_config(f, num_hidden_layers=0), "num_hidden_layers is 0"),
    "fewer than no layers": (lambda f: changed_config(f, num_hidden_layers=-2), "num_hidden_layers is -2"),
    "heads that do not divide": (
        lambda f: changed_config(f, num_attention_heads=7, head_dim=None),
        "not a multiple of num_attention_heads",
    ),
    "shared heads that do not divide": (
        lambda f: changed_config(f, num_attention_heads=6, num_key_value_heads=4),
        "not a multiple of num_key_value_heads",
    ),
    "a vocabulary of 0": (lambda f: changed_config(f, vocab_size=0), "vocab_size is 0"),
    "a vocabulary of 2**31": (lambda f: changed_config(f, vocab_size=2**31), "vocab_size is 2147483648, expected a number up to"),
    "a billion layers": (lambda f: changed_config(f, num_hidden_layers=10**9), "num_hidden_layers is 1000000000, expected a number up to"),
    "a billion labels": (lambda f: changed_config(f, num_labels=10**9), "num_labels is 1000000000, expected a number up to"),
    "labels that are text": (lambda f: changed_config(f, num_labels="x"), "num_labels is 'x'"),
    "shapes that differ": (weights(wide), "other shapes than config.json says"),
    "NaN": (weights(nan), rf"weight {EMBEDDING} has values that are not finite"),
    "a weight that is missing": (weights(lambda tensors: tensors.pop("model.norm.weight")), "model.norm.weight"),
    "no weights in the file": (weights(lambda tensors: tensors.clear()), "missing"),
    "weights that are a pointer": (write("model.safetensors", POINTER), r"model\.safetensors: is a Git LFS pointer"),
    "weights that are empty": (write("model.safetensors", b""), r"model\.safetensors: is empty"),
    "weights that are text": (write("model.safetensors", b"hello, world, this is text"), "not a safetensors file"),
    "weights of a broken header": (write("model.safetensors", (10).to_bytes(8, "little") + b"notjson!!!"), "its header is not JSON"),
    "weights that are cut by one byte": (cut(1), "is cut short"),
    "weights that are cut by half": (cut(10_000), "is cut short"),
    "weights with more bytes": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes() + b"\0"),
        "more bytes than its header says",
    ),
    "no weights": (remove("*.safetensors"), "safetensors"),
    "weights as .bin only": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "only as pytorch_model.bin"),
    "shards that are missing": (
        lambda f: (write("model.safetensors.index.json", INDEX)(f), remove("model.safetensors")(f)),
        "2 of its weight files are missing: model-00001-of-00002.safetensors",
    ),
    "an index that is a list": (
        lambda f: (write("model.safetensors.index.json", b"[]")(f), (f / "model.safetensors").rename(f / "model-1.safetensors")),
        "is a list",
    ),
    "an index of another folder": (
        lambda f: (
            write("model.safetensors.index.json", json.dumps({"weight_map": {"a": "../x.safetensors"}}).encode())(f),
            (f / "model.safetensors").rename(f / "model-1.safetensors"),
        ),
        "names a file of another folder",
    ),
    "no config.json": (remove("config.json"), "has no config.json"),
    "nothing at all": (remove("*"), "is an empty directory"),
    "no tokenizer": (remove("tokenizer*", "vocab*", "merges*"), "has no tokenizer"),
    "a tokenizer that is a pointer": (write("tokenizer.json", POINTER), "Git LFS pointer"),
    "a tokenizer that is empty": (write("tokenizer.json", b""), r"tokenizer\.json: is empty"),
    "a tokenizer that is cut": (write("tokenizer.json", b'{"version": "1.0", "model"'), "cannot load the tokenizer"),
    "a tokenizer that is something else": (write("tokenizer.json", b"{}"), "cannot load the tokenizer"),
    "a token id of 2**31": (lambda f: token_id(f, "model"), r"tokenizer\.json: has the token id 2147483648"),
    "an added token id of 2**31": (lambda f: token_id(f, "added_tokens"), r"tokenizer\.json: has the token id 2147483648"),
    "token ids beyond the embeddings": (
        lambda f: (
            weights(lambda tensors: tensors.update({EMBEDDING: tensors[EMBEDDING][:9].clone()}))(f),
            changed_config(f, vocab_size=9),
        ),
        "the tokenizer's highest id is",
    ),
}


@pytest.mark.parametrize("name", each(MODELS))
def test_a_bad_model_is_refused_with_its_file(folder: Path, tmp_path: Path, name: str) -> None:
    change, pattern = MODELS[name]
    shutil.copytree(folder / "model", tmp_path / "model")
    change(tmp_path / "model")
    refused(folder, pattern, f"model.partial_pretrain={tmp_path / 'model'}")


@pytest.mark.parametrize("content", [b"{{ '\xe9' }}", b"\xff\xfe{\0"])
def test_a_chat_template_that_is_not_utf8_is_refused(folder: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jinja").write_bytes(content)
    refused(folder, r"data\.chat_template=.*a\.jinja: cannot be read: 'utf-8'", f"data.chat_template={tmp_path / 'a.jinja'}")


def test_a_tokenizer_without_a_chat_template_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink(missing_ok=True)
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
    refused(folder, "chat template", f"model.partial_pretrain={tmp_path / 'model'}")


@pytest.mark.parametrize(
    ("name", "pattern"),
    each(
        [
            ("/no/such/model", "no such model directory"),
            ("./model-of-mine", "no such model directory"),
            ("models/qwen/base", "no such model directory"),
            ("checkpoints/", "no such model directory"),
            ("here/modle", r"no such model directory(?s:.*)did you mean here/model\?"),
            ("~nobody/model", "no such model directory"),
            ("train.jsonl", "is a file, not a directory"),
            ("here", "has no config.json"),
        ]
    ),
)
def test_a_missing_folder_is_not_asked_of_the_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, pattern: str
) -> None:
    (tmp_path / "here" / "model").mkdir(parents=True)
    (tmp_path / "train.jsonl").write_bytes(lines(GOOD))
    monkeypatch.chdir(tmp_path)
    refused(folder, pattern, f"model.partial_pretrain={name}")


# Calls from Python


@pytest.mark.parametrize(
    ("options", "pattern"),
    each(
        [
            ({"max_sequences": 0}, "max_sequences"),
            ({"max_sequences": "many"}, "max_sequences"),
            ({"max_positions": -1}, "max_positions"),
            ({"gpu_memory_utilization": 2.0}, "gpu_memory_utilization"),
            ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization"),
            ({"trust_remote_code": "no"}, "trust_remote_code"),
            ({"compile": "yes"}, "compile"),
            ({"url": 8000}, "url"),
            ({"url": "localhost"}, "url"),
        ]
    ),
)
def test_wrong_options_of_load_rollout_are_refused(folder: Path, options: dict[str, Any], pattern: str) -> None:
    import verl
    from verl.errors import UserError
    from verl.rollout import Options

    with pytest.raises(UserError, match=pattern):
        verl.load_rollout(folder / "model", options=Options(**options))


SETTINGS_FILES: dict[str, tuple[str, str]] = {
    "a default of another type": ("limit: int = 'many'", "limit"),
    "a default that its own check refuses": (
        "limit: int = -1\n    def check(self):\n        if self.limit < 0: raise ValueError('negative')",
        "negative",
    ),
    "a default that cannot be made": ("limit: list = field(default_factory=lambda: 1 / 0)", "division by zero"),
    "a list as default": ("limit: list = []", "mutable default"),
    "a type that no config has": ("limit: complex = 1j", "limit"),
    "a type that is not defined": ("limit: 'Missing' = 1", "Missing"),
}


@pytest.mark.parametrize("name", each(SETTINGS_FILES))
def test_a_bad_default_of_ones_own_settings_names_the_file(folder: Path, tmp_path: Path, name: str) -> None:
    body, pattern = SETTINGS_FILES[name]
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass, field\n@dataclass\nclass Settings:\n    "
        f"{body}\n\ndef score(prompt, response, row):\n    return 1.0\n"
    )
    assert_refused(run_command(ppo_trainer.main, ppo_words(folder, f"reward.name={tmp_path / 'mine.py'}")), rf"mine\.py(?s:.*)({pattern})")
