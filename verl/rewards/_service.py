"""A language model behind an OpenAI-style HTTP interface (`POST URL/chat/completions`), which graders ask.

Requests that are worth repeating are repeated, each reply is kept by what was asked (verl.rewards._replies), and several are sent at a
time. The key of the service comes from an environment variable, and is neither printed nor written to a file.
"""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from threading import Event, Lock
from typing import TypeVar
from urllib.parse import urlsplit

from verl.errors import UserError, at_least
from verl.one_answer import one_answer
from verl.redaction import redact_text
from verl.rewards._replies import Replies

LARGEST_ANSWER = 16 * 2**20  # bytes
LARGEST_MESSAGE = 2**16  # bytes of the message of an HTTP error
LONGEST_SHOWN = 200  # characters of an answer in an error
LONGEST_WAIT = 60.0  # seconds before a request is repeated
WORTH_REPEATING = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # HTTP status

Result = TypeVar("Result")


@dataclass
class Service:
    # Address of the service, up to what stands before `/chat/completions`, such as http://localhost:8000/v1.
    judge_url: str | None = None
    # Name of the model, as the service knows it.
    judge_model: str | None = None
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
    # Folder in which replies are kept, so that a run that goes on, or another one, asks nothing twice; "auto": judge in ~/.cache/verl (or
    # $XDG_CACHE_HOME); null: they are kept in memory alone.
    judge_cache: str | None = "auto"
    # Number of replies without a usable grade after which the command ends, whatever reward.on_error says; null: no limit.
    judge_max_failures: int | None = None

    def check_service(self, what: str) -> None:
        """Raises UserError: a key of the service is missing or wrong. `what` is what needs it, such as "metric judge"."""
        for name, value, example in (
            ("judge_url", self.judge_url, "http://localhost:8000/v1"),
            ("judge_model", self.judge_model, "Qwen/Qwen2.5-7B-Instruct"),
        ):
            if value is None:
                raise UserError(f"{what} needs a service and a model", where=name, fix=f"set reward.{name}, such as {example}")
        parts = urlsplit(self.judge_url or "")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{redact_text(self.judge_url or '')!r} is not an address", where="judge_url", fix="write http://HOST:PORT/v1")
        if "@" in parts.netloc:
            fix = f"put the key of the service into the environment variable {self.judge_key_variable}"
            raise UserError("has a user or a password in the address, which logs would show", where="judge_url", fix=fix)
        at_least("judge_timeout", self.judge_timeout, 0.001)
        at_least("judge_retries", self.judge_retries, 0)
        at_least("judge_requests", self.judge_requests, 1)
        at_least("judge_max_tokens", self.judge_max_tokens, 1)
        at_least("judge_temperature", self.judge_temperature, 0.0)
        at_least("judge_max_failures", self.judge_max_failures, 0)


class NoGradeError(ValueError):
    """A reply has no usable grade."""


_replies = Replies()
_given_up = Event()  # no request is repeated any more
_wait = _given_up.wait


def reply_to(prompt: str, service: Service) -> str:
    """Return the service's reply to a prompt, asked for once.

    Raises:
        UserError: the service refuses, is not reached or does not answer, also after repeating the request.
    """
    what = {
        "url": str(service.judge_url).rstrip("/"),
        "model": service.judge_model,
        "temperature": service.judge_temperature,
        "max_tokens": service.judge_max_tokens,
        "prompt": prompt,
    }
    return _replies.get(what, lambda: asked(prompt, service), folder=service.judge_cache)


def side_by_side(calls: Sequence[Callable[[], Result]], requests: int) -> list[Result]:
    """Make calls that ask the service, so many at a time. Raises the first error of one; the others are then given up."""
    try:
        with ThreadPoolExecutor(requests) as pool:
            waiting = [pool.submit(call) for call in calls]
            try:
                return [one.result() for one in waiting]
            except (UserError, KeyboardInterrupt):  # the other requests would fail too, or are not wanted
                _given_up.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        _given_up.clear()


class Failures:
    """The different replies without a usable grade, of this process. It may be used in several threads."""

    def __init__(self) -> None:
        self._found: set[int] = set()
        self._lock = Lock()

    def add(self, prompt: str, error: NoGradeError, service: Service) -> None:
        """Count a reply. Raises UserError: there are more than `judge_max_failures`."""
        with self._lock:
            self._found.add(hash((service.judge_url, service.judge_model, prompt)))
            many = len(self._found)
        if service.judge_max_failures is not None and many > service.judge_max_failures:
            what = f"{many:,} replies had no usable grade; the last one: {error}"
            fix = "choose a judge that keeps to the form, correct reward.judge_prompt, or set reward.judge_max_failures higher"
            raise UserError(what, where=f"reward.judge_max_failures={service.judge_max_failures}", fix=fix)


failures = Failures()


