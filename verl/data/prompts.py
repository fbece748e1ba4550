"""The prompts of reinforcement learning, and their order.

The order depends on (seed, epoch) alone. A prompt's number counts the prompts drawn since the run began, over all epochs, and does not
depend on the number of ranks.
"""

import json
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from verl.config.ppo import PromptConfig
from verl.data.fingerprint import Fingerprint, digest, fingerprint, row_digests
from verl.data.loader import RowChoice, row_order
from verl.data.render import Renderer
from verl.data.row import ReadProgress, Row, notes_of
from verl.data.shapes import Asked, read_question
from verl.data.source import Entry, describe_sources, resolve_entries, sources_of, valid_rows
from verl.errors import UserError
from verl.pace import counted


@dataclass(frozen=True)
class Prompt:
    """A row to answer.

    Attributes:
        where: location of the row, such as `train.jsonl:17`.
        text: the question, as in the data; for a chat, its last message.
        messages: the chat to answer.
        token_ids: the chat's tokens, including the header of the assistant's turn.
        row: all columns, and `reference`, the correct answer as text, if the data has one.
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
        dropped: number of rows dropped because they are longer than data.max_prompt_length.
        fingerprint: identity of the prompts' tokens, their reference answers, and their order.
        choice: choice of an epoch's prompts, if the files are a mixture; None: all prompts.
        notes: what else is to be said about the data, one line each.
        row_digests_R: hash of each prompt's tokens and reference answer, uint64; copies of a prompt have the same one.
    """

    prompts: list[Prompt]
    dropped: int
    fingerprint: Fingerprint
    choice: RowChoice | None = None
    notes: list[str] = field(default_factory=list)
    row_digests_R: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))

    def place(self, index: int) -> str:
        """Location of a prompt's row, such as `train.jsonl:17`."""
        return self.prompts[index].where

    def __len__(self) -> int:
        """Number of prompts of an epoch."""
        return len(self.prompts) if self.choice is None else self.choice.rows

    def drawn(self, number: int, seed: int) -> Prompt:
        """Return the prompt that is drawn as `number`, counted from 0 over all epochs."""
        epoch, within = divmod(number, len(self))
        order = _order(len(self.prompts), seed, epoch) if self.choice is None else self.choice.order(seed, epoch)
        return self.prompts[int(order[within])]

    def __str__(self) -> str:
        lengths = [len(prompt.token_ids) for prompt in self.prompts]
        dropped = f", {self.dropped:,} dropped as longer than data.max_prompt_length" if self.dropped else ""
        prompts = f"{counted(len(lengths), 'prompt')}{dropped}; {sum(lengths) / len(lengths):.0f} tokens each, the longest {max(lengths):,}"
        return "\n".join([prompts, *self.notes])


def describe_draws(prompts: int, per_step: int, steps: int) -> str:
    """Say how often a run asks each prompt, with the arithmetic.

    Args:
        prompts: number of prompts.
        per_step: prompts drawn in a step.
        steps: steps of the whole run.
    """
    draws = steps * per_step
    times, more = divmod(draws, prompts)
    sum_of = f"{steps:,} step{'s' if steps > 1 else ''} × {per_step:,} = {draws:,}"
    if not times:
        often = f"{draws:,} of {prompts:,} prompts are asked once, and {prompts - draws:,} not at all ({sum_of})"
    elif not more:
        who = f"each of {prompts:,} prompts" if prompts > 1 else "the one prompt"
        often = f"{who} is asked {_often(times)} ({sum_of} = {times:,} × {prompts:,})"
    else:
        often = (
            f"{more:,} of {prompts:,} prompts are asked {_often(times + 1)}, the other {prompts - more:,} {_often(times)} "
            f"({sum_of} = {times:,} × {prompts:,} + {more:,})"
        )
    if per_step > prompts:
        within = f"{per_step // prompts:,}{f' to {per_step // prompts + 1:,}' if per_step % prompts else ''} times in one step"
        return f"warning: a step draws more prompts ({per_step:,}) than there are ({prompts:,}), so each is asked {within}; {often}"
    reach = "; a step that reaches the end of an epoch takes the rest of its prompts from the next one" if times and draws % prompts else ""
    return f"{often}{reach if prompts % per_step else ''}"


def _often(times: int) -> str:
    return {1: "once", 2: "twice"}.get(times, f"{times:,} times")


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
        files: as in `verl.data.source.resolve_entries`.
        key: config key that names the files, for errors.
        max_samples: number of rows to use, from the start; None or -1 uses all.
    Raises:
        UserError: a file, a row or the chat template is invalid, or prompts are too long.
    """
    renderer = Renderer(tokenizer)
    entries, progress = resolve_entries(files, key), ReadProgress()
    rows = list(islice(valid_rows(sources_of(entries), progress), None if max_samples == -1 else max_samples))
    found = [read_prompt(row, config, renderer) for row in rows]
    long = [prompt for prompt in found if len(prompt.token_ids) > config.max_prompt_length]
    if long and (config.overlong_prompts == "error" or len(long) == len(found)):
        raise _too_long(long, len(found), config, key)
    kept = [prompt for prompt in found if len(prompt.token_ids) <= config.max_prompt_length]
    notes = [*describe_sources(entries), *notes_of(rows)]
    digests, tokens = _digests(kept), sum(len(prompt.token_ids) for prompt in kept)
    identity = fingerprint("prompts", *digests, tokens, tokenizer.chat_template)
    prompts = Prompts(kept, len(long), identity, notes=notes, row_digests_R=row_digests(digests, 1))
    if any(entry.has_share for entry in entries):
        numbers = [number for number, prompt in enumerate(found) if len(prompt.token_ids) <= config.max_prompt_length]
        return _mixed(prompts, entries, progress.rows_by_source, numbers, key)
    return prompts


def _mixed(prompts: Prompts, entries: list[Entry], rows_by_source: list[int], numbers: list[int], key: str) -> Prompts:
    """Return the prompts with the choice of an epoch's prompts. `numbers` are those of the prompts among all rows."""
    from verl.data.mixture import mixture_of  # most runs draw all prompts

    mixture = mixture_of(entries, rows_by_source, np.array(numbers), key)
    assert mixture is not None
    shares = mixture.describe(np.array([len(prompt.token_ids) for prompt in prompts.prompts]))
    fingerprint = replace(prompts.fingerprint, order=mixture.identity)
    return replace(prompts, choice=mixture, fingerprint=fingerprint, notes=[*prompts.notes, shares])


def read_prompt(row: Row, config: PromptConfig, renderer: Renderer) -> Prompt:
    asked = _asked(row, config)
    values = row.values if config.response_key is None else {**row.values, "reference": asked.reference}
    try:
        ids = renderer.prompt(asked.messages, asked.tools, asked.template_kwargs)
    except UserError as error:
        raise UserError(error.what, where=f"{row.where}: {error.where}" if error.where else row.where, fix=error.fix) from None
    return Prompt(row.where, asked.text, asked.messages, ids, values)


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


def _digests(prompts: list[Prompt]) -> tuple[np.ndarray, np.ndarray]:
    """Return hashes of the token ids and of the reference answer of each prompt, uint64; of a row without one, all of its columns count."""
    ids = [digest(np.array(prompt.token_ids, dtype=np.int32).tobytes()) for prompt in prompts]
    references = [digest(json.dumps(prompt.row.get("reference", prompt.row), default=str).encode()) for prompt in prompts]
    return np.array(ids, dtype=np.uint64), np.array(references, dtype=np.uint64)
