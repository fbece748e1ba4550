"""Search over documents as an environment: what is found, what is shown of it, and the index on disk."""

import json
import math
import multiprocessing
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from verl.environments import Step, _index
from verl.environments.search import NOTHING, Environment, Settings
from verl.errors import UserError

pytest.importorskip("bm25s", reason="needs bm25s: pip install 'verl[search]'")

TOWNS = [
    {"name": "Paris", "text": "Paris is the capital of France and lies on the Seine."},
    {"name": "Rome", "text": "Rome is the capital of Italy."},
    {"name": "Bonn", "text": "Bonn was the capital of West Germany. Bonn lies on the Rhine, and Bonn is old."},
    {"name": "北京", "text": "北京是中国的首都。"},
]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _index.open_index.cache_clear()


@pytest.fixture
def towns(tmp_path: Path) -> Path:
    path = tmp_path / "towns.jsonl"
    path.write_text("".join(json.dumps(town, ensure_ascii=False) + "\n" for town in TOWNS), encoding="utf-8")
    return path


def environment(documents: object, **keys: Any) -> Environment:
    settings = Settings(documents=documents, **keys)
    settings.check()
    return Environment(settings)


def titles(documents: object, query: str, **keys: Any) -> list[str]:
    made = environment(documents, **{"title_key": "name", **keys})
    return [one.title for one in made._index.search(query, made._settings.hits)]


def test_a_search_shows_the_documents_that_fit_best_and_a_turn_without_one_is_the_last(towns: Path) -> None:
    made = environment(str(towns), title_key="name", hits=2)
    (tool,) = made.reset({}, 0).tools
    call = {"id": "call_0", "type": "function", "function": {"name": "search", "arguments": {"query": "capital of Italy?"}}}
    assert tool["function"]["parameters"]["required"] == ["query"]
    assert made.step({"role": "assistant", "content": "", "tool_calls": [call]}).messages == [
        {
            "role": "tool",
            "content": "[1] Rome\nRome is the capital of Italy.\n\n[2] Paris\nParis is the capital of France and lies on the Seine.",
            "tool_call_id": "call_0",
        }
    ]
    assert made.step({"role": "assistant", "content": "I look.\nsearch unicorn"}).messages == [{"role": "tool", "content": NOTHING}]
    assert made.step({"role": "assistant", "content": "Rome"}) == Step(done=True, metrics={"searches": 2.0, "searches_without_hit": 1.0})


def test_chinese_is_found_by_its_characters(towns: Path) -> None:
    assert titles(str(towns), "中国的首都在哪里？") == ["北京"]


def test_the_order_is_that_of_the_formula(towns: Path) -> None:
    """BM25 with Lucene's idf, written out: Robertson and Zaragoza 2009, section 3; k1 = 1.5 and b = 0.75."""
    words = [_index.words_of(f"{town['name']}\n{town['text']}") for town in TOWNS]
    mean = sum(map(len, words)) / len(words)

    def score(query: str, document: list[str]) -> float:
        total, counts = 0.0, Counter(document)
        for word in _index.words_of(query):
            having = sum(word in other for other in words)
            idf = math.log(1 + (len(words) - having + 0.5) / (having + 0.5))
            total += idf * counts[word] / (counts[word] + 1.5 * (1 - 0.75 + 0.75 * len(document) / mean))
        return total

    for query in ("capital Bonn", "the Seine and the Rhine", "Italy lies", "首都 capital"):
        scores = {str(town["name"]): score(query, one) for town, one in zip(TOWNS, words, strict=True)}
        expected = sorted((name for name in scores if scores[name] > 0), key=lambda name: -scores[name])
        assert titles(str(towns), query, hits=4) == expected
        assert titles(str(towns), query, hits=1) == expected[:1]


def test_documents_may_be_parquet_or_paragraphs_of_text_and_without_a_title(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["zebras graze", "lions roar"]}), tmp_path / "animals.parquet")
    (tmp_path / "plants.txt").write_text("Oaks are trees.\n\nMoss is small.\n")
    assert titles(str(tmp_path / "animals.parquet"), "lions", text_key="body", title_key=None) == [f"{tmp_path}/animals.parquet row 2"]
    assert titles([str(tmp_path / "plants.txt")], "moss", title_key=None) == [f"{tmp_path}/plants.txt:3"]


def test_of_a_long_document_the_part_with_most_words_of_the_query_is_shown() -> None:
    text = "A zebra. " + "filler words " * 100 + "The zebra lives in the savanna of Africa. " + "more filler " * 100
    shown = _index.snippet(text, "where does the zebra live: savanna?", 80)
    assert "zebra lives in the savanna" in shown and shown.startswith("… ") and shown.endswith(" …") and len(shown) <= 84
    assert _index.snippet("short", "zebra", 80) == "short"
    assert _index.snippet(text, "unicorn", 20) == "A zebra. filler word …"


def test_the_index_is_made_once_and_anew_when_the_documents_change(towns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    real = _index._make

    def make(folder: Path, documents: Sequence[_index.Document]) -> None:
        made.append(folder)
        real(folder, documents)

    monkeypatch.setattr(_index, "_make", make)
    for _ in range(2):
        _index.open_index.cache_clear()  # as in another process
        assert titles(str(towns), "Italy") == ["Rome"]
    assert len(made) == 1 and len(list((tmp_path / "cache/verl/search").iterdir())) == 1
    towns.write_text(towns.read_text(encoding="utf-8").replace("Italy", "Ruritania"), encoding="utf-8")
    _index.open_index.cache_clear()
    assert titles(str(towns), "Italy") == [] and len(made) == 2


def test_processes_that_begin_together_share_one_index(towns: Path, tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.starmap(_searched, 3 * [(str(towns),)]) == 3 * [["Rome"]]
    assert len(list((tmp_path / "cache/verl/search").iterdir())) == 1


def _searched(documents: str) -> list[str]:
    return titles(documents, "Italy")


def test_an_index_that_another_user_could_have_written_is_not_read(towns: Path, tmp_path: Path) -> None:
    titles(str(towns), "Italy")
    (folder,) = (tmp_path / "cache/verl/search").iterdir()
    os.chmod(folder, 0o777)
    assert not _index._is_own(folder)


@pytest.mark.parametrize(
    ("keys", "where", "said"),
    [
        ({"documents": []}, "documents", "names no file"),
        ({"documents": "nowhere.jsonl"}, "environment.documents", "nowhere.jsonl"),
        ({"documents": "TOWNS", "hits": 0}, "hits", "found 0"),
    ],
)
def test_a_wrong_value_names_its_key(keys: dict[str, Any], where: str, said: str, towns: Path) -> None:
    given: dict[str, Any] = {name: str(towns) if value == "TOWNS" else value for name, value in keys.items()}
    with pytest.raises(UserError) as error:
        Settings(**given).check()
    assert error.value.where == where and said in str(error.value)


def test_a_missing_column_names_the_row_and_the_key(towns: Path) -> None:
    with pytest.raises(UserError, match=r"towns.jsonl:1.*environment.text_key|environment.text_key.*") as error:
        environment(str(towns), text_key="body")
    assert error.value.where == f"{towns}:1"
