"""Classifiers: they learn what transformers' Trainer does, whatever the micro-batches and ranks; labels, measures, refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classified import WORDS, texts_with_labels, words, write_model, write_rows
from places import run_ranks
from runs import metrics_of, timeless
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    pipeline,
)

from verl.data.confusion import Confusion
from verl.data.labels import Labels
from verl.data.loader import row_order
from verl.errors import UserError
from verl.models.kind import CLASSIFIER, REWARD_MODEL, kind_of
from verl.trainer import reward_trainer

ROWS, STEPS = 48, 6
NAMES = tuple(WORDS)
EXACT: dict[str, object] = {
    "optim__lr_scheduler": "constant",
    "optim__warmup_steps_ratio": 0,
    "optim__weight_decay": 0,
    "optim__clip_grad": 0.5,
    "trainer__total_training_steps": STEPS,
}
SEVERAL = {"algorithm__problem": "several", "data__label_key": "tags"}
NUMBER = {"algorithm__problem": "number", "data__label_key": "stars"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts with one label, several and a number, a language model, and classifiers with random heads."""
    folder = tmp_path_factory.mktemp("classified")
    for name, rows in (("train", texts_with_labels(ROWS)), ("test", texts_with_labels(40, seed=1))):
        for row in rows:
            row["tags"] = [row["label"]] * (row["label"] != "neutral") + [noun for noun in ("film", "song") if noun in row["text"]]
            row["stars"] = 1.0 + NAMES.index(row["label"]) * 1.5
        write_rows(folder / f"{name}.jsonl", rows)
    write_model(folder / "model")
    for problem, labels in (("one", 3), ("several", 4), ("number", 1)):
        write_model(folder / problem, labels=labels)
    return folder


def train(folder: Path, output: str, **changes: object) -> list[dict[str, float]]:
    reward_trainer.main(words(folder, output, **changes))
    return metrics_of(folder / output)


def weights(folder: Path, step: int = STEPS) -> dict[str, Tensor]:
    return load_file(folder / f"global_step_{step}" / "model.safetensors")


