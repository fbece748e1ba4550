"""Reading of numbers with their units: `$5`, `50%`, `1.5 million dollars`, `5 ft 3 in`, `twelve apples`."""

import re
from fractions import Fraction

from verl.rewards import _numbers, _units
from verl.rewards._numbers import number
from verl.rewards._spelling import CURRENCY
from verl.rewards._units import Unit, unit
from verl.rewards._value import Quantity

_DECIMAL = r"(?:[0-9](?:[0-9,.]|[ '](?=[0-9]))*|\.[0-9]+)"
_HEAD = re.compile(
    rf"[-+]? ?(?:(?:[0-9]+ ?)?\\frac ?\{{[-+0-9 ]+\}} ?\{{[-+0-9 ]+\}}|[0-9]*\.[0-9]*\\overline ?\{{[0-9]+\}}|"
    rf"{_DECIMAL}(?: ?/ ?[-+]?[0-9]+)?(?: ?(?:\\times|\\cdot|\*|x) ?10 ?\^ ?(?:\{{ ?[-+]?[0-9]+ ?\}}|[-+]?[0-9]+)|"
    rf"[eE][-+]?[0-9]+(?![0-9a-zA-Z]))?|"
    rf"[零〇一二两兩三四五六七八九十百千万萬亿億]+)"
)
_SPELLED = re.compile(r"[a-z]+(?:[ -][a-z]+)*", re.IGNORECASE)
_MONEY = re.compile(rf"([-+]?) ?(?:US|USD|CA|AU|HK|A|C)? ?([{CURRENCY}€£¥₹₩₽]|USD|EUR|GBP|INR|CNY|RMB|Rs\.?)\s*([-+]?) ?(.*)")
_PERCENT = re.compile(r"\s*(?:%|percentage points?|percentage|percents?|per cent|pct\.?)\s*", re.IGNORECASE)
_TIMES = _numbers.MAGNITUDES | {
    "mn": 10**6, "bn": 10**9, "dozen": 12, "score": 20, "gross": 144, "lakh": 10**5, "crore": 10**7,
    "万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8,
}  # fmt: skip
_MAGNITUDE = re.compile(rf"\s*({'|'.join(_TIMES)})s?(?![a-zA-Z])", re.IGNORECASE)
_ANGLE = re.compile(r"([0-9]+)° ?([0-9]+)'(?: ?([0-9]+)(?:''|\"))?")  # 5° 30'
_PARTS = {"halves": 2, "thirds": 3, "fourths": 4, "fifths": 5, "sixths": 6, "sevenths": 7, "eighths": 8, "ninths": 9, "tenths": 10}
_PART = re.compile(rf" ({'|'.join(_PARTS)})(?![a-zA-Z-])")  # 5 halves
_MINUS = re.compile(r"^(?:minus|negative) (?=[0-9])", re.IGNORECASE)  # minus 7 degrees
_RATE = re.compile(r"([0-9][0-9.,]*) ?((?:per |/|an? ).*)")
_LETTERS = {"k": " thousand", "m": " million", "b": " billion"}
_LETTER = re.compile(r"(?<=[0-9]) ?([kmb])$", re.IGNORECASE)  # $9K
_DOUBT = re.compile(r"(?:or|and|to|not|maybe|possibly|perhaps|but|if|plus|minus|[-<>])(?![a-z])", re.IGNORECASE)
_UNIT_FRACTION = re.compile(r"\\frac ?\{ ?([a-zA-Z ]+?) ?\} ?\{ ?([a-zA-Z^ 0-9]+?) ?\}")
_DOLLARS = re.compile(rf"^{CURRENCY} ?([0-9]+)(?= and | [0-9])")  # $6 and 40 cents
_ORDINAL = re.compile(r"^(?:st|nd|rd|th)(?![a-z])")
_CALCULATION = re.compile(r"(?:[-+*/.,=0-9 ]|(?<=[0-9 ])x(?=[0-9 ])|\\times|\\cdot)*[-+*/x ](?:[-+*/.,=0-9 ])*[0-9]")  # 6 x 7
_AGAIN = re.compile(r"(.+?) ?\(([^()]+)\)|([^()]+?) \(([^()]+)\)( ?%| [a-zA-Z].*)")  # ten (10), 36 (6 x 6) apples
_OPERATOR = re.compile(r" ?([-+*/x]|\\times|\\cdot) ?")
_FEET = re.compile(r"([0-9][0-9.]*) ?' ?(?:([0-9][0-9.]*) ?(?:''|\"))?")  # 5'3''
_REMARK = re.compile(r"(.*?)\s*(?:\\p?mod ?\{|[\[(])([^\[\](){}]*)[\])}]")
NO_UNIT = re.compile(
    r"(?<![a-z])(?:or|not|factorial|squared|cubed|minus|divided|mod|modulo|"
    rf"percent|if|when|at least|at most|half|quarter|{'|'.join(_numbers.NUMBER_WORDS)})(?![a-z])",
    re.IGNORECASE,
)


