"""Exact match of the final number, as GSM8K writes it: a worked answer that ends in `#### 1,000`.

What stands behind the mark is read as a whole (verl.rewards._reading) and numbers are compared exactly: nothing is rounded, and no formula
is evaluated. The time is linear in the length of the response.
"""

import re
from collections import deque
from typing import Any, Literal

from verl.rewards import _statement
from verl.rewards._decoration import LONGEST
from verl.rewards._equality import equal
from verl.rewards._reading import read
from verl.rewards._spelling import plain
from verl.rewards._value import Choice, Named, Quantity, Several, Value, Words

ExtractionMethod = Literal["strict", "flexible"]

MINUS = "-\N{MINUS SIGN}"
# Digits with or without commas between thousands; `1,0000` is not read as 10000.
INTEGER = r"[0-9]+(?:,[0-9]{3})*(?![0-9])"
# `12`, `1,234.50`, `12.`, `.5`; the dot in `...5` is not a decimal point.
DECIMAL = rf"{INTEGER}(?:\.[0-9]*)?|(?<![.0-9])\.[0-9]+"
# A fraction or mixed number (`1 1/2`) is tried before a decimal, so that the longest reading wins.
NUMBER = rf"(?:[0-9]+ )?[0-9]+/[0-9]+|{DECIMAL}"
# The sign of `-5`, `-$5` and `$-5`, but not the operator or hyphen of `8-5` and `mid-5`.
ANY_NUMBER = re.compile(rf"(?:(?<![\w.)%])(?P<sign>[{MINUS}+]))?\$?(?P<sign_after>(?<=\$)[{MINUS}+])?(?P<number>{NUMBER})")
# A heading of the fourth level: `#### Step 2: Total`, `#### Part (b)`, `#### Calculation:`.
HEADING = re.compile(
    r"(?:step|part|case|stage|phase) ?\(?\w{1,4}\)?(?:[:.)]? ?[-–—]?(?=\s|$)[^\d\n]*)?|"
    r"(?:total|calculation|calculations|verification|conclusion|summary|result|solution|check)|[a-z][a-z ]{0,60}:",
    re.IGNORECASE,
)


def score(prompt: str, response: str, row: dict[str, Any]) -> float:
    """Return 1.0 if the response's `#### number` equals the reference's, else 0.0. All graders in this folder have this signature.

    Args:
        prompt: the question, as text.
        response: the model's answer, as text, without its stop token.
        row: the data row; its `reference` is the right answer, as text.
    """
    return float(exact_match(response, row["reference"]))


def exact_match(response: str, reference: str, method: ExtractionMethod = "strict") -> bool:
    """Return whether the response ends in the same number as the reference: `1,000`, `1000`, `$1000.00` and `**1000**` are equal.

    Args:
        method: how the response is read, see `extract_answer`.
        reference: a worked answer that ends in `#### number`, or the number alone.
    """
    answer, expected = _stated(response, method), _expected(reference)
    return answer is not None and expected is not None and equal(expected, answer, _equal_as_written)


def reference_answer(reference: str) -> str | None:
    """Return the right number of a reference; None if it cannot be read, because no response could then be right.

    It is what stands behind the last `####`: wholly a number with its unit, or a letter or word (`#### A`). Without a mark, the last line
    has to be a number, or a sentence with one number: `The total is 12 dollars.`
    """
    expected = _expected(reference)
    return None if expected is None else _canonical(expected)


def extract_answer(text: str, method: ExtractionMethod = "strict") -> str | None:
    """Return the final number of a text in canonical form, or None.

    Args:
        method: "strict" takes what stands behind the last `####`, "flexible" the last number of any kind.
    Returns:
        digits without commas, currency or percent sign or redundant zeros, with `-` if negative: `-1234.5`. Fractions are not
        reduced: `3/4`, `1 1/2`. What is not a number is given as it is written.
    Raises:
        ValueError: no such method.
    """
    if method not in ("strict", "flexible"):
        raise ValueError(f"no method {method!r}: strict or flexible")
    answer = _stated(text, method)
    return None if answer is None else _canonical(answer)


def _stated(text: str, method: ExtractionMethod) -> str | None:
    """Return the answer of a text as it is written."""
    if method == "flexible":
        last = deque(ANY_NUMBER.finditer(text), maxlen=1)
        return _signed(last[0]) if last else None
    text = _statement.until_next_question(_statement.visible(text), _statement.HASHES)
    marked = _statement.hashed(text)
    return _below_heading(text, marked[-1]).strip().rstrip("!") if marked else None


def _below_heading(text: str, marked: _statement.Statement) -> str:
    """Return the number on the last line if `####` begins a Markdown heading, `#### Step 2: Total`; else what stands behind the mark."""
    lines = text[marked.end :].split("\n")[1:] if HEADING.fullmatch(marked.text.strip(" *_")) else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return last if 0 < len(last) <= LONGEST and isinstance(read(last), Quantity) else marked.text


def _signed(match: re.Match[str]) -> str:
    return ("-" if (match["sign"] or match["sign_after"] or "+") in MINUS else "") + match["number"]


def _expected(reference: str) -> str | None:
    """Return the right answer as it is written; None if it is not one number, letter or word."""
    marked = _statement.hashed(reference)
    if marked:
        text = marked[-1].text.strip()
        value = read(text)
        return text if _number_of(value) or isinstance(value, Choice) or _is_word(value) else None
    if _statement.HASHES.search(reference) or not reference.strip():
        return None
    line = reference.strip().splitlines()[-1]
    if _number_of(read(line)):
        return line
    numbers = list(ANY_NUMBER.finditer(line))
    return (
        numbers[0]["number"]
        if len(numbers) == 1 and _is_word(read(line[: numbers[0].start()])) and _ends(line[numbers[0].end() :])
        else None
    )


def _number_of(value: Value | None) -> Quantity | None:
    value = value.value if isinstance(value, Named) else value
    value = value.decimal if isinstance(value, Several) else value
    return value if isinstance(value, Quantity) else None


def _is_word(value: Value | None) -> bool:
    return isinstance(value, Words) and not any(character.isdigit() for character in value.text)


def _ends(rest: str) -> bool:
    return not rest.strip(" .!")


def _canonical(answer: str) -> str | None:
    """Return a number without decoration, and anything else as it is written."""
    quantity = _number_of(read(answer)) if len(answer) <= LONGEST else None
    if quantity is None:
        return answer.strip().rstrip(".") or None
    written = ANY_NUMBER.fullmatch(re.sub(r"[%*`]|\.$", "", plain(answer)).strip())
    if written and "/" in written["number"]:
        return _signed(written)
    return _decimal(quantity)


def _decimal(quantity: Quantity) -> str:
    """Return the digits of a number, or a fraction that has no end as `1/3`."""
    above, below = quantity.value.numerator, quantity.value.denominator
    places, rest = 0, below
    while rest % 10 == 0 or rest % 2 == 0 or rest % 5 == 0:
        rest = rest // 10 if rest % 10 == 0 else rest // 2 if rest % 2 == 0 else rest // 5
        places += 1
    if rest != 1:
        return f"{above}/{below}"
    digits = str(abs(above) * 10**places // below).rjust(places + 1, "0")
    shown = f"{digits[:-places]}.{digits[-places:]}".rstrip("0").rstrip(".") if places else digits
    return f"-{shown}" if above < 0 else shown


def _equal_as_written(expected: str, answer: str) -> bool:
    """Formulas are not evaluated: equal ones are equal as text, which has been compared before."""
    return False
