"""Splitting of a text at what stands outside its brackets."""

import re

_OPENING, _CLOSING = "([{", ")]}"
_JOINED = re.compile(r"[,;]|(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])|∪|∨|∧|或者?|(?<=[0-9a-z})\] ])[和与及](?=[-0-9a-z\\( ])", re.IGNORECASE)


def split(text: str, only: str | None = None) -> tuple[list[str], list[str]]:
    """Split a text at the commas, semicolons, `and`, `or` and unions outside brackets. Returns the parts and what stood between them."""
    open_at = depths(text)
    matches = [match for match in _JOINED.finditer(text) if open_at[match.start()] == 0 and (only is None or match[0] == only)]
    if any(match[0] != "," or text[match.end() :].startswith(" ") for match in matches):  # `1,000, 2,000` is split at `, `
        matches = [match for match in matches if not _between_thousands(text, match)]
    parts, separators, start = list[str](), list[str](), 0
    for match in matches:
        part = text[start : match.start()].strip()
        if part:
            parts.append(part)
            separators.append(match[0].casefold())
        start = match.end()
    return [*parts, last] if (last := text[start:].strip()) else parts, separators


def _between_thousands(text: str, comma: re.Match[str]) -> bool:
    before, after = text[: comma.start()], text[comma.end() :]
    return comma[0] == "," and before[-1:].isdigit() and re.match("[0-9]{3}(?![0-9])", after) is not None


def depths(text: str) -> list[int]:
    """Return the number of brackets that are open before each character; `\\{` counts as a bracket."""
    depths, depth = [], 0
    for character in text:
        if character in _CLOSING:
            depth = max(depth - 1, 0)
        depths.append(depth)
        depth += character in _OPENING
    return depths


def parts_of_bracket(inner: str) -> list[str]:
    parts, separators = list[str](), ";" if ";" in inner else ","
    open_at, start = depths(inner), 0
    for position, character in enumerate(inner):
        if character == separators and open_at[position] == 0:
            parts, start = [*parts, inner[start:position]], position + 1
    return [*parts, inner[start:]]


def is_one_group(text: str, braces: bool) -> bool:
    """Whether the first bracket is closed by the last character."""
    open_at = depths(text)
    return all(depth > 0 for depth in open_at[(2 if braces else 1) : -1]) and open_at[-1] == 0 if text[0] != "]" else "," in text