def quantity(text: str) -> Quantity | None:
    """Return the number with its unit that a text in plain spelling is wholly, else None."""
    value = number(text)
    return (
        Quantity(value, is_fraction="/" in text or r"\frac" in text)
        if value is not None
        else quantity_in_one_unit(text) or sum_of_units(text) or _said_again(text)
    )


def _said_again(text: str) -> Quantity | None:
    """Read `ten (10)`, `36 (thirty-six) apples`, `36 (6 x 6) apples`: two quantities that are equal."""
    match = _AGAIN.fullmatch(text)
    if match is None:
        return None
    if match[1]:
        first, second = quantity_in_one_unit(match[1]), quantity_in_one_unit(match[2])
        return first if first and second and (first.value, first.percent) == (second.value, second.percent) else None
    whole, again = quantity_in_one_unit(match[3] + match[5]), match[4]
    parts = again.strip().removeprefix("=").split("=")  # `6 x 6 = 36`
    return whole if whole and all(_calculated(part.strip()) == whole.value for part in parts) else None


def _calculated(text: str) -> Fraction | None:
    """Return the value of a number or of a calculation such as `4 + 2 x 16`, without brackets."""
    if (value := number(text)) is not None or not _CALCULATION.fullmatch(text):
        return value
    first, *rest = _OPERATOR.split(text)
    terms = [number(first)]
    for sign, digits in zip(rest[::2], rest[1::2], strict=True):
        value, last = number(digits), terms[-1]
        if value is None or last is None or (sign == "/" and not value):
            return None
        if sign in "+-":
            terms.append(value if sign == "+" else -value)
        else:
            terms[-1] = last / value if sign == "/" else last * value
    return None if None in terms else sum((term for term in terms if term is not None), Fraction(0))


def quantity_in_one_unit(text: str) -> Quantity | None:
    text = _MINUS.sub("-", text)
    money = _MONEY.fullmatch(text)
    if money and (rate := _RATE.fullmatch(money[4])):  # `$12 per hour`
        return quantity_in_one_unit(f"{money[1] or money[3]}{rate[1]} {money[2]} {rate[2]}")
    if money:
        inner = quantity_in_one_unit(_LETTER.sub(lambda letter: _LETTERS[letter[1].casefold()], f"{money[1] or money[3]}{money[4]}"))
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
    if value < 1 and rest.startswith((" a ", " an ")):  # `1/2 an hour` is no speed
        rest = rest.replace(" a", " of a", 1)
    rest = _UNIT_FRACTION.sub(r"\1/\2", rest)
    if part := _PART.match(rest):
        value, rest = value / _PARTS[part[1]], rest[part.end() :]
    remark = _REMARK.fullmatch(rest)
    if remark and "mod" in rest:
        return Quantity(value, Unit(words=frozenset({f"mod {remark[2].removeprefix('mod').strip()}"})))
    is_apart = remark and (rest[0] == " " or remark[1].strip() or not remark[2].isascii())  # `2(x + abc)` is a product
    if remark and is_apart and _explains(remark[2], value, remark[1]):
        rest = remark[1]
    rest = _ORDINAL.sub("", rest)
    percent = _PERCENT.match(rest)
    if percent:
        rest = rest[percent.end() :]
    if NO_UNIT.search(rest) or (_starts_a_product(rest) and not percent):
        return None
    found = unit(rest.replace(r"\text", ""))
    return Quantity(value, found, percent is not None) if found is not None else None


def _explains(remark: str, value: Fraction, before: str) -> bool:
    """Whether a text in parentheses behind a number repeats it, gives its unit or says how it was found: `(6 x 7)`."""
    if number(remark) == value or _CALCULATION.fullmatch(remark):
        return True
    other = quantity(remark)
    if _DOUBT.match(remark) or (other and (not before.strip() or other.unit in (_units.NONE, unit(before)))):
        return False  # `46 (64)`; but in `46 cookies (23 per box)` the unit differs
    return unit(remark) not in (None, _units.NONE) or re.fullmatch(r"[^\\^]*[a-z]{3}[^\\^]*", remark) is not None


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
    if angle := _ANGLE.fullmatch(text):
        degrees, minutes, seconds = (Fraction(part or 0) for part in angle.groups())
        return Quantity(degrees + minutes / 60 + seconds / 3600, unit("°") or _units.NONE)
    text = _DOLLARS.sub(r"\1 dollars", text)
    feet = _FEET.fullmatch(text)
    text = f"{feet[1]} ft" + (f" {feet[2]} in" if feet[2] else "") if feet else text
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
