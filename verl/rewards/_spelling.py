r"""One spelling for what people write in many: Unicode mathematics, LaTeX that changes only the appearance, Markdown.

Every pattern takes time in proportion to the length of the text.
"""

import re
import unicodedata

CURRENCY = "\N{FULLWIDTH DOLLAR SIGN}"  # a dollar sign that is money, so that it is not taken for a delimiter of formulas

_FULLWIDTH = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
_SPACES = dict.fromkeys(map(ord, "\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{THIN SPACE}\N{IDEOGRAPHIC SPACE}\N{FIGURE SPACE}\t"), " ")
_DASHES = dict.fromkeys(map(ord, "\N{MINUS SIGN}\N{EN DASH}\N{HYPHEN}\N{NON-BREAKING HYPHEN}\N{FIGURE DASH}"), "-")
_QUOTES = {ord("‘"): "'", ord("’"): "'", ord("“"): '"', ord("”"): '"'}
_INVISIBLE = dict.fromkeys(map(ord, "\N{ZERO WIDTH SPACE}\N{WORD JOINER}\N{ZERO WIDTH NO-BREAK SPACE}\N{LEFT-TO-RIGHT MARK}"))
_SYMBOLS = {
    "￥": "¥", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "⁄": "/", "π": r"\pi ", "√": r"\sqrt ",
    "…": r"\ldots ", "、": ",",
    "，": ",", "；": ";", "。": ".",
    "\N{OHM SIGN}": "Ω", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ", "ℝ": r"\mathbb{R}", "ø": "∅", "Ø": "∅",
    "½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4", "⅕": " 1/5", "⅙": " 1/6", "⅛": " 1/8",
    "⅜": " 3/8", "⅝": " 5/8", "⅞": " 7/8",
    "⁰": "^0", "¹": "^1", "²": "^2", "³": "^3", "⁴": "^4", "⁵": "^5", "⁶": "^6", "⁷": "^7", "⁸": "^8", "⁹": "^9",
}  # fmt: skip
_CHARACTERS = _FULLWIDTH | _SPACES | _DASHES | _QUOTES | _INVISIBLE | {ord(symbol): usual for symbol, usual in _SYMBOLS.items()}

