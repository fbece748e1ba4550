"""`verl inspect`: what it says of rows is what the trainers make of them, whatever the rows are."""

import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import ROOT
from rich.console import Console
from tiny import write_problems_and_model

import verl
from verl.cli import app
from verl.config.load import load_config
from verl.config.sft import SFTConfig
from verl.data.documents import load_documents
from verl.data.tables import Columns
from verl.inspection import near, scan, terminal
from verl.inspection.characters import CONTROL, ENTITIES, GARBLED, INVISIBLE, LOST, PRIVATE, RETURNS, odd_characters
from verl.inspection.copies import ASKED, EXACT, NEARLY, SHARED
from verl.inspection.examine import is_drawn
from verl.inspection.lengths import lengths_of
from verl.inspection.page import page
from verl.inspection.result import Finding, Inspection
from verl.inspection.words import printable
from verl.models.load import load_tokenizer

SCRIPT = "</pre></script><script>document.title='taken'</script><img src=x onerror=alert(1)>\"' &amp;"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_problems_and_model(tmp_path_factory.mktemp("inspected"), 60, 20)


@pytest.fixture
def inspected(folder: Path, tmp_path: Path) -> Any:
    def inspect(data: list[Any], *words: str, validation: list[Any] | None = None, **options: Any) -> Inspection:
        given = [f"data.train_files={write(tmp_path / 'train.jsonl', data)}", f"model.partial_pretrain={folder / 'model'}"]
        if validation is not None:
            given.append(f"data.val_files={write(tmp_path / 'val.jsonl', validation)}")
        return verl.inspect_data(*given, *words, **options)

    return inspect


def write(path: Path, rows: list[Any]) -> Path:
    lines = (row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows)
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def row(question: str, answer: str) -> dict[str, str]:
    return {"question": question, "answer": answer}


def whats(findings: list[Finding]) -> list[str]:
    return [finding.what for finding in findings]


