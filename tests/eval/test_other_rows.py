"""Evaluation beyond GSM8K: a metric by what the rows look like, several answers, examples before a question, and two models compared."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from forked import run_forked
from learned import ROWS, write_rows
from transformers import AutoTokenizer

from verl.config.commands import EvalConfig
from verl.config.load import load_config
from verl.data.render import Renderer
from verl.errors import UserError
from verl.eval import few_shot, sft_evaluator
from verl.eval.grader import Question
from verl.eval.intervals import wilson_interval
from verl.eval.sft_evaluator import evaluate
from verl.rewards._fitting import choose


@pytest.fixture
def checkpoint(learned_checkpoint: Path) -> Path:
    return learned_checkpoint


def config(tmp_path: Path, checkpoint: Path | str, rows: list[dict[str, Any]] | None = None, **options: Any) -> EvalConfig:
    test_file = write_rows(tmp_path / "test.jsonl", ROWS if rows is None else rows)
    settings = {"output_dir": str(tmp_path / "out"), "max_new_tokens": 40, **options}
    return EvalConfig(model_path=str(checkpoint), test_file=str(test_file), **settings)


def asked(*pairs: tuple[str, str]) -> list[Question]:
    return [
        Question(f"t.jsonl:{number}", question, reference, {}, [{"role": "user", "content": question}])
        for number, (question, reference) in enumerate(pairs, 1)
    ]


# The metric of the rows

OPTIONS = "Which is a city?\nA. Mars\nB. Paris\nC. Venus"
LONG = "You can reset the router by pressing the small button at its back for ten seconds.\nThen wait for the light."


@pytest.mark.parametrize(
    ("pairs", "name"),
    [
        ([("What is 1 + 2?", "1 + 2 = 3\n#### 3")] * 3, "gsm8k"),
        ([("What is 1 + 2?", "1 + 2 = 3\n#### 3")] * 3 + [("2 + 2?", "many")], "gsm8k"),  # which then names the row
        ([('What is 1 + 2? Give the answer after "####".', "3")] * 2, "gsm8k"),
        ([("Solve.", r"so $\boxed{\frac{1}{2}}$")] * 2, "math"),
        ([(r"Solve. Put the answer in \boxed{}.", r"\frac{1}{2}")] * 2, "math"),
        ([("Which?", "B"), ("Which?", "(A)"), ("Which?", "C.")], "choice"),
        ([(OPTIONS, "B. Paris"), (OPTIONS, "B) Paris")], "choice"),
        ([(OPTIONS, "Mars and Venus are planets.\nSo the answer is B.")] * 2, "choice"),
        ([("Sentiment?", "positive"), ("Sentiment?", "negative")], "exact"),
        ([("What is 1 + 2?", "3"), ("What is 1 + 3?", "4")], "exact"),
        ([("首都？", "北京"), ("首都？", "巴黎")], "exact"),
        ([("路由器坏了", "请按住电源键十秒钟，然后重新启动路由器。")] * 2, "f1"),
        ([("My router fails.", LONG)] * 2 + [("Hello", "Hi!")], "f1"),
        ([("Sentiment?", "positive")] * 5 + [("Why?", LONG)], "f1"),
        ([("Sentiment?", "positive")] * 9 + [("Why?", LONG)], "exact"),
    ],
)
def test_the_metric_fits_the_right_answers(pairs: list[tuple[str, str]], name: str) -> None:
    chosen = choose(asked(*pairs))
    assert chosen.name == name, chosen
    assert ("judge" in chosen.describe()) == (name == "f1")
    assert chosen.describe().startswith(f"metric: {name}, because ")


def test_a_system_prompt_may_ask_for_the_mark() -> None:
    question = Question("t:1", "1 + 2?", "3", {}, [{"role": "system", "content": "End in #### N."}, {"role": "user", "content": "1 + 2?"}])
    assert choose([question]).name == "gsm8k"


@pytest.mark.parametrize(
    ("answers", "name", "score"),
    [
        ([row["answer"] for row in ROWS], "gsm8k", 1.0),
        (["3", "45", "650", "7"], "exact", 0.75),
        ([row["answer"].partition("\n")[0] * 4 for row in ROWS], "f1", None),
    ],
)
def test_the_first_lines_say_which_metric_and_why(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], answers: list[str], name: str, score: float | None
) -> None:
    rows = [{"question": row["question"], "answer": answer} for row, answer in zip(ROWS, answers, strict=True)]
    results = evaluate(config(tmp_path, checkpoint, rows))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"metric: {name}, because ") for line in lines[:3])
    assert results["metric"] == name and results["metric_chosen_because"] in lines[0]
    assert results["config"]["metric"] is None
    if score is not None:
        assert results["exact_match"] == score and results["confidence_interval_method"] == "wilson"
    else:
        assert 0 < results["exact_match"] < 1 and results["confidence_interval_method"] == "bootstrap"
        assert any("metric=judge" in line for line in lines[:3]) and any(line.split()[:1] == ["word"] for line in lines)
    assert not any("answers, " in line and "%" in line for line in lines)  # no score before all answers are there


def test_a_metric_that_is_named_is_used(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"model_path={checkpoint}", f"test_file={write_rows(tmp_path / 'test.jsonl', ROWS)}", f"output_dir={tmp_path / 'out'}"]
    results = evaluate(load_config(EvalConfig, [*words, "metric=regex", r"reward.pattern== (\d+)", "max_new_tokens=40"]))
    assert results["exact_match"] == 1.0 and "metric: regex\n" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [line["extracted"] for line in lines] == ["3", "45", "650", "1207"]
    assert results["metric_chosen_because"] is None and results["flexible_measure"] == "the same without case"


# Several answers


def test_several_answers_have_pass_at_k_and_a_majority_vote(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = evaluate(config(tmp_path, checkpoint, n=4, temperature=1.5))
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    rights = [sum(line["correct"] for line in lines[start : start + 4]) for start in range(0, 16, 4)]
    assert 0 < sum(rights) < 16  # the temperature makes some of them wrong
    for k in (1, 2, 4):
        expected = sum(1 - math.comb(4 - right, k) / math.comb(4, k) for right in rights) / 4
        assert results["pass_at_k"][str(k)]["score"] == pytest.approx(expected)
        assert results["pass_at_k"][str(k)]["confidence_interval_95"] == list(wilson_interval(expected, 4))
    assert results["pass_at_k"]["1"]["score"] == pytest.approx(results["exact_match"])
    assert results["majority_vote"]["score"] <= results["pass_at_k"]["4"]["score"]
    out = capsys.readouterr().out
    assert "pass@4" in out and "majority vote of 4" in out


def test_that_there_is_no_majority_vote_is_said(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "never.py").write_text("def score(prompt, response, row):\n    return 0\n")
    results = evaluate(config(tmp_path, checkpoint, n=2, temperature=1.5, metric=str(tmp_path / "never.py")))
    assert results["pass_at_k"] is not None and results["majority_vote"] is None
    assert "majority vote of 2 none: no answer could be extracted" in " ".join(capsys.readouterr().out.split())


def test_a_score_that_is_neither_right_nor_wrong_has_no_pass_at_k(tmp_path: Path, checkpoint: Path) -> None:
    results = evaluate(config(tmp_path, checkpoint, n=2, temperature=1.5, metric="f1"))
    assert results["pass_at_k"] is None and results["majority_vote"] is None


# Examples before the question


def test_examples_are_earlier_turns_of_the_chat(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = write_rows(tmp_path / "train.jsonl", [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in (1, 1, 2, 3)])
    settings = config(tmp_path, checkpoint, few_shot=2, few_shot_file=str(examples), max_new_tokens=2, system_prompt="What is 7?")
    [question, *_] = few_shot.with_examples(sft_evaluator.read_questions(settings), few_shot.read_examples(settings), 2)[0]
    assert [(message["role"], message["content"]) for message in question.messages] == [
        ("system", "What is 7?"),
        ("user", "What is 1 + 1?"),
        ("assistant", "#### 2"),
        ("user", "What is 2 + 1?"),
        ("assistant", "#### 3"),
        ("user", ROWS[0]["question"]),
    ]
    text = AutoTokenizer.from_pretrained(checkpoint).decode(
        sft_evaluator.render(Renderer(AutoTokenizer.from_pretrained(checkpoint)), question)
    )
    assert str(text).index("#### 2") < str(text).index("#### 3") < str(text).index(ROWS[0]["question"])
    settings.system_prompt = None
    evaluate(settings)
    assert f"few_shot: the first 2 rows of {examples} before each question" in capsys.readouterr().out


def test_a_question_never_sees_its_own_answer(tmp_path: Path, checkpoint: Path) -> None:
    settings = config(tmp_path, checkpoint, few_shot=1, few_shot_file=str(tmp_path / "test.jsonl"))
    questions, replaced = few_shot.with_examples(sft_evaluator.read_questions(settings), few_shot.read_examples(settings), 1)
    assert replaced == 1
    assert [question.messages[0]["content"] for question in questions] == [ROWS[1]["question"], *[ROWS[0]["question"]] * 3]
    with pytest.raises(UserError, match=r"test.jsonl:1: the question is one of the examples"):
        few_shot.with_examples(sft_evaluator.read_questions(settings), few_shot.read_examples(settings)[:1], 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["few_shot=3"], "few_shot_file: few_shot=3 needs rows"),
        (["few_shot_file=train.jsonl"], "few_shot: few_shot_file is set, and few_shot=0"),
        (["few_shot=-1"], "few_shot: "),
    ],
)
def test_examples_that_cannot_be_shown_are_refused(words: list[str], said: str, tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(UserError, match=said):
        load_config(EvalConfig, ["model_path=m", "test_file=t.jsonl", "output_dir=o", *words])
    settings = config(tmp_path, checkpoint, few_shot=5, few_shot_file=str(tmp_path / "test.jsonl"))
    with pytest.raises(UserError, match="has 4 different rows, and few_shot=5 asks for 5"):
        few_shot.read_examples(settings)


# Two models


def fake(directory: Path, scores: list[float], n: int = 1, **settings: Any) -> str:
    """The files of an evaluation with these scores."""
    directory.mkdir()
    lines = [{"prompt": f"q{i // n}", "reference": "r", "score": score, "correct": score == 1} for i, score in enumerate(scores)]
    (directory / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    base = {"model_path": directory.name, "test_file": "t", "n": n, "metric": None, "max_new_tokens": 512}
    results = {"metric": "gsm8k", "exact_match": sum(scores) / len(scores), "answers": len(scores), "config": base | settings}
    (directory / "results.json").write_text(json.dumps(results))
    return str(directory)


def test_two_finished_evaluations_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table of Cavo et al. 2012 (59, 6, 16, 80), whose interval is published."""
    one = fake(tmp_path / "one", [1.0] * 65 + [0.0] * 96)
    two = fake(tmp_path / "two", [1.0] * 59 + [0.0] * 6 + [1.0] * 16 + [0.0] * 80, max_new_tokens=64)
    sft_evaluator.main([one, "--against", two])
    out = capsys.readouterr().out
    assert "one against two on 161 questions, metric gsm8k" in out
    assert "difference  -0.0621, 95% interval -0.1186 to -0.0046 (Newcombe 1998, method 10)" in out
    assert "6 better, 16 worse, 139 equal" in out and "p-value     0.05248 (exact McNemar test)" in out and "show no difference" in out
    assert "warning: other settings: max_new_tokens=512 (other: 64)" in out
    sft_evaluator.main([two, f"--against={one}"])
    assert "difference  +0.0621, 95% interval +0.0046 to +0.1186" in capsys.readouterr().out


