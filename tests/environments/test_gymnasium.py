"""Gymnasium's environments as text: what is shown, how a turn is read as an action, and the environment's own rewards and ends."""

from typing import Any

import pytest

from verl.environments import Start, Step
from verl.environments.gymnasium import Environment, Settings, _without_colors, needs_limit, prepare
from verl.errors import UserError

gymnasium = pytest.importorskip("gymnasium", reason="needs gymnasium: pip install 'verl[gymnasium]'")

LAKE: dict[str, Any] = {"game": "FrozenLake-v1", "arguments": {"is_slippery": False}, "actions": ["left", "down", "right", "up"]}


def begun(**keys: Any) -> tuple[Environment, Start]:
    settings = Settings(**keys)
    settings.check()
    environment = Environment(settings)
    return environment, environment.reset({}, 5)


def said(environment: Environment, text: str) -> Step:
    return environment.step({"role": "assistant", "content": text})


def test_a_walk_over_the_lake_has_the_environments_own_reward_and_end() -> None:
    environment, start = begun(**LAKE, instruction="Walk from S to G, not into H.")
    first = "Walk from S to G, not into H.\n\n[S]FFF\nFHFH\nFFFH\nHFFG\n\nAnswer with one action: left, down, right, up."
    assert start == Start([{"role": "user", "content": first}])
    steps = [said(environment, text) for text in ("Down", "I go down.", "not up: right", "right", "DOWN", "so right")]
    assert steps[0] == Step([{"role": "user", "content": "  (Down)\nSFFF\n[F]HFH\nFFFH\nHFFG"}])
    assert [(step.reward, step.done) for step in steps] == [*5 * [(0.0, False)], (1.0, True)]
    environment.close()


def test_a_hole_ends_the_episode_without_a_reward() -> None:
    environment, _ = begun(**LAKE)
    said(environment, "right")
    step = said(environment, "down")
    assert (step.reward, step.done) == (0.0, True)


def test_a_turn_without_an_action_is_told_and_the_environment_stands_still() -> None:
    environment, _ = begun(**LAKE, no_action_reward=-0.5)
    assert said(environment, "I would rather swim, in uptown.") == Step(
        [{"role": "user", "content": "Answer with one action: left, down, right, up."}], reward=-0.5
    )
    assert "[F]" in said(environment, "right").messages[0]["content"]


@pytest.mark.parametrize(("game", "arguments"), [("Taxi-v4", {}), ("CliffWalking-v1", {}), ("Blackjack-v1", {})])
def test_an_episode_is_that_of_gymnasium_itself(game: str, arguments: dict[str, Any]) -> None:
    environment, _ = begun(game=game, arguments=arguments)
    original = gymnasium.make(game)
    original.reset(seed=5)
    for number in (0, 1, 1, 0):
        step = said(environment, f"action {number}")
        observation, reward, terminated, truncated, _ = original.step(number)
        assert (step.reward, step.done) == (reward, terminated or truncated)
        if game == "Blackjack-v1":
            assert step.messages[0]["content"] == str(observation)
        if step.done:
            break


def test_the_seed_decides_the_world() -> None:
    def world(seed: int) -> str:
        text: str = Environment(Settings(game="Taxi-v4")).reset({}, seed).messages[0]["content"]
        return text

    assert world(1) == world(1) != world(2)


def test_colors_become_marks_that_stay_apart() -> None:
    assert _without_colors("\x1b[41mS\x1b[0mF \x1b[34;1mR\x1b[0m \x1b[35m\x1b[43mY\x1b[0m\x1b[0m") == "[S]F *R* |[Y]|"


def test_toy_texts_play_in_the_trainer_and_others_in_processes_of_their_own() -> None:
    assert not needs_limit(Settings(**LAKE))
    assert needs_limit(Settings(game="CartPole-v1"))


@pytest.mark.parametrize(
    ("keys", "where", "said"),
    [
        ({"game": "FrozenLeak-v1"}, "environment.game", "FrozenLake"),
        ({"game": "Taxi-v4", "arguments": {"speed": 1}}, "environment.arguments", "speed"),
        ({"game": "FrozenLake-v1", "actions": ["left", "Left", "a", "b"]}, "environment.actions", "4 actions"),
        ({"game": "Pendulum-v1"}, "environment.game=Pendulum-v1", "Box"),
        ({}, "game", "names no environment"),
    ],
)
def test_what_cannot_be_played_names_its_key(keys: dict[str, Any], where: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        begun(**keys)
    assert error.value.where == where and said in str(error.value)


def test_whatever_a_game_raises_at_its_arguments_is_told_of_them() -> None:
    with pytest.raises(UserError, match="KeyError") as caught:
        prepare(Settings(game="FrozenLake-v1", arguments={"map_name": "5x5"}))
    assert caught.value.where == "environment.arguments"
