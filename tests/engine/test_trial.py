"""The check before training: which path a model takes, and that each path gives what transformers gives of each document alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from places import run_ranks
from tiny import unequal_documents, write_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    CTRLConfig,
    CwmConfig,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    GptOssConfig,
    KimiLinearConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OlmoHybridConfig,
    Phi3Config,
    PhimoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)

from verl.algorithms import sft
from verl.config.shared import ModelConfig, OptimConfig
from verl.data.pack import Document, collate
from verl.engine import trial
from verl.engine.engine import Engine
from verl.engine.layers import decoder_layers
from verl.engine.outline import Outline
from verl.engine.scorers import TokenScorer
from verl.engine.sharding import _separate
from verl.engine.trial import check_scorer, choose_path
from verl.errors import UserError
from verl.models.attention.packed import PACKED as PACKED_NAME
from verl.models.attention.packed import ForwardPath
from verl.models.load import load_for_training
from verl.models.twin import keep_few_layers

pytestmark = pytest.mark.usefixtures("process_group")

SIZES: dict[str, Any] = dict(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16
)
NAMES: dict[str, Any] = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 4.0}
RULE: dict[str, Any] = dict(
    layer_types=["linear_attention", "full_attention"],
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
)
LATENT: dict[str, Any] = dict(
    layer_types=RULE["layer_types"], mlp_layer_types=["dense"] * 2, kv_lora_rank=16, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16
)
EXPERTS: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32)
WINDOW = 4096  # longer than any document here: only a twin shows it
PACKED: dict[str, PretrainedConfig] = {
    "qwen2": Qwen2Config(**SIZES),
    "mistral with a window": MistralConfig(**SIZES, sliding_window=WINDOW),
    "gemma2, soft-capped": Gemma2Config(**SIZES, **NAMES, sliding_window=WINDOW, attn_logit_softcapping=2.0),
    "gpt-oss, with sinks": GptOssConfig(**SIZES, **NAMES, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW),
    "phi3 with longrope": Phi3Config(
        **SIZES, **NAMES, original_max_position_embeddings=32, rope_parameters=LONGROPE | {"original_max_position_embeddings": 32}
    ),
    "llama with dynamic rope": LlamaConfig(
        **SIZES, max_position_embeddings=32, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    ),
    "qwen3.5": Qwen3_5TextConfig(**SIZES, **NAMES, **RULE),
    "qwen3-next, with experts": Qwen3NextConfig(**SIZES, **NAMES, **RULE, **EXPERTS),
    "olmo hybrid": OlmoHybridConfig(**SIZES, **NAMES, **RULE),
    "kimi linear, a decay for each channel": KimiLinearConfig(
        **SIZES | {"num_key_value_heads": 4}, **NAMES, **LATENT, linear_head_dim=16, linear_num_heads=4
    ),
    "lfm2, short convolutions alone": Lfm2Config(**SIZES, **NAMES, layer_types=["conv", "full_attention"]),
}
ALONE: dict[str, PretrainedConfig] = {
    "llama 4, in chunks": Llama4TextConfig(
        **SIZES, **NAMES, intermediate_size_mlp=96, num_local_experts=2, attention_chunk_size=32, no_rope_layer_interval=2
    ),
    "mamba": MambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2, state_size=8, **NAMES),
    "falcon with alibi": FalconConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=True, multi_query=True, **NAMES
    ),
}
BERT = BertConfig(
    **{name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
    is_decoder=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
CTRL = CTRLConfig(vocab_size=512, n_positions=512, n_embd=48, dff=56, n_layer=2, n_head=4)


def path_of(config: PretrainedConfig) -> ForwardPath:
    return choose_path(config, "here")


@pytest.mark.parametrize("name", PACKED)
def test_these_architectures_are_packed(name: str) -> None:
    path = path_of(PACKED[name])
    assert path.packed, path.why
    assert path.fused == ("soft-capped" not in name and "sinks" not in name)


def test_the_models_that_people_use_most_are_packed_at_their_full_size_too() -> None:
    for config in (Qwen2Config(), LlamaConfig(), MistralConfig(), CwmConfig()):  # the last allows no None for a token id
        assert choose_path(config, "here") == ForwardPath()
    factors = LONGROPE | {"short_factor": [1.0] * 48, "long_factor": [4.0] * 48, "original_max_position_embeddings": 4096}
    others: list[PretrainedConfig] = [
        Gemma4TextConfig(),  # single layers have heads of their own size
        Phi3Config(original_max_position_embeddings=4096, rope_parameters=factors),
    ]
    for other in others:
        assert choose_path(other, "here").packed, type(other).__name__


def test_a_twin_of_layers_that_share_keys_has_such_a_layer() -> None:
    """The last layers of Gemma 3n read the keys of the last layer of their kind before them."""
    config = Gemma3nTextConfig()
    keep_few_layers(config)
    own = config.num_hidden_layers - config.num_kv_shared_layers
    assert config.num_kv_shared_layers == 1 and len(config.layer_types) == config.num_hidden_layers
    assert set(config.layer_types[:own]) == set(Gemma3nTextConfig().layer_types)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mamba", "MambaMixer carries its state"),
        ("llama 4, in chunks", "attention"),
        ("falcon with alibi", "its attention code has no interface for packed texts"),
    ],
)
def test_other_architectures_run_one_document_at_a_time_and_say_why(name: str, why: str) -> None:
    path = path_of(ALONE[name])
    assert not path.packed
    assert why in path.describe() and PACKED_NAME not in path.describe()


def test_a_window_that_packed_attention_does_not_get_is_noticed_though_no_text_is_that_long() -> None:
    """PhiMoE's code does not pass its window on to attention."""
    config = PhimoeConfig(**SIZES, **NAMES, num_local_experts=4, sliding_window=WINDOW)
    assert path_of(config).packed == (path_of(config).why == "")
    assert not path_of(config).packed


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    config = BertConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    with pytest.raises(UserError, match=r"no causal language model(.|\n)*is_decoder"):
        path_of(config)


