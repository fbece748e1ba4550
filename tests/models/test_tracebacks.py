"""Families whose code once ended in a traceback, in training or in generation: each is computed, or refused with a reason."""

from typing import Any

import pytest
import torch
from prove.configs import families
from transformers import PretrainedConfig, PreTrainedModel

from verl.data.pack import collate
from verl.engine.scorers import TokenScorer
from verl.engine.trial import LENGTHS, choose_path, probe_documents
from verl.models.attention.plain import attention_per_document
from verl.models.load import language_class
from verl.models.twin import random_model, twin_configs
from verl.rollout import Options, Sampling, auto

pytestmark = pytest.mark.usefixtures("process_group")

# A decoder in another place, positions or heads of other names, a view of what attention returns, tuples, parts for pictures.
NAMES: tuple[str, ...] = (
    "afmoe",
    "biogpt",
    "deepseek_v32",
    "gemma3",
    "glm_moe_dsa",
    "jetmoe",
    "llama4_text",
    "modernbert-decoder",
    "mpt",
    "nemotron",
)
NAMES += ("olmo_hybrid", "qwen3_5_text", "qwen3_next", "stablelm")


def small(config: PretrainedConfig, attention: str) -> PreTrainedModel:
    """The first twin that its code takes."""

    def make(one: Any, attention: str | None = None) -> Any:
        options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
        return language_class(one).from_config(one, experts_implementation="eager", **options)

    for twin in twin_configs(config):
        try:
            random_model(make, twin, torch.float32)(input_ids=torch.arange(3, 9)[None], use_cache=False)
        except Exception:  # as in verl.engine.trial: not every architecture can be that small
            continue
        return random_model(lambda one: make(one, attention), twin, torch.float32)
    raise AssertionError("no twin")


@pytest.mark.parametrize("name", NAMES)
def test_each_is_trained_on_a_path_and_generates(name: str) -> None:
    config = families()[name]()
    path = choose_path(config, "here")
    model = small(config, path.attention)
    documents = probe_documents(model.config.get_text_config(decoder=True).vocab_size, LENGTHS)
    loss = TokenScorer(model, path=path)(collate(documents, range(len(documents)))).logprob_M.sum()
    loss.backward()
    assert loss.isfinite()
    # The native engine is tried first, and what it cannot run is a UserError.
    assert auto.choose(model, [0], Options(), is_shared=False).generate([[5, 6, 7]], Sampling(2))[0].token_ids


@pytest.mark.parametrize("options", [{}, {"sliding_window": 2}, {"soft_cap": 5.0}, {"sink_N": torch.zeros(4)}])
def test_what_attention_returns_can_be_viewed_as_some_models_do(options: dict[str, Any]) -> None:
    query_TND, key_TKD = torch.randn(7, 4, 8), torch.randn(7, 2, 8)
    output_TND = attention_per_document(query_TND, key_TKD, key_TKD, torch.tensor([0, 3, 7], dtype=torch.int32), **options)
    assert output_TND.is_contiguous() and output_TND.view(7, 32).shape == (7, 32)