def test_questions_are_paired_by_their_text_and_others_are_left_out_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = fake(tmp_path / "one", [1.0, 1.0, 0.0, 0.0, 1.0]), fake(tmp_path / "two", [0.5, 0.25, 0.5, 0.25], n=2)
    file = tmp_path / "two" / "predictions.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[2:], *lines[:2]]) + "\n")  # in another order
    sft_evaluator.main([one, "--against", two])
    out = capsys.readouterr().out
    assert "on 2 questions" in out and "warning: left out, because only one of them answered: 3 questions" in out
    assert "score       1.0000 against 0.3750" in out and "paired bootstrap" in out and "sign flips" in out


def test_an_evaluation_is_compared_with_an_earlier_one(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = evaluate(config(tmp_path, checkpoint, max_new_tokens=3))
    results = evaluate(config(tmp_path, checkpoint, output_dir=str(tmp_path / "after"), against=str(tmp_path / "out")))
    found = results["against"]
    assert (before["exact_match"], found["score"], found["other_score"], found["difference"]) == (0.0, 1.0, 0.0, 1.0)
    assert found["p_value"] == 0.125 and found["better"] == 4 and found["other_settings"] == ["max_new_tokens=40 (other: 3)"]
    assert json.loads((tmp_path / "after" / "results.json").read_text())["against"] == found
    assert "4 better, 0 worse" in capsys.readouterr().out


def test_a_checkpoint_is_evaluated_too(tmp_path: Path, checkpoint: Path) -> None:
    results = evaluate(config(tmp_path, checkpoint, against=str(checkpoint)))
    assert results["against"]["directory"] == str(tmp_path / "out" / "against") and results["against"]["difference"] == 0.0
    other = json.loads((tmp_path / "out" / "against" / "results.json").read_text())
    assert other["config"]["against"] is None and other["exact_match"] == 1.0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{one}", "--against"], "--against: names no other evaluation"),
        (["{one}", "--against", "{folder}/nothing"], "nothing: no such directory"),
        (["{one}"], "found '.*one' without a key"),
        (["{one}", "metric=f1", "--against", "{two}"], "found '.*one' without a key"),
        (["{one}", "--against", "{other}"], "was graded by metric f1, .*one by gsm8k"),
        (["{one}", "--against", "{broken}"], "broken: predictions.jsonl has 1 answers, and results.json speaks of 2"),
    ],
)
def test_what_cannot_be_compared_is_refused(words: list[str], said: str, tmp_path: Path) -> None:
    paths = {name: fake(tmp_path / name, [1.0, 0.0]) for name in ("one", "two", "other", "broken")}
    results = tmp_path / "other" / "results.json"
    results.write_text(results.read_text().replace('"gsm8k"', '"f1"'))
    (tmp_path / "broken" / "predictions.jsonl").write_text('{"prompt": "q0", "reference": "r", "score": 1}\n')
    with pytest.raises(UserError, match=said):
        sft_evaluator.main([word.format(folder=tmp_path, **paths) for word in words])


def test_an_evaluation_of_other_questions_is_refused_before_a_model_is_loaded(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sft_evaluator, "load_rollout", lambda *_, **__: pytest.fail("a model was loaded"))
    other = fake(tmp_path / "other", [1.0])
    with pytest.raises(UserError, match="answered none of these questions"):
        evaluate(config(tmp_path, checkpoint, against=other))
    with pytest.raises(UserError, match="was graded by metric gsm8k, this evaluation by exact"):
        evaluate(config(tmp_path, checkpoint, against=other, metric="exact"))


def test_the_command_compares(tmp_path: Path) -> None:
    one, two = fake(tmp_path / "one", [1.0, 0.0]), fake(tmp_path / "two", [0.0, 0.0])
    done = run_forked("-m", "verl", "eval", one, "--against", two, folder=tmp_path)
    assert done.returncode == 0 and "one against two on 2 questions" in done.stdout, done.stderr