def test_its_counts_are_those_of_the_documents_that_are_trained(folder: Path, tmp_path: Path) -> None:
    words = [f"data.train_files={folder / 'train.jsonl'}", f"model.partial_pretrain={folder / 'model'}", f"data.cache_dir={tmp_path}"]
    words += ["data.max_length=60", "data.truncation=right", "data.train_batch_size=8"]
    found, config = verl.inspect_data(*words), load_config(SFTConfig, words)
    tokenizer = load_tokenizer(str(folder / "model"), trust_remote_code=False, chat_template=None, chat_template_kwargs={})
    trained = load_documents(config.data, Columns.of(config.data), config.data.train_files, tokenizer)
    report, train = trained.report, found.train
    assert (train.rows, train.used, train.cut, train.tokens, train.trained_tokens) == (
        *(report.read, report.used, report.cut),
        *(report.tokens, report.trained_tokens),
    )
    assert report.cut > 0
    assert sum(finding.rows for finding in train.dropped) == sum(report.dropped.values())
    assert found.steps.per_epoch == -(-report.used // 8)
    assert found.stop_tokens == tokenizer.convert_ids_to_tokens(trained.stop_ids)
    assert sum(one.documents for one in train.lengths.bins) == train.lengths.documents == report.read
    assert train.lengths.quantiles["100"] > 60  # before they are cut


def test_what_is_shown_as_trained_is_the_answer_with_its_stop_token(inspected: Any) -> None:
    (shown,) = inspected([row("What is 2 + 2?", "It is 4.")]).rows
    (document,) = shown.documents
    kinds = [(part.kind, part.text) for part in document.parts if part.kind in ("trained", "stop")]
    assert kinds == [("trained", "It is 4."), ("stop", "<|im_end|>")]
    assert "What is 2 + 2?" in "".join(part.text for part in document.parts if part.kind == "masked")
    assert (shown.number, shown.place.endswith("train.jsonl:1"), document.name) == (1, True, "row")


def test_each_invalid_row_is_counted_and_placed_by_its_reason(inspected: Any) -> None:
    rows = [
        row("a?", "b"),
        b'{"question": "no end',
        row("c?", ""),
        {"q": 1},
        b'{"question": "\xd6\xd0\xb9\xfa", "answer": "x"}',
        row("d?", ""),
    ]
    found = inspected(rows)
    by_what = {finding.what: finding for finding in found.train.invalid}
    assert by_what["column 'answer' is empty"].rows == 2
    assert [place.rpartition(":")[2] for place in by_what["column 'answer' is empty"].places] == ["3", "6"]
    assert sum(finding.rows for finding in found.train.invalid) == 5
    assert {place.rpartition(":")[2] for finding in found.train.invalid for place in finding.places} == {"2", "3", "4", "5", "6"}
    assert any("not UTF-8" in what for what in by_what)
    assert all(finding.fix for finding in found.train.invalid)
    assert found.train.used == 1


def test_rows_over_the_limit_stop_a_run_or_are_cut_as_the_settings_say(inspected: Any) -> None:
    rows = [row("short?", "yes"), row("long " * 400, "yes")]
    stops, cuts = inspected(rows, "data.max_length=100"), inspected(rows, "data.max_length=100", "data.truncation=left")
    assert whats(stops.train.invalid) == ["longer than data.max_length=100"]
    assert stops.train.invalid[0].places[0].endswith(":2")
    assert stops.train.used == 1
    assert (cuts.train.invalid, cuts.train.cut, cuts.train.used) == ([], 1, 2)
    dropped = inspected(rows, "data.max_length=100", "data.truncation=right").train.dropped
    assert whats(dropped) == ["without a trained token within data.max_length"]
    assert dropped[0].places[0].endswith(":2")


def test_copies_and_overlap_are_found_exact_and_near(inspected: Any) -> None:
    text = "A farmer has twelve red hens and five brown cows, and he sells three of the hens at the market on Monday. How many are left?"
    first, last = row(text, "9 hens and 5 cows are left."), row("中国的首都是哪里？请用一句话回答并说明理由", "北京是中国的首都")
    rows = [first, row("2+2?", "4"), first, row("2+2?", "It is 4."), row(text.replace("red ", ""), first["answer"]), last]
    near_chinese = row("中国的首都是哪里？请用一句话回答并说明理由。", "北京是中国的首都")
    found = inspected(rows, validation=[first, row("new?", "yes"), near_chinese])
    copies = {finding.what: finding for finding in found.train.copies}
    assert {what: one.places[0].rpartition(":")[2] for what, one in copies.items()} == {EXACT: "3", ASKED: "4", NEARLY: "5"}
    assert copies[NEARLY].example.count("train.jsonl") == 2
    overlap = {finding.what: finding.rows for finding in found.overlap}
    assert overlap[SHARED] == 1
    assert sum(overlap.values()) == 2  # the Chinese row, in which only a full stop differs
    assert not found.validation.copies


def test_different_rows_are_no_near_copies(inspected: Any, folder: Path) -> None:
    assert inspected([row(f"Tell me about {name}.", f"It is a {name}.") for name in ("tea", "snow", "iron", "wood")]).train.copies == []


def test_sketches_agree_with_the_exact_similarity() -> None:
    def shingles(words: list[str]) -> set[tuple[str, ...]]:
        return set(zip(words, words[1:], words[2:], strict=False))

    one = [f"word{number}" for number in range(300)]
    other = [*one[:270], *(f"other{number}" for number in range(30))]
    exact = len(shingles(one) & shingles(other)) / len(shingles(one) | shingles(other))
    estimated = (near.sketch(" ".join(one)) == near.sketch(" ".join(other))).mean()
    assert abs(estimated - exact) < 0.15
    assert (near.sketch("Hello,  WORLD again") == near.sketch("hello world, again!")).all()


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("plain text, naïve café, 中文。👩‍👧 नमस्ते می‌خواهم", []),
        ("lost \ufffd", [LOST]),
        ("bell \x07", [CONTROL]),
        ("line\r\n", [RETURNS]),
        ("zero\u200bwidth", [INVISIBLE]),
        ("turned \u202e", [INVISIBLE]),
        ("private \ue001", [PRIVATE]),
        ("cafÃ© and itâ€™s", [GARBLED]),
        ("锟斤拷锟斤拷", [GARBLED]),
        ("a &lt;b&gt;", [ENTITIES]),
        ("R&D and AT&T;", []),
    ],
)
def test_odd_characters_are_told_apart(text: str, kinds: list[str]) -> None:
    assert [kind for kind, _ in odd_characters(text)] == kinds


def test_garbled_text_is_shown_with_what_it_should_be() -> None:
    ((_, example),) = odd_characters("cafÃ© is open")
    assert "café is open" in example


