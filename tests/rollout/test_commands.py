"""Every command takes the same `rollout.name`: evaluator, chat and reinforcement learning, also with a server (a stand-in for vLLM's)."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rl_runs import train, write_folder
from runs import lines_of
from served import StandIn, server
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

import verl
from verl import chat
from verl.errors import UserError
from verl.eval import sft_evaluator


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
