"""The judge's rubric, and its replies on disk: what is asked, which grades count, and that nothing is asked twice."""

import email.utils
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from judges import KEY, Reply, Service, forget, graded, prompt_of, served

from verl.config.ppo import RewardConfig, RewardModelConfig
from verl.errors import UserError
from verl.rewards import _service, judge
from verl.rewards._rubric import last_object, read_rubric
from verl.rewards._scoring import Grader, Loaded, Rewards

CRITERIA = [{"name": "right", "text": "The answer is right.", "weight": 3}, {"name": "kind", "text": "It is friendly."}]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Service]:
    with served(monkeypatch, tmp_path) as found:
        yield found


def settings(service: Service, **keys: Any) -> judge.Settings:
    found = judge.Settings(**{"judge_url": service.url, "judge_model": "m", **keys})
    found.check()
    return found


def grader(chosen: judge.Settings, **keys: Any) -> Grader:
    return Grader(Loaded(judge, chosen), "reward judge", RewardConfig(**keys))


def test_a_rubric_in_words_is_shown_and_needs_no_reference(service: Service) -> None:
    service.reply = lambda number, body: graded("Fine.\nGrade: 3")
    own = settings(service, judge_rubric="Is it a haiku?\nCount the syllables.", judge_best=4)
    assert judge.score("Write one.", "An old pond", {}, own) == 0.75
    asked = prompt_of(service.requests[0][2])
    assert "Is it a haiku?\nCount the syllables." in asked and "from 0 to 4" in asked and "<reference>" not in asked
    judge.score("Write one.", "An old pond", {"reference": "the frog"}, own)
    assert "<reference>\nthe frog\n</reference>" in prompt_of(service.requests[1][2])


@pytest.mark.parametrize("form", ["list", "yaml", "json"])
def test_the_grades_of_criteria_are_averaged_by_their_weights(service: Service, tmp_path: Path, form: str) -> None:
    """3 × 8 and 1 × 4 of 10: 0.7. The last object counts; one with reasons is read too."""
    given: Any = CRITERIA
    if form != "list":
        given = str(tmp_path / f"rubric.{form}")
        Path(given).write_text(json.dumps(CRITERIA))
    service.reply = lambda number, body: graded(
        'First {"right": 1, "kind": 1}\n```json\n{"right": {"grade": 8, "why": "{ok}"}, "kind": 4.0}\n```'
    )
    assert judge.score("q", "a", {}, settings(service, judge_rubric=given)) == pytest.approx(0.7)
    asked = prompt_of(service.requests[0][2])
    assert "- right: The answer is right.\n- kind: It is friendly." in asked and '{"right": N, "kind": N}' in asked


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("Grade: 7", "wrote no JSON with its grades: 'Grade: 7'"),
        ('{"right": 7}', "JSON has no grade of 'kind'"),
        ('{"right": 7, "kind": "good"}', "JSON has no grade of 'kind'"),
        ('{"right": 11, "kind": 1}', "grade 11 of 'right' is above 10"),
        ('{"right": -1, "kind": 1}', "grade -1 of 'right' is below 0"),
        ('{"right": true, "kind": 1}', "JSON has no grade of 'right'"),
        ("{" * 5000, "wrote no JSON"),
        ('{"right": NaN, "kind": 1}', "JSON has no grade of 'right'"),
    ],
)
def test_grades_that_are_missing_or_out_of_range_are_failures(service: Service, reply: str, said: str) -> None:
    service.reply = lambda number, body: graded(reply)
    with pytest.raises(_service.NoGradeError, match=said):
        judge.score("q", "a", {}, settings(service, judge_rubric=CRITERIA))


def test_a_grade_below_0_does_not_lose_its_sign(service: Service) -> None:
    service.reply = lambda number, body: graded("Grade: -3")
    with pytest.raises(_service.NoGradeError, match="grade -3 is below 0"):
        judge.score("q", "a", {"reference": "r"}, settings(service))


def test_failures_are_counted_told_and_limited(service: Service) -> None:
    """Each reply once, although an answer is asked about again where a batch has failed."""
    service.reply = lambda number, body: graded("no idea" if "bad" in prompt_of(body) else "Grade: 10")
    reward = RewardConfig("judge", on_error="zero")
    for key, value in (("judge_url", service.url), ("judge_model", "m"), ("judge_max_failures", 2)):
        setattr(reward, key, value)
    rewards = Rewards(reward, RewardModelConfig())
    arguments = (["q"] * 3, ["good", "bad 1", "bad 2"], [{"reference": "r"}] * 3)
    scored = rewards.score(*arguments)
    assert scored.reward_A.tolist() == [1, 0, 0]
    told = scored.describe_errors()
    assert told is not None and "2 rewards failed" in told and "wrote no line `Grade: N`: 'no idea'" in told
    with pytest.raises(UserError, match=r"reward.judge_max_failures=2: 3 replies had no usable grade(.|\n)*fix: choose a judge"):
        rewards.score(["q"], ["bad 3"], [{"reference": "r"}])


# On disk


