"""The weighted sum of several rewards, and what happens where one fails."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from verl.config.plugin_settings import completed
from verl.config.ppo import PPOConfig, RewardConfig, RewardModelConfig, check_rewards
from verl.errors import UserError
from verl.rewards import format as form
from verl.rewards._scoring import Rewards, Scored

QUESTIONS = ["What is 2 + 3?"] * 3
RESPONSES = ["2 + 3 = 5\n#### 5", "2 + 3 = 6\n#### 6", "It is 5."]
ROWS = [{"reference": "#### 5"}] * 3
PLACES = ["train.jsonl:7", "train.jsonl:8", "train.jsonl:9"]
HALF_BROKEN = """
def score(prompt, response, row):
    if "6" in response:
        raise ValueError("no sixes")
    return float("nan") if "It is" in response else 2.0
"""


def scorer(**keys: Any) -> Rewards:
    reward = RewardConfig(**keys)
    check_rewards(reward, RewardModelConfig())
    return Rewards(reward, RewardModelConfig())


def test_rewards_add_up_by_their_weights() -> None:
    scored = scorer(name=["gsm8k", "format"], weights=[1, 0.1]).score(QUESTIONS, RESPONSES, ROWS)
    np.testing.assert_allclose(scored.reward_A, [1.1, 0.1, 0.05], rtol=1e-6)
    assert scored.reward_A.dtype == np.float32
    assert {name: values.tolist() for name, values in scored.each.items()} == {"gsm8k": [1, 0, 0], "format": [1, 1, 0.5]}
    assert scored.errors == [] and scored.describe_errors() is None


def test_a_failing_reward_ends_the_run_with_the_place_of_its_row(tmp_path: Path) -> None:
    grader = tmp_path / "grader.py"
    grader.write_text(HALF_BROKEN)
    with pytest.raises(UserError, match=r"train.jsonl:8: reward grader raised ValueError: no sixes \(.*grader.py:4\)"):
        scorer(name=str(grader)).score(QUESTIONS, RESPONSES, ROWS, places=PLACES)
    with pytest.raises(UserError, match="answer 1: reward grader returned nan"):
        scorer(name=str(grader)).score(QUESTIONS[2:], RESPONSES[2:], ROWS[2:])


def test_a_failing_reward_may_count_as_nothing_and_is_counted(tmp_path: Path) -> None:
    grader = tmp_path / "grader.py"
    grader.write_text(HALF_BROKEN)
    scored = scorer(name=[str(grader), "gsm8k"], on_error="zero").score(QUESTIONS, RESPONSES, ROWS, places=PLACES)
    np.testing.assert_array_equal(scored.reward_A, [3, 0, 0])
    assert [error.where for error in scored.errors] == ["train.jsonl:8", "train.jsonl:9"]
    told = scored.describe_errors()
    assert told is not None and "2 rewards failed" in told and "train.jsonl:9: reward grader returned nan" in told
    assert "more" not in told


def test_of_many_failures_different_ones_are_shown_and_all_are_counted() -> None:
    errors = [UserError("gave nan", where=f"train.jsonl:{row}") for row in (8, 8, 8, 9, 10, 11, 11)]
    assert Scored(np.zeros(7), {}, errors).describe_errors() == (
        "warning: 7 rewards failed and count as 0 (reward.on_error=zero):"
        "\n  train.jsonl:8: gave nan (3 answers)\n  train.jsonl:9: gave nan\n  train.jsonl:10: gave nan\n  and 2 more"
    )


def test_a_number_of_any_kind_counts_if_it_is_not_beyond_all_measure(tmp_path: Path) -> None:
    grader = tmp_path / "kinds.py"
    for said, expected in (("True", 1.0), ("np.bool_(True)", 1.0), ("np.float16(2)", 2.0), ("-3", -3.0)):
        grader.write_text(f"import numpy as np\n\n\ndef score(prompt, response, row):\n    return {said}\n")
        assert scorer(name=str(grader)).score(["?"], ["5"], [{}]).reward_A.tolist() == [expected]
    for said in ("1e300", "10**400", "float('-inf')", "'1'", "None"):
        grader.write_text(f"def score(prompt, response, row):\n    return {said}\n")
        with pytest.raises(UserError, match=r"reward kinds (returned|raised)"):
            scorer(name=str(grader)).score(["?"], ["5"], [{}])


def test_a_row_without_a_right_answer_is_said() -> None:
    with pytest.raises(UserError, match=r"needs a right answer(.|\n)*data.response_key"):
        scorer(name="gsm8k").score(["?"], ["5"], [{}])


def test_two_graders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a/mine.py", "b/mine.py", "c/mine_2.py", "d/model.py")]
    for number, path in enumerate(paths):
        path.parent.mkdir()
        path.write_text(f"def score(prompt, response, row):\n    return {number + 1}\n")
    scored = scorer(name=[str(path) for path in paths], weights=[1, 10, 100, 1000]).score(["?"], ["!"], [{}])
    assert scored.reward_A.tolist() == [4321]
    assert list(scored.each) == ["mine", "mine_2", "mine_2_2", "model_2"]  # "model" is the reward model's


def test_no_answers_have_no_rewards() -> None:
    assert scorer().score([], [], []).reward_A.shape == (0,)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"name": "gsm8"}, "did you mean 'gsm8k'"),
        ({"name": None}, "neither a reward nor a reward model"),
        ({"name": ["gsm8k", "format"], "weights": [1]}, "1 weights for 2 rewards"),
        ({"name": 3}, "found 3"),
        ({"on_error": "ignore"}, "found 'ignore'"),
    ],
)
def test_a_wrong_setting_is_an_error_before_anything_is_scored(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        scorer(**keys)


@pytest.mark.parametrize(
    ("response", "share"),
    [("5", 0.5), ("#### 5", 0.5), ("It is\n#### 5", 1.0), ("#### 5\nor so", 0.5), ("", 0.0), ("so\n####", 0.5)],
)
def test_the_usual_form_is_a_line_with_the_answer_at_the_end(response: str, share: float) -> None:
    assert form.score("", response, {}, form.Settings()) == share


@pytest.mark.parametrize(
    ("response", "share"),
    [("<think>a</think>b", 1.0), ("<think>a</think> ", 2 / 3), ("a</think>b", 2 / 3), ("</think><think>b", 2 / 3), ("", 0.0)],
)
def test_the_form_that_is_asked_for_is_graded_part_by_part_in_order(response: str, share: float) -> None:
    reward = completed(PPOConfig(reward=RewardConfig("format"))).reward
    reward.format = ["^<think>", "</think>", r"\S"]  # type: ignore[attr-defined]
    scored = Rewards(reward, RewardModelConfig()).score(["?"], [response], [{}])
    assert scored.reward_A[0] == pytest.approx(share)


def test_a_form_that_is_no_regular_expression_is_an_error() -> None:
    with pytest.raises(UserError, match=r"'\(' is not a regular expression"):
        form.Settings(["("]).check()


# The contract of a user's own grader


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def points(prompt, response, row):\n    return 1\n", "it has no 'score' and no 'score_group'"),
        ("def score(response, row):\n    return 1\n", r"score\(response, row\) cannot be called as score\(prompt, response, row\)"),
        ("async def score(prompt, response, row, more):\n    return 1\n", "missing a required argument: 'more'"),
        ("score = 1\n", "score is no function"),
        ("def score_group(prompt):\n    return 1\n", r"cannot be called as score_group\(prompt, responses, row\)"),
        (
            "from dataclasses import dataclass\n@dataclass\nclass Settings:\n    n: int = 1\ndef score(prompt, response, row):\n    pass\n",
            r"cannot be called as score\(prompt, response, row, settings\)",
        ),
    ],
)
def test_a_grader_with_another_contract_is_refused_when_it_is_loaded(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=said):
        scorer(name=str(tmp_path / "mine.py"))


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_group_is_the_adjacent_answers_to_a_prompt(tmp_path: Path, kind: str) -> None:
    (tmp_path / "mine.py").write_text(
        f"import numpy as np\n{kind} score_group(prompt, responses, row):\n    return np.arange(len(responses)) / len(responses)\n"
    )
    scored = scorer(name=str(tmp_path / "mine.py")).score(["p"] * 5, ["a"] * 5, [{}] * 5, groups=[7, 7, 7, 7, 9])
    assert scored.reward_A.tolist() == [0, 0.25, 0.5, 0.75, 0]


def test_a_grader_with_keys_gets_them_in_its_process(tmp_path: Path) -> None:
    text = "from dataclasses import dataclass\n\n\n@dataclass\nclass Settings:\n    # Most points.\n    most: int = 1\n\n\n"
    (tmp_path / "mine.py").write_text(text + "def score(prompt, response, row, settings):\n    return settings.most\n")
    reward = completed(PPOConfig(reward=RewardConfig(str(tmp_path / "mine.py")))).reward
    reward.most = 3  # type: ignore[attr-defined]
    assert Rewards(reward, RewardModelConfig()).score(["?"], ["!"], [{}]).reward_A.tolist() == [3]


def test_a_grader_of_verl_may_score_all_answers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.rewards import gsm8k

    calls = []

    def score_batch(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
        calls.append(len(responses))
        return [float(row["reference"] == "#### 5") for row in rows]

    monkeypatch.setattr(gsm8k, "score_batch", score_batch, raising=False)
    assert scorer().score(QUESTIONS, RESPONSES, ROWS).reward_A.tolist() == [1, 1, 1] and calls == [3]
    with pytest.raises(UserError, match=r"train.jsonl:9: reward gsm8k needs a right answer"):
        scorer().score(QUESTIONS, RESPONSES, [*ROWS[:2], {}], places=PLACES)


# Right answers that a grader cannot read


def test_right_answers_are_checked_before_training() -> None:
    rows = [*ROWS[:2], {"reference": "it depends"}]
    with pytest.raises(UserError, match=r"train.jsonl:9: reward gsm8k finds no answer in 'it depends'"):
        scorer().check_references(rows, PLACES)
    with pytest.raises(UserError, match=r"train.jsonl:8: reward gsm8k needs a right answer(.|\n)*data.response_key"):
        scorer().check_references([ROWS[0], {}, ROWS[0]], PLACES)
    scorer(name="format").check_references([{}], PLACES[:1])


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        ("raise ValueError('two numbers')", "cannot read the right answer '1 or 2': two numbers"),
        ("return [][0]", "cannot read the right answer '1 or 2': raised IndexError"),
    ],
)
def test_a_grader_of_ones_own_may_check_right_answers(tmp_path: Path, hook: str, said: str) -> None:
    text = (
        f"def check_reference(reference):\n    if 'or' in reference:\n        {hook}\n\n\ndef score(prompt, response, row):\n    return 1\n"
    )
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=f"train.jsonl:8: reward mine {said}"):
        scorer(name=str(tmp_path / "mine.py")).check_references([{"reference": "1"}, {"reference": "1 or 2"}], PLACES[:2])
