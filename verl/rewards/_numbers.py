r"""Reading of plain numbers, exactly: `1,234.50`, `1 000`, `1.000,50`, `3/4`, `1 1/2`, `\frac{1}{2}`, `1.5e3`,
`0.\overline{3}`, `10_2`, `twelve`.

Nothing is rounded. Numbers of more than LARGEST_EXPONENT digits are not read.
"""

import re
from collections.abc import Callable
from fractions import Fraction

LARGEST_EXPONENT = 1000

_DIGITS = r"[0-9]+"
_GROUPED = (
    r"[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}|[1-9][0-9]{0,2}(?: [0-9]{3})+|"
    r"[0-9]{1,3}(?:'[0-9]{3})+|[1-9][0-9]{0,2}(?:_[0-9]{3})+"
)
_POINTED = re.compile(rf"(?:{_GROUPED}|{_DIGITS})?(?:\.([0-9]*))?")  # 1,234.50
_SPACED_WITH_COMMA = re.compile(r"([0-9]{1,3}(?:[. ][0-9]{3})+),([0-9]+)|([0-9]{1,3}(?:\.[0-9]{3}){2,})()")  # 1.000,50 and 1.000.000
_COMMA = re.compile(r"([0-9]+),([0-9]+)")  # 0,5
_FRACTION = re.compile(
    rf"(?:({_DIGITS}) ?(?= |\\))? ?"
    rf"(?:\\frac ?\{{ ?([-+]?) ?({_DIGITS}) ?\}} ?\{{ ?([-+]?) ?({_DIGITS}) ?\}}|({_DIGITS}) ?/ ?([-+]?)({_DIGITS}))"
)
_POWER = re.compile(
    r"(.+?) ?(?:[eE]([-+]?[0-9]+)|(?:\\times|\\cdot|\*|x) ?10 ?\^ ?(?:\{ ?([-+]?[0-9]+) ?\}|\(([-+]?[0-9]+)\)|([-+]?[0-9]+)))"
)
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*) ?\\(?:overline|bar|dot) ?\{? ?([0-9]+) ?\}?")
_IN_PARENTHESES = re.compile(r"([0-9]*)\.([0-9]*)\(([0-9]+)\)")  # 0.(3)
# `0.333...` and `0.4545...`: one digit stands three times, several stand twice
_GOING_ON = re.compile(r"([0-9]{0,20})\.([0-9]{0,20}?)([0-9](?=([0-9])\4)|[0-9]{2,12}?)\3+ ?(?:\\ldots ?|\.\.\.)")
_REMAINDER = re.compile(r"([0-9]{1,30}) ?(?:\\[bp]?mod|mod) ?\{? ?([1-9][0-9]{0,30}) ?\}?")  # 17 mod 5
_CHINESE_FRACTION = re.compile(r"(?:(.+)又)?(.+)分之(.+)")  # 三分之一
_BASED = re.compile(r"(?=\(.*\)|[^)]*$)\(?([0-9]+|[0-9A-F]{2,}(?=\)? ?_ ?\{? ?16))\)? ?_ ?(?:\{ ?([0-9]+|[a-z]+)(?: ten)? ?\}|([0-9]+))")
_SIGN = re.compile(r"([-+]|negative |minus ) ?(?![-+ ])", re.IGNORECASE)

_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_WORDS = {word: value for value, word in enumerate(_ONES.split())} | {
    word: 10 * value for value, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)
}
_BASES = {str(base): base for base in range(2, 37)} | {word: base for word, base in _WORDS.items() if 2 <= base <= 36}
NUMBER_WORDS = tuple(_WORDS)
MAGNITUDES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_FIXED = {
    "half": Fraction(1, 2),
    "a half": Fraction(1, 2),
    "one half": Fraction(1, 2),
    "a dozen": Fraction(12),
    "half a dozen": Fraction(6),
    "half a million": Fraction(500_000),
    "a hundred": Fraction(100),
    "a thousand": Fraction(1000),
    "a million": Fraction(10**6),
    "a billion": Fraction(10**9),
}
_PARTS = {"half": 2, "halve": 2, "quarter": 4} | {
    name: value for value, name in enumerate("third fourth fifth sixth seventh eighth ninth tenth".split(), 3)
}
_CHINESE = {character: value for value, character in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2, "兩": 2}
_CHINESE_PLACES = {"十": 10, "百": 100, "千": 1000}
_CHINESE_UNITS = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}


def number(text: str) -> Fraction | None:
    """Return the value of a text that is wholly one number, in the plain spelling of verl.rewards._spelling; else None."""
    text = text.strip()
    sign = _SIGN.match(text)
    size = _unsigned(text[sign.end() :] if sign else text)
    return -size if size is not None and sign and sign[1] != "+" else size


def _unsigned(text: str) -> Fraction | None:
    if not text or len(text) > LARGEST_EXPONENT:
        return None
    return next((value for read in _READINGS if (value := read(text)) is not None), None)


def _pointed(text: str) -> Fraction | None:
    match = _POINTED.fullmatch(text)
    if match is None or not any(character.isdigit() for character in text):
        return None
    if re.match(r"0,[0-9]", text):  # `0,125` has a decimal comma: no thousands begin with 0
        return None
    return Fraction(re.sub("[, '_]", "", text.removesuffix(".")))


