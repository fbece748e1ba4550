"""A chat in the form that chat templates expect: messages with a role and a content, and the tools that the assistant may call."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from verl.errors import UserError

Message = dict[str, Any]

PLAIN_KEYS = {"role", "content"}
# Columns that belong to a chat, or to a question, and are read although no key of the config names them.
SYSTEM = ("system", "system_prompt")
TOOLS = ("tools", "functions")
TEMPLATE_KWARGS = "chat_template_kwargs"
BESIDES = frozenset((*SYSTEM, *TOOLS, TEMPLATE_KWARGS))
PLAIN_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class ChatInput:
    """A chat of a row, before validation.

    Attributes:
        messages, tools: as for `checked`.
        context_turns: number of the assistant's first turns that are not trained.
        place: text between the row's location and the message's in an error; None omits the message's.
        template_kwargs: variables of the chat template for this row, a mapping or its JSON.
        train_turns: "all", or "last" to train only the assistant's last turn.
        notes: what the report says about the row; each note is counted over the rows.
    """

    messages: object
    tools: object = None
    context_turns: int = 0
    place: str | None = None
    template_kwargs: object = None
    train_turns: str = "all"
    notes: tuple[str, ...] = ()


class RenderedText(str):
    """A text to which a chat template has been applied already: its control tokens are tokens."""


@dataclass(frozen=True)
class Chat:
    """A valid chat.

    Attributes:
        messages: messages without null keys and without marks; the arguments of tool calls are objects.
        tools: JSON schemas of the tools, or None.
        template_kwargs: variables of the chat template.
        untrained: indices of the assistant's messages that their marks exclude from training.
        notes: what the report says about the chat.
    """

    messages: list[Message]
    tools: list[dict[Any, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    untrained: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()

    def answers(self) -> Iterator[tuple[int, Message]]:
        """Yield the assistant's messages with their indices."""
        return ((number, message) for number, message in enumerate(self.messages) if message["role"] == "assistant")

    def up_to(self, number: int) -> "Chat":
        """Return the chat up to, but without, message `number`."""
        return Chat(self.messages[:number], self.tools, self.template_kwargs)

    def trained_turns(self, given: ChatInput) -> list[int]:
        """Return the indices of the messages to train.

        Raises:
            UserError: there are none.
        """
        answers = [number for number, _ in self.answers()]
        if not answers:
            raise UserError("the chat has no assistant turn to train", where="messages", fix="add the answer, or remove the row")
        chosen = answers[given.context_turns :]
        trained = [number for number in (chosen[-1:] if given.train_turns == "last" else chosen) if number not in self.untrained]
        if not trained:
            what = "no turn is trained: the marks of the messages (weight, train, loss, …) exclude each assistant turn"
            raise UserError(what, where="messages", fix="remove the row, or the marks")
        return trained


def checked(messages: object, tools: object = None, template_kwargs: object = None) -> Chat:
    """Validate a chat of the data, and bring it into the form that chat templates expect.

    Args:
        messages: a list of messages, or its JSON. `verl.data.messages` describes the forms of a message.
        tools: None, a list of JSON schemas, or its JSON.
        template_kwargs: None, a mapping, or its JSON.
    Raises:
        UserError: a message, a tool or a variable is invalid; the error names it.
    """
    if tools is None and template_kwargs is None and _is_plain(messages):
        assert isinstance(messages, list)
        return Chat(messages)
    from verl.data.messages import read_messages, read_template_kwargs, read_tools  # most data has only plain chats

    found, untrained, notes = read_messages(messages)
    return Chat(found, read_tools(tools), read_template_kwargs(template_kwargs), untrained, notes)


def _is_plain(messages: object) -> bool:
    """Return whether each message has exactly a common role and a text, which is not blank if the assistant says it."""
    if not isinstance(messages, list) or not messages:
        return False
    return all(
        isinstance(message, dict)
        and message.keys() == PLAIN_KEYS
        and message["role"] in PLAIN_ROLES
        and isinstance(message["content"], str)
        and (message["role"] != "assistant" or (not message["content"].isspace() and message["content"] != ""))
        for message in messages
    )


def unanswered(messages: object, where: str) -> tuple[list[Message], str | None]:
    """Split a chat into the messages to answer and the text of the assistant's last message, if the data has one.

    Args:
        messages: a list of messages, or its JSON.
        where: location of the row, for errors.
    Raises:
        UserError: a message is invalid, or the chat has no message to answer.
    """
    try:
        *found, last = checked(messages).messages
    except UserError as error:
        raise UserError(error.what, where=f"{where}: {error.where}" if error.where else where, fix=error.fix) from None
    answer = last.get("content") if last["role"] == "assistant" else None
    asked = found if last["role"] == "assistant" else [*found, last]
    if not asked or asked[-1]["role"] == "assistant":
        raise UserError("the chat has no message to answer", where=where, fix="end it with a user message")
    return asked, answer
