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
_INVISIBLE = dict.fromkeys(
    map(ord, "\N{ZERO WIDTH SPACE}\N{WORD JOINER}\N{ZERO WIDTH NO-BREAK SPACE}\N{LEFT-TO-RIGHT MARK}\N{VARIATION SELECTOR-16}")
)
_SYMBOLS = {
    "￥": "¥", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "⁄": "/", "π": r"\pi ", "√": r"\sqrt ",
    "…": r"\ldots ", "、": ",", "，": ",", "；": ";", "。": ".",
    "≤": "<=", "⩽": "<=", "≥": ">=", "⩾": ">=", "≠": "!=", "≃": "≈", "≅": "≈", "º": "°", "∠": r"\angle ", "△": r"\triangle ",
    "\N{OHM SIGN}": "Ω", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ", "ℝ": r"\mathbb{R}", "ø": "∅", "Ø": "∅",
    "½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4", "⅕": " 1/5", "⅙": " 1/6", "⅛": " 1/8",
    "⅜": " 3/8", "⅝": " 5/8", "⅞": " 7/8",
}  # fmt: skip
_CHARACTERS = _FULLWIDTH | _SPACES | _DASHES | _QUOTES | _INVISIBLE | {ord(symbol): usual for symbol, usual in _SYMBOLS.items()}

# Commands that mean a character or another command, and those that only change the appearance.
_COMMANDS = {
    name: meaning
    for meaning, names in {
        r"\frac": "dfrac tfrac cfrac",
        r"\ldots ": "dots ldots cdots dotsc dotsb",
        r"\mathbb{R}": "R reals Reals",
        r"\{": "lbrace", r"\}": "rbrace", "[": "lbrack", "]": "rbrack", "(": "langle", ")": "rangle", "|": "lvert rvert vert mid",
        "<=": "le leq leqq leqslant", ">=": "ge geq geqq geqslant", "!=": "ne neq", "<": "lt", ">": "gt",
        "≈": "approx simeq sim doteq thickapprox", "±": "pm", "∓": "mp", "∪": "cup", "∈": "in", "∞": "infty", "∅": "emptyset varnothing",
        "∧": "land wedge", "∨": "lor vee", "¬": "neg lnot", "∉": "notin", r"\setminus ": "setminus backslash smallsetminus",
        ":": "colon", "≡": "equiv", "°": "degree", "€": "euro texteuro", "£": "pounds textsterling", CURRENCY: "textdollar",
        " ": "quad qquad thinspace newline", "": "displaystyle textstyle limits rm bf it Large large",
    }.items()
    for name in names.split()
}  # fmt: skip
_COMMAND = re.compile(r"(?<!\\)\\([a-zA-Z]+)")
# What replaces what, in this order.
_LATEX: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(\\\\) ?\[-?[\d.]+ ?(?:pt|em|ex|mm|cm)\]", r"\1"),  # the space after a row of a matrix
        (r"\\\$", CURRENCY),
        (r"\\\"", '"'),
        (r",\\! ?", ","),  # 1,\!000
        (r"\{([,:])\}", r"\1"),  # 1{,}000
        (r"\\(?:left|right|m?left|[bB]igg?[lrm]?)\s*(?=[()\[\]|.\\{}<>/])", ""),
        (r"\\[!/]", ""),
        (r"(?<!\\)\\[,;: ]", " "),
        (r"=<", "<="),
        (r"\\not ?=|=/=", "!="),
        (r"~=", "≈"),
        (r"\+/-|\+-", "±"),
        (r"(?<=[€£])\{\}", ""),
        (r"(?:(?<=[0-9] )|(?<=[0-9]))\\(?:Omega|ohm)(?![a-zA-Z])", "Ω"),
        (r" ?\^ ?(?:\{ ?\\circ ?\}|\\circ(?![a-zA-Z]))", "°"),
        (r"° ([CF])(?![a-zA-Z])", r"°\1"),
        (r"\^ ?\{? ?(st|nd|rd|th)(?![a-z]) ?\}?", r"\1"),
        (r"\\#", "#"),
        (r"\\%", "%"),
        (r"\{ ?([^{}]*?) ?\\choose ?([^{}]*?) ?\}", r"\\binom{\1}{\2}"),
        (r"\\n(?![a-zA-Z])", " "),  # a line end that is spelled out
        (r"[⇒⟹➔➜]", "→"),
        (r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac ?(\d) ?\{", r"\\frac{\1}{"),
        (r"\\frac ?(\{[^{}]*\}) ?(\d)", r"\\frac\1{\2}"),
        (r"\\[dt]?binom ?([a-z\d]) ?([a-z\d])", r"\\binom{\1}{\2}"),
        (r"\\sqrt ?([\da-zA-Z])", r"\\sqrt{\1}"),
        (r"\\pmod ?([0-9])", r"\\pmod{\1}"),
        (r"\\mathbb ?([A-Z])", r"\\mathbb{\1}"),
        (r"\s+", " "),
    )
)
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|textsf|texttt|mathrm|mathbf|mathit|mathsf|mathtt|mbox|hbox|bm|boldsymbol|emph|underline|vec|overrightarrow|hat|boxed|fbox|framebox|"
    r"operatorname\*?) ?\{([^{}]*)\}"
)
_FUNCTION_NAME = re.compile(r"(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|ln|log|exp|lcm|gcd|max|min|det")
_CANCELLED = re.compile(r"\\(?:cancel|bcancel|xcancel|phantom|hphantom|vphantom|tag|label|hspace\*?|vspace\*?) ?\{[^{}]*\}")
_COLOR = re.compile(r"\\(?:textcolor|colorbox|color) ?\{[a-zA-Z0-9!, ]*\}")
_HTML = re.compile(r"<<[^<>]*>>|</?(?:b|i|u|em|strong|span|p|div|br|code|mark|answer|response|solution) ?/?>", re.IGNORECASE)
_BOLD = re.compile(r"(?<![\w)*])(\*\*|\*(?=[^*\s]))([^*]+)\1(?![\w*])|`([^`]+)`")  # **12**, *12*, `12`
_CHINESE_CHOICE = re.compile("(?<![A-Z])([A-J])、(?=[^A-J])")
_DOUBLED = re.compile(r"\\\\(?=[a-zA-Z])")
_LEFT_ALONE = re.compile(r"(?<!\d)~(?=\s*[\d$.\\€£¥])")  # `~12` is about 12; any other tilde is a space
_FORMULA_DOLLAR = re.compile(r"\$(?!\s?[-+]?\s?[.\d])")
_DELIMITER = re.compile(r"(?<!\\)\\[()\[\]]|\$\$")
_RAISED, _LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "₀₁₂₃₄₅₆₇₈₉₊₋ₙ"
_LEVEL = {ord(one): usual for row in (_RAISED, _LOWERED) for one, usual in zip(row, "0123456789+-n", strict=True)}
_SCRIPT = re.compile(f"[{_RAISED}]+|[{_LOWERED}]+")  # 10⁻³, 1010₂
_SYSTEM = re.compile(r"\\begin ?\{(cases|aligned|align\*?|gathered)\}((?:(?!\\begin).)*?)\\end ?\{\1\}")
_NESTED = 4  # commands such as \textbf{\text{(A)}}


