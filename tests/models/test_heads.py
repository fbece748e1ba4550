"""Critics and reward models: in packed batches they say what transformers' own classes say of each document alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import RandomDocuments, qwen2_config, write_model
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    Qwen2ForSequenceClassification,
    Qwen2ForTokenClassification,
)

from verl.algorithms import bradley_terry, ppo
from verl.config.shared import OptimConfig
from verl.data.pack import collate
from verl.engine.engine import Engine
from verl.engine.scorers import Scorer
from verl.engine.trial import check_hidden
from verl.engine.value_scorers import RewardScorer, ValueScorer
from verl.errors import UserError
from verl.models.heads import has_head, load_critic, load_reward_model
from verl.models.load import Loaded
from verl.models.saved import export_model

pytestmark = pytest.mark.usefixtures("process_group")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def critic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("critic"), qwen2_config(num_labels=1), kind=Qwen2ForTokenClassification)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = qwen2_config(num_labels=1, pad_token_id=0)
    return write_model(tmp_path_factory.mktemp("reward"), config, kind=Qwen2ForSequenceClassification)


def documents(number: int = 4) -> list[tuple[np.ndarray, np.ndarray]]:
    return [RandomDocuments().document(i) for i in range(number)]


def values_alone(path: Path) -> Tensor:
    """The value before each trained token, by transformers alone, one document at a time."""
    model = AutoModelForTokenClassification.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        values = [model(torch.from_numpy(ids).long()[None]).logits[0, :-1, 0][torch.from_numpy(mask[1:])] for ids, mask in documents()]
    return torch.cat(values)


def test_values_in_a_packed_batch_are_those_of_transformers_before_each_token(critic: Path) -> None:
    scorer = ValueScorer(load_critic(str(critic)).model)
    value_M = scorer(collate(documents(), range(4), multiple_of_tokens=64)).value_M
    torch.testing.assert_close(value_M, values_alone(critic), rtol=1e-4, atol=1e-4)
    assert value_M.std() > 0.1, "values that are all alike would hide a wrong position"


def test_scores_in_a_packed_batch_are_those_of_transformers_at_the_last_token(reward_model: Path) -> None:
    alone = AutoModelForSequenceClassification.from_pretrained(reward_model, dtype=torch.float32, attn_implementation="eager").eval()
    rows = [(np.where(ids == 0, 1, ids).astype(np.int32), mask) for ids, mask in documents()]  # 0 is padding to transformers
    with torch.no_grad():
        expected_S = torch.cat([alone(torch.from_numpy(ids).long()[None]).logits[:, 0] for ids, _ in rows])
        batch = collate(rows, range(4), multiple_of_tokens=64)
        found_S = RewardScorer(load_reward_model(str(reward_model)).model)(batch).score_S
    assert batch.has_filler and len(batch.sample_ids_S) == 5
    torch.testing.assert_close(found_S, expected_S, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (LlamaForCausalLM, LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=512)),
        (GPT2LMHeadModel, GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=512, bos_token_id=0, eos_token_id=0)),
    ],
)
def test_a_critic_from_a_language_model_says_zero_at_first(kind: type, config: PretrainedConfig, tmp_path: Path) -> None:
    scorer = ValueScorer(load_critic(str(write_model(tmp_path, config, kind=kind))).model)
    assert scorer(collate(documents(), range(4))).value_M.eq(0).all()


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (LlamaForCausalLM, LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=512)),
        (GPT2LMHeadModel, GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=512, bos_token_id=0, eos_token_id=0)),
    ],
)
@pytest.mark.parametrize("load", [load_critic, load_reward_model])
def test_an_architecture_that_mixes_documents_is_refused_though_its_head_says_zero(
    load: Callable[[str], Loaded], kind: type, config: PretrainedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = Scorer(load(str(write_model(tmp_path, config, kind=kind))).model)
    check_hidden(scorer, where="here")
    monkeypatch.setattr(
        "verl.engine.scorers.packed_kwargs", lambda batch: {"cu_seq_lens_q": torch.tensor([0, len(batch.input_ids_T)]), "max_length_q": 8}
    )
    with pytest.raises(UserError, match=r"here: the hidden states of .* differ from those of single documents"):
        check_hidden(scorer, where="here")


def engine_of(scorer: Scorer) -> Engine:
    optim = OptimConfig(lr=1e-2, lr_scheduler="constant", warmup_steps_ratio=0.0)
    return Engine(scorer, optim, total_steps=10, device=CPU, compute_dtype=torch.float32)


def test_a_critic_learns_is_saved_and_loads_again_with_transformers_too(language_model: Path, tmp_path: Path) -> None:
    loaded = load_critic(str(language_model))
    engine, learned = engine_of(ValueScorer(loaded.model)), ppo.ValueLoss(ppo.Settings(value_clip=None))
    returns = [np.full(int(mask[1:].sum()), 1.0 + number, dtype=np.float32) for number, (_, mask) in enumerate(documents())]
    zeros = [np.zeros_like(array) for array in returns]
    batch = collate(documents(), range(4), values={"return_M": returns, "value_M": zeros})
    losses = [float(engine.train_step([batch], learned, step)["loss"]) for step in range(10)]
    assert losses[-1] < losses[0] / 4
    with engine.weights.in_model():
        export_model(tmp_path / "critic", loaded.model, loaded.saved_dtypes)
    (out,) = engine.score([batch])
    assert not out.value_M.requires_grad
    torch.testing.assert_close(ValueScorer(load_critic(str(tmp_path / "critic")).model)(batch).value_M, out.value_M)
    torch.testing.assert_close(values_alone(tmp_path / "critic"), out.value_M, rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "critic" / "config.json").read_text())["architectures"] == ["Qwen2ForTokenClassification"]


def test_a_reward_model_learns_which_answer_was_chosen(language_model: Path) -> None:
    engine = engine_of(RewardScorer(load_reward_model(str(language_model)).model))
    batch = collate(documents(8), range(8), multiple_of_tokens=512)
    metrics = [engine.train_step([batch], bradley_terry.Loss(None), step) for step in range(10)]
    assert float(metrics[0]["loss"]) == pytest.approx(np.log(2)) and float(metrics[0]["accuracy"]) == 0.0
    assert float(metrics[-1]["accuracy"]) == 1.0 and float(metrics[-1]["loss"]) < 0.5


def test_a_language_model_is_told_from_a_reward_model(language_model: Path, reward_model: Path) -> None:
    assert has_head(str(reward_model)) and not has_head(str(language_model))


def test_a_model_with_more_labels_than_one_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path, qwen2_config(num_labels=3), kind=Qwen2ForTokenClassification)
    with pytest.raises(UserError, match="has 3 labels, expected one"):
        load_critic(str(path))


def test_an_architecture_without_such_a_head_is_refused_by_name(tmp_path: Path) -> None:
    shape: dict[str, Any] = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=512)
    path = write_model(tmp_path, CohereConfig(**shape, pad_token_id=0, bos_token_id=1, eos_token_id=2), kind=CohereForCausalLM)
    with pytest.raises(UserError, match="no cohere model with a classification head"):
        load_critic(str(path))


REMOTE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen2Model


class TwoLayerRewardConfig(Qwen2Config):
    model_type = "two_layer_reward"


class TwoLayerReward(PreTrainedModel):
    config_class = TwoLayerRewardConfig
    base_model_prefix = "model"
    _supports_attention_backend = True
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.model = Qwen2Model(config)
        self.score = torch.nn.Sequential(torch.nn.Linear(config.hidden_size, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        self.post_init()
"""


def test_a_custom_head_is_taken_with_its_code_only_when_that_is_trusted(reward_model: Path, tmp_path: Path) -> None:
    (tmp_path / "modeling.py").write_text(REMOTE)
    config = json.loads((reward_model / "config.json").read_text())
    names = {"AutoConfig": "modeling.TwoLayerRewardConfig", "AutoModel": "modeling.TwoLayerReward"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "two_layer_reward", "auto_map": names}))
    from safetensors.torch import load_file, save_file

    weights = {name: tensor for name, tensor in load_file(reward_model / "model.safetensors").items() if name != "score.weight"}
    head = {"score.0.weight": torch.randn(8, 64), "score.0.bias": torch.randn(8), "score.2.weight": torch.randn(1, 8)}
    save_file({**weights, **head, "score.2.bias": torch.randn(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="trust_remote_code"):
        load_reward_model(str(tmp_path))
    scorer = RewardScorer(load_reward_model(str(tmp_path), trust_remote_code=True).model)
    found_S = scorer(collate(documents(), range(4))).score_S
    alone = torch.cat([scorer(collate([document], [0])).score_S for document in documents()])
    torch.testing.assert_close(found_S, alone)
    assert found_S.std() > 0
