"""Units of quantities: `cm^2`, `miles per hour`, `dollars`, `apples`."""

import re
from dataclasses import dataclass
from fractions import Fraction

# dimension: unit = its size in the first unit, with all spellings
_TABLE = {
    "length": "m meter metre=1; cm centimeter centimetre=1/100; mm millimeter millimetre=1/1000; km kilometer kilometre=1000; "
    "in inch=127/5000; ft foot feet=381/1250; yd yard=1143/1250; mi mile=201168/125",
    "mass": "g gram gramme gm=1; kg kilogram kilo=1000; mg milligram=1/1000; lb lbs pound=45359237/100000; "
    "oz ounce=45359237/1600000; ton tonne=1000000",
    "time": "s sec second=1; min minute=60; h hr hour=3600; day=86400; week=604800; month=2629800; yr year=31557600; "
    "ms millisecond=1/1000; 分钟=60; 小时=3600; 天=86400; 秒=1",
    "volume": "L l liter litre=1; mL ml milliliter millilitre=1/1000; gal gallon=473176473/125000000; "
    "pint=473176473/1000000000; cup=473176473/2000000000",
    "dollar": "$ ＄ dollar usd buck 美元=1; ¢ cent penny pennies=1/100",
    "euro": "€ euro eur=1",
    "pound sterling": "£ gbp sterling quid=1; pence=1/100",
    "yuan": "¥ yuan rmb yen jpy 元 块 块钱 人民币 円=1",
    "rupee": "₹ rupee rs inr=1",
    "won": "₩ won krw=1",
    "rouble": "₽ rouble ruble rub=1",
    "resistance": "Ω ohm=1",
    "force": "N newton=1",
    "energy": "J joule=1; kJ kilojoule=1000",
    "power": "W watt=1; kW kilowatt=1000",
    "degree": "° deg degree=1",
}
_SYMBOLS = {
    spelling: (dimension, Fraction(size))
    for dimension, line in _TABLE.items()
    for entry in line.split(";")
    for spellings, size in [entry.strip().rsplit("=", 1)]
    for spelling in spellings.split()
}
MONEY = {"dollar", "euro", "pound sterling", "yuan", "rupee", "won", "rouble"}
_ABBREVIATIONS = {
    "mph": "mile/hour", "kmh": "km/h", "kph": "km/h", "km/hr": "km/h", "sqft": "ft^2", "sqm": "m^2", "cc": "cm^3",
    "°c": "celsius", "°f": "fahrenheit",
}  # fmt: skip
_ARTICLES = {"a", "an", "the", "of", "each", "total", "us", "american", "in", "unit"}
_POWER_WORDS = {"square": 2, "sq": 2, "sq.": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
_TOKEN = re.compile(r"[^\s^/*]+|[\^/*]")
_UNIT = re.compile(r"(?:[A-Za-z°¢$＄€£¥₹₩₽Ω\u00c0-\u024f\u4e00-\u9fff'./* -]|\^ ?-?[0-9])+")


@dataclass(frozen=True)
class Unit:
    """A product of powers of units.

    Attributes:
        powers: power of each known dimension, sorted by name.
        words: other words, such as `apple`.
        size: size of the unit in the first units of the table.
    """

    powers: tuple[tuple[str, int], ...] = ()
    words: frozenset[str] = frozenset()
    size: Fraction = Fraction(1)

    @property
    def known(self) -> bool:
        """Whether every word is in the table."""
        return bool(self.powers) and not self.words

    def agrees(self, other: "Unit") -> bool:
        """Whether quantities in both units can be compared: in dimensions they are the same, and one has no words that the other lacks."""
        return self.powers == other.powers and (self.words <= other.words or other.words <= self.words)


NONE = Unit()


def unit(text: str) -> Unit | None:
    """Return the unit that a text in plain spelling names, or None if it is no unit."""
    text = text.strip().rstrip(".").replace("{", "").replace("}", "").replace(r"\cdot", "*")
    if not text:
        return NONE
    if len(text) > 80 or not _UNIT.fullmatch(text) or not re.search(r"[^\W\d]|[°¢$＄€£¥₹₩₽]", text) or text[-1] in "-*/" or text[0] == "*":
        return None
    for short, long in _ABBREVIATIONS.items():
        text = re.sub(rf"(?<![\w°]){re.escape(short)}(?!\w)", long, text, flags=re.IGNORECASE)
    return _product(_TOKEN.findall(re.sub(r"\bper\b|(?<!of )\ban?(?= hour| day| week| month| year)", "/", text)))


def _product(tokens: list[str]) -> Unit | None:
    powers, words, size = dict[str, int](), set[str](), Fraction(1)
    side, next_power, position = 1, 1, 0
    while position < len(tokens):
        word = tokens[position]
        position += 1
        if word in "/*":
            side = -1 if word == "/" else side
        elif word.casefold() in _POWER_WORDS and position < len(tokens):
            next_power = _POWER_WORDS[word.casefold()]
        elif word == "^":
            return None  # a power without a unit
        else:
            power, position = _power(tokens, position, next_power)
            next_power = 1
            if power is None:
                return None
            is_preposition = word == "in" and position < len(tokens)  # `5 clips in April`; `5 in` is inches
            found = None if is_preposition else _known(word)
            if found is None and _is_variable(word):
                return None
            if found is None:
                words |= {_singular(word.casefold().strip("."))} - _ARTICLES
            else:
                if side < 0 and MONEY & powers.keys():  # `$12 per hour` may be called `$12`
                    words.add(f"per {found}")
                    continue
                powers[found[0]] = powers.get(found[0], 0) + side * power
                size *= found[1] ** (side * power)
    return Unit(tuple(sorted((name, power) for name, power in powers.items() if power)), frozenset(words), size)


def _is_variable(word: str) -> bool:
    """Whether a word of a formula is no unit: `x`, `-x`."""
    if word.casefold() in _ARTICLES:
        return False
    return (
        word in ("pi", "sqrt", "sin", "cos", "tan", "log", "ln")
        or (len(word) == 1 and word.isascii())
        or re.fullmatch("-?[a-zA-Z]?-?|-..?", word) is not None
    )


def _power(tokens: list[str], position: int, before: int) -> tuple[int | None, int]:
    """Return the power of the unit before `position`, from `square m`, `m^2` or `m squared`, and the position behind it."""
    if position < len(tokens) and tokens[position] == "^":
        exponent = tokens[position + 1] if position + 1 < len(tokens) else ""
        return (int(exponent) if re.fullmatch("-?[0-9]", exponent) else None), position + 2
    if position < len(tokens) and tokens[position].casefold() in ("squared", "cubed"):
        return _POWER_WORDS[tokens[position].casefold()], position + 1
    return before, position


def _known(word: str) -> tuple[str, Fraction] | None:
    word = word.strip(".") or word
    lower = word.casefold()
    return _SYMBOLS.get(word) or (_SYMBOLS.get(lower) or _SYMBOLS.get(_singular(lower)) if len(lower) > 1 else None)


def is_known(word: str) -> bool:
    """Whether a word is a unit of the table, such as `cm`."""
    return _known(word) is not None


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 2 else word
