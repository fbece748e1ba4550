"""Rows that are more than a question and an answer in the columns that the config names: chats, and shapes of well-known data sets.

If the config names no columns, they are recognised from their names, but only if there is one way to read them. The report says how the
rows were read.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

from verl.data.chat import BESIDES, SYSTEM, TEMPLATE_KWARGS, TOOLS, ChatInput, Message, checked, unanswered
from verl.data.row import UNREAD, Row, describe
from verl.errors import UserError

CHATS = ("messages", "conversations", "conversation")
QUESTIONS = ("question", "prompt", "instruction", "query", "problem", "input")
ANSWERS = ("answer", "response", "output", "completion", "solution")
CONTEXT = {"instruction": ("input", "context")}  # columns that continue the question
HISTORY = "history"  # earlier turns of an Alpaca row
LABELLED, PAIR = ("completion", "label"), ("chosen", "rejected")  # columns of answers that are not simply trained
UPSTREAM_REFERENCE = "reward_model.ground_truth"
UPSTREAM_TEXTS = ("extra_info.question", "extra_info.answer")
NAMES = {
    ("instruction", "output"): "Alpaca",
    ("prompt", "completion"): "TRL",
    ("conversations", None): "ShareGPT",
    ("prompt", UPSTREAM_REFERENCE): "upstream verl",
    UPSTREAM_TEXTS: "upstream verl",
}


class NamedColumns(Protocol):
    """The keys of a config that name columns."""

    @property
    def prompt_key(self) -> str: ...
    @property
    def response_key(self) -> str | None: ...
    @property
    def messages_key(self) -> str | None: ...
    @property
    def tools_key(self) -> str | None: ...
    @property
    def chat_template_kwargs_key(self) -> str | None: ...


class TrainedColumns(NamedColumns, Protocol):
    @property
    def train_turns(self) -> str: ...
    @property
    def text_is_rendered(self) -> bool: ...


@dataclass(frozen=True)
class Shape:
    """How a row is read. A column inside an object is named by its path, such as `reward_model.ground_truth`.

    Attributes:
        chat: column of a chat; None if the row has a question.
        question: columns of the question; the text of later ones follows after a blank line.
        answer: column of the answer; None if the chat has it.
        system: column of the system prompt, or None.
        note: how the columns were recognised, for the report; empty if the config names them.
    """

    chat: str | None
    question: tuple[str, ...] = ()
    answer: str | None = None
    system: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Asked:
    """A row to answer.

    Attributes:
        messages: the chat to answer.
        text: the question; for a chat, its last message.
        reference: the right answer; None if the row has none.
        tools, template_kwargs: as for `verl.data.chat.checked`.
    """

    messages: list[Message]
    text: str
    reference: str | None
    tools: object
    template_kwargs: object


def read_example(row: Row, columns: TrainedColumns) -> ChatInput:
    """Return the chat to train.

    Raises:
        UserError: a column is missing or invalid, or it is not clear which columns to read.
    """
    if columns.text_is_rendered:
        fix = "set data.text_key to the column of the rendered text"
        raise UserError("data.text_is_rendered=true is for text that is trained whole", where=row.where, fix=fix)
    shape = shape_of(row, columns, "data.", for_training=True)
    if shape.chat is not None:
        messages, context = _with_system(row.value(shape.chat, "data.messages_key"), row, shape), 0
    else:
        assert shape.answer is not None
        before = _question(row, shape, "data.")
        answer = _conversation(row.value(shape.answer, "data.response_key"), row, shape.answer)
        after = answer or [{"role": "assistant", "content": row.text(shape.answer, "data.response_key")}]
        messages, context = [*before, *after], sum(message.get("role", message.get("from")) in ("assistant", "gpt") for message in before)
    tools, note = _tools(row, columns, messages, "data.")
    kwargs, more = _template_kwargs(row, columns, "data.")
    notes = [note for note in (shape.note, note, more) if note]
    if columns.train_turns == "last":
        notes.append("only the last turn of the assistant is trained (data.train_turns=last)")
    return ChatInput(messages, tools, context, "", kwargs, columns.train_turns, tuple(notes))


def read_question(row: Row, columns: NamedColumns, system_prompt: str | None, prefix: str = "") -> Asked:
    """Return the row as a question. How it was recognised becomes a note of the row.

    Args:
        system_prompt: system prompt before a question that is not a chat; None: that of the row, if it has one.
        prefix: text before the config keys in errors: "data.", or empty.
    Raises:
        UserError: as `read_example`.
    """
    if row.is_text:
        raise UserError("plain text has no questions", where=row.where, fix="write the questions as JSONL, CSV or Parquet")
    if not UNREAD.isdisjoint(row.values):
        from verl.data.beside import check_pictures  # most data has no such columns

        check_pictures(row, (columns.prompt_key, columns.response_key, columns.messages_key))
    shape = shape_of(row, columns, prefix, for_training=False)
    said = None
    messages = _with_system(row.value(shape.chat, f"{prefix}messages_key"), row, shape) if shape.chat else _question(row, shape, prefix)
    is_chat = shape.chat is not None or len(messages) > 1 or messages[0].get("role") != "user"
    tools, note = _tools(row, columns, messages, prefix)
    kwargs, more = _template_kwargs(row, columns, prefix)
    if system_prompt is not None:
        if shape.chat is not None or messages[0].get("role") == "system":
            what = "the row is a chat, or has a system prompt of its own"
            raise UserError(what, where=f"{row.where}: {prefix}system_prompt", fix=f"remove {prefix}system_prompt, or the row's own")
        messages = [{"role": "system", "content": system_prompt}, *messages]
    about: tuple[str, ...] = ()
    if is_chat:
        messages, said = unanswered(messages, row.where)
        about = checked(messages).notes
    reference = said
    if columns.response_key is not None and shape.answer is not None and (said is None or row.has(shape.answer)):
        reference = _reference(row, shape.answer, f"{prefix}response_key")
    for what in filter(None, (shape.note, note, more, *about)):
        row.note(what)
    return Asked(messages, messages[-1].get("content") or "", reference, tools, kwargs)


def _reference(row: Row, column: str, key: str) -> str:
    """Return the right answer: a text, or that of the last message of a chat."""
    chat = _conversation(row.value(column, key), row, column)
    said = None if chat is None else unanswered([{"role": "user", "content": "?"}, *chat], row.where)[1]
    return row.text(column, key) if said is None else said


# Which columns


def columns_of_shapes(columns: NamedColumns, names: Collection[str]) -> set[str]:
    """Return names and paths of the columns from which a row to train is read, or for which it is refused.

    Args:
        names: the columns of the table.
    """
    texts = {columns.prompt_key, columns.response_key} if columns.messages_key is None else {columns.messages_key}
    named = {name for name in (*texts, columns.tools_key, columns.chat_template_kwargs_key, *BESIDES, *UNREAD) if name is not None}
    if columns.messages_key is not None or not _are_defaults(columns) or texts <= set(names):
        return named
    more = (name for beside in CONTEXT.values() for name in beside)
    return {*named, *CHATS, *QUESTIONS, *ANSWERS, *more, HISTORY, UPSTREAM_REFERENCE, *UPSTREAM_TEXTS, *LABELLED, *PAIR}


def _are_defaults(columns: NamedColumns) -> bool:
    """Return whether the config names no columns of questions and answers."""
    return columns.prompt_key == "question" and columns.response_key in ("answer", None)


def shape_of(row: Row, columns: NamedColumns, prefix: str, *, for_training: bool) -> Shape:
    """Return how to read the row: by the columns that the config names, or, if they are the defaults and missing, by their names.

    Raises:
        UserError: it is not clear which columns to read.
    """
    answer = columns.response_key
    if not row.has(columns.messages_key or columns.prompt_key):
        _refuse_message(row)
    if columns.messages_key is not None:
        return Shape(columns.messages_key, answer=None if for_training else answer, system=system_column(row))
    named = Shape(None, (columns.prompt_key,), answer, system_column(row, columns.prompt_key, answer))
    if not _are_defaults(columns) or (columns.prompt_key in row.values and (answer is None or answer in row.values)):
        return named
    if for_training:
        _refuse_labels(row, prefix)
    found = _recognised(row, for_training=for_training, needs_answer=answer is not None)
    if len(found) == 1:
        return found[0]
    if not found and for_training and row.has(UPSTREAM_REFERENCE) and "prompt" in row.values:
        what = f"rows of upstream verl are trained on extra_info.question and extra_info.answer, which are missing (found: {row.found})"
        fix = f"to train the reference, set {prefix}prompt_key=prompt {prefix}response_key={UPSTREAM_REFERENCE}; or use verl ppo"
        raise UserError(what, where=row.where, fix=fix)
    if not found:  # an error will say what is wrong with the chat, or that the columns of the config are missing
        return next((_shape(row, chat=name) for name in CHATS if name in row.values), named)
    ways = "; or ".join(_keys_of(shape, prefix) for shape in found)
    what = f"it is not clear which columns to read (found: {row.found})"
    raise UserError(what, where=row.where, fix=f"set {ways}")


def _refuse_message(row: Row) -> None:
    """Raise UserError for a row that is a message, as in a JSON file whose array is one chat."""
    if any(row.values.keys() >= keys for keys in ({"role", "content"}, {"from", "value"})):
        what = f"the row is one message of a chat, expected a whole chat (found: {row.found})"
        fix = 'write the messages of a chat into one row: {"messages": [{"role": …, "content": …}, …]}'
        raise UserError(what, where=row.where, fix=fix)


def _refuse_labels(row: Row, prefix: str) -> None:
    """Raise UserError for one answer with a label, good or bad, or a pair of answers: a bad answer must not be trained unnoticed."""
    if LABELLED[0] in row.values and isinstance(row.values.get(LABELLED[1]), bool):
        what = "the row is an answer that is labelled good or bad (columns 'completion' and 'label')"
        fix = (
            f"use verl reward algorithm.name=kto; or keep what is labelled true; or set {prefix}prompt_key and {prefix}response_key for all"
        )
        raise UserError(what, where=row.where, fix=fix)
    if row.values.keys() >= set(PAIR):
        fix = f"train pairs with verl reward; or set {prefix}prompt_key and {prefix}response_key to train one of the answers"
        raise UserError("the row is a pair of answers (columns 'chosen' and 'rejected')", where=row.where, fix=fix)


def _recognised(row: Row, *, for_training: bool, needs_answer: bool) -> list[Shape]:
    """Return each way to read the row."""
    names = [name for name, value in row.values.items() if value is not None]
    chats = [name for name in CHATS if name in names and _conversation(row.values[name], row, name) is not None]
    questions = [name for name in QUESTIONS if name in names]
    answers = [name for name in ANSWERS if name in names]
    if row.has(UPSTREAM_REFERENCE) and questions == ["prompt"]:
        if not for_training:
            return [_shape(row, ("prompt",), UPSTREAM_REFERENCE)]
        if all(row.has(name) for name in UPSTREAM_TEXTS):
            return [_shape(row, UPSTREAM_TEXTS[:1], UPSTREAM_TEXTS[1])]
    if not for_training and len(answers) == 2 and {"solution", "answer"} == set(answers):
        answers = ["answer"]  # a solution explains the answer
    if for_training and questions[:1] == ["problem"] and {"solution", "answer"} == set(answers):
        answers = ["solution"]
    more = [name for question in questions for name in CONTEXT.get(question, ()) if name in names]
    questions = [name for name in questions if name not in more]
    found = [_shape(row, chat=chat, answer=answers[0] if len(answers) == 1 and not for_training else None) for chat in chats]
    pairs: list[str | None] = [*answers] if needs_answer else [None]
    if chats and not (questions and answers):
        return found
    return found + [_shape(row, (question, *more), answer) for question in questions for answer in pairs]


def _shape(row: Row, question: tuple[str, ...] = (), answer: str | None = None, chat: str | None = None) -> Shape:
    question = tuple(name for number, name in enumerate(question) if number == 0 or row.values.get(name) not in (None, ""))
    system = system_column(row)
    name = NAMES.get((chat, None) if chat else (question[0], answer), "")
    parts = [f"the chat in {chat!r}"] if chat else [f"the question in {' and '.join(map(repr, question))}"]
    parts += [f"the answer in {answer!r}"] if answer else []
    note = f"read as {name + ' rows' if name else 'rows'} with {', '.join(parts)}"
    return Shape(chat, question, answer, system, note)


def _keys_of(shape: Shape, prefix: str) -> str:
    if shape.chat is not None:
        return f"{prefix}messages_key={shape.chat}"
    return f"{prefix}prompt_key={shape.question[0]} {prefix}response_key={shape.answer or 'null'}"


# Values


def _conversation(value: object, row: Row, column: str) -> list[Message] | None:
    """Return a value that is a list of messages, its JSON, or one message; None if it is something else.

    Raises:
        UserError: the JSON has a value that cannot be used.
    """
    if isinstance(value, str) and value.lstrip()[:1] == "[" and ('"role"' in value or '"from"' in value):
        from verl.data.formats.json import json_in_text  # most rows have lists, not JSON text

        value = json_in_text(value, f"{row.where}: column {column!r}")
    value = [value] if isinstance(value, dict) else value
    is_chat = isinstance(value, list) and value and all(isinstance(item, dict) and ("role" in item or "from" in item) for item in value)
    return list(value) if isinstance(value, list) and is_chat else None


def _question(row: Row, shape: Shape, prefix: str) -> list[Message]:
    """Return the messages before the answer."""
    first, *more = shape.question
    chat = _conversation(row.value(first, f"{prefix}prompt_key"), row, first)
    if chat is not None:
        return list(_with_system(chat, row, shape))
    text = "\n\n".join([row.text(first, f"{prefix}prompt_key"), *(row.text(name, f"{prefix}prompt_key") for name in more)])
    return list(_with_system([*_history(row, shape), {"role": "user", "content": text}], row, shape))


def system_column(row: Row, *named: str | None) -> str | None:
    """Return the column of the row's system prompt, unless it is a column that the config names for something else; None: it has none."""
    return next((name for name in SYSTEM if name not in named and isinstance(row.values.get(name), str) and row.values[name].strip()), None)


