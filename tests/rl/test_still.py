"""Nothing in a model of reinforcement learning is random: what its config switches on for training is off, and what is left is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import engine_of
from rl_runs import train, write_folder
from tiny import RandomDocuments, write_model
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from verl.data.pack import collate
from verl.engine.engine import Engine
from verl.errors import UserError
from verl.models.load import load_tokenizer
from verl.models.randomness import random_settings
from verl.rl.still import hold_still

SMALL: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256)
OPT = OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, dropout=0.3, layerdrop=0.3)
MIXTRAL = MixtralConfig(**SMALL, intermediate_size=32, num_key_value_heads=2, num_local_experts=4, router_jitter_noise=0.3)
GPT2 = GPT2Config(
    n_embd=32, n_layer=2, n_head=4, n_positions=256, embd_pdrop=0.3, attn_pdrop=0.3, resid_pdrop=0.0, summary_first_dropout=0.1
)
RANDOM: dict[str, tuple[Any, type[PreTrainedModel], dict[str, float]]] = {
    "functions and layers": (OPT, OPTForCausalLM, {"dropout": 0.3, "layerdrop": 0.3}),
    "router": (MIXTRAL, MixtralForCausalLM, {"router_jitter_noise": 0.3}),
    "modules": (GPT2, GPT2LMHeadModel, {"embd_pdrop": 0.3, "attn_pdrop": 0.3}),
}
TWICE: dict[str, object] = {"algorithm__updates_per_step": 2, "optim__lr": 0, "trainer__total_training_steps": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("still"))


@pytest.mark.parametrize("kind", RANDOM)
def test_what_is_random_in_training_is_off_and_said(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, model, expected = RANDOM[kind]
    assert random_settings(config) == expected
    tokenizer = load_tokenizer(str(folder / "model"))
    config.vocab_size = len(tokenizer)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = tokenizer.pad_token_id
    path = write_model(folder / model.__name__, config, kind=model)
    tokenizer.save_pretrained(path)
    name = {"rollout__name": "hf", "model__partial_pretrain": path}
    (line,) = train(folder, f"run_{model.__name__}", **TWICE, **name)
    assert line["rl/largest_ratio"] == 1.0
    said = capsys.readouterr().out
    assert f"off: {', '.join(f'{name}={value:g}' for name, value in expected.items())} in config.json" in said
    saved = json.loads((folder / f"run_{model.__name__}/global_step_1/config.json").read_text())
    assert all(saved[name] == value for name, value in expected.items()), "the model that is saved is the one that was given"


def test_dropout_that_stays_on_shows_in_ratios(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A known wrong way: only modules are switched off."""

    def modules_only(engine: Engine, *, where: str) -> dict[str, float]:
        for module in engine.scorer.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return {}

    monkeypatch.setattr("verl.rl.roles.hold_still", modules_only)
    monkeypatch.setattr("verl.models.randomness.random_settings", lambda config: {})
    path = folder / "OPTForCausalLM"
    (line,) = train(folder, "wrong", **TWICE, rollout__name="hf", model__partial_pretrain=path)
    assert line["rl/largest_ratio"] > 1.01


def test_scores_for_pairs_are_without_what_is_random_while_the_model_trains_with_it(folder: Path) -> None:
    engine = engine_of(folder / "OPTForCausalLM")
    batch = collate([RandomDocuments().document(0)], [0])
    ((first,), (second,)) = (engine.score([batch]) for _ in range(2))
    assert engine.scorer.training and torch.equal(first.logprob_M, second.logprob_M)
    assert not torch.equal(engine.scorer(batch).logprob_M, engine.scorer(batch).logprob_M)


def test_a_model_that_stays_random_is_refused_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Qwen2MLP.forward
    monkeypatch.setattr(Qwen2MLP, "forward", lambda self, x: forward(self, x) * (1 + 0.1 * torch.rand_like(x)))
    with pytest.raises(UserError, match="Qwen2ForCausalLM gives other numbers each time") as caught:
        hold_still(engine_of(folder / "model"), where="model.partial_pretrain=here")
    assert caught.value.where == "model.partial_pretrain=here"
