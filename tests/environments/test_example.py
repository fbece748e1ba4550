"""The worked example of environments, examples/environments/guess.py: at small size, and at its own (make learning)."""

import re
from pathlib import Path

import pytest
from forked import run_forked
from places import ROOT

EXAMPLE = ROOT / "examples/environments/guess.py"


def shares_won(folder: Path, *words: object) -> tuple[float, float]:
    """Share of games that are won before and after reinforcement learning, in percent."""
    done = run_forked(EXAMPLE, "--folder", folder / "run", *words, folder=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r"games won: ([0-9.]+)% before reinforcement learning, ([0-9.]+)% after", done.stdout)
    assert found is not None
    return float(found[1]), float(found[2])


def test_the_worked_example_runs(tmp_path: Path) -> None:
    shares_won(tmp_path, "--games", 100, "--sft-steps", 2, "--rl-steps", 1)


@pytest.mark.learning
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_model_learns_to_use_what_it_is_told(tmp_path: Path, seed: int) -> None:
    before, after = shares_won(tmp_path, "--seed", seed)
    assert after >= before + 30