def plain(text: str) -> str:
    """Return a text in its plain spelling: `\\dfrac12\\text{ cm}` becomes `\\frac{1}{2} cm`. What is left as it was is not an error."""
    text = _CHINESE_CHOICE.sub(r"\1. ", text.replace("\r", "\n").replace("\n", " ")).translate(_CHARACTERS)
    if not text.isascii():
        text = _SCRIPT.sub(lambda script: ("^" if script[0][0] in _RAISED else "_") + f"{{{script[0].translate(_LEVEL)}}}", text)
        text = "".join(str(unicodedata.digit(one, one)) for one in text if one in "°℃℉" or unicodedata.category(one) != "So")  # no emoji
    text = _HTML.sub("", text)
    text = _SYSTEM.sub(lambda system: re.sub(r"\\\\", ", ", system[2].replace("&", "")), text)
    if r"\begin" not in text:
        text = re.sub(r" ?\\?& ?", " and ", _DOUBLED.sub(r"\\", text))
    text = _COLOR.sub("", _CANCELLED.sub("", text))
    for _ in range(_NESTED):
        text, changed = _TEXT.subn(_unwrapped, text)
        if not changed:
            break
    text = _BOLD.sub(r"\2\3", _LEFT_ALONE.sub("≈", text))
    text = _COMMAND.sub(lambda match: _COMMANDS.get(match[1], match[0]), text)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return re.sub(" {2,}", " ", _without_formula_marks(text.replace("~", " "))).strip()


def _unwrapped(match: re.Match[str]) -> str:
    inner = match[1].strip()
    is_unit = inner in ("min", "sec") and match.string[: match.start()].rstrip()[-1:].isdigit()  # 5\text{ min}
    return rf"\{inner} " if _FUNCTION_NAME.fullmatch(inner) and not is_unit else f" {match[1]} "


def _without_formula_marks(text: str) -> str:
    r"""Remove the delimiters `$ $`, `\( \)` and `\[ \]`. A dollar sign before a number is money, unless it closes or opens a formula."""
    text = _DELIMITER.sub(" ", text)
    if text.count("$") % 2 == 0 and _FORMULA_DOLLAR.search(text):
        return text.replace("$", " ")
    return text.replace("$", CURRENCY)
