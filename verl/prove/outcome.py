"""What a proof found."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from verl.errors import UserError

# holds: equal to the reference; slower: equal, on a path that is not the fast one; refused: by a UserError, with its fix; wrong: differs
# from the reference, or ends in an exception that is no UserError; none: the architecture has nothing of the kind.
State = Literal["holds", "slower", "refused", "wrong", "none"]
ROUNDING = 1e-3  # a larger difference is no rounding of float32
TOLERANCE = 1e-5  # of float32 log-probabilities and losses in nats, and of gradients relative to their norm


@dataclass(frozen=True)
class Outcome:
    """One line of the table.

    Attributes:
        group: what it belongs to: fine-tuning, generation, adapter or reinforcement.
        name: the claim, such as "packed = alone".
        difference: the largest difference from the reference; None if nothing was compared.
        found: figures and the path that was taken, for people; of a refusal, the error and its fix.
    """

    group: str
    name: str
    state: State
    found: str
    difference: float | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def compared(
    group: str, name: str, differences: dict[str, float], *, path: str = "", slower: bool = False, tolerance: float = TOLERANCE
) -> Outcome:
    """Return the outcome of a comparison: it holds if every difference is within the tolerance. NaN is none.

    Args:
        differences: largest difference of each thing that was compared, by its name.
        path: the path that verl took.
        slower: whether it is a slower one than others take.
    """
    is_equal = all(value <= tolerance for value in differences.values())
    text = ", ".join(f"{what} {value:.1e}" for what, value in differences.items())
    largest = max(differences.values(), key=lambda value: float("inf") if value != value else value, default=0.0)
    state: State = ("slower" if slower else "holds") if is_equal else "wrong"
    return Outcome(group, name, state, "; ".join(filter(None, (text, path))), largest)


def compared_beside_rounding(
    group: str, name: str, differences: dict[str, float], rounding: Callable[[], float], *, path: str = "", slower: bool = False
) -> Outcome:
    """Return the outcome of a comparison that holds too if the differences are no more than twice what rounding alone makes.

    Args:
        rounding: how far plain models are apart whose weights differ by rounding, or whose decoding differs from their forward pass;
            called if the differences are small, but larger than the tolerance.
    """
    if not TOLERANCE < max(differences.values()) < ROUNDING:
        return compared(group, name, differences, path=path, slower=slower)
    most = rounding()
    path = "; ".join(filter(None, (f"rounding in plain transformers: {most:.1e}", path)))
    return compared(group, name, differences, path=path, slower=slower, tolerance=max(TOLERANCE, 2 * most))


def refused(group: str, name: str, error: UserError) -> Outcome:
    """Return the outcome of a proof that verl refuses."""
    place = f"{error.where}: " if error.where else ""
    fix = f"; fix: {error.fix}" if error.fix else ""
    return Outcome(group, name, "refused", " ".join(f"{place}{error.what}{fix}".split()))


def failed(group: str, name: str, error: BaseException) -> Outcome:
    """Return the outcome of a proof that ended in an exception, with the last place in verl that it passed."""
    import traceback

    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if "/verl/" in frame.filename and "/prove/" not in frame.filename
    ]
    place = f" at verl/{frames[-1].filename.rpartition('/verl/')[2]}:{frames[-1].lineno}" if frames else ""
    return Outcome(group, name, "wrong", f"traceback: {type(error).__name__}{place}: {' '.join(str(error).split())[:200]}")
