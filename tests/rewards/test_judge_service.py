"""The judge: grades over HTTP. The service is a stand-in of an OpenAI-style one, a real HTTP server on this machine."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from judges import KEY, Reply, Service, forget, graded, served
from learned import ROWS, write_rows

from verl.config.commands import EvalConfig
from verl.config.load import load_config
from verl.errors import UserError
from verl.eval.sft_evaluator import evaluate
from verl.rewards import _service, judge
from verl.rewards._rubric import grade_of
from verl.rewards._scoring import Grader, Loaded
from verl.workers.calls import Failure


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Service]:
    with served(monkeypatch, tmp_path) as found:
        yield found


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited before a request was repeated."""
    found: list[float] = []
    monkeypatch.setattr(_service, "_wait", found.append)
    return found


def settings(service: Service, **keys: Any) -> judge.Settings:
    found = judge.Settings(**{"judge_url": service.url, "judge_model": "m", **keys})
    found.check()
    return found


def row(reference: str = "Paris") -> dict[str, Any]:
    return {"reference": reference}


def test_the_judge_sees_question_reference_and_answer_and_its_grade_becomes_a_score(service: Service) -> None:
    service.reply = lambda number, body: graded("Right, but the year is missing.\n**Grade: 7.5**")
    score = judge.score(
        "Capital of France? {answer}", "<think>Rome?</think>Paris, of course", row(), settings(service, judge_max_tokens=50)
    )
    assert score == 0.75
    [(path, headers, body)] = service.requests
    asked = body["messages"][0]["content"]
    assert path == "/v1/chat/completions" and body["model"] == "m" and body["temperature"] == 0.0 and body["max_tokens"] == 50
    assert (
        "Capital of France? {answer}" in asked
        and "Paris, of course" in asked
        and "Rome" not in asked
        and "to 10" in asked.replace("\n", " ")
    )
    assert "Authorization" not in headers


def test_a_prompt_and_a_scale_of_ones_own(service: Service, tmp_path: Path) -> None:
    service.reply = lambda number, body: graded(f"{body['messages'][0]['content']} 评分：1")
    file = tmp_path / "prompt.txt"
    file.write_text("{answer}/{reference}/{best}, JSON such as {x}", encoding="utf-8")
    own = settings(service, judge_prompt=str(file), judge_best=1, judge_temperature=None)
    assert judge.score("q", "a", row(), own) == 1.0
    assert service.requests[0][2] == {"model": "m", "messages": [{"role": "user", "content": "a/Paris/1, JSON such as {x}"}]}


def test_the_key_is_sent_and_never_shown(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", f"{KEY}\n")
    service.reply = lambda number, body: (401, {}, {"error": {"message": f"Incorrect API key provided: {KEY}."}})
    with pytest.raises(UserError) as caught:
        judge.score("q", "a", row(), settings(service, judge_key_variable="MY_KEY"))
    assert service.requests[0][1]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in str(caught.value) and "the judge answered 401: Incorrect API key provided: [hidden]." in str(caught.value)
    assert "MY_KEY; the one there is refused" in caught.value.fix and len(service.requests) == 1
    with pytest.raises(UserError, match="OPENAI_API_KEY, which is not set"):
        judge.score("q", "a", row(), settings(service))


def test_a_busy_service_is_asked_again_after_the_time_it_names(service: Service, waits: list[float]) -> None:
    busy: list[Reply] = [(429, {"Retry-After": "7"}, {}), (503, {}, "busy"), (500, {"Retry-After": "999999"}, {}), graded("Grade: 4")]
    service.reply = lambda number, body: busy[number]
    assert judge.score("q", "a", row(), settings(service)) == 0.4
    assert waits == [7.0, 2.0, _service.LONGEST_WAIT] and len(service.requests) == 4


def test_a_service_that_stays_busy_ends_the_command(service: Service, waits: list[float]) -> None:
    service.reply = lambda number, body: (429, {}, {"message": "slow down"})
    with pytest.raises(UserError, match=r"answered 429: slow down \(asked 3 times\)\n  fix: set reward.judge_requests lower"):
        judge.score("q", "a", row(), settings(service, judge_retries=2))
    assert waits == [1.0, 2.0]


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (
            (400, {}, {"error": {"message": "'temperature' does not support 0"}}),
            "answered 400: 'temperature' does not support 0\n  fix: correct",
        ),
        ((404, {}, {"detail": "Not Found"}), "answered 404: Not Found\n  fix: correct reward.judge_url"),
        ((302, {"Location": "http://elsewhere.example/"}, ""), "answered 302.*\n  fix: give the address of the service itself"),
        ((200, {}, "<html>"), "did not answer as a chat completion does: '<html>'"),
        ((200, {}, {"choices": []}), "did not answer as a chat completion does"),
        ((200, {}, [1]), "did not answer as a chat completion does"),
    ],
)
def test_what_asking_again_does_not_mend_is_said_at_once(service: Service, waits: list[float], reply: Reply, said: str) -> None:
    service.reply = lambda number, body: reply
    with pytest.raises(UserError, match=said) as caught:
        judge.score("q", "a", row(), settings(service))
    assert caught.value.where == f"{service.url}/chat/completions" and len(service.requests) == 1 and waits == []


