"""What `verl prove` prints and when, its exit codes, and what it proves of a model itself."""

import importlib
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import qwen2_config, write_model
from transformers import CONFIG_MAPPING, BertConfig, GPT2Config, PretrainedConfig, Qwen3MoeConfig

from verl.errors import UserError
from verl.prove import command
from verl.prove.outcome import Outcome
from verl.prove.proofs import training
from verl.prove.subject import Subject
from verl.prove.tokenizer import byte_tokenizer
from verl.prove.twin import random_model, write_twin

SIZES: dict[str, Any] = {"vocab_size": 272, "eos_token_id": 258, "pad_token_id": 256}


def line(subject: Subject, name: str) -> Outcome:
    return command.outcome_of(importlib.import_module(f"verl.prove.proofs.{name}"), subject)


def written(config: PretrainedConfig, folder: Path) -> Path:
    random_model(config, seed=1).save_pretrained(folder)
    return folder


def real(model: Path, folder: Path) -> Subject:
    byte_tokenizer().save_pretrained(model)
    folder.mkdir()
    return command.make_subject(str(model), folder, real=True)


@pytest.mark.parametrize("name", ["packed", "micro_batches", "training"])
def test_dropout_of_a_models_own_config_is_no_difference_between_its_gradients(name: str, tmp_path: Path) -> None:
    model = written(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128, **SIZES), tmp_path / "model")
    stated = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({key: value for key, value in stated.items() if "pdrop" not in key}))
    subject = real(model, tmp_path / "runs")
    assert line(subject, name).state in ("holds", "slower")
    assert subject.random["resid_pdrop"] == 0.1


def test_the_copy_without_dropout_leaves_the_models_own_config_as_it_was(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", qwen2_config(attention_dropout=0.1))
    before = (model / "config.json").read_bytes()
    subject = real(model, tmp_path / "runs")
    assert json.loads((subject.model / "config.json").read_text())["attention_dropout"] == 0.0
    assert (model / "config.json").read_bytes() == before
    assert (subject.model / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["packed", "micro_batches", "training", "auxiliary_loss"])
def test_the_routers_loss_of_a_models_own_config_is_in_its_own_line_only(name: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 2}
    experts: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "output_router_logits": True}
    config = Qwen3MoeConfig(**sizes, **experts, intermediate_size=32, router_aux_loss_coef=0.3, **SIZES)
    assert line(real(written(config, tmp_path / "model"), tmp_path / "runs"), name).state == "holds"


@pytest.mark.parametrize("name", ["packed", "reload", "adapter_loads", "native"])
def test_a_checkpoint_with_vision_is_compared_with_transformers_own_class(name: str, tmp_path: Path) -> None:
    subject = real(write_twin(CONFIG_MAPPING["qwen2_5_vl"](), tmp_path / "model"), tmp_path / "runs")
    assert line(subject, name).state == "holds"


def test_a_refusal_of_fine_tuning_ends_with_exit_code_2_and_names_no_folder_that_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    BertConfig(is_decoder=False).save_pretrained(tmp_path)
    path = str(tmp_path / "config.json")
    assert command.prove(path, json_file=tmp_path / "found.json") == 2
    outcomes = {outcome["name"]: outcome for outcome in json.loads((tmp_path / "found.json").read_text())["outcomes"]}
    refusal = outcomes[training.NAME]
    assert refusal["state"] == "refused" and path in refusal["found"]
    assert "verl-prove-" not in json.dumps(outcomes)
    assert "as the check before training" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("states", "code"),
    [
        ({training.NAME: "holds", "native = plain": "refused"}, 0),
        ({training.NAME: "refused"}, 2),
        ({training.NAME: "refused", "export": "wrong"}, 1),
    ],
)
def test_the_exit_code_says_what_was_found(states: dict[str, Any], code: int) -> None:
    assert command.exit_code([Outcome("", name, state, "") for name, state in states.items()]) == code


def test_a_line_is_printed_before_the_next_one_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = []

    def first(_: Subject) -> Outcome:
        return Outcome("data", "first line", "holds", "")

    def second(_: Subject) -> Outcome:
        printed.append(capsys.readouterr().out)
        return Outcome("data", "second line", "holds", "")

    found = [SimpleNamespace(GROUP="data", NAME=proof.__name__, prove=proof) for proof in (first, second)]
    monkeypatch.setattr(command, "modules", lambda: found)
    write_model(tmp_path / "model", qwen2_config())
    command.prove(str(tmp_path / "model"))
    assert "first line" in printed[0] and "second line" not in printed[0]


def test_what_takes_long_says_so(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "SECONDS", 0.1)
    monkeypatch.setattr("sys.__stderr__", sys.stderr)
    with command.told_while("packed = alone is looked at"):
        time.sleep(0.25)
    time.sleep(0.15)
    assert capfd.readouterr().err.count("… packed = alone is looked at, for") == 2


@pytest.mark.parametrize("real", [True, False])
def test_a_directory_that_is_missing_is_called_so(real: bool, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such model directory"):
        command.prove(str(tmp_path / "missing"), real=real)
