"""An answer with its prompt, in each form that preference data has, as a whole chat.

The prompt is text or messages. The answer is text or messages that follow the prompt, or a chat that begins with the prompt. A chat may
also be JSON text, or text with `Human:` and `Assistant:` before its turns.
"""

import re
from collections.abc import Collection, Iterator
from typing import Any

from verl.data.chat import SYSTEM, TOOLS, Message, checked
from verl.data.messages import CALLS, ROLES
from verl.data.row import Row, describe, number_text
from verl.data.shapes import CHATS, system_column, with_system
from verl.errors import UserError

TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")  # the start of a turn, in preference data that holds whole chats as text
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
MESSAGES_AS_TEXT = re.compile(r"""\s*(\[\s*)?\{\s*["'](role|content|from|value)["']\s*:""")  # JSON, or a list as Python prints it
PROMPT = "prompt"  # the default column of prompts
EXAMPLE = 'write the answer as text, or as [{"role": …, "content": …}, …]'


def is_chat(value: object) -> bool:
    """Return whether a column holds messages, and not a text. A list of one text or number is a text, as `Row.text` reads it."""
    if isinstance(value, list) and len(value) == 1:
        return not isinstance(value[0], str) and number_text(value[0]) is None
    return isinstance(value, (list, dict)) or (isinstance(value, str) and (_is_json(value) or _is_transcript(value)))


def columns_beside(prompt: str | None, names: Collection[str]) -> tuple[str, ...]:
    """Return the columns that are read beside those that the config names.

    Args:
        prompt: column of the prompt.
        names: the columns of the table.
    """
    return (*SYSTEM, *TOOLS, *(CHATS if prompt == PROMPT and prompt not in names else ()))


def prompt_column(row: Row, column: str | None) -> str | None:
    """Return the column of a row's prompt: the given one, or, if that is the default one and missing, a chat that waits for an answer.

    LLaMA-Factory writes pairs with such a chat in `conversations`.
    """
    if column != PROMPT or row.has(column):
        return column
    chats = [name for name in CHATS if row.values.get(name) and is_chat(row.values[name])]
    waiting = [name for name in chats if not _is_assistants(_messages(row.values[name], f"{row.where}: {name}")[-1])]
    if not waiting:
        return column
    row.note(f"the prompt is the chat in {waiting[0]!r}")
    return waiting[0]


def prompt_of(row: Row, column: str | None) -> list[Message] | None:
    """Return the messages of a row's prompt; None if the row has no prompt.

    Raises:
        UserError: the prompt is neither a text nor messages.
    """
    if column is None or row.values.get(column) in (None, "", []):
        return None
    value = row.values[column]
    if not is_chat(value) or (isinstance(value, str) and _is_transcript(value) and not _has_both(value)):
        return [{"role": "user", "content": row.text(column, "data.prompt_key")}]
    messages = _messages(value, f"{row.where}: {column}")
    return messages[:-1] if messages[-1] == {"role": "assistant", "content": ""} else messages  # `Assistant:`, which the answer follows


def whole_chat(row: Row, column: str, key: str, prompt: list[Message] | None, prompt_key: str | None) -> list[Message]:
    """Return the messages of an answer, including those of its prompt.

    Args:
        column: column of the answer.
        key: the config key that names it, for errors.
        prompt: result of `prompt_of`.
        prompt_key: column of the prompt, for errors.
    Raises:
        UserError: the column has another form, or the answer needs a prompt and the row has none.
    """
    value = row.value(column, key)
    # Beside a prompt, a text with one turn is an answer, whatever its first word is.
    is_answer = not is_chat(value) or (prompt is not None and isinstance(value, str) and _is_transcript(value) and not _has_both(value))
    text = row.text(column, key) if is_answer else ""
    if isinstance(asked := row.values.get(prompt_key or ""), str) and _is_transcript(asked):
        text = text.strip()  # the space after `Assistant:`
    answer = [{"role": "assistant", "content": text}] if is_answer else _messages(value, f"{row.where}: {column}")
    if not _is_assistants(answer[0]):
        return answer
    if prompt is None:
        raise _without_prompt(row, prompt_key)
    if _is_assistants(prompt[-1]):
        fix = "end the prompt with the message to answer, or write the answers as whole chats"
        raise UserError("the prompt ends with the assistant's turn", where=f"{row.where}: {prompt_key}", fix=fix)
    return [*prompt, *answer]


def with_system_of(row: Row, chat: list[Message]) -> list[Message]:
    """Return the chat with the system prompt that stands in a column of its own, if the row has one."""
    column = system_column(row)
    return chat if column is None else with_system(chat, row, column)


