"""Checks that a checkpoint is prompted in the format of its training, which `prompt_format.json` records."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from verl.errors import UserError
from verl.models.load import resolve
from verl.models.prompt_format import FILE, PromptFormat
from verl.regular_file import read


def read_format(path: str) -> PromptFormat | None:
    """Read the prompt format of a checkpoint; None if verl did not train the model.

    Raises:
        UserError: the file is damaged.
    """
    file = Path(resolve(path)) / FILE
    if not file.is_file():
        return None
    try:
        return PromptFormat(**json.loads(read(file, follow=True)))
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


def _shown(prompt: str | None) -> str:
    return "the template's default system prompt" if prompt is None else f"the system prompt {prompt!r:.80}"


def _ids(ids: Sequence[int]) -> str:
    return " or ".join(map(str, ids))
