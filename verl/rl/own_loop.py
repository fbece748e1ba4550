"""Asynchronous work of a step, run to its end by code that is not asynchronous."""

import asyncio
import threading
import time
from collections.abc import Coroutine, Sequence
from typing import Any

from verl.workers.pool import SECONDS_BEFORE_LINE, Watch


def run_to_end(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, None]) -> None:
    """Run in a loop; in a thread of its own if this one runs a loop, as notebooks do."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        loop.run_until_complete(work)
        return
    errors: list[BaseException] = []

    def run() -> None:
        try:
            loop.run_until_complete(work)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="episodes")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


async def tell(watch: Watch, what: str, plays: Sequence[asyncio.Future[Any]]) -> None:
    """Tell once a second how many of a step's plays have ended. It is cancelled when all have."""
    begun, next_line = time.monotonic(), SECONDS_BEFORE_LINE
    try:
        while True:
            await asyncio.sleep(1.0)
            seconds = time.monotonic() - begun
            is_due = seconds >= next_line
            next_line = 2 * max(next_line, seconds) if is_due else next_line
            ended = sum(play.done() for play in plays)
            watch.waiting(f"{what}: {ended:,} of {len(plays):,} have ended, {seconds:.0f} s", line_is_due=is_due)
    finally:
        if time.monotonic() - begun >= 1.0:
            watch.waiting(None)
