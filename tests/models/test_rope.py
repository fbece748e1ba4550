"""Rotary embeddings whose frequencies depend on the length of the text: each packed document has those of its own length."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import write_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PretrainedConfig, PreTrainedModel

from verl.data.pack import Document, collate
from verl.engine import scorers
from verl.engine.scorers import TokenScorer
from verl.models.load import load_for_training

pytestmark = pytest.mark.usefixtures("process_group")

LIMIT = 32  # tokens, up to which the frequencies are the same
SIZES: dict[str, Any] = dict(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    pad_token_id=None, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
LONGROPE: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 4.0}
DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
MODELS: dict[str, tuple[type[PreTrainedModel], PretrainedConfig]] = {
    "longrope": (
        Phi3ForCausalLM,
        Phi3Config(**SIZES, original_max_position_embeddings=LIMIT, rope_parameters=LONGROPE | {"original_max_position_embeddings": LIMIT}),
    ),
    "dynamic": (LlamaForCausalLM, LlamaConfig(**SIZES, max_position_embeddings=LIMIT, rope_parameters=DYNAMIC)),
}
LENGTHS = (12, 90, 20, 50)  # short ones before, between and beside long ones


def documents() -> list[Document]:
    random = np.random.default_rng(5)
    return [(random.integers(0, 512, n).astype(np.int32), np.ones(n, dtype=bool)) for n in LENGTHS]


@torch.no_grad()
def alone(path: Path) -> list[Tensor]:
    """Log-probabilities of each document by transformers, each in a fresh model: dynamic scaling keeps the longest length so far."""
    found = []
    for ids, _ in documents():
        model = load_for_training(str(path), attention="eager").model.eval()
        ids_L = torch.from_numpy(ids).long()
        logprob_LV = model(input_ids=ids_L[None], use_cache=False).logits[0].log_softmax(-1)
        found.append(logprob_LV[:-1].gather(1, ids_L[1:, None]).squeeze(1))
    return found


@torch.no_grad()
def packed(path: Path) -> list[Tensor]:
    scorer = TokenScorer(load_for_training(str(path)).model).eval()
    for _ in range(2):  # the second time, a long document has been seen
        found_M = scorer(collate(documents(), range(len(LENGTHS)))).logprob_M
    return list(found_M.split([length - 1 for length in LENGTHS]))


@pytest.fixture(scope="module", params=MODELS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, config = MODELS[request.param]
    return write_model(tmp_path_factory.mktemp("rope") / request.param, config, kind=kind)


def test_a_short_document_beside_a_long_one_has_the_log_probabilities_that_it_has_alone(path: Path) -> None:
    for found, expected in zip(packed(path), alone(path), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_with_the_frequencies_of_the_longest_document_the_short_ones_would_differ(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorers, "_length_rope", lambda model: None)
    differences = [float((found - expected).abs().max()) for found, expected in zip(packed(path), alone(path), strict=True)]
    assert min(differences[0], differences[2]) > 1e-3


def test_the_frequencies_are_those_of_each_documents_own_length(path: Path) -> None:
    model = load_for_training(str(path)).model
    rope = TokenScorer(model).rope
    assert rope is not None
    module, inputs, batch = model.model.rotary_emb, torch.zeros(1, 1, 64), collate(documents(), range(len(LENGTHS)))
    position_1T = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    with rope.documents(batch):
        cos_1TD = module(inputs, position_1T)[0]
    for length, cos_1LD in zip(LENGTHS, cos_1TD.split(list(LENGTHS), dim=1), strict=True):
        fresh = type(model)(model.config).model.rotary_emb
        torch.testing.assert_close(cos_1LD, fresh(inputs, torch.arange(length)[None])[0], rtol=0, atol=1e-6)
