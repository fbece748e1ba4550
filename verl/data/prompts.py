"""Rows to prompts: what a model answers in reinforcement learning, and in which order.

The order is a function of (seed, epoch) alone, and prompts are drawn from it one after the other over all epochs: a number counts the
prompts drawn since the run began, on any number of processes.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from verl.config.ppo import PromptConfig
from verl.data.chat import unanswered
from verl.data.formats import Row
from verl.data.loader import row_order
from verl.data.render import Renderer
from verl.data.source import read_rows
from verl.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """A row that is to be answered.

    Attributes:
        where: its place in the file.
        text: the question as it stands in the data; of a chat, its last message.
        messages: the chat that waits for an answer.
        token_ids: the same up to where the answer begins.
        row: all columns, and `reference`, the right answer as text, where the rows have one.
    """

    where: str
    text: str
    messages: list[dict[str, Any]]
    token_ids: list[int]
    row: dict[str, Any]


@dataclass(frozen=True)
class Prompts:
    """The prompts of a file.

    Attributes:
        dropped: rows left out because they are longer than data.max_prompt_length.
        fingerprint: differs when a prompt differs.
    """

    prompts: list[Prompt]
    dropped: int
    fingerprint: str

    def __len__(self) -> int:
        return len(self.prompts)

    def drawn(self, number: int, seed: int) -> Prompt:
        """The prompt that is drawn as the one of that number, counted from 0 over all epochs."""
        epoch, within = divmod(number, len(self.prompts))
        return self.prompts[int(_order(len(self.prompts), seed, epoch)[within])]

    def __str__(self) -> str:
        lengths = [len(prompt.token_ids) for prompt in self.prompts]
        dropped = f", {self.dropped:,} dropped as longer than data.max_prompt_length" if self.dropped else ""
        return f"{len(lengths):,} prompts{dropped}; {sum(lengths) / len(lengths):.0f} tokens each, the longest {max(lengths):,}"


_order = lru_cache(maxsize=2)(row_order)  # of an epoch, and of the next one where a step reaches into it


def load_prompts(
    config: PromptConfig,
    files: object,
    tokenizer: PreTrainedTokenizerBase,
    *,
    key: str = "data.train_files",
    max_samples: int | None = None,
) -> Prompts:
    """The prompts of the files.

    Args:
        files: a path, a glob, a Hub data set id, or a list of these.
        key: the config key that names the files, for errors.
        max_samples: use only the first rows; None or -1: all.
    Raises:
        UserError: a file, a row or the chat template is not right, or prompts are too long.
    """
    renderer = Renderer(tokenizer)
    rows = islice(read_rows(files, key), None if max_samples == -1 else max_samples)
    found = [_prompt(row, config, renderer) for row in rows]
    long = [prompt for prompt in found if len(prompt.token_ids) > config.max_prompt_length]
    if long and (config.overlong_prompts == "error" or len(long) == len(found)):
        raise _too_long(long, len(found), config, key)
    kept = [prompt for prompt in found if len(prompt.token_ids) <= config.max_prompt_length]
    return Prompts(kept, len(long), _fingerprint(kept))


def _prompt(row: Row, config: PromptConfig, renderer: Renderer) -> Prompt:
    if row.is_text:
        raise UserError("plain text holds no questions", where=row.where, fix="write them as JSONL, CSV or Parquet")
    values = row.values
    if config.response_key is not None:
        if config.response_key not in values:
            fix = "set data.response_key to the column of the right answers, or to null where no reward needs them"
            raise UserError(f"no column {config.response_key!r}; found {', '.join(map(repr, values))}", where=row.where, fix=fix)
        values = {**values, "reference": row.text(config.response_key, "data.response_key")}
    tools = None if config.tools_key is None else row.value(config.tools_key, "data.tools_key", may_be_null=True)
    if config.messages_key is None:
        text = row.text(config.prompt_key, "data.prompt_key")
        before = [] if config.system_prompt is None else [{"role": "system", "content": config.system_prompt}]
        messages: list[dict[str, Any]] = [*before, {"role": "user", "content": text}]
    else:
        messages, _ = unanswered(row.value(config.messages_key, "data.messages_key"), row.where)
        text = messages[-1]["content"]
    try:
        return Prompt(row.where, text, messages, renderer.prompt(messages, tools), values)
    except UserError as error:
        raise UserError(error.what, where=f"{row.where}: {error.where}" if error.where else row.where, fix=error.fix) from None


def _too_long(long: list[Prompt], rows: int, config: PromptConfig, key: str) -> UserError:
    longest = max(long, key=lambda prompt: len(prompt.token_ids))
    tokens = len(longest.token_ids)
    what = (
        f"{len(long):,} of {rows:,} prompts are longer than data.max_prompt_length={config.max_prompt_length}; "
        f"the longest has {tokens:,} tokens ({longest.where})"
    )
    return UserError(what, where=key, fix=f"data.max_prompt_length={tokens} takes them all; data.overlong_prompts=drop leaves them out")


def _fingerprint(prompts: list[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.token_ids, prompt.row.get("reference")], default=str).encode())
    return digest.hexdigest()