def tools_of(row: Row, column: str | None, key: str) -> object:
    """Return the tools of a row, or None.

    Args:
        column: column of the tools, or None.
        key: the config key that names it, for errors.
    Raises:
        UserError: `column` is None, but the row has tools, which the model would not see.
    """
    if column is not None:
        return row.value(column, key, may_be_null=True)
    unread = next((name for name in TOOLS if row.values.get(name) not in (None, "", "[]", [])), None)
    if unread is not None:
        what = f"column {unread!r} has tools, but {key} is not set, so the model would not see them"
        raise UserError(what, where=row.where, fix=f"set {key}={unread}, or remove the column")
    return None


def checked_messages(messages: list[Message], place: str) -> list[Message]:
    """Return the messages in the form that chat templates expect. Raises UserError if one is invalid."""
    try:
        return checked(messages).messages
    except UserError as error:
        raise UserError(error.what, where=f"{place}: {error.where}" if error.where else place, fix=error.fix) from None


def check_end(messages: list[Message], place: str) -> None:
    """Raise UserError if a chat does not end with the assistant's turn."""
    if messages[-1]["role"] != "assistant":
        what = f"the chat ends with a message of the {messages[-1]['role']}, which has no answer"
        raise UserError(what, where=f"{place}: messages[{len(messages) - 1}]", fix="remove that message, or add the answer")


def check_prompt(row: Row, column: str | None, prompt: list[Message] | None, beginning: list[Message]) -> None:
    """Check that a chat begins with the prompt of its row.

    A prompt of one user message may be any user message of the beginning, because some data sets repeat the first question, and others the
    last one. A longer prompt is the beginning itself; it may leave out the system message.

    Args:
        beginning: messages before the answer, in the form that chat templates expect.
    Raises:
        UserError: it does not.
    """
    if prompt is None or column is None:
        return
    asked = [_plain(message) for message in checked_messages(prompt, f"{row.where}: {column}")]
    found = [_plain(message) for message in beginning]
    is_question = len(asked) == 1 and asked[0]["role"] == "user"
    system = 1 if found and found[0]["role"] == "system" else 0
    if found[: len(asked)] == asked or found[system : system + len(asked)] == asked or (is_question and asked[0] in found):
        return
    what = f"column {column!r} says {_excerpt(asked[-1:])}, but the chat begins with {_excerpt(found[system:])}"
    if asked[0]["role"] == "system" and not system and found[: len(asked) - 1] == asked[1:]:
        what = f"column {column!r} begins with a system message, which the chats leave out"
        raise UserError(what, where=row.where, fix="write it into the chats too, or set data.prompt_key=null")
    fix = "correct the row; or, if the answers are whole chats and the column is something else, set data.prompt_key=null"
    raise UserError(what, where=row.where, fix=fix)


def _messages(value: Any, place: str) -> list[Message]:
    """Return the messages of a column that holds a chat."""
    if isinstance(value, str) and _is_transcript(value):
        return list(_turns(value))
    if isinstance(value, str):
        from verl.data.formats.json import json_in_text  # most chats are lists

        found = json_in_text(value, place)
        if found is None:
            raise UserError("the chat is text that is not JSON", where=place, fix="write it as JSON, such as json.dumps")
        value = found
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"found {describe(value)}, expected text or a list of messages", where=place, fix=EXAMPLE)
    return messages


def _is_assistants(message: Message) -> bool:
    role = str(message.get("role", message.get("from")))
    return role in CALLS or ROLES.get(role.lower()) == "assistant"


def _is_json(text: str) -> bool:
    return MESSAGES_AS_TEXT.match(text) is not None


def _is_transcript(text: str) -> bool:
    return TURN.match(text) is not None


def _has_both(text: str) -> bool:
    return set(SPEAKERS) <= {found[1] for found in TURN.finditer(text)}


def _turns(text: str) -> Iterator[Message]:
    """Yield the messages of a chat that is written as text."""
    _, *parts = TURN.split(text)
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        yield {"role": SPEAKERS[speaker], "content": said.strip()}


def _plain(message: Message) -> Message:
    """Return a message whose text has single spaces, for comparison."""
    return {**message, "content": " ".join(str(message.get("content", "")).split())}


def _excerpt(messages: list[Message]) -> str:
    return f"{messages[0]['content']!r:.60}" if messages else "the answer"


def _without_prompt(row: Row, column: str | None) -> UserError:
    if column is None:
        fix = "name the prompt column, or write both answers as whole chats, or both as whole texts"
        return UserError("an answer without its prompt", where=f"{row.where}: data.prompt_key=null", fix=fix)
    try:
        row.text(column, "data.prompt_key")
    except UserError as error:
        return UserError(error.what, where=error.where, fix=f"{error.fix}; or, if both answers are whole texts, data.prompt_key=null")
    return UserError(f"column {column!r} is empty", where=row.where, fix="fill it in, or remove the row")
