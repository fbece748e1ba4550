"""When the native engine speculates: verify steps where they add more tokens per time than decode steps, else decode steps.

It decides on the host, from counts alone and never from measured time, so that a call that is repeated takes the same steps: the last bits
of log-probabilities may differ between a verify step and a decode step, and a resumed run has to be the uninterrupted one bit for bit.
"""

from dataclasses import dataclass

DRAFTS = 4  # drafts of a row
# A step takes as long as this many tokens, whatever it computes: it reads the weights and launches its kernels.
FIXED = {"cuda": 128, "cpu": 24}
MOST_TOKENS = {"cuda": 512, "cpu": 4096}  # tokens of a verify step; a GPU has memory for the logits of its slots
MARGIN = 1.1  # a verify step has to be this much better, because looking for drafts takes time too
HOPED = 0.5  # share of right drafts that a trial may need to pay
TRIAL = 2  # verify steps of a trial
PAUSE, LONGEST_PAUSE = 32, 256  # decode steps after the first trial that did not pay, and after many
MEMORY = 16  # verify steps after which what they counted has half its weight


@dataclass
class Counts:
    """What verify steps did.

    Attributes:
        kept: tokens that were added to responses.
        active: rows that they were added to; a decode step would have added one token to each.
        computed: tokens that the model computed.
        rows: rows of these steps, with those that are not active.
    """

    kept: float = 0.0
    active: float = 0.0
    computed: float = 0.0
    rows: float = 0.0


class Pace:
    """Decides between verify steps and decode steps in one call.

    With F the fixed part of a step in tokens, a decode step of R rows takes F + R, and adds one token to each active row. A verify step that
    computes c tokens for each row takes F + c·R, and adds k tokens to each active row. It pays if k · (F + R) > MARGIN · (F + c·R), where k
    and c are those of the latest verify steps. The first steps of a call are a trial, unless there are so many rows that not even half of
    all drafts would pay. When verify steps do not pay, decode steps follow until the next trial, each time more of them.

    Args:
        device_type: "cuda" or "cpu".
    Attributes:
        total: what all verify steps of the call did.
        verify_steps, decode_steps: number of steps of each kind so far.
    """

    def __init__(self, device_type: str):
        self._fixed, self._most = FIXED[device_type], MOST_TOKENS[device_type]
        self._recent, self.total = Counts(), Counts()
        self.verify_steps = self.decode_steps = 0
        self._trial, self._wait, self._pause = TRIAL, 0, PAUSE  # verify steps to try, decode steps before that, and length of the next wait

    def steps(self, at_most: int, rows: int) -> int:
        """Return the number of verify steps to take now, at most `at_most`; 0: take decode steps.

        Args:
            rows: rows of the next steps.
        """
        if self._wait > 0 or rows * (DRAFTS + 1) > self._most:
            return 0
        if self._trial > 0:
            return min(at_most, self._trial) if self._pays(1 + HOPED * DRAFTS, DRAFTS + 1, rows) else 0
        recent = self._recent
        if self._pays(recent.kept / max(recent.active, 1), recent.computed / max(recent.rows, 1), rows):
            self._pause = PAUSE
            return at_most
        self._trial, self._wait, self._pause = TRIAL, self._pause, min(2 * self._pause, LONGEST_PAUSE)
        self._recent = Counts()
        return 0

    def _pays(self, kept: float, computed: float, rows: int) -> bool:
        return kept * (self._fixed + rows) > MARGIN * (self._fixed + computed * rows)

    def decoded(self, steps: int) -> None:
        """Count decode steps."""
        self.decode_steps += steps
        self._wait = max(0, self._wait - steps)

    def verified(self, steps: int, counts: Counts) -> None:
        """Count verify steps."""
        self.verify_steps += steps
        self._trial = max(0, self._trial - steps)
        fade = 0.5 ** (steps / MEMORY)
        for name, value in vars(counts).items():
            setattr(self._recent, name, getattr(self._recent, name) * fade + value)
            setattr(self.total, name, getattr(self.total, name) + value)


class Always(Pace):
    """Takes verify steps alone, to check them."""

    def steps(self, at_most: int, rows: int) -> int:
        """Return `at_most`."""
        return at_most
