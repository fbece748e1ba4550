"""Report on a data set: counts of its rows, and the first row as the model sees it."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
SPELLED = "[text]"
LONGEST_PART = 1200  # characters; the middle of a longer part is omitted


@dataclass(frozen=True)
class Report:
    """Counts of the rows and tokens of a data set.

    Attributes:
        read: rows in the files, up to the limit on samples.
        used: rows that are trained or evaluated.
        cut: used rows that were longer than data.max_length.
        dropped: number of dropped rows by reason.
        tokens: tokens of the used rows.
        trained_tokens: trained tokens of the used rows.
        rows_with_control_text: rows that contain the text of a control token, which was encoded as plain text.
        notes: what else is to be said about the data, one line each.
    """

    read: int
    used: int
    cut: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    trained_tokens: int = 0
    rows_with_control_text: int = 0
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        reasons = f" ({'; '.join(f'{count:,} {reason}' for reason, count in self.dropped.items())})" if self.dropped else ""
        rows = f"rows {self.read:,} read, {self.used:,} used, {self.cut:,} cut, {sum(self.dropped.values()):,} dropped{reasons}"
        tokens = f"{self.tokens:,} tokens, {self.trained_tokens / max(1, self.tokens):.1%} trained"
        control = f"\nrows that contain the text of a control token, encoded as plain text: {self.rows_with_control_text:,}"
        return "\n".join([f"{rows}; {tokens}{control if self.rows_with_control_text else ''}", *self.notes])


def show_first_row(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, mask: np.ndarray, console: Console) -> None:
    """Print a document with its loss mask: each line is labelled as trained or context, and coloured in a terminal.

    Args:
        ids: token ids.
        mask: whether each token is trained.
    """
    trained = int(mask[1:].sum())
    parts = list(_parts(tokenizer, ids, mask))
    spelled = f"; {SPELLED} marks the name of a control token that is plain text" if any(SPELLED in text for _, text in parts) else ""
    console.print(Text(f"first row, {len(ids):,} tokens, {trained:,} trained (\\n is a line end{spelled}):"), soft_wrap=True)
    for is_trained, text in parts:
        label, style = ("trained", "green") if is_trained else ("context", "dim")
        for line in text.splitlines(keepends=True) if text else []:
            console.print(Text(f"  {label} | {line}".removesuffix("\n"), style), soft_wrap=True)


def _parts(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, mask: np.ndarray) -> Iterator[tuple[bool, str]]:
    position = 0
    for is_trained, group in itertools.groupby(mask.tolist()):
        end = position + sum(1 for _ in group)
        yield is_trained, _printable(_decoded(tokenizer, ids[position:end].tolist()))
        position = end


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Decode token ids, with SPELLED before each control token that the text only spells out."""
    text = str(tokenizer.decode(ids))
    names = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    if all(text.count(name) <= ids.count(number) for number, name in names.items()):
        return text
    spelled = re.compile("|".join(map(re.escape, sorted(names.values(), key=len, reverse=True))))
    groups = itertools.groupby(ids, key=lambda number: names.get(number, ""))
    parts = [(is_token, str(tokenizer.decode(list(group)))) for is_token, group in groups]
    return "".join(part if is_token else spelled.sub(lambda found: SPELLED + found[0], part) for is_token, part in parts)


def _printable(text: str) -> str:
    """Make line ends visible, escape other control characters, and omit the middle of a long text."""
    if len(text) > LONGEST_PART:
        text = f"{text[: LONGEST_PART // 2]} … {len(text) - LONGEST_PART:,} more characters … {text[-LONGEST_PART // 2 :]}"
    return CONTROL_CHARACTER.sub(lambda found: ascii(found[0])[1:-1], text).replace("\n", "\\n\n")
