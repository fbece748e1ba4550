"""Dates and times of day."""

import re
from fractions import Fraction

from verl.rewards._value import Clock, Ratio, Value, Words

_MONTHS = "january february march april may june july august september october november december".split()
_MONTH = "|".join(rf"{month}|{month[:3]}\.?" for month in _MONTHS) + r"|sept\.?"
_CLOCK = re.compile(r"([01]?[0-9]|2[0-4]):([0-5][0-9])(?::([0-5][0-9]))? ?(?:([ap])\.? ?m\.?)?(?: ?(?:o'clock|hours))?", re.IGNORECASE)
_HOUR = re.compile(r"(1[0-2]|0?[1-9]) ?(?:o'clock ?)?([ap])\.? ?m\.?", re.IGNORECASE)
_DATES = (
    re.compile(rf"(?P<month>{_MONTH}) (?P<day>[0-3]?[0-9])(?:st|nd|rd|th)?(?:,? (?P<year>[0-9]{{4}}))?", re.IGNORECASE),
    re.compile(rf"(?P<day>[0-3]?[0-9])(?:st|nd|rd|th)?(?: of)? (?P<month>{_MONTH})(?:,? (?P<year>[0-9]{{4}}))?", re.IGNORECASE),
    re.compile(r"(?P<year>[0-9]{4})[-/.](?P<month>[01]?[0-9])[-/.](?P<day>[0-3]?[0-9])"),
    re.compile(r"(?P<month>0?[1-9]|1[0-2])[-/](?P<day>[0-3]?[0-9])[-/](?P<year>[0-9]{4})"),  # 12/25/2020
    re.compile(r"(?P<day>[0-3]?[0-9])[-/.](?P<month>0?[1-9]|1[0-2])[-/.](?P<year>[0-9]{4})"),  # 25/12/2020, 25.12.2020
)
_NUMERIC_DATE = re.compile(r"[0-9]{1,4}[/.-][0-9]{1,2}[/.-][0-9]{2,4}")


def date(text: str, depth: int) -> Value | None:
    """Return a date in one spelling, or None. `depth` is not used: see `verl.rewards._reading`."""
    for pattern in _DATES:
        match = pattern.fullmatch(text)
        if match:
            month = match["month"].casefold()
            number_of_month = int(month) if month.isdigit() else next(i for i, name in enumerate(_MONTHS, 1) if name.startswith(month[:3]))
            return Words(f"date {match['year'] or ''}-{number_of_month}-{int(match['day'])}")
    return Words(f"date {text}") if _NUMERIC_DATE.fullmatch(text) else None


def clock(text: str, depth: int) -> Value | None:
    """Return a time of day, such as `6:30 pm`, or None."""
    match = _CLOCK.fullmatch(text)
    if match:
        hour, minute, second = int(match[1]), int(match[2]), int(match[3] or 0)
        ratio = Ratio(tuple(Fraction(part) for part in match.groups()[:3] if part)) if (minute or second) and not match[4] else None
        return Clock(60 * hour + minute + Fraction(second, 60), match[4] and match[4].casefold(), ratio)
    if text.casefold() in ("noon", "midnight"):
        return Clock(Fraction(720), "p" if text.casefold() == "noon" else "a", None)
    match = _HOUR.fullmatch(text)
    return Clock(Fraction(60 * int(match[1])), match[2].casefold(), None) if match else None