def graded(prompt: str, service: Service, read: Callable[[str], Result]) -> Result:
    """Ask for a grade, and read it from the reply.

    Raises:
        NoGradeError: `read` finds no usable grade in the reply, which is counted.
        UserError: as `reply_to`; or there were too many such replies.
    """
    try:
        return read(reply_to(prompt, service))
    except NoGradeError as error:
        failures.add(prompt, error, service)
        raise


def asked(prompt: str, service: Service) -> str:
    """Send a prompt to the service, again while that is worth it, and return the text of the reply. Raises UserError as `reply_to`."""
    body = {
        "model": service.judge_model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": service.judge_temperature,
        "max_tokens": service.judge_max_tokens,
    }
    url = f"{str(service.judge_url).rstrip('/')}/chat/completions"
    data = json.dumps({key: value for key, value in body.items() if value is not None}).encode()
    attempt = 1
    while isinstance(found := _answered(url, data, service), FailedError):
        if not found.may_pass or attempt > service.judge_retries or _given_up.is_set():
            raise UserError(f"{found}{f' (asked {attempt} times)' if attempt > 1 else ''}", where=url, fix=found.fix) from found
        _wait(min(LONGEST_WAIT, found.seconds if found.seconds is not None else 2.0 ** (attempt - 1)))
        attempt += 1
    return found


class FailedError(Exception):
    """A request that failed.

    Attributes:
        fix: what the user can do.
        may_pass: whether the same request may succeed later.
        seconds: how long the service asks to wait; None: it does not say.
    """

    def __init__(self, what: str, fix: str, *, may_pass: bool, seconds: float | None = None):
        super().__init__(what)
        self.fix, self.may_pass, self.seconds = fix, may_pass, seconds


def _answered(url: str, data: bytes, service: Service) -> "str | FailedError":
    """Send one request, and return the text of the reply without the key of the service, or why there is none."""
    try:
        text, key = text_of(_sent(url, data, service), url), key_of(service)
        return text.replace(key, "[hidden]") if key else text  # a reply is kept on disk, and shown in errors
    except FailedError as error:
        return error


def key_of(service: Service) -> str:
    """Return the key of the service; empty if there is none."""
    return os.environ.get(service.judge_key_variable, "").strip()


def _sent(url: str, data: bytes, service: Service) -> bytes:
    """Send one request, and return what the service answers."""
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})  # noqa: S310 - http, see Settings.check
    key = key_of(service)
    if key:
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    try:
        with one_answer(service.judge_timeout) as opener, opener.open(request, timeout=service.judge_timeout) as response:
            answer: bytes = response.read(LARGEST_ANSWER + 1)
            return answer
    except urllib.error.HTTPError as error:
        raise _refused(error, key, service) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError):
            what, fix = (
                f"the judge did not answer within {service.judge_timeout:g} s",
                "set reward.judge_timeout higher, or read the service's log",
            )
            raise FailedError(what, fix, may_pass=True) from error
        fix = "start the service, or correct reward.judge_url"
        raise FailedError(f"the judge cannot be reached: {_hidden(str(reason), key)}", fix, may_pass=True) from error


def _refused(error: urllib.error.HTTPError, key: str, service: Service) -> FailedError:
    """Return the failure for an HTTP status that is an error."""
    try:
        said = error.read(LARGEST_MESSAGE).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        said = ""
    variable = service.judge_key_variable
    fix = {
        401: f"put the key of the service into the environment variable {variable}"
        + ("; the one there is refused" if key else ", which is not set"),
        403: f"check what the key in {variable} may use" if key else f"put the key of the service into the environment variable {variable}",
        404: "correct reward.judge_url, which ends before /chat/completions, or reward.judge_model",
        429: "set reward.judge_requests lower, or try again later",
    }.get(error.code, "read the service's log" if error.code >= 500 else "correct the reward.judge_… key that it names")
    if 300 <= error.code < 400:
        fix = "give the address of the service itself in reward.judge_url: redirects are not followed"
    wait = seconds_of(error.headers.get("Retry-After") or "")
    message = _hidden(message_in(said) or str(error.reason), key)
    return FailedError(f"the judge answered {error.code}: {message}", fix, may_pass=error.code in WORTH_REPEATING, seconds=wait)


def seconds_of(retry_after: str) -> float | None:
    """Return how long a service asks to wait, from its header `Retry-After`: seconds, or a date; None if it says neither."""
    if re.fullmatch(r"\d{1,6}(\.\d+)?", retry_after.strip()):
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


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
        raise FailedError(f"the judge sends more than {LARGEST_ANSWER // 2**20} MiB in one answer", fix, may_pass=False)
    try:
        text = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        shown = redact_text(answer[:LONGEST_SHOWN].decode(errors="replace"))
        raise FailedError(f"the judge did not answer as a chat completion does: {shown!r}", fix, may_pass=False) from error
    return text if isinstance(text, str) else ""


def _hidden(text: str, key: str) -> str:
    """Return a message without the key and other secrets."""
    return redact_text(text.replace(key, "[hidden]") if key else text)[:500]
