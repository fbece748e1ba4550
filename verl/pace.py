"""Time that is left, from how far a command has got, and times and counts as texts."""

import time


class Pace:
    """Estimates the time left from the time since the first note: what comes before it also warms up, and is not typical."""

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None

    def left(self, done: float, total: float) -> float | None:
        """Note that so much of the total is done, and return the seconds left; None the first time."""
        now = time.monotonic()
        if self._first is None:
            self._first = (done, now)
            return None
        before, since = self._first
        return (now - since) / max(1e-9, done - before) * (total - done) if done > before else None


def clock(seconds: float) -> str:
    """Format seconds as `1:23`, or as `2:01:23` from an hour on."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def counted(number: int, one: str, several: str | None = None) -> str:
    """Return a number with its noun, such as `1 step` or `2,000 steps`.

    Args:
        several: the plural; None: the singular and an s.
    """
    return f"{number:,} {one if number == 1 else several or one + 's'}"
