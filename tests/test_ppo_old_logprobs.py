"""Whose log-probabilities an update compares itself with, the trainer's or the rollout's, and what bounds the difference."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rl import train, write_folder

from verl.errors import UserError
from verl.rollout.native import NativeRollout

SHIFT = 0.1  # of each log-probability that a rollout tells, where it is not the trainer's
ONE_STEP: dict[str, object] = {"trainer__total_training_steps": 1, "trainer__resume_mode": "disable"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("old"))


def telling(monkeypatch: pytest.MonkeyPatch, shift: float | None) -> None:
    """Let the rollout tell log-probabilities that are lower by so much; None: none at all."""
    generate = NativeRollout.generate

    def told(*words: Any) -> Any:
        completions = generate(*words)
        if shift is None:
            return [replace(done, logprobs=None) for done in completions]
        return [replace(done, logprobs=[p - shift for p in done.logprobs or []]) for done in completions]

    monkeypatch.setattr(NativeRollout, "generate", told)


def test_with_shared_weights_it_is_the_same(folder: Path) -> None:
    (trainers,) = train(folder, "trainers", **ONE_STEP, algorithm__updates_per_step=2)
    (rollouts,) = train(folder, "rollouts", **ONE_STEP, algorithm__updates_per_step=2, algorithm__old_logprobs="rollout")
    for name in ("train/grad_norm", "rl/kl_k3", "rl/clip_fraction"):
        assert rollouts[name] == pytest.approx(trainers[name], rel=1e-3, abs=1e-6), name


def test_the_ratio_is_to_what_the_rollout_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    telling(monkeypatch, SHIFT)
    (line,) = train(folder, "ratio", **ONE_STEP, algorithm__old_logprobs="rollout")
    assert line["rl/largest_ratio"] == pytest.approx(math.exp(SHIFT), rel=1e-3)
    assert line["rl/rollout_difference"] == pytest.approx(SHIFT, rel=1e-2)
    (line,) = train(folder, "trainers_ratio", **ONE_STEP)
    assert line["rl/largest_ratio"] == 1.0


@pytest.mark.parametrize(("kind", "cap", "weight"), [("truncate", 2.0, math.exp(SHIFT)), ("truncate", 1.05, 1.05), ("mask", 1.05, 0.0)])
def test_importance_weights_correct_for_another_rollout(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, cap: float, weight: float
) -> None:
    (plain,) = train(folder, "uncorrected", **ONE_STEP)
    telling(monkeypatch, SHIFT)
    (line,) = train(folder, f"corrected_{kind}", **ONE_STEP, algorithm__importance_weights=kind, algorithm__importance_cap=cap)
    assert line["rl/importance_weight"] == pytest.approx(weight, rel=1e-3)
    assert line["train/grad_norm"] == pytest.approx(weight * plain["train/grad_norm"], rel=1e-2)


def test_a_rollout_that_does_not_tell_is_an_error_where_it_is_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    telling(monkeypatch, None)
    with pytest.raises(UserError, match="does not tell its log-probabilities") as caught:
        train(folder, "untold", **ONE_STEP, algorithm__old_logprobs="rollout")
    assert "algorithm.old_logprobs=trainer" in str(caught.value.fix)


def test_answers_at_the_limit_lose_of_what_they_earned(folder: Path) -> None:
    (line,) = train(folder, "overlong", **ONE_STEP, algorithm__overlong_buffer_tokens=4, algorithm__overlong_penalty=0.5)
    assert line["rl/truncated"] == 1.0
    assert line["rl/overlong_deduction"] == pytest.approx(0.5)
    assert line["rl/reward"] == pytest.approx(line["reward/vowels"])  # as it was earned
