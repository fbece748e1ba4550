"""The encoding of a file that is not UTF-8: UTF-16 and UTF-32 are certain, any other is named as likely, with a sample of the text."""

import codecs
import gzip
from functools import lru_cache
from pathlib import Path

from verl.data.row import Fault

BOM = codecs.BOM_UTF8
MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
WIDE = ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE")
# Encodings that files are written in, each with those that it contains: GB18030 has GBK and GB2312, CP932 has Shift-JIS, CP949 has EUC-KR,
# CP1252 has Latin-1. A file in the smaller one is read right by the larger one. Of two that fit equally well, the earlier one comes first.
LEGACY = (
    *("cp1252", "gb18030", "big5hkscs", "cp932", "euc_jp", "cp949", "cp1251", "koi8_r"),
    *("cp1250", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp874", "iso8859_2", "mac_roman", "cp850"),
)
SAMPLE_BYTES = 2**16
SHOWN_BYTES = 24  # of the text around the first byte that is not UTF-8
MOST_SHOWN = 4


def marked(head: bytes) -> str | None:
    """Return the encoding that a file's byte order mark names, if that is UTF-16 or UTF-32."""
    return next((name for mark, name in MARKS.items() if head.startswith(mark)), None)


def wide(head: bytes) -> str | None:
    """Return which of UTF-16 and UTF-32 a file without a byte order mark is in, by the zeros that these have in ASCII characters."""
    zeros = [head[start::4].count(0) for start in range(4)]
    if sum(zeros) < len(head) / 20:
        return None
    for name in WIDE:
        size = 4 if "32" in name else 2
        try:
            text = codecs.getincrementaldecoder(name)().decode(head[: len(head) // size * size])
        except UnicodeDecodeError:
            continue
        if "\0" not in text and sum(character.isascii() for character in text) * 20 > len(text):
            return name
    return None


def not_utf8(path: Path, byte: int, offset: int) -> Fault:
    """Return the fault of a text that is not UTF-8.

    Args:
        byte, offset: the first byte that is not, and where it is in the file's text.
    """
    names = likely(path)
    fix = "convert the file to UTF-8 with the program that wrote it, or find out its encoding and use iconv"
    if names:
        listed = "; ".join(f"{name} reads {text!r}" for name, text in names)
        fix = f"convert the file to UTF-8 from the encoding that gives the right text ({listed}), with `iconv -t UTF-8 -f` and its name"
    return Fault(f"not UTF-8: byte 0x{byte:02x} at offset {offset:,}", fix)


@lru_cache(maxsize=16)
def likely(path: Path) -> list[tuple[str, str]]:
    """Return the likely encodings of a file, best first, each with the text around the first byte that is not UTF-8; may be empty."""
    from charset_normalizer import from_bytes  # only a file that is not UTF-8 needs it

    sample, first = _sample(path)
    found: dict[str, str] = {}
    matches = [
        (match.chaos, -match.coherence, min(LEGACY.index(name) for name in match.could_be_from_charset if name in LEGACY))
        for match in from_bytes(sample, cp_isolation=list(LEGACY))
    ]
    for *_, number in sorted(matches):
        found.setdefault(_around(sample, first, LEGACY[number]), LEGACY[number])
    return [(name.upper().replace("_", "-"), text) for text, name in found.items()][:MOST_SHOWN]


def _sample(path: Path) -> tuple[bytes, int]:
    """Return the lines of a file that are not ASCII, and the offset in them of the first byte that is not UTF-8."""
    with path.open("rb") as raw:
        is_gzip = raw.read(2) == b"\x1f\x8b"
    lines: list[bytes] = []
    with gzip.open(path) if is_gzip else path.open("rb") as file:
        for line in file:
            if not line.isascii() and sum(map(len, lines)) < SAMPLE_BYTES:
                lines.append(line[:SAMPLE_BYTES])
    sample = b"".join(lines)
    try:
        return sample, len(sample.decode("utf-8"))
    except UnicodeDecodeError as error:
        return sample, error.start


def _around(sample: bytes, first: int, name: str) -> str:
    """Decode the sample, and return the text around a byte offset."""
    start = len(sample[:first].decode(name, errors="replace"))
    text = sample.decode(name, errors="replace")
    return text[max(0, start - SHOWN_BYTES // 2) : start + SHOWN_BYTES].strip().replace("\n", " ")
