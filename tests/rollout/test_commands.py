"""Every command takes the same `rollout.name`: evaluator, chat and reinforcement learning, also with a server (a stand-in for vLLM's)."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from places import free_port
from rl_runs import train, write_folder
from runs import lines_of, timeless
from safetensors.torch import load_file
from served import StandIn, server
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

import verl
from verl import chat
from verl.errors import UserError
from verl.eval import sft_evaluator

SETTINGS = "/server_info?config_format=json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("commands"))


@pytest.fixture
def stand_in(folder: Path) -> StandIn:
    return StandIn(folder / "model")


@pytest.fixture
def words(stand_in: StandIn) -> Iterator[list[str]]:
    with server(stand_in.answer) as url:
        yield ["rollout.name=vllm", f"rollout.url={url}"]


def test_reinforcement_learning_with_a_server_trains_on_answers_of_the_newest_weights(
    folder: Path, stand_in: StandIn, words: list[str]
) -> None:
    keys: dict[str, object] = {f"{key.replace('.', '__')}": value for key, _, value in (word.partition("=") for word in words)}
    found = train(folder, "served", trainer__total_training_steps=2, **keys)
    assert stand_in.calls.count("/v1/completions") == 2 * 16
    # New weights, without what was computed with the old ones: at the start, and after each step.
    assert stand_in.calls.count("/collective_rpc") == stand_in.calls.count("/reset_prefix_cache") == 3
    assert all(line["rl/rollout_difference"] < 1e-5 for line in found), "after an update too"
    assert all(line["train/grad_norm"] > 0 for line in found)


KEYS = {"trainer__total_training_steps": 4, "trainer__save_freq": -1, "rollout__name": "vllm"}


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[dict[str, float]]:
    """Metrics of a run whose server is never lost."""
    with server(StandIn(folder / "model").answer) as url:
        return train(folder, "whole", **KEYS, rollout__url=url)


@pytest.mark.parametrize(("place", "call"), [("/v1/completions", 2 * 16 + 3), (SETTINGS, 6), (SETTINGS, 5), ("/collective_rpc", 3)])
def test_a_server_that_is_lost_costs_no_step(folder: Path, tmp_path: Path, whole: list[dict[str, float]], place: str, call: int) -> None:
    """It is lost while or after it answers in step 3, or before or while it takes the weights of step 2, and no save was due."""
    lost, port, run = StandIn(folder / "model"), free_port(), tmp_path / "lost"
    url = f"http://127.0.0.1:{port}"

    def answer(asked: str, body: Any) -> tuple[int, Any]:
        status, content = lost.answer(asked, body)
        return (503, "out of order") if lost.calls.count(place) >= call else (status, content)

    with server(answer, port), pytest.raises(UserError, match=rf"(?s){url}.* 503: out of order"):
        train(folder, str(run), **KEYS, rollout__url=url)
    assert [path.name for path in run.glob("global_step_*")] == ["global_step_2"]
    with server(StandIn(folder / "model").answer, port):
        assert timeless(train(folder, str(run), **KEYS, rollout__url=url)) == timeless(whole)
    expected, found = (load_file(path / "global_step_4" / "model.safetensors") for path in (folder / "whole", run))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_evaluator_asks_it_too(folder: Path, stand_in: StandIn, words: list[str]) -> None:
    predictions = []
    for output, more in (("native", []), ("served", words)):
        directory = folder / f"eval_{output}"
        argv = [f"model_path={folder / 'model'}", f"test_file={folder / 'test.jsonl'}", f"output_dir={directory}", "max_samples=4"]
        sft_evaluator.main([*argv, "max_new_tokens=6", *more])
        predictions.append([line["response"] for line in lines_of(directory / "predictions.jsonl")])
    assert predictions[0] == predictions[1]
    assert "/v1/completions" in stand_in.calls


@pytest.mark.parametrize("name", ["hf", "vllm"])
def test_so_does_chat(
    folder: Path, stand_in: StandIn, words: list[str], name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    question = json.loads((folder / "test.jsonl").read_text().splitlines()[0])["question"]
    said = []
    for more in ([], words if name == "vllm" else ["rollout.name=hf"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{question}\n"))
        chat.main([str(folder / "model"), "temperature=0", "max_new_tokens=6", *more])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""
    assert ("/v1/completions" in stand_in.calls) == (name == "vllm")


@pytest.fixture
def capped(folder: Path, tmp_path: Path) -> Path:
    """A Gemma 2, whose capped attention the native engine cannot run, with the tokenizer of the other model."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    shape: dict[str, Any] = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = Gemma2Config(**shape, vocab_size=len(tokenizer), head_dim=8, max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(1)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "capped")
    tokenizer.save_pretrained(tmp_path / "capped")
    return tmp_path / "capped"


def test_where_native_is_not_exact_the_default_takes_transformers_own_code_and_says_why(
    folder: Path, capped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [f"model_path={capped}", f"test_file={folder / 'test.jsonl'}", f"output_dir={tmp_path / 'eval'}", "max_samples=3"]
    sft_evaluator.main([*argv, "max_new_tokens=4"])
    assert "with transformers' own code (Gemma2ForCausalLM cannot be run by the native engine: " in capsys.readouterr().out
    assert len(lines_of(tmp_path / "eval" / "predictions.jsonl")) == 3
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 1 + 2?\n"))
    chat.main([str(capped), "max_new_tokens=4"])
    assert "cut at 4 tokens" in capsys.readouterr().out
    with verl.load_rollout(capped) as model:
        assert len(model.generate(["What is 1 + 2?"], max_new_tokens=4)[0].token_ids) == 4
    with pytest.raises(UserError, match=r"(?s)Gemma2ForCausalLM cannot be run by the native engine.*fix: set rollout\.name=auto or hf"):
        sft_evaluator.main([*argv, "rollout.name=native", "overwrite=true"])
