"""Rows as the model sees them: their tokens decoded, and which of them are trained."""

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from verl.data.render import Renderer
from verl.data.row import Row
from verl.errors import UserError
from verl.inspection.reading import Reading
from verl.inspection.result import Part, Shown, ShownRow

LONGEST_TOKENS, LONGEST_TEXT = 3000, 6000  # of what is shown; the middle of more is left out
UNUSED = "left out of training"


class Shower:
    """Shows rows with one tokenizer, as a trainer reads them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, reading: Reading):
        self._tokenizer, self._reading, self._renderer = tokenizer, reading, Renderer(tokenizer)
        self._control = {number: name for name, number in self._renderer.encoder.control.items()}
        longest_first = sorted(self._control.values(), key=len, reverse=True)
        self._spelled = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def show(self, number: int, row: Row | UserError, why: str) -> ShownRow:
        """Show a row. `number` counts from 0."""
        if isinstance(row, UserError):
            return ShownRow(number + 1, row.where or "", why, [], f"invalid: {row.what}")
        raw = Shown("as it is in the file", 0, 0, [Part("masked", _shortened(json.dumps(row.values, ensure_ascii=False, default=str)))])
        try:
            self._reading.read(row)
            found = self._reading.tokens(self._renderer, [row], keep=True)
        except UserError as error:
            return ShownRow(number + 1, row.where, why, [raw], f"invalid: {error.what}")
        if found.errors:
            return ShownRow(number + 1, row.where, why, [raw], f"invalid: {found.errors[0].what}")
        tokens = " and ".join(f"{length:,}" for length in found.whole)
        if not found.documents:
            reason = found.dropped[0][0] if found.dropped else "longer than the limit, which stops the run"
            return ShownRow(number + 1, row.where, why, [raw], f"{UNUSED}: {reason} ({tokens} tokens)")
        names = self._reading.names
        shown = [self._document(name, *document) for name, document in zip(names, found.documents, strict=True)]
        note = f"cut: it has {tokens} tokens" if found.long else ""
        return ShownRow(number + 1, row.where, why, shown, note, {key: _value(of_column) for key, of_column in _columns(found.columns)})

    def _document(self, name: str, ids: np.ndarray, mask: np.ndarray) -> Shown:
        return Shown(name, len(ids), int(mask[1:].sum()), list(self._parts(ids, mask)))

    def _parts(self, ids: np.ndarray, mask: np.ndarray) -> Iterator[Part]:
        if len(ids) > LONGEST_TOKENS:
            half = LONGEST_TOKENS // 2
            yield from self._parts(ids[:half], mask[:half])
            yield Part("left out", f"… {len(ids) - 2 * half:,} more tokens …")
            ids, mask = ids[-half:], mask[-half:]
        numbers = ids.tolist()
        kinds = [self._kind(number, *masks) for number, masks in zip(numbers, _with_next(mask.tolist()), strict=True)]
        position = 0
        for kind, group in itertools.groupby(kinds):
            end = position + sum(1 for _ in group)
            text = str(self._tokenizer.decode(numbers[position:end]))
            position = end
            if kind in ("stop", "control"):
                yield Part(kind, text)
            else:
                parts = self._spelled.split(text)
                yield from (Part("spelled" if place % 2 else kind, part) for place, part in enumerate(parts) if part)

    def _kind(self, number: int, is_trained: bool, next_is_trained: bool) -> str:
        if number not in self._control:
            return "trained" if is_trained else "masked"
        if is_trained:
            return "trained" if next_is_trained else "stop"
        return "control"


def _with_next(mask: list[bool]) -> Iterator[tuple[bool, bool]]:
    return zip(mask, [*mask[1:], False], strict=True)


def _columns(columns: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    return list(columns[0].items()) if columns else []


def _value(value: object) -> str:
    return _shortened(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def _shortened(text: str) -> str:
    if len(text) <= LONGEST_TEXT:
        return text
    half = LONGEST_TEXT // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} more characters … {text[-half:]}"
