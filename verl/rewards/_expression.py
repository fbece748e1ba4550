r"""Equality of two expressions in LaTeX, by SymPy. It may take unbounded time and memory: call it in a process that can be ended.

Numbers are compared exactly or to DIGITS digits. Expressions with variables are compared at several points, to as many digits. Equations,
inequalities, sets and matrices are compared by math-verify.
"""

import math
import re
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy
from math_verify import verify

from verl.rewards._decoration import compact
from verl.rewards._numbers import number

DIGITS = 40
LARGEST_NUMBER = 200_000  # decimal digits of an integer that is still evaluated
LOG10_OF_2 = math.log10(2)
MOST_TERMS = 10_000  # of a sum or product
MOST_EXPONENT_DIGITS = 20  # of an exponent that is evaluated to bound a power
DEEPEST = 40  # braces in braces
POINTS = 8  # where expressions with variables are compared
FEWEST_POINTS = 3  # of these, at which both are real

_NORMALIZATION = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False)
_CONVERSION = ConversionConfig(lowercase_symbols=False)
_DECIMAL = re.compile(r"(?<![0-9.])([0-9]*)\.([0-9]+)(?![0-9.])")
_REPEATING = re.compile(r"[0-9]*\.[0-9]*\\overline ?\{[0-9]{1,20}\}")  # 0.\overline{3}
_LARGE_BINOMIAL = re.compile(r"\\[dt]?binom ?\{? ?[0-9]{6}|\\binom.*\^.*\^")
_SPELLINGS = (
    # `1/2x` is `(1/2)x`, and `x^2/3y` is `(x^2/3)y`.
    (re.compile(r"(?<![0-9.^_])(?<![\^_] )([0-9]+) ?/ ?([0-9]+)(?= ?[a-zA-Z(\\])"), r"\\frac{\1}{\2}"),
    (re.compile(r"/ ?([0-9]+) ?(?=(?!x ?[0-9])[a-zA-Z(]|\\(?:sqrt|pi|frac|sin|cos|tan|ln|log|theta)(?![a-zA-Z]))"), r"/\1\\cdot "),
    (re.compile(r"(?<=[0-9)]) ?(?:\*|x(?= ?[0-9])) ?"), r"\\cdot "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\\lg(?![a-z])"), r"\\log_{10} "),
    (re.compile(r"°"), r"^\\circ "),
    (re.compile("∞"), r"\\infty "),
    (re.compile("∅"), r"\\emptyset "),
    (re.compile("∪"), r"\\cup "),
    (re.compile("∈"), r"\\in "),
    (re.compile("±"), r"\\pm "),
    (re.compile("<="), r"\\leq "),
    (re.compile(">="), r"\\geq "),
    (re.compile("!="), r"\\neq "),
    (re.compile(r"(?<!\\)(?<![a-zA-Z])(sin|cos|tan|cot|sec|csc|ln|log|exp|sqrt|pi)(?![a-zA-Z])"), r"\\\1 "),
    (re.compile(r"\\sqrt ?\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"\^ ?\(([^()]*)\)"), r"^{\1}"),
    (
        re.compile(r"\\(?:sin|cos|tan|cot|sec|csc) ?([0-9]+) ?\^\\circ"),
        lambda m: m[0].replace(m[1], "{" + m[1]).replace(r"^\circ", r"^\circ}"),
    ),
)


class TooLargeError(ValueError):
    """An expression whose value has too many digits."""


def same(expected: str, answer: str) -> bool:
    """Return whether two expressions are equal, False for what cannot be read or is too large. Both are in plain spelling."""
    if compact(expected) == compact(answer):
        return True
    if max(_depth(expected), _depth(answer)) > DEEPEST:
        return False
    try:
        right, given = parsed(expected), parsed(answer)
        return _equal(right, given)
    except Exception:  # SymPy and the parser raise many
        return False


@lru_cache(maxsize=1024)
def parsed(latex: str) -> Any:
    """Return the SymPy object of an expression; its decimals are exact. Raises what the parser raises."""
    if _LARGE_BINOMIAL.search(latex):  # the parser evaluates it
        raise TooLargeError
    for pattern, spelling in _SPELLINGS:
        latex = pattern.sub(spelling, latex)
    latex = _DECIMAL.sub(_exact, _REPEATING.sub(_as_fraction, latex))
    found = latex2sympy(latex, is_real=True, convert_degrees=True, normalization_config=_NORMALIZATION, conversion_config=_CONVERSION)
    _check_size(found)
    if r"\sqrt[" in latex and isinstance(found, sympy.Basic):
        found = found.replace(_is_odd_root_of_negative, lambda root: -((-root.base) ** root.exp))
    return _with_imaginary_unit(found)


def _exact(decimal: re.Match[str]) -> str:
    whole, digits = decimal[1] or "0", decimal[2]
    return rf"\frac{{{int(whole + digits)}}}{{{10 ** len(digits)}}}"


def _as_fraction(repeating: re.Match[str]) -> str:
    value = number(repeating[0])
    return repeating[0] if value is None else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _depth(latex: str) -> int:
    depth = deepest = 0
    for character in latex:
        depth += (character in "{([") - (character in "})]")
        deepest = max(deepest, depth)
    return deepest


def _with_imaginary_unit(found: Any) -> Any:
    if not isinstance(found, sympy.Basic) or found.has(sympy.Sum, sympy.Product):
        return found
    return found.subs({symbol: sympy.I for symbol in found.free_symbols if symbol.name == "i"})


def _is_odd_root_of_negative(part: Any) -> bool:
    """Whether a part is `\\sqrt[3]{-8}`, for which SymPy takes a complex root."""
    return bool(
        part.is_Pow and part.base.is_negative and part.base.is_number and part.exp.is_Rational and part.exp.p == 1 and part.exp.q % 2
    )


def _check_size(found: Any) -> None:
    """Raise TooLargeError for an expression that has too large a number or too long a sum."""
    parts = list(sympy.preorder_traversal(found)) if isinstance(found, sympy.Basic) else []
    if any(isinstance(part, sympy.Pow | sympy.factorial | sympy.exp) and _digits(part) > LARGEST_NUMBER for part in parts):
        raise TooLargeError
    if any(isinstance(part, sympy.Sum | sympy.Product) and not all(map(_is_short, part.limits)) for part in parts):
        raise TooLargeError


def _is_short(limit: Any) -> bool:
    """Whether a sum has few terms, or an end that is not a number."""
    _, first, last = limit
    return not (first.is_number and last.is_number) or bool((last - first).doit() <= MOST_TERMS)


def _digits(part: Any) -> float:
    """Return an upper bound for the digits of a number without variables, in powers and factorials; 1 for what is not bounded so."""
    if isinstance(part, sympy.Pow | sympy.exp):
        base, exponent = part.as_base_exp()
        exponent_digits = _digits(exponent)
        size = 10.0 ** min(exponent_digits, 300)
        if exponent.is_number and exponent_digits < MOST_EXPONENT_DIGITS:
            size = abs(complex(sympy.N(exponent)))
        return float(size * max(_digits(base), 1.0))
    if isinstance(part, sympy.factorial):
        size = 10.0 ** min(_digits(part.args[0]), 300)
        return float(size * max(_digits(part.args[0]), 1.0))
    if isinstance(part, sympy.Rational):
        return 1 + LOG10_OF_2 * max(int(part.p).bit_length(), int(part.q).bit_length())
    if isinstance(part, sympy.Mul | sympy.Add):
        return float(sum(_digits(one) for one in part.args))
    return 1.0


def _equal(right: Any, given: Any) -> bool:
    right, given = (one.doit() if isinstance(one, sympy.MatrixExpr) else one for one in (right, given))
    if isinstance(right, sympy.MatrixBase) and isinstance(given, sympy.MatrixBase):
        pairs = zip(right.flat(), given.flat(), strict=True)
        return right.shape == given.shape and all(_equal(a, b) for a, b in pairs)
    if isinstance(right, sympy.Expr) and isinstance(given, sympy.Expr) and not _is_opaque(right, given):
        return _equal_expressions(right, given)
    if isinstance(right, sympy.Expr) != isinstance(given, sympy.Expr):
        return False
    if isinstance(right, sympy.Eq) and isinstance(given, sympy.Eq) and _equal_equations(right, given):
        return True
    return bool(verify(right, given, float_rounding=DIGITS, numeric_precision=DIGITS, timeout_seconds=None))


def _equal_equations(right: Any, given: Any) -> bool:
    """Whether two equations are the same up to a factor: `x + y = 1` and `2y = 2 - 2x`."""
    first, second = right.lhs - right.rhs, given.lhs - given.rhs
    factor = sympy.simplify(first / second) if second != 0 else sympy.nan
    return bool(factor.is_number and factor.is_finite and factor != 0)


def _is_opaque(*expressions: Any) -> bool:
    """Whether SymPy has no value for a part: an unknown function, a matrix, or a sum with a variable end."""
    return any(
        one.has(sympy.core.function.AppliedUndef, sympy.MatrixExpr, sympy.Sum, sympy.Product, sympy.Integral) and one.free_symbols
        for one in expressions
    )


def _equal_expressions(right: Any, given: Any) -> bool:
    right, given = right.doit(), given.doit()
    if right == given:
        return True
    symbols = sorted(right.free_symbols | given.free_symbols, key=str)
    if not symbols:
        return _equal_numbers(right, given)
    real, complex_ = list[bool](), list[bool]()
    for point in range(POINTS):
        place = {symbol: _coordinate(point, index) for index, symbol in enumerate(symbols)}
        a, b = (sympy.N(one.subs(place), DIGITS + 10) for one in (right, given))
        if not (a.is_finite and b.is_finite):
            continue
        (real if a.is_real and b.is_real else complex_).append(_close(a, b))
    return all(real) if len(real) >= FEWEST_POINTS else bool(real + complex_) and all(real + complex_)


def _coordinate(point: int, index: int) -> Any:
    """Return a coordinate of a point: first positive ones, then also negative ones; no two are alike."""
    size = sympy.Rational(1009 + 617 * point + 211 * index, 503 + 97 * index)
    return -size if point >= POINTS // 2 and (point + index) % 2 == 0 else size


def _equal_numbers(right: Any, given: Any) -> bool:
    if right.is_Rational and given.is_Rational:
        return bool(right == given)
    a, b = sympy.N(right, DIGITS + 10), sympy.N(given, DIGITS + 10)
    if not (a.is_finite and b.is_finite):
        return bool(right == given)
    return _close(a, b)


def _close(a: Any, b: Any) -> bool:
    scale = max(abs(a), abs(b))
    return bool(scale == 0 or abs(a - b) <= scale * sympy.Float(10) ** -DIGITS)