def _history(row: Row, shape: Shape) -> list[Message]:
    """Return the earlier turns of an Alpaca row: pairs of a question and an answer."""
    history = row.values.get(HISTORY) if shape.question[:1] == ("instruction",) and shape.note else None
    if not history:
        return []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        what = f"column 'history' is {describe(history)}, expected pairs of a question and an answer"
        raise UserError(what, where=row.where, fix='write [["question", "answer"], …], or remove the column')
    return [{"role": role, "content": text} for pair in history for role, text in zip(("user", "assistant"), pair, strict=True)]


def _with_system(messages: Any, row: Row, shape: Shape) -> Any:
    """Return the messages with the row's system prompt first, unless they have one."""
    chat = None if shape.system is None else _conversation(messages, row, shape.chat or "messages")
    return messages if chat is None or shape.system is None else with_system(chat, row, shape.system)


def with_system(chat: list[Message], row: Row, column: str) -> list[Message]:
    """Return the chat with the text of a column as its system prompt, unless it has another one; the row notes which."""
    prompt = row.values[column]
    if chat[0].get("role", chat[0].get("from")) != "system":
        row.note(f"the system prompt is in column {column!r}")
        return [{"role": "system", "content": prompt}, *chat]
    if chat[0].get("content", chat[0].get("value")) != prompt:
        row.note(f"column {column!r} is not read, because the chat has a system prompt of its own")
    return chat