def _pointed_with_comma(text: str) -> Fraction | None:
    match = _SPACED_WITH_COMMA.fullmatch(text)
    if match is None:
        return _decimal(_COMMA.fullmatch(text))
    whole = re.sub("[. ]", "", match[1] or match[3])
    return Fraction(f"{whole}.{match[2] or 0}")


def _decimal(match: re.Match[str] | None) -> Fraction | None:
    return Fraction(f"{match[1]}.{match[2]}") if match else None


def _fraction(text: str) -> Fraction | None:
    match = _FRACTION.fullmatch(text)
    if match is None:
        return None
    above, below = int(match[3] or match[6]), int(match[5] or match[8])
    signs = [match[2], match[4], match[7]]
    if below == 0 or (match[1] and any(signs)):
        return None
    return Fraction(match[1] or 0) + Fraction(-above if signs.count("-") % 2 else above, below)


def _power(text: str) -> Fraction | None:
    match = _POWER.fullmatch(text)
    if match is None:
        return None
    exponent = next(group for group in match.groups()[1:] if group is not None)
    factor = _pointed(match[1])
    if factor is None or len(exponent) > 5 or abs(int(exponent)) > LARGEST_EXPONENT:
        return None
    return factor * Fraction(10) ** int(exponent)


def _repeating(text: str) -> Fraction | None:
    match = _REPEATING.fullmatch(text) or _IN_PARENTHESES.fullmatch(text) or _GOING_ON.fullmatch(text)
    if match is None:
        return None
    start, period = match[2], match[3]
    return Fraction(f"{match[1] or 0}.{start or 0}") + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(start))


def _remainder(text: str) -> Fraction | None:
    match = _REMAINDER.fullmatch(text)
    return Fraction(int(match[1]) % int(match[2])) if match and "pmod" not in text else None


def _based(text: str) -> Fraction | None:
    match = _BASED.fullmatch(text)
    base = _BASES.get(match[2] or match[3]) if match else None
    if match is None or base is None:
        return None
    if any(int(digit, 16) >= base for digit in match[1]):
        return None
    return Fraction(int(match[1], base))


def _spelled(text: str) -> Fraction | None:
    """Return the value of `twenty-five`, `one hundred and five`, `two thousand`."""
    if text.casefold() in _FIXED:
        return _FIXED[text.casefold()]
    first, _, rest = text.casefold().rpartition(" and ")
    if first and (below_one := _spelled(rest) or _fraction(rest)) is not None and 0 < below_one < 1:  # `two and a half`
        whole = _unsigned(first)
        return None if whole is None else whole + below_one
    words = text.casefold().replace("-", " ").replace(" and ", " ").split()
    if len(words) > 1 and (part := _part(words[-1], is_one=words[:-1] in (["one"], ["a"], ["an"]))):
        count = Fraction(1) if words[0] in ("a", "an") else _spelled(" ".join(words[:-1]))
        return None if count is None else count * part
    if not words or not all(word in _WORDS or word in MAGNITUDES for word in words):
        return None
    total, group, smallest = 0, 0, None
    for word in words:
        if word in _WORDS:
            fits = smallest is None or (smallest >= 20 and smallest % 10 == 0 and 0 < _WORDS[word] < (10 if smallest < 100 else 100))
            if not fits:
                return None
            group, smallest = group + _WORDS[word], _WORDS[word]
        elif word == "hundred":
            group, smallest = (group or 1) * 100, 100
        else:
            total, group, smallest = total + (group or 1) * MAGNITUDES[word], 0, 1000
    return Fraction(total + group)


def _part(word: str, *, is_one: bool) -> Fraction | None:
    """Return the value of the last word of `one third` or `two thirds`; `twenty third` is a place in an order."""
    name = word if is_one else word.removesuffix("s")
    return Fraction(1, _PARTS[name]) if name in _PARTS and (is_one or name != word) else None


def _chinese(text: str) -> Fraction | None:
    if not all(character in _CHINESE or character in _CHINESE_PLACES or character in _CHINESE_UNITS for character in text):
        return None
    total = section = digit = 0
    for character in text:
        if character in _CHINESE:
            if digit:  # `二三`: digits side by side are no number here
                return None
            digit = _CHINESE[character]
        elif character in _CHINESE_PLACES:
            section, digit = section + (digit or 1) * _CHINESE_PLACES[character], 0
        else:
            total, section, digit = total + (section + digit or 1) * _CHINESE_UNITS[character], 0, 0
    return Fraction(total + section + digit)


def _chinese_fraction(text: str) -> Fraction | None:
    match = _CHINESE_FRACTION.fullmatch(text)
    whole, below, above = (_chinese(part) if part else Fraction(0) for part in match.groups()) if match else (None, None, None)
    return None if whole is None or not below or above is None else whole + above / below


_READINGS: tuple[Callable[[str], Fraction | None], ...] = (
    _pointed,
    _pointed_with_comma,
    _fraction,
    _power,
    _repeating,
    _remainder,
    _based,
    _spelled,
    _chinese,
    _chinese_fraction,
)