def rows_of(folder: Path, name: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def target(row: dict[str, Any], problem: str) -> Any:
    """The label as transformers takes it."""
    if problem == "several":
        return [float(name in row["tags"]) for name in ("film", "negative", "positive", "song")]
    return row["stars"] if problem == "number" else NAMES.index(row["label"])


def trained_by_transformers(folder: Path, problem: str, tmp_path: Path) -> tuple[list[float], dict[str, Tensor]]:
    """The losses and weights of transformers' Trainer, on the same rows in the same order."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / problem, dtype=torch.float32)
    model.config.problem_type = {"one": "single_label_classification", "several": "multi_label_classification", "number": "regression"}[
        problem
    ]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = rows_of(folder)
    order = row_order(ROWS, 1, 0).tolist()
    examples = [{**tokenizer(rows[number]["text"]), "labels": target(rows[number], problem)} for number in order]

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(examples)

    options: dict[str, Any] = {"lr_scheduler_type": "constant", "adam_beta2": 0.95, "weight_decay": 0.0, "max_grad_norm": 0.5}
    options |= {"use_cpu": True, "report_to": [], "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-3}
    args = TrainingArguments(str(tmp_path / "theirs"), per_device_train_batch_size=8, max_steps=STEPS, **options)
    trainer = InOrder(model, args, DataCollatorWithPadding(tokenizer), examples)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, dict(model.state_dict())


@pytest.mark.parametrize(("problem", "keys"), [("one", {}), ("several", SEVERAL), ("number", NUMBER)])
def test_a_classifier_learns_what_transformers_trainer_learns(folder: Path, tmp_path: Path, problem: str, keys: dict[str, Any]) -> None:
    mine = train(folder, f"exact-{problem}", model__partial_pretrain=folder / problem, **EXACT, **keys)
    losses, theirs = trained_by_transformers(folder, problem, tmp_path)
    assert [step["train/loss"] for step in mine] == pytest.approx(losses, rel=1e-4), "logged with four digits"
    found, start = weights(folder / f"exact-{problem}"), load_file(folder / problem / "model.safetensors")
    moved, apart = (torch.cat([(found[name] - of[name]).flatten() for name in found]).norm() for of in (start, theirs))
    assert moved > 0.1 and apart < 1e-5 * torch.cat([one.flatten() for one in found.values()]).norm()
    assert apart < 1e-4 * moved


def test_neither_micro_batches_nor_ranks_change_what_is_learned(folder: Path) -> None:
    keys = {
        **EXACT,
        "model__partial_pretrain": folder / "one",
        "trainer__total_training_steps": 3,
        "data__val_files": folder / "test.jsonl",
    }
    whole = train(folder, "whole", **keys)
    cut = train(folder, "cut", **keys, data__max_tokens_per_micro_batch=128)
    run_ranks("-m", "verl.trainer.reward_trainer", *words(folder, "ranks", **keys))
    shard = {**keys, "model__strategy": "fsdp2"}
    run_ranks("-m", "verl.trainer.reward_trainer", *words(folder, "sharded", **shard))
    for name, found in (("cut", cut), ("ranks", metrics_of(folder / "ranks")), ("sharded", metrics_of(folder / "sharded"))):
        for mine, other in zip(whole, found, strict=True):
            for key in ("train/loss", "train/accuracy", "train/grad_norm", "val/loss", "val/accuracy", "val/macro_f1", "val/f1/negative"):
                assert other.get(key) == (None if mine.get(key) is None else pytest.approx(mine[key], rel=1e-5)), (name, key)
        for key, value in weights(folder / "whole", 3).items():
            torch.testing.assert_close(weights(folder / name, 3)[key], value, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """A language model that has learned the labels."""
    changes = {"data__val_files": folder / "test.jsonl", "trainer__total_training_steps": 60, "optim__lr": 3e-3}
    train(folder, "trained", **changes)
    return folder / "trained" / "global_step_60"


def test_a_classifier_knows_texts_that_it_has_not_seen(folder: Path, trained: Path) -> None:
    metrics = metrics_of(folder / "trained")
    assert metrics[0]["train/loss"] == pytest.approx(np.log(3)), "a head of zeros prefers no label"
    assert metrics[-1]["val/accuracy"] > 0.9 and metrics[-1]["val/macro_f1"] > 0.9 and metrics[-1]["val/f1/positive"] > 0.9
    said = (folder / "trained" / "train.log").read_text()
    assert "labels: negative 1" in said and "step 60: accuracy" in said and "  neutral: " in said


def test_the_saved_directory_has_its_labels_and_classifies_alike_in_transformers(folder: Path, trained: Path) -> None:
    config = json.loads((trained / "config.json").read_text())
    assert config["id2label"] == {"0": "negative", "1": "neutral", "2": "positive"} and config["label2id"]["positive"] == 2
    assert kind_of(str(trained)) == CLASSIFIER
    rows = rows_of(folder, "test")
    guess = pipeline("text-classification", str(trained), batch_size=8, device="cpu", dtype=torch.float32)
    found = [one["label"] for one in guess([row["text"] for row in rows])]
    accuracy = np.mean([label == row["label"] for label, row in zip(found, rows, strict=True)])
    assert accuracy == pytest.approx(metrics_of(folder / "trained")[-1]["val/accuracy"])


def test_a_resumed_run_is_an_uninterrupted_one(folder: Path) -> None:
    changes = {"data__val_files": folder / "test.jsonl", "trainer__test_freq": 3}
    whole = train(folder, "uninterrupted", **changes, trainer__save_freq=3)
    half = folder / "uninterrupted" / "global_step_3"
    rest = train(folder, "rest", **changes, trainer__resume_mode="resume_path", trainer__resume_from_path=half)
    assert timeless(rest) == timeless(whole[3:])
    assert all(torch.equal(value, weights(folder / "rest")[key]) for key, value in weights(folder / "uninterrupted").items())


def test_a_classifier_goes_on_from_a_classifier_with_its_labels(folder: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(folder / "two.jsonl", [row for row in rows_of(folder) if row["label"] != "neutral"])
    keys = {"model__partial_pretrain": trained, "data__train_files": folder / "two.jsonl", "trainer__total_training_steps": 1}
    (step,) = train(folder, "on", **keys)
    assert step["train/loss"] < 0.3 and "no row of data.train_files has the label neutral" in capsys.readouterr().out
    assert json.loads((folder / "on/global_step_1/config.json").read_text())["id2label"]["1"] == "neutral"
    with pytest.raises(UserError, match=r"has the labels negative, neutral, positive, not positive, negative in this order"):
        train(folder, "other", **keys, algorithm__labels="[positive,negative]")
    with pytest.raises(UserError, match=r"was trained for one label of a text\n  fix: set algorithm.problem=one"):
        train(folder, "other", **keys, **SEVERAL)


def test_a_number_is_learned_by_a_reward_model(folder: Path) -> None:
    changes = {"data__val_files": folder / "test.jsonl", "trainer__total_training_steps": 60, "optim__lr": 3e-3}
    metrics = train(folder, "stars", **changes, **NUMBER)
    assert metrics[-1]["val/mean_absolute_error"] < 0.7 and "val/macro_f1" not in metrics[-1]
    assert kind_of(str(folder / "stars" / "global_step_60")) == REWARD_MODEL


def test_whole_numbers_and_chats_are_read_and_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels of a table with gaps are floats; ten comes after two."""
    labels = {"negative": 2.0, "neutral": 10, "positive": 1}
    chats = [
        {"messages": [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": "Noted."}], "label": labels[row["label"]]}
        for row in rows_of(folder)
    ]
    write_rows(folder / "chats.jsonl", chats)
    train(folder, "chats", data__train_files=folder / "chats.jsonl", trainer__total_training_steps=1)
    assert json.loads((folder / "chats/global_step_1/config.json").read_text())["id2label"] == {"0": "1", "1": "2", "2": "10"}
    assert "Noted." in capsys.readouterr().out
    names = {"algorithm__labels": "[zero,bad,good,x,x2,x3,x4,x5,x6,x7,so]"}
    train(folder, "named", data__train_files=folder / "chats.jsonl", trainer__total_training_steps=1, **names)
    assert "labels: zero 0, bad " in capsys.readouterr().out, "with names, a whole number is the number of one"


def test_a_line_end_in_a_label_does_not_split_a_line_of_the_log() -> None:
    odd = Confusion.of(Labels(("a/b\nc", "ü\x1b[1m")), np.array([0, 1]), np.array([0, 0]))
    assert [line.partition(":")[0] for line in odd.describe().splitlines()[1:]] == ["  a/b\\nc", "  ü\\x1b[1m"]
    assert "val/f1/a/b\\nc" in odd.metrics("val/", 5) and odd.table()[0]["label"] == "a/b\nc"


def test_macro_f1_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    actual, predicted = draw.integers(0, 4, 50), draw.integers(0, 5, 50)
    found = Confusion.of(Labels(tuple("abcdef")), actual, predicted)
    assert found.macro_f1 == pytest.approx(metrics.f1_score(actual, predicted, average="macro", zero_division=0))
    assert found.accuracy == metrics.accuracy_score(actual, predicted)
    assert found.counts_LL is not None
    np.testing.assert_array_equal(found.counts_LL[:5, :5], metrics.confusion_matrix(actual, predicted))
    both = draw.integers(0, 2, (2, 30, 4))
    several = Confusion.of(Labels(tuple("abcd"), "several"), *both)
    assert several.macro_f1 == pytest.approx(metrics.f1_score(*both, average="macro", zero_division=0))
    assert several.accuracy == metrics.accuracy_score(*both)


def test_long_texts_are_cut_on_the_side_that_is_named(folder: Path) -> None:
    keys: dict[str, object] = {"data__max_length": 4, "trainer__total_training_steps": 1}
    with pytest.raises(UserError, match=r"rows are longer than data\.max_length=4"):
        train(folder, "long", **keys)
    left, right = (train(folder, side, **keys, data__truncation=side)[0]["train/tokens"] for side in ("left", "right"))
    assert left == right == 8 * 4


@pytest.mark.parametrize(
    ("rows", "changes", "said"),
    [
        ([{"text": "a"}], {}, "rows.jsonl:1: column 'label' is missing"),
        ([{"label": "x"}], {}, "rows.jsonl:1: column 'prompt' is missing"),
        ([{"text": " ", "label": "x"}], {}, "rows.jsonl:1: column 'text' is empty"),
        ([{"text": "a", "label": "x"}, {"text": "a", "label": None}], {}, "rows.jsonl:2: column 'label' is null"),
        ([{"text": "a", "label": 1.5}], {}, "expected a label: a text or a whole number"),
        ([{"text": "a", "label": ["x"]}], {}, "fix: set algorithm.problem=several"),
        ([{"text": "a", "label": "x"}], SEVERAL | {"data__label_key": "label"}, "expected a list of labels"),
        ([{"text": "a", "label": "x"}], NUMBER | {"data__label_key": "label"}, "expected a number"),
        ([{"text": "a", "label": "x"}] * 3, {}, "all 3 rows have the label 'x', so there is nothing to learn"),
        ([{"text": "a", "label": "z"}], {"algorithm__labels": "[x,y]"}, "has the label 'z', none of x, y"),
        ([{"messages": [{"content": "a"}], "label": "x"}], {}, r"rows.jsonl:1: messages: messages\[0\]"),
        ([{"text": "a", "label": "x"}], {"algorithm__labels": "[x,x]"}, "algorithm.labels: names 'x' twice"),
        ([{"text": "a", "label": "x"}], {"algorithm__labels": "[x]"}, "algorithm.labels: 1 labels leave nothing to choose"),
        ([{"text": "a", "label": "x"}], NUMBER | {"algorithm__labels": "[x,y]"}, "algorithm.labels: a number has no labels"),
        ([{"text": "a", "label": "x"}], {"algorithm__problem": "two"}, "algorithm.problem: found 'two'"),
        ([{"text": "a", "label": "x"}], {"model__lora_rank": 4}, "model.lora_rank: a classifier is trained whole"),
        ([{"text": "a", "label": "x"}], {"data__chosen_key": "text"}, "data.chosen_key: is a key of pairs"),
        ([{"text": "a", "label": "x"}], {"model__context_parallel_size": 2}, "context parallelism is not supported"),
    ],
)
def test_a_wrong_input_is_an_error_with_its_place(
    folder: Path, tmp_path: Path, rows: list[dict[str, Any]], changes: dict[str, Any], said: str
) -> None:
    write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=said):
        train(folder, "wrong", **{"data__train_files": tmp_path / "rows.jsonl", **changes})


def test_shares_of_files_are_refused_and_so_is_an_unknown_label_in_validation(folder: Path) -> None:
    shares = f"[{{path: {folder / 'train.jsonl'}, weight: 1}}]"
    with pytest.raises(UserError, match="shares of files are not supported"):
        train(folder, "wrong", data__train_files=shares)
    write_rows(folder / "odd.jsonl", [{"text": "the film", "label": "furious"}])
    with pytest.raises(UserError, match=r"odd.jsonl:1: column 'label' has the label 'furious', none of negative, neutral, positive"):
        train(folder, "wrong", data__val_files=folder / "odd.jsonl")


def test_a_dry_run_counts_the_labels(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reward_trainer.main(words(folder, "dry", trainer__dry_run=True))
    said = capsys.readouterr().out
    assert "labels: negative 1" in said and "plan: a classifier, 6 steps (6 an epoch) of 8 rows" in said and not (folder / "dry").exists()


SMOOTH = """
from dataclasses import dataclass

import torch.nn.functional as F

from verl.algorithms import classify
from verl.engine.contract import LossOut

scorer, trains = "labels", "a smooth classifier"


@dataclass
class Settings(classify.Settings):
    # Share of the probability that all labels have alike.
    smoothing: float = 0.1


class Loss(classify.Loss):
    def __init__(self, settings, labels_N):
        super().__init__(settings, labels_N)
        self._smoothing = settings.smoothing

    def loss(self, out, batch):
        plain = super().loss(out, batch)
        label_S = self._labels_N[batch.sample_ids_S[: batch.documents]]
        smooth = F.cross_entropy(out.score_S, label_S, reduction="sum", label_smoothing=self._smoothing)
        return LossOut(smooth, {}, plain.count_sums)
"""


def test_a_method_of_ones_own_for_labels_is_one_file(folder: Path, tmp_path: Path) -> None:
    """Label smoothing: the loss of the built-in one, with a share of the probability for the other labels."""
    (tmp_path / "smooth.py").write_text(SMOOTH)
    found = train(folder, "smooth", algorithm__name=tmp_path / "smooth.py", algorithm__smoothing=0.5, data__val_files=folder / "test.jsonl")
    assert found[-1]["train/loss"] > 0.5 and "val/macro_f1" in found[-1]
