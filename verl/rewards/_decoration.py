"""Decoration of answers, and the words that lead to them, which say nothing: `**The answer is: about 12.**` is `12`."""

import re

from verl.rewards._spelling import CURRENCY, plain

LONGEST = 1000  # characters; what is longer is only compared as text
_WRAPPERS = (
    ("**", "**"),
    ("__", "__"),
    ("*", "*"),
    ("_", "_"),
    ("`", "`"),
    ('"', '"'),
    ("'", "'"),
    ("{", "}"),
    ("<", ">"),
)
BEGINS_A_NUMBER = r"(?=-?[.0-9]|\\(?:frac|sqrt|pi)(?![a-zA-Z])|" + CURRENCY + ")"
_LABEL = re.compile(r"^(?:[Pp]art )?\(?(?:i{1,3}|iv|vi{0,3})\)[.:]? " + BEGINS_A_NUMBER)  # `(ii) 5` is 5, the answer to a part
_THEREFORE = re.compile(r"^(?:so|thus|hence|therefore|finally),? (?=\S)", re.IGNORECASE)
_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore|then)\b,? ?)?(?:the )?(?:(?:final|correct|right|best) )?(?:answer|result|solution|option|choice)s? ?"
    r"(?:(?:is|are|=|:|would be|should be)(?: ?:)? ?|- (?=\S)|(?=\(?[A-Z]\)?(?:[.):]|$)|-?[0-9]))(?:(?:the )?(?:option|choice|answer)s? )?",
    re.IGNORECASE,
)
# 答案是12, 故选B
_CHINESE_LEAD = re.compile(
    r"(?:所以|因此|故)?,? ?(?:最终|最后|最後|正确|正確)?的?答案(?:应该|應該)?(?:是|为|為|:)[: ]*|"
    r"(?:故|应)?选(?:项|择)?[: ]{0,2}(?=\(?[A-Z])"
)
_ABOUT = re.compile(
    r"(?:≈|~|大约|大約|约|約|about |nearly |almost |approximately |approx\.? |roughly |around |"
    r"exactly |just |only |actually |indeed |in fact |really |simply |altogether[,:]? |in total[,:]? |a total of )\s*",
    re.IGNORECASE,
)
_ABOUT_BEHIND = re.compile(
    r"[ ,]+(?:or so|or thereabouts|approximately|approx\.?|roughly|more or less|exactly|each|in total|total|altogether|in all)",
    re.IGNORECASE,
)
# What a parameter may be is no part of the answer: `\frac{\pi}{2}+k\pi, k \in \mathbb{Z}`
_DOMAIN = re.compile(
    r"(?<=[\w})]),? \(?(?:where |for (?:all |any |some )?|with )?[a-z] ?"
    r"(?:∈ ?\\mathbb\{[NZ]\}|is (?:an?|any) (?:positive |non-negative )?integer)\)?$|"
    r",? for (?:all |any |every |some )?integers? [a-z]$"
)


def compact(text: str) -> str:
    """Return a text for comparison letter by letter: without spaces that mean nothing."""
    return re.sub(r"(?<![0-9]) +| +(?![0-9])", "", unwrapped(plain(text)) if len(text) <= LONGEST else text)


def unwrapped(text: str) -> str:
    """Remove decoration and what leads to an answer: `**The answer is: 12.**` is `12`."""
    before = None
    while before != text:
        before = text
        text = _THEREFORE.sub("", text.strip(" →").rstrip("\\").strip(";:,").removesuffix("####").strip())
        text = _DOMAIN.sub("", _LABEL.sub("", text.removeprefix("#")))
        chinese = _CHINESE_LEAD.match(text)
        text = text[chinese.end() :] if chinese and chinese.end() < len(text) else text
        text = text.rstrip(".") if not text.endswith("..") else text
        text = text.removeprefix("=").strip() if not text.startswith(("==", "=>")) else text
        text = text.removesuffix("**").removeprefix("**") if text.count("**") == 1 else text
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


def about(text: str) -> str:
    """Remove words that say how exact a value is: `about 12` is `12`."""
    match = _ABOUT.match(text)
    text = text[match.end() :].strip() if match else text.strip()
    behind = _ABOUT_BEHIND.search(text)
    return text[: behind.start()] if behind and behind.end() == len(text) else text
