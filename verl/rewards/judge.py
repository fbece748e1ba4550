"""Grades by a language model: each answer is shown to a judge behind an OpenAI-style HTTP interface (`POST URL/chat/completions`).

The judge writes a grade from 0 to `reward.judge_best`; the score is the grade divided by that. The key of the service comes from an
environment variable, and is neither printed nor written to a file. A service that cannot be used ends the command; an answer without a
grade is a failure of this answer (`reward.on_error`).
"""

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any
from urllib.parse import urlsplit

from verl.errors import UserError, at_least
from verl.one_answer import one_answer
from verl.redaction import redact_text
from verl.rewards import _statement

MEASURE = "mean grade of the judge, as a share of the best"  # name of the mean score
PROMPT = """\
You grade answers. Compare the answer below with the reference: is what it says right, complete, and an answer to the question? Other words
than the reference's are fine. Length and style do not matter.

<question>
{question}
</question>

<reference>
{reference}
</reference>

<answer>
{answer}
</answer>

Say in two sentences at most what is right and what is wrong. Then write one last line, "Grade: N", where N is a whole number from 0 (wrong
or no answer) to {best} (as good as the reference).
"""
FIELDS = re.compile(r"\{(question|reference|answer|best)\}")
GRADE = re.compile(r"(?:grade|rating|score|评分|分数|得分)\W{0,6}(\d+(?:\.\d+)?)", re.IGNORECASE)
LARGEST_ANSWER = 16 * 2**20  # bytes
LARGEST_MESSAGE = 2**16  # bytes of the message of an HTTP error
LONGEST_SHOWN = 200  # characters of an answer in an error
LONGEST_WAIT = 60.0  # seconds before a request is repeated
WORTH_REPEATING = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # HTTP status
REMEMBERED = 50_000  # replies


@dataclass
class Settings:
    # Address of the service, up to what stands before `/chat/completions`, such as http://localhost:8000/v1.
    judge_url: str | None = None
    # Name of the model, as the service knows it.
    judge_model: str | None = None
    # Path of a file with the prompt, in which {question}, {reference}, {answer} and {best} are replaced; null: a prompt that asks
    # for a grade of correctness.
    judge_prompt: str | None = None
    # The best grade; the lowest is 0.
    judge_best: float = 10.0
    # Sampling temperature; null: do not send one.
    judge_temperature: float | None = 0.0
    # Maximum tokens of a grade with its reasons; null: do not send one.
    judge_max_tokens: int | None = None
    # Time limit of one request, in seconds.
    judge_timeout: float = 120.0
    # How many times a request is repeated when the service is busy, fails or is not reached.
    judge_retries: int = 4
    # Number of requests at a time.
    judge_requests: int = 8
    # Environment variable that holds the key of the service.
    judge_key_variable: str = "OPENAI_API_KEY"

    def check(self) -> None:
        """Raises UserError: a key is missing or wrong."""
        for name, value, example in (
            ("judge_url", self.judge_url, "http://localhost:8000/v1"),
            ("judge_model", self.judge_model, "Qwen/Qwen2.5-7B-Instruct"),
        ):
            if value is None:
                raise UserError("metric judge needs a service and a model", where=name, fix=f"set reward.{name}, such as {example}")
        parts = urlsplit(self.judge_url or "")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{redact_text(self.judge_url or '')!r} is not an address", where="judge_url", fix="write http://HOST:PORT/v1")
        if "@" in parts.netloc:
            fix = f"put the key of the service into the environment variable {self.judge_key_variable}"
            raise UserError("has a user or a password in the address, which logs would show", where="judge_url", fix=fix)
        template_of(self)
        if not 0 < self.judge_best < float("inf"):
            raise UserError(f"found {self.judge_best}", where="judge_best", fix="give a number above 0, such as 10")
        at_least("judge_timeout", self.judge_timeout, 0.001)
        at_least("judge_retries", self.judge_retries, 0)
        at_least("judge_requests", self.judge_requests, 1)
        at_least("judge_max_tokens", self.judge_max_tokens, 1)
        at_least("judge_temperature", self.judge_temperature, 0.0)


