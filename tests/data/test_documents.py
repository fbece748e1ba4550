"""Files to documents: what is counted, cut, dropped and cached, and how errors of rows are gathered."""

import gzip
import io
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pytest
from pyarrow import parquet
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from verl.config.sft import DataConfig
from verl.data import cache, documents, source, tables
from verl.data.documents import Documents, load_documents
from verl.data.mixture import Mixture
from verl.data.render import Renderer
from verl.data.report import Report, show_first_row
from verl.data.tables import Columns
from verl.errors import UserError

ROWS = [{"question": f"What is {n} + 30?", "answer": "the cat " * n + f"sat.\n#### {n + 30}"} for n in range(1, 9)]


def write(path: Path, rows: Sequence[Mapping[str, object]] = ROWS) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(
    tmp_path: Path, files: object, tokenizer: PreTrainedTokenizerFast | None = None, samples: int | None = None, **keys: Any
) -> Documents:
    config = DataConfig(train_files=files, **{"cache_dir": str(tmp_path / "cache"), **keys})
    return load_documents(config, tables.Columns.of(config), files, tokenizer or families.chatml(), max_samples=samples)


def error_of(tmp_path: Path, files: object, **keys: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        load(tmp_path, files, **keys)
    return caught.value


def contents(loaded: Documents) -> list[tuple[list[int], list[bool]]]:
    return [(ids.tolist(), mask.tolist()) for ids, mask in map(loaded.document, range(len(loaded)))]


def rendered(rows: list[dict[str, str]] = ROWS) -> list[tuple[list[int], list[bool]]]:
    renderer = Renderer(families.chatml())
    chats = [[{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}] for row in rows]
    return [(document.input_ids, document.loss_mask) for document in map(renderer.chat, chats)]


def test_documents_are_the_rendered_rows(tmp_path: Path) -> None:
    loaded = load(tmp_path, write(tmp_path / "train.jsonl"))
    expected = rendered()
    assert contents(loaded) == expected
    assert loaded.lengths_N.tolist() == [len(ids) for ids, _ in expected]
    assert loaded.trained_N.tolist() == [sum(mask[1:]) for _, mask in expected]
    assert loaded.row_numbers_N.tolist() == list(range(8))
    assert loaded.stop_ids == [families.chatml().eos_token_id]
    ids, mask = loaded.document(3)
    assert (ids.dtype, mask.dtype, loaded.lengths_N.dtype, loaded.trained_N.dtype) == (np.int32, np.bool_, np.int32, np.int32)
    assert loaded.place(3) == f"{tmp_path}/train.jsonl:4"


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz")]
    write(files[0])
    files[1].write_text(json.dumps(ROWS))
    files[2].write_text("question,answer\r\n" + "".join(f'"{row["question"]}","{row["answer"]}"\r\n' for row in ROWS))
    parquet.write_table(pa.Table.from_pylist(ROWS), files[3])
    files[4].write_bytes(gzip.compress(files[0].read_bytes()))
    for path in files:
        assert contents(load(tmp_path, str(path))) == rendered(), path.name


def test_many_tables_are_one_row_of_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (documents, tables):
        monkeypatch.setattr(module, "ROWS_PER_TABLE", 3)
    loaded = load(tmp_path, write(tmp_path / "train.jsonl"), max_length=40, truncation="left")
    assert contents(loaded) == [(ids[-40:], mask[-40:]) for ids, mask in rendered()]
    assert loaded.trained_N.tolist() == [sum(mask[-40:][1:]) for _, mask in rendered()]
    assert [loaded.place(n) for n in (2, 3, 7)] == [f"{tmp_path}/train.jsonl:{line}" for line in (3, 4, 8)]


def test_other_processes_give_the_same_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BYTES_FOR_PROCESSES", 0)
    for module in (documents, tables):
        monkeypatch.setattr(module, "ROWS_PER_TABLE", 2)
    path = write(tmp_path / "train.jsonl")
    assert contents(load(tmp_path, path, num_workers=2)) == rendered()
    broken = write(tmp_path / "broken.jsonl", [*ROWS, {"question": "a"}])
    assert error_of(tmp_path, broken, num_workers=2).where == f"{broken}:9"


def test_only_the_first_rows_are_used(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [*ROWS, {"question": None}])
    assert contents(load(tmp_path, path, samples=3)) == rendered()[:3]
    assert load(tmp_path, path, samples=8).report.read == 8
    for everything in (None, -1):
        with pytest.raises(UserError, match="is null"):
            load(tmp_path, path, samples=everything)


# Columns


def test_chats_with_tools_and_plain_text_are_read_by_their_columns(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tokenizer = families.chatml("{% if tools %}{{ tools | tojson }}{% endif %}" + families.CHATML)
    renderer = Renderer(tokenizer)
    as_chat, with_tools = renderer.chat(chat), renderer.chat(chat, [{"name": "f"}])
    path = write(tmp_path / "chat.jsonl", [{"messages": chat, "tools": None}, {"messages": json.dumps(chat), "tools": '[{"name": "f"}]'}])
    loaded = load(tmp_path, path, tokenizer, messages_key="messages", tools_key="tools")
    assert contents(loaded) == [(as_chat.input_ids, as_chat.loss_mask), (with_tools.input_ids, with_tools.loss_mask)]
    text = renderer.text("the cat\nsat")
    whole = load(tmp_path, write(tmp_path / "text.jsonl", [{"body": "the cat\nsat"}]), text_key="body")
    assert contents(whole) == [(text.input_ids, text.loss_mask)]
    (tmp_path / "book.txt").write_text("the cat\nsat\n\n\nthe cat\nsat\n")
    for key in (None, "messages"):
        book = load(tmp_path, str(tmp_path / "book.txt"), messages_key=key)
        assert contents(book) == [(text.input_ids, text.loss_mask)] * 2
        assert book.stop_ids == [families.chatml().eos_token_id]


def test_every_token_that_ends_what_is_trained_is_a_stop_token(tmp_path: Path) -> None:
    tokenizer = families.llama3()
    tokenizer.eos_token = "<|end_of_text|>"
    (tmp_path / "book.txt").write_text("the cat\n\nsat")
    loaded = load(tmp_path, [write(tmp_path / "chat.jsonl"), str(tmp_path / "book.txt")], tokenizer)
    assert tokenizer.convert_ids_to_tokens(loaded.stop_ids) == ["<|eot_id|>", "<|end_of_text|>"]


def test_plain_text_needs_no_chat_template_and_chats_do(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("the cat")
    assert len(load(tmp_path, str(tmp_path / "book.txt"), families.chatml(None))) == 1
    with pytest.raises(UserError, match="no chat template") as caught:
        load(tmp_path, write(tmp_path / "train.jsonl"), families.chatml(None))
    assert "data.chat_template=path/to/template.jinja" in caught.value.fix


def test_plain_text_is_said_to_be_trained_whole(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("one\n\ntwo\n")
    assert load(tmp_path, tmp_path / "a.md").report.notes[0].startswith("read as plain text, every token is trained: 2 rows, the first ")


@pytest.mark.parametrize(
    ("row", "keys", "message"),
    [
        (
            {"qestion": "a", "answer": "b"},
            {},
            ":9: column 'question' is missing (found: qestion, answer)\n  fix: did you mean data.prompt_key=qestion?",
        ),
        ({"question": "a", "answer": None}, {}, ":9: column 'answer' is null"),
        ({"question": "a", "answer": True}, {}, ":9: column 'answer' is a boolean (True), expected text"),
        ({"question": "a", "answer": "  "}, {}, ":9: column 'answer' is empty"),
        (
            {"question": "a", "answer": "b", "m": [{"role": "user", "content": True}]},
            {"messages_key": "m"},
            ": messages[0].content: found a boolean (True)",
        ),
    ],
)
def test_a_row_that_is_not_right_stops_with_its_place(tmp_path: Path, row: dict[str, object], keys: dict[str, str], message: str) -> None:
    good = {"question": "a", "answer": "b", "m": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = write(tmp_path / "train.jsonl", [*[good] * 8, row])
    error = error_of(tmp_path, path, **keys)
    assert str(error).startswith(f"{path}:9")
    assert message in str(error)
    assert not list((tmp_path / "cache").rglob("*.*"))


def test_errors_of_rows_are_gathered_up_to_ten(tmp_path: Path) -> None:
    lines = [json.dumps({"question": "a", "answer": "b"})] * 20
    for number in range(0, 20, 2):
        lines[number] = '{"question": "a"}' if number % 4 else "{"
    (tmp_path / "train.jsonl").write_text("\n".join([*lines, "{", ""]))
    error = error_of(tmp_path, str(tmp_path / "train.jsonl"))
    assert error.where == "data.train_files"
    first, *shown = error.what.splitlines()
    assert first == "11 of the first 21 rows are invalid:"
    assert shown[0] == f"  {tmp_path}/train.jsonl:1: not JSON: Expecting property name enclosed in double quotes at column 2"
    assert shown[1] == f"  {tmp_path}/train.jsonl:3: column 'answer' is missing (found: question)"
    assert [line.split(":")[1] for line in shown[:10]] == [str(number) for number in range(1, 20, 2)]
    assert shown[10:] == ["  and 1 more"]
    assert "set data.response_key to the right column" in error.fix and "one object per line" in error.fix


def test_one_error_of_many_rows_is_told_once(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [{"question": "a"}] * 6)
    error = error_of(tmp_path, path)
    assert error.what == "column 'answer' is missing (found: question), as in 5 more of the first 6 rows"
    assert error.where == f"{path}:1"


def test_many_errors_end_the_reading_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROWS_PER_TABLE", 16)
    path = write(tmp_path / "train.jsonl", [{"question": "a"}] * 100)
    assert error_of(tmp_path, path).what.endswith(", as in 15 more of the first 16 rows")


# Length


def test_rows_that_are_too_long_stop_with_their_count_and_the_longest(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl")
    lengths = [len(ids) for ids, _ in rendered()]
    limit = sorted(lengths)[-3]
    error = error_of(tmp_path, path, max_length=limit)
    longest = int(np.argmax(lengths))
    assert error.what == (
        f"2 of 8 rows are longer than data.max_length={limit}; the longest has {lengths[longest]} tokens ({path}:{longest + 1})"
    )
    assert f"data.max_length={lengths[longest]}" in error.fix and "data.truncation=right" in error.fix
    assert load(tmp_path, path, max_length=max(lengths)).report.cut == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_long_rows_are_cut_on_the_side_that_was_named(tmp_path: Path, side: str) -> None:
    limit = 30
    loaded = load(tmp_path, write(tmp_path / "train.jsonl"), max_length=limit, truncation=side)
    cut = [(ids[-limit:], mask[-limit:]) if side == "left" else (ids[:limit], mask[:limit]) for ids, mask in rendered()]
    kept = [number for number, (_, mask) in enumerate(cut) if any(mask[1:])]
    assert contents(loaded) == [cut[number] for number in kept]
    assert loaded.row_numbers_N.tolist() == kept
    assert loaded.trained_N.tolist() == [sum(cut[number][1][1:]) for number in kept]
    assert loaded.report.cut == sum(len(rendered()[number][0]) > limit for number in kept)
    assert loaded.report.tokens == sum(len(ids) for ids, _ in contents(loaded))
    assert loaded.report.trained_tokens == loaded.trained_N.sum()
    stop = families.chatml().eos_token_id
    assert loaded.stop_ids == [stop]  # though right truncation has cut it off
    assert all((ids[-2] == stop) == (side == "left" or len(ids) < limit) for ids, _ in contents(loaded))


def test_rows_with_nothing_left_to_train_are_dropped_and_counted(tmp_path: Path) -> None:
    prompt = min(mask.index(True) for _, mask in rendered())
    path = write(tmp_path / "train.jsonl", [*ROWS, {"question": "a " * 200, "answer": "b"}])
    loaded = load(tmp_path, path, max_length=prompt + 5, truncation="right")
    assert (loaded.report.read, loaded.report.used) == (9, 8)
    assert loaded.report.dropped == {documents.NOTHING_TRAINED: 1}
    assert "1 dropped (1 without a trained token within data.max_length)" in str(loaded.report)
    error = error_of(tmp_path, path, max_length=prompt, truncation="right")
    assert "no row is left to train: rows 9 read, 0 used" in error.what
    # The wrong way: the row is kept, and its loss is 0 / 0.
    whole = load(tmp_path, path)
    assert not whole.document(8)[1][: prompt + 5].any() and all(trained > 0 for trained in loaded.trained_N)


@pytest.mark.parametrize("limit", [30, 60, 8192])
def test_every_row_is_used_or_counted_among_the_dropped(limit: int, tmp_path: Path) -> None:
    rows = [*ROWS, {"question": "a " * 40, "answer": "b"}]
    report = load(tmp_path, write(tmp_path / "train.jsonl", rows), max_length=limit, truncation="right").report
    dropped = 1 if limit < 8192 else 0
    assert (unaccounted(report), sum(report.dropped.values())) == (0, dropped)
    assert f"rows 9 read, {9 - dropped} used" in str(report) and f"{dropped} dropped" in str(report)
    assert unaccounted(replace(report, used=8, dropped={})) == 1, "a row that is dropped without a count would not be seen"


def unaccounted(report: Report) -> int:
    return report.read - report.used - sum(report.dropped.values())


def test_the_first_token_of_a_document_is_never_predicted(tmp_path: Path) -> None:
    loaded = load(tmp_path, write(tmp_path / "train.jsonl", [{"text": "the cat"}]), text_key="text")
    (_, mask) = loaded.document(0)
    assert mask.all()
    assert loaded.trained_N.tolist() == [len(mask) - 1]
    # Of "…#### 31<|im_end|>\n" the last three tokens are left: "1", the stop token, and the line end, which is not trained.
    cut = load(tmp_path, write(tmp_path / "long.jsonl"), max_length=3, truncation="left")
    assert [mask for _, mask in contents(cut)] == [[True, True, False]] * 8
    assert cut.trained_N.tolist() == [1] * 8


# The cache


def arrow_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "documents").iterdir())


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("the rows were tokenized again")


def test_rows_are_tokenized_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "train.jsonl")
    first = load(tmp_path, path)
    monkeypatch.setattr(documents, "tokenized", refuse)
    again = load(tmp_path, path)
    assert contents(again) == contents(first)
    assert (again.fingerprint, again.report, again.stop_ids) == (first.fingerprint, first.report, first.stop_ids)
    shorter = load(tmp_path, path, max_length=30, truncation="left")  # cutting needs no tokenizing
    assert shorter.fingerprint != first.fingerprint
    assert [file.suffix for file in arrow_files(tmp_path)] == [".arrow"]


def test_whatever_changes_the_tokens_makes_a_new_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "train.jsonl")
    fingerprints = [load(tmp_path, path).fingerprint, load(tmp_path, path, samples=3).fingerprint]
    fingerprints.append(load(tmp_path, path, response_key="question").fingerprint)
    fingerprints.append(load(tmp_path, path, families.chatml(families.CHATML + "{# a note #}")).fingerprint)
    fingerprints.append(load(tmp_path, path, families.qwen3()).fingerprint)
    write(tmp_path / "train.jsonl", ROWS[::-1])
    changed = load(tmp_path, path)
    assert contents(changed) == rendered()[::-1]
    fingerprints.append(changed.fingerprint)
    monkeypatch.setattr(documents, "_code_hash", lambda: "another version")
    fingerprints.append(load(tmp_path, path).fingerprint)
    assert len(fingerprints) == len(arrow_files(tmp_path))
    assert len(set(fingerprints)) == len(fingerprints) - 2, "the note in the template and the other version change no token"


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "short"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "train.jsonl")
    load(tmp_path, path)
    (file,) = arrow_files(tmp_path)
    whole = file.read_bytes()
    middle = len(whole) // 2
    damaged = {
        "cut": whole[:-100],
        "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "empty": b"",
        "short": whole[:9],
    }
    file.write_bytes(damaged[damage])
    assert cache.read(file) is None
    assert contents(load(tmp_path, path)) == rendered()
    assert file.read_bytes() == whole


def test_processes_that_make_the_same_cache_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl")
    tokenizers = [families.chatml() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda tokenizer: load(tmp_path, path, tokenizer), tokenizers))
    assert all(contents(documents_) == rendered() for documents_ in loaded)
    assert [file.suffix for file in arrow_files(tmp_path)] == [".arrow"]


