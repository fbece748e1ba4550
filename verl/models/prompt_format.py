"""The prompt format of a checkpoint: the chat template, stop tokens and system prompts of its training.

A model that is prompted in another format than in training answers worse, without any error. So training writes `prompt_format.json` next
to the weights, and evaluation and reinforcement learning raise an error if the format differs.
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
from verl.errors import UserError
from verl.models.load import resolve

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


def read_format(path: str) -> PromptFormat | None:
    """Read the prompt format of a checkpoint; None if verl did not train the model.

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
    """Check that a checkpoint is prompted in the format of its training. Do nothing if verl did not train the model.

    Args:
        path: checkpoint directory.
        tokenizer: tokenizer with the chat template in use.
        stop_ids: stop tokens of that template.
        asked: system prompts of the questions; None for a question without one.
        key: config key of the system prompt, for errors.
    Raises:
        UserError: the template, the stop tokens or a system prompt differ.
    """
    trained = read_format(path)
    if trained is None:
        return
    or_remove = f"or delete {FILE} in the checkpoint to use a different format"
    now = PromptFormat.of(tokenizer, stop_ids, asked)
    if now.chat_template_sha256 != trained.chat_template_sha256:
        hashes = f"sha256 {trained.chat_template_sha256[:12]}…, now {now.chat_template_sha256[:12]}…"
        what = f"the model was trained with another chat template ({hashes})"
        fix = f"use the template of the checkpoint's tokenizer, and the chat_template_kwargs of its training, {or_remove}"
        raise UserError(what, where=path, fix=fix)
    if not set(now.stop_ids) <= set(trained.stop_ids):
        what = f"the model was trained to end answers with token {_ids(trained.stop_ids)}, but answers would stop at {_ids(now.stop_ids)}"
        raise UserError(what, where=path, fix=f"use the checkpoint's own tokenizer, {or_remove}")
    unknown = [prompt for prompt in now.system_prompts or [] if trained.system_prompts is not None and prompt not in trained.system_prompts]
    if unknown:
        known = " or ".join(map(_shown, trained.system_prompts or []))
        fix = f"set {key} to the trained one" if trained.system_prompts != [None] else f"remove {key}"
        what = f"the model was trained with {known}, but would be prompted with {_shown(unknown[0])}"
        raise UserError(what, where=path, fix=f"{fix}, {or_remove}")


def system_prompts(data: DataConfig) -> list[str | None] | None:
    """Return the system prompts of the first ROWS_SCANNED training rows; None if the rows are plain text."""
    columns = Columns.of(data)
    examples = [columns.read(row)[0] for row in islice(read_rows(data.train_files), ROWS_SCANNED)]
    chats = [example for example in examples if isinstance(example, ChatInput)]
    return [system_of(checked(chat.messages).messages) for chat in chats] if len(chats) == len(examples) else None


def system_of(messages: Sequence[dict[str, Any]]) -> str | None:
    """Return a chat's system prompt, or None if it has none."""
    return messages[0]["content"] if messages and messages[0].get("role") == "system" else None


def _shown(prompt: str | None) -> str:
    return "the template's default system prompt" if prompt is None else f"the system prompt {prompt!r:.80}"


def _ids(ids: Sequence[int]) -> str:
    return " or ".join(map(str, ids))
