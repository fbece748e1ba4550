"""Reward models as rewards: packed batches say what transformers says of each chat, whatever the tokenizers are."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reward_models import PLAIN, PROBLEMS, scores_of_transformers, write_reward_model
from tiny import qwen2_config, write_model
from transformers import (
    AutoTokenizer,
)

from verl.config.ppo import RewardConfig, RewardModelConfig
from verl.engine.trial import check_hidden
from verl.engine.value_scorers import RewardScorer
from verl.errors import UserError
from verl.models.heads import load_reward_model
from verl.models.shards import small_twin
from verl.models.tiny import tiny_tokenizer
from verl.plugin import load
from verl.rewards._model import RewardModel
from verl.rewards._scoring import Rewards

CHATS = [[{"role": "user", "content": problem.question}] for problem in PROBLEMS]
ANSWERS = [problem.answer for problem in PROBLEMS]


def model_of(path: Path, said: list[str] | None = None, **keys: object) -> RewardModel:
    policy = tiny_tokenizer([f"{problem.question}\n{problem.answer}" for problem in PROBLEMS])
    said = [] if said is None else said
    return RewardModel(RewardModelConfig(str(path), **keys), device="cpu", tokenizer=policy, say=said.append)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["the policy's tokenizer", "another template", "another architecture"])
def test_scores_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    path = write_reward_model(tmp_path, template=PLAIN if kind == "another template" else None, llama=kind == "another architecture")
    said: list[str] = []
    scores = model_of(path, said, max_tokens_per_micro_batch=300).score(CHATS, ANSWERS)
    expected = scores_of_transformers(path, CHATS, ANSWERS)
    np.testing.assert_allclose(scores, expected, atol=1e-4, rtol=1e-5)
    assert expected.std() > 0.1 and len(said) == (kind == "another template")
    assert not said or "another tokenizer or chat template" in said[0]


def test_answers_that_no_data_set_holds_are_scored_too(tmp_path: Path) -> None:
    path = write_reward_model(tmp_path)
    answers = ["", " ", "<|im_end|>", "#### 5\n\n"]
    scores = model_of(path).score(CHATS[:4], answers)
    np.testing.assert_allclose(scores[[0, 1, 3]], scores_of_transformers(path, CHATS[:4], answers)[[0, 1, 3]], atol=1e-4)
    assert np.isfinite(scores).all()


def test_a_reward_model_and_a_grader_add_up(tmp_path: Path) -> None:
    config = RewardModelConfig(str(write_reward_model(tmp_path)), weight=0.5)
    rows = [{"reference": answer} for answer in ANSWERS[:3]]
    questions = [problem.question for problem in PROBLEMS[:3]]
    scored = Rewards(RewardConfig("gsm8k", weights=[2.0]), config, say=print).score(questions, ANSWERS[:3], rows)
    alone = model_of(tmp_path).score(CHATS[:3], ANSWERS[:3])
    np.testing.assert_allclose(scored.reward_A, 2 + 0.5 * alone, rtol=1e-5)
    assert scored.each["gsm8k"].tolist() == [1, 1, 1] and set(scored.each) == {"gsm8k", "model"}
    only = Rewards(RewardConfig(None), config, say=print).score(questions, ANSWERS[:3], rows)
    np.testing.assert_allclose(only.reward_A, 0.5 * alone, rtol=1e-5)


def test_a_long_answer_has_a_micro_batch_of_its_own_up_to_the_models_positions(tmp_path: Path) -> None:
    path = write_reward_model(tmp_path)
    long = "12 " * 100
    assert np.isfinite(model_of(path, max_tokens_per_micro_batch=50).score(CHATS[:2], [long, "5"])).all()
    with pytest.raises(UserError, match="the model's context has 512"):
        model_of(path).score(CHATS[:1], ["12 " * 600])


def test_a_score_that_is_no_number_is_an_error_of_its_row(tmp_path: Path) -> None:
    path = write_reward_model(tmp_path)
    scorer = Rewards(RewardConfig(None), RewardModelConfig(str(path)), say=print)
    judge: Any = scorer.model._scorer.model
    with torch.no_grad():
        judge.score.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"train.jsonl:4: reward model returned nan"):
        scorer.score(["?"], ["!"], [{}], places=["train.jsonl:4"])


def test_a_model_without_one_score_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"without a scoring head(.|\n)*reward_trainer"):
        model_of(write_model(tmp_path / "language", qwen2_config()))
    with pytest.raises(UserError, match="has 3 labels, expected one"):
        model_of(write_reward_model(tmp_path / "three", labels=3))
    with pytest.raises(UserError, match="no such model directory"):
        model_of(tmp_path / "nowhere")


CUSTOM = """
import torch
from transformers import Qwen2Config, Qwen2Model, Qwen2PreTrainedModel


class JudgeConfig(Qwen2Config):
    model_type = "judge"


class Judge(Qwen2PreTrainedModel):
    config_class = JudgeConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = Qwen2Model(config)
        self.score = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
        self.post_init()

    def forward(self, **inputs):
        return self.score(self.model(**inputs).last_hidden_state)
"""


def written_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    """A directory whose code is its own, and that code's class."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", list(sys.path))
    tokenizer = AutoTokenizer.from_pretrained(write_reward_model(tmp_path))
    (tmp_path / "judge.py").write_text(CUSTOM)
    module = load("verl.rewards", str(tmp_path / "judge.py"))
    shape = {key: value for key, value in qwen2_config(vocab_size=len(tokenizer)).to_dict().items() if key != "model_type"}
    judge = write_model(tmp_path, module.JudgeConfig(**shape), kind=module.Judge)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "judge.JudgeConfig", "AutoModel": "judge.Judge"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return judge, module.Judge


def test_a_model_with_a_head_of_its_own_code_runs_only_where_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Qwen2.5-Math-RM has one: two layers."""
    judge, kind = written_judge(tmp_path, monkeypatch)
    tokenizer = AutoTokenizer.from_pretrained(judge)
    with pytest.raises(UserError):
        model_of(judge)
    scores = model_of(judge, trust_remote_code=True).score(CHATS[:3], ANSWERS[:3])
    whole = [[*chat, {"role": "assistant", "content": answer}] for chat, answer in zip(CHATS[:3], ANSWERS[:3], strict=True)]
    model = kind.from_pretrained(judge, dtype=torch.float32).eval()
    inputs: list[Any] = [tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True) for chat in whole]
    with torch.no_grad():
        expected = [model(input_ids=row)[0, -1, 0].item() for row in (each["input_ids"] for each in inputs)]
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert np.std(expected) > 0.01


@pytest.mark.parametrize("kind", ["qwen2", "llama", "code of its own"])
def test_in_bfloat16_a_small_model_of_the_architecture_is_looked_at(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = kind == "code of its own"
    path = written_judge(tmp_path, monkeypatch)[0] if own else write_reward_model(tmp_path, llama=kind == "llama")
    model = load_reward_model(str(path), dtype=torch.bfloat16, trust_remote_code=own).model
    twin = small_twin(model, torch.device("cpu"))
    assert type(twin) is type(model) and {p.dtype for p in twin.parameters()} == {torch.float32}
    check_hidden(RewardScorer(twin), where="here")
    monkeypatch.setattr("verl.engine.trial.TOLERANCE", 0)
    with pytest.raises(UserError, match="in packed batches differ from those of single documents"):
        check_hidden(RewardScorer(twin), where="here")