def test_spelled_out_control_tokens_are_named_and_shown_as_text(inspected: Any) -> None:
    found = inspected([row("What does <|im_end|> mean?", "It ends a turn, as </s> does elsewhere.")])
    assert {finding.what for finding in found.train.control} == {"<|im_end|>", "</s>"}
    parts = found.rows[0].documents[0].parts
    assert [part.text for part in parts if part.kind == "spelled"] == ["<|im_end|>"]


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_hostile_rows_stay_text_in_the_page(inspected: Any) -> None:
    rows = [row(SCRIPT, f"{SCRIPT} \u202e\x1b[31m"), {SCRIPT: SCRIPT}, row(f"{SCRIPT} lost \ufffd <|im_end|>", SCRIPT), row(SCRIPT, SCRIPT)]
    found = inspected(rows, rows=[1, 2, 3])
    shown, html = Tags(), page(found)
    shown.feed(html)
    assert not {"script", "img", "iframe", "object", "link", "a", "form"} & set(shown.tags)
    assert not [name for name in shown.attributes if name.startswith("on")]
    assert SCRIPT in "".join(shown.texts)  # as it is in the data
    assert "\u202e" not in html
    assert "\x1b" not in html
    assert "default-src 'none'" in html
    assert "http:" not in html
    assert "https:" not in html


def test_a_page_that_escapes_nothing_would_be_noticed() -> None:
    shown = Tags()
    shown.feed(f"<pre>{SCRIPT}</pre>")
    assert "script" in shown.tags
    assert "onerror" in shown.attributes


def test_a_terminal_gets_no_control_characters_of_rows(inspected: Any) -> None:
    found = inspected([row("\x1b]0;title\x07 [bold]x[/bold] [/]", "a\u202eb\x9b31m")])
    console = Console(record=True, width=100, file=io.StringIO())
    terminal.show(found, console)
    text = console.export_text()
    assert "\\x1b]0;title\\x07 [bold]x[/bold] [/]" in text
    assert not {"\x1b", "\x07", "\u202e", "\x9b"} & set(text)


def test_chinese_text_is_shown_as_it_is(inspected: Any) -> None:
    found = inspected([row("中国的首都是哪里？", "北京。")], rows=[1])
    assert "北京。" in "".join(part.text for part in found.rows[0].documents[0].parts if part.kind == "trained")
    assert "北京。" in page(found)
    assert "北京。" in json.dumps(found.as_json(), ensure_ascii=False)
    assert printable("北京。é👩‍👧\n\t") == "北京。é👩\\u200d👧\n\t"
    assert found.train.characters == []


def test_a_huge_row_is_read_and_its_middle_left_out(inspected: Any) -> None:
    found = inspected([row("a?", "b"), row("word " * 200_000, "yes")], "data.max_length=2000000", longest=True)
    assert found.train.lengths.quantiles["100"] > 200_000
    (_, huge) = found.rows
    assert huge.number == 2
    assert any(part.kind == "left out" for part in huge.documents[0].parts)
    assert len(page(found)) < 200_000


def test_a_file_of_which_nothing_can_be_read_is_an_error_and_a_damaged_one_a_finding(inspected: Any, folder: Path, tmp_path: Path) -> None:
    def inspect(*names: str, **options: Any) -> Inspection:
        files = ",".join(str(tmp_path / name) for name in names)
        return verl.inspect_data(f"data.train_files=[{files}]", f"model.partial_pretrain={folder / 'model'}", **options)

    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n\n\n")
    (tmp_path / "book.xlsx").write_bytes(b"PK\3\4")
    (tmp_path / "cut.json").write_text('[{"question": "a?", "answer": "b"}, {"question": "c?", "ans')
    write(tmp_path / "whole.jsonl", [row("a?", "b")])
    for name, said in (("empty.jsonl", "the file is empty"), ("blank.jsonl", "the file has no rows"), ("book.xlsx", "a spreadsheet")):
        with pytest.raises(verl.UserError, match=said):
            inspect(name)
        with pytest.raises(verl.UserError, match=said):
            inspect("whole.jsonl", name)
    cut = inspect("cut.json", "whole.jsonl")
    assert (cut.train.rows, len(cut.train.invalid)) == (1, 1)
    with pytest.raises(verl.UserError, match=r"cut\.json"):  # where it is cut, row 2 may have been
        inspect("cut.json", rows=[2])
    none = inspected([row("a?", "")])
    assert (none.train.rows, none.steps, none.train.lengths) == (1, None, None)
    assert "would stop" in page(none)


