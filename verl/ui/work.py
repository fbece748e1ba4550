"""A process that calls the Python API for the page: each line of its input is a call, each line of its output the answer, as JSON.

The page itself imports no model and no trainer, so that it stays alive whatever a run does, and a stop is a signal.
"""

import contextlib
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import verl
from verl.errors import Stopped, UserError

Answer = dict[str, Any]
_models: dict[str, Any] = {}  # loaded for the chat


def main() -> None:
    """Answer calls until the input ends. If it ends during a call, the page is gone: the call is asked to stop, as by SIGTERM."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the API prints is no answer
    for call in _calls(sys.stdin):
        json.dump(answer_of(call), answers)
        answers.write("\n")
        answers.flush()


def answer_of(call: dict[str, Any]) -> Answer:
    """Run a call, and return {"result": …}, {"error": …} for a UserError, or {"stopped": …}."""
    try:
        return {"result": CALLS[call["call"]](**call["arguments"])}
    except UserError as error:
        from verl.redaction import redact_text

        texts = {"what": error.what, "where": error.where, "fix": error.fix}
        return {"error": {key: None if text is None else redact_text(str(text)) for key, text in texts.items()}}
    except Stopped as stopped:
        return {"stopped": None if stopped.checkpoint is None else str(stopped.checkpoint)}


def _calls(lines: TextIO) -> Iterator[dict[str, Any]]:
    """Yield the calls. The lines are read by a thread, which sees that the page is gone while a call runs."""
    waiting: queue.Queue[str | None] = queue.Queue()
    busy = threading.Event()

    def read() -> None:
        for line in lines:
            waiting.put(line)
        waiting.put(None)
        if busy.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=read, daemon=True).start()
    while (line := waiting.get()) is not None:
        busy.set()
        yield json.loads(line)
        busy.clear()


def _train(given: list[Any]) -> Answer:
    run = verl.sft(*given)
    return {"checkpoint": None if run.checkpoint is None else str(run.checkpoint), "directory": str(run.directory)}


def _inspect(given: list[Any], page: str, rows: int) -> Answer:
    found = verl.inspect_data(*given, random=rows, longest=True)
    from verl.inspection.page import page as as_page

    Path(page).write_text(as_page(found), encoding="utf-8")
    stops = [finding.what for one in found.sets for finding in one.invalid]
    return {"page": page, "used": found.train.used, "steps": None if found.steps is None else found.steps.total, "invalid": stops}


def _evaluate(given: list[Any]) -> Answer:
    found = verl.evaluate(*given)
    return {"scores": found.scores, "directory": str(found.directory)}


def _report(run: str) -> Answer:
    return {"page": str(verl.write_report(run))}


def _chat(models: list[str], chats: list[list[dict[str, str]]], sampling: dict[str, Any]) -> list[str]:
    """Return the answer of each model to its own chat. Models stay loaded until others are asked."""
    for path in [path for path in _models if path not in models]:
        _models.pop(path).close()
    for path in models:
        if path not in _models:
            _models[path] = verl.load_rollout(path)
    return [str(_models[path].generate([chat], **sampling)[0]) for path, chat in zip(models, chats, strict=True)]


CALLS: dict[str, Callable[..., Any]] = {"train": _train, "inspect": _inspect, "evaluate": _evaluate, "report": _report, "chat": _chat}


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the page is gone
        main()
