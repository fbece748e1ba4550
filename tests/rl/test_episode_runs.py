"""Runs of `verl ppo` in environments: limits, rewards, resuming, several processes."""

import json
import random
from pathlib import Path

import pytest
import torch
from episodes import QUESTION, guesses, keys_of_talk, processes_here, write_talk
from places import run_ranks
from rl_runs import PPO, check_same, run_on, train, words
from runs import lines_of, metrics_of, timeless
from safetensors.torch import load_file

from verl.trainer import ppo_trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talk(tmp_path_factory.mktemp("episodes"))


def test_256_environments_of_which_some_hang_and_some_raise(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tenth hang, in four ways, and a twentieth raise: the step ends within the limit and 10 seconds, all are counted, and no process is
    left.
    """
    limit = 5
    hang = [{"does": how} for how in ("sleep", "spin", "await", "sleep")] * 6 + [{"does": "sleep", "in": "reset"}] * 2
    fail = [{"does": "raise", "in": "reset"}] * 12 + [{"does": "leave", "in": "reset"}]
    rows = [{"question": QUESTION, "answer": "1", **row} for row in [*hang, *fail, *[{}] * 217]]
    assert len(rows) == 256 and len(hang) == 26 and len(fail) == 13
    random.Random(1).shuffle(rows)
    (folder / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = processes_here()
    own = {
        **keys_of_talk(folder),
        "data__train_files": folder / "many.jsonl",
        "data__prompts_per_step": 256,
        "rollout__samples_per_prompt": 1,
    }
    own |= {"environment__step_seconds": limit, "trainer__total_training_steps": 1, "algorithm__name": "reinforce"}
    own |= {"rollout__name": str(folder / "stopping.py"), "rollout__max_new_tokens": 120}
    [line] = train(folder, "many", **own)
    assert (line["environment/hung"], line["environment/failed"]) == (26, 13)
    assert line["perf/seconds_generate"] < limit + 10
    assert processes_here() <= before
    assert "39 episodes of the environment went wrong" in capsys.readouterr().out


BROKEN = """
import os

class Environment:
    def __init__(self):
        {init}

    def reset(self, row, seed):
        return {reset}

    def step(self, message):
        return {{}}

    def close(self):
        pass


def count(path, most):
    with open(path, "a") as file:
        file.write("1")
    if os.path.getsize(path) > most:
        raise RuntimeError("no more games")
    return {{}}
"""


def test_a_run_ends_at_the_first_step_all_of_whose_episodes_fail(folder: Path) -> None:
    """The steps before it are saved."""
    (folder / "worse.py").write_text(BROKEN.format(init="self.turn = 0", reset=f"count({str(folder / 'count')!r}, most=8)"))
    own = {**keys_of_talk(folder), "environment__name": folder / "worse.py", "trainer__save_freq": -1}
    own |= {"data__prompts_per_step": 4, "rollout__samples_per_prompt": 2}
    first = r"train.jsonl:\d+: all 8 episodes of the step have failed, so there is nothing to learn; the first: environment "
    with pytest.raises(AssertionError, match=first + r"\S*worse.py raised RuntimeError: no more games, in reset \(.*worse.py:22\)"):
        run_ranks(*PPO, *words(folder, "worse", **own), processes=1)
    assert (folder / "worse/global_step_1/model.safetensors").is_file()


def test_an_environment_that_never_works_ends_the_run_of_all_processes(folder: Path) -> None:
    (folder / "broken.py").write_text(BROKEN.format(init='raise RuntimeError("no game today")', reset={}))
    own = {**keys_of_talk(folder), "environment__name": folder / "broken.py"}
    with pytest.raises(AssertionError, match=r"have failed(.|\n)*raised RuntimeError: no game today, in reset \(.*broken.py:6\)"):
        run_on(2, folder, "broken", **own)


def test_rewards_of_turns_and_of_graders_add_up(folder: Path) -> None:
    own = {**keys_of_talk(folder), "reward__name": folder / "vowels.py", "rollout__name": str(folder / "stopping.py")}
    lines = train(folder, "both", trainer__total_training_steps=1, data__val_files=folder / "train.jsonl", data__val_max_samples=6, **own)
    answers = lines_of(folder / "both/rollouts/step_1.jsonl")
    for answer in answers:
        assert answer["reward/environment"] == pytest.approx(sum(answer["turn_rewards"]))
        assert answer["reward"] == pytest.approx(answer["reward/environment"] + answer["reward/vowels"], abs=1e-5)
    assert any(len(answer["turn_rewards"]) > 1 for answer in answers), "else the test shows nothing"
    last = lines[-1]
    assert last["reward/environment"] == pytest.approx(last["environment/reward_mean"])
    assert last["train/grad_norm"] > 0 and last["rl/rollout_difference"] < 1e-5
    assert {"episode/words", "val/words", "val/environment", "val/environment/turns_mean", "val/vowels"} <= last.keys()


def test_a_resumed_run_is_the_uninterrupted_one(folder: Path) -> None:
    whole = train(folder, "whole", **guesses(folder))
    train(folder, "parts", trainer__total_training_steps=2, **guesses(folder))
    ppo_trainer.main(words(folder, "parts", trainer__total_training_steps=4, **guesses(folder)))
    assert any(line["environment/turns_mean"] > 1.2 for line in whole), "else the test shows less"
    found = timeless(metrics_of(folder / "parts"))
    for line in (*found, *whole):
        line.pop("environment/seconds_mean", None)
    assert found == timeless(whole)
    weights = [load_file(folder / name / "global_step_4/model.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_two_processes_play_the_episodes_of_one(folder: Path) -> None:
    one, two = (run_on(processes, folder, f"on {processes}", **guesses(folder)) for processes in (1, 2))
    check_same(two, one)
    assert any(line["environment/turns_mean"] > 1.2 for line in metrics_of(one)), "else the test shows less"
    for here, there in zip(metrics_of(two), metrics_of(one), strict=True):
        assert [here[f"environment/{name}"] for name in ("done", "out_of_turns", "out_of_tokens", "turns_mean")] == [
            there[f"environment/{name}"] for name in ("done", "out_of_turns", "out_of_tokens", "turns_mean")
        ]


def test_ranks_of_their_own_draw_the_turns_of_all_others_in_waves(folder: Path) -> None:
    roles = {f"mapping__{role}": "[0,1]" for role in ("actor", "critic", "reference", "reward")} | {"mapping__rollout": "[2]"}
    apart = run_on(3, folder, "apart", **guesses(folder), **roles)
    check_same(apart, run_on(1, folder, "together", **guesses(folder)))


def test_an_error_in_the_environment_of_one_process_ends_all(folder: Path) -> None:
    rows = [{"question": QUESTION, "answer": "1", "secret": 3 if number else 99} for number in range(4)]
    (folder / "one_wrong.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {**guesses(folder), "data__train_files": folder / "one_wrong.jsonl"}
    for name, roles in (
        ("shared", {}),
        ("split", {f"mapping__{r}": "[0]" for r in ("actor", "critic", "reference", "reward")} | {"mapping__rollout": "[1]"}),
    ):
        with pytest.raises(AssertionError, match="found 99 in the column secret"):
            run_on(2, folder, f"wrong {name}", **own, **roles)