def test_pairs_stand_side_by_side_and_equal_ones_are_dropped_by_name(inspected: Any) -> None:
    pairs = [{"prompt": "2+2?", "chosen": "4", "rejected": "5"}, {"prompt": "3+3?", "chosen": "6", "rejected": "6"}]
    found = inspected(pairs, "algorithm.name=dpo", rows=[1, 2])
    assert (found.command, found.train.unit, found.train.used) == ("reward", "pairs", 1)
    assert [document.name for document in found.rows[0].documents] == ["chosen", "rejected"]
    assert whats(found.train.dropped) == ["with two equal answers"]
    assert found.rows[1].note.startswith("left out of training: with two equal answers")


def test_prompts_are_shown_as_reinforcement_learning_asks_them(inspected: Any) -> None:
    rows = [row("2+2?", "4"), row("word " * 300, "5")]
    found = inspected(rows, "data.prompts_per_step=1", "data.max_prompt_length=100", "data.overlong_prompts=drop", rows=[1])
    assert (found.command, found.train.used, found.steps.total) == ("ppo", 1, 1)
    assert whats(found.train.dropped) == ["longer than data.max_prompt_length=100"]
    (document,) = found.rows[0].documents
    text = "".join(part.text for part in document.parts)
    assert "2+2?" in text
    assert text.rstrip().endswith("assistant")  # the header of the answer
    assert found.rows[0].columns["reference"] == "4"


def test_rows_are_chosen_by_number_place_text_and_chance(inspected: Any) -> None:
    rows = [row(f"question {number}?", "yes " * (30 if number == 7 else 1)) for number in range(1, 21)]
    found = inspected(rows, rows=[3, "train.jsonl:5", 99], text="question 11", random=2, longest=True)
    why = {shown.number: shown.why for shown in found.rows}
    assert (why[3], why[5], why[11]) == ("asked for", "asked for", "has 'question 11'")
    assert why[7] in ("longest", "random")
    assert sum(reason == "random" for reason in why.values()) <= 2
    assert (found.found, found.missing) == (1, ["99"])
    assert [shown.number for shown in found.rows] == [
        shown.number for shown in inspected(rows, rows=[3, "train.jsonl:5", 99], text="question 11", random=2, longest=True).rows
    ]


def test_processes_find_the_same_as_one(inspected: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(f"question {number % 50}?", f"answer {number}") for number in range(1500)]
    alone = inspected(rows, text="question 7")
    monkeypatch.setattr(scan, "CHARACTERS_FOR_PROCESSES", 100)
    several = inspected(rows, "data.num_workers=2", text="question 7")
    first, second = alone.as_json(), several.as_json()
    for found in (first, second):
        del found["seconds"]
    assert first == second


def test_a_sample_is_named_and_drawn_without_a_pattern(inspected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "CHARACTERS_TOKENIZED", 12_000)
    rows = [row(f"question {number}?", f"answer {number}") for number in range(3000)]
    found, exact = inspected(rows), inspected(rows, exact=True)
    assert found.train.one_in > 2
    assert abs(found.train.tokenized - 3000 / found.train.one_in) < 0.2 * found.train.tokenized
    assert found.train.rows == exact.train.rows == exact.train.tokenized == 3000
    assert "a sample of" in page(found)
    assert abs(found.steps.tokens_per_epoch / exact.steps.tokens_per_epoch - 1) < 0.02
    drawn = np.array([is_drawn(number, 7) for number in range(70_000)])
    assert all(abs(drawn[start::step].mean() * 7 - 1) < 0.1 for step in (1, 2, 7, 10) for start in range(step))


def test_bins_leave_no_length_out() -> None:
    for lengths in ([5], [1, 1000], list(range(100)), [3, 3, 3, 70_000]):
        found = lengths_of(np.array(lengths))
        assert sum(one.documents for one in found.bins) == len(lengths)
        assert all(one.last + 1 == other.first for one, other in zip(found.bins, found.bins[1:], strict=False))


def test_mixtures_make_the_steps_of_their_shares(folder: Path) -> None:
    entries = f"data.train_files=[{{path: {folder / 'train.jsonl'}, rows: 10}}, {{path: {folder / 'test.jsonl'}, rows: 4}}]"
    found = verl.inspect_data(entries, f"model.partial_pretrain={folder / 'model'}", "data.train_batch_size=7")
    assert (found.train.rows, found.steps.per_epoch) == (80, 2)


