"""What is wrong with the characters of a text: found by pattern, and by ftfy, which knows what wrongly decoded text looks like."""

import re
from collections.abc import Iterator

from ftfy import fix_encoding
from ftfy.badness import is_bad

AROUND = 30  # characters of an example on either side
LOST, CONTROL, RETURNS = "U+FFFD, in place of a character that was lost", "control characters", "carriage returns"
INVISIBLE, PRIVATE, GARBLED = "invisible characters", "private-use characters", "text that was decoded with the wrong encoding"
ENTITIES = "HTML entities, such as &amp;"
FIXES = {
    LOST: "convert the source again, with its right encoding",
    CONTROL: "remove them",
    RETURNS: "write line ends as \\n, if the model should not learn to write \\r",
    INVISIBLE: "remove them, if the text does not need them",
    PRIVATE: "replace them: they have no meaning outside the font or program that they come from",
    GARBLED: "decode the source with its right encoding",
    ENTITIES: "write the characters themselves, if the text is no HTML",
}
IN_ASCII = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
ENTITY = re.compile(r"&(?:amp|lt|gt|quot|apos|nbsp|#\d{2,5}|#x[0-9a-fA-F]{2,5});")
# Without the joiners U+200C and U+200D, which Persian, Indian scripts and emoji need.
ELSEWHERE = re.compile(
    "[\x80-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff\ufff9-\ufffb\ufffd\ue000-\uf8ff\U000f0000-\U0010ffff]"
)
# U+FFFD, encoded as UTF-8 and read as GB18030; memory that a debugger has filled, read as GB18030.
IN_CHINESE = re.compile("锟斤拷|烫烫烫|屯屯屯")


def odd_characters(text: str) -> Iterator[tuple[str, str]]:
    """Yield each kind of rare or broken characters in a text once, with an example."""
    seen: set[str] = set()
    for found in _matches(text):
        kind = _kind(found[0])
        if kind not in seen:
            seen.add(kind)
            yield kind, excerpt(text, found.start(), found.end())
    if not text.isascii() and GARBLED not in seen and is_bad(text):
        line = next((line for line in text.splitlines() if is_bad(line)), text)
        fixed = fix_encoding(line)
        yield GARBLED, f"{line:.{2 * AROUND}}{f' → {fixed:.{2 * AROUND}}' if fixed != line else ''}"


def _matches(text: str) -> Iterator["re.Match[str]"]:
    yield from IN_ASCII.finditer(text)
    if "&" in text:
        yield from ENTITY.finditer(text)
    if not text.isascii():
        yield from ELSEWHERE.finditer(text)
        yield from IN_CHINESE.finditer(text)


def _kind(found: str) -> str:
    if found == "\r":
        return RETURNS
    if found[0] == "&":
        return ENTITIES
    if found == "\ufffd":
        return LOST
    if len(found) > 1:
        return GARBLED
    if found < "\xa0":
        return CONTROL
    return PRIVATE if "\ue000" <= found <= "\uf8ff" or found >= "\U000f0000" else INVISIBLE


def excerpt(text: str, start: int, end: int) -> str:
    """Return a part of a text with what is around it."""
    before, after = "…" if start > AROUND else "", "…" if end + AROUND < len(text) else ""
    return f"{before}{text[max(0, start - AROUND) : end + AROUND]}{after}"
