r"""Equality of mathematical answers: `\frac{1}{2}`, `0.5` and `1/2` are the same (pip install "verl[math]").

The answer is in the last `\boxed{…}`, after the last `####`, or after the last "the answer is". Answers that differ as text are compared by
math-verify and SymPy in a separate process, because an expression such as `9^{9^{9^9}}` could take unbounded time and memory. An expression
that exceeds the limits is not equal to anything.
"""

import atexit
import contextlib
import importlib.util
import json
import re
import signal
import subprocess
import sys
import threading
from functools import lru_cache
from typing import Any, Literal

from verl.errors import UserError

ExtractionMethod = Literal["strict", "flexible"]

SECONDS = 5  # for one comparison
MEMORY_BYTES = 4 * 2**30  # address space of the comparing process, including SymPy
LONGEST_ANSWER = 1000  # characters; longer answers are compared only as text

BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\s*(?:(?P<box>\{)|(?P<short>[^\s{}\\]))|\\.|[{}]", re.DOTALL)
MARKED = re.compile(r"(?<!#)####[ \t]*(?P<answer>[^\n]+)")
STATED = re.compile(r"\banswer\s+is:?\s*(?P<answer>[^\n]+)", re.IGNORECASE)
FORMULA = re.compile(
    r"\$\$(?P<display>[^$]+)\$\$|\$(?P<inline>[^$]+)\$|\\\((?P<round>(?:(?!\\\().)+?)\\\)|\\\[(?P<square>(?:(?!\\\[).)+?)\\\]", re.DOTALL
)
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?")
DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
# LaTeX that changes only the appearance of an answer.
SPELLINGS = (
    (r"\dfrac", r"\frac"),
    (r"\tfrac", r"\frac"),
    (r"\left", ""),
    (r"\right", ""),
    (r"\!", ""),
    (r"\,", ""),
    (r"\ ", ""),
    (r"\$", ""),
)


def score(prompt: str, response: str, row: dict[str, Any]) -> float:
    """Return 1.0 if the response's marked answer equals the reference's, else 0.0.

    Args:
        prompt: the question, as text.
        response: the model's answer, as text, without its stop token.
        row: the data row; its `reference` is a worked solution with a marked answer, or the answer alone.
    Raises:
        UserError: math-verify is not installed.
    """
    return float(exact_match(response, row["reference"]))


def exact_match(response: str, reference: str, method: ExtractionMethod = "strict") -> bool:
    """Return whether the response's answer equals the reference's.

    Args:
        method: how the response is read, see `extract_answer`.
    Raises:
        UserError: math-verify is not installed.
    """
    check_installed()
    answer, expected = extract_answer(response, method), reference_answer(reference)
    if answer is None or expected is None:
        return False
    return _plain(answer) == _plain(expected) or (max(len(answer), len(expected)) <= LONGEST_ANSWER and _judge.equal(expected, answer))


def reference_answer(reference: str) -> str | None:
    """Return the marked answer of a reference; without one, the whole text if it is one line, else its last answer."""
    line = reference.strip()
    return extract_answer(line, "strict") or (extract_answer(line, "flexible") if "\n" in line else _undelimited(line) or None)


def extract_answer(text: str, method: ExtractionMethod = "strict") -> str | None:
    r"""Return the answer of a text as it is written, or None.

    Args:
        method: "strict" takes the last `\boxed{…}`, else the text after the last `####`, else the text after the last "answer is";
            "flexible" then tries the last formula between dollar signs or `\( \)`, and the last number.
    Raises:
        ValueError: no such method.
    """
    if method not in ("strict", "flexible"):
        raise ValueError(f"no method {method!r}: strict or flexible")
    answer = _last_boxed(text) or _last(MARKED, text) or _sentence(_last(STATED, text))
    if answer is None and method == "flexible":
        answer = _last(FORMULA, text) or _last(NUMBER, text)
    return _undelimited(answer) or None if answer else None


def _last_boxed(text: str) -> str | None:
    """Return the content of the last closed box, the innermost if nested. One pass, so that repeated braces take linear time."""
    begin, end = 0, None  # span of the content found so far
    opened = list[int | None]()  # start of the content of each open brace if it belongs to a box, else None
    for match in BOX_OR_BRACE.finditer(text):
        if match["short"]:
            begin, end = match.span("short")
        elif match[0] == "{" or match["box"]:
            opened.append(match.end() if match["box"] else None)
        elif match[0] == "}" and opened and (start := opened.pop()) is not None and (end is None or begin < start):
            begin, end = start, match.start()
    return None if end is None else text[begin:end]


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    match = None
    for match in pattern.finditer(text):  # noqa: B007
        pass
    return next((group for group in match.groups() if group), match[0]) if match else None


def _sentence(rest: str | None) -> str | None:
    """Return the text up to the end of its first sentence: `12.5` for `12.5. I hope it is correct.`"""
    return re.split(r"\.(?=\s|$)", rest)[0] if rest else None


def _undelimited(text: str) -> str:
    """Remove the delimiters of a formula and a full stop at the end."""
    text = text.strip().rstrip(".").strip()
    for begin, end in DELIMITERS:
        if text.startswith(begin) and text.endswith(end) and len(text) > len(begin) + len(end):
            return text[len(begin) : -len(end)].strip()
    return text


def _plain(answer: str) -> str:
    for spelling, usual in SPELLINGS:
        answer = answer.replace(spelling, usual)
    answer = re.sub(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}", r"\1", answer)
    answer = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", answer) if re.fullmatch(r"-?[\d,.]+", answer.strip()) else answer
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", answer.strip()).rstrip(".")  # `1 1/2` is not `11/2`


@lru_cache(maxsize=1)
def check_installed() -> None:
    """Raises UserError: math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("math-verify is not installed", where="reward math", fix='pip install "verl[math]"')


class _Judge:
    """The comparing process. It exits if a comparison takes too long, and is started again for the next one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._one_at_a_time = threading.Lock()

    def equal(self, expected: str, answer: str) -> bool:
        """Return whether two answers are equal. Raises UserError: the process cannot be started."""
        with self._one_at_a_time:
            if self._process is None or self._process.poll() is not None:
                self._process = self._started()
            reply = self._ask(self._process, json.dumps([expected, answer]))
            if reply is None:
                self._end(self._process)
            return reply == "true"

    def _started(self) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", __name__]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)  # noqa: S603
        if self._ask(process, json.dumps(["1", "1"])) != "true":
            self._end(process)
            fix = f"run `{' '.join(command)}` to see why; it needs math-verify and its dependencies"
            raise UserError("the process that compares answers does not start", where="reward math", fix=fix)
        atexit.register(self._end, process)
        return process

    @staticmethod
    def _ask(process: "subprocess.Popen[str]", question: str) -> str | None:
        """Return the reply of the process; None if it has ended."""
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(question + "\n")
            process.stdin.flush()
            return process.stdout.readline().rstrip("\n") or None
        except BrokenPipeError:
            return None

    @staticmethod
    def _end(process: "subprocess.Popen[str]") -> None:
        with contextlib.suppress(BrokenPipeError), process:  # closes its pipes and waits for it
            pass


_judge = _Judge()


def _answer_questions() -> None:
    """Run the comparing process: for each input line with two answers, print `true` or `false`, until the input ends."""
    import logging

    from math_verify import parse, verify

    logging.disable()
    _limit_memory()
    # Parsed as a formula, because the answer has already been extracted from the text.
    read: Any = lru_cache(maxsize=256)(lambda answer: parse(f"${answer}$", parsing_timeout=None))
    for line in sys.stdin:
        expected, answer = json.loads(line)
        signal.alarm(SECONDS)  # SIGALRM ends the process, even inside one long multiplication
        try:
            equal = bool(verify(read(expected), read(answer), timeout_seconds=None))
        except (MemoryError, RecursionError):
            equal = False
        signal.alarm(0)
        print("true" if equal else "false", flush=True)


def _limit_memory() -> None:
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux" and (most == resource.RLIM_INFINITY or most > MEMORY_BYTES):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, most))


if __name__ == "__main__":
    _answer_questions()
