"""Which rows to show."""

from collections.abc import Sequence
from dataclasses import dataclass

from verl.errors import UserError, at_least

MOST_RANDOM = 1000


@dataclass(frozen=True)
class Picks:
    """Rows to show. If none are named, the first one is shown.

    Attributes:
        rows: numbers, from 1, or locations such as `train.jsonl:17`.
        random: number of rows drawn at random; always the same ones.
        text: rows that contain this text; None: none.
        longest: whether to show the longest rows.
    """

    rows: Sequence[str] = ()
    random: int = 0
    text: str | None = None
    longest: bool = False

    @property
    def is_empty(self) -> bool:
        return not (self.rows or self.random or self.longest or self.text is not None)

    def check(self) -> None:
        """Raise UserError if they cannot be shown."""
        at_least("--random", self.random, 0)
        if self.random > MOST_RANDOM:
            raise UserError(f"found {self.random:,}", where="--random", fix=f"ask for {MOST_RANDOM:,} rows at most")
        if self.text == "":
            raise UserError("the text is empty", where="--grep", fix="give the text to look for")
        for row in self.rows:
            if row.lstrip("-").isdecimal() and int(row) < 1:
                raise UserError(f"found {row}", where="--row", fix="rows count from 1")
            if not row.isdecimal() and not row.rpartition(":")[2].isdecimal():
                raise UserError(f"{row!r} is no row", where="--row", fix="give its number or its place: --row 17, --row train.jsonl:17")
