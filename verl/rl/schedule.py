"""The schedule of a run with `rollout.staleness=1`: schedule.jsonl, one object for each event on each rollout rank, in order.

    {"step": 2, "rank": 1, "event": "drawn", "version": 1, "prompts": [8, 9, 10, 11]}

`step` is the step in which the trainer was. The events:

    drawn      the rank began answers to the prompts of these numbers, under the weights of this version, while the trainer learned
    answered   it answered at once, because the trainer waited: the first step, refills, further turns, validation
    finished   the answers that were begun first were wanted, and were sent when they were whole
    weights    from here on, it has the weights of this version
    cut        the answers so far were written into a checkpoint; they go on as after new weights

With `rollout.partial`, `decode_steps` is the number of decode steps between the event before and this one. All else in a run follows from
these numbers, so `rollout.replay` repeats it bit for bit.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from verl import dist, regular_file, signals
from verl.durable import replace_text
from verl.errors import UserError
from verl.rl.bridge import Begin, Cut, Finish, NewWeights, Request
from verl.run import Run

NAME = "schedule.jsonl"
EVENTS = ("drawn", "answered", "finished", "weights", "cut")

Event = dict[str, Any]


class Schedule:
    """Writes the schedule, on rank 0.

    Args:
        start_step: step that the run begins after; later events of the file are of a run that was interrupted, and are removed.
    """

    def __init__(self, run: Run, start_step: int):
        self._run = run
        if dist.is_main():
            path = run.directory / NAME
            kept = [event for event in read_events(path) if event["step"] <= start_step] if start_step > 0 else []
            if path.exists():
                replace_text(path, "".join(json.dumps(event) + "\n" for event in kept))

    def note(self, events: Iterable[Event]) -> None:
        """Add events of the present step."""
        step = signals.place()[1]
        lines = [json.dumps({"step": step, **event}) for event in events]
        if lines and dist.is_main():
            self._run.append(NAME, "\n".join(lines))


def event_of(message: object) -> str | None:
    """Return the name of the event that a message is; None if it is none, as it does not depend on time."""
    match message:
        case Begin(is_again=False):
            return "drawn"
        case Request():
            return "answered"
        case Finish():
            return "finished"
        case NewWeights():
            return "weights"
        case Cut():
            return "cut"
    return None


def read_events(path: Path) -> list[Event]:
    """Read the events of a schedule. A last line that a kill has cut off is left out."""
    if not path.exists():
        return []
    with os.fdopen(regular_file.open_file(path), encoding="utf-8", errors="replace") as file:
        return [event for line in file if (event := _event(line)) is not None]


def events_after(path: str, step: int) -> list[Event]:
    """Return the events of the steps after this one, on rank 0; none on the others.

    Raises:
        UserError: on all ranks: the file cannot be read, is no schedule with decode steps, or ends before that step.
    """
    found: list[Event] = []
    dist.together(lambda: found.extend(_events_to_repeat(path, step) if dist.is_main() else []))
    return found


def _events_to_repeat(path: str, step: int) -> list[Event]:
    where, file = f"rollout.replay={path}", Path(path).expanduser()
    try:
        text = regular_file.read(file).decode()
    except FileNotFoundError as error:
        raise UserError("no such file", where=where, fix="give the schedule.jsonl of a run with rollout.partial=true") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", where=where, fix="give the schedule.jsonl of a run") from error
    lines = text.splitlines()
    events = [_event(line) for line in (lines if text.endswith("\n") else lines[:-1])]  # a kill may have cut off the last one
    for number, event in enumerate(events, 1):
        if event is None or (wrong := _why_not_repeated(event)) is not None:
            what = "is no event of a schedule" if event is None else wrong
            raise UserError(
                f"line {number} {what}", where=where, fix="give the schedule.jsonl of a run with rollout.partial=true, as it was written"
            )
    due = [event for event in events if event is not None and (event["step"] > step or step == 0)]
    if not due:
        raise UserError(f"ends before step {step + 1}: there is nothing to repeat", where=where, fix="leave it out: rollout.replay=null")
    return due


def _why_not_repeated(event: Event) -> str | None:
    """Say what an event lacks to be repeated; None: nothing."""
    for name in ("rank", "decode_steps"):
        value = event.get(name)
        if type(value) is not int or value < 0:
            return f"has {name}={value!r}, which is no number of {'a rank' if name == 'rank' else 'steps'}"
    if event.get("event") not in EVENTS:
        return f"has the unknown event {event.get('event')!r}"
    prompts = event.get("prompts", [])
    if not isinstance(prompts, list) or any(type(number) is not int for number in prompts):
        return f"has prompts={prompts!r}, which are no numbers of prompts"
    return None


def _event(line: str) -> Event | None:
    try:
        event: Event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("step"), int) else None
