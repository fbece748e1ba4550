"""Evaluation of classifiers, their probabilities as rewards, and the commands that refuse them by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classified import NOUNS, WORDS, texts_with_labels, words, write_model, write_rows
from reward_models import write_reward_model
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from verl.config.commands import EvalConfig
from verl.config.load import load_config
from verl.config.ppo import PPOConfig, RewardConfig, RewardModelConfig
from verl.early import check_model
from verl.errors import UserError
from verl.eval import against
from verl.eval.sft_evaluator import evaluate
from verl.models.kind import check_kind
from verl.rewards._scoring import Rewards
from verl.rl.roles import check_names
from verl.trainer import reward_trainer

ROWS = texts_with_labels(40, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that has learned a little, and rows for it."""
    folder = tmp_path_factory.mktemp("classifier")
    write_rows(folder / "train.jsonl", texts_with_labels(48))
    write_rows(folder / "test.jsonl", ROWS)
    write_model(folder / "model")
    reward_trainer.main(words(folder, "run", trainer__total_training_steps=8, optim__lr=3e-3))
    return folder


@pytest.fixture(scope="module")
def classifier(folder: Path) -> Path:
    return folder / "run" / "global_step_8"


def logits(path: Path, texts: list[str]) -> np.ndarray:
    """What transformers says, one text at a time."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return np.concatenate([model.eval()(**tokenizer(text, return_tensors="pt")).logits.numpy() for text in texts])


def evaluated(folder: Path, model: Path, output: str, *more: str, rows: str = "test.jsonl") -> dict[str, Any]:
    given = [f"model_path={model}", f"test_file={folder / rows}", f"output_dir={folder / output}"]
    return evaluate(load_config(EvalConfig, [*given, *more]))


def test_an_evaluation_counts_what_transformers_predicts(folder: Path, classifier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = evaluated(folder, classifier, "eval")
    names = list(WORDS)
    predicted = [names[number] for number in logits(classifier, [row["text"] for row in ROWS]).argmax(-1)]
    lines = [json.loads(line) for line in (folder / "eval" / "predictions.jsonl").read_text().splitlines()]
    assert [line["response"] for line in lines] == predicted and [line["reference"] for line in lines] == [row["label"] for row in ROWS]
    right = [said == row["label"] for said, row in zip(predicted, ROWS, strict=True)]
    assert results["accuracy"] == results["exact_match"] == np.mean(right) and 0 < sum(right) < len(right)
    low, high = results["confidence_interval_95"]
    assert low < results["accuracy"] < high and sum(map(sum, results["confusion"])) == 40
    assert results == json.loads((folder / "eval" / "results.json").read_text())
    said = capsys.readouterr().out
    assert "95% interval" in said and "rows by their label and, across, the predicted one" in said


def test_two_evaluations_are_compared_row_by_row(folder: Path, classifier: Path) -> None:
    evaluated(folder, classifier, "first")
    evaluated(folder, write_model(folder / "untrained", labels=3, id2label=dict(enumerate(WORDS))), "second")
    against.compare_directories(str(folder / "first"), str(folder / "second"), Console())


@pytest.mark.parametrize(
    ("words_", "said"),
    [
        (["metric=exact"], "metric=exact: .* is a classifier, which writes no answers"),
        (["few_shot=2", "few_shot_file=x.jsonl"], "few_shot=2: .* is a classifier"),
        (["response_key=colour"], "test.jsonl:1: column 'colour' is missing"),
    ],
)
def test_keys_of_answers_are_refused(folder: Path, classifier: Path, words_: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        evaluated(folder, classifier, "refused", *words_)


def test_a_text_beyond_the_models_positions_is_named(folder: Path, classifier: Path) -> None:
    write_rows(folder / "long.jsonl", [ROWS[0], {"text": "good " * 200, "label": "positive"}])
    with pytest.raises(UserError, match=r"long.jsonl:2: the text has \d+ tokens; the model has 128 positions"):
        evaluated(folder, classifier, "long", rows="long.jsonl")


# As a reward


def test_the_probability_of_a_label_is_a_reward(classifier: Path) -> None:
    answers = [f"the {noun} was {word}" for noun in NOUNS[:2] for word in ("good", "bad", "so")]
    model = RewardModelConfig(str(classifier), label="positive", reads="answer", weight=2.0)
    scored = Rewards(RewardConfig(None), model, say=print).score(["How was it?"] * 6, answers, [{}] * 6)
    expected = torch.from_numpy(logits(classifier, answers)).softmax(-1)[:, 2].numpy()
    np.testing.assert_allclose(scored.each["model"], expected, atol=1e-5)
    np.testing.assert_allclose(scored.reward_A, 2 * expected, atol=1e-5)
    chats = Rewards(RewardConfig(None), RewardModelConfig(str(classifier), label="positive"), say=print)
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    whole = [{"role": "user", "content": "How was it?"}, {"role": "assistant", "content": answers[0]}]
    text = str(tokenizer.apply_chat_template(whole, tokenize=False))
    expected = torch.from_numpy(logits(classifier, [text])).softmax(-1)[:, 2].numpy()
    np.testing.assert_allclose(chats.score(["How was it?"], answers[:1], [{}]).each["model"], expected, atol=1e-5)


def test_several_reward_models_are_asked_at_the_same_time(classifier: Path, tmp_path: Path) -> None:
    other = write_reward_model(tmp_path)
    both = RewardModelConfig([str(other), str(classifier)], weight=[0.5, -1.0], label=[None, "negative"], reads=["chat", "answer"])
    arguments: tuple[list[str], list[str], list[dict[str, Any]]] = (["q", "r"], ["the film was bad", "the film was good"], [{}, {}])
    found = Rewards(RewardConfig(None), both, say=print).score(*arguments)
    first = Rewards(RewardConfig(None), RewardModelConfig(str(other)), say=print).score(*arguments)
    second = Rewards(RewardConfig(None), RewardModelConfig(str(classifier), label="negative", reads="answer"), say=print).score(*arguments)
    assert list(found.each) == ["model", "model_2"]
    np.testing.assert_allclose(found.reward_A, 0.5 * first.reward_A - second.reward_A, rtol=1e-6)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, r"has 3 labels, expected one: negative, neutral, positive\n  fix: name the label .*reward_model.label=positive"),
        ({"label": "happy"}, "reward_model.label=happy: .* has the labels negative, neutral, positive"),
        ({"label": "positive", "reads": "all"}, "reward_model.reads: found 'all'"),
        ({"label": ["positive", "negative"]}, "reward_model.label: 2 values for 1 reward model\n"),
        ({"label": "positive", "weight": float("nan")}, "reward_model.weight: found nan"),
    ],
)
def test_a_wrong_key_of_a_reward_model_is_an_error(classifier: Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Rewards(RewardConfig(None), RewardModelConfig(str(classifier), **keys), say=print)


def test_a_model_with_one_output_has_no_labels(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has one output and no labels\n  fix: remove this key"):
        Rewards(RewardConfig(None), RewardModelConfig(str(write_reward_model(tmp_path)), label="positive"), say=print)


# As what it is not


def test_other_commands_refuse_a_classifier_by_name(folder: Path, classifier: Path) -> None:
    check_model(str(classifier), "model_path", may_classify=True)
    for key in ("model_path", "source"):
        with pytest.raises(UserError, match=r"is a classifier \(Qwen2ForSequenceClassification\), not a language model or a LoRA adapter"):
            check_model(str(classifier), key)
    with pytest.raises(UserError, match=r"verl eval measures it; the probability of a label is a reward with reward_model.path"):
        check_kind(str(classifier), ("a language model",))
    config = load_config(PPOConfig, [f"model.partial_pretrain={classifier}", f"data.train_files={folder / 'test.jsonl'}"])
    with pytest.raises(UserError, match=r"model.partial_pretrain=.* is a classifier"):
        check_names(config, type("Method", (), {"needs_critic": False, "reference": None})())
    with pytest.raises(UserError, match=r"is a classifier .*not a language model or a reward model"):
        reward_trainer.main(words(folder, "pairs", algorithm__name="bradley_terry", model__partial_pretrain=classifier))