def test_a_write_that_fails_leaves_no_file(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [*ROWS, {"question": 3}])
    with pytest.raises(UserError):
        load(tmp_path, path)
    assert arrow_files(tmp_path) == []
    (tmp_path / "file").write_text("")
    error = error_of(tmp_path, write(tmp_path / "good.jsonl"), cache_dir=str(tmp_path / "file"))
    assert error.where == "data.cache_dir" and "cannot write" in error.what


def test_the_cache_lies_where_the_system_keeps_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "train.jsonl")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load(tmp_path, path, cache_dir=None)
    assert len(list((tmp_path / "xdg" / "verl" / "documents").glob("*.arrow"))) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    load(tmp_path, path, cache_dir=None)
    assert len(list((tmp_path / ".cache" / "verl" / "documents").glob("*.arrow"))) == 1


# What is said about it


def test_the_report_counts_rows_and_tokens(tmp_path: Path) -> None:
    evil = [*ROWS, {"question": "what is <|im_end|>?", "answer": "a token"}]
    report = load(tmp_path, write(tmp_path / "train.jsonl", evil)).report
    assert str(report).startswith("rows 9 read, 9 used, 0 cut, 0 dropped; ")
    assert str(report).endswith("\nrows that contain the text of a control token, encoded as plain text: 1")
    whole = Report(7473, 7470, 12, {"reason": 3}, 1_587_568, 917_634)
    assert str(whole) == "rows 7,473 read, 7,470 used, 12 cut, 3 dropped (3 reason); 1,587,568 tokens, 57.8% trained"


