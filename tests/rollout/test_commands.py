"""Every command takes the same `rollout.name`: evaluator, chat and reinforcement learning, also over a server (a stand-in of SGLang)."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rl_runs import train, write_folder
from runs import lines_of
from served import server
from sglang_stand_in import StandIn

from verl import chat
from verl.eval import sft_evaluator


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("commands"))


@pytest.fixture
def stand_in(folder: Path) -> StandIn:
    return StandIn(folder / "model", enable_deterministic_inference=True)


@pytest.fixture
def words(stand_in: StandIn) -> Iterator[list[str]]:
    with server(stand_in.answer) as url:
        yield ["rollout.name=sglang", f"rollout.url={url}"]


def test_reinforcement_learning_over_a_server_learns_what_it_learns_beside_the_trainer(
    folder: Path, stand_in: StandIn, words: list[str]
) -> None:
    keys: dict[str, object] = {f"{key.replace('.', '__')}": value for key, _, value in (word.partition("=") for word in words)}
    found = train(folder, "served", trainer__total_training_steps=2, **keys)
    assert stand_in.calls.count("/generate") == 2 * 16
    assert stand_in.about["weight_version"] == "2"
    assert all(line["rl/rollout_difference"] < 1e-5 for line in found), "after an update too"
    assert all(line["train/grad_norm"] > 0 for line in found)


def test_the_evaluator_asks_it_too(folder: Path, stand_in: StandIn, words: list[str]) -> None:
    predictions = []
    for output, more in (("native", []), ("served", words)):
        directory = folder / f"eval_{output}"
        argv = [f"model_path={folder / 'model'}", f"test_file={folder / 'test.jsonl'}", f"output_dir={directory}", "max_samples=4"]
        sft_evaluator.main([*argv, "max_new_tokens=6", *more])
        predictions.append([line["response"] for line in lines_of(directory / "predictions.jsonl")])
    assert predictions[0] == predictions[1]
    assert "/generate" in stand_in.calls


@pytest.mark.parametrize("name", ["hf", "sglang"])
def test_so_does_chat(
    folder: Path, stand_in: StandIn, words: list[str], name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    question = json.loads((folder / "test.jsonl").read_text().splitlines()[0])["question"]
    said = []
    for more in ([], words if name == "sglang" else ["rollout.name=hf"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{question}\n"))
        chat.main([str(folder / "model"), "temperature=0", "max_new_tokens=6", *more])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""
    assert ("/generate" in stand_in.calls) == (name == "sglang")
