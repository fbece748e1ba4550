"""The GSM8K grader: what counts as the same number, on written cases, on the real references, and on hostile text."""

import json
import re
import time

import pytest
from places import SHARED

from verl import plugin
from verl.rewards.gsm8k import exact_match, extract_answer, reference_answer, score

GSM8K = SHARED / "data" / "gsm8k"
LONG = 200_000


@pytest.mark.parametrize(
    "written", ["1,000", "1000", "$1000.00", "1000.", "$1,000", "1000.0", "+1000", "01000", "1000%", "1000 apples", "1000, I think"]
)
def test_one_number_written_in_many_ways_is_one_number(written: str) -> None:
    assert extract_answer(f"So it is\n#### {written}") == "1000"
    assert exact_match(f"#### {written}", "48 and more\n#### 1,000")
    assert exact_match(f"It is {written}", "#### 1000", method="flexible")


@pytest.mark.parametrize("written", ["-5", "\N{MINUS SIGN}5", "-$5", "$-5", "-5.00", "-5%"])
def test_negative_numbers(written: str) -> None:
    assert extract_answer(f"#### {written}") == "-5"
    assert extract_answer(f"so it is {written}.", "flexible") == "-5"
    assert not exact_match(f"#### {written}", "#### 5")


@pytest.mark.parametrize(
    ("written", "number"),
    [
        (".5", "0.5"),
        ("0.50", "0.5"),
        ("-0", "0"),
        ("0.0", "0"),
        ("007", "7"),
        ("1,234.50", "1234.5"),
        ("1.000,50", "1000.5"),
        ("1000,5", "1000.5"),
        ("twelve", "12"),
    ],
)
def test_canonical_form(written: str, number: str) -> None:
    assert extract_answer(f"#### {written}") == number


def test_nothing_is_rounded() -> None:
    """As binary floating-point numbers the two would be the same."""
    assert float("0.1") == float("0.10000000000000000001")
    assert not exact_match("#### 0.10000000000000000001", "#### 0.1")
    assert exact_match(f"#### 1{'0' * 400}", f"#### 1{'0' * 400}.0")


def test_fractions_are_shown_as_written_and_compared_in_value() -> None:
    assert extract_answer("#### 3/4") == "3/4" and extract_answer("#### 1 1/2") == "1 1/2"
    for equal in ("3/4", "6/8", "0.75", r"\frac{3}{4}"):
        assert exact_match(f"#### {equal}", "#### 3/4")
    assert not exact_match("#### 3/4", "#### 3") and not exact_match("#### 1 1/2", "#### 1") and not exact_match("#### 1/3", "#### 0.33")


def test_strict_takes_the_last_marked_answer() -> None:
    text = "#### 7\nno, wait: 9 - 1 = 8\n#### 8\nso 8 of 10"
    assert extract_answer(text) == "8"
    assert extract_answer(text, "flexible") == "10"
    assert extract_answer("#### 7\n#### none") == "none" and extract_answer("#### 7\n####") == "7"
    assert extract_answer("####8") == "8"


def test_a_question_that_the_model_asks_itself_is_not_read() -> None:
    assert extract_answer("Question: how many?\n#### 7\nQuestion: and then?\n#### 8") == "7"
    assert extract_answer("<think>\n#### 7\n</think>\n#### 8") == "8"


@pytest.mark.parametrize("written", ["**8**", "the answer is 8", "x = 8", "eight", "(8)", "\n8", r"\boxed{8}", "Answer: 8", "€8"])
def test_decoration_is_no_part_of_the_number(written: str) -> None:
    assert extract_answer(f"#### {written}") == "8"


@pytest.mark.parametrize("text", ["", "8", "The answer is 8", "### 8", "##### 8", "####", r"\boxed{8}"])
def test_strict_wants_the_mark_and_the_number_behind_it(text: str) -> None:
    assert extract_answer(text) is None
    assert not exact_match(text, "#### 8")


