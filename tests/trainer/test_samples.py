"""Sample answers: a few validation rows are answered by the model in training, which trains as if they were not."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import sft_runs
import torch
from places import run_ranks
from runs import SFT, Metrics, lines_of, metrics_of, timeless
from tiny import write_problems_and_model

from verl.data.render import Renderer
from verl.errors import Stopped, UserError
from verl.models.load import load_tokenizer
from verl.rollout import Sampling, load_rollout
from verl.trainer.samples import Samples

STEPS = 4
LONG = ["Hold the power button for ten seconds, and then start the router again.", "Press the green key until the light goes out."]
RUN: dict[str, object] = {"trainer__total_training_steps": STEPS, "trainer__test_freq": 2, "trainer__save_freq": 2, "optim__lr": 1e-2}
SAMPLES: dict[str, object] = {"samples__rows": 3, "samples__max_new_tokens": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_problems_and_model(tmp_path_factory.mktemp("samples"))


def train(folder: Path, output: str, **changes: object) -> Metrics:
    return sft_runs.train(folder, output, data__val_files=folder / "test.jsonl", **{**RUN, **changes})


def without(metrics: Metrics, name: str = "val/exact_match") -> Metrics:
    return [{key: value for key, value in line.items() if key != name} for line in timeless(metrics)]


@pytest.fixture(scope="module", params=[{}, {"model__lora_rank": 4, "model__lora_dropout": 0.2}], ids=["whole", "adapter"])
def both(request: pytest.FixtureRequest, folder: Path) -> dict[str, Any]:
    """Metrics of the same run without and with samples, and the directory of the second."""
    name = f"with-{len(request.param)}"
    plain = train(folder, f"plain-{len(request.param)}", **request.param)
    return {"plain": plain, "sampled": train(folder, name, **SAMPLES, **request.param), "folder": folder / name, "model": request.param}


def test_a_run_trains_bit_for_bit_as_without_samples(both: dict[str, Any]) -> None:
    assert without(both["sampled"]) == timeless(both["plain"])
    assert [line.get("val/exact_match") for line in both["sampled"]] == [None, 0.0, None, 0.0]


def test_the_answers_are_those_of_the_checkpoint_of_the_step(both: dict[str, Any]) -> None:
    checkpoint = both["folder"] / f"global_step_{STEPS}"
    tokenizer = load_tokenizer(str(checkpoint))
    rows = lines_of(both["folder"].parent / "test.jsonl")[:3]
    rollout = load_rollout("auto", str(checkpoint), tokenizer, Renderer(tokenizer).stop_ids)
    prompts = [Renderer(tokenizer).prompt([{"role": "user", "content": row["question"]}]) for row in rows]
    answers = [done.text(tokenizer) for done in rollout.generate(prompts, Sampling(12, logprobs=False))]
    lines = lines_of(both["folder"] / f"samples/step_{STEPS}.jsonl")
    assert [line["answer"] for line in lines] == answers
    assert [(line["prompt"], line["reference"], line["right"]) for line in lines] == [(r["question"], r["answer"], False) for r in rows]
    assert lines != lines_of(both["folder"] / "samples/step_2.jsonl"), "the weights have changed"


def test_random_numbers_drawn_for_samples_would_show(folder: Path, both: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without the generators put back, a draw while answering changes an adapter's dropout."""
    if not both["model"]:
        pytest.skip("the model without an adapter draws nothing")
    answered = Samples._generate
    monkeypatch.setattr(Samples, "_generate", lambda self, engine: (torch.rand(3), answered(self, engine))[1])
    assert without(train(folder, "kept", **SAMPLES, **both["model"])) == timeless(both["plain"])
    from contextlib import nullcontext

    monkeypatch.setattr(Samples, "_unchanged", lambda _: nullcontext())
    assert without(train(folder, "drawn", **SAMPLES, **both["model"])) != timeless(both["plain"])


def test_a_resumed_run_samples_as_the_uninterrupted_one(folder: Path, both: dict[str, Any]) -> None:
    copy = folder / f"{both['folder'].name}-resumed"
    shutil.copytree(both["folder"], copy, symlinks=True)
    shutil.rmtree(copy / f"global_step_{STEPS}")
    (copy / f"samples/step_{STEPS}.jsonl").unlink()
    assert timeless(train(folder, copy.name, **SAMPLES, **both["model"])) == timeless(both["sampled"])
    assert lines_of(copy / f"samples/step_{STEPS}.jsonl") == lines_of(both["folder"] / f"samples/step_{STEPS}.jsonl")


@pytest.mark.parametrize(
    "spread",
    [{"model__strategy": "ddp"}, {"model__strategy": "fsdp2"}, {"model__context_parallel_size": 2}],
    ids=["ddp", "fsdp2", "context"],
)
def test_two_ranks_answer_the_rows_of_one(folder: Path, spread: dict[str, object]) -> None:
    one, two = (f"{number}-{next(iter(spread.values()))}" for number in ("one", "two"))
    alone = train(folder, one, **SAMPLES)
    said = run_ranks(*SFT, *sft_runs.words(folder, two, data__val_files=folder / "test.jsonl", **RUN, **SAMPLES, **spread))
    assert ("each rank loads a copy" in said) == ("ddp" not in two)
    found = metrics_of(folder / two)
    assert [line.get("val/exact_match") for line in found] == [line.get("val/exact_match") for line in alone]
    for step in (2, STEPS):
        assert lines_of(folder / two / f"samples/step_{step}.jsonl") == lines_of(folder / one / f"samples/step_{step}.jsonl")


