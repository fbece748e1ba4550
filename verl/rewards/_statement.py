r"""Where a text states its answer: the last of its statements, whichever mark they bear.

The marks are `\boxed{…}`, `#### …`, `<answer>…</answer>`, "the answer is …", "Final Answer: …", `答案：…` and the like. What stands in
`<think>…</think>` is no statement, nor is what follows the answer when a model goes on with a question of its own.
Every pattern takes time in proportion to the length of the text.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal

from verl.rewards._spelling import CURRENCY

Mark = Literal["box", "hashes", "tag", "phrase", "correction", "bold"]

# `boxed{5}` has lost its backslash, or it has become a backspace, `\b`.
BOX_OR_BRACE = re.compile(
    r"\\{1,2}(?:boxed|fbox|framebox)\s*(?:(?P<box>\{)|(?P<short>[^\s{}\\]))|(?<![a-zA-Z])(?:boxed|\x08oxed|fbox|\x0cbox)(?P<bare>\{)|\\.|[{}]",
    re.DOTALL,
)
HASHES = re.compile(r"(?<!#)####(?!#)")
TAG = re.compile(r"<answer>|</answer>", re.IGNORECASE)
PHRASE = re.compile(
    r"\banswers?\b[^\S\n]{0,3}(?:\([^()\n]{1,40}\)|(?:to|for|of|in)\b(?:(?!\bis\b|\bare\b)[^.:=\n$\\]){1,80})?[ *_\"]{0,6}"
    r"(?:→|[-=]>|(?:is|are|was|(?:(?:would|will|should|must|could) )?be|equals|becomes)\b[ *_]{0,6}[:：]?|[:：=](?!=)|"
    r"(?:is|are|was)(?=n['’]t (?:[\W\d]|[b-z]\b)))|"
    r"\b(?:correct|right|final) (?:option|choice|result|value)s?[ *_]{0,6}(?:(?:is|are)\b[ *_]{0,6}[:：]?|[:：=](?!=))|"
    r"\banswer (?=(?:cannot|can't|can not) be (?:determined|found)|does not exist)|"
    r"\banswers?[ *_]{0,6}(?=\$|\\[(\[])|"
    r"\bfinal answer[*_#]{0,6}[^\S\n]{0,3}(?=\n)|"
    r"(?<=[#*] )answer[*_#]{0,6}[^\S\n]{0,3}(?=\n)|(?<=\*\*)answer\*\*[^\S\n]{0,3}(?=\n)|"
    r"(?:故|应|应该|所以|因此)选(?:项|择)?[:： ]{0,2}(?=[(（]?[A-Z])|"
    r"\bans\b\.?[*_]{0,6} ?(?:[:=]|(?=[-$\\0-9]))|"
    r"(?:最终|最後|最后|正确|正確)?(?:的)?(?:答案|选项)】?[*_ ]{0,6}(?:是|为|為|應該是|应该是)?[*_ ]{0,6}[:：]?|"
    r"\b(?:Réponse|Respuesta|Resposta|Antwort|Risposta|Ответ)(?: finale?| final)?[ *_]{0,6}"
    r"(?:[:：]|(?:est|es|é|ist|è|lautet|beträgt)\b[ *_]{0,6}[:：]?)|"
    r"(?:答え|정답)(?:は|은|는)?[:： ]?",
    re.IGNORECASE,
)
BOLD = re.compile(r"\*\*([^*\n]{1,200})\*\*")
# A pair of Markdown's marks in a line: `**12**`, `*12*`, `__12__`, `_12_`; not `2**3`, `a_1 b_2`.
EMPHASIS = re.compile(
    r"(?<![A-Za-z0-9)\]}*\\^_])(?P<mark>\*{2,3})(?=[^\s*])(?P<strong>[^*\n]{1,200})(?<=[^\s*])(?P=mark)(?![A-Za-z0-9*!])|"
    r"(?<![^\s(:：])(?P<light>\*|__?)(?=[^\s*_])(?P<inner>[^*_\n]{1,200})(?<=[^\s*_])(?P=light)(?![\w*{!])"
)
CHAT_TOKEN = re.compile(
    r"<\|im_start\|>\w*\s*\n|<\|(?:im_end|eot_id|endoftext|end_of_text|start_header_id|end|user|eom_id)\|>|</s>|<end_of_turn>|<start_of_turn>"
)
THOUGHT = re.compile(r"<(/?)(?:think|thinking|reasoning)>", re.IGNORECASE)
NEXT_QUESTION = re.compile(
    r"\n[*#_ ]{0,6}(?:Question|Problem|Q|Human|User|问题|題目|题目)[*_ ]{0,4}(?: ?\d{1,3})?[*_ ]{0,4}[:：]", re.IGNORECASE
)
# Words that begin a reason or a remark, after the answer itself.
REMARK = re.compile(
    r",?\s\(?(?:because|since|which|where|but|so that|as (?:we|the|it|shown|required|desired)|I (?:hope|think|believe|guess)|"
    r"and (?:we|the|this|that|it))\b|,\snot\b|\s\((?:not|we|I|discard\w*|reject\w*|ignor\w*|exclud\w*|see|this|that|it)\b|"
    r",\sas\s(?=\d)|\s(?:-{2,}|—)\s|\s-\s(?=(?:the|this|that|which)\b)|"
    r",?\s(?:i\.e\.|that is\b|namely\b|or equivalently\b|equivalently\b)|"
    r"(?<=[0-9}%$)])\s(?=(?-i:That|This|It|So|Thus|Therefore|Hence|Done|Let|Hope|I|We|The|Note)\b)|"
    r"(?:(?<!\bRs)(?<!approx)(?!(?<=\b[A-Z])\.\s[\d$\\(])[.。;](?!\s+-?[\d.,]+\s*$)|(?<![0-9a-z)}])!)(?=\s|$|[*_]{1,2}(?:\s|$))",
    re.IGNORECASE,
)
_IS_NOT = re.compile(r"^n['’]t ")  # behind `the answer is`
# `not 45, it is 46`, `not 45. It's actually 46`
_CORRECTION = re.compile(
    r"(?:not|n['’]t) (?=[\W\d]|[b-z]\b)(?:[^.\n]|\.(?=\d)){1,40}?"
    r"(?P<instead>(?:[,.;:]|\s+(?:-{1,3}|–|—))?\s+(?:(?:but|rather|instead),?\s+)?"
    r"(?:it(?: is|['’]s| (?:must|should) be)|they(?: are|['’]re| (?:must|should) be))\s+(?:(?:actually|rather|instead|in fact),?\s+)?)"
    r"(?=\S)",  # `it is 3 too many`
    re.IGNORECASE,
)
NOT_BUT = re.compile(r"^not [^.\n]{1,40}?,? but (?:rather |actually |instead )?(?=\S)")  # `not 9 but 8`
BETWEEN_BOXES = re.compile(
    r"(?: ?[A-Za-z]+ and)?(?:[\s,;$]|\\quad|\\text\s*\{|\}|\\[()\[\]]|and\b|or\b|\\ )*"
    r"(?:for (?:part )?\(?\w{1,3}\)?[\s}]*(?:and\b|or\b|,)?[\s}]*|[A-Za-z](?:_\w|_\{\w+\})? ?= ?)?"
)
FORMULA = re.compile(
    r"\$\$(?P<display>[^$]+)\$\$|\$(?P<inline>[^$]+)\$|\\\((?P<round>(?:(?!\\\().)+?)\\\)|\\\[(?P<square>(?:(?!\\\[).)+?)\\\]", re.DOTALL
)

MOST_BETWEEN_BOXES = 90  # characters
LONGEST_INDENT = 12  # characters before and behind a heading in its line
_OPENING_BOX = re.compile(r"[\\\x08\x0c]{0,2}[a-z]+\s*\{?$")
DELIMITERS = (("\\[", "\\]"), ("$$", "$$"))
DECORATION = " \t\r\n*_:：#`$"
LEADING = re.compile(r"[\s:：]*(?:(?:the )?(?:final )?answer[*_:： ]*\n\s*)?(?:[*_]{1,3}(?=\s|$)[\s:：]*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Statement:
    """A statement of an answer.

    Attributes:
        text: the answer as it is written, with its decoration.
        start, end: where the answer stands in the text.
        mark_start: where the mark before it begins, for `####`, phrases and their corrections.
    """

    mark: Mark
    text: str
    start: int
    end: int
    mark_start: int = -1


def visible(text: str) -> str:
    """Return a text without its thoughts, up to the first token of a chat template that is spelled out in it."""
    first = CHAT_TOKEN.search(text)
    if first and text[: first.start()].strip():
        text = text[: first.start()]
    spoken, open_at, kept_from = list[str](), None, 0
    for match in THOUGHT.finditer(text):
        if not match[1] and open_at is None:
            open_at = match.start()
        elif match[1]:
            spoken = [*spoken, text[kept_from:open_at]] if open_at is not None else []
            open_at, kept_from = None, match.end()
    return "".join([*spoken, text[kept_from:open_at]])


def unemphasized(text: str) -> str:
    """Return a text without the marks of bold and italic parts of its lines. A line that is bold as a whole is a heading, and stays."""
    return EMPHASIS.sub(_inner_of_emphasis, text)


def _inner_of_emphasis(match: re.Match[str]) -> str:
    before = match.string[max(match.start() - LONGEST_INDENT, 0) : match.start()]
    behind = match.string[match.end() : match.end() + LONGEST_INDENT]
    begins_line = not before.rpartition("\n")[2].strip("#*- \t") and ("\n" in before or match.start() <= LONGEST_INDENT)
    is_heading = begins_line and not behind.partition("\n")[0].strip()
    return match[0] if is_heading else match["strong"] or match["inner"]


def until_next_question(text: str, answered: re.Pattern[str]) -> str:
    """Return a text up to the first question that the model asks itself after an answer, which `answered` finds."""
    first = answered.search(text)
    following = NEXT_QUESTION.search(text, first.end()) if first else None
    return text[: following.start()] if following else text


def hashed(text: str) -> list[Statement]:
    """Return the statements behind `####`: the rest of the line, or the next line that has something."""
    return [replace(one, text=_sentence(one.text)) for one in _behind(text, "hashes", HASHES)]


def tagged(text: str) -> list[Statement]:
    """Return what stands between `<answer>` and `</answer>`."""
    found, start = list[Statement](), None
    for match in TAG.finditer(text):
        if match[0][1] != "/":
            start = match.end()
        elif start is not None:
            found.append(Statement("tag", text[start : match.start()], start, match.start()))
            start = None
    return found


def phrased(text: str) -> list[Statement]:
    """Return what follows "the answer is" and the like, to the end of the sentence.

    "The answer is not 45, it is 46" is two statements: `not 45`, and the correction `46`.
    """
    found = [statement for one in _behind(text, "phrase", PHRASE) for statement in _with_correction(one)]
    return [replace(one, text=_IS_NOT.sub("not ", _sentence(one.text))) for one in found]


def _with_correction(denial: Statement) -> list[Statement]:
    match = _CORRECTION.match(denial.text)
    if match is None:
        return [denial]
    correction = replace(denial, mark="correction", text=denial.text[match.end() :], start=denial.start + match.end())
    return [replace(denial, text=denial.text[: match.start("instead")]), correction]


def boxed(text: str) -> list[Statement]:
    r"""Return the contents of the closed boxes, in order of their ends; of nested ones only the innermost."""
    found = list[Statement]()
    opened = list[int | None]()  # start of the content of each open brace if it belongs to a box, else None
    for match in BOX_OR_BRACE.finditer(text):
        if match["short"]:
            found.append(Statement("box", match["short"], *match.span("short")))
        elif match[0] == "{" or match["box"] or match["bare"]:
            opened.append(match.end() if match["box"] or match["bare"] else None)
        elif match[0] == "}" and opened and (start := opened.pop()) is not None and not (found and found[-1].start >= start):
            found.append(Statement("box", text[start : match.start()], start, match.start()))
    return found


def joined(boxes: list[Statement], text: str, adjacent: bool) -> Statement | None:
    """Return the last box, together with the boxes before it that only a comma, `and` or the like separates: their answer is a list.

    Args:
        adjacent: whether boxes with nothing between belong together too, as in a reference.
    """
    if not boxes:
        return None
    together = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        between = text[box.end + 1 : together[0].start]
        if not _joins(between, adjacent) or "," in _outside_brackets(box.text) or len(together) >= 20:
            break
        together.insert(0, box)
    if len(together) == 1 or "," in _outside_brackets(boxes[-1].text):
        return boxes[-1]
    return Statement("box", ", ".join(box.text for box in together), together[0].start, together[-1].end)


def _joins(between: str, adjacent: bool) -> bool:
    if len(between) > MOST_BETWEEN_BOXES:
        return False
    between = _OPENING_BOX.sub("", between)
    if not between.strip(" \n$"):
        return adjacent
    return BETWEEN_BOXES.fullmatch(between) is not None and re.search(r"[,;]|and|or", between) is not None


def _outside_brackets(text: str) -> str:
    depth, kept = 0, list[str]()
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        kept.append(character if depth == 0 else " ")
    return re.sub(r"\d,\d{3}(?!\d)", "", "".join(kept).replace("\\,", " ").replace(",\\!", " "))


def bold(text: str) -> list[Statement]:
    """Return what is set in bold."""
    return [Statement("bold", match[1], *match.span(1)) for match in BOLD.finditer(text)]


def formulas(text: str) -> list[Statement]:
    r"""Return the contents of `$…$`, `$$…$$`, `\(…\)` and `\[…\]`."""
    text = text.replace(r"\$", f"{CURRENCY} ")
    found = ((match, next(name for name, group in match.groupdict().items() if group)) for match in FORMULA.finditer(text))
    return [Statement("phrase", match[name], *match.span(name)) for match, name in found]


def _behind(text: str, mark: Mark, pattern: re.Pattern[str]) -> list[Statement]:
    """Return what follows each match, up to the next one, that is not empty."""
    matches = list(pattern.finditer(text))
    ends = [*(match.start() for match in matches[1:]), len(text)]
    found = (
        replace(_line_behind(text, mark, match.end(), end), mark_start=match.start()) for match, end in zip(matches, ends, strict=False)
    )
    return [one for one in found if one.text.strip(DECORATION)]


def _line_behind(text: str, mark: Mark, start: int, stop: int) -> Statement:
    """Return the rest of the line at `start`, or the next lines if it has nothing but decoration: a display formula may take several."""
    begin = LEADING.match(text, start, stop).end()  # type: ignore[union-attr]  # it matches nothing, too
    for opening, closing in DELIMITERS:
        if text.startswith(opening, begin, stop):
            inner = begin + len(opening)
            close = text.find(closing, inner, stop)
            if close >= 0:
                return Statement(mark, text[begin : _end_of_line(text, close + len(closing), stop)], begin, close)
    end = _end_of_line(text, begin, stop)
    return Statement(mark, text[begin:end], begin, end)


def _end_of_line(text: str, start: int, stop: int) -> int:
    end = text.find("\n", start, stop)
    return stop if end < 0 else end


def _sentence(rest: str) -> str:
    """Return a line up to the end of its first sentence or to a remark: `12.5` for `12.5. I hope it is correct.`"""
    rest = NOT_BUT.sub("", rest.strip())
    if rest.endswith("**") and "*" not in rest.rstrip("*"):  # opened before the mark: `**Answer: 12**`
        rest = rest.rstrip("*")
    if rest.count("}") > rest.count("{"):  # {"answer": 12}
        rest = rest.removesuffix("}")
    rest = _up_to_remark(rest)
    code = rest.rstrip(" ,`")
    return code if "`" in rest and "`" not in code else rest  # opened before the mark: `#### 12` in inline code


def _up_to_remark(rest: str) -> str:
    for match in REMARK.finditer(rest):
        before = rest[: match.start()]
        if before.strip(" *_$") and before.count("$") % 2 == 0 and before.count("{") == before.count("}"):
            return before
    return rest
