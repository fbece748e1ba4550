"""Reading of numbers with their units: `$5`, `50%`, `1.5 million dollars`, `5 ft 3 in`, `twelve apples`."""

import re
from fractions import Fraction

from verl.rewards import _numbers, _units
from verl.rewards._numbers import number
from verl.rewards._spelling import CURRENCY
from verl.rewards._units import Unit, unit
from verl.rewards._value import Quantity

_DECIMAL = r"(?:[0-9](?:[0-9,.']| (?=[0-9]))*|\.[0-9]+)"
_HEAD = re.compile(
    rf"[-+]? ?(?:(?:[0-9]+ ?)?\\frac ?\{{[-+0-9 ]+\}} ?\{{[-+0-9 ]+\}}|[0-9]*\.[0-9]*\\overline ?\{{[0-9]+\}}|"
    rf"{_DECIMAL}(?: ?/ ?[-+]?[0-9]+)?(?: ?(?:\\times|\\cdot|\*|x) ?10 ?\^ ?(?:\{{ ?[-+]?[0-9]+ ?\}}|[-+]?[0-9]+)|"
    rf"[eE][-+]?[0-9]+(?![0-9a-zA-Z]))?|"
    rf"[零〇一二两兩三四五六七八九十百千万萬亿億]+)"
)
_SPELLED = re.compile(r"[a-z]+(?:[ -][a-z]+)*", re.IGNORECASE)
_MONEY = re.compile(rf"([-+]?) ?(?:US|USD|CA|AU|HK|A|C)? ?([{CURRENCY}€£¥₹₩₽]|USD|EUR|GBP|INR|CNY|RMB|Rs\.?)\s*([-+]?) ?(.*)")
_PERCENT = re.compile(r"\s*(?:%|percentage points?|percentage|percents?|per cent|pct\.?)\s*", re.IGNORECASE)
_MAGNITUDE = re.compile(r"\s*(hundred|thousand|million|billion|trillion|mn|bn|dozens?|万|萬|亿|億)(?![a-zA-Z])", re.IGNORECASE)
_TIMES = _numbers.MAGNITUDES | {"mn": 10**6, "bn": 10**9, "dozen": 12, "dozens": 12, "万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
_ORDINAL = re.compile(r"^(?:st|nd|rd|th)(?![a-z])")
_REMARK = re.compile(r"(.*?)\s*(?:\\p?mod ?\{|\()([^(){}]*)[)}]")
NO_UNIT = re.compile(
    r"(?<![a-z])(?:or|and|not|factorial|squared|cubed|plus|minus|times|divided|over|to|than|mod|modulo|"
    r"percent|if|when|at least|at most|half|quarter)(?![a-z])",
    re.IGNORECASE,
)


def quantity(text: str) -> Quantity | None:
    """Return the number with its unit that a text in plain spelling is wholly, else None."""
    value = number(text)
    return Quantity(value) if value is not None else quantity_in_one_unit(text) or sum_of_units(text)


def quantity_in_one_unit(text: str) -> Quantity | None:
    money = _MONEY.fullmatch(text)
    if money:
        inner = quantity_in_one_unit(f"{money[1] or money[3]}{money[4]}")
        currency = unit(money[2])
        if inner is None or inner.percent or currency is None or (money[1] and money[3]):
            return None
        return _in_currency(inner, currency)
    head = _HEAD.match(text)
    if head is None:
        return _spelled(text)
    value = number(head[0].rstrip(" ,'"))
    rest = text[head.end() :] if head[0][-1:] != " " else " " + text[head.end() :]
    return _with_unit(value, rest) if value is not None else None


def _in_currency(inner: Quantity, currency: Unit) -> Quantity | None:
    if inner.unit in (_units.NONE, currency):
        return Quantity(inner.value, currency)
    if not inner.unit.powers or currency.powers[0][0] in dict(inner.unit.powers):  # `$5 dollars`, `$5 more`
        return Quantity(inner.value, Unit(inner.unit.powers or currency.powers, inner.unit.words, inner.unit.size))
    return Quantity(inner.value, Unit(tuple(sorted((*currency.powers, *inner.unit.powers))), inner.unit.words, inner.unit.size))


def _spelled(text: str) -> Quantity | None:
    """Read `twelve dollars`: as many words as make a number, and a unit."""
    if not _SPELLED.fullmatch(text):
        return None
    words = text.split(" ")
    for count in range(min(len(words), 12), 0, -1):
        value = number(" ".join(words[:count]))
        if value is not None:
            return _with_unit(value, " " + " ".join(words[count:]))
    return None


def _with_unit(value: Fraction, rest: str) -> Quantity | None:
    times = _MAGNITUDE.match(rest)
    if times:
        value, rest = value * _TIMES[times[1].casefold()], rest[times.end() :]
    remark = _REMARK.fullmatch(rest)
    if remark and (number(remark[2]) == value or "mod" in rest or (unit(remark[2]) is not None and remark[2].strip())):
        rest = remark[1]
    rest = _ORDINAL.sub("", rest)
    percent = _PERCENT.match(rest)
    if percent:
        rest = rest[percent.end() :]
    if NO_UNIT.search(rest) or (_starts_a_product(rest) and not percent):
        return None
    found = unit(rest.replace(r"\text", ""))
    return Quantity(value, found, percent is not None) if found is not None else None


def _starts_a_product(rest: str) -> bool:
    """Whether letters behind a number are variables and not a unit: `3x`, `3 x`, `2ab`; but `3 m`, `3cm` and `3 eggs` are units."""
    letters = re.match(r"( ?)([A-Za-z]+)(?![A-Za-z'])", rest)
    if letters is None:
        return False
    space, word = letters.groups()
    if len(word) == 1:
        return not (space and _units.is_known(word))
    return not space and len(word) < 4 and not _units.is_known(word)


def sum_of_units(text: str) -> Quantity | None:
    """Read `5 ft 3 in`, `2 hours and 30 minutes`: each unit is smaller than the one before; `3 cm and 4 cm` are two quantities."""
    parts = re.findall(r"([0-9][0-9.,/]*) ?([a-zA-Z]+)(?:,? and |, | |$)", text)
    if len(parts) < 2 or "".join(a + b for a, b in parts) != re.sub(r",? and |, | ", "", text):
        return None
    total, dimension, last = Fraction(0), None, None
    is_time = any(name == "h" for _, name in parts)  # `2h 30m`: no metres
    for digits, name in parts:
        size, of = number(digits), unit("min" if name == "m" and is_time else name)
        if size is None or of is None or not of.known or dimension not in (None, of.powers) or (last and of.size >= last):
            return None
        total, dimension, last = total + size * of.size, of.powers, of.size
    # A bare number of money is one of dollars, but one of a length may be of feet or inches.
    return Quantity(total, Unit(dimension or ()), compound=dimension != (("dollar", 1),))
