"""Words of a text, for the rewards that count how many of them an answer shares with the reference.

A word is what stands between white space, without punctuation, in lower case. Chinese, Japanese, Thai, Lao, Khmer and Burmese are
written without spaces: there, each character is a word, with the vowel signs that belong to it. Korean has spaces.
"""

import re
import string
import unicodedata

UNSPACED = (
    "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff"  # marks of repetition, hiragana, katakana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "\u0e00-\u0e7f\u0e80-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
)
CHARACTER = re.compile(
    rf"[{UNSPACED}][\u0300-\u036f\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece\u102b-\u103e\u17b4-\u17d3]*"
)
ASCII_PUNCTUATION = frozenset(string.punctuation)


def words_of(text: str, *, without_punctuation: str = "") -> list[str]:
    """Return the words of a text, in order.

    Args:
        without_punctuation: what takes the place of a punctuation mark: nothing, so that `don't` is one word, or a space.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    text = "".join(without_punctuation if is_punctuation(character) else character for character in text)
    return CHARACTER.sub(r" \g<0> ", text).split()


def is_punctuation(character: str) -> bool:
    """Return whether a character is punctuation, or one of the other marks in ASCII, such as `+` and `$`."""
    return character in ASCII_PUNCTUATION or unicodedata.category(character).startswith("P")