def test_a_model_whose_text_is_read_both_ways_is_named_as_such() -> None:
    """PaliGemma sets this by itself; it is no BERT."""
    vision: dict[str, Any] = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    text, vision = SIZES | {"model_type": "gemma"}, vision | {"model_type": "siglip_vision_model"}
    config = AutoConfig.for_model("paligemma", text_config=text, vision_config=vision, projection_dim=64)
    with pytest.raises(UserError) as caught:
        path_of(config)
    assert "the attention of its gemma is two-way (use_bidirectional_attention)" in caught.value.what
    assert "BERT" not in str(caught.value) and "is_decoder" not in str(caught.value)


def test_a_window_without_a_token_is_named(tmp_path: Path) -> None:
    config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=0, max_window_layers=0, layer_types=None)
    scorer = TokenScorer(load_for_training(str(write_model(tmp_path, config))).model)
    with pytest.raises(UserError, match=r"sliding_window is 0\n.*fix: correct it in config\.json"):
        check_scorer(scorer)


def test_attention_that_drops_weights_in_training_alone_is_not_packed() -> None:
    assert "with attention_dropout=0 in its config.json" in path_of(Qwen2Config(**SIZES, attention_dropout=0.1)).why


def test_the_trial_changes_neither_the_random_state_nor_the_default_dtype() -> None:
    state = torch.get_rng_state()
    choose_path(Qwen2Config(**SIZES, rms_norm_eps=1e-4), "here")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32


def test_an_architecture_without_a_twin_runs_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("too odd")

    monkeypatch.setattr(trial, "random_model", fail)
    path = choose_path(Qwen2Config(**SIZES, rms_norm_eps=1e-3), "here")
    assert not path.packed and path.own_logits and "too odd" in path.why


def loss_and_gradient_alone(path: Path, documents: Sequence[Document]) -> tuple[float, dict[str, Tensor]]:
    """By transformers, one document at a time, each in a fresh model: some rotary embeddings keep the longest length so far."""
    tokens, loss, gradients = sum(int(mask[1:].sum()) for _, mask in documents), 0.0, dict[str, Tensor]()
    for ids, mask in documents:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        logits = model(torch.from_numpy(ids).long()[None], use_cache=False).logits[0, :-1]
        labels = torch.from_numpy(np.where(mask, ids, -100)).long()[1:]
        part = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100) / tokens
        part.backward()
        loss += part.item()
        gradients = {name: p.grad + gradients.get(name, 0.0) for name, p in model.named_parameters() if p.grad is not None}
    return loss, gradients


