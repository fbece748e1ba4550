"""`verl reward` with each preference loss: what it learns from, what it keeps across a resume, and what does not change it."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import engine_of
from pairs_runs import write_pairs_and_model
from places import run_ranks
from runs import REWARD, as_words, metrics_of, timeless
from transformers import AutoModelForCausalLM

from verl import dist
from verl.algorithms import kto
from verl.config.pairs import PairsConfig, PreferenceConfig
from verl.data.documents import load_documents
from verl.data.loader import Loader, Packing
from verl.data.numbered import NumberedRows
from verl.data.preferences import columns_of, with_numbers
from verl.engine.engine import Engine
from verl.errors import UserError
from verl.models.load import load_tokenizer
from verl.trainer import reward_trainer
from verl.trainer.preference_steps import preference_loader
from verl.trainer.reference_scores import score

POLICIES = ("dpo", "dpo_norm", "ipo", "kto", "odpo", "orpo", "robust_dpo", "simpo")
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, the same answers with labels and with margins, and a model of two narrow layers."""
    folder = write_pairs_and_model(tmp_path_factory.mktemp("preferences"), rows=400)
    for name in ("train", "test"):
        pairs = rows_of(folder / f"{name}.jsonl")
        sides = [(row, side) for row in pairs for side in ("chosen", "rejected")]
        answers = [{"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"} for row, side in sides]
        write(folder / f"{name}-labels.jsonl", answers)
        write(folder / f"{name}-margins.jsonl", [{**row, "margin": number % 3} for number, row in enumerate(pairs)])
    return folder


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(folder: Path, output: str, method: str = "dpo", **changes: object) -> list[str]:
    keys: dict[str, object] = {
        "algorithm.name": method,
        "data.train_files": folder / "train.jsonl",
        "data.cache_dir": folder / "cache",
        "data.max_length": 256,
        "data.train_batch_size": 4,
        "model.partial_pretrain": folder / "model",
        "model.enable_gradient_checkpointing": False,
        "trainer.total_training_steps": STEPS,
        "trainer.default_local_dir": folder / output,
        "trainer.save_freq": -1,
        "optim.lr": 1e-3,
    }
    return as_words(keys, changes)


def train(folder: Path, output: str, method: str = "dpo", **changes: object) -> list[dict[str, float]]:
    """Run in this process; the metrics of each step."""
    reward_trainer.main(words(folder, output, method, **changes))
    return metrics_of(folder / output)


def log_of(folder: Path, output: str) -> str:
    return (folder / output / "train.log").read_text()


# Learning


@pytest.mark.parametrize("method", POLICIES)
def test_each_method_tells_good_answers_from_bad_ones_and_measures_what_it_names(method: str, folder: Path) -> None:
    eight = {"data__train_max_samples": 8, "data__val_files": folder / "test.jsonl", "data__val_max_samples": 4}
    keys = {"data__train_batch_size": 8, "trainer__total_training_steps": 12, "optim__lr": 3e-3, "trainer__save_freq": "never"}
    metrics = train(folder, f"learn-{method}", method, **eight, **keys)
    assert metrics[-1]["train/accuracy"] >= 0.8 and metrics[-1]["train/loss"] < metrics[0]["train/loss"]
    assert metrics[-1]["train/margin"] > metrics[0]["train/margin"]
    assert {name for name in metrics[-1] if name.startswith("val/")} == {f"val/{name}" for name in PreferenceConfig(method).measured or ()}
    said = log_of(folder, f"learn-{method}")
    assert ("reference: the initial model" in said) == (method not in ("orpo", "simpo"))


STARTS = {"dpo": math.log(2), "robust_dpo": math.log(2), "dpo_norm": math.log(2), "odpo": math.log(2), "ipo": 25.0, "kto": 0.5}


@pytest.mark.parametrize("method", STARTS)
def test_at_the_start_the_policy_is_its_reference(method: str, folder: Path) -> None:
    (step,) = train(folder, f"start-{method}", method, trainer__total_training_steps=1, trainer__save_freq="never")
    assert step["train/loss"] == pytest.approx(STARTS[method], abs=1e-6) and step["train/margin"] == 0


def test_margins_of_the_rows_are_read(folder: Path) -> None:
    keys: dict[str, Any] = {"data__train_files": folder / "train-margins.jsonl", "trainer__save_freq": "never"}
    plain = train(folder, "no-margins", "odpo", **keys)
    found = train(folder, "margins", "odpo", **keys, data__margin_key="margin")
    assert plain[0]["train/offset"] == 0 and 0 < found[0]["train/offset"] < 2 and found[0]["train/loss"] > plain[0]["train/loss"] + 0.1
    half = train(folder, "half", "odpo", **keys, data__margin_key="margin", algorithm__margin_weight=0.5)
    assert [step["train/offset"] for step in half] == [step["train/offset"] / 2 for step in found]


