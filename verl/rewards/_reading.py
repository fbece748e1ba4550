r"""Reading of what an answer says, from its text.

Reading takes time in proportion to the length of the text and evaluates nothing: `9^{9^9}` is an expression, which another process
compares.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache

from verl.rewards._brackets import depths, is_one_group, parts_of_bracket, split
from verl.rewards._decoration import BEGINS_A_NUMBER, LONGEST, about, unwrapped
from verl.rewards._numbers import number
from verl.rewards._quantity import NO_UNIT, quantity, quantity_in_one_unit, sum_of_units
from verl.rewards._region import region
from verl.rewards._spelling import plain
from verl.rewards._times import clock, date
from verl.rewards._units import unit
from verl.rewards._value import Choice, Clock, Expression, Interval, Named, Quantity, Ratio, Several, Unlike, Value, Words

DEEPEST = 6  # lists in lists
_SAME_WORDS = {
    "n/a": "n/a",
    "dne": "does not exist", "doesn't exist": "does not exist", "undefined": "does not exist",
    "oo": "∞", "+∞": "∞", "infinity": "∞", "+oo": "∞", "positive infinity": "∞", "inf": "∞", "-oo": "-∞",
    "negative infinity": "-∞", "- ∞": "-∞",
    "-infinity": "-∞", "-inf": "-∞",
    "no solution": "∅", "no solutions": "∅", "no real solution": "∅", "no real solutions": "∅", "no real roots": "∅", "no roots": "∅",
    r"\mathbb{z}": "integers", "all integers": "integers", "the integers": "integers",
    "无解": "∅", "不存在": "does not exist",
    "infinite": "∞", "infinitely many": "∞", "infinitely many solutions": "∞", "empty set": "∅", "the empty set": "∅",
    r"\{\}": "∅", r"\{ \}": "∅", "none": "∅",
}  # fmt: skip
_IT = re.compile("^(?:it|they|the limit|there (?:is|are)) ")
_VERDICT = re.compile(r"(yes|no|true|false)(?:[,.:;!]?$|[,.:;!](?= ))")
_ALL_NUMBERS = {
    "all real numbers",
    "all reals",
    r"\mathbb{r}",
    "all real x",
    "the real numbers",
    "全体实数",
    "(-∞,∞)",
    "(-∞, ∞)",
    "(-∞,+∞)",
    "(-∞, +∞)",
}
_HALF_LINES = {  # of positive numbers and the like
    names: Interval(low, high, closed, closed)
    for low, high, closed, all_names in (
        (
            Quantity(Fraction(0)),
            None,
            False,
            r"\mathbb{r}^+|\mathbb{r}^{+}|\mathbb{r}_{>0}|all positive real numbers|positive real numbers|all positive reals",
        ),
        (
            None,
            Quantity(Fraction(0)),
            False,
            r"\mathbb{r}^-|\mathbb{r}^{-}|\mathbb{r}_{<0}|all negative real numbers|negative real numbers",
        ),
        (Quantity(Fraction(0)), None, True, r"\mathbb{r}_{>=0}|all nonnegative real numbers|all non-negative real numbers"),
    )
    for names in all_names.split("|")
}
# All numbers but some: `all real numbers except 2`, `\mathbb{R} - \{2\}`.
_ALL_BUT = re.compile(
    r"(?:[a-z] ?∈ ?)?(?:\\mathbb\{R\}|all real (?:numbers|values)(?: of)?|all reals|all)(?: [a-z])?"
    r"(?: ?(?:\\|-) ?(?=\\\{)|,? (?:except|but|other than)(?: for)? (?:when )?)(.+)",
    re.IGNORECASE,
)
_LOWEST = re.compile(r"(?:at least|no less than|not less than|no fewer than|a minimum of|minimum) ", re.IGNORECASE)
_HIGHEST = re.compile(r"(?:at most|no more than|not more than|no greater than|up to|a maximum of|maximum) ", re.IGNORECASE)
_ABOVE = re.compile(r"(?:more than|greater than|larger than|over|above|exceeds) ", re.IGNORECASE)
_BELOW = re.compile(r"(?:less than|fewer than|smaller than|under|below) ", re.IGNORECASE)
_NOT = re.compile(r"(?:not|isn't|is not|not equal to|anything but|except) ", re.IGNORECASE)
_BOTH = re.compile(r"^both ", re.IGNORECASE)
_OR_MORE = re.compile(r"(.+?)(?: ?\+| (?:or|and) (?:more|greater|above|higher|larger|over|up))", re.IGNORECASE)
_OR_LESS = re.compile(r"(.+?) (?:or|and) (?:less|fewer|below|lower|smaller|under)", re.IGNORECASE)
_BOUNDS = ((_LOWEST, ">="), (_HIGHEST, "<="), (_ABOVE, ">"), (_BELOW, "<"), (_NOT, "!="))
_CHOICE = re.compile(r"\(?([A-Z])\)?[.:)]?|\[([A-Z])\]")
# `(A) and (B)` is a list, `(a) - 5` a difference
_CHOICE_WITH_CONTENT = re.compile(
    r"(?:\(([A-Z])\)[.:]?|([A-Z])[.):](?= )|([A-E]) (?=\(.+\)$)|(?:[Pp]art )?\(?([a-h])\)[.:]? "
    + BEGINS_A_NUMBER
    + r")\s*(?!(?:and|or)\b|[,;&/])(\S.*)"
)
_RATIO = re.compile(r"([^:]+)(?::| to | out of | in (?:every )?)([^:]+?)(?::([^:]+))?")
_RELATION = re.compile(r"<=|>=|!=|[=<>≈∈∉≡]")
_SWAPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_DISTANCE = re.compile(r"\| ?([a-z]) ?([-+] ?[^|]+?)? ?\|")  # |x - 1|
_SYMBOL = r"(?:\\[a-zA-Z]+|[A-Za-z])(?: ?_ ?(?:\{[^{}]*\}|[A-Za-z0-9]))?'*"
_NAME = re.compile(
    rf"{_SYMBOL}(?: ?\^ ?\{{? ?-1 ?\}}?)?(?: ?\([A-Za-z0-9+, -]+\))?|\|(?:[A-Z]{{1,2}}|[a-wz])\||[A-Z]{{2,4}}|"
    rf"(?:m ?\\angle|\\angle|\\triangle) ?[A-Z]{{1,4}}|\\overline ?\{{[A-Z]{{2}}\}}|\\frac\{{d[a-zA-Z]?\}}\{{d[a-z]\}}|"
    rf"\( ?{_SYMBOL}(?: ?, ?{_SYMBOL})* ?\)|"
    rf"\\frac\{{[A-Z]{{1,3}}\}}\{{[A-Z]{{1,3}}\}}|{_SYMBOL} ?[:/] ?{_SYMBOL}|\[[A-Z]+\]"
)
_WORD_NAME = re.compile(r"[a-zA-Z]{2}[a-zA-Z_'-]*(?: (?:\\(?:triangle|angle) ?)?[a-zA-Z]+)*")
_ARITHMETIC = re.compile(r"(?:[-+*/(). 0-9]|(?:(?<=[0-9])|(?<=[0-9] ))x(?= ?[0-9])|\\times|\\cdot)+")
_VARIABLE = re.compile("(?!(?<![a-zA-Z])[ie](?![a-zA-Z]))[a-zA-Z]")  # any letter but e and i alone
_TIMES_SIGN = re.compile(r"(?<=[0-9]) ?x ?(?=[0-9])")
_COMMAND = re.compile(
    r"\\[a-zA-Z]+|(?<![a-zA-Z])(?:arc)?(?:sin|cos|tan|cot|sec|csc|ln|log|exp|max|min|gcd|lcm|sqrt|abs|det|mod)h?(?![a-zA-Z])"
)
_TEXT = re.compile(r"[a-zA-Z]{4,}|[0-9] ?['_]|\?|\\ldots|\.\.\.|(?<![_^0-9])[0-9]+ [0-9]|^[-+*/^_]$|[-+*/^_=]\s*$|^\s*[*/^_]|!!!")
_MATRIX = re.compile(r"\\begin ?\{[pb]?matrix\}(.*)\\end ?\{[pb]?matrix\}")
_WITH_UNIT = re.compile(r"(.*?[\d})a-z]) ((?:square |cubic )?[a-zA-Z]{2,}(?: ?\^ ?\{?[23]\}?)?(?: ?(?:per |/ ?)[a-zA-Z]+)?)\.?")
_SENTENCE = re.compile(
    r"([A-Za-z][^=<>0-9]{0,80})(?: (?:(?:will|can|could|would|should|must|needs? to|has to|have to|had to) [a-z]+|is|are|was|were|equals|"
    r"has|have|had|gets?|got|makes?|made|earns?|pays?|paid|spends?|spent|costs?|needs?|takes?|took|sells?|sold|ate|bought|gave|ran|drove|"
    r"left|kept|found|lost|won|sent|drank|wrote|caught|brought|(?!does )[a-z]{2,}(?:ed|s)|read)(?: (?:him|her|them|us|me|you))?|"
    r"(?<=[A-Za-z]{2}):|(?<=^[a-z]):) (?:equal to )?(.+)"
)
_SAYS_WHAT = re.compile(r" (?:is|are|was|were) $")  # `the triangle is isosceles`
_NEGATION = re.compile(r"\b(?:not|never|cannot|nobody|none)\b|n't\b", re.IGNORECASE)
_ONLY_LETTERS = re.compile(r"[^\W\d_]{2,}(?:[ '-]+[^\W\d_]+)*|[^\W\d_](?:[ '-]+[^\W\d_]{2,})+")


def read(text: str) -> Value | None:
    """Return what a text says, None if it says nothing. The text is an answer alone, see verl.rewards._statement."""
    shown = plain(text[: 4 * LONGEST]) if len(text) <= 4 * LONGEST else text
    if len(shown) > LONGEST:
        return Words(shown)
    return _read(unwrapped(shown), 0)


@lru_cache(maxsize=4096)
def _read(text: str, depth: int) -> Value | None:
    text = about(text)
    if not text:
        return None
    if depth > DEEPEST:
        return Words(_canonical(text))
    return next((value for reading in _READINGS if (value := reading(text, depth)) is not None), None)


def _known_words(text: str, depth: int) -> Value | None:
    folded = _IT.sub("", text.casefold())
    if folded in ("∞", "-∞", "∅"):
        return Words(folded)
    if folded in _ALL_NUMBERS:
        return Interval(None, None, False, False)
    if folded in _HALF_LINES:
        return _HALF_LINES[folded]
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


def _all_but(text: str, depth: int) -> Value | None:
    """Read `\\mathbb{R} \\setminus [1,2]`, `(0,2) \\setminus \\{1\\}`, `all real numbers except 2`."""
    match = _ALL_BUT.fullmatch(text)
    whole, sign, rest = ("", "", match[1]) if match else text.partition(r"\setminus")
    if "=" in whole:
        return None
    without = _read(rest.strip(), depth + 1) if match or sign else None
    if without is None:
        return None
    others = Unlike(_value_of(without))
    within = _read(whole.strip(), depth + 1) if sign else None
    return others if within is None or within == Interval(None, None, False, False) else Several("all", (within, others))


def _choice(text: str, depth: int) -> Value | None:
    match = _CHOICE.fullmatch(text)
    if match:
        return Choice(match[1] or match[2])
    match = _CHOICE_WITH_CONTENT.fullmatch(text)
    content = _read(match[5], depth + 1) if match else None
    if match is None or isinstance(content, Choice):  # `(A)(B)` is no choice
        return None
    return Choice((match[1] or match[2] or match[3] or match[4]).upper(), content)


def _ratio(text: str, depth: int) -> Value | None:
    match = _RATIO.fullmatch(text)
    parts = [part.strip() for part in match.groups() if part] if match else []
    numbers = [number(part) for part in parts]
    if (
        len(parts) == 2
        and None in numbers
        and not any(re.search("[a-zA-Z]", _COMMAND.sub("", part)) or not _is_formula(part) for part in parts)
    ):
        return Expression(rf"\frac{{{parts[0]}}}{{{parts[1]}}}")  # `1:\sqrt{2}`
    return Ratio(tuple(part for part in numbers if part is not None)) if parts and None not in numbers else None


def _read_quantity(text: str, depth: int) -> Value | None:
    return quantity(text)


def vector(latex: str) -> Several | None:
    """Return the tuple of a matrix that is one column or one row."""
    match = _MATRIX.fullmatch(latex)
    rows = match[1].strip().removesuffix(r"\\").split(r"\\") if match else []
    columns = rows[0].split("&") if len(rows) == 1 else []
    parts = columns or [row for row in rows if "&" not in row]
    items = [_read(part.strip(), 1) for part in parts] if len(parts) == max(len(rows), len(columns)) else []
    return Several("tuple", tuple(item for item in items if item is not None)) if len(items) > 1 and None not in items else None


def _point(text: str, depth: int) -> Value | None:
    """Read `A(1,2)`."""
    coordinates = _bracketed(text[1:], depth) if re.match(r"[A-Z]\(", text) else None
    return Named(text[0], coordinates) if isinstance(coordinates, Several) and coordinates.kind == "tuple" else None


def _several(text: str, depth: int) -> Value | None:
    """Read `1, 2 and 3`, `x=1 or x=2`, `[0,1) ∪ {2}`; `1,000` is a number."""
    parts, separators = split(_BOTH.sub("", text))
    if len(parts) < 2:
        return None
    union = any(separator in ("∪",) for separator in separators)
    if not union and (value := number(text)) is not None:
        is_open = re.fullmatch("[-+]?[1-9][0-9]*,[0-9]+|.* and [0-9].*", text) and not _grouped(text)  # `1,5`, `1 and 1/2`
        return _listed(parts, depth, Quantity(value)) if is_open else Quantity(value)
    if not union and (whole := quantity_in_one_unit(text) or sum_of_units(text)):
        return whole
    if not union and isinstance(stated := _sentence(text, depth), Named) and isinstance(stated.value, Quantity):
        return stated  # `Ann sold 5 clips in April and May`
    if union:
        items = [_read(unwrapped(part), depth + 1) for part in split(text, "∪")[0]]
        return Several("union", tuple(item for item in items if item is not None))
    if conditions := _conditions(parts, set(separators), depth):
        return conditions
    if {"∧", "∨"} & set(separators) and not all(map(_RELATION.search, parts)):  # `p ∧ q`
        return None
    if set(separators) == {",", "or"} and len(either := split(text, "or")[0]) < len(parts):  # `x=1, y=2 or x=2, y=1`
        return _listed(either, depth, None) if all("=" in part for part in parts) else _listed(parts, depth, None)
    return (
        _listed(parts, depth, None, set(separators) == {"or"} and len(set(parts)) > 1)
        if ";" not in separators or set(separators) == {";"}
        else _grouped_list(text, depth)
    )


def _conditions(parts: list[str], separators: set[str], depth: int) -> Value | None:
    """Read `x > 0 and x != 1` and `x < 1 or x > 2`: conditions for one variable. Behind a comma they hold together if they can."""
    items = tuple(item for part in parts if isinstance(item := _read(unwrapped(part), depth + 1), Interval | Unlike) and item.name)
    if len(items) < len(parts) or len({item.name for item in items}) > 1:
        return None
    if separators <= {"or", "∨", "或", "或者"}:
        return Several("union", items)
    together = Several("all", items)
    if "," in separators and not region(together):
        return None
    return _between(*items) or together if len(items) == 2 else together


def _between(first: Value, second: Value) -> Interval | None:
    """Return `0 < x < 2` for `x > 0` and `x < 2`."""
    if not (isinstance(first, Interval) and isinstance(second, Interval)):
        return None
    if first.low is None and second.high is None:
        first, second = second, first
    if first.high is not None or second.low is not None:
        return None
    return Interval(first.low, second.high, first.has_low, second.has_high, first.name)


def _grouped(text: str) -> bool:
    return re.fullmatch("[-+]?[0-9]{1,3}(,[0-9]{3})+", text) is not None


def _grouped_list(text: str, depth: int) -> Value | None:
    """Read `p=5, q=2; p=7, q=2`: a list of tuples."""
    return _listed(split(text, ";")[0], depth, None)


def _listed(parts: list[str], depth: int, decimal: Quantity | None, is_either: bool = False) -> Value | None:
    items = [item for part in parts if (item := _read(unwrapped(part), depth + 1)) is not None]
    if (
        is_either
        and len({item.share for item in items if isinstance(item, Quantity)}) == 1
        and all(isinstance(item, Quantity) for item in items)
    ):
        return items[0]  # `3/5 or 60%`
    if len(items) < 2:
        return items[0] if items else None
    items = [Several("tuple", tuple(_value_of(one) for one in item.items)) if _is_assignment_list(item) else item for item in items]  # type: ignore[union-attr]
    flat = [one for item in items for one in _flat(item)]
    if isinstance(flat[0], Named) and not any(isinstance(item, Named) for item in flat[1:]):  # `n=1,2,3`
        return Named(flat[0].name, Several("list", (flat[0].value, *flat[1:])))
    if isinstance(flat[0], Unlike) and all(isinstance(item, Quantity | Expression) for item in flat[1:]):  # `x != 1, 2`
        return Unlike(Several("list", (flat[0].value, *flat[1:])), flat[0].name)
    return Several("list", tuple(flat), decimal)


def _flat(item: Value) -> tuple[Value, ...]:
    """Return the items of a list, such as those of `x = \\pm 1`."""
    if isinstance(item, Named) and isinstance(item.value, Several) and item.value.kind == "list":
        return tuple(Named(item.name, one) for one in item.value.items)
    return item.items if isinstance(item, Several) and item.kind == "list" else (item,)


def _is_assignment_list(item: Value) -> bool:
    return isinstance(item, Several) and item.kind == "list" and all(isinstance(one, Named) for one in item.items)


def _value_of(item: Value) -> Value:
    return item.value if isinstance(item, Named) else item


def _bracketed(text: str, depth: int) -> Value | None:
    """Read `(1,2)`, `[0,1)`, `\\{1,2\\}`, `(5)`."""
    if "±" in text and not text.startswith(r"\{"):  # `(\pm 2, 0)` are two points
        return None
    braces = text.startswith(r"\{") and text.endswith(r"\}")
    begin, end, inner = (r"\{", r"\}", text[2:-2]) if braces else (text[:1], text[-1:], text[1:-1])
    if (not braces and (begin not in "([]" or end not in ")][" or len(text) < 3)) or not is_one_group(text, braces):
        return None
    inner = inner.strip()
    parts = parts_of_bracket(inner)
    if len(parts) == 1:
        return _single_in_bracket(begin, inner, depth)
    items = tuple(item for part in parts if (item := _read(unwrapped(part), depth + 1)) is not None)
    if len(items) != len(parts):
        return None
    if braces:
        return Several("set", tuple(one for item in items for one in _flat(item)))
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
    return _related(parts, ["=" if sign in "≈≡" else sign for sign in signs], text, depth)


def _related(parts: list[str], signs: list[str], text: str, depth: int) -> Value | None:
    if signs[0] == "∈" and len(signs) == 1:
        return _read(parts[1], depth + 1)
    if signs == ["∉"] and _is_name(parts[0]):
        return _bound("!=", _read(parts[1], depth + 1), _name(parts[0]))
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
    distance = _DISTANCE.fullmatch(left)
    if distance and isinstance(size := _read(right, depth + 1), Quantity) and (center := number(distance[2] or "0")) is not None:
        return _near(distance[1], -center, sign, size)
    of_right = _bound(_SWAPPED.get(sign, sign), _read(left, depth + 1), _name(right)) if left and _is_name(right) else None
    if not left or _is_name(left):
        of_left = _bound(sign, _read(right, depth + 1), _name(left) if left else None)
        return replace(of_left, swapped=of_right) if isinstance(of_left, Interval | Unlike) else of_left
    return of_right or _expression(text, depth)


def _near(name: str, center: Fraction, sign: str, size: Quantity) -> Value:
    """Return the numbers whose distance from a center is below or above a size: `|x - 1| < 2` is `-1 < x < 3`."""
    low, high = (replace(size, value=center + distance) for distance in (-size.value, size.value))
    if sign == "!=":
        return Unlike(Several("list", (low, high)), name)
    closed = sign.endswith("=")
    if sign[0] == "<":
        return Interval(low, high, closed, closed, name)
    return Several("union", (Interval(None, low, False, closed, name), Interval(high, None, closed, False, name)))


def _equation(parts: list[str], text: str, depth: int) -> Value | None:
    first, last = parts[0], parts[-1]
    if not first:  # `= 5`
        return _read(last, depth + 1)
    terms = re.sub("[a-zA-Z]{3,}", "", first) if re.search("[0-9]", first) else first  # `13 weeks x 7 days`
    if not _VARIABLE.search(_COMMAND.sub("", _TIMES_SIGN.sub("", re.sub(" {2,}", " ", terms)))) and isinstance(
        result := _read(last, depth + 1), Quantity
    ):
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
    return re.sub(r"[ {}]|m ?(?=\\angle)", "", text)


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
        return Expression(text) if _is_formula(text[: text.index(r"\begin")] + "1") else None
    with_unit = _WITH_UNIT.fullmatch(text)
    if with_unit and _is_formula(with_unit[1]) and not NO_UNIT.search(with_unit[2]) and (found := unit(with_unit[2])):
        return Expression(with_unit[1], found)
    return Expression(text) if _is_formula(text) else None


def _is_formula(text: str) -> bool:
    return r"\ldots" not in text and not _TEXT.search(_COMMAND.sub("□", text))


def _sentence(text: str, depth: int) -> Value | None:
    """Read `the largest n is 34`."""
    match = _SENTENCE.fullmatch(text)
    if match and _NEGATION.search(match[1]):  # `Ann has not sold 5`
        return None
    value = _read(unwrapped(match[2]), depth + 1) if match else None
    if match is None or value is None or (isinstance(value, Words) and not _SAYS_WHAT.search(text[: match.start(2)])):
        return None
    return Named(_name(match[1]), value)


def _words(text: str, depth: int) -> Value | None:
    return Words(_canonical(text))


def _canonical(text: str) -> str:
    return re.sub(
        r"^(?:it |they |there (?:is|are) )?(?:on |in |at )?(?:the |an? )?(?=\S{2})",
        "",
        re.sub(r"\s+", " ", text.casefold()).strip(" .,;:!'\""),
    ).removesuffix(" only")


_READINGS: tuple[Callable[[str, int], Value | None], ...] = (
    _known_words, _all_but, _bounded, _choice, date, clock, _bracketed, _point, _several, _relation, _plus_or_minus,
    _read_quantity, _ratio, _sentence, _expression, _words,
)  # fmt: skip