# What replaces what, in this order. Relations, infinity and the like become one character each.
_LATEX: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\\$", CURRENCY),
        (r"\\\"", '"'),
        (r",\\! ?", ","),  # 1,\!000
        (r"\{,\}", ","),
        (r"\\(?:d|t|c)frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:left|right|m?left|[bB]igg?[lrm]?)\s*(?=[()\[\]|.\\{}<>/])", ""),
        (r"\\(?:displaystyle|textstyle|limits|rm|bf|it|Large|large)(?![a-zA-Z])", ""),
        (r"\\(?:!|/)", ""),
        (r"(?<!\\)\\(?:[,;: ]|quad(?![a-zA-Z])|qquad(?![a-zA-Z])|thinspace(?![a-zA-Z])|newline(?![a-zA-Z]))", " "),
        (r"\\lbrace(?![a-zA-Z]) ?", r"\\{"),
        (r"\\rbrace(?![a-zA-Z]) ?", r"\\}"),
        (r"\\lbrack(?![a-zA-Z]) ?", "["),
        (r"\\rbrack(?![a-zA-Z]) ?", "]"),
        (r"\\langle(?![a-zA-Z]) ?", "("),
        (r"\\rangle(?![a-zA-Z]) ?", ")"),
        (r"\\(?:leqslant|leqq|leq|le)(?![a-zA-Z])|=<|≤|⩽", "<="),
        (r"\\(?:geqslant|geqq|geq|ge)(?![a-zA-Z])|≥|⩾", ">="),
        (r"\\(?:neq|ne)(?![a-zA-Z])|\\not ?=|≠|=/=", "!="),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\(?:approx|simeq|sim|doteq|thickapprox)(?![a-zA-Z])|~=|≃|≅", "≈"),
        (r"(?<=[0-9] )\\(?:Omega|ohm)(?![a-zA-Z])|(?<=[0-9])\\(?:Omega|ohm)(?![a-zA-Z])", "Ω"),
        (r"\\pm(?![a-zA-Z])|\+/-|\+-", "±"),
        (r"\\mp(?![a-zA-Z])", "∓"),
        (r"\\cup(?![a-zA-Z])", "∪"),
        (r"\\in(?![a-zA-Z])", "∈"),
        (r"\\infty(?![a-zA-Z])", "∞"),
        (r"\\(?:emptyset|varnothing)(?![a-zA-Z])", "∅"),
        (r"\\(?:dots|ldots|cdots|dotsc|dotsb)(?![a-zA-Z])", r"\\ldots "),
        (r"\\(?:lvert|rvert|vert|mid)(?![a-zA-Z])", "|"),
        (r" ?\^ ?(?:\{ ?\\circ ?\}|\\circ(?![a-zA-Z]))|\\degree(?![a-zA-Z])|º", "°"),
        (r"° ([CF])(?![a-zA-Z])", r"°\1"),
        (r"\^ ?\{ ?(st|nd|rd|th) ?\}", r"\1"),
        (r"\\%", "%"),
        (r"\\(?:euro|texteuro)(?![a-zA-Z])(?:\{\})?", "€"),
        (r"\\(?:pounds|textsterling)(?![a-zA-Z])(?:\{\})?", "£"),
        (r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac ?(\d) ?\{", r"\\frac{\1}{"),
        (r"\\frac ?(\{[^{}]*\}) ?(\d)", r"\\frac\1{\2}"),
        (r"\\[dt]?binom ?(\d) ?(\d)", r"\\binom{\1}{\2}"),
        (r"\\sqrt ?([\da-zA-Z])", r"\\sqrt{\1}"),
        (r"\s+", " "),
    )
)  # fmt: skip
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|textsf|texttt|mathrm|mathbf|mathit|mathsf|mathtt|mbox|hbox|bm|boldsymbol|emph|underline|vec|overrightarrow|hat|boxed|fbox|framebox|"
    r"operatorname\*?) ?\{([^{}]*)\}"
)
_FUNCTION_NAME = re.compile(r"(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|ln|log|exp|lcm|gcd|max|min|det")
_CANCELLED = re.compile(r"\\(?:cancel|bcancel|xcancel|phantom|hphantom|vphantom|tag|label) ?\{[^{}]*\}")
_COLOR = re.compile(r"\\(?:textcolor|colorbox|color) ?\{[a-zA-Z0-9!, ]*\}")
_HTML = re.compile(r"</?(?:b|i|u|em|strong|span|p|div|br|code|mark) ?/?>", re.IGNORECASE)
_BOLD = re.compile(r"(?<![\w)*])\*\*([^*]+)\*\*(?![\w*])")
_DOUBLED = re.compile(r"\\\\(?=[a-zA-Z])")
_LEFT_ALONE = re.compile(r"(?<!\d)~(?=\s*[\d$.\\€£¥])")  # `~12` is about 12; any other tilde is a space
_FORMULA_DOLLAR = re.compile(r"\$(?!\s?[-+]?\s?[.\d])")
_DELIMITER = re.compile(r"(?<!\\)\\[()\[\]]|\$\$")
_NESTED = 4  # commands such as \textbf{\text{(A)}}


def plain(text: str) -> str:
    """Return a text in its plain spelling: `\\dfrac12\\text{ cm}` becomes `\\frac{1}{2} cm`. What is left as it was is not an error."""
    text = text.replace("\r", "\n").replace("\n", " ").translate(_CHARACTERS)
    if not text.isascii():
        text = "".join(str(unicodedata.digit(one, one)) for one in text)
    text = _HTML.sub("", text)
    if r"\begin" not in text:
        text = _DOUBLED.sub(r"\\", text)
    text = _COLOR.sub("", _CANCELLED.sub("", text))
    for _ in range(_NESTED):
        text, changed = _TEXT.subn(_unwrapped, text)
        if not changed:
            break
    text = _BOLD.sub(r"\1", _LEFT_ALONE.sub("≈", text))
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return re.sub(" {2,}", " ", _without_formula_marks(text.replace("~", " "))).strip()


def _unwrapped(match: re.Match[str]) -> str:
    inner = match[1].strip()
    return rf"\{inner} " if _FUNCTION_NAME.fullmatch(inner) else f" {match[1]} "


def _without_formula_marks(text: str) -> str:
    r"""Remove the delimiters `$ $`, `\( \)` and `\[ \]`. A dollar sign before a number is money, unless it closes or opens a formula."""
    text = _DELIMITER.sub(" ", text)
    if text.count("$") % 2 == 0 and _FORMULA_DOLLAR.search(text):
        return text.replace("$", " ")
    return text.replace("$", CURRENCY)