# Tools and variables of the template


def _tools(row: Row, columns: NamedColumns, messages: object, prefix: str) -> tuple[object, str]:
    """Return the row's tools, and a note. Tools in a column that the config does not name are used if they are schemas.

    Raises:
        UserError: two columns have schemas; or the chat calls tools, and no column has schemas.
    """
    if columns.tools_key is not None:
        return row.value(columns.tools_key, f"{prefix}tools_key", may_be_null=True), ""
    given = {name: row.values[name] for name in TOOLS if row.values.get(name)}
    schemas = {name: found for name, value in given.items() if (found := _schemas(value, f"{row.where}: column {name!r}"))}
    if len(schemas) == 1:
        ((name, tools),) = schemas.items()
        return tools, f"the tools are in column {name!r}"
    if given and (schemas or _calls(messages, row)):
        what = f"it is not clear which column has the schemas of the tools (found: {', '.join(given)})"
        raise UserError(what, where=row.where, fix=f"set {prefix}tools_key to the column of the schemas, or rename these columns")
    return None, f"column {', '.join(map(repr, given))} is not read, because it has no schemas of tools" if given else ""


def _schemas(value: object, where: str) -> list[dict[str, Any]] | None:
    """Return schemas of tools, a list or its JSON; None if the value is something else. Raises UserError as `_conversation`."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        from verl.data.formats.json import json_in_text  # most rows have lists, not JSON text

        value = json_in_text(value, where)
    if not isinstance(value, list) or not value or not all(isinstance(tool, dict) for tool in value):
        return None
    functions = [tool["function"] if isinstance(tool.get("function"), dict) else tool for tool in value]
    return value if all(isinstance(function.get("name"), str) for function in functions) else None


def _calls(messages: object, row: Row) -> bool:
    return any(
        message.get("tool_calls") or message.get("function_call") or message.get("role", message.get("from")) in ("tool", "function_call")
        for message in _conversation(messages, row, "messages") or []
    )


def _template_kwargs(row: Row, columns: NamedColumns, prefix: str) -> tuple[object, str]:
    """Return the variables of the chat template for this row, and a note if the config does not name their column."""
    if columns.chat_template_kwargs_key is not None:
        return row.value(columns.chat_template_kwargs_key, f"{prefix}chat_template_kwargs_key", may_be_null=True), ""
    found = row.values.get(TEMPLATE_KWARGS)
    return (found, f"the variables of the chat template are in column {TEMPLATE_KWARGS!r}") if isinstance(found, dict) else (None, "")