def test_a_service_that_hangs_or_drips_is_left_in_time(service: Service, waits: list[float]) -> None:
    service.reply = lambda number, body: (time.sleep(1.0), graded("Grade: 10"))[1]
    since = time.perf_counter()
    with pytest.raises(UserError, match=r"did not answer within 0.2 s \(asked 2 times\)"):
        judge.score("q", "a", row(), settings(service, judge_timeout=0.2, judge_retries=1))
    assert time.perf_counter() - since < 10 and len(service.requests) == 2


def test_after_one_refusal_no_other_request_is_repeated(service: Service) -> None:
    """Those that wait to be repeated would hold up the end of the command for a minute."""

    def reply(number: int, body: dict[str, Any]) -> Reply:
        is_first = "answer 0" in body["messages"][0]["content"]
        time.sleep(0.3 if is_first else 0.0)
        return (401, {}, {}) if is_first else (429, {"Retry-After": "60"}, {})

    service.reply = reply
    since = time.perf_counter()
    with pytest.raises(UserError, match="answered 401"):
        judge.score_batch(["q"] * 4, [f"answer {number}" for number in range(4)], [row()] * 4, settings(service))
    assert time.perf_counter() - since < 30 and len(service.requests) <= 7


def test_a_service_that_is_not_there_is_named(service: Service, waits: list[float]) -> None:
    service.close()
    with pytest.raises(UserError, match=r"the judge cannot be reached: .*refused.* \(asked 2 times\)\n  fix: start the service"):
        judge.score("q", "a", row(), settings(service, judge_retries=1))


@pytest.mark.parametrize(
    ("text", "said"),
    [("I cannot say.", "wrote no line `Grade: N`: 'I cannot say.'"), ("Grade: 11", "grade 11 is above 10"), (None, "wrote no")],
)
def test_an_answer_without_a_grade_is_a_failure_of_this_answer(service: Service, text: str, said: str) -> None:
    service.reply = lambda number, body: graded(text)
    with pytest.raises(_service.NoGradeError, match=said):
        judge.score("q", "a", row(), settings(service))


def test_answers_are_graded_several_at_a_time_and_each_is_asked_for_once(service: Service) -> None:
    """Also if one fails: what the others got is kept."""

    def reply(number: int, body: dict[str, Any]) -> Reply:
        time.sleep(0.05)
        return graded("none" if "wrong one" in body["messages"][0]["content"] else "Grade: 5")

    service.reply = reply
    keys: Any = EvalConfig().reward
    grader = Grader(Loaded(judge, settings(service, judge_requests=4)), "metric judge", keys)
    answers = [*(f"answer {number}" for number in range(10)), "wrong one", "answer 3"]
    found = grader.scores(["q"] * 12, answers, [row()] * 12, range(12))
    assert [score for score in found if not isinstance(score, Failure)] == [0.5] * 11
    assert isinstance(found[10], Failure) and "no line `Grade: N`" in str(found[10])
    assert 2 <= service.most_at_a_time <= 4
    contents = [body["messages"][0]["content"] for _, _, body in service.requests]
    assert sum("wrong one" not in content for content in contents) <= 11 and len(set(contents)) == 11


