"""JSON without what other readers take otherwise: a key that occurs twice, NaN, infinity, and numbers that are too large."""

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any


def _unique(repeated: Callable[[str], Any], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        values |= {name: repeated(f"the key {name!r} occurs twice in one object") for name in names if names.count(name) > 1}
    return values


def _constant(wrong: Callable[[str], Any], name: str) -> Any:
    return wrong(f"{name} is not a JSON number")


def _finite(wrong: Callable[[str], Any], digits: str) -> Any:
    number = float(digits)
    return number if math.isfinite(number) else wrong(f"{digits} is too large for a number")


def _refuse(what: str) -> None:
    raise ValueError(what)


def decoder(wrong: Callable[[str], Any], integer: Callable[[str], Any]) -> json.JSONDecoder:
    return json.JSONDecoder(
        object_pairs_hook=partial(_unique, wrong),
        parse_constant=partial(_constant, wrong),
        parse_float=partial(_finite, wrong),
        parse_int=integer,
    )


STRICT = decoder(_refuse, int)  # raises ValueError; the fastest one
