"""On several processes reinforcement learning is what it is on one, however the weights lie and wherever answers are drawn."""

from pathlib import Path

import pytest
from rl_runs import check_same, run_on, write_folder
from runs import metrics_of

ROLES = ("actor", "critic", "reference", "reward")
SPLIT: dict[str, object] = {**dict.fromkeys((f"mapping__{role}" for role in ROLES), "[0]"), "mapping__rollout": "[1]"}
# A critic, several updates of a step and whitening over all ranks, so that every sum over ranks has a part.
PPO: dict[str, object] = {"algorithm__name": "ppo", "algorithm__updates_per_step": 2, "algorithm__kl_coef": 0.05}
LORA: dict[str, object] = {"model__lora_rank": 4, "optim__lr": 1e-2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    return run_on(1, folder, "alone", **PPO)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_draw_the_same_answers_and_learn_the_same(folder: Path, alone: Path, strategy: str) -> None:
    check_same(run_on(2, folder, strategy, model__strategy=strategy, **PPO), alone, has_critic=True)


def test_a_rollout_on_a_process_of_its_own_draws_the_same_answers(folder: Path, alone: Path) -> None:
    found = run_on(2, folder, "split", **SPLIT, **PPO)
    check_same(found, alone, has_critic=True)
    assert all(line["rl/rollout_difference"] < 1e-5 for line in metrics_of(found))  # its weights are those of now
    assert "reward on rank 0; rollout on rank 1" in (found / "train.log").read_text()


def test_an_adapter_reaches_a_rollout_on_a_process_of_its_own(folder: Path) -> None:
    found, expected = run_on(2, folder, "split_lora", **SPLIT, **LORA), run_on(1, folder, "lora", **LORA)
    check_same(found, expected)
    lines = metrics_of(found)
    assert all(line["rl/rollout_difference"] < 1e-5 for line in lines)
    assert lines[-1]["rl/kl_k3"] > 1e-3  # and they are far from those that it began with
