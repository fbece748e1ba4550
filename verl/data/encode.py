"""Tokenization in which text of the data can never become a control token.

A tokenizer reads the characters `<|im_end|>` as its control token wherever they occur. In a question they are text and must not end
the turn. `hide_in` therefore replaces each control token in the data by a private-use character before the chat template is rendered.
The control tokens of the rendered text are then the template's own, and a tokenizer without control tokens encodes the text between them.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from verl.errors import UserError

FIRST_PRIVATE, LAST_PRIVATE = 0xF0000, 0xFFFFD
ANCHOR = "\U0010fffd"
BRACKETED = re.compile(r"[<\[{(|].*[>\])}|]", re.DOTALL)
PROBE = "Hello, world! 12 + 3 = 15\n\n  naïve 你好\tdone."


class Disguise:
    """Replaces the control text of one row by private-use characters that do not occur in the row."""

    def __init__(self, row: object):
        taken = "".join(strings(row))
        self._free: Iterator[str] = (c for c in map(chr, range(FIRST_PRIVATE, LAST_PRIVATE)) if c not in taken)
        self._shown: dict[str, str] = {}

    def character_for(self, part: str) -> str:
        character = next((c for c, shown in self._shown.items() if shown == part), None) or next(self._free)
        self._shown[character] = part
        return character

    @property
    def parts(self) -> Iterable[str]:
        return self._shown.values()

    def show(self, text: str) -> str:
        """Return the text as it was in the data."""
        for character, part in self._shown.items():
            text = text.replace(character, part)
        return text


class ControlText:
    """Finds control tokens in text of the data, and parts of one at either end that the adjacent text could complete."""

    def __init__(self, tokens: Iterable[str], normalize: Callable[[str], str] | None):
        longest_first = sorted(tokens, key=len, reverse=True)
        self._whole = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._heads = tuple(sorted({t[:n] for t in longest_first for n in range(1, len(t))}, key=len, reverse=True))
        self._tails = tuple(sorted({t[n:] for t in longest_first for n in range(1, len(t))}, key=len, reverse=True))
        self._first, self._last = {t[0] for t in longest_first}, {t[-1] for t in longest_first}
        self._longest = max(map(len, longest_first), default=0)
        self._normalize = normalize

    def is_in(self, text: str) -> bool:
        """Return whether the text contains a complete control token."""
        return bool(self._whole.search(text)) or bool(self._normalize and self._whole.search(self._normalize(text)))

    def touches(self, text: str) -> bool:
        """Return whether the text contains a control token, or begins or ends with a part of one."""
        return self.is_in(text) or self._has_head(text) or self._has_tail(text)

    def hide_in(self, value: Any, disguise: Disguise) -> Any:
        """Return a copy of a text, list or object in which everything that `touches` finds is replaced.

        Raises:
            UserError: the tokenizer's normalizer turns a text into a control token.
        """
        if isinstance(value, dict):
            return {self._hide(key, disguise): self.hide_in(item, disguise) for key, item in value.items()}
        if isinstance(value, list):
            return [self.hide_in(item, disguise) for item in value]
        return self._hide(value, disguise) if isinstance(value, str) else value

    def _hide(self, text: str, disguise: Disguise) -> str:
        text = self._whole.sub(lambda found: disguise.character_for(found[0]), text)
        if self._has_head(text):
            body = text.rstrip()
            head = next(head for head in self._heads if body.endswith(head))
            text = body[: -len(head)] + disguise.character_for(head) + text[len(body) :]
        if self._has_tail(text):
            body = text.lstrip()
            tail = next(tail for tail in self._tails if body.startswith(tail))
            text = text[: len(text) - len(body)] + disguise.character_for(tail) + body[len(tail) :]
        if self.is_in(text):
            what = "contains a control token in another spelling, which cannot be encoded as text"
            raise UserError(what, where="messages", fix="remove it from the row")
        return text

    def _has_head(self, text: str) -> bool:
        end = text.rstrip()[-self._longest :]
        return not self._first.isdisjoint(end) and end.endswith(self._heads)

    def _has_tail(self, text: str) -> bool:
        start = text.lstrip()[: self._longest]
        return not self._last.isdisjoint(start) and start.startswith(self._tails)


class Encoder:
    """A tokenizer that separates control tokens from text.

    Control tokens are the special tokens and the other added tokens in brackets, such as `<tool_call>`. A bracketed token of the
    ordinary vocabulary counts only if the chat template writes it.

    Attributes:
        data: finds control tokens in text of users, systems and tools.
        answers: finds special tokens in text of the assistant; the model itself writes the others, such as `<think>`.
        stop: matches a special token together with the space that the tokenizer merges into it.
        cuts: whether encoding the pieces of a text separately gives the ids of the whole text. It does not if the tokenizer
            prepends a space.
    Raises:
        UserError: the tokenizer cannot tell a control token from the same characters in text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str = ""):
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        added: dict[int, AddedToken] = tokenizer.added_tokens_decoder
        named = set(tokenizer.all_special_tokens)
        self.special = {t.content: i for i, t in added.items() if t.special or t.content in named}
        self.control = {t.content: i for i, t in added.items() if t.content in self.special or self._is_control(t.content, template)}
        self._names = {number: content for content, number in self.control.items()}
        kept = {i: t for i, t in added.items() if t.content not in self.control}
        self._plain, self._after_token = self._without_control(kept, []), self._without_control(kept, [ANCHOR])
        self._plain_ids = {new: i for i, t in kept.items() if (new := self._plain.token_to_id(t.content)) is not None}
        normalized = any(t.normalized for t in added.values() if t.content in self.control)
        normalize = self._backend.normalizer.normalize_str if normalized and self._backend.normalizer else None
        self.data, self.answers = ControlText(self.control, normalize), ControlText(self.special, normalize)
        rights = {t.content: r"\s*" if t.rstrip else "" for t in added.values()}
        self.stop = re.compile("|".join(re.escape(t) + rights[t] for t in sorted(self.special, key=len, reverse=True)) or "(?!)")
        self._check_plain()
        self.cuts = self._cuts()

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Encode texts, including their control tokens."""
        self._reset()
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def state(self) -> str:
        """Return the serialized tokenizer, which determines the ids."""
        self._reset()
        return self._backend.to_str()

    def encode_plain(self, text: str, *, after_token: bool = False) -> list[int]:
        """Encode a text without control tokens.

        Args:
            after_token: whether the text follows a control token: some tokenizers prepend a space only to the first text.
        Raises:
            UserError: the text contains the character that stands for the preceding token.
        """
        if not after_token:
            ids = self._plain.encode(text, add_special_tokens=False).ids
        elif ANCHOR in text:
            what = "contains the private-use character U+10FFFD and the text of a control token"
            raise UserError(what, where="messages", fix="remove one of them from the row")
        else:
            ids = self._after_token.encode(ANCHOR + text, add_special_tokens=False).ids[1:]
        return [self._plain_ids.get(i, i) for i in ids]

    def encode_disguised(self, text: str, disguise: Disguise) -> list[int]:
        """Encode a rendered text: control tokens as tokens, everything between them as plain text, with hidden text restored."""
        self._reset()
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids: list[int] = []
        done = 0
        for number, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if text[start:end].strip() == self._names.get(number):
                ids += [*self.encode_plain(disguise.show(text[done:start]), after_token=done > 0), number]
                done = end
        return ids + self.encode_plain(disguise.show(text[done:]), after_token=done > 0)

    def is_control_in(self, disguise: Disguise | None) -> bool:
        """Return whether a complete control token is hidden, not only a part of one."""
        return disguise is not None and any(part in self.control for part in disguise.parts)

    def _reset(self) -> None:
        """Undo settings of other users of the tokenizer: truncation, padding, control tokens as text."""
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = False

    def _is_control(self, content: str, template: str) -> bool:
        ordinary = self._backend.model.token_to_id(content) is not None
        return bool(BRACKETED.fullmatch(content)) and (content in template or not ordinary)

    def _without_control(self, kept: dict[int, AddedToken], more: list[str]) -> Tokenizer:
        """Build a tokenizer of the same model without control tokens; added tokens get other ids in it."""
        plain = Tokenizer(self._backend.model)
        for part in ("normalizer", "pre_tokenizer"):
            if getattr(self._backend, part) is not None:
                setattr(plain, part, getattr(self._backend, part))
        plain.add_tokens(list(kept.values()))
        plain.add_special_tokens(more)
        return plain

    def _check_plain(self) -> None:
        token = next(iter(self.special), "")
        first, following = self.encode([PROBE, token + PROBE])
        if self.encode_plain(PROBE) != first or (token and self.encode_plain(PROBE, after_token=True) != following[1:]):
            raise UserError("the tokenizer encodes text differently without its control tokens", where="tokenizer", fix=FIX)
        for name, number in self.control.items():
            if number in self.encode_plain(name):
                raise UserError(f"the tokenizer encodes text as its control token {name!r}", where="tokenizer", fix=FIX)

    def _cuts(self) -> bool:
        word, token = "Hello", next(iter(self.special), "")
        alone, between = self.encode([word, f"{word}{token}{word}"])
        spelled = "".join(filter(None, map(self._backend.id_to_token, alone)))
        return spelled == word and between == [*alone, *([self.special[token]] if token else []), *alone]


FIX = "use a model whose tokenizer separates control tokens from text"


def strings(value: Any) -> Iterator[str]:
    """Yield every text inside lists and objects, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