class NoGradeError(ValueError):
    """The judge's reply has no grade."""


def score(prompt: str, response: str, row: dict[str, Any], settings: Settings) -> float:
    """Return the judge's grade of a response, from 0 to 1.

    Raises:
        NoGradeError: the judge's reply has no grade in the range.
        UserError: the service refuses, is not reached or does not answer, also after repeating the request.
    """
    values = {"question": prompt, "reference": row["reference"], "answer": _statement.visible(response), "best": f"{settings.judge_best:g}"}
    asked = FIELDS.sub(lambda field: values[field[1]], template_of(settings))
    return grade_of(_replies.get(asked, settings), settings.judge_best) / settings.judge_best


def score_batch(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]], settings: Settings) -> list[float]:
    """Return the grade of each response, see `score`. Several requests are sent at a time."""
    try:
        with ThreadPoolExecutor(settings.judge_requests) as pool:
            waiting = [pool.submit(score, *one, settings) for one in zip(prompts, responses, rows, strict=True)]
            try:
                return [one.result() for one in waiting]
            except (UserError, KeyboardInterrupt):  # the other requests would fail too, or are not wanted
                _given_up.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        _given_up.clear()


def grade_of(reply: str, best: float) -> float:
    """Return the last grade in a reply. Raises NoGradeError: there is none from 0 to `best`."""
    found = GRADE.findall(reply)
    shown = f"{reply.strip()[:LONGEST_SHOWN]!r}"
    if not found:
        raise NoGradeError(f"the judge wrote no line `Grade: N`: {shown}")
    if float(found[-1]) > best:
        raise NoGradeError(f"the judge's grade {found[-1]} is above {best:g} (reward.judge_best): {shown}")
    return float(found[-1])


def template_of(settings: Settings) -> str:
    """Return the prompt with its fields. Raises UserError: the file cannot be read, or does not show the answer."""
    if settings.judge_prompt is None:
        return PROMPT
    try:
        text = Path(settings.judge_prompt).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{settings.judge_prompt} cannot be read: {reason}", where="judge_prompt", fix="give the path of a text file"
        ) from error
    if "{answer}" not in text:
        fix = "write {answer} where the answer is to stand, and {question}, {reference} and {best} where you need them"
        raise UserError(f"{settings.judge_prompt} has no {{answer}}", where="judge_prompt", fix=fix)
    return text


class Replies:
    """Replies of judges, each asked for once: the same prompt gets the same reply. It may be used in several threads."""

    def __init__(self) -> None:
        self._known = OrderedDict[tuple[str, ...], str]()
        self._lock = Lock()

    def get(self, prompt: str, settings: Settings) -> str:
        """Return the judge's reply to a prompt. Raises UserError as `score`."""
        key = (str(settings.judge_url), str(settings.judge_model), str(settings.judge_temperature), str(settings.judge_max_tokens), prompt)
        with self._lock:
            if key in self._known:
                return self._known[key]
        reply = asked(prompt, settings)
        with self._lock:
            self._known[key] = reply
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return reply


_replies = Replies()
_given_up = Event()  # no request is repeated any more
_wait = _given_up.wait


def asked(prompt: str, settings: Settings) -> str:
    """Send a prompt to the service, again while that is worth it, and return the text of the reply. Raises UserError as `score`."""
    body = {
        "model": settings.judge_model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": settings.judge_temperature,
        "max_tokens": settings.judge_max_tokens,
    }
    url = f"{str(settings.judge_url).rstrip('/')}/chat/completions"
    data = json.dumps({key: value for key, value in body.items() if value is not None}).encode()
    attempt = 1
    while isinstance(found := _answered(url, data, settings), _FailedError):
        if not found.may_pass or attempt > settings.judge_retries or _given_up.is_set():
            raise UserError(f"{found}{f' (asked {attempt} times)' if attempt > 1 else ''}", where=url, fix=found.fix) from found
        _wait(min(LONGEST_WAIT, found.seconds if found.seconds is not None else 2.0 ** (attempt - 1)))
        attempt += 1
    return found


