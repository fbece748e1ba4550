"""Comparisons in pairs: both orders, ties, how many requests they take, and a service that the judge shares."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from judges import Service, graded, prompt_of, served

from verl.config.load import load_config
from verl.config.plugin_settings import completed
from verl.config.ppo import PPOConfig, RewardConfig, RewardModelConfig
from verl.errors import UserError
from verl.rewards import _service, pairwise
from verl.rewards._scoring import Rewards


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Service]:
    with served(monkeypatch, tmp_path) as found:
        found.reply = lambda number, body: graded(f"Better: {longer(body)}")
        yield found


def answers(body: dict[str, Any]) -> tuple[str, str]:
    first, second = (prompt_of(body).split(f"<answer {name}>\n")[1].split(f"\n</answer {name}>")[0] for name in "AB")
    return first, second


def longer(body: dict[str, Any]) -> str:
    first, second = answers(body)
    return "tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B"


def settings(service: Service, **keys: Any) -> pairwise.Settings:
    found = pairwise.Settings(**{"judge_url": service.url, "judge_model": "m", **keys})
    found.check()
    return found


def test_each_answer_is_compared_with_each_other_in_both_orders(service: Service) -> None:
    assert pairwise.score_group("q", ["aa", "a", "aaa"], {}, settings(service)) == [0.5, 0.0, 1.0]
    assert len(service.requests) == 3 * 2
    asked = [answers(body) for _, _, body in service.requests]
    assert len(set(asked)) == 6 and all((second, first) in asked for first, second in asked)


def test_a_judge_that_likes_the_first_answer_says_nothing(service: Service) -> None:
    service.reply = lambda number, body: graded("Better: A")
    assert pairwise.score_group("q", ["aa", "a", "aaa"], {}, settings(service)) == [0.5, 0.5, 0.5]


def test_ties_and_equal_answers_are_half_a_win(service: Service) -> None:
    assert pairwise.score_group("q", ["ab", "cd", "e"], {}, settings(service)) == [0.75, 0.75, 0.0]
    before = len(service.requests)
    assert pairwise.score_group("q", ["same", "same "], {}, settings(service)) == [0.5, 0.5] and len(service.requests) == before


def test_the_reference_is_another_opponent(service: Service) -> None:
    own = settings(service, pairwise_against="reference")
    assert pairwise.score_group("q", ["a", "aaa", "bb"], {"reference": "aa"}, own) == [0.0, 1.0, 0.5] and len(service.requests) == 6
    assert pairwise.score_group("q", ["aaaa"], {"reference": "aa"}, settings(service)) == [1.0], "an answer that is alone"
    with pytest.raises(UserError, match="an answer that is alone needs a reference"):
        pairwise.score_group("q", ["aaaa"], {}, settings(service))


@pytest.mark.parametrize(("neighbours", "requests"), [(1, 12), (2, 24), (5, 30), (9, 30)])
def test_fewer_opponents_cost_fewer_requests(service: Service, neighbours: int, requests: int) -> None:
    """2nk requests for six answers with k neighbours, at most n(n-1); each answer has as many opponents as any other."""
    found = pairwise.score_group("q", ["a" * n for n in range(1, 7)], {}, settings(service, pairwise_neighbours=neighbours))
    assert len(service.requests) == requests and found[0] == 0.0 and found[-1] == 1.0
    asked = [text for _, _, body in service.requests for text in answers(body)]
    assert len({asked.count("a" * n) for n in range(1, 7)}) == 1


def test_groups_of_a_step_are_asked_about_side_by_side(service: Service) -> None:
    reward = RewardConfig("pairwise")
    for key, value in (("judge_url", service.url), ("judge_model", "m"), ("judge_requests", 4)):
        setattr(reward, key, value)
    scored = Rewards(reward, RewardModelConfig()).score(["q"] * 5, ["a", "aa", "b", "bb", "bbb"], [{}] * 5, groups=[1, 1, 2, 2, 2])
    assert scored.reward_A.tolist() == [0, 1, 0, 0.5, 1] and len(service.requests) == 8 and service.most_at_a_time <= 4


def test_a_reply_without_a_verdict_is_a_failure_of_its_group_alone(service: Service) -> None:
    service.reply = lambda number, body: graded("Both!" if "odd" in prompt_of(body) else f"Better: answer {longer(body)}")
    reward = RewardConfig("pairwise", on_error="zero")
    for key, value in (("judge_url", service.url), ("judge_model", "m")):
        setattr(reward, key, value)
    scored = Rewards(reward, RewardModelConfig()).score(["q"] * 4, ["a", "aa", "odd", "b"], [{}] * 4, groups=[1, 1, 2, 2])
    assert scored.reward_A.tolist() == [0, 1, 0, 0] and len(scored.errors) == 2
    assert "wrote no line `Better: A`" in str(scored.errors[0])


@pytest.mark.parametrize(
    ("reply", "win"), [("Better: A", 1), ("**Better:** B.", 0), ("Better: A? No.\nBetter: tie", 0.5), ("better: neither", 0.5), ("A", None)]
)
def test_the_last_verdict_of_a_reply_counts(reply: str, win: float | None) -> None:
    if win is None:
        with pytest.raises(_service.NoGradeError):
            pairwise.verdict_of(reply)
    else:
        assert pairwise.verdict_of(reply) == win


def test_grades_and_comparisons_share_the_keys_of_their_service() -> None:
    words = ["model.partial_pretrain=m", "data.train_files=t.jsonl", "reward.name=[judge,pairwise]"]
    service = ["reward.judge_url=http://h/v1", "reward.judge_model=m", "reward.pairwise_neighbours=2", "reward.judge_best=5"]
    config: Any = load_config(PPOConfig, [*words, *service])
    assert config.reward.judge_model == "m" and config.reward.pairwise_neighbours == 2 and config.reward.judge_best == 5
    assert completed(config) == config


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"pairwise_against": "all"}, "pairwise_against: found 'all'"),
        ({"pairwise_neighbours": 0}, "pairwise_neighbours"),
        ({"pairwise_criterion": " "}, "pairwise_criterion: is empty"),
        ({"judge_model": None}, "judge_model: reward pairwise needs a service and a model"),
    ],
)
def test_wrong_settings_are_named(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        pairwise.Settings(**{"judge_url": "http://h/v1", "judge_model": "m", **keys}).check()
