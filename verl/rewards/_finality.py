"""Whether a sentence such as "the answer is 9" states the final answer.

Others speak of another answer: "a common wrong answer is 9", "some might say the answer is 9", "if order mattered, the answer would be 9",
"the student's answer is 9".

Only the sentence itself is looked at, and at most SPAN characters of it on either side.
"""

import re

SPAN = 200
_SENTENCE_END = re.compile(r"[.!?。]['\")]*\s|[。\n]")
# What begins a new thought in a sentence: what stands before it does not qualify the answer.
_TURN = re.compile(r"\b(?:so|thus|therefore|hence|but|however)\b|;|\s[-–—]+\s|所以|因此|但是?", re.IGNORECASE)

_OWNERS = r"the|an?|my|our|his|her|their|your|its|this|that|some|any|one|another|each|every|[\w.]+['’]s?"
_NO_ADJECTIVES = rf"(?:(?:{_OWNERS}|is|are|was|were|be|so|and|or|but|thus|hence|then|therefore|of|for|to|in|we|i|it|that|which|get|gets)\s)"
_NOUN_PHRASE = re.compile(
    rf"(?<![\w'’])(?P<owner>{_OWNERS})\s+(?P<adjectives>(?:(?!{_NO_ADJECTIVES})[\w-]+\s+){{0,4}})[*_\"]{{0,3}}$", re.IGNORECASE
)
_PLAIN_OWNERS = {"the", "my", "our", "this", "that", "its"}
_PLAIN_ADJECTIVES = set(
    "final correct right actual true real exact overall numerical numeric simplified simplest revised updated corrected new only desired "
    "required complete full short best proper accurate ultimate requested integer decimal single unique resulting".split()
)
_OTHERS = re.compile(
    r"\b(?:previous|earlier|prior|old|original|initial|wrong|incorrect|common|false|mistaken|tempting|naive|alternative|intermediate|"
    r"student|user|model|another|other|first|second)\s+(?:final\s+)?$|(?:错误|錯誤|之前|学生|學生|常见|常見)的?$",
    re.IGNORECASE,
)
_SAY = r"(?:say|think|believe|claim|assume|argue|conclude|guess|suppose|answer)s?"
_OPINION = re.compile(
    rf"\b(?:some|many|most|people|students?|others|someone|anyone|one|they|you|he|she)\b.{{0,40}}?"
    rf"(?:\b(?:might|may|could|would)\b(?:[^,]{{0,40}}$|.{{0,25}}\b{_SAY}\b)|\b{_SAY}\b[^,]{{0,30}}$)|"
    r"(?<!\bwe )(?<!\bi )\b(?:might|could)\b[^,]{0,60}$|"
    r"(?<!\bi )(?<!\bwe )(?<!\bi had )(?<!\bi have )\b(?:wrongly|mistakenly|incorrectly|erroneously|naively|tempt(?:ed|ing))\b|"
    r"\b(?:says|thinks|claims|believes|argues|thought|said|claimed|believed|guessed|argued)\b[^,]{0,30}$|"
    rf"\b(?:wrong|incorrect|false|mistake|not|never)\b[^,]{{0,25}}\b(?:{_SAY}|that|mean|imply)\b[^,]{{0,30}}$|"
    rf"n['’]t\b[^,]{{0,25}}\b(?:{_SAY}|mean|imply)\b[^,]{{0,30}}$",
    re.IGNORECASE,
)
_CONDITION = re.compile(r"\b(?:if|unless|suppose|supposing|assuming|otherwise|without(?! loss))\b|如果|假如|倘若", re.IGNORECASE)
_WOULD_BE = re.compile(r"\bwould be\b", re.IGNORECASE)
# `so the answer would be 12` is a result, `the answer would be 12` one of another case.
_RESULT = re.compile(
    r"\b(?:so|thus|therefore|hence|wait|actually)\b[,\s]*(?:(?:the|my|our)\s+)?(?:(?:final|correct|right|actual)\s+)*$|"
    r"\b(?:correct|right|actual|revised|updated|corrected)\s+$",
    re.IGNORECASE,
)
_COULD_BE = re.compile(r"\b(?:could|might|may) be\b", re.IGNORECASE)
_PAST = re.compile(r"\bwas\b", re.IGNORECASE)
_BEFORE = re.compile(r"\b(?:previously|earlier|before|initially|originally|at first)\b", re.IGNORECASE)
_WITHDRAWN = re.compile(
    r"(?:(?!\bnot\b).){0,100}?\b(?:which|but (?:this|that|it)|however,? (?:this|that|it)|yet (?:this|that|it))"
    r"(?:['’]s| is| was| would be| seems)? (?:\w+ly )?(?:wrong|incorrect|not|false|impossible|mistaken|"
    r"ignor\w+|forgets?|miss\w*|neglects?|overlooks?|fails?|double|over|under)|"
    r"(?:(?!\bnot\b).){0,60}?\((?:wrong|incorrect)\)|"
    r"[^,]{0,40},? (?:if|unless|provided|assuming|according to)\b|"
    r"[^,]{0,40}, (?:some|many|one|people|students?) (?:might|may|could|would|say)\b|"
    r"(?:(?!\bnot\b)[^,]){0,40} (?:is|was) (?:wrong|incorrect)\b",
    re.IGNORECASE,
)


def is_final(text: str, mark_start: int, start: int) -> bool:
    """Return whether a phrase states the final answer of a text.

    Args:
        mark_start: where the words begin that announce the answer, as in `answer is`.
        start: where the answer itself begins.
    """
    before = text[max(mark_start - SPAN, 0) : mark_start]
    before = before[max((end.end() for end in _SENTENCE_END.finditer(before)), default=0) :]
    behind = text[start : start + SPAN]
    end = _SENTENCE_END.search(behind)
    behind = behind[: end.start()] if end else behind
    return not (_is_of_another(before) or _is_doubted(before, text[mark_start:start], behind))


def _is_of_another(before: str) -> bool:
    """Whether the answer is `a common wrong answer`, `the previous answer`, `the student's answer`."""
    phrase = _NOUN_PHRASE.search(before)
    if phrase is None:
        return _OTHERS.search(before) is not None
    return phrase["owner"].casefold() not in _PLAIN_OWNERS or not set(phrase["adjectives"].casefold().split()) <= _PLAIN_ADJECTIVES


def _is_doubted(before: str, mark: str, behind: str) -> bool:
    clause = before[max((turn.end() for turn in _TURN.finditer(before)), default=0) :]
    if _OPINION.search(clause) or _CONDITION.search(clause) or _COULD_BE.search(mark) or _WITHDRAWN.match(behind):
        return True
    if _WOULD_BE.search(mark) and (_CONDITION.search(before) or not _RESULT.search(before)):
        return True
    return _PAST.search(mark) is not None and (_BEFORE.search(before) or _BEFORE.search(behind)) is not None