class _FailedError(Exception):
    """A request that failed.

    Attributes:
        fix: what the user can do.
        may_pass: whether the same request may succeed later.
        seconds: how long the service asks to wait; None: it does not say.
    """

    def __init__(self, what: str, fix: str, *, may_pass: bool, seconds: float | None = None):
        super().__init__(what)
        self.fix, self.may_pass, self.seconds = fix, may_pass, seconds


def _answered(url: str, data: bytes, settings: Settings) -> "str | _FailedError":
    """Send one request, and return the text of the reply, or why there is none."""
    try:
        return text_of(_sent(url, data, settings), url)
    except _FailedError as error:
        return error


def _sent(url: str, data: bytes, settings: Settings) -> bytes:
    """Send one request, and return what the service answers."""
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})  # noqa: S310 - http, see Settings.check
    key = os.environ.get(settings.judge_key_variable, "").strip()
    if key:
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    try:
        with one_answer(settings.judge_timeout) as opener, opener.open(request, timeout=settings.judge_timeout) as response:
            answer: bytes = response.read(LARGEST_ANSWER + 1)
            return answer
    except urllib.error.HTTPError as error:
        raise _refused(error, key, settings) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError):
            what, fix = (
                f"the judge did not answer within {settings.judge_timeout:g} s",
                "set reward.judge_timeout higher, or read the service's log",
            )
            raise _FailedError(what, fix, may_pass=True) from error
        fix = "start the service, or correct reward.judge_url"
        raise _FailedError(f"the judge cannot be reached: {_hidden(str(reason), key)}", fix, may_pass=True) from error


def _refused(error: urllib.error.HTTPError, key: str, settings: Settings) -> _FailedError:
    """Return the failure for an HTTP status that is an error."""
    try:
        said = error.read(LARGEST_MESSAGE).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        said = ""
    variable = settings.judge_key_variable
    fix = {
        401: f"put the key of the service into the environment variable {variable}"
        + ("; the one there is refused" if key else ", which is not set"),
        403: f"check what the key in {variable} may use" if key else f"put the key of the service into the environment variable {variable}",
        404: "correct reward.judge_url, which ends before /chat/completions, or reward.judge_model",
        429: "set reward.judge_requests lower, or try again later",
    }.get(error.code, "read the service's log" if error.code >= 500 else "correct the reward.judge_… key that it names")
    if 300 <= error.code < 400:
        fix = "give the address of the service itself in reward.judge_url: redirects are not followed"
    wait = re.fullmatch(r"\d{1,6}", (error.headers.get("Retry-After") or "").strip())
    message = _hidden(message_in(said) or str(error.reason), key)
    return _FailedError(
        f"the judge answered {error.code}: {message}", fix, may_pass=error.code in WORTH_REPEATING, seconds=float(wait[0]) if wait else None
    )


def message_in(text: str) -> str:
    """Return the message of an error, from the fields that services put it in; else the text."""
    try:
        answer = json.loads(text)
    except ValueError:
        return text.strip()
    found = answer.get("error", answer) if isinstance(answer, dict) else answer
    found = (found.get("message") or found.get("detail") or found) if isinstance(found, dict) else found
    return str(found)


def text_of(answer: bytes, url: str) -> str:
    """Return the text in the answer of a chat completion."""
    fix = f"check that {url} is an OpenAI-style service"
    if len(answer) > LARGEST_ANSWER:
        raise _FailedError(f"the judge sends more than {LARGEST_ANSWER // 2**20} MiB in one answer", fix, may_pass=False)
    try:
        text = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        shown = redact_text(answer[:LONGEST_SHOWN].decode(errors="replace"))
        raise _FailedError(f"the judge did not answer as a chat completion does: {shown!r}", fix, may_pass=False) from error
    return text if isinstance(text, str) else ""


def _hidden(text: str, key: str) -> str:
    """Return a message without the key and other secrets."""
    return redact_text(text.replace(key, "[hidden]") if key else text)[:500]
