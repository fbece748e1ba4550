"""The worked example of agents, examples/agents/guess.py: at small size, and at its own (make learning)."""

import re
from pathlib import Path

import pytest
from forked import run_forked
from places import ROOT

EXAMPLE = ROOT / "examples/agents/guess.py"


def rewards(folder: Path, *words: object) -> tuple[float, float]:
    """Mean reward of a game before and after reinforcement learning."""
    done = run_forked(EXAMPLE, "--folder", folder / "run", *words, folder=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r"mean reward of a game: (-?[0-9.]+) before reinforcement learning, (-?[0-9.]+) after", done.stdout)
    assert found is not None
    return float(found[1]), float(found[2])


def test_the_worked_example_runs(tmp_path: Path) -> None:
    rewards(tmp_path, "--games", 100, "--sft-steps", 2, "--rl-steps", 1)


@pytest.mark.learning
@pytest.mark.timeout(1800)
def test_a_model_learns_from_an_agent_to_use_what_it_is_told(tmp_path: Path) -> None:
    before, after = rewards(tmp_path)
    assert after >= before + 0.15
