"""How a checkpoint was shown its chats: its template, stop tokens and system prompt, for whoever asks it next.

A model that is asked in another way than it was trained answers worse, and nothing says why. So training writes `prompt_format.json`
beside the weights, and the evaluator and reinforcement learning refuse to ask otherwise.
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
from verl.data.chat import checked
from verl.data.source import read_rows
from verl.errors import UserError
from verl.models.load import resolve

FILE = "prompt_format.json"
ROWS_LOOKED_AT = 1000  # for system prompts
MOST_PROMPTS = 16  # of different system prompts; with more, each row is thought to have its own


@dataclass(frozen=True)
class PromptFormat:
    """What the chats of a training run had in common.

    Attributes:
        chat_template_sha256: of the template's text.
        stop_ids: tokens that ended what was trained.
        system_prompts: those of its chats, null for chats that left it to the template; None: each chat had its own.
    """

    chat_template_sha256: str
    stop_ids: list[int]
    system_prompts: list[str | None] | None

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int], system_prompts: Iterable[str | None] | None) -> "PromptFormat":
        text = json.dumps(tokenizer.chat_template, sort_keys=True)
        distinct = None if system_prompts is None else list(dict.fromkeys(system_prompts))
        if distinct is not None and len(distinct) > MOST_PROMPTS:
            distinct = None
        return PromptFormat(hashlib.sha256(text.encode()).hexdigest(), sorted(stop_ids), distinct)

    def write(self, directory: Path) -> None:
        (directory / FILE).write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_format(path: str) -> PromptFormat | None:
    """That of a checkpoint; None of a model that was not trained here.

    Raises:
        UserError: the file is damaged.
    """
    file = Path(resolve(path)) / FILE
    if not file.is_file():
        return None
    try:
        return PromptFormat(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"cannot be read: {error}", where=str(file), fix="copy it again from the checkpoint") from error


def check_format(path: str, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], asked: Iterable[str | None], *, key: str) -> None:
    """Whether a checkpoint is about to be asked as it was trained.

    Args:
        path: the checkpoint.
        tokenizer: with the template that is used.
        stop_ids: of that template.
        asked: system prompts of the questions; None: left to the template.
        key: the setting of the system prompt.
    Raises:
        UserError: another template, other stop tokens, or another system prompt.
    """
    trained = read_format(path)
    if trained is None:
        return
    otherwise = f"or remove {FILE} from the checkpoint to ask it otherwise"
    now = PromptFormat.of(tokenizer, stop_ids, asked)
    if now.chat_template_sha256 != trained.chat_template_sha256:
        what = (
            f"it was trained with another chat template (sha256 {trained.chat_template_sha256[:12]}…, now {now.chat_template_sha256[:12]}…)"
        )
        raise UserError(what, where=path, fix=f"use the template of its tokenizer, {otherwise}")
    if not set(now.stop_ids) <= set(trained.stop_ids):
        what = f"it was trained to end with token {_ids(trained.stop_ids)}, and answers would be cut at {_ids(now.stop_ids)}"
        raise UserError(what, where=path, fix=f"use the tokenizer that it was saved with, {otherwise}")
    strange = [prompt for prompt in now.system_prompts or [] if trained.system_prompts is not None and prompt not in trained.system_prompts]
    if strange:
        known = " or ".join(map(_shown, trained.system_prompts or []))
        fix = f"set {key} to it" if trained.system_prompts != [None] else f"leave {key} out"
        raise UserError(f"it was trained with {known}, and would be asked with {_shown(strange[0])}", where=path, fix=f"{fix}, {otherwise}")


def system_prompts(data: DataConfig) -> list[str | None] | None:
    """Of the training rows, as far as they are looked at; None where rows are plain text."""
    if data.text_key is not None:
        return None
    if data.messages_key is None:
        return [None]
    rows = islice(read_rows(data.train_files), ROWS_LOOKED_AT)
    return [system_of(checked(row.value(data.messages_key, "data.messages_key")).messages) for row in rows]


def system_of(messages: Sequence[dict[str, Any]]) -> str | None:
    """A chat's system prompt; None if it has none of its own."""
    return messages[0]["content"] if messages and messages[0].get("role") == "system" else None


def _shown(prompt: str | None) -> str:
    return "the system prompt of its template" if prompt is None else f"the system prompt {prompt!r:.80}"


def _ids(ids: Sequence[int]) -> str:
    return " or ".join(map(str, ids))
