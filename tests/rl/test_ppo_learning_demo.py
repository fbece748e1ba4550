"""Reinforcement learning raises exact match on the demo's own problems, from an early checkpoint of the demo's own model.

Ten minutes a seed on two cores, so only `make learning` runs it; tests/test_ppo_learning.py shows the same in a minute on
an easier task. With `-s` it tells where each run began and ended, and in how many seconds.
"""

import pytest
from demo_start import FAR_TOO_HIGH, GRPO, PPO, Start

pytestmark = [pytest.mark.learning, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda seed: f"seed {seed}")
def start(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Start:
    return Start(tmp_path_factory.mktemp("learning"), request.param)


def test_grpo_raises_exact_match_by_a_fifth(start: Start) -> None:
    assert start.after("grpo", GRPO) >= start.exact_match + 0.20


def test_ppo_with_a_critic_raises_it_by_a_seventh(start: Start) -> None:
    assert start.after("ppo", PPO) >= start.exact_match + 0.15


def test_at_a_learning_rate_far_too_high_it_falls(start: Start) -> None:
    assert start.after("wild", FAR_TOO_HIGH) < start.exact_match