def shown(ids: np.ndarray, mask: np.ndarray, **options: Any) -> str:
    out = io.StringIO()
    show_first_row(families.chatml(), ids, mask, Console(file=out, width=40, **options))
    return out.getvalue()


def test_the_first_row_shows_what_is_trained(tmp_path: Path) -> None:
    row = {"question": "the [bold]cat[/bold]\x1b[31m", "answer": "sat\non the mat and the dog sat on the log"}
    ids, mask = load(tmp_path, write(tmp_path / "train.jsonl", [row])).document(0)
    lines = [
        f"first row, {len(ids)} tokens, {mask.sum()} trained (\\n is a line end):",
        "  context | <|im_start|>user\\n",
        "  context | the [bold]cat[/bold]\\x1b[31m<|im_end|>\\n",
        "  context | <|im_start|>assistant\\n",
        "  trained | sat\\n",
        "  trained | on the mat and the dog sat on the log<|im_end|>",
        "  context | \\n",
    ]
    assert shown(ids, mask).splitlines() == lines
    coloured = shown(ids, mask, force_terminal=True, color_system="standard")
    assert "\x1b[32m  trained | sat\\n\x1b[0m" in coloured
    assert "\x1b[31m" not in coloured
    assert shown(ids, np.roll(mask, -1)).splitlines() != lines  # the wrong way: a mask one token early


