"""The model does not see answers without an advantage once more, and learns what it would have learned with them."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rl_runs import check_same, run_on, train, write_folder
from runs import metrics_of
from safetensors.torch import load_file

from verl.data.batch import Batch
from verl.engine.engine import Engine
from verl.rl.samples import PackedSamples

# Answers to every second problem all earn the same.
SOMETIMES = """def score(prompt: str, response: str, row: dict) -> float:
    return sum(c in "aeiou" for c in response.lower()) / 16 if int(row["reference"][-1]) % 2 else 1.0
"""
STEPS = 3
METHODS: dict[str, dict[str, object]] = {
    "grpo": {},
    "dr_grpo": {},
    "rloo": {},
    "gspo": {},
    "dapo": {"algorithm__dynamic_sampling": "false"},
    "grpo, two updates": {"algorithm__updates_per_step": 2},
    "grpo, divergence in the reward": {"algorithm__kl_coef": 0.1, "algorithm__kl_in": "reward"},
}
# Losses with another part than the advantage's.
ALL_SEEN: dict[str, dict[str, object]] = {
    "grpo": {"algorithm__kl_coef": 0.1},
    "dr_grpo": {"algorithm__entropy_coef": 0.01},
    "reinforce": {},
    "ppo": {"algorithm__lam": 0.95},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("left_out"))
    (folder / "sometimes.py").write_text(SOMETIMES)
    return folder


class Seen:
    """Trained tokens that went through the actor in its updates, and those that were only counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.trained = self.left_out = 0
        train_step = Engine.train_step

        def counting(engine: Engine, batches: Sequence[Batch], *args: Any, left_out: Sequence[Batch] = ()) -> dict[str, torch.Tensor]:
            self.trained += sum(len(batch.trained_M) for batch in batches)
            self.left_out += sum(len(batch.trained_M) for batch in left_out)
            return train_step(engine, batches, *args, left_out=left_out)

        monkeypatch.setattr(Engine, "train_step", counting)


def everything(packed: PackedSamples) -> tuple[list[Batch], list[Batch]]:
    return packed.batches, []


def uncounted(packed: PackedSamples) -> tuple[list[Batch], list[Batch]]:
    """A known wrong way: the loss is divided as if what is left out were not there."""
    return [batch for batch in packed.batches if batch.advantage_M is not None and batch.advantage_M.any()], []


def after(folder: Path, output: str, method: str, changes: dict[str, object]) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Weights and metrics of a few steps, with gradients as long as they are."""
    words = {"algorithm__name": method.partition(",")[0], "reward__name": folder / "sometimes.py", "optim__clip_grad": 1e9, **changes}
    shutil.rmtree(folder / output, ignore_errors=True)
    metrics = train(folder, output, trainer__total_training_steps=STEPS, **words)
    return load_file(folder / output / f"global_step_{STEPS}" / "model.safetensors"), metrics


@pytest.mark.parametrize("method", METHODS)
def test_the_step_is_that_of_all_answers(folder: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    seen = Seen(monkeypatch)
    weights, metrics = after(folder, "some", method, METHODS[method])
    assert seen.left_out > 0.1 * seen.trained
    monkeypatch.setattr(PackedSamples, "by_advantage", everything)
    expected_weights, expected = after(folder, "all", method, METHODS[method])
    torch.testing.assert_close(weights, expected_weights, atol=1e-6, rtol=1e-5)
    for name in ("train/loss", "train/grad_norm", "rl/reward", "rl/response_tokens", "train/supervised_tokens"):
        assert [line[name] for line in metrics] == pytest.approx([line[name] for line in expected], rel=1e-4, abs=1e-7), name


def test_what_is_left_out_is_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, (first, *_) = after(folder, "counted", "grpo", {})
    monkeypatch.setattr(PackedSamples, "by_advantage", uncounted)
    _, (wrong, *_) = after(folder, "uncounted", "grpo", {})
    assert wrong["train/grad_norm"] > 1.2 * first["train/grad_norm"]


@pytest.mark.parametrize("method", ALL_SEEN)
def test_nothing_is_left_out_of_a_loss_with_another_part(folder: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    seen = Seen(monkeypatch)
    after(folder, "all_seen", method, ALL_SEEN[method])
    assert seen.trained > 0
    assert seen.left_out == 0


OWN_LOSS = """
from verl.algorithms import grpo

needs_critic, needs_groups, Settings, advantages = False, True, grpo.Settings, grpo.advantages


class Loss(grpo.Loss):
    def loss(self, out, batch):
        result = super().loss(out, batch)
        result.sum = result.sum - 0.1 * out.logprob_M.sum()  # of every answer
        return result
"""
GROUPS_AND_CRITIC = """
from dataclasses import dataclass, replace

import numpy as np

from verl.algorithms import grpo
from verl.algorithms.ppo import ValueLoss

needs_critic, needs_groups, Loss = True, True, grpo.Loss


@dataclass
class Settings(grpo.Settings):
    value_clip: float = 0.2


def advantages(answers, settings):
    return replace(grpo.advantages(answers, settings), returns=[np.ones(n, dtype=np.float32) for n in answers.lengths_A])
"""


def test_nothing_is_left_out_of_a_loss_of_ones_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "own_loss.py").write_text(OWN_LOSS)
    seen = Seen(monkeypatch)
    after(folder, "own_loss", str(folder / "own_loss.py"), {})
    assert seen.trained > 0
    assert seen.left_out == 0


def test_a_critic_learns_from_all_answers_though_its_actor_does_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "both.py").write_text(GROUPS_AND_CRITIC)
    seen = Seen(monkeypatch)
    _, (first, *others) = after(folder, "both", str(folder / "both.py"), {})
    assert first["rl/groups_without_spread"] > 0, "else the test shows nothing"
    assert seen.left_out > 0
    of_all = others[-1]["train/supervised_tokens"]
    assert seen.trained + seen.left_out == 2 * of_all, "each role's tokens, the actor's with those that were left out"
    assert first["critic/loss"] == pytest.approx(0.5), "half the square of returns of 1 less values of 0"


def test_two_processes_leave_out_the_same_answers(folder: Path) -> None:
    words: dict[str, object] = {"reward__name": folder / "sometimes.py", "data__max_tokens_per_micro_batch": 200}
    one = run_on(1, folder, "one", **words)
    assert all(line["rl/groups_without_spread"] > 0 for line in metrics_of(one)), "else the test shows nothing"
    check_same(run_on(2, folder, "two", model__strategy="fsdp2", **words), one)