@pytest.mark.parametrize("written", ["3/4/2024", "1.2.3", "3:30", "5+3", "10^2", "12-13", "12 or 13", "12 x 2 = 24", "1 2"])
def test_a_part_of_what_stands_behind_the_mark_is_not_taken_for_the_whole(written: str) -> None:
    for number in re.findall("[0-9]+", written)[:2]:
        assert not exact_match(f"#### {written}", f"#### {number}")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("10-5", "5"),
        ("it is...5", "5"),
        ("it is 5...", "5"),
        ("3,4,5", "5"),
        ("$80,000 more", "80000"),
        ("mid-5", "5"),
        ("x=-3", "-3"),
        ("(-3)", "-3"),
        ("3 - 2", "2"),
        ("none", None),
    ],
)
def test_flexible_takes_the_last_number_of_any_kind(text: str, number: str | None) -> None:
    assert extract_answer(text, "flexible") == number


def test_a_reference_may_be_the_number_alone_or_a_sentence_with_one_number() -> None:
    assert (
        exact_match("#### 1,000", "1000") and exact_match("#### 5", "The answer is 5.") and exact_match("#### 5", "The total is 5 dollars")
    )
    assert exact_match("#### 5", "five") and not exact_match("none", "none")


@pytest.mark.parametrize(
    "reference",
    ["x^2+3", r"3\sqrt{7}", "[0, 5]", "March 15, 2024", "3:30", "5 or 6", "It takes 3 hours to paint 12 walls", "####", "", "none"],
)
def test_a_reference_that_is_no_number_is_not_read(reference: str) -> None:
    assert reference_answer(reference) is None
    for number in re.findall("[0-9]+", reference):
        assert not exact_match(f"#### {number}", reference)


def test_a_marked_letter_or_word_is_a_reference() -> None:
    assert reference_answer("#### A") == "A" and exact_match("#### (A)", "#### A") and not exact_match("#### B", "#### A")


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="strict or flexible"):
        extract_answer("#### 5", "lenient")  # type: ignore[arg-type]


def test_it_is_the_grader_that_the_config_names() -> None:
    grader = plugin.load("verl.rewards", "gsm8k", needs=("score",))
    assert grader is plugin.load("verl.rewards", "verl.rewards.gsm8k")
    assert score("How many?", "#### 5", {"reference": "#### 5"}) == 1.0
    assert score("How many?", "5", {"reference": "#### 5"}) == 0.0


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"no GSM8K in {GSM8K}")
@pytest.mark.parametrize("name", ["train.jsonl", "test.jsonl"])
def test_every_reference_of_gsm8k_is_read_as_its_own_rule_reads_it(name: str) -> None:
    """GSM8K's authors take what follows `#### ` without its commas."""
    answers = [json.loads(line)["answer"] for line in (GSM8K / name).read_text(encoding="utf-8").splitlines()]
    for answer in answers:
        assert extract_answer(answer) == answer.rpartition("#### ")[2].replace(",", "")
        assert exact_match(answer, answer)
    others = answers[1:] + answers[:1]
    assert sum(exact_match(answer, other) for answer, other in zip(answers, others, strict=True)) < 0.05 * len(answers)


HOSTILE = [
    "1",
    "#",
    "####",
    "#### ",
    "1,",
    ",111",
    "1 ",
    "1/",
    "-",
    "$",
    ".",
    "1.",
    "-$",
    "#### 1,111",
    "11111 ",
    "1 1/1/",
    "####\t",
    "\N{MINUS SIGN}1",
    "a",
]


@pytest.mark.parametrize("unit", HOSTILE)
def test_many_hostile_characters_take_little_time(unit: str) -> None:
    """A pattern that looks at the rest of the text again from each place would take minutes."""
    text = "#### -$1" + unit * (LONG // len(unit)) + "x"
    since = time.process_time()
    extract_answer(text, "strict")
    extract_answer(text, "flexible")
    assert time.process_time() - since < 2