def test_the_answers_of_a_pair_are_shown_by_their_names(tmp_path: Path) -> None:
    ids, mask = load(tmp_path, write(tmp_path / "train.jsonl", [{"question": "the cat", "answer": "sat"}])).document(0)
    out = io.StringIO()
    show_first_row(families.chatml(), ids, mask, Console(file=out, width=40), name="rejected")
    assert "  context | the cat<|im_end|>\\n\n" in out.getvalue() and "  rejected | sat<|im_end|>\n" in out.getvalue()


def test_of_a_long_first_row_the_middle_is_left_out(tmp_path: Path) -> None:
    ids, mask = load(tmp_path, write(tmp_path / "train.jsonl", [{"text": "the cat " * 1000}]), text_key="text", max_length=8192).document(0)
    assert "more characters" in shown(ids, mask)
    assert len(shown(ids, mask)) < 2000


def test_numbers_that_were_taken_as_text_are_said_from_the_cache_too(tmp_path: Path) -> None:
    path = write(
        tmp_path / "train.jsonl", [{"question": "a", "answer": "b"}, {"question": "a", "answer": 42}, {"question": 1, "answer": 43}]
    )
    for _ in range(2):
        assert load(tmp_path, path).report.notes == [
            f"column 'answer': numbers taken as text: 2 rows, the first {path}:2 (42)",
            f"column 'question': numbers taken as text: 1 row, the first {path}:3 (1)",
        ]