# KTO: what it reads, and its estimate


def test_labelled_rows_teach_what_the_pairs_do_that_have_these_answers(folder: Path) -> None:
    never = {"trainer__save_freq": "never"}
    of_pairs = train(folder, "kto-pairs", "kto", **never)
    of_labels = train(folder, "kto-labels", "kto", data__train_files=folder / "train-labels.jsonl", **never)
    assert timeless(of_pairs) == timeless(of_labels)
    assert "each pair is read as two rows: a good answer and a bad one" in log_of(folder, "kto-pairs")
    for name in ("kto-pairs", "kto-labels"):
        assert "400 good and 400 bad answers" in log_of(folder, name)
        assert "6 steps (200 an epoch) of 4 rows" in log_of(folder, name)


def test_two_processes_and_other_micro_batches_estimate_and_train_alike(folder: Path) -> None:
    """The estimate is over all rows of a step, so that it is the same with any ranks and micro-batches."""
    keys: dict[str, Any] = {
        "data__train_files": folder / "train-labels.jsonl",
        "data__train_batch_size": 8,
        "data__val_files": folder / "test-labels.jsonl",
        "data__val_max_samples": 9,
        "trainer__total_training_steps": 4,
        "trainer__save_freq": "never",
        "optim__lr": 5e-3,
    }
    one = train(folder, "kto-one", "kto", **keys)
    small = train(folder, "kto-small", "kto", **keys, data__max_tokens_per_micro_batch=512)
    run_ranks(*REWARD, *words(folder, "kto-two", "kto", **keys))
    assert max(step["train/kl"] for step in one) > 0.1, "the policy has left its reference"
    for first, *others in zip(*map(timeless, (one, small, metrics_of(folder / "kto-two"))), strict=True):
        for other in others:
            assert other == {key: pytest.approx(value, rel=1e-3, abs=2e-4) for key, value in first.items()}


@pytest.fixture
def labelled(folder: Path) -> NumberedRows:
    config = PairsConfig(str(folder / "train-labels.jsonl"), cache_dir=str(folder / "cache"), max_length=256)
    rows = load_documents(config, columns_of(config, "labels"), config.train_files, load_tokenizer(str(folder / "model")), max_samples=10)
    found = with_numbers(rows, config, "labels", "train")
    assert isinstance(found, NumberedRows)
    return found


def moved(engine: Engine) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in engine.scorer.parameters():
            weight.add_(0.02 * torch.randn_like(weight))


def test_the_estimate_is_that_of_transformers_on_answers_to_other_questions(folder: Path, labelled: NumberedRows) -> None:
    dist.start()
    try:
        engine = engine_of(folder / "model")
        others: Any = labelled.mismatched
        plain = Loader(labelled, Packing(1, 300), rows_per_step=5, seed=1)
        values = score(engine, others, plain.micro_batches(others, np.arange(10)))
        others = replace(others, values={"ref_logprob_M": [values[number] for number in range(10)]})
        labelled = replace(labelled, mismatched=others, values={"ref_logprob_M": [np.zeros(n, np.float32) for n in labelled.trained_N]})
        reference = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
        moved(engine)
        policy = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
        with torch.no_grad():
            for weight, mine in zip(policy.parameters(), engine.scorer.model.parameters(), strict=True):
                weight.copy_(mine)
        loader = preference_loader(replace(plain, documents=labelled), kto.Loss(kto.Settings()), engine, None)
        (step,) = loader.steps(1, 2)
    finally:
        dist.stop()
    ratios = [logprob(policy, others.document(row)) - logprob(reference, others.document(row)) for row in loader.rows(1).tolist()]
    assert len(step.micro_batches) > 1 and abs(np.mean(ratios)) > 0.05
    for batch in step.micro_batches:
        assert float(batch.estimate) == pytest.approx(np.mean(ratios), rel=1e-4)  # type: ignore[attr-defined]
        rows = batch.sample_ids_S[: batch.documents].numpy()
        assert batch.number_S[: batch.documents].tolist() == labelled.number_R[rows].tolist()  # type: ignore[attr-defined]


