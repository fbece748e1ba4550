"""The trained tokens are those that transformers' own mask marks, or the text between a turn's generation prompt and its end."""

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from verl.data.render import GENERATION_MARK, Renderer
from verl.models.load import load_tokenizer
from verl.pace import counted
from verl.prove.outcome import Outcome
from verl.prove.subject import Subject

GROUP, NAME = "data", "mask = template"
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "What is 17 + 25?"}, {"role": "assistant", "content": "It is 42."}],
    [
        {"role": "user", "content": "Name a color."},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "And one more?"},
        {"role": "assistant", "content": "Green, of course."},
    ],
]


def prove(subject: Subject) -> Outcome:
    own = _own_tokenizer(subject)
    tokenizer, whose = (subject.tokenizer, "the twin's template") if own is None else (own, "the model's template")
    renderer, trained = Renderer(tokenizer), 0
    for chat in CHATS:
        rendered = renderer.chat(chat)
        ids, mask = rendered.input_ids, np.array(rendered.loss_mask)
        if wrong := _difference(tokenizer, chat, ids, mask):
            return Outcome(GROUP, NAME, "wrong", f"{wrong}; {whose}", 1.0)
        trained += int(mask.sum())
    return Outcome(GROUP, NAME, "holds", f"{trained} trained tokens of {len(CHATS)} chats; {whose}", 0.0)


def _own_tokenizer(subject: Subject) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of the model that the twin was made from, if it has a chat template; verl's refusal of it is the outcome."""
    from pathlib import Path

    from transformers import AutoTokenizer

    if subject.origin is None:
        return None
    folder = Path(subject.origin).expanduser()
    if folder.is_dir() and not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    if AutoTokenizer.from_pretrained(subject.origin).chat_template is None:
        return None
    return load_tokenizer(subject.origin)


def _difference(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, Any]], ids: list[int], mask: np.ndarray) -> str | None:
    """Say how ids and mask differ from what transformers makes of the template; None if they do not."""
    marked = GENERATION_MARK.search(str(tokenizer.chat_template)) is not None
    found: Any = tokenizer.apply_chat_template(chat, return_dict=True, tokenize=True, return_assistant_tokens_mask=marked)
    theirs = list(found["input_ids"])
    if ids != theirs[: len(ids)]:
        first = next((i for i, (a, b) in enumerate(zip(ids, theirs, strict=False)) if a != b), min(len(ids), len(theirs)))
        return f"token {first} of the rendered chat differs from transformers' rendering"
    if marked:
        expected = np.array(found["assistant_masks"][: len(ids)], dtype=bool)
        wrong = int((mask != expected).sum())
        return f"masked otherwise than by transformers' assistant mask: {counted(wrong, 'token')}" if wrong else None
    spans = _text_of_spans(tokenizer, ids, mask)
    answers = [message["content"] for message in chat if message["role"] == "assistant"]
    if len(spans) != len(answers):
        return f"{counted(len(spans), 'trained span')} for {counted(len(answers), 'answer')}"
    rest = _after_prompt(tokenizer, chat)
    if rest is not None and not rest.startswith(spans[-1]):
        return f"the trained text {spans[-1]!r} is not what follows the generation prompt, {rest!r}"
    short = [span for span, answer in zip(spans, answers, strict=True) if answer not in span or span.endswith(answer)]
    return f"the trained text {short[0]!r} is not the answer with its stop token" if short else None


def _after_prompt(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, Any]]) -> str | None:
    """Return the rendered text behind the last generation prompt; None if the template renders the chat before it otherwise then."""
    whole = str(tokenizer.apply_chat_template(chat, tokenize=False))
    prompt = str(tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True))
    return whole.removeprefix(prompt) if whole.startswith(prompt) else None


def _text_of_spans(tokenizer: PreTrainedTokenizerBase, ids: list[int], mask: np.ndarray) -> list[str]:
    """Return the text of each run of trained tokens, with control tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return [str(tokenizer.decode(ids[start:end])) for start, end in zip(edges[::2], edges[1::2], strict=True)]
