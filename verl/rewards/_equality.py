"""Whether two answers say the same."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction

from verl.rewards import _units
from verl.rewards._decoration import compact
from verl.rewards._reading import read, vector
from verl.rewards._region import open_interval, region
from verl.rewards._value import Choice, Clock, Expression, Interval, Named, Quantity, Ratio, Several, Unlike, Value, Words

Same = Callable[[str, str], bool]  # whether two expressions in LaTeX are equal
MAGNITUDE_LETTERS = {"k": 10**3, "K": 10**3, "M": 10**6}
CHOICES = "ABCDEFGHIJ"  # that may be written in lower case
CONSTANTS = ("e", "i")  # alone, these letters are numbers and no choices
MOST_ITEMS = 60  # of a list, compared each with each


def equal(expected: str, answer: str, same: Same) -> bool:
    """Return whether two answers say the same.

    Args:
        expected: the right answer, alone, as written.
        answer: the answer that is graded, alone, as written.
        same: compares two expressions; it may raise an exception of its own to leave the question open.
    """
    if compact(expected) == compact(answer) != "":
        return True
    right, given = read(expected), read(answer)
    return right is not None and given is not None and _Comparison(same).equal(right, given)


class _Comparison:
    def __init__(self, same: Same):
        self._same = same

    def equal(self, right: Value, given: Value) -> bool:
        """Return whether two values are equal."""
        if right == given or self._swapped(right, given):
            return True
        if _is_set_of_numbers(right) or _is_set_of_numbers(given):
            first, second = region(right), region(given)
            if first is not None and second is not None and _names_agree(_variable(right), _variable(given)):
                return first == second
        for kind, compare in self._rules():
            if isinstance(right, kind):
                return compare(right, given)
            if isinstance(given, kind):
                return compare(given, right)
        return False

    def _swapped(self, right: Value, given: Value) -> bool:
        """Return whether a relation of two names is the other one read from the right: `a < b` and `b > a`."""
        other = right.swapped if isinstance(right, Interval | Unlike) else None
        if not (isinstance(other, Interval | Unlike) and isinstance(given, Interval | Unlike)) or other.name != given.name:
            return False
        return self.equal(replace(other, name=None), replace(given, name=None, swapped=None))

    def _rules(self) -> "Sequence[tuple[type, Callable[..., bool]]]":
        """Return the rule of each kind of value. The first that fits one of two values decides."""
        return (
            (Choice, self._choice),
            (Named, self._named),
            (Unlike, self._unlike),
            (Several, self._several),
            (Interval, self._interval),
            (Clock, self._clock),
            (Ratio, self._ratio),
            (Words, self._words),
            (Expression, self._expression),
            (Quantity, _quantities),
        )

    def _choice(self, choice: Choice, other: Value) -> bool:
        if isinstance(other, Choice):
            return choice.letter == other.letter
        if choice.content is not None:
            return self.equal(choice.content, other)
        if isinstance(other, Words | Expression):
            text = other.text if isinstance(other, Words) else other.latex
            is_constant = isinstance(other, Expression) and text in CONSTANTS
            return not is_constant and text.strip("() ").upper() == choice.letter and choice.letter in CHOICES
        return isinstance(other, Named) and self.equal(choice, other.value)

    def _named(self, named: Named, other: Value) -> bool:
        if isinstance(other, Named):
            return self._both_named(named, _with_variable_of(named, other))
        if isinstance(other, Expression) and "=" in other.latex:
            return self._same(other.latex, f"{named.name}={_latex(named.value)}")
        return self.equal(named.value, other)

    def _both_named(self, named: Named, other: Named) -> bool:
        if isinstance(named.value, Words):  # `Alice is taller` and `Bob is taller`
            return named.name.casefold() == other.name.casefold() and self.equal(named.value, other.value)
        if _names_agree(named.name, other.name):
            return self.equal(named.value, other.value)
        if isinstance(named.value, Expression) and isinstance(other.value, Expression):  # `y = x + 1` and `x = y - 1`
            return self._same(f"{named.name}={named.value.latex}", f"{other.name}={other.value.latex}")
        return False

    def _unlike(self, unlike: Unlike, other: Value) -> bool:
        points = _points(unlike)
        if isinstance(other, Several) and other.kind == "union":
            return self._all_but(points, other.items)
        return isinstance(other, Unlike) and _names_agree(unlike.name, other.name) and self._same_items(points, _points(other))

    def _all_but(self, points: Sequence[Value], parts: Sequence[Value]) -> bool:
        """Return whether a union is that of all open intervals between points: each point ends one interval and begins another."""
        intervals = [open_interval(part) for part in parts]
        if len(parts) != len(points) + 1 or any(one is None or one.has_low or one.has_high for one in intervals):
            return False
        lows = [one.low for one in intervals if one and one.low is not None]
        highs = [one.high for one in intervals if one and one.high is not None]
        return self._same_items(points, lows) and self._same_items(points, highs)

    def _several(self, several: Several, other: Value) -> bool:
        if isinstance(other, Several):
            return self._both_several(several, other)
        if several.kind == "tuple" and isinstance(other, Interval):
            return self._open_interval(several, other)
        if several.kind == "tuple" and isinstance(other, Expression) and (row := vector(other.latex)):
            return self._both_several(several, row)
        if several.decimal is not None and isinstance(other, Quantity | Expression):
            return self.equal(several.decimal, other)
        if several.kind in ("set", "list", "union"):
            return len(several.items) == 1 and several.items[0] != Words("∅") and self.equal(several.items[0], other)
        return False

    def _both_several(self, several: Several, other: Several) -> bool:
        kinds = {several.kind, other.kind}
        lone = next((one for one in (several, other) if one.kind == "set" and len(one.items) == 1), None)
        if lone and kinds == {"tuple", "set"}:  # `{(1,2)}` and `(1,2)`
            return self.equal(lone.items[0], other if lone is several else several)
        if "tuple" in kinds:
            ordered = kinds <= {"tuple", "list"} and len(several.items) == len(other.items)
            return ordered and all(map(self.equal, several.items, other.items))
        return max(len(several.items), len(other.items)) <= MOST_ITEMS and self._same_sets_or_lists(several, other)

    def _same_sets_or_lists(self, several: Several, other: Several) -> bool:
        """Repeated items count in lists of numbers. In a set or among points they do not, but `{5, 5}` is not written for `{5}`."""
        first: Sequence[Value] = several.items
        second: Sequence[Value] = other.items
        points = all(isinstance(item, Several) and item.kind == "tuple" for item in (*first, *second))
        if points or "list" not in (several.kind, other.kind) or "set" in (several.kind, other.kind):
            different = self._different(first), self._different(second)
            if len(different[0]) >= 2:
                first, second = different
        return self._same_items(first, second)

    def _same_items(self, first: Sequence[Value], second: Sequence[Value]) -> bool:
        """Return whether each item has its equal among the others."""
        if len(first) != len(second):
            return False
        rest = list(second)
        for item in first:
            at = next((index for index, one in enumerate(rest) if self.equal(item, one)), None)
            if at is None:
                return False
            del rest[at]
        return True

    def _different(self, items: Sequence[Value]) -> Sequence[Value]:
        kept = list[Value]()
        for item in items:
            if not any(self.equal(item, one) for one in kept):
                kept.append(item)
        return kept

    def _open_interval(self, pair: Several, interval: Interval) -> bool:
        return (between := open_interval(pair)) is not None and self._interval(between, interval)

    def _interval(self, interval: Interval, other: Value) -> bool:
        if isinstance(other, Expression) and (inequality := _inequality(interval)):
            return self._same(inequality, other.latex)
        if not isinstance(other, Interval) or not _names_agree(interval.name, other.name):
            return False
        if (interval.has_low, interval.has_high) != (other.has_low, other.has_high):
            return False
        ends = ((interval.low, other.low), (interval.high, other.high))
        return all(a is b if a is None or b is None else self.equal(a, b) for a, b in ends)

    def _clock(self, clock: Clock, other: Value) -> bool:
        if isinstance(other, Clock):
            return _hours_agree(clock, other)
        if clock.ratio is not None and (isinstance(other, Ratio) or (isinstance(other, Quantity) and other.is_fraction)):
            return self._ratio(clock.ratio, other)
        if not isinstance(other, Quantity):
            return False
        if clock.half is None and other.unit.powers == (("time", 1),):  # `2:05` and `2 hours 5 minutes`
            return clock.minutes * 60 == other.value * other.unit.size
        is_hour = clock.half is not None or other.unit.words == {"o'clock"}
        return is_hour and _quantities(other, Quantity(clock.minutes / 60))

    def _ratio(self, ratio: Ratio, other: Value) -> bool:
        if isinstance(other, Ratio):
            first, second = ratio.parts, other.parts
            return len(first) == len(second) and all(a * second[0] == b * first[0] for a, b in zip(first, second, strict=True))
        if len(ratio.parts) != 2 or not ratio.parts[1]:
            return False
        return isinstance(other, Quantity | Expression) and self.equal(Quantity(ratio.parts[0] / ratio.parts[1]), other)

    def _words(self, words: Words, other: Value) -> bool:
        if isinstance(other, Expression):
            return words.text.replace(" ", "") == _PRODUCT_SIGN.sub("", other.latex).casefold()
        return isinstance(other, Words) and _joined(words.text) == _joined(other.text) != ""

    def _expression(self, expression: Expression, other: Value) -> bool:
        if isinstance(other, Expression):
            return _units_agree(expression.unit, other.unit) and self._same(expression.latex, other.latex)
        if not isinstance(other, Quantity) or other.percent or other.compound:
            return False
        if expression.latex[-1:] in MAGNITUDE_LETTERS and expression.latex[:-1].strip().replace(".", "").isdigit():  # `5k`
            return _quantities(
                Quantity(MAGNITUDE_LETTERS[expression.latex[-1]] * Fraction(expression.latex[:-1].strip().strip("."))), other
            )
        if r"\pi" in expression.latex and other.unit == _units.unit("°"):
            return self._same(expression.latex, rf"{_latex(other)}\cdot \frac{{\pi}}{{180}}")
        return _units_agree(expression.unit, other.unit) and self._same(expression.latex, _latex(other))


_PRODUCT_SIGN = re.compile(r"\\(?:cdot|times)(?![a-zA-Z])|[* ]")  # `a \cdot b` is `ab`


def _is_set_of_numbers(value: Value) -> bool:
    return isinstance(value, Interval | Unlike) or (isinstance(value, Several) and value.kind in ("union", "all"))


def _variable(value: Value) -> str | None:
    """Return the name of the variable of a condition, `x` for `0 < x < 1`."""
    first = value.items[0] if isinstance(value, Several) and value.items else value
    return first.name if isinstance(first, Interval | Unlike) else None


def _points(unlike: Unlike) -> Sequence[Value]:
    return unlike.value.items if isinstance(unlike.value, Several) and unlike.value.kind != "tuple" else (unlike.value,)


def _joined(words: str) -> str:
    return re.sub(r"(?<=[^\W\d])[ -]+(?=[^\W\d])", "", words)


def _names_agree(first: str | None, second: str | None) -> bool:
    """Whether two names may be those of the same thing: one is missing or a phrase, they are equal, or they are `y` and `f(x)`."""
    if first is None or second is None or first == second:
        return True
    if any(len(name) > 4 and name.isalpha() for name in (first, second)):
        return True
    return "y" in (first, second) and any(re.fullmatch(r"[a-z]\(x\)", name) for name in (first, second))


def _with_variable_of(named: Named, other: Named) -> Named:
    """Return `f(t) = t + 1` as `f(x) = x + 1` if the other function is `f(x)`."""
    mine, its = (re.fullmatch(r"([A-Za-z])\(([a-z])\)", one.name) for one in (named, other))
    if mine is None or its is None or mine[1] != its[1] or mine[2] == its[2] or not isinstance(other.value, Expression | Quantity):
        return other
    if isinstance(other.value, Quantity):
        return Named(named.name, other.value)
    latex = re.sub(rf"(?<![a-zA-Z\\]){its[2]}(?![a-zA-Z])", mine[2], other.value.latex)
    return Named(named.name, Expression(latex, other.value.unit))


def _quantities(first: Quantity, second: Quantity) -> bool:
    if first.percent or second.percent:
        return _percentages(first, second)
    if _units.NONE in (first.unit, second.unit):
        return first.value == second.value and not (first.compound or second.compound)
    return first.unit.agrees(second.unit) and first.value * first.unit.size == second.value * second.unit.size


def _percentages(first: Quantity, second: Quantity) -> bool:
    """A bare number below 1 is a share, above 1 a number of percent; at 1 it may be either: 50% is 0.5 and 50, 0.5% is not 0.5."""
    if first.percent and second.percent:
        return first.value == second.value
    percent, bare = (first, second) if first.percent else (second, first)
    if bare.unit.powers:
        return False
    return (abs(bare.value) >= 1 and bare.unit == _units.NONE and bare.value == percent.value) or (
        abs(bare.value) <= 1 and bare.value * 100 == percent.value
    )


def _units_agree(first: _units.Unit, second: _units.Unit) -> bool:
    return _units.NONE in (first, second) or (first.agrees(second) and first.size == second.size)


def _hours_agree(first: Clock, second: Clock) -> bool:
    if (first.half is None) == (second.half is None):
        return first.half == second.half and first.minutes == second.minutes
    half, bare = (first, second) if first.half else (second, first)
    full = half.minutes % 720 + (720 if half.half == "p" else 0)
    return bare.minutes == full or bare.minutes == half.minutes


def _inequality(interval: Interval) -> str | None:
    """Return `x < 5` for an interval that has one end."""
    name = interval.name or "x"
    if isinstance(interval.low, Quantity | Expression) and interval.high is None:
        return f"{name} {'>=' if interval.has_low else '>'} {_latex(interval.low)}"
    if isinstance(interval.high, Quantity | Expression) and interval.low is None:
        return f"{name} {'<=' if interval.has_high else '<'} {_latex(interval.high)}"
    return None


def _latex(value: Value) -> str:
    if isinstance(value, Quantity):
        above, below = value.value.numerator, value.value.denominator
        return str(above) if below == 1 else rf"\frac{{{above}}}{{{below}}}"
    return value.latex if isinstance(value, Expression) else ""