def logprob(model: Any, document: tuple[np.ndarray, np.ndarray]) -> float:
    ids, mask = (torch.from_numpy(part.copy())[None] for part in document)
    with torch.no_grad():
        logits = model(ids.long()).logits[:, :-1].log_softmax(-1)
    return float((logits.gather(2, ids.long()[:, 1:, None])[..., 0] * mask[:, 1:]).sum())


# The reference's scores, kept


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of micro-batches of each call of the engine that computes log-probabilities without training."""
    calls: list[int] = []
    right = Engine.score

    def counted(self: Engine, batches: Any) -> list[Any]:
        batches = list(batches)
        calls.append(len(batches))
        return right(self, batches)

    monkeypatch.setattr(Engine, "score", counted)
    return calls


# Three epochs of two steps.
EPOCHS: dict[str, Any] = {"data__train_max_samples": 8, "trainer__total_training_steps": 6, "trainer__save_freq": 3}


def test_scores_are_computed_once_for_several_epochs_and_a_resume(folder: Path, scored: list[int]) -> None:
    keys: dict[str, Any] = {**EPOCHS, "data__val_files": folder / "test.jsonl", "data__val_max_samples": 4}
    whole = train(folder, "kept", **keys)
    assert len(scored) == 2 + 1, "the two steps of an epoch, and the validation"
    files = {path.name for path in (folder / "kept" / "reference").iterdir()}
    assert files == {"train.safetensors", "val.safetensors"}
    scored.clear()
    for half in ("model.safetensors", "trainer"):
        assert (folder / "kept" / "global_step_3" / half).exists()
    rest = train(
        folder, "kept-rest", **keys, trainer__resume_mode="resume_path", trainer__resume_from_path=folder / "kept" / "global_step_3"
    )
    assert scored == [], "they are read from the run that it resumes"
    assert timeless(rest) == timeless(whole)[3:]
    assert "its log-probabilities of the training rows are read from reference/train.safetensors" in log_of(folder, "kept-rest")


def test_kto_keeps_those_of_answers_to_other_questions_too(folder: Path, scored: list[int]) -> None:
    train(folder, "kept-kto", "kto", **EPOCHS)
    computed = len(scored)
    scored.clear()
    last = folder / "kept-kto" / "global_step_6"
    rest = train(folder, "kept-kto", "kto", **{**EPOCHS, "trainer__total_training_steps": 8}, trainer__resume_override=True)
    assert last.is_dir() and rest[-1]["step"] == 8
    assert {path.name for path in (folder / "kept-kto" / "reference").iterdir()} == {"train.safetensors", "train-mismatched.safetensors"}
    assert computed == 4 * 2 + 6, "16 rows in 4 steps, as many answers to other questions, and the estimates of 6 steps"
    assert len(scored) == 2, "the estimates of 2 steps"


def damage_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit": (damage_a_byte, "is damaged (its content does not have its hash)"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-40]), "is damaged (SafetensorError)"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged (SafetensorError)"),
    "text": (lambda path: path.write_text("nothing"), "is damaged (SafetensorError)"),
}


@pytest.fixture(scope="module")
def kept(folder: Path) -> list[dict[str, float]]:
    return train(folder, "damaged", **EPOCHS)


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_told_and_made_anew(kind: str, folder: Path, kept: list[dict[str, float]], scored: list[int]) -> None:
    damage, told = DAMAGES[kind]
    path = folder / "damaged" / "reference" / "train.safetensors"
    right = path.read_bytes()
    damage(path)
    half = folder / "damaged" / "global_step_3"
    name = f"damaged-{kind.replace(' ', '-')}"
    rest = train(folder, name, **EPOCHS, trainer__resume_mode="resume_path", trainer__resume_from_path=half)
    assert f"reference: {path} {told}; it is made anew" in log_of(folder, name)
    assert len(scored) == 2 and timeless(rest) == timeless(kept)[3:]
    assert (folder / name / "reference" / "train.safetensors").read_bytes() == right
    path.write_bytes(right)


def test_scores_of_another_model_are_not_used(folder: Path, kept: list[dict[str, float]]) -> None:
    half: dict[str, Any] = {
        "trainer__resume_mode": "resume_path",
        "trainer__resume_from_path": folder / "damaged" / "global_step_3",
        "trainer__resume_override": True,
    }
    other = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        other.model.norm.weight[0] += 1e-3  # one number of one weight
    other.save_pretrained(folder / "other")
    load_tokenizer(str(folder / "model")).save_pretrained(folder / "other")
    train(folder, "other-model", **EPOCHS, **half, model__partial_pretrain=folder / "other")
    assert "train.safetensors is of other model; it is made anew" in log_of(folder, "other-model")


def test_only_rows_that_are_missing_are_computed_where_a_run_is_made_longer(folder: Path, scored: list[int]) -> None:
    keys: dict[str, Any] = {"data__train_max_samples": 16, "trainer__resume_override": True}
    train(folder, "longer", **keys, trainer__total_training_steps=1)
    assert len(scored) == 1
    train(folder, "longer", **keys, trainer__total_training_steps=4)
    assert len(scored) == 1 + 3
    assert "the training rows (12), besides 4 that are there, once" in log_of(folder, "longer")


def test_a_file_that_cannot_be_written_is_a_warning(folder: Path) -> None:
    (folder / "unwritable").mkdir()
    (folder / "unwritable" / "reference").write_text("in the way")
    metrics = train(folder, "unwritable", trainer__save_freq="never", trainer__total_training_steps=2)
    assert len(metrics) == 2
    assert "warning: the reference's log-probabilities are kept in memory" in log_of(folder, "unwritable")


# The reference of an adapter


def test_a_switched_off_adapter_is_the_reference_bit_for_bit(folder: Path, scored: list[int]) -> None:
    keys: dict[str, Any] = {"model__lora_rank": 4, "optim__lr": 1e-2, "trainer__save_freq": "never", "data__train_max_samples": 24}
    found = {name: train(folder, f"adapter-{name}", **keys, algorithm__reference=name) for name in ("stored", "adapter_off", "auto")}
    assert timeless(found["stored"]) == timeless(found["adapter_off"]) == timeless(found["auto"])
    assert found["auto"][-1]["train/margin"] != 0
    live = "reference: the model without its adapter, in each step"
    assert live in log_of(folder, "adapter-auto") and live not in log_of(folder, "adapter-stored")
    assert not (folder / "adapter-auto" / "reference").exists()
    twice = {**keys, "trainer__total_training_steps": 7}
    train(folder, "adapter-twice", **twice)
    assert live not in log_of(folder, "adapter-twice"), "rows that are trained twice are scored once"


def test_kto_of_an_adapter_estimates_with_it_and_without(folder: Path) -> None:
    keys: dict[str, Any] = {"model__lora_rank": 4, "optim__lr": 1e-2, "trainer__save_freq": "never", "data__train_max_samples": 24}
    found = [train(folder, f"kto-{name}", "kto", **keys, algorithm__reference=name) for name in ("stored", "adapter_off")]
    assert timeless(found[0]) == timeless(found[1])
    assert max(step["train/kl"] for step in found[0]) > 0


# Errors


@pytest.mark.parametrize(
    ("method", "changes", "said"),
    [
        ("dpo", {"algorithm__reference": "adapter_off"}, "algorithm.reference=adapter_off: only the model of a new adapter"),
        ("simpo", {"algorithm__reference": "stored"}, "algorithm.reference=stored: simpo has no reference"),
        ("dpo", {"algorithm__reference": "none"}, "algorithm.reference"),
        ("dpo", {"data__margin_key": "margin"}, "data.margin_key=margin: the method reads no margins"),
        ("odpo", {"data__margin_key": "score"}, "column 'score' is missing"),
        ("dpo", {"data__train_files": "train-labels.jsonl"}, "one answer with a label .*\n? *fix: algorithm.name=kto learns"),
        ("kto", {"data__label_key": "good", "data__train_files": "train-labels.jsonl"}, "column 'good' is missing"),
        ("kto", {"data__train_files": "train-labels.jsonl", "data__val_files": "test.jsonl"}, "the row is a pair of answers"),
        ("orpo", {"model__context_parallel_size": 2}, "model.context_parallel_size"),
        ("dpo", {"trainer__best_metric": "val/kl", "data__val_files": "test.jsonl"}, "does not measure val/kl"),
    ],
)
def test_a_wrong_input_is_an_error_with_its_place(method: str, changes: dict[str, Any], said: str, folder: Path) -> None:
    places = {key: folder / value if key.endswith("_files") else value for key, value in changes.items()}
    with pytest.raises(UserError, match=said):
        train(folder, "wrong", method, **places)


def test_a_dry_run_of_labelled_rows_counts_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reward_trainer.main(words(folder, "dry", "kto", data__train_files=folder / "train-labels.jsonl", trainer__dry_run=True))
    assert "plan: a policy by KTO, 6 steps (200 an epoch) of 4 rows" in capsys.readouterr().out
