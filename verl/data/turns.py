"""Find what the assistant says in a rendered chat, where its end is not simply the first control token, or the template changes turns.

A turn is rendered a second time with a character of its own in place of its text. What follows that character is what follows the turn,
so the end of the turn is found without searching for its text. The text is then compared with the data: nothing may be lost unnoticed.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from verl.data.chat import Chat, Message
from verl.data.encode import strings
from verl.data.messages import LINKS, SPOKEN_KEYS, THOUGHT_KEYS, split_thought, spoken_keys, texts_of, thought_of
from verl.errors import UserError

Span = tuple[int, int]  # start and end (exclusive) in a text, in characters
Render = Callable[[Chat, bool], str]  # the second argument asks for the generation prompt

THOUGHT_IN_PROMPT = re.compile(r"<think>\s*(?:</think>\s*)?\Z")
MARK_CHARACTERS = range(0x10FF00, 0x10FFFD)
FIX = "set data.chat_template to a template with {% generation %} … {% endgeneration %} around the assistant's text"
PRINT_CALLS = "the template does not print calls; set data.chat_template to one that prints tool_calls, or remove the row"
QUESTION = Chat([{"role": "user", "content": "Is the sky blue?"}])
HISTORY = "earlier turns are context: the chat template writes them without the thought that its prompt for an answer begins"


@dataclass(frozen=True)
class Located:
    """The text of a chat, the spans of the trained turns in it, and what the report says about it."""

    text: str
    spans: list[Span]
    notes: list[str]


class Turns:
    """Locates the assistant's turns of one chat.

    Args:
        chat: the chat, with control text hidden.
        trained: indices of the messages to train.
        render: renders a chat.
        stop: matches the control tokens that may end a turn.
        template: source of the chat template.
    """

    def __init__(self, chat: Chat, trained: list[int], render: Render, stop: re.Pattern[str], template: str):
        self._chat, self._trained, self._render, self._stop, self._template = chat, trained, render, stop, template
        self._notes: list[str] = []

    def located(self) -> Located:
        """Locate the trained turns.

        Raises:
            UserError: a turn cannot be found exactly, a text of it is lost, or its thought is not one thought.
        """
        self._check_thoughts()
        text = self._text(self._chat)
        if self._has_second_thought(text):
            self._set_thoughts_apart()
            text = self._text(self._chat)
        spans = [span for number in self._trained if (span := self._span(number, text)) is not None]
        if not spans:
            what = "no turn can be trained: the chat template writes them otherwise than its prompt for an answer begins"
            raise UserError(what, where="messages", fix="end the chat with the assistant's answer")
        return self._found(text, spans)

    def marked(self, text: str, marks: list[Span]) -> Located:
        """Locate the turns that the template marks with {% generation %}. A span ends with the special token that ends or follows a mark.

        Raises:
            UserError: the marks are not those of the assistant's turns, no special token ends a turn, or a text of it is lost.
        """
        answers = [number for number, _ in self._chat.answers()]
        if len(marks) != len(answers):
            what = f"the chat template marks {len(marks)} turns with {{% generation %}}, but the chat has {len(answers)} assistant turns"
            raise UserError(what, where="messages", fix="mark each assistant turn once")
        self._check_thoughts()
        spans = []
        for number, (start, end) in zip(answers, marks, strict=True):
            if number not in self._trained:
                continue
            prompt = self._prompt(number, text)
            if text.startswith(prompt):
                start = max(start, len(prompt))
            elif THOUGHT_IN_PROMPT.search(prompt):
                return self.located()
            else:  # the marks alone tell where the turn is
                with suppress(UserError):
                    return Turns(self._chat, self._trained, self._render, self._stop, self._template).located()
            inside = [found for found in self._stop.finditer(text, start, end) if not text[found.end() : end].strip()]
            stop = inside[-1].span() if inside else self._next_stop(text, end, number)
            self._check(number, text[start : stop[0]])
            spans.append((start, stop[1]))
        return self._found(text, spans)

    def _found(self, text: str, spans: list[Span]) -> Located:
        self.check_context(text)
        self._note_keys(_squeezed(text))
        return Located(text, spans, list(dict.fromkeys(self._notes)))

    def _next_stop(self, text: str, start: int, number: int) -> Span:
        """Return the span of the first special token after `start`. Raises UserError if other text comes first."""
        found = self._stop.search(text, start)
        if found is None or text[start : found.start()].strip():
            raise _no_stop(number)
        return found.span()

    def _check_thoughts(self) -> None:
        """Check that the thought of each trained turn is one, and closed, if the template writes thoughts: it would add one of its own.

        Raises:
            UserError: a thought is not closed, or stands in a key and in the content.
        """
        if "</think>" not in self._template:
            return
        for number in self._trained:
            message, where = self._chat.messages[number], f"messages[{number}]"
            content = message.get("content") or ""
            if not content.lstrip().startswith("<think>"):
                continue
            if "</think>" not in content:
                what = "the thought is not closed: the content has <think> without </think>"
                raise UserError(what, where=where, fix="remove the row, whose answer seems to be cut off, or close the thought")
            if keys := [key for key in THOUGHT_KEYS if message.get(key)]:
                what = f"the message has a thought in {keys[0]!r}, and one in the content"
                raise UserError(what, where=where, fix="keep one of them")

    def _set_thoughts_apart(self) -> None:
        """Give the thoughts inside contents to the template as `reasoning_content`."""
        self._chat = replace(self._chat, messages=[_with_thought_apart(message) for message in self._chat.messages])

    def _has_second_thought(self, text: str) -> bool:
        """Return whether the template writes a thought of its own before the one in a content, which it does not find there."""
        thoughts = [message["content"] for _, message in self._chat.answers() if split_thought(message.get("content") or "")[0]]
        return any(f"</think>{_squeezed(content)}" in _squeezed(text) for content in thoughts if content.lstrip().startswith("<think>"))

    def asked(self) -> str:
        """Return the prompt that asks for the next answer. Raises UserError if the template leaves out a message or a tool."""
        text = self._render(self._chat, True)
        if self._has_second_thought(text):
            self._set_thoughts_apart()
            text = self._render(self._chat, True)
        self.check_context(text)
        return text

    # The text

    def _text(self, chat: Chat) -> str:
        """Return the rendered chat. Its last answer follows the prompt that asks for it, even where the template writes it otherwise."""
        text, number = self._render(chat, False), len(chat.messages) - 1
        if number not in self._trained or number == 0:
            return text
        prompt = self._render(chat.up_to(number), True)
        if text.startswith(prompt):
            return text
        opened = THOUGHT_IN_PROMPT.search(prompt)
        if opened and chat.messages[number - 1]["role"] == "assistant":
            what = "the chat template writes an assistant's turn otherwise if another one follows it at once"
            fix = "join the two messages into one, put a user's message between them, or remove the row"
            raise UserError(what, where=f"messages[{number}]", fix=fix)
        answer = self._after(prompt[: opened.start()] if opened else prompt, text, chat)
        if answer is None:
            return text
        return prompt + answer if opened is None else prompt + _continued(opened[0], answer, chat.messages[number], number)

    def _after(self, prompt: str, text: str, chat: Chat) -> str | None:
        """Return what follows the prompt for the last answer in the text, or None if the text has no such prompt.

        Args:
            prompt: ends with the header of an answer.
        """
        if text.startswith(prompt):
            return text[len(prompt) :]
        *before, last = chat.messages
        history = self._render(chat.up_to(len(before)), False)
        header = prompt[len(history) :] if prompt.startswith(history) else ""
        other = self._render(replace(chat, messages=[*before, _marked(last, _free_character(chat))]), False)
        place = text.rfind(header, 0, _shared(text, other)) if self._stop.search(header) else -1
        return text[place + len(header) :] if place >= 0 else None

    # Spans

    def _span(self, number: int, text: str) -> Span | None:
        """Return the span of a turn; None if the template writes it, as history, without the thought that its prompt begins."""
        prompt = self._prompt(number, text)
        opened = THOUGHT_IN_PROMPT.search(prompt)
        if not text.startswith(prompt):
            if opened and text.startswith(prompt[: opened.start()]) and number != len(self._chat.messages) - 1:
                self._notes.append(HISTORY)
                return None
            what = "the chat template changes the messages before this turn when the chat continues"
            raise UserError(what, where=f"messages[{number}]", fix=FIX)
        has_calls = "tool_calls" in self._chat.messages[number]
        if not has_calls and self._stop.match(text, len(prompt)) and self._ignores_prompt():
            what = "the chat template changes or omits the assistant's text: it has no generation prompt"
            raise UserError(what, where=f"messages[{number}]", fix=FIX)
        start, (stop, end) = len(prompt), self._stop_of(number, text, len(prompt))
        if end > self._turn_end(number, text):
            raise _no_stop(number)
        self._check(number, text[opened.start() if opened else start : stop])
        return start, end

    def _ignores_prompt(self) -> bool:
        """Return whether the template has no generation prompt, so that the header of the turn would be trained."""
        return self._render(QUESTION, True) == self._render(QUESTION, False)

    def _prompt(self, number: int, text: str) -> str:
        """Return the text up to where a turn begins. Some templates have no prompt without a question before it, such as for a greeting."""
        if any(message["role"] == "user" for message in self._chat.messages[:number]):
            return self._render(self._chat.up_to(number), True)
        prompt = self._render(QUESTION, True).removeprefix(self._render(QUESTION, False))
        opened = THOUGHT_IN_PROMPT.search(prompt)
        header, start = prompt[: opened.start()] if opened else prompt, 0
        for _ in range(sum(message["role"] == "assistant" for message in self._chat.messages[: number + 1])):
            place = text.find(header, start) if self._stop.search(header) else -1
            if place < 0:
                return self._render(self._chat.up_to(number), True)
            start = place + len(header)
        return text[:start] + (opened[0] if opened else "")

    def _stop_of(self, number: int, text: str, start: int) -> Span:
        """Return the span of the control token that ends a turn."""
        mark = _free_character(self._chat)
        marked, chat = _marked(self._chat.messages[number], mark), self._chat
        try:
            rendered = self._text(replace(chat, messages=[*chat.messages[:number], marked, *chat.messages[number + 1 :]]))
        except UserError:  # the template does not accept this text
            rendered = ""
        place = rendered.rfind(mark)
        found = self._stop.search(rendered, place) if place >= 0 else None
        if found and text.endswith(rendered[found.start() :]):
            at = len(text) - len(rendered) + found.start()
            if at >= start:
                return at, at + len(found[0])
        found = self._stop.search(text, start)
        if found is None:
            raise _no_stop(number)
        return found.span()

    def _turn_end(self, number: int, text: str) -> int:
        """Return where the next message begins; where the template does not tell, the end of the text."""
        try:
            turn = self._render(self._chat.up_to(number + 1), False)
        except UserError:  # the template does not accept a chat that ends here
            return len(text)
        return len(turn) if text.startswith(turn) else len(text)

    # Nothing is lost

    def _check(self, number: int, said: str) -> None:
        """Check that a trained turn has all texts of its message, and note those that the template leaves out by design.

        Raises:
            UserError: a text is lost.
        """
        message, is_history = self._chat.messages[number], any(later > number for later, _ in self._chat.answers())
        for key in _lost(message, said):
            where = f"messages[{number}]"
            if key in ("content", "tool_calls"):
                kind = "text" if key == "content" else "calls"
                what = f"the chat template changes or omits the assistant's {kind}, and renders {said!r:.80}"
                prints = key == "content" or "tool_calls" in self._template
                raise UserError(what, where=where, fix=FIX if prints else PRINT_CALLS)
            if not (is_history and self._leaves_out(key)):
                parts = ", where parts of a content of type 'thinking' or 'reasoning' are" if key == "reasoning_content" else ""
                what = f"the chat template changes or omits the assistant's text in {key!r}{parts}, and renders {said!r:.80}"
                rename = f"give the key {key!r} the name 'reasoning_content', " if self._should_be_renamed(key) else ""
                fix = (
                    f"{rename}remove it from the data, write it into 'content', or set data.chat_template to a template that prints {key!r}"
                )
                raise UserError(what, where=where, fix=fix)
            self._notes.append(f"{key} of earlier turns is left out by the chat template")

    def _should_be_renamed(self, key: str) -> bool:
        """Return whether the key is another name of a thought, and the template prints thoughts."""
        return key not in (*SPOKEN_KEYS, "<think>") and "reasoning_content" in self._template

    def _leaves_out(self, key: str) -> bool:
        """Return whether the template knows the key, so that it leaves it out by design."""
        if key == "<think>" or (key in THOUGHT_KEYS and "</think>" in self._template):
            return "</think>" in self._template
        return any(name in self._template for name in (THOUGHT_KEYS if key in THOUGHT_KEYS else (key,)))

    def check_context(self, text: str) -> None:
        """Check that the text has all turns and tools. Raises UserError if something is lost."""
        squeezed = _squeezed(text)
        for number, message in enumerate(self._chat.messages):
            said = texts_of(message) if message["role"] == "assistant" else iter([("content", message.get("content") or "")])
            calls = (("tool_calls", call.get("function", call)["name"]) for call in message.get("tool_calls", []))
            for key in (key for key, text in (*said, *calls) if not _is_in(text, squeezed)):
                if key in ("content", "tool_calls"):
                    what = f"the chat template leaves out {key!r} of this message of the role {message['role']!r}"
                    fix = "give it a role that the template knows, such as system or user, or set data.chat_template"
                    if message["role"] == "assistant":
                        fix = PRINT_CALLS if key == "tool_calls" else "set data.chat_template to a template that prints it"
                    raise UserError(what, where=f"messages[{number}]", fix=fix)
                self._notes.append(f"{key} of earlier turns is left out by the chat template")
        for tool in self._chat.tools or []:
            name = tool.get("function", tool).get("name") if isinstance(tool.get("function", tool), dict) else None
            if isinstance(name, str) and not _is_in(name, squeezed):
                what = f"the chat template does not show the tool {name!r}"
                raise UserError(what, where="tools", fix="set data.chat_template to a template that shows tools, or remove the tools")

    def _note_keys(self, squeezed: str) -> None:
        """Note the keys of messages, and the variables, that the template does not print: by its source, and by the text."""
        for message in self._chat.messages:
            spoken = (*SPOKEN_KEYS, *spoken_keys(message)) if message["role"] == "assistant" else ()
            known = (*LINKS, *spoken, *(("name",) if message["role"] == "tool" else ()))
            for key in message.keys() - set(known):
                is_known = re.search(rf"\b{re.escape(str(key))}\b", self._template)
                if not is_known or not all(_is_in(value, squeezed) for value in strings(message[key])):
                    self._notes.append(f"key {key!r} of messages is not printed by the chat template")
        for name in self._chat.template_kwargs:
            if not re.search(rf"\b{re.escape(name)}\b", self._template):
                self._notes.append(f"the variable {name!r} of the row is not used by the chat template")


def _continued(opened: str, answer: str, message: Message, number: int) -> str:
    """Return an answer as it follows a prompt that has begun the thought.

    Args:
        opened: the end of the prompt, from `<think>`.
        answer: the answer as the template writes it.
    Raises:
        UserError: the prompt also ends the thought, but the message has one.
    """
    thought = thought_of(message)
    if "</think>" in opened:
        if thought.strip():
            what = "the chat template's prompt closes the thought (enable_thinking=false?), but the message has one"
            fix = "remove the thought, or ask for thinking: data.chat_template_kwargs={enable_thinking: true}"
            raise UserError(what, where=f"messages[{number}]", fix=fix)
        return answer
    if answer.startswith(opened):
        return answer.removeprefix(opened)
    rest = answer.lstrip()
    if rest.startswith("<think>"):
        return rest.removeprefix("<think>").lstrip("\n") if opened.endswith("\n") else rest.removeprefix("<think>")
    if "</think>" in answer:
        return answer
    thought = thought.strip("\n")
    return f"{thought if opened.endswith(chr(10)) else chr(10) + thought}\n</think>\n\n" + answer.lstrip("\n")


def _shared(first: str, second: str) -> int:
    """Return the number of characters that two texts begin with alike."""
    differ = (place for place, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    return next(differ, min(len(first), len(second)))


def _no_stop(number: int) -> UserError:
    return UserError("the chat template ends the assistant turn without a control token", where=f"messages[{number}]", fix=FIX)


def _with_thought_apart(message: Message) -> Message:
    """Return the message with the thought of its content as `reasoning_content`."""
    thought, rest = split_thought(message.get("content") or "")
    if message["role"] != "assistant" or not thought or thought_of({**message, "content": ""}):
        return message
    return {**message, "reasoning_content": thought.strip("\n"), "content": rest.lstrip("\n")}


def _free_character(chat: Chat) -> str:
    taken = "".join(strings([chat.messages, chat.tools]))
    return next(character for character in map(chr, MARK_CHARACTERS) if character not in taken)


def _marked(message: Message, mark: str) -> Message:
    """Return the message with the mark in place of its thoughts and text, or of the arguments of its last call, which follow the text."""
    message = {**message, **{key: mark for key in THOUGHT_KEYS if key in message}}
    if not message.get("tool_calls"):
        return {**message, "content": mark}
    *calls, call = message["tool_calls"]
    arguments = {"arguments": {mark: mark}}
    last = {**call, "function": {**call["function"], **arguments}} if "function" in call else {**call, **arguments}
    return {**message, "tool_calls": [*calls, last]}


def _lost(message: Message, said: str) -> Iterator[str]:
    """Yield the keys of a message whose text is not in a rendered turn. Whitespace is ignored, because templates strip it."""
    rest, calls = _squeezed(said), message.get("tool_calls", [])
    whole = _squeezed(message.get("content") or "")
    is_verbatim = whole in rest if calls else rest.endswith(whole)
    if is_verbatim and whole:
        rest = rest.replace(whole, "\n", 1) if calls else rest.removesuffix(whole)
    for key, text in texts_of(message):
        part = _squeezed(text)
        if is_verbatim and key in ("content", "<think>"):
            continue
        if part not in rest or (key == "content" and not calls and not rest.endswith(part)):
            yield key
        elif part and key != "content":
            rest = rest.replace(part, "\n", 1)  # each text must have a place of its own
    for call in calls:
        function = call.get("function", call)
        if not all(_is_in(text, _squeezed(said)) for text in (function["name"], *_leaves(function["arguments"]))):
            yield "tool_calls"


def _leaves(value: Any) -> Iterator[str]:
    """Yield the texts of the arguments of a call, and their other values as JSON."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value


def _is_in(text: str, squeezed: str) -> bool:
    """Return whether a text is in a squeezed text, as it is or as JSON writes it."""
    as_json = (json.dumps(text, ensure_ascii=only_ascii)[1:-1] for only_ascii in (False, True))
    return any(_squeezed(form) in squeezed for form in (text, *as_json))


def _squeezed(text: str) -> str:
    return "".join(text.split())
