"""Gates, thresholds, and the penalties for length and repetition."""

from typing import Any

import numpy as np
import pytest

from verl.config.load import load_config
from verl.config.ppo import PPOConfig, RewardConfig, RewardModelConfig, check_rewards
from verl.errors import UserError
from verl.models.load import load_tokenizer
from verl.models.tiny import write_tiny_model
from verl.rewards import overlong, repetition
from verl.rewards._scoring import Rewards, check_combination

QUESTIONS = ["What is 2 + 3?"] * 3
RESPONSES = ["2 + 3 = 5\n#### 5", "2 + 3 = 6\n#### 6", "#### 5"]
ROWS: list[dict[str, Any]] = [{"reference": "#### 5"}] * 3


def scored(**keys: Any) -> Any:
    reward = RewardConfig(**keys)
    check_rewards(reward, RewardModelConfig())
    return Rewards(reward, RewardModelConfig()).score(QUESTIONS, RESPONSES, ROWS)


def test_an_answer_that_misses_a_gate_gets_nothing_else() -> None:
    """The third answer is right, but has half of the format."""
    found = scored(name=["gsm8k", "format"], weights=[1, 0.1], gates={"format": 1.0}, gated=-0.5)
    np.testing.assert_allclose(found.reward_A, [1.1, 0.1, -0.5], rtol=1e-6)
    assert found.each["gated"].tolist() == [0, 0, 1] and found.each["gsm8k"].tolist() == [1, 0, 1]
    only = scored(name=["gsm8k", "format"], weights=[1, 0], gates={"format": 0.6})
    assert only.reward_A.tolist() == [1, 0, 0], "a weight of 0 leaves a gate alone"


def test_a_threshold_makes_a_reward_right_or_wrong() -> None:
    found = scored(name=["f1", "format"], thresholds={"f1": 0.5, "format": 0.4})
    assert found.reward_A.tolist() == [1 + (score >= 0.5) for score in found.each["f1"]] and 0 < found.each["f1"][0] < 1
    assert "gated" not in found.each


def test_gates_and_thresholds_are_read_from_words() -> None:
    words = ["model.partial_pretrain=m", "data.train_files=t", "reward.name=[gsm8k,format]", "reward.gates={format: 1}", "reward.gated=-1"]
    config = load_config(PPOConfig, words)
    assert config.reward.gates == {"format": 1.0} and config.reward.gated == -1.0


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"gates": {"fromat": 1.0}}, "reward.gates: there is no reward 'fromat'\n  fix: did you mean format?"),
        ({"thresholds": {"judge": 1.0}}, "reward.thresholds: there is no reward 'judge'\n  fix: name one of gsm8k, format"),
    ],
)
def test_a_gate_of_a_reward_that_is_not_there_is_an_error(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_combination(RewardConfig(["gsm8k", "format"], **keys), RewardModelConfig())


def test_a_gate_that_is_no_number_is_an_error() -> None:
    with pytest.raises(UserError, match=r"reward\.gates\.format: found nan"):
        scored(name=["gsm8k", "format"], gates={"format": float("nan")})
    with pytest.raises(UserError, match=r"reward\.gated: found inf"):
        scored(gated=float("inf"))


# Penalties


@pytest.mark.parametrize(("words", "penalty"), [(0, 0.0), (8, 0.0), (9, -0.5), (10, -1.0), (30, -1.0)])
def test_the_penalty_for_length_is_that_of_dapo(words: int, penalty: float) -> None:
    """0 up to limit - buffer, (limit - buffer - length) / buffer, then -1: arXiv:2503.14476, equation 13."""
    settings = overlong.Settings(overlong_limit=10, overlong_buffer=2)
    settings.check()
    assert overlong.score("", "word " * words, {}, settings) == penalty
    hard = overlong.Settings(overlong_limit=10)
    assert overlong.score("", "word " * words, {}, hard) == (-1.0 if words > 10 else 0.0)


def test_length_is_counted_in_words_characters_or_tokens(tmp_path: Any) -> None:
    assert overlong.length_of("你好 world, ok", overlong.Settings()) == 4
    assert overlong.length_of("a b", overlong.Settings(overlong_unit="characters")) == 3
    write_tiny_model(tmp_path, ["one two three"])
    own = overlong.Settings(10, overlong_unit="tokens", overlong_tokenizer=str(tmp_path))
    own.check()
    assert overlong.length_of("one two three", own) == len(load_tokenizer(str(tmp_path))("one two three").input_ids)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "overlong_limit: reward overlong needs a limit"),
        ({"overlong_limit": 5, "overlong_buffer": 6}, "overlong_buffer: 6 is more than overlong_limit=5"),
        ({"overlong_limit": 5, "overlong_unit": "lines"}, "overlong_unit: found 'lines'"),
        ({"overlong_limit": 5, "overlong_unit": "tokens"}, "overlong_tokenizer: tokens are counted by a tokenizer"),
        ({"overlong_limit": 5, "overlong_tokenizer": "m"}, "overlong_tokenizer: words need no tokenizer"),
    ],
)
def test_a_wrong_limit_is_an_error(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        overlong.Settings(**keys).check()


@pytest.mark.parametrize(
    ("text", "penalty"),
    [("", 0.0), ("a b", 0.0), ("a b c d e", 0.0), ("a b a b a b", -3 / 5), ("好好好好", -2 / 3), ("A, b. a b!", -1 / 3)],
)
def test_the_penalty_for_repetition_is_the_share_of_pairs_that_were_there(text: str, penalty: float) -> None:
    assert repetition.score("", text, {}, repetition.Settings(repetition_words=2)) == pytest.approx(penalty)


def test_a_share_of_repetition_may_be_free() -> None:
    settings = repetition.Settings(repetition_words=2, repetition_free=0.5)
    settings.check()
    assert repetition.score("", "a b a b a b", {}, settings) == pytest.approx(-0.1)
    with pytest.raises(UserError, match="repetition_free: found 1"):
        repetition.Settings(repetition_free=1.0).check()
