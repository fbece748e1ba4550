"""Refuse text to which a chat template is already applied: its control tokens would be trained as plain text."""

import re

from verl.data.chat import Message
from verl.errors import UserError

# The beginning of such a text in the formats of ChatML, Llama 3, Gemma, Mistral, Phi, gpt-oss and DeepSeek.
HEADER = re.compile(
    r"\s*(?:<s>|<bos>|<\|begin_of_text\|>|<｜begin▁of▁sentence｜>|<\|endoftext\|>|\[gMASK\]<sop>)?\s*"
    r"(?:<\|im_start\|>\s*(?:system|user|assistant|developer|tool)\b|<\|start_header_id\|>\s*\w+\s*<\|end_header_id\|>"
    r"|<start_of_turn>(?:user|model)\b|\[INST\].*\[/INST\]|\[SYSTEM_PROMPT\].*\[/SYSTEM_PROMPT\]|<\|(?:system|user|assistant)\|>|<\|start\|>(?:system|developer|user|assistant)|<｜(?:User|Assistant)｜>)",
    re.DOTALL,
)
ASKED = re.compile(
    r"(?:<\|im_start\|>assistant|<\|start_header_id\|>assistant<\|end_header_id\|>|<start_of_turn>model|<\|assistant\|>|<｜Assistant｜>)\s*\Z"
)
STOPS = (  # of any tokenizer
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<|end|>", "<|return|>", "<end_of_turn>", "<turn|>"),
    *("<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>"),
)
OR_TAKE_TOKENS = "or, for a column of such text (data.text_key), set data.text_is_rendered=true"


def check_text(text: str, special: tuple[str, ...]) -> None:
    """Check a text that is trained whole.

    Args:
        special: special tokens of the tokenizer.
    Raises:
        UserError: a chat template is applied to it, or it ends with a control token.
    """
    _refuse_header(text, None)
    _refuse_end(text, None, special)


def check_rendered(text: str, *, has_tokens: bool) -> None:
    """Check a text whose control tokens are tokens.

    Args:
        has_tokens: whether control tokens of this tokenizer are in it.
    Raises:
        UserError: its control tokens are those of another tokenizer.
    """
    if not has_tokens and (header := HEADER.match(text)):
        what = f"{header[0].strip()[:40]!r} is not a control token of this tokenizer"
        raise UserError(what, fix="use the tokenizer that the text was written for, or give the messages (data.messages_key)")


def check_messages(messages: list[Message], special: tuple[str, ...]) -> None:
    """Check the contents of a chat.

    Raises:
        UserError: a chat template is applied to a message, or an answer ends with a control token.
    """
    for number, message in enumerate(messages):
        content = message.get("content") or ""
        _refuse_header(content, f"messages[{number}]")
        if message["role"] == "assistant":
            _refuse_end(content, f"messages[{number}]", special)
        elif asked := ASKED.search(content):
            what = f"a chat template is already applied to the text: it ends with {asked[0].strip()!r}"
            raise UserError(what, where=f"messages[{number}]", fix=f"give the messages themselves (data.messages_key), {OR_TAKE_TOKENS}")


def ends_with_control(text: str, special: tuple[str, ...]) -> bool:
    text = text.rstrip()
    return text.endswith((*special, *STOPS)) or (text.endswith("</s>") and text.count("</s>") > text.count("<s>"))  # <s>…</s> is HTML


def _refuse_header(text: str, where: str | None) -> None:
    if header := HEADER.match(text):
        fix = f"give the messages themselves (data.messages_key), {OR_TAKE_TOKENS}"
        raise UserError(f"a chat template is already applied to the text: it begins with {header[0].strip()[:40]!r}", where=where, fix=fix)


def _refuse_end(text: str, where: str | None, special: tuple[str, ...]) -> None:
    if ends_with_control(text, special):
        what = f"the text ends with a control token, which verl appends itself: {text.rstrip()[-40:]!r}"
        raise UserError(what, where=where, fix=f"remove it from the data, {OR_TAKE_TOKENS}")
