"""The reward for equal mathematical answers."""

import importlib.util
import time

import pytest

from verl.errors import UserError
from verl.rewards import math as reward

needs_math_verify = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed")


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        (r"so it is \boxed{\frac{1}{2}}.", r"\frac{1}{2}", r"\frac{1}{2}"),
        (r"\boxed{1}, no, \boxed{2}", "2", "2"),
        (r"\boxed{3} and then \boxed{4", "3", "3"),
        (r"\fbox{\boxed{\{1, 2\}}}", r"\{1, 2\}", r"\{1, 2\}"),
        (r"\boxed 7", "7", "7"),
        ("first #### 4\nthen\n#### $1,000$", "1,000", "1,000"),
        ("The final answer is $12.5$. I hope it is correct.", "12.5", "12.5"),
        (r"we get $x = 3$, or \(x = 4\)", None, "x = 4"),
        ("there are 3 and 1,500.", None, "1,500"),
        ("none at all", None, None),
        (r"\boxed{}", None, None),
    ],
)
def test_the_answer_is_the_last_that_is_marked(text: str, strict: str | None, flexible: str | None) -> None:
    assert reward.extract_answer(text) == strict
    assert reward.extract_answer(text, "flexible") == flexible


@pytest.mark.parametrize(
    ("reference", "answer"),
    [(r"A long way.\nThus $\boxed{5}$.", "5"), (r"$\frac12$", r"\frac12"), ("x = 3", "x = 3"), ("First this.\nThen 7.", "7"), (" ", None)],
)
def test_a_reference_is_a_solution_or_the_answer_alone(reference: str, answer: str | None) -> None:
    assert reward.reference_answer(reference) == answer


@needs_math_verify
@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ("0.5", r"\frac{1}{2}", True),
        (r"\dfrac{1}{2}", r"\frac{1}{2}", True),
        (r"\sqrt{12}", r"2\sqrt{3}", True),
        ("(x+1)^2", "x^2+2x+1", True),
        (r"\{2,1\}", r"\{1,2\}", True),
        ("5", "x=5", True),
        (r"1{,}000", "1000", True),
        (r"18\text{ dollars}", r"\$18", True),
        (r"\text{Tuesday}", "Tuesday", True),
        ("[0,1)", "[0,1]", False),
        ("(2,1)", "(1,2)", False),
        ("1 1/2", "11/2", False),
        ("Monday", "Tuesday", False),
        ("0.333", r"\frac{1}{3}", False),
        (r"\frac{1}{", "1", False),
    ],
)
def test_answers_are_equal_in_value(answer: str, reference: str, equal: bool) -> None:
    assert reward.score("", rf"It is \boxed{{{answer}}}", {"reference": reference}) == equal


def test_braces_without_end_take_time_in_proportion_to_their_number() -> None:
    started = time.perf_counter()
    for text in (r"\boxed{" * 20_000, r"\boxed{" * 20_000 + "}" * 20_000, r"\(" * 20_000, r"\[" * 20_000):
        reward.extract_answer(text, "flexible")
    assert time.perf_counter() - started < 2


def test_without_math_verify_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    reward.check_installed.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "verl\[math\]"'):
        reward.score("", r"\boxed{1}", {"reference": "1"})
    reward.check_installed.cache_clear()
