"""The prompt format of a checkpoint: the chat template, stop tokens and system prompts of its training.

A model that is prompted in another format than in training answers worse, without any error. So training writes `prompt_format.json` next
to the weights, and `format_check` raises an error if evaluation or reinforcement learning would use another one.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from verl.config.sft import DataConfig
from verl.data.chat import ChatInput, checked
from verl.data.source import read_rows
from verl.data.tables import Columns

FILE = "prompt_format.json"
ROWS_SCANNED = 1000  # for system prompts
MAX_SYSTEM_PROMPTS = 16  # with more distinct ones, each row is assumed to have its own


@dataclass(frozen=True)
class PromptFormat:
    """The prompt format of a training run.

    Attributes:
        chat_template_sha256: hash of the template's text.
        stop_ids: tokens that ended the trained turns.
        system_prompts: distinct system prompts of the chats, with null for chats without one; None if each chat had its own.
    """

    chat_template_sha256: str
    stop_ids: list[int]
    system_prompts: list[str | None] | None

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int], system_prompts: Iterable[str | None] | None) -> "PromptFormat":
        text = json.dumps(tokenizer.chat_template, sort_keys=True)
        distinct = None if system_prompts is None else list(dict.fromkeys(system_prompts))
        if distinct is not None and len(distinct) > MAX_SYSTEM_PROMPTS:
            distinct = None
        return PromptFormat(hashlib.sha256(text.encode()).hexdigest(), sorted(stop_ids), distinct)

    def write(self, directory: Path) -> None:
        (directory / FILE).write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def system_prompts(data: DataConfig) -> list[str | None] | None:
    """Return the system prompts of the first ROWS_SCANNED training rows; None if the rows are plain text."""
    columns = Columns.of(data)
    examples = [columns.read(row)[0] for row in islice(read_rows(data.train_files, wanted=columns.columns_read), ROWS_SCANNED)]
    chats = [example for example in examples if isinstance(example, ChatInput)]
    return [system_of(checked(chat.messages).messages) for chat in chats] if len(chats) == len(examples) else None


def system_of(messages: Sequence[dict[str, Any]]) -> str | None:
    """Return a chat's system prompt, or None if it has none."""
    return messages[0]["content"] if messages and messages[0].get("role") == "system" else None