def test_a_run_that_goes_on_asks_nothing_twice(service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    service.reply = lambda number, body: graded(f"Grade: {number}")
    arguments = (["q"] * 4, [f"answer {number}" for number in range(4)], [{"reference": "r"}] * 4)
    first = grader(settings(service)).scores(*arguments, range(4))
    forget(monkeypatch)
    assert grader(settings(service)).scores(*arguments, range(4)) == first and len(service.requests) == 4
    files = [path for path in (tmp_path / "cache" / "verl" / "judge").rglob("*") if path.is_file()]
    assert len(files) == 4 and all(path.stat().st_mode & 0o077 == 0 for path in files)
    assert not any("answer 1" in path.read_text() for path in files), "the prompts are not kept"


@pytest.mark.parametrize(
    "change",
    [{"judge_model": "n"}, {"judge_rubric": "other"}, {"judge_temperature": 0.5}, {"judge_max_tokens": 9}, {"judge_best": 20.0}],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_the_reply_is_asked_for_anew(service: Service, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    judge.score("q", "a", {"reference": "r"}, settings(service))
    forget(monkeypatch)
    judge.score("q", "a", {"reference": "r"}, settings(service, **change))
    assert len(service.requests) == 2
    for question, answer, reference in (("q2", "a", "r"), ("q", "a2", "r"), ("q", "a", "r2")):
        judge.score(question, answer, {"reference": reference}, settings(service))
    assert len(service.requests) == 5


def test_what_did_not_succeed_is_not_kept_and_a_damaged_file_is_replaced(
    service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    replies: list[Reply] = [(400, {}, {}), graded("Grade: 5"), graded("Grade: 6"), graded("Grade: 7")]
    service.reply = lambda number, body: replies[number]
    own, row = settings(service, judge_cache=str(tmp_path / "own")), {"reference": "r"}
    with pytest.raises(UserError):
        judge.score("q", "a", row, own)
    assert judge.score("q", "a", row, own) == 0.5
    (file,) = (path for path in (tmp_path / "own").rglob("*") if path.is_file())
    file.write_text('{"reply": "Gra')
    forget(monkeypatch)
    assert judge.score("q", "a", row, own) == 0.6
    file.chmod(0o666)  # anybody could have written it
    forget(monkeypatch)
    assert judge.score("q", "a", row, own) == 0.7


def test_a_folder_that_cannot_be_written_is_said_once_and_costs_nothing(
    service: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    own = settings(service, judge_cache=str(tmp_path / "file" / "inside"))
    assert judge.score("q", "a", {"reference": "r"}, own) == judge.score("q", "b", {"reference": "r"}, own) == 1.0
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "are not kept on disk" in caplog.text


def test_without_a_cache_nothing_is_written(service: Service, tmp_path: Path) -> None:
    judge.score("q", "a", {"reference": "r"}, settings(service, judge_cache=None))
    assert not (tmp_path / "cache").exists()


# Faults that the service tests do not have


def test_a_date_in_retry_after_is_waited_for(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(_service, "_wait", waits.append)
    later = email.utils.formatdate(time.time() + 20, usegmt=True)
    replies: list[Reply] = [(429, {"Retry-After": later}, {}), (503, {"Retry-After": "soon"}, {}), graded("Grade: 10")]
    service.reply = lambda number, body: replies[number]
    assert judge.score("q", "a", {"reference": "r"}, settings(service)) == 1.0
    assert 15 < waits[0] <= 20 and waits[1] == 2.0


def test_neither_files_nor_messages_have_the_key(
    service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    service.reply = lambda number, body: graded(f"{KEY} Grade: 5") if number == 0 else (500, {}, {"error": f"{KEY} is tired"})
    judge.score("q", "a", {"reference": "r"}, settings(service))
    with pytest.raises(UserError, match=r"\[hidden\] is tired"):
        judge.score("q", "b", {"reference": "r"}, settings(service, judge_retries=0))
    files = [path.read_text() for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert "[hidden] Grade: 5" in files[0] and not any(KEY in text for text in files) and KEY not in caplog.text


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nowhere.yaml", "nowhere.yaml cannot be read: No such file"),
        ([], r"found \[\]"),
        (5, "found 5"),
        ([{"name": "a"}], "in place of a criterion"),
        ([{"name": "a", "text": "b", "wieght": 2}], "in place of a criterion"),
        ([{"name": "a", "text": "b", "weight": -2}], "the weight of 'a' is -2"),
        ([{"name": "a", "text": "b", "weight": 0}], "all weights are 0"),
        ([{"name": "a", "text": "b"}] * 2, "two criteria have the same name"),
    ],
)
def test_a_wrong_rubric_is_an_error_before_anything_is_asked(given: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        judge.Settings("http://h/v1", "m", judge_rubric=given).check()
    assert caught.value.where == "judge_rubric"


def test_a_prompt_of_ones_own_and_a_rubric_belong_together(tmp_path: Path) -> None:
    (tmp_path / "with.txt").write_text("{answer} {rubric}")
    (tmp_path / "without.txt").write_text("{answer}")
    judge.Settings("http://h/v1", "m", judge_rubric="r", judge_prompt=str(tmp_path / "with.txt")).check()
    with pytest.raises(UserError, match=r"shows a rubric\n  fix: set reward.judge_rubric"):
        judge.Settings("http://h/v1", "m", judge_prompt=str(tmp_path / "with.txt")).check()
    with pytest.raises(UserError, match=r"has no \{rubric\}"):
        judge.Settings("http://h/v1", "m", judge_rubric="r", judge_prompt=str(tmp_path / "without.txt")).check()


def test_the_last_object_is_found_between_braces_that_are_none() -> None:
    assert last_object('{a} {"b": {"c": 1}} } {"d": 2} {') == {"d": 2}
    assert last_object("[1] {oops") is None and read_rubric(None) is None