@pytest.mark.parametrize("name", [name for name in {**PACKED, **ALONE} if name not in ("qwen2", "mistral with a window")])
def test_loss_and_gradient_are_those_of_each_document_alone_however_rows_are_cut(name: str, tmp_path: Path) -> None:
    config = {**PACKED, **ALONE}[name]
    write_model(tmp_path, config, kind=type(AutoModelForCausalLM.from_config(config)))
    documents = [document for document in unequal_documents() if len(document[0]) < 70]  # shorter and longer than chunks and limits
    expected, gradients = loss_and_gradient_alone(tmp_path, documents)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    path = Outline(ModelConfig(partial_pretrain=str(tmp_path))).path
    for cut, pad in (([[0, 1, 2, 3, 4]], False), ([[0], [3, 1], [2, 4]], False), ([[0, 1, 2], [3, 4]], True)):
        model = load_for_training(str(tmp_path), attention=path.attention).model
        scorer = TokenScorer(model, path=path)
        check_scorer(scorer)
        engine = Engine(scorer, OptimConfig(), total_steps=1, device=torch.device("cpu"), compute_dtype=torch.float32)
        batches = [collate([documents[i] for i in rows], rows, pad=pad, multiple_of_tokens=8) for rows in cut]
        assert engine.backward(batches, sft)["loss"].item() == pytest.approx(expected, abs=1e-5)
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == gradients.keys()
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(found[parameter], gradient, rtol=0, atol=1e-5 * largest, msg=parameter)


@pytest.mark.parametrize("kind", [FalconForCausalLM, BertLMHeadModel])
def test_ranks_with_sharded_weights_and_unequal_numbers_of_documents_do_not_wait_for_each_other(
    kind: type[PreTrainedModel], tmp_path: Path
) -> None:
    """Rank 0 has seven documents and rank 1 has one; each document gathers the weights from both. The embeddings of BERT are one of its
    blocks, and share their weight with the output layer."""
    model = write_model(tmp_path / "model", BERT if kind is BertLMHeadModel else ALONE["falcon with alibi"], kind=kind)
    expected = loss_and_gradient_alone(model, unequal_documents())[1]
    run_ranks("gradient.py", model, tmp_path / "found.pt", "unequal")
    found, whole = torch.load(tmp_path / "found.pt", weights_only=True), torch.cat([g.flatten() for g in expected.values()])
    torch.testing.assert_close(found["gradient"], whole, rtol=0, atol=1e-5 * float(whole.abs().max()))


def test_a_block_inside_a_layer_is_no_layer_and_layers_that_share_weights_are_sharded_with_the_rest() -> None:
    with torch.device("meta"):
        mamba = AutoModelForCausalLM.from_config(ALONE["mamba"])
        shared = AutoModelForCausalLM.from_config(PACKED["qwen2"])
    layers = decoder_layers(mamba)
    assert len(layers) == 2
    assert _separate(layers, mamba) == layers
    shared.model.layers[1].mlp = shared.model.layers[0].mlp
    assert _separate(decoder_layers(shared), shared) == []
    with torch.device("meta"):
        bert = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", is_decoder=True, num_hidden_layers=2))
    bert.tie_weights()
    embeddings, *others = decoder_layers(bert)
    assert type(embeddings).__name__ == "BertEmbeddings" and _separate([embeddings, *others], bert) == others


def test_a_failure_of_the_models_own_code_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = TokenScorer(load_for_training(str(write_model(tmp_path))).model)
    monkeypatch.setattr(type(scorer.model.model), "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match="the code of Qwen2ForCausalLM fails on a short text: ZeroDivisionError"):
        check_scorer(scorer)


@pytest.mark.parametrize("kind", ["t5", "vit", "clip", "wav2vec2"])
def test_what_is_no_language_model_is_refused_for_what_it_is(kind: str, tmp_path: Path) -> None:
    """It is in a local directory: nobody is asked to give one."""
    AutoConfig.for_model(kind, **{"num_layers": 1, "d_model": 16} if kind == "t5" else {}).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    for use in (lambda: Outline(ModelConfig(partial_pretrain=str(tmp_path))).path, lambda: load_for_training(str(tmp_path))):
        with pytest.raises(UserError) as caught:
            use()
        assert "local model directory" not in str(caught.value) and "Hub" not in str(caught.value)
        assert caught.value.what == f"transformers has no causal language model of type {kind}"


def test_a_failure_that_training_an_adapter_alone_has_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """CTRL changes its input in place, which transformers' own hook makes a tensor that must not be."""
    path_of(CTRL)
    monkeypatch.setattr(trial, "_chosen", {})
    monkeypatch.setattr(trial, "require_input_gradient", PreTrainedModel.enable_input_require_grads)
    with pytest.raises(UserError, match=r"its code fails .*in-place operation"):
        path_of(CTRL)