def test_documents_of_a_mixture_say_their_shares_and_have_another_fingerprint(tmp_path: Path) -> None:
    for name, rows in (("a", 8), ("b", 4)):
        lines = [json.dumps({"question": f"{name} {i}", "answer": "x" * (i + 1)}) for i in range(rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    a, b = (str(tmp_path / f"{name}.jsonl") for name in "ab")
    plain = load(tmp_path, [a, b])
    mixed = load(tmp_path, [{"path": a, "weight": 0.5}, b])
    again = load(tmp_path, [{"path": a, "rows": 3}, b])
    assert plain.choice is None and not plain.report.notes
    assert isinstance(mixed.choice, Mixture) and mixed.choice.per_epoch_E == (2, 4)
    assert f"mixture: an epoch has 6 rows: 2 of 8 from {a} (33% of the rows" in str(mixed.report)
    assert len({plain.fingerprint, mixed.fingerprint, again.fingerprint}) == 3
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 1  # the shares need no new tokenizing


def test_a_column_that_nobody_reads_does_not_start_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"question": ["2+2?"] * 3, "answer": ["4"] * 3, "other": [f"{i}" * 5000 for i in range(3)]})
    parquet.write_table(table, tmp_path / "a.parquet", compression="none", use_dictionary=False)
    for module, name in ((source, "LARGE_BYTES"), (tables, "BYTES_FOR_PROCESSES")):
        monkeypatch.setattr(module, name, 10_000)
    monkeypatch.setattr(tables, "_in_processes", None)
    config = DataConfig(train_files=str(tmp_path / "a.parquet"), cache_dir=str(tmp_path / "cache"))
    assert len(load_documents(config, Columns.of(config), config.train_files, families.chatml())) == 3
