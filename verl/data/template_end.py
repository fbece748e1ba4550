"""How an answer ends: the tokens that a chat template writes after it, and the end of a chat's last answer where a template writes none.

Some templates, such as those of GLM-4, end an answer only with the control token that begins the next message. The last answer of a chat
then has no end, and could not be trained. The end is added to the template itself, with which the checkpoint is saved, so that everything
that loads it agrees.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

QUESTION, ANSWER = {"role": "user", "content": "Is the sky blue?"}, {"role": "assistant", "content": "Yes, it is."}
CALLS = [{"type": "function", "id": "call00001", "function": {"name": "look_up", "arguments": {"place": "sky"}}}]
ADDED, LINE_END = "verl ends a chat's last answer with ", "\n"
RESULT = {"role": "tool", "content": "blue", "tool_call_id": "call00001"}


def add_end(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the tokenizer's chat template end the last answer of a chat with a control token, if it writes nothing after an answer.

    The token is the one with which the template begins the next message: a question, or the result of a tool if the answer calls one. If
    the next message begins without a control token, it is the end-of-text token.
    """
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        tokenizer.chat_template = {name: _with_end(tokenizer, template) for name, template in templates.items()}
    elif templates:
        tokenizer.chat_template = _with_end(tokenizer, templates)


def _with_end(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """Return the template with the end of the last answer, or as it is if it writes one or cannot be used."""
    answer = str(ANSWER["content"])
    _, said, after = _text(tokenizer, template, [QUESTION, ANSWER]).rpartition(answer)
    if not said or after.strip():
        return template
    end = _begin_of(tokenizer, template, [QUESTION, ANSWER], QUESTION) or tokenizer.eos_token
    if not end:
        return template
    after_call = _begin_of(tokenizer, template, [QUESTION, {**ANSWER, "tool_calls": CALLS}], RESULT) or end
    shown = repr(end) if after_call == end else f"{after_call!r} if messages[-1].tool_calls else {end!r}"
    last = f"{{% if messages[-1].role == 'assistant' and not add_generation_prompt %}}{{{{ {shown} }}}}{{% endif %}}"
    return f"{template.removesuffix(LINE_END)}{{# {ADDED}{end} #}}{last}"  # Jinja does not print a template's last line end


def added_end(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the token that `add_end` has given to the tokenizer's chat template; None if it has given none."""
    templates = tokenizer.chat_template
    text = "".join(templates.values()) if isinstance(templates, dict) else templates or ""
    found = re.search(rf"\{{# {ADDED}(.*?) #\}}", text)
    return found[1] if found else None


def pattern_of_end(tokenizer: PreTrainedTokenizerBase, stop: re.Pattern[str], control: Iterable[str]) -> re.Pattern[str]:
    """Return what matches the end of an answer: a special token, or several control tokens of which the last is the end-of-text token.

    Cohere's templates write <|END_RESPONSE|> and the end-of-text token, at which generation stops, after each answer. Only what also stands
    before a next question counts: a template may end the whole chat with a token of its own.

    Args:
        stop: matches a special token; it is returned if the template does not write several.
        control: the tokenizer's control tokens.
    """
    template, eos = tokenizer.chat_template, tokenizer.eos_token
    if not isinstance(template, str) or not eos:
        return stop
    after = _text(tokenizer, template, [QUESTION, ANSWER, QUESTION]).partition(str(ANSWER["content"]))[2]
    found = re.match(rf"(?:{'|'.join(map(re.escape, control))})+?{re.escape(str(eos))}", after)
    return re.compile(f"{re.escape(found[0])}|{stop.pattern}") if found else stop


def _begin_of(tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[dict[str, Any]], following: dict[str, Any]) -> str:
    """Return the control token with which the message that follows others begins; empty if there is none."""
    alone, continued = (_text(tokenizer, template, chat) for chat in (messages, [*messages, following]))
    answer = str(ANSWER["content"])
    alone, continued = (text[text.rfind(answer) :] for text in (alone, continued))
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | set(tokenizer.all_special_tokens)
    longest_first = sorted(special, key=len, reverse=True)
    found = re.match("|".join(map(re.escape, longest_first)) or "(?!)", continued[len(alone) :].lstrip())
    return found[0] if found and alone and continued.startswith(alone) else ""


def _text(tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[dict[str, Any]]) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), chat_template=template, tokenize=False))
    except Exception:  # a template is a program of the model's author and may raise anything; the renderer says what
        return ""
