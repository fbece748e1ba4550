"""Forms of answers that people and models write, each with the grade that a careful person would give."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from verl.rewards import gsm8k, math

FORMS = [json.loads(line) for line in Path(__file__).with_name("forms.jsonl").read_text(encoding="utf-8").splitlines()]
needs_math_verify = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed")


def graded_otherwise(forms: list[dict[str, Any]], scores: list[float]) -> list[str]:
    return [
        f"{'too strict' if form['right'] else 'too lax'}: {form['response']!r} for {form['reference']!r}"
        for form, score in zip(forms, scores, strict=True)
        if (score == 1.0) != form["right"]
    ]


def test_gsm8k_grades_each_form_as_a_careful_person_would() -> None:
    forms = [form for form in FORMS if form["grader"] == "gsm8k"]
    assert len(forms) > 100
    assert graded_otherwise(forms, [gsm8k.score("", form["response"], form) for form in forms]) == []


@needs_math_verify
@pytest.mark.parametrize("grader", [gsm8k, math])
def test_what_is_attached_to_a_number_counts(grader: ModuleType) -> None:
    """A part of an expression is not taken for the whole."""
    attached = "1-x|5-x|5 - x|5 + x|5/x|5*x|5a|5x|5xy|5^x|5_x|5(x)|5.x|5,x|5:x|5<6|5+|5-|5*|5/|5?|5i|5k|>5|<5|5-6|5..6|5 or 6".split("|")
    assert [text for text in attached if grader.exact_match(f"#### {text}", "5") or grader.exact_match(f"#### {text}", "1")] == []


@needs_math_verify
def test_math_grades_each_form_as_a_careful_person_would() -> None:
    forms = [form for form in FORMS if form["grader"] == "math"]
    assert len(forms) > 200
    scores = math.score_batch([""] * len(forms), [form["response"] for form in forms], forms)
    assert graded_otherwise(forms, scores) == []