def test_right_answers_are_counted_by_the_metric_that_the_run_names(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "own.py").write_text("def score(prompt, response, row): return float(row['reference'] != '' and 'Tom' in prompt)\n")
    train(folder, "own", samples__metric=folder / "own.py", **SAMPLES)
    lines = lines_of(folder / "own/samples/step_4.jsonl")
    assert [line["right"] for line in lines] == ["Tom" in line["prompt"] for line in lines]
    said = capsys.readouterr().out
    assert "samples: 3 validation rows answered at each validation, in up to 12 tokens, graded by" in said
    assert "of 3 sample answers right" in said and "own/samples/step_4.jsonl" in said


def test_a_metric_of_the_user_s_own_runs_in_processes_that_end_with_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed, real = [], Samples.close
    monkeypatch.setattr(Samples, "close", lambda self: (real(self), closed.append(self._grader.what)))
    (folder / "slow.py").write_text("def score(prompt, response, row): return 1\n")
    assert train(folder, "slow", samples__metric=folder / "slow.py", **SAMPLES)[-1]["val/exact_match"] == 1.0
    assert closed == [f"metric {folder / 'slow.py'}"]


def test_a_grader_that_fails_costs_the_samples_and_not_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "fails.py").write_text("def score(prompt, response, row): raise ValueError('no such unit')\n")
    metrics = train(folder, "fails", samples__metric=folder / "fails.py", **SAMPLES)
    assert len(metrics) == STEPS and not any("val/exact_match" in line for line in metrics) and "val/loss" in metrics[-1]
    said = capsys.readouterr().out
    assert said.count("warning: sample answers") == 1 and "no such unit" in said and "test.jsonl:1" in said


def test_a_signal_while_rows_are_answered_ends_the_run_with_a_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answered(self: Samples, engine: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(self, engine)

    real = Samples._generate
    monkeypatch.setattr(Samples, "_generate", answered)
    with pytest.raises(Stopped) as caught:
        train(folder, "signal", **SAMPLES)
    assert caught.value.checkpoint == folder / "signal/global_step_2"
    assert "val/loss" not in metrics_of(folder / "signal")[-1], "a validation that was given up has no metrics"
    monkeypatch.setattr(Samples, "_generate", real)
    assert train(folder, "signal", **SAMPLES)[-1]["val/exact_match"] == 0.0


@pytest.mark.parametrize(
    ("answers", "graded_by"),
    [(["Paris", "Rome"], "exact"), (["so #### 3", "3 #### 4"], "gsm8k"), ([r"\boxed{x}", r"\boxed{2}"], "math"), (LONG, "the same text")],
)
def test_without_a_metric_the_one_of_the_evaluator_is_taken_and_text_is_compared(
    answers: list[str], graded_by: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"question": "What is it?", "answer": answer}) + "\n" for answer in answers))
    files = {"data__train_files": tmp_path / "rows.jsonl", "data__val_files": tmp_path / "rows.jsonl"}
    steps = {"trainer__total_training_steps": 1, "trainer__default_local_dir": tmp_path / "run"}
    sft_runs.train(folder, "unused", **{**RUN, **SAMPLES, "data__train_batch_size": 2, **files, **steps})
    assert f"graded by {graded_by}\n" in capsys.readouterr().out


def test_chats_are_answered_and_learned(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chats = [
        [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}],
        [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Bye."}],
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    metrics = sft_runs.train(
        folder, "chats", **{**RUN, **SAMPLES}, data__train_files=folder / "chats.jsonl", data__val_files=folder / "chats.jsonl"
    )
    assert metrics[-1]["val/exact_match"] == 1.0, "two short answers are learned at once"
    assert "graded by exact" in capsys.readouterr().out
    found = [(line["prompt"], line["reference"]) for line in lines_of(folder / "chats/samples/step_4.jsonl")]
    assert found == [("Hello", "Hi."), ("Bye", "Bye.")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__val_files": "null"}, "set data.val_files"),
        ({"samples__rows": -1}, "samples.rows: found -1"),
        ({"samples__rows": 0, "trainer__best_metric": "val/exact_match"}, "set samples.rows, such as 32"),
        ({"samples__metric": "gsm9k"}, "did you mean 'gsm8k'"),
        ({"samples__metric": "math.py"}, "no such file"),
        ({"data__text_key": "question"}, "plain text has no questions"),
    ],
)
def test_samples_that_cannot_be_are_refused_before_training(folder: Path, changes: dict[str, object], message: str) -> None:
    from verl.config.load import load_config
    from verl.config.sft import SFTConfig
    from verl.trainer.fsdp_sft_trainer import train as run

    words = sft_runs.words(folder, "refused", **{"data__val_files": folder / "test.jsonl", **RUN, **SAMPLES, **changes})
    with pytest.raises(UserError, match=message):
        run(load_config(SFTConfig, words))
    assert not (folder / "refused/metrics.jsonl").exists()
