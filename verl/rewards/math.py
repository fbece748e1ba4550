r"""Equality of mathematical answers: `\frac{1}{2}`, `0.5` and `1/2` are the same (pip install "verl[math]").

The answer is the last statement of one, see verl.rewards._statement. What both answers say is read (verl.rewards._reading) and compared
(verl.rewards._equality); expressions are compared by SymPy and math-verify in processes of their own (verl.rewards._judge), because an
expression such as `9^{9^{9^9}}` could take unbounded time and memory. An expression that exceeds the limits is not equal to anything.
"""

import importlib.util
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, Literal

from verl.errors import UserError
from verl.rewards import _statement
from verl.rewards._decoration import LONGEST, compact
from verl.rewards._equality import equal
from verl.rewards._finality import is_final
from verl.rewards._judge import Judge
from verl.rewards._reading import read
from verl.rewards._statement import Statement
from verl.rewards._value import Named, Several, Value, Words

ExtractionMethod = Literal["strict", "flexible"]

ANSWERED = re.compile(r"\\(?:boxed|fbox)\b|(?<!#)####(?!#)|</answer>|\banswers? ?(?:is|:)", re.IGNORECASE)
NUMBER = re.compile(r"(?<![\w.])-?[$€£]?(?:\d[\d,]*(?: \d{3})*(?:\.\d+)?|\.\d+)(?:/\d+)?(?: ?%)?|-?\\frac\{\d{1,30}\}\{\d{1,30}\}")
NEGATED = re.compile(r"\bnot\s*\$?\s*\\f?(?:rame)?(?:boxed|box)\s*\{?$")  # `not \boxed{3}`
NEGATION = re.compile(r"\b(?:not|no|none|neither|nor|cannot|never|without|except)\b|n't\b", re.IGNORECASE)
NOT = re.compile(r"(?:(?:\w+ly )?not (?:equal to )?|不是|不为)(?=\S)", re.IGNORECASE)
WORD = re.compile(r"(?<![\\\w])[a-z]{2,}\b", re.IGNORECASE)
# What is said about an answer that stands elsewhere: `verified by substitution: 2(8)=16`.
CHECK = re.compile(
    r"(?:double-checked|cross-checked|checked|verified|confirmed|validated|justified|supported|consistent|correct|valid|reasonable|plausible|"
    r"tested|proven|proved)\b(?=.)",
    re.IGNORECASE,
)
DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"))
MOST_PHRASES = 200  # that are read, from the end
REMARKS = (
    "correct",
    "right",
    "wrong",
    "incorrect",
    "below",
    "above",
    "as follows",
    "clear",
    "obvious",
    "reasonable",
    "found",
    "unknown",
    "yours",
)


def score(prompt: str, response: str, row: dict[str, Any]) -> float:
    """Return 1.0 if the response's answer equals the reference's, else 0.0.

    Args:
        prompt: the question, as text.
        response: the model's answer, as text, without its stop token.
        row: the data row; its `reference` is a worked solution with a marked answer, or the answer alone.
    Raises:
        UserError: math-verify is not installed.
    """
    return score_batch([prompt], [response], [row])[0]


