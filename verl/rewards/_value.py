"""What an answer may say: a quantity, an expression, a list, an interval, a relation, a choice, a time or words."""

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from verl.rewards import _units
from verl.rewards._units import Unit


@dataclass(frozen=True)
class Quantity:
    """A number with its unit: `12`, `$5`, `50%`, `2 hours 30 minutes`.

    Attributes:
        value: the number as written, in the first unit.
        is_fraction: whether it is written as `3/4`, as no decimal number.
        compound: whether it is a sum of quantities in several units, which no bare number equals.
    """

    value: Fraction
    unit: Unit = _units.NONE
    percent: bool = False
    compound: bool = False
    is_fraction: bool = field(default=False, compare=False)

    @property
    def share(self) -> Fraction:
        """The value of `60%` as 0.6."""
        return self.value / 100 if self.percent else self.value


@dataclass(frozen=True)
class Expression:
    """LaTeX that has to be evaluated, and its unit."""

    latex: str
    unit: Unit = _units.NONE


@dataclass(frozen=True)
class Words:
    """Text in a canonical form: lower case, single spaces."""

    text: str


@dataclass(frozen=True)
class Choice:
    """`B`, `(B)`, `option B`, or `(B) 12` with `content`."""

    letter: str
    content: "Value | None" = None


@dataclass(frozen=True)
class Ratio:
    """`3:2`."""

    parts: tuple[Fraction, ...]


@dataclass(frozen=True)
class Clock:
    """A time of day: minutes since midnight or, without `half`, perhaps since noon; it may have been meant as a ratio."""

    minutes: Fraction
    half: str | None
    ratio: Ratio | None


@dataclass(frozen=True)
class Several:
    """Several values.

    Attributes:
        kind: a list is in any order, as is a set; a tuple is in its order; a union is of intervals and sets; `all` are
            conditions for one variable that hold together.
        decimal: the value if its comma is a decimal point: `1,5`.
    """

    kind: Literal["list", "set", "tuple", "union", "all"]
    items: "tuple[Value, ...]"
    decimal: Quantity | None = None


@dataclass(frozen=True)
class Interval:
    """All numbers between two ends, `[0,1)` or `0 <= x < 1`; an end is None where there is none.

    Attributes:
        swapped: `b > a` for `a < b`, where both sides are names.
    """

    low: "Value | None"
    high: "Value | None"
    has_low: bool
    has_high: bool
    name: str | None = None
    swapped: "Value | None" = field(default=None, compare=False)


@dataclass(frozen=True)
class Named:
    """`x = 5`."""

    name: str
    value: "Value"


@dataclass(frozen=True)
class Unlike:
    """`x != 5`; all numbers but several for `x != 5, 6`. `swapped` is `b != a` for `a != b`, where both sides are names."""

    value: "Value"
    name: str | None = None
    swapped: "Value | None" = field(default=None, compare=False)


Value = Quantity | Expression | Words | Choice | Clock | Ratio | Several | Interval | Named | Unlike