def test_in_a_pipe_a_row_is_lines_and_its_place_is_in_one_piece(inspected: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspected([row("What is it? " * 20, "It is four.")])
    terminal.show(found)
    shown = capsys.readouterr().out.splitlines()
    (title,) = (number for number, line in enumerate(shown) if line.startswith("row 1, "))
    assert shown[title] == f"row 1, {found.rows[0].place} (first)"
    assert any("What is it? " * 20 in line for line in shown[title + 1 :]) and not any("│" in line for line in shown)


def command(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "verl", "inspect", *words], capture_output=True, text=True, timeout=120)


def test_the_command_writes_the_page_and_json_or_for_a_row_that_is_not_there_only_an_error(folder: Path, tmp_path: Path) -> None:
    words = [
        f"data.train_files={folder / 'train.jsonl'}",
        f"data.val_files={folder / 'test.jsonl'}",
        f"model.partial_pretrain={folder / 'model'}",
    ]
    words += ["--row", "2", "--html", f"{tmp_path / 'a.html'}", "--json", f"{tmp_path / 'a.json'}"]
    done = command(*words, "--row", "999")
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, "", []), done.stderr
    assert "there is no row 999" in done.stderr
    done = command(*words)
    assert done.returncode == 0 and "verl sft would train on 60 rows" in done.stdout, done.stderr
    assert (tmp_path / "a.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert (found["train"]["used"], found["validation"]["used"], found["rows"][0]["number"]) == (60, 20, 2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("data.train_files=x.jsonl", "model.partial_pretrain must be given"),
        ("data.trainfiles=x.jsonl model.partial_pretrain=m", "data.trainfiles"),
        ("data.train_files=x.jsonl model.partial_pretrain=m --row 0", "rows count from 1"),
        ("data.train_files=x.jsonl model.partial_pretrain=m --random -1", "--random"),
        ("data.train_files=x.jsonl model.partial_pretrain=m --row", "--row"),
    ],
)
def test_wrong_words_end_with_2_before_torch_is_loaded(words: str, said: str) -> None:
    code = "import atexit, os, sys; atexit.register(lambda: 'torch' in sys.modules and os._exit(77)); from verl.cli import main; "
    code += f"sys.argv = ['verl', 'inspect', *{words.split()!r}]; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr


def test_the_page_on_data_shows_what_its_commands_print(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (section,) = re.findall(r"^## Looking at data\n(.*?)(?=^## )", (ROOT / "docs" / "data.md").read_text(encoding="utf-8"), re.M | re.S)
    blocks = dict(re.findall(r"^```(\w*)\n(.*?)^```\n", section, re.M | re.S))
    commands, rows, printed = (blocks[kind] for kind in ("bash", "jsonl", ""))
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text(rows, encoding="utf-8")
    Path("test.jsonl").write_text(rows.splitlines(keepends=True)[0], encoding="utf-8")
    words = [
        [re.sub("^(model.partial_pretrain)=.*", rf"\1={folder / 'model'}", word) for word in line.split()] for line in commands.splitlines()
    ]
    for number, (verl_word, command_word, *given) in enumerate(words):
        assert (verl_word, command_word) == ("verl", "inspect")
        with pytest.raises(SystemExit) as ended:
            app([command_word, *given], standalone_mode=False)
        assert ended.value.code == (2 if "--row" in given else 1)  # there is no row 17, and row 2 is invalid
        shown = capsys.readouterr().out
        assert number > 0 or [line for line in printed.splitlines() if line not in shown.splitlines()] == []
    assert Path("data.html").is_file()
    assert Path("data.json").is_file()


def test_labelled_answers_are_read_as_kto_reads_them(inspected: Any) -> None:
    rows = [{"prompt": "2+2?", "completion": "4", "label": True}, {"prompt": "3+3?", "completion": "7", "label": "maybe"}]
    found = inspected(rows, "algorithm.name=kto", rows=[1])
    assert (found.command, found.train.unit, found.train.used) == ("reward", "rows", 1)
    assert "column 'label' is text" in str(found.train.invalid)
    pairs = [{"prompt": f"{i}?", "chosen": f"{i}", "rejected": f"{i + 1}"} for i in range(3)]
    assert inspected(pairs, "algorithm.name=kto", rows=[1]).train.unit == "pairs"