def score_batch(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
    """Return the score of each response, see `score`. Expressions are compared side by side."""
    return [float(right) for right in _all_match(responses, [row["reference"] for row in rows], "strict")]


def exact_match(response: str, reference: str, method: ExtractionMethod = "strict") -> bool:
    """Return whether the response's answer equals the reference's.

    Args:
        method: how the response is read, see `extract_answer`.
    Raises:
        UserError: math-verify is not installed.
    """
    return _all_match([response], [reference], method)[0]


def reference_answer(reference: str) -> str | None:
    """Return the answer of a reference; None if it cannot be read, because no response could then be right.

    Without a mark, it is the whole text if that is one line, else its last answer.
    """
    line = reference.strip()
    answer = _stated(line, is_reference=True) or (_last_of_all(line) if "\n" in line else _undelimited(line))
    return answer if answer and answer.count("{") == answer.count("}") and read(answer) is not None else None


def extract_answer(text: str, method: ExtractionMethod = "strict") -> str | None:
    r"""Return the answer of a text as it is written, or None.

    Args:
        method: "strict" takes the last statement of an answer; "flexible" then tries the last formula between dollar signs or `\( \)`, or
            the last number, whichever is later.
    Raises:
        ValueError: no such method.
    """
    if method not in ("strict", "flexible"):
        raise ValueError(f"no method {method!r}: strict or flexible")
    answer = _stated(text)
    return _last_of_all(_statement.visible(text)) if answer is None and method == "flexible" else answer


def _all_match(responses: Sequence[str], references: Sequence[str], method: ExtractionMethod) -> list[bool]:
    check_installed()
    pairs = [(reference_answer(reference), extract_answer(text, method)) for text, reference in zip(responses, references, strict=True)]
    decided = [_decided(expected, answer) for expected, answer in pairs]
    open_pairs = [(str(expected), str(answer)) for (expected, answer), right in zip(pairs, decided, strict=True) if right is None]
    judged = iter(_judge.equal(open_pairs) if open_pairs else [])
    return [next(judged) if right is None else right for right in decided]


class _UndecidedError(Exception):
    """An expression has to be evaluated."""


def _decided(expected: str | None, answer: str | None) -> bool | None:
    """Return whether two answers are equal, None if an expression has to be evaluated for that."""
    if expected is None or answer is None:
        return False
    if max(len(expected), len(answer)) > LONGEST:
        return compact(expected) == compact(answer)
    try:
        return equal(expected, answer, _left_open)
    except _UndecidedError:
        return None


def _left_open(expected: str, answer: str) -> bool:
    raise _UndecidedError


def _stated(text: str, is_reference: bool = False) -> str | None:
    """Return the last statement of an answer."""
    decorated = _statement.until_next_question(_statement.visible(text), ANSWERED)
    text = _statement.unemphasized(decorated)
    boxes = [box for box in _statement.boxed(text) if not NEGATED.search(text, max(box.start - 25, 0), box.start)]
    box = _statement.joined(boxes, text, adjacent=is_reference)
    marked = [one for one in (box, *_statement.hashed(text)[-1:], *_statement.tagged(text)[-1:]) if one and _undelimited(one.text)]
    last = _last_phrase(text, max(marked, key=lambda one: one.end, default=None))
    if last is None:
        last = next((one for one in reversed(_statement.bold(decorated)) if _states(one, only_values=True)), None)
    return _from_sentence(_undelimited(last.text)) if last else None


def _last_phrase(text: str, marked: Statement | None) -> Statement | None:
    """Return the last phrase behind a mark that states the final answer, else what is marked.

    Behind a mark, a phrase has to state a value: not "the answer is correct". One that speaks of another answer ("a common wrong answer is
    9") or says what the answer is not counts only if there is nothing else.
    """
    doubtful, denials = None, list[Statement]()
    chosen = marked
    for phrase in islice(reversed(_statement.phrased(text)), MOST_PHRASES):
        if marked is not None and phrase.start <= marked.end:
            break
        is_correction = phrase.mark == "correction"
        if not _states(phrase, only_values=marked is not None or is_correction or (doubtful is not None and _is_value(_read(doubtful)))):
            continue
        denied = _denied(phrase)
        if denied is None and is_final(text, phrase.mark_start, phrase.start):
            chosen = phrase
            break
        doubtful = doubtful or (None if is_correction else phrase)
        denials += [phrase] if denied else []
    withdrawn = next((one for one in denials if chosen and _denied(one) == _read(chosen)), None)
    return withdrawn or chosen or doubtful


def _read(statement: Statement) -> Value | None:
    return read(_undelimited(statement.text))


def _denied(statement: Statement) -> Value | None:
    """Return the value that a phrase excludes, `9` for `not 9`."""
    match = NOT.match(_undelimited(statement.text))
    value = read(_undelimited(match.string[match.end() :])) if match else None
    return value if _is_value(value) else None


def _from_sentence(answer: str) -> str:
    """Return the value that a sentence states, `x = 3` for `the value is $x = 3$ then`; any other answer as it is.

    A whole solution in one box states what it says last.
    """
    if len(answer) <= LONGEST and (NEGATION.search(answer) or _is_value(read(answer))):
        return answer
    inner = next((one for one in reversed(_statement.phrased(answer)) if _states(one, only_values=True)), None)
    if inner is None and re.search(r"[.!?]\s", answer):
        return _last_of_all(answer) or answer
    inner = inner or next((one for one in reversed(_statement.formulas(answer)) if one.text.strip()), None)
    return _undelimited(inner.text) if inner else answer


def _states(statement: Statement, only_values: bool) -> bool:
    answer = _undelimited(statement.text)
    if not answer or len(answer) > LONGEST or answer.casefold().strip(" .!") in REMARKS:
        return False
    if statement.mark == "correction" and len(WORD.findall(answer)) > 1:  # `it is 3 too many` is no answer
        return False
    return not only_values or (not CHECK.match(answer) and _is_value(read(answer)))


def _is_value(value: Value | None) -> bool:
    """Whether an answer is more than words."""
    value = value.value if isinstance(value, Named) else value
    return all(_is_value(item) for item in value.items) if isinstance(value, Several) else not isinstance(value, Words | None)


def _last_of_all(text: str) -> str | None:
    """Return the last formula or the last number behind it."""
    formula = next((one for one in reversed(_statement.formulas(text)) if one.text.strip()), None)
    number = None
    for number in NUMBER.finditer(text, formula.end + 1 if formula else 0):  # noqa: B007
        pass
    if number is not None:
        return _undelimited(number[0])
    return _undelimited(formula.text) or None if formula else None


def _undelimited(text: str) -> str:
    """Remove the delimiters of a formula, those of bold text, and a full stop at the end."""
    before = None
    while before != text:
        before, text = text, text.strip().rstrip(".").strip() if not text.strip().endswith("..") else text.strip()
        for begin, end in DELIMITERS:
            if (
                text.startswith(begin)
                and text.endswith(end)
                and len(text) > len(begin) + len(end)
                and begin not in text[len(begin) : -len(end)].replace(r"\$", "")
            ):
                text = text[len(begin) : -len(end)].strip()
    return text


@lru_cache(maxsize=1)
def check_installed() -> None:
    """Raises UserError: math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("math-verify is not installed", where="reward math", fix='pip install "verl[math]"')


_judge = Judge()
