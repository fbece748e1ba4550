r"""Reading of what an answer says, from its text.

Reading takes time in proportion to the length of the text and evaluates nothing: `9^{9^9}` is an expression, which another process
compares.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

from verl.rewards._brackets import depths, is_one_group, parts_of_bracket, split
from verl.rewards._numbers import number
from verl.rewards._quantity import NO_UNIT, quantity, quantity_in_one_unit, sum_of_units
from verl.rewards._spelling import plain
from verl.rewards._units import unit
from verl.rewards._value import Choice, Clock, Expression, Interval, Named, Quantity, Ratio, Several, Unlike, Value, Words

LONGEST = 1000  # characters; what is longer is only compared as text
DEEPEST = 6  # lists in lists
_SAME_WORDS = {
    "n/a": "n/a",
    "dne": "does not exist", "doesn't exist": "does not exist", "undefined": "does not exist",
    "oo": "∞", "+∞": "∞", "infinity": "∞", "+oo": "∞", "positive infinity": "∞", "inf": "∞", "-oo": "-∞",
    "negative infinity": "-∞", "- ∞": "-∞",
    "-infinity": "-∞", "-inf": "-∞",
    "no solution": "∅", "no solutions": "∅", "no real solution": "∅", "no real solutions": "∅", "no real roots": "∅", "no roots": "∅",
    "infinite": "∞", "infinitely many": "∞", "infinitely many solutions": "∞", "empty set": "∅", "the empty set": "∅",
    r"\{\}": "∅", r"\{ \}": "∅", "none": "∅",
}  # fmt: skip
_VERDICT = re.compile(r"(yes|no|true|false)(?:[,.:;](?= )|$)")
_ALL_NUMBERS = {
    "all real numbers",
    "all reals",
    r"\mathbb{r}",
    "all real x",
    "the real numbers",
    "(-∞,∞)",
    "(-∞, ∞)",
    "(-∞,+∞)",
    "(-∞, +∞)",
}
_MONTHS = "january february march april may june july august september october november december".split()
_MONTH = "|".join(rf"{month}|{month[:3]}\.?" for month in _MONTHS) + r"|sept\.?"
_WRAPPERS = (("**", "**"), ("__", "__"), ("*", "*"), ("_", "_"), ("`", "`"), ('"', '"'), ("'", "'"), ("{", "}"), ("<answer>", "</answer>"))
_THEREFORE = re.compile(r"^(?:so|thus|hence|therefore|finally),? (?=\S)", re.IGNORECASE)
_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore|then)\b,? ?)?(?:the )?(?:(?:final|correct|right|best) )?(?:answer|result|solution|option|choice)s? ?"
    r"(?:(?:is|are|=|:|would be|should be)(?: ?:)? ?|(?=\(?[A-Z]\)?[.)]?$))(?:(?:the )?(?:option|choice|answer)s? )?",
    re.IGNORECASE,
)
_ABOUT = re.compile(
    r"(?:≈|~|大约|大約|约|約|about |nearly |almost |approximately |approx\.? |roughly |around |exactly |just |only |a total of )\s*",
    re.IGNORECASE,
)
_LOWEST = re.compile(r"(?:at least|no less than|not less than|no fewer than|a minimum of|minimum) ", re.IGNORECASE)
_HIGHEST = re.compile(r"(?:at most|no more than|not more than|no greater than|up to|a maximum of|maximum) ", re.IGNORECASE)
_ABOVE = re.compile(r"(?:more than|greater than|larger than|over|above|exceeds) ", re.IGNORECASE)
_BELOW = re.compile(r"(?:less than|fewer than|smaller than|under|below) ", re.IGNORECASE)
_NOT = re.compile(r"(?:not|isn't|is not|not equal to|anything but|except) ", re.IGNORECASE)
_OR_MORE = re.compile(r"(.+?)(?: ?\+| (?:or|and) (?:more|greater|above|higher|larger|over|up))", re.IGNORECASE)
_OR_LESS = re.compile(r"(.+?) (?:or|and) (?:less|fewer|below|lower|smaller|under)", re.IGNORECASE)
_BOUNDS = ((_LOWEST, ">="), (_HIGHEST, "<="), (_ABOVE, ">"), (_BELOW, "<"), (_NOT, "!="))
_CHOICE = re.compile(r"\(?([A-Z])\)?[.:)]?")
_CHOICE_WITH_CONTENT = re.compile(r"(?:\(([A-Z])\)[.:]?|([A-Z])[.):](?= ))\s*(?!(?:and|or)\b|[,;&/])(\S.*)")  # `(A) and (B)` is a list
_CLOCK = re.compile(r"([01]?[0-9]|2[0-4]):([0-5][0-9])(?::([0-5][0-9]))? ?(?:([ap])\.? ?m\.?)?(?: ?(?:o'clock|hours))?", re.IGNORECASE)
_HOUR = re.compile(r"(1[0-2]|0?[1-9]) ?(?:o'clock ?)?([ap])\.? ?m\.?", re.IGNORECASE)
_RATIO = re.compile(r"([^:]+)(?::| to | out of )([^:]+?)(?::([^:]+))?")
_DATES = (
    re.compile(rf"(?P<month>{_MONTH}) (?P<day>[0-3]?[0-9])(?:st|nd|rd|th)?(?:,? (?P<year>[0-9]{{4}}))?", re.IGNORECASE),
    re.compile(rf"(?P<day>[0-3]?[0-9])(?:st|nd|rd|th)?(?: of)? (?P<month>{_MONTH})(?:,? (?P<year>[0-9]{{4}}))?", re.IGNORECASE),
    re.compile(r"(?P<year>[0-9]{4})-(?P<month>[01]?[0-9])-(?P<day>[0-3]?[0-9])"),
)
_NUMERIC_DATE = re.compile(r"[0-9]{1,4}[/.-][0-9]{1,2}[/.-][0-9]{2,4}")
_RELATION = re.compile(r"<=|>=|!=|[=<>≈∈]")
_SYMBOL = r"(?:\\[a-zA-Z]+|[A-Za-z])(?: ?_ ?(?:\{[^{}]*\}|[A-Za-z0-9]))?'*"
_NAME = re.compile(
    rf"{_SYMBOL}(?: ?\([A-Za-z0-9+, -]+\))?|\|[A-Z]{{1,2}}\||(?:\\angle ?|m ?\\angle ?|\\triangle ?)?[A-Z]{{2,4}}|"
    rf"\( ?{_SYMBOL}(?: ?, ?{_SYMBOL})* ?\)|"
    rf"\\frac\{{[A-Z]{{1,3}}\}}\{{[A-Z]{{1,3}}\}}|{_SYMBOL} ?[:/] ?{_SYMBOL}|\[[A-Z]+\]"
)
_WORD_NAME = re.compile(r"[a-zA-Z]{2}[a-zA-Z_'-]*(?: [a-zA-Z]+)*")
_ARITHMETIC = re.compile(r"(?:[-+*/(). 0-9]|(?:(?<=[0-9])|(?<=[0-9] ))x(?= ?[0-9])|\\times|\\cdot)+")
_TIMES_SIGN = re.compile(r"(?<=[0-9]) ?x ?(?=[0-9])")
_COMMAND = re.compile(
    r"\\[a-zA-Z]+|(?<![a-zA-Z])(?:arc)?(?:sin|cos|tan|cot|sec|csc|ln|log|exp|max|min|gcd|lcm|sqrt|abs|det|mod)h?(?![a-zA-Z])"
)
_TEXT = re.compile(r"[a-zA-Z]{4,}|[0-9] ?['_]|\?|\\ldots|\.\.\.|(?<![_^0-9])[0-9]+ [0-9]|^[-+*/^_]$|[-+*/^_=]\s*$|^\s*[*/^_]|!!!")
_WITH_UNIT = re.compile(r"(.*[\d})a-z]) ((?:square |cubic )?[a-zA-Z]{2,}(?: ?\^ ?\{?[23]\}?)?(?: ?(?:per |/ ?)[a-zA-Z]+)?)\.?")
_SENTENCE = re.compile(
    r"([A-Za-z][^=<>0-9]{0,80}?)(?: (?:is|are|was|were|equals|has|have|had|gets?|got|makes?|made|"
    r"earns?|earned|pays?|paid|spends?|spent|costs?|"
    r"needs?|takes?|took|sells?|sold|will be|would be|should be|must be)|(?<=[A-Za-z]{2}):) (?:equal to )?(.+)"
)
_ONLY_LETTERS = re.compile(r"[^\W\d_]{2,}(?:[ '-]+[^\W\d_]+)*|[^\W\d_](?:[ '-]+[^\W\d_]{2,})+")


def read(text: str) -> Value | None:
    """Return what a text says, None if it says nothing. The text is an answer alone, see verl.rewards._statement."""
    shown = plain(text[: 4 * LONGEST]) if len(text) <= 4 * LONGEST else text
    if len(shown) > LONGEST:
        return Words(shown)
    return _read(_unwrapped(shown), 0)


def compact(text: str) -> str:
    """Return a text for comparison letter by letter: without spaces that mean nothing."""
    return re.sub(r"(?<![0-9]) +| +(?![0-9])", "", _unwrapped(plain(text)) if len(text) <= LONGEST else text)


def _unwrapped(text: str) -> str:
    """Remove decoration and what leads to an answer: `**The answer is: 12.**` is `12`."""
    before = None
    while before != text:
        before = text
        text = _THEREFORE.sub("", text.strip().rstrip("\\").strip(";:,").removesuffix("####").strip())
        text = text.rstrip(".") if not text.endswith("..") else text
        text = text.removeprefix("=").strip() if not text.startswith(("==", "=>")) else text
        text = text.removesuffix("**") if text.count("**") == 1 else text
        for begin, end in _WRAPPERS:
            if text.startswith(begin) and text.endswith(end) and len(text) > len(begin) + len(end) and _encloses(text, begin, end):
                text = text[len(begin) : -len(end)].strip()
        lead = _LEAD.match(text)
        text = text[lead.end() :] if lead and lead.end() < len(text) else text
    return text


def _encloses(text: str, begin: str, end: str) -> bool:
    """Whether the first mark is closed by the last one, and not by one between."""
    inner = text[len(begin) : -len(end)]
    if begin != "{":
        return begin not in inner
    depth = 1
    for character in re.sub(r"\\.", "  ", inner):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return False
    return depth == 1


@lru_cache(maxsize=4096)
def _read(text: str, depth: int) -> Value | None:
    text = _about(text)
    if not text:
        return None
    if depth > DEEPEST:
        return Words(_canonical(text))
    return next((value for reading in _READINGS if (value := reading(text, depth)) is not None), None)


def _about(text: str) -> str:
    match = _ABOUT.match(text)
    return text[match.end() :].strip() if match else text.strip()


def _known_words(text: str, depth: int) -> Value | None:
    folded = text.casefold()
    if folded in ("∞", "-∞", "∅"):
        return Words(folded)
    if folded in _ALL_NUMBERS:
        return Interval(None, None, False, False)
    verdict = _VERDICT.match(folded)
    return Words(verdict[1]) if verdict else Words(_SAME_WORDS[folded]) if folded in _SAME_WORDS else None


def _bounded(text: str, depth: int) -> Value | None:
    """Read `at least 5`, `5 or more`, `5+`, `not 5`."""
    for pattern, relation in _BOUNDS:
        match = pattern.match(text)
        if match:
            return _bound(relation, _read(text[match.end() :], depth + 1), None)
    for pattern, relation in ((_OR_MORE, ">="), (_OR_LESS, "<=")):
        match = pattern.fullmatch(text)
        if match and isinstance(value := _read(match[1], depth + 1), Quantity):
            return _bound(relation, value, None)
    return None


def _bound(relation: str, value: Value | None, name: str | None) -> Value | None:
    if value is None:
        return None
    if relation == "!=":
        return Unlike(value, name)
    if relation in ("<", "<="):
        return Interval(None, value, False, relation == "<=", name)
    return Interval(value, None, relation == ">=", False, name)


def _choice(text: str, depth: int) -> Value | None:
    match = _CHOICE.fullmatch(text)
    if match:
        return Choice(match[1])
    match = _CHOICE_WITH_CONTENT.fullmatch(text)
    return Choice(match[1] or match[2], _read(match[3], depth + 1)) if match else None


def _date(text: str, depth: int) -> Value | None:
    for pattern in _DATES:
        match = pattern.fullmatch(text)
        if match:
            month = match["month"].casefold()
            number_of_month = int(month) if month.isdigit() else next(i for i, name in enumerate(_MONTHS, 1) if name.startswith(month[:3]))
            return Words(f"date {match['year'] or ''}-{number_of_month}-{int(match['day'])}")
    return Words(f"date {text}") if _NUMERIC_DATE.fullmatch(text) else None


def _clock(text: str, depth: int) -> Value | None:
    match = _CLOCK.fullmatch(text)
    if match:
        hour, minute, second = int(match[1]), int(match[2]), int(match[3] or 0)
        ratio = Fraction(hour, minute) if minute and not match[3] and not match[4] else None
        return Clock(60 * hour + minute + Fraction(second, 60), match[4] and match[4].casefold(), ratio)
    if text.casefold() in ("noon", "midnight"):
        return Clock(Fraction(720), "p" if text.casefold() == "noon" else "a", None)
    match = _HOUR.fullmatch(text)
    return Clock(Fraction(60 * int(match[1])), match[2].casefold(), None) if match else None


def _ratio(text: str, depth: int) -> Value | None:
    match = _RATIO.fullmatch(text)
    parts = [number(part) for part in match.groups() if part] if match else []
    return Ratio(tuple(part for part in parts if part is not None)) if parts and None not in parts else None


def _read_quantity(text: str, depth: int) -> Value | None:
    return quantity(text)


def _several(text: str, depth: int) -> Value | None:
    """Read `1, 2 and 3`, `x=1 or x=2`, `[0,1) ∪ {2}`; `1,000` is a number."""
    parts, separators = split(text)
    if len(parts) < 2:
        return None
    union = any(separator in ("∪",) for separator in separators)
    if not union and (value := number(text)) is not None:
        return (
            Quantity(value)
            if not re.fullmatch("[-+]?[1-9][0-9]*,[0-9]+", text) or _grouped(text)
            else _listed(parts, depth, Quantity(value))
        )
    if not union and isinstance(whole := quantity_in_one_unit(text) or sum_of_units(text), Quantity):
        return whole
    if union:
        items = [_read(_unwrapped(part), depth + 1) for part in split(text, "∪")[0]]
        return Several("union", tuple(item for item in items if item is not None))
    return _listed(parts, depth, None) if ";" not in separators or set(separators) == {";"} else _grouped_list(text, depth)


def _grouped(text: str) -> bool:
    return re.fullmatch("[-+]?[0-9]{1,3}(,[0-9]{3})+", text) is not None


def _grouped_list(text: str, depth: int) -> Value | None:
    """Read `p=5, q=2; p=7, q=2`: a list of tuples."""
    return _listed(split(text, ";")[0], depth, None)


def _listed(parts: list[str], depth: int, decimal: Quantity | None) -> Value | None:
    items = [item for part in parts if (item := _read(_unwrapped(part), depth + 1)) is not None]
    if len(items) < 2:
        return items[0] if items else None
    items = [Several("tuple", tuple(_value_of(one) for one in item.items)) if _is_assignment_list(item) else item for item in items]  # type: ignore[union-attr]
    flat = [one for item in items for one in (item.items if isinstance(item, Several) and item.kind == "list" else (item,))]
    if isinstance(flat[0], Named) and not any(isinstance(item, Named) for item in flat[1:]):  # `n=1,2,3`
        return Named(flat[0].name, Several("list", (flat[0].value, *flat[1:])))
    return Several("list", tuple(flat), decimal)


def _is_assignment_list(item: Value) -> bool:
    return isinstance(item, Several) and item.kind == "list" and all(isinstance(one, Named) for one in item.items)


def _value_of(item: Value) -> Value:
    return item.value if isinstance(item, Named) else item


def _bracketed(text: str, depth: int) -> Value | None:
    """Read `(1,2)`, `[0,1)`, `\\{1,2\\}`, `(5)`."""
    braces = text.startswith(r"\{") and text.endswith(r"\}")
    begin, end, inner = (r"\{", r"\}", text[2:-2]) if braces else (text[:1], text[-1:], text[1:-1])
    if (not braces and (begin not in "([]" or end not in ")][" or len(text) < 3)) or not is_one_group(text, braces):
        return None
    inner = inner.strip()
    parts = parts_of_bracket(inner)
    if len(parts) == 1:
        return _single_in_bracket(begin, inner, depth)
    items = tuple(item for part in parts if (item := _read(_unwrapped(part), depth + 1)) is not None)
    if len(items) != len(parts):
        return None
    if braces:
        return Several(
            "set", tuple(one for item in items for one in (item.items if isinstance(item, Several) and item.kind == "list" else (item,)))
        )
    if (begin, end) == ("(", ")"):
        return Several("tuple", items)
    return (
        Interval(_end(items[0]), _end(items[1]), begin == "[", end == "]")
        if len(items) == 2
        else Several("tuple", items)
        if (begin, end) == ("[", "]")
        else None
    )


def _single_in_bracket(begin: str, inner: str, depth: int) -> Value | None:
    if begin == r"\{":
        builder = re.fullmatch(rf"{_SYMBOL}(?: ?∈ ?\\mathbb\{{[A-Z]\}})? ?(?:\||:) ?(.+)", inner)
        item = _read(builder[1] if builder else inner, depth + 1)
        if item is None or builder or isinstance(item, Interval):
            return item
        return Several("set", item.items if isinstance(item, Several) and item.kind == "list" else (item,))
    item = _read(inner, depth + 1) if begin in "([" and not re.fullmatch("[a-z]", inner) else None
    return item if isinstance(item, (Quantity, Named, Interval, Clock, Ratio)) else None


def _end(item: Value) -> Value | None:
    return None if item in (Words("∞"), Words("-∞")) else item


def _relation(text: str, depth: int) -> Value | None:
    """Read `x = 5`, `5 = x`, `x = 5+6 = 11`, `2 < x < 3`, `x ∈ (2,3)`, `x != 5`, `> 5`."""
    open_at = depths(text)
    found = [match for match in _RELATION.finditer(text) if open_at[match.start()] == 0]
    if not found:
        return None
    edges = [0, *(edge for match in found for edge in match.span()), len(text)]
    parts = [text[start:end].strip() for start, end in zip(edges[::2], edges[1::2], strict=True)]
    signs = [match[0] for match in found]
    if "" in parts[1:]:
        return Words(_canonical(text))
    if "≈" in signs[1:] or (signs[0] == "≈" and not _is_name(parts[0])):  # `1/3 ≈ 0.33` is 1/3
        cut = next(index for index, sign in enumerate(signs) if sign == "≈" and (index or not _is_name(parts[0])))
        parts, signs = parts[: cut + 1], signs[:cut]
        if not signs:
            return _read(parts[0], depth + 1)
    return _related(parts, ["=" if sign == "≈" else sign for sign in signs], text, depth)


def _related(parts: list[str], signs: list[str], text: str, depth: int) -> Value | None:
    if signs[0] == "∈" and len(signs) == 1:
        return _read(parts[1], depth + 1)
    if set(signs) == {"="}:
        return _equation(parts, text, depth)
    if len(signs) == 1:
        return _inequality(parts, signs[0], text, depth)
    rising, falling = set(signs) <= {"<", "<="}, set(signs) <= {">", ">="}
    if len(signs) == 2 and (rising or falling) and _is_name(parts[1]):
        ends = [_read(parts[0], depth + 1), _read(parts[2], depth + 1)]
        closed = [sign.endswith("=") for sign in signs]
        (low, high), (has_low, has_high) = (ends, closed) if rising else (ends[::-1], closed[::-1])
        if low is not None and high is not None:
            return Interval(_end(low), _end(high), has_low, has_high, _name(parts[1]))
    return _expression(text, depth)


def _inequality(parts: list[str], sign: str, text: str, depth: int) -> Value | None:
    left, right = parts
    if not left or _is_name(left):
        return _bound(sign, _read(right, depth + 1), _name(left) if left else None)
    if _is_name(right):
        return _bound({"<": ">", "<=": ">=", ">": "<", ">=": "<="}.get(sign, sign), _read(left, depth + 1), _name(right))
    return _expression(text, depth)


def _equation(parts: list[str], text: str, depth: int) -> Value | None:
    first, last = parts[0], parts[-1]
    if not first:  # `= 5`
        return _read(last, depth + 1)
    if not re.search("[a-zA-Z]", _COMMAND.sub("", _TIMES_SIGN.sub("", first))) and isinstance(result := _read(last, depth + 1), Quantity):
        return result  # `2 + 3 = 5`
    if isinstance(result := _read(first, depth + 1), Quantity) and _ARITHMETIC.fullmatch(last):
        return result  # `5 = 2 + 3`
    if _is_name(first):
        value = _read(last, depth + 1)
        return Named(_name(first), value) if value is not None else None
    if _is_name(last) and len(parts) == 2:  # `5 = x`
        value = _read(first, depth + 1)
        return Named(_name(last), value) if value is not None else None
    return _expression(text, depth)


def _is_name(text: str) -> bool:
    return len(text) <= 60 and (_NAME.fullmatch(text) or _WORD_NAME.fullmatch(text)) is not None


def _name(text: str) -> str:
    return re.sub(r"[ {}]|\\(?=angle|triangle)", "", text)


def _plus_or_minus(text: str, depth: int) -> Value | None:
    if "±" not in text or any(sign in text for sign in ("=", "<", ">")):
        return None
    both = (text.replace("±", "+").replace("∓", "-"), text.replace("±", "-").replace("∓", "+"))
    items = [_read(one.removeprefix("+").strip(), depth + 1) for one in both]
    return Several("list", tuple(item for item in items if item is not None))


def _expression(text: str, depth: int) -> Value | None:
    """Read LaTeX with an optional unit; None for words: letters are variables only where they stand alone or are part of a formula."""
    if text.count("{") != text.count("}") or (_ONLY_LETTERS.fullmatch(text) and not set(text) <= set("xyz")):
        return None
    if r"\begin" in text:
        return Expression(text) if _is_formula(text[: text.index(r"\begin")]) else None
    with_unit = _WITH_UNIT.fullmatch(text)
    if with_unit and _is_formula(with_unit[1]) and not NO_UNIT.search(with_unit[2]) and (found := unit(with_unit[2])):
        return Expression(with_unit[1], found)
    return Expression(text) if _is_formula(text) else None


def _is_formula(text: str) -> bool:
    return r"\ldots" not in text and not _TEXT.search(_COMMAND.sub("□", text))


def _sentence(text: str, depth: int) -> Value | None:
    """Read `the largest n is 34`."""
    match = _SENTENCE.fullmatch(text)
    value = _read(_unwrapped(match[2]), depth + 1) if match else None
    return Named(_name(match[1]), value) if match and value is not None and not isinstance(value, Words) else None


def _words(text: str, depth: int) -> Value | None:
    return Words(_canonical(text))


def _canonical(text: str) -> str:
    return re.sub(r"^(?:the|an?) (?=\S{2})", "", re.sub(r"\s+", " ", text.casefold()).strip(" .,;:!'\"")).removesuffix(" only")


_READINGS: tuple[Callable[[str, int], Value | None], ...] = (
    _known_words, _bounded, _choice, _date, _clock, _bracketed, _several, _relation, _plus_or_minus, _read_quantity, _ratio,
    _sentence, _expression, _words,
)  # fmt: skip
