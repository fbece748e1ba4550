"""Exact match of the final number, as GSM8K writes it: a worked answer that ends in `#### 1,000`.

Numbers are compared as text in a canonical form: nothing is rounded or evaluated, and the time is linear in the length of the response.
"""

import re
from collections import deque
from typing import Any, Literal

ExtractionMethod = Literal["strict", "flexible"]

MINUS = "-\N{MINUS SIGN}"
# Digits with or without commas between thousands; `1,0000` is not read as 10000.
INTEGER = r"[0-9]+(?:,[0-9]{3})*(?![0-9])"
# `12`, `1,234.50`, `12.`, `.5`; the dot in `...5` is not a decimal point.
DECIMAL = rf"{INTEGER}(?:\.[0-9]*)?|(?<![.0-9])\.[0-9]+"
# A fraction or mixed number (`1 1/2`) is tried before a decimal, so that the longest reading wins.
NUMBER = rf"(?:[0-9]+ )?[0-9]+/[0-9]+|{DECIMAL}"
# The sign of `-5`, `-$5` and `$-5`, but not the operator or hyphen of `8-5` and `mid-5`.
SIGNED = rf"(?:(?<![\w.)%])(?P<sign>[{MINUS}+]))?\$?(?P<sign_after>(?<=\$)[{MINUS}+])?(?P<number>{NUMBER})"

ANY_NUMBER = re.compile(SIGNED)
# Four hashes and a whole number: a part of `#### 1.000,50` or `#### 3/4/2024` does not match.
MARKED_NUMBER = re.compile(rf"(?<!\#)\#{{4}}[ \t]*{SIGNED}(?![0-9]|[.,/][0-9])")


def score(prompt: str, response: str, row: dict[str, Any]) -> float:
    """Return 1.0 if the response's `#### number` equals the reference's, else 0.0. All graders in this folder have this signature.

    Args:
        prompt: the question, as text.
        response: the model's answer, as text, without its stop token.
        row: the data row; its `reference` is the right answer, as text.
    """
    return float(exact_match(response, row["reference"]))


def exact_match(response: str, reference: str, method: ExtractionMethod = "strict") -> bool:
    """Return whether the response ends in the same number as the reference: `1,000`, `1000`, `$1000.00` and `1000.` are equal.

    Args:
        method: how the response is read, see `extract_answer`.
        reference: a worked answer that ends in `#### number`, or the number alone.
    """
    answer = extract_answer(response, method)
    return answer is not None and answer == reference_answer(reference)


def reference_answer(reference: str) -> str | None:
    """Return the right number: the last `#### number`, or the last number of a reference without one."""
    return extract_answer(reference, "strict") or extract_answer(reference, "flexible")


def extract_answer(text: str, method: ExtractionMethod = "strict") -> str | None:
    """Return the final number of a text in canonical form, or None.

    Args:
        method: "strict" takes the last `#### number`, "flexible" the last number of any kind.
    Returns:
        digits without commas, currency or percent sign or redundant zeros, with `-` if negative: `-1234.5`. Fractions are not
        reduced: `3/4`, `1 1/2`.
    Raises:
        ValueError: no such method.
    """
    if method not in ("strict", "flexible"):
        raise ValueError(f"no method {method!r}: strict or flexible")
    last = deque((MARKED_NUMBER if method == "strict" else ANY_NUMBER).finditer(text), maxlen=1)
    return _canonical(last[0]) if last else None


def _canonical(match: re.Match[str]) -> str:
    number = match["number"].replace(",", "")
    if "/" not in number:
        whole, _, decimals = number.partition(".")
        number = ".".join(part for part in (whole.lstrip("0") or "0", decimals.rstrip("0")) if part)
    negative = (match["sign"] or match["sign_after"] or "+") in MINUS
    return f"-{number}" if negative and number != "0" else number
