"""The update's work is even over ranks, the gradient is the same, and the time that ranks wait is told."""

import json
from pathlib import Path

import numpy as np
import pytest
from places import run_ranks
from rl_runs import STEPS, check_same, run_on, train, write_folder
from runs import lines_of, metrics_of

from verl.rl.balance import Cells, plan_moves

# Answers to prompts of odd numbers, which are those of rank 1 of two, have 40 tokens; the others have 2.
UNEQUAL = """
from dataclasses import replace

from verl.rollout.native import NativeRollout


class Unequal(NativeRollout):
    def generate(self, prompts, sampling, seeds=None):
        short = replace(sampling, max_new_tokens=2)
        limits = [sampling if seed % 2 or {is_equal} else short for seed in seeds or range(len(prompts))]
        each = zip(prompts, limits, seeds or range(len(prompts)))
        return [done for prompt, limit, seed in each for done in NativeRollout.generate(self, [prompt], limit, [seed])]


def share(model, path, tokenizer, stop_ids, options):
    return Unequal(model, stop_ids, options, is_shared=True)


def load(path, tokenizer, stop_ids, options):
    raise NotImplementedError
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_folder(tmp_path_factory.mktemp("balance"))
    for name, is_equal in (("unequal", False), ("equal", True)):
        (path / f"{name}.py").write_text(UNEQUAL.replace("{is_equal}", str(is_equal)))
    return path


def heavy(ranks: int, seed: int, groups: int = 64) -> Cells:
    """Groups of eight answers with long tails, dealt to the ranks in turn."""
    drawn = np.minimum(2048, np.random.default_rng(seed).lognormal(5.5, 1, (groups, 8))).astype(int).sum(1)
    return {0: {number: (number % ranks, int(tokens)) for number, tokens in enumerate(drawn)}}


def fullest(cells: Cells, moves: dict[int, int], ranks: int) -> float:
    """Tokens of the fullest rank over the mean."""
    (groups,) = cells.values()
    loads = np.zeros(ranks)
    for number, (rank, tokens) in groups.items():
        loads[moves.get(number, rank)] += tokens
    return float(loads.max() / loads.mean())


@pytest.mark.parametrize(("ranks", "uneven"), [(2, 1.02), (4, 1.05), (8, 1.1)])
def test_ranks_have_nearly_equal_work_after_few_moves(ranks: int, uneven: float) -> None:
    before, after, moved = [], [], []
    for seed in range(20):
        cells = heavy(ranks, seed)
        moves = plan_moves(cells, ranks)
        before.append(fullest(cells, {}, ranks))
        after.append(fullest(cells, moves, ranks))
        moved.append(len(moves))
    assert np.mean(after) < 1.015 < uneven < np.mean(before)
    assert max(after) < 1.05 and np.mean(moved) < 0.25 * 64


def test_the_plan_ends_where_no_move_helps_and_each_update_is_balanced_for_itself() -> None:
    assert plan_moves({0: {0: (0, 100)}}, 4) == {}
    assert plan_moves({0: {0: (0, 100), 1: (1, 99)}}, 2) == {}
    assert plan_moves({0: {0: (0, 10), 1: (0, 10)}, 1: {2: (1, 10), 3: (1, 10)}}, 2) in (
        {0: 1, 2: 0},
        {1: 1, 2: 0},
        {0: 1, 3: 0},
        {1: 1, 3: 0},
    )


@pytest.fixture(scope="module")
def unequal(folder: Path) -> dict[int, Path]:
    keys: dict[str, object] = {"rollout__name": folder / "unequal.py", "rollout__max_new_tokens": 40, "model__strategy": "ddp"}
    keys |= {"data__prompts_per_step": 8, "algorithm__updates_per_step": 2}
    return {processes: run_on(processes, folder, f"unequal_{processes}", **keys) for processes in (1, 2)}


def test_exchanged_groups_are_learned_from_as_on_one_process(unequal: dict[int, Path]) -> None:
    check_same(unequal[2], unequal[1])
    for step, line in enumerate(metrics_of(unequal[2])):
        tokens = np.zeros(2)  # of ranks as they have drawn, with prompts of about 34 tokens
        for answer in lines_of(unequal[2] / "rollouts" / f"step_{step + 1}.jsonl"):
            tokens[answer["number"] % 2] += 34 + answer["tokens"]
        assert tokens.max() / tokens.mean() > 1.25
        assert line["perf/fullest_rank"] < 1.1


def test_a_rank_with_short_answers_is_told_to_wait(folder: Path, unequal: dict[int, Path]) -> None:
    lines = metrics_of(unequal[2])
    for step in range(STEPS):
        tokens = {line["number"] % 2: line["tokens"] for line in lines_of(unequal[2] / "rollouts" / f"step_{step + 1}.jsonl")}
        assert tokens[0] <= 2 < tokens[1]
    for line in lines:
        of_phases = line["perf/waiting_generate"] + line["perf/waiting_score"] + line["perf/waiting_update"]
        assert (
            line["perf/waiting_share"] == pytest.approx(of_phases)
            and 0 < line["perf/waiting_share"] < line["perf/largest_waiting_share"] < 1
        )
    assert all("perf/waiting_rollout_ranks" not in line for line in lines)
    keys: dict[str, object] = {"rollout__name": folder / "equal.py", "rollout__max_new_tokens": 40, "model__strategy": "ddp"}
    keys |= {"data__prompts_per_step": 8}
    equal = metrics_of(run_on(2, folder, "equal_2", **keys))
    waits, without = (np.mean([line["perf/waiting_generate"] for line in found[1:]]) for found in (lines, equal))
    assert waits > 0.1 and waits > 2 * without
    assert "waits " in (unequal[2] / "train.log").read_text()
    assert all(line["perf/waiting_generate"] == 0 for line in metrics_of(unequal[1])), "alone, nobody is waited for"


def test_with_a_rollout_apart_either_side_waits_for_the_other(folder: Path) -> None:
    split = {**dict.fromkeys((f"mapping__{role}" for role in ("actor", "critic", "reference", "reward")), "[0]"), "mapping__rollout": "[1]"}
    for line in metrics_of(run_on(2, folder, "split", rollout__max_new_tokens=40, **split)):
        share = line["perf/seconds_generate"] / line["perf/step_seconds"]
        assert line["perf/waiting_generate"] == pytest.approx(share, abs=0.05)
        others = share + line["perf/seconds_update_rollout"] / line["perf/step_seconds"]
        assert line["perf/waiting_rollout_ranks"] == pytest.approx(1 - others, abs=0.05)
        assert line["perf/waiting_rollout_ranks"] + share < 1.05


@pytest.mark.parametrize(("watched", "least"), [("watched", 0.4), ("not", 0.0)])
def test_a_rank_waits_for_gradients_that_are_late(folder: Path, watched: str, least: float) -> None:
    (line,) = [line for line in run_ranks("waiting.py", folder / "model", watched).splitlines() if line.startswith("[")]
    waited = json.loads(line)
    assert waited[1] < 0.2
    assert least <= waited[0] < (0.4 if watched == "not" else 9.0)


SLEEPS = "import time\n\n\ndef score(prompt, response, row):\n    time.sleep({seconds})\n    return float(len(response) % 3)\n"


def test_the_time_of_graders_counts_as_waiting(folder: Path) -> None:
    shares = []
    for name, seconds in (("slow", 0.05), ("quick", 0.0)):
        (folder / f"{name}.py").write_text(SLEEPS.format(seconds=seconds))
        (line,) = train(folder, name, reward__name=folder / f"{name}.py", trainer__total_training_steps=1)
        assert line["perf/waiting_score"] == pytest.approx(line["perf/seconds_score"] / line["perf/step_seconds"], rel=0.1)
        shares.append(line["perf/waiting_score"])
    assert shares[0] > 2 * shares[1]
