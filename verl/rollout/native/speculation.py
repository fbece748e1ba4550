"""When the native engine speculates: verify steps where they add more tokens per time than decode steps, else decode steps.

It decides on the host, from counts alone and never from measured time, so that a call that is repeated takes the same steps: the last bits
of log-probabilities may differ between a verify step and a decode step, and a resumed run has to be the uninterrupted one bit for bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

DRAFTS = 4  # drafts of a row
# A step of a small number of rows takes as long as the computation of this many tokens: it reads the weights and launches its kernels.
# Measured with the shape of Qwen2.5-0.5B on an H200: a decode step of 1, 8 and 64 rows takes 0.99, 1.18 and 1.34 ms, and a verify step of
# as many rows with 4 drafts each 1.45, 1.62 and 2.67 ms.
FIXED = {"cuda": 256, "cpu": 20}
LOOKUP = {"cuda": 96, "cpu": 8}  # the same, for what a verify step does besides: it looks for drafts, and compares them
MOST_TOKENS = {"cuda": 512, "cpu": 4096}  # of a verify step; a GPU has memory for the logits of its slots
SHARE = 0.02  # share of the time that trials may lose
DEBT = 0.5  # decode steps; it delays the first trial, because when answers begin, there is nothing to copy from
CREDIT = 2.0  # decode steps that verify steps may lose in a row after they have paid
TRIAL = 2  # verify steps between two decisions, before they have paid


@dataclass
class Counts:
    """What verify steps did.

    Attributes:
        steps: number of steps.
        kept: tokens that were added to responses.
        active: rows that they were added to; a decode step would have added one token to each.
        computed: tokens that the model computed.
    """

    steps: int = 0
    kept: int = 0
    active: int = 0
    computed: int = 0


class Pace:
    """Decides between verify steps and decode steps in one call.

    It keeps an account in decode steps. With F the fixed part of a step and D that of drafts, in tokens, a decode step of R rows takes
    F + R. A verify step that computes C tokens takes F + D + C, and adds k tokens to each active row, as k decode steps do: it is credited
    with k - (F + D + C) / (F + R). A decode step is credited with SHARE until the balance is 0. It begins at -DEBT, and is never above
    CREDIT. Verify steps are taken while it is not negative, first TRIAL of them. So all trials of a call lose little more than SHARE of its
    time. They come the more often the less they cost: when few rows are left.

    While requests wait for the slots of rows that end, k is the mean over all rows. Later, the rows that get on slowly decide when the call
    ends, and k is the mean over the slower half of them: else a few rows that repeat themselves would slow down all others.

    Args:
        device_type: "cuda" or "cpu".
    Attributes:
        total: what all verify steps of the call did.
        decode_steps: number of decode steps.
    """

    def __init__(self, device_type: str):
        self._fixed, self._lookup, self._most = FIXED[device_type], LOOKUP[device_type], MOST_TOKENS[device_type]
        self._balance, self.total, self.decode_steps = -DEBT, Counts(), 0

    def steps(self, at_most: int, rows: int) -> int:
        """Return the number of verify steps to take now, at most `at_most`; 0: take decode steps.

        Args:
            rows: rows of the next steps.
        """
        if self._balance < 0 or rows * (DRAFTS + 1) > self._most:
            return 0
        return at_most if self._balance >= CREDIT else min(at_most, TRIAL)

    def decoded(self, steps: int) -> None:
        """Count decode steps."""
        self.decode_steps += steps
        if self._balance < 0:  # only what was gained is kept for worse steps
            self._balance = min(0.0, self._balance + steps * SHARE)

    def verified(self, counts: Counts, rows: int, added: Sequence[int] = ()) -> None:
        """Count verify steps of so many rows.

        Args:
            added: if no request waits, the number of tokens that were added to each response that goes on.
        """
        for name, value in vars(counts).items():
            setattr(self.total, name, getattr(self.total, name) + value)
        if counts.active:  # else all responses had ended before
            cost = (self._fixed + self._lookup + counts.computed / counts.steps) / (self._fixed + rows)
            slower = sorted(added)[: (len(added) + 1) // 2]
            kept = sum(slower) / len(slower) / counts.steps if slower else counts.kept / counts.active
            self._balance = min(CREDIT, self._balance + counts.steps * (kept - cost))


class Always(Pace):
    """Takes verify steps alone, to check them."""

    def steps(self, at_most: int, rows: int) -> int:
        """Return `at_most`."""
        return at_most
