"""The prompts of reinforcement learning, and their order.

The order depends on (seed, epoch) alone. A prompt's number counts the prompts drawn since the run began, over all epochs, and does not
depend on the number of ranks.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from verl.config.ppo import PromptConfig
from verl.data.formats import Row
from verl.data.loader import row_order
from verl.data.render import Renderer
from verl.data.report import counted
from verl.data.shapes import Asked, read_question
from verl.data.source import read_rows
from verl.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """A row to answer.

    Attributes:
        where: location of the row, such as `train.jsonl:17`.
        text: the question, as in the data; for a chat, its last message.
        messages: the chat to answer.
        token_ids: the chat's tokens, including the header of the assistant's turn.
        row: all columns, and `reference`, the correct answer as text, if the data has one.
        notes: how the row was recognised.
    """

    where: str
    text: str
    messages: list[dict[str, Any]]
    token_ids: list[int]
    row: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompts:
    """The prompts of a file.

    Attributes:
        dropped: number of rows dropped because they are longer than data.max_prompt_length.
        fingerprint: a hash that changes when any prompt changes.
    """

    prompts: list[Prompt]
    dropped: int
    fingerprint: str

    def __len__(self) -> int:
        return len(self.prompts)

    def drawn(self, number: int, seed: int) -> Prompt:
        """Return the prompt that is drawn as `number`, counted from 0 over all epochs."""
        epoch, within = divmod(number, len(self.prompts))
        return self.prompts[int(_order(len(self.prompts), seed, epoch)[within])]

    def __str__(self) -> str:
        lengths = [len(prompt.token_ids) for prompt in self.prompts]
        dropped = f", {self.dropped:,} dropped as longer than data.max_prompt_length" if self.dropped else ""
        about = f"{len(lengths):,} prompts{dropped}; {sum(lengths) / len(lengths):.0f} tokens each, the longest {max(lengths):,}"
        return "\n".join([about, *counted(prompt.notes for prompt in self.prompts)])


_order = lru_cache(maxsize=2)(row_order)  # a step may reach into the next epoch


def load_prompts(
    config: PromptConfig,
    files: object,
    tokenizer: PreTrainedTokenizerBase,
    *,
    key: str = "data.train_files",
    max_samples: int | None = None,
) -> Prompts:
    """Load the prompts of the files.

    Args:
        files: a path, a glob, a Hub data set id, or a list of these.
        key: config key that names the files, for errors.
        max_samples: number of rows to use, from the start; None or -1 uses all.
    Raises:
        UserError: a file, a row or the chat template is invalid, or prompts are too long.
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
    asked = _asked(row, config)
    values = row.values if config.response_key is None else {**row.values, "reference": asked.reference}
    try:
        ids = renderer.prompt(asked.messages, asked.tools, asked.template_kwargs)
    except UserError as error:
        raise UserError(error.what, where=f"{row.where}: {error.where}" if error.where else row.where, fix=error.fix) from None
    return Prompt(row.where, asked.text, asked.messages, ids, values, asked.notes)


def _asked(row: Row, config: PromptConfig) -> Asked:
    try:
        return read_question(row, config, config.system_prompt, "data.")
    except UserError as error:
        if not error.what.startswith(f"column {config.response_key!r} is missing"):
            raise
        fix = "set data.response_key to the column of the correct answers, or to null if no reward needs them"
        raise UserError(error.what, where=error.where, fix=fix) from None


def _too_long(long: list[Prompt], rows: int, config: PromptConfig, key: str) -> UserError:
    longest = max(long, key=lambda prompt: len(prompt.token_ids))
    tokens = len(longest.token_ids)
    what = (
        f"{len(long):,} of {rows:,} prompts are longer than data.max_prompt_length={config.max_prompt_length}; "
        f"the longest has {tokens:,} tokens ({longest.where})"
    )
    return UserError(what, where=key, fix=f"data.max_prompt_length={tokens} keeps them all; data.overlong_prompts=drop drops them")


def _fingerprint(prompts: list[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.token_ids, prompt.row.get("reference")], default=str).encode())
    return digest.hexdigest()
