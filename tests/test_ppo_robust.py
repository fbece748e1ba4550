"""What goes wrong in one step of reinforcement learning does not spoil the next ones, and is said."""

import math
from pathlib import Path

import pytest
from rl import train, write_folder

from verl.errors import UserError

# PPO whose log-probabilities are no numbers in the calls of the loss that are named.
PPO_WITH_NAN = """
from verl.algorithms import ppo

needs_groups, needs_critic, DEFAULTS, advantages = False, True, ppo.DEFAULTS, ppo.advantages


calls = []


class Loss(ppo.Loss):
    def loss(self, out, batch):
        calls.append(1)
        if len(calls) in {actor}:
            out.logprob_M = out.logprob_M * float("nan")
        return super().loss(out, batch)
"""
ONE_BATCH = 4000  # tokens, so that an update is one call of the loss


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("robust"))


def broken(folder: Path, *, actor: tuple[int, ...] = ()) -> Path:
    path = folder / f"nan_{'_'.join(map(str, actor))}.py"
    path.write_text(PPO_WITH_NAN.format(actor=actor))
    return path


def test_a_divergence_that_is_no_number_leaves_its_weight_alone(folder: Path) -> None:
    adaptive: dict[str, object] = {"algorithm__kl_coef": 0.1, "algorithm__kl_target": 0.001, "algorithm__kl_horizon": 20}
    method = broken(folder, actor=(2,))
    found = train(folder, "nan_kl", algorithm__name=method, data__max_tokens_per_micro_batch=ONE_BATCH, **adaptive)
    weights = [line["rl/kl_coef"] for line in found]
    assert math.isnan(found[1]["rl/kl_k3"]), "else the test shows nothing"
    assert weights[1] == weights[0] and all(map(math.isfinite, weights))
    assert [line["train/skipped"] for line in found] == [0, 1, 0, 0]


def test_a_critic_that_never_learns_stops_the_run_though_the_actor_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.algorithms.ppo import ValueLoss

    def no_number(self: ValueLoss, out: object, batch: object) -> object:
        result = whole(self, out, batch)  # type: ignore[arg-type]
        result.sum = result.sum * float("nan")
        return result

    whole = ValueLoss.loss
    monkeypatch.setattr(ValueLoss, "loss", no_number)
    with pytest.raises(UserError, match="3 times in a row") as caught:
        train(folder, "nan_critic", algorithm__name="ppo")
    assert caught.value.where == "step 3"


def test_each_update_that_is_not_taken_has_a_file_of_its_own(folder: Path) -> None:
    method = broken(folder, actor=(1, 3))
    updates: dict[str, object] = {"algorithm__updates_per_step": 4, "trainer__total_training_steps": 1}
    train(folder, "nan_files", algorithm__name=method, data__max_tokens_per_micro_batch=ONE_BATCH, **updates)
    names = sorted(path.name for path in (folder / "nan_files/skipped").iterdir())
    assert names == ["step_1_actor_1_rank_0.safetensors", "step_1_actor_3_rank_0.safetensors"]


def test_without_a_critic_nothing_waits_for_it(folder: Path) -> None:
    (line,) = train(folder, "no_critic", critic__warmup_steps=3, trainer__total_training_steps=1)
    assert line["train/grad_norm"] > 0
