"""The game of finding a hidden number."""

import json
from pathlib import Path

import pytest

from verl.environments import Step
from verl.environments.guess import HIGHER, LOWER, Environment, Settings, write_rows
from verl.errors import UserError


def played(secret: int, guesses: list[str]) -> list[Step]:
    game = Environment(Settings(largest=15))
    game.reset({"secret": secret}, 1)
    return [game.step({"role": "assistant", "content": guess}) for guess in guesses]


def test_a_guess_is_answered_until_it_is_right() -> None:
    low, high, right = played(6, ["4", "12", " 6\n"])
    assert [step.messages[0]["content"] for step in (low, high)] == [HIGHER, LOWER]
    assert (low.reward, low.done, low.metrics) == (0.0, False, {"solved": 0.0})
    assert (right.reward, right.done, right.metrics) == (1.0, True, {"solved": 1.0})


@pytest.mark.parametrize("said", ["", "six", "6 or 7", "-6", "0", "16", "6.0", "٦", "9" * 30])
def test_what_is_no_number_of_the_game_costs(said: str) -> None:
    [step] = played(6, [said])
    assert (step.reward, step.done) == (-0.2, False) and "1 to 15" in step.messages[0]["content"]


def test_a_guess_that_cannot_be_right_costs() -> None:
    assert [step.reward for step in played(6, ["4", "3", "12", "12", "5", "6"])] == [0.0, -0.2, 0.0, -0.2, 0.0, 1.0]


def test_who_halves_what_is_left_always_wins() -> None:
    for secret in range(1, 16):
        low, high, game = 1, 15, Environment(Settings(largest=15))
        game.reset({"secret": secret}, 1)
        for _ in range(4):
            guess = (low + high) // 2
            step = game.step({"role": "assistant", "content": str(guess)})
            low, high = (guess + 1, high) if step.messages and step.messages[0]["content"] == HIGHER else (low, guess - 1)
            if step.done:
                break
        assert step.done


def test_rows_are_those_of_the_seed(tmp_path: Path) -> None:
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_rows(tmp_path / name, 50, seed, largest=9)
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1] != texts[2]
    assert {json.loads(line)["secret"] for line in texts[0].splitlines()} <= set(range(1, 10))


@pytest.mark.parametrize("row", [{}, {"secret": 0}, {"secret": 8}, {"secret": "3"}, {"secret": True}])
def test_a_row_without_a_number_of_the_game_is_an_error(row: dict[str, object]) -> None:
    with pytest.raises(UserError, match="expected a number from 1 to 7"):
        Environment(Settings()).reset(row, 1)


def test_the_keys_are_checked() -> None:
    with pytest.raises(UserError, match="largest"):
        Settings(largest=1).check()
