"""What identifies training rows: their tokens, not where they come from."""

import gzip
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pyarrow as pa  # type: ignore[import-untyped]
import pytest
import transformers
from pyarrow import parquet

from verl.config.pairs import PairsConfig
from verl.config.ppo import PromptConfig
from verl.config.sft import DataConfig
from verl.data import documents
from verl.data.documents import load_documents
from verl.data.fingerprint import Fingerprint
from verl.data.pairs import PairColumns
from verl.data.prompts import load_prompts
from verl.data.tables import Columns

ROWS = [{"question": f"What is {n} + 30?", "answer": "the cat " * n + f"sat.\n#### {n + 30}"} for n in range(1, 9)]


def write(path: Path, rows: Sequence[Mapping[str, object]] = ROWS) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def of(tmp_path: Path, files: object, tokenizer: Any = None, samples: int | None = None, **keys: Any) -> Fingerprint:
    config = DataConfig(train_files=files, **{"cache_dir": str(tmp_path / "cache"), **keys})
    return load_documents(config, Columns.of(config), files, tokenizer or families.chatml(), max_samples=samples).fingerprint


def test_a_file_that_is_moved_zipped_split_or_converted_gives_the_same_rows(tmp_path: Path) -> None:
    first = of(tmp_path, write(tmp_path / "train.jsonl"))
    moved = write(tmp_path / "elsewhere" / "other.jsonl")
    zipped, table = tmp_path / "train.jsonl.gz", tmp_path / "train.parquet"
    zipped.write_bytes(gzip.compress(Path(moved).read_bytes()))
    parquet.write_table(pa.Table.from_pylist(ROWS), table)
    halves = [write(tmp_path / "a.jsonl", ROWS[:4]), write(tmp_path / "b.jsonl", ROWS[4:])]
    for files in (moved, str(zipped), str(table), halves):
        assert first.difference(of(tmp_path, files)) is None, files


def test_another_version_of_the_software_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "train.jsonl")
    first = of(tmp_path, path)
    monkeypatch.setattr(transformers, "__version__", "99.0")
    monkeypatch.setattr(documents, "_code_hash", lambda: "another version")
    assert first.difference(of(tmp_path, path)) is None
    assert first.difference(of(tmp_path, path, families.chatml(families.CHATML + "{# a note #}"))) is None
    assert first.difference(of(tmp_path, path, max_length=999)) is None  # a limit that no row reaches


@pytest.mark.parametrize(
    ("rows", "keys", "said"),
    [
        (ROWS[:5], {}, "8 rows then, 5 now"),
        (ROWS, {"samples": 3}, "8 rows then, 3 now"),
        (ROWS[::-1], {}, "the same 8 rows in another order"),
        (
            [*ROWS[:-1], {**ROWS[-1], "answer": "6"}],
            {},
            r"as many rows \(8\), but other text in some of them.* \(\d+ tokens then, \d+ now\)",
        ),
        (
            [*ROWS[:-1], {**ROWS[-1], "question": "What is 9 + 30?"}],
            {},
            r"as many rows \(8\), but other text .*\(as many tokens, but others\)",
        ),
        (ROWS, {"max_length": 30, "truncation": "left"}, r"as many rows \(8\), but .*another length limit .*"),
        (ROWS, {"tokenizer": families.qwen3()}, r"as many rows \(8\), but another chat template \(\d+ tokens then, \d+ now\)"),
    ],
)
def test_what_differs_is_said_in_words(rows: list[dict[str, str]], keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    first, again = of(tmp_path, write(tmp_path / "a.jsonl")), of(tmp_path, write(tmp_path / "b.jsonl", rows), **keys)
    difference = first.difference(again)
    assert difference is not None and again.difference(first) is not None
    assert re.fullmatch(said, difference), difference


def test_the_same_tokens_of_which_others_are_trained_are_other_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": row["answer"]} for row in ROWS])
    whole = of(tmp_path, path, text_key="text")
    assert (
        whole.difference(replace(whole, targets="other", any_order="other")) == "the same 8 rows, except which of their tokens are trained"
    )


def test_a_pair_with_its_answers_swapped_is_another_pair(tmp_path: Path) -> None:
    def pairs(rows: list[dict[str, str]]) -> Fingerprint:
        config = PairsConfig(cache_dir=str(tmp_path / "cache"))
        return load_documents(config, PairColumns.of(config), write(tmp_path / "pairs.jsonl", rows), families.chatml()).fingerprint

    rows = [{"prompt": f"{n}?", "chosen": "yes " * n, "rejected": "no " * n} for n in range(1, 4)]
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    assert pairs(rows).rows == 3
    assert pairs(rows).difference(pairs(rows[::-1])) == "the same 3 rows in another order"
    assert "other text" in str(pairs(rows).difference(pairs(swapped)))


def test_what_decides_the_order_of_rows_is_compared(tmp_path: Path) -> None:
    first = of(tmp_path, write(tmp_path / "a.jsonl"))
    mixed = replace(first, order="5 rows of a.jsonl, 3 of b.jsonl")
    assert first.difference(mixed) == (
        "the same rows, drawn otherwise: all rows, shuffled by seed and epoch then, 5 rows of a.jsonl, 3 of b.jsonl now"
    )


def test_prompts_are_their_tokens_and_their_reference_answers(tmp_path: Path) -> None:
    def prompts(name: str, rows: list[dict[str, str]]) -> Fingerprint:
        return load_prompts(PromptConfig(), write(tmp_path / name, rows), families.chatml()).fingerprint

    first = prompts("a.jsonl", ROWS)
    assert first.difference(prompts("b.jsonl", [{**row, "id": "x"} for row in ROWS])) is None
    assert first.difference(prompts("c.jsonl", ROWS[:3])) == "8 prompts then, 3 now"
    assert first.difference(prompts("d.jsonl", ROWS[::-1])) == "the same 8 prompts in another order"
    other = prompts("e.jsonl", [{**row, "answer": "5"} for row in ROWS])
    assert first.difference(other) == "the same 8 prompts, except their reference answers"
