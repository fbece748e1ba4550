"""The encoding of a file that is not UTF-8: UTF-16 and UTF-32 are certain, any other is named as likely, with a sample of the text."""

import codecs
import gzip
import re
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from verl.data.row import Fault

if TYPE_CHECKING:
    from charset_normalizer import CharsetMatch

BOM = codecs.BOM_UTF8
MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
WIDE = ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE")
# Encodings that files are written in, each with those that it contains: GB18030 has GBK and GB2312, CP932 has Shift-JIS, CP949 has EUC-KR,
# CP1252 has Latin-1. A file in the smaller one is read right by the larger one. Of two that fit equally well, the earlier one comes first.
LEGACY = (
    *("cp1252", "cp1251", "koi8_r", "euc_jp", "gb18030", "big5hkscs", "cp932", "cp949"),
    *("cp1250", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp874", "iso8859_2", "mac_roman", "cp850"),
)
CUT_CHARACTER = re.compile(rb"[\x80-\xff]+\Z")  # what may be half of a character, at the end of a cut line
WORD = re.compile(rb"[A-Za-z]{3,}")
SAMPLE_BYTES = 2**16
SHOWN_BYTES = 24  # of the text around the first byte that is not UTF-8
MOST_SHOWN = 6
LITTLE_CHAOS = 0.06


def marked(head: bytes) -> str | None:
    """Return the encoding that a file's byte order mark names, if that is UTF-16 or UTF-32."""
    return next((name for mark, name in MARKS.items() if head.startswith(mark)), None)


def wide(head: bytes) -> str | None:
    """Return which of UTF-16 and UTF-32 a file without a byte order mark is in, by the zeros that these have in ASCII characters."""
    zeros = [head[start::4].count(0) for start in range(4)]
    if sum(zeros) < len(head) / 20 or _reads_as_utf8(head):
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


def _reads_as_utf8(head: bytes) -> bool:
    """Return whether bytes are UTF-8 that has some zeros in it: its words are not spread over two bytes a letter."""
    bad = _bad_byte(head)
    if bad is not None and bad < len(head) - 3:  # not a character that is cut at the end
        return False
    return not head.isascii() or sum(map(len, WORD.findall(head))) > len(head) / 4


def not_utf8(path: Path, byte: int, offset: int) -> Fault:
    """Return the fault of a text that is not UTF-8.

    Args:
        byte, offset: the first byte that is not, and where it is in the file's text.
    """
    names = likely(path, path.stat().st_mtime_ns)
    if names is None:
        fix = "the other lines of the file are UTF-8: write this one again, or remove it"
    elif names:
        listed = "; ".join(f"{name} reads {text!r}" for name, text in names)
        fix = f"convert the file to UTF-8 from the encoding that gives the right text ({listed}), with `iconv -t UTF-8 -f` and its name"
    else:
        fix = "convert the file to UTF-8 with the program that wrote it"
    return Fault(f"not UTF-8: byte 0x{byte:02x} at offset {offset:,}", fix)


@lru_cache(maxsize=16)
def likely(path: Path, changed_ns: int) -> list[tuple[str, str]] | None:
    """Return the likely encodings of a file, best first, each with the text around the first byte that is not UTF-8; may be empty.

    Args:
        changed_ns: when the file was changed; another time asks anew.
    Returns:
        None if the file is UTF-8, apart from some of its lines.
    """
    from charset_normalizer import from_bytes  # only a file that is not UTF-8 needs it

    lines = _sample(path)
    wrong = [line for line in lines if _bad_byte(line) is not None]
    if len(wrong) * 2 <= len(lines):
        return None
    sample = b"".join(wrong)
    first = _bad_byte(sample) or 0
    found: dict[str, str] = {}
    matches = [(_rank(match), match) for match in from_bytes(sample, cp_isolation=list(LEGACY), language_threshold=0.2)]
    for (*_, number), _ in sorted(matches, key=itemgetter(0)):
        found.setdefault(_around(sample, first, LEGACY[number]), LEGACY[number])
    return [(name.upper().replace("_", "-"), text) for text, name in found.items()][:MOST_SHOWN]


def _rank(match: "CharsetMatch") -> tuple[float, float, float, int]:
    """Return what orders matches, best first, by what `charset_normalizer` measures; of equal ones, the earlier one in LEGACY.

    Of two readings that are as plausible, the one with more characters of several bytes is likelier: CP932 reads single bytes of other
    encodings as half-width kana. In such a reading, a little disorder means nothing: it is that of rare punctuation.
    """
    number = min(LEGACY.index(name) for name in match.could_be_from_charset if name in LEGACY)
    several_bytes = round(match.multi_byte_usage, 2)
    chaos = 0.0 if several_bytes > 0.1 and match.chaos < LITTLE_CHAOS else round(match.chaos, 2)
    return chaos, -round(match.coherence, 2), -several_bytes, number


def _sample(path: Path) -> list[bytes]:
    """Return the first lines of a file that are not ASCII; a long one without its end."""
    with path.open("rb") as raw:
        is_gzip = raw.read(2) == b"\x1f\x8b"
    lines: list[bytes] = []
    with gzip.open(path) if is_gzip else path.open("rb") as file:
        for line in file:
            if sum(map(len, lines)) > SAMPLE_BYTES:
                break
            if not line.isascii():
                lines.append(line if len(line) <= SAMPLE_BYTES else CUT_CHARACTER.sub(b"", line[:SAMPLE_BYTES]))
    return lines


def _bad_byte(line: bytes) -> int | None:
    """Return the offset of the first byte that is not UTF-8."""
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return None


def _around(sample: bytes, first: int, name: str) -> str:
    """Decode the sample, and return the text around a byte offset."""
    start = len(sample[:first].decode(name, errors="replace"))
    text = sample.decode(name, errors="replace")
    return text[max(0, start - SHOWN_BYTES // 2) : start + SHOWN_BYTES].strip().replace("\n", " ")