def test_the_last_grade_of_a_reply_counts() -> None:
    for text, grade in (
        ("Grade: 3", 3),
        ("A grade of 9? No.\nGrade: 4", 4),
        ("**Rating:** 8/10", 8),
        ("得分：6.5", 6.5),
        ("Grade: **[[2]]**", 2),
    ):
        assert grade_of(text, 10) == grade


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "reward.judge_url: metric judge needs a service and a model\n  fix: set reward.judge_url, such as http"),
        (["reward.judge_url=http://h/v1"], "reward.judge_model: metric judge needs"),
        (["reward.judge_url=localhost:8000", "reward.judge_model=m"], "'localhost:8000' is not an address"),
        (["reward.judge_url=http://me:secret@h/v1", "reward.judge_model=m"], "has a user or a password in the address"),
        (["reward.judge_url=http://h/v1", "reward.judge_model=m", "reward.judge_prompt=nothing.txt"], "nothing.txt cannot be read"),
        (["reward.judge_url=http://h/v1", "reward.judge_model=m", "reward.judge_best=0"], "reward.judge_best: found 0"),
        (["reward.judge_url=http://h/v1", "reward.judge_model=m", "reward.judge_retries=-1"], "reward.judge_retries"),
    ],
)
def test_wrong_settings_are_found_before_a_model_is_loaded(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        load_config(EvalConfig, ["model_path=m", "test_file=t.jsonl", "output_dir=o", "metric=judge", *words])
    assert "secret" not in str(caught.value)


def test_a_prompt_that_does_not_show_the_answer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("{question}")
    with pytest.raises(UserError, match=r"has no \{answer\}"):
        judge.Settings("http://h/v1", "m", judge_prompt=str(tmp_path / "p.txt")).check()


def test_an_evaluation_by_a_judge_keeps_the_key_out_of_all_files(
    service: Service, tmp_path: Path, learned_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    service.reply = lambda number, body: graded(f"Grade: {number + 1}")
    words = [
        f"model_path={learned_checkpoint}",
        f"test_file={write_rows(tmp_path / 'test.jsonl', ROWS)}",
        "max_new_tokens=40",
        "batch_size=1",
    ]
    words += ["metric=judge", f"reward.judge_url={service.url}", "reward.judge_model=m"]
    results = evaluate(load_config(EvalConfig, [*words, f"output_dir={tmp_path / 'out'}"]))
    assert results["exact_match"] == pytest.approx(0.25) and results["confidence_interval_method"] == "bootstrap"
    assert "mean grade of the judge" in capsys.readouterr().out
    assert {headers["Authorization"] for _, headers, _ in service.requests} == {f"Bearer {KEY}"}
    assert not any(KEY in file.read_text(encoding="utf-8") for file in (tmp_path / "out").iterdir())

    forget(monkeypatch)
    words.append("reward.judge_cache=null")
    service.reply = lambda number, body: graded("Grade: 3") if number < 6 else (403, {}, {"error": "no more credit"})
    with pytest.raises(UserError, match="answered 403: no more credit\n  fix: check what the key in OPENAI_API_KEY may use"):
        evaluate(load_config(EvalConfig, [*words, f"output_dir={tmp_path / 'stopped'}"]))
    assert len((tmp_path / "stopped" / "predictions.jsonl").read_text().splitlines()) == 2
    assert "stopped: 2 of 4 answers are in" in capsys.readouterr().out
