"""A chat to token ids and the mask of the tokens that are trained, by the tokenizer's own chat template.

The trained part of an assistant's turn begins where the prompt for it ends, as rendered for generation, and ends with the control token
that ends the turn. It is found exactly in the rendered text, or the chat is refused. The text is cut there before it is tokenized, so that
the tokens on both sides are those of inference, where prompt and answer are never one text.
"""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import transformers
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from verl.data.chat import Chat, Message, checked
from verl.data.encode import ControlText, Disguise, Encoder, strings
from verl.data.formats import first_line
from verl.errors import UserError

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
MARK_THE_TURN = "set data.chat_template to a template with {% generation %} … {% endgeneration %} around what the assistant writes"
PROBE = Chat([{"role": "user", "content": "Is the sky blue?"}, {"role": "assistant", "content": "Yes, it is."}])

Result = TypeVar("Result")
Span = tuple[int, int]  # first character of a part of a text, and the one behind it


@dataclass(frozen=True)
class Rendered:
    """A document.

    Attributes:
        input_ids: its tokens.
        loss_mask: whether each token itself is trained.
        has_control_text: whether its data held text of a control token, which was encoded as plain text.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    has_control_text: bool = False

    def without_turns(self, number: int) -> "Rendered":
        """The same with the first turns, each an unbroken run of trained tokens, as context."""
        ends = [
            here
            for here, (is_trained, goes_on) in enumerate(zip(self.loss_mask, [*self.loss_mask[1:], False], strict=True), 1)
            if is_trained and not goes_on
        ]
        return self.without_first(ends[number - 1])

    def without_first(self, context: int) -> "Rendered":
        """The same with so many first tokens as context."""
        return Rendered(self.input_ids, [False] * context + self.loss_mask[context:], self.has_control_text)


@dataclass(frozen=True)
class _Text:
    """A rendered chat before it is tokenized: its text, the trained parts of it, and what is hidden in it."""

    text: str
    trained: list[Span]
    disguise: Disguise | None

    def pieces(self) -> Iterator[tuple[str, bool]]:
        """The text between, in and behind the trained parts, each with whether it is trained."""
        done = 0
        for start, end in self.trained:
            yield self.text[done:start], False
            yield self.text[start:end], True
            done = end
        yield self.text[done:], False


class Renderer:
    """Renders chats and texts with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        templates = tokenizer.chat_template
        self._encoder = Encoder(tokenizer, "\n".join(templates.values()) if isinstance(templates, dict) else templates or "")

    def chat(self, messages: object, tools: object = None) -> Rendered:
        """One chat, with the assistant's turns trained.

        Args:
            messages: a list of {role, content}, or its JSON; the roles are system, user, assistant and tool.
            tools: None, a list of JSON schemas, or its JSON.
        Raises:
            UserError: the chat is not right, or its trained tokens cannot be found exactly.
        """
        (rendered,) = self.chats([(messages, tools)])
        if isinstance(rendered, UserError):
            raise rendered
        return rendered

    def chats(self, chats: Sequence[tuple[object, object]]) -> list[Rendered | UserError]:
        """Many chats at once, which is much faster; in the place of a chat that is refused stands its error.

        Args:
            chats: messages and tools of each, as for `chat`.
        Raises:
            UserError: the chat template cannot be used at all.
        """
        if chats:
            self._check_template()
        texts = [or_error(self._text_of, messages, tools) for messages, tools in chats]
        if not self._encoder.cuts:
            return [text if isinstance(text, UserError) else or_error(self._encode_whole, text) for text in texts]
        rendered = iter(self._encode_in_pieces([text for text in texts if not isinstance(text, UserError)]))
        return [text if isinstance(text, UserError) else next(rendered) for text in texts]

    def prompt(self, messages: object, tools: object = None) -> list[int]:
        """The tokens of a chat up to where the assistant begins to write. Raises UserError like `chat`."""
        chat, disguise = self._disguised(checked(messages, tools))
        return self._encode_one(self._render(chat, for_answer=True), disguise)

    def whole(self, messages: list[Message]) -> list[int]:
        """The tokens of a chat as its template writes it, whatever the assistant says in it: what a reward model reads.

        Raises:
            UserError: the chat template does not take it.
        """
        chat, disguise = self._disguised(Chat(messages))
        return self._encode_one(self._render(chat), disguise)

    def turn_after(self, reply: Message) -> list[int]:
        """What follows the token that ends an answer, up to where the assistant begins to write again.

        Taken from a chat of one question and its answer: the answer's own tokens are not asked for, and stay as they were drawn.

        Args:
            reply: what somebody else, such as a tool, says to the answer.
        Raises:
            UserError: as `chat`, or the template writes what stands before a reply otherwise once the chat goes on.
        """
        answered = self._text_of(PROBE.messages, None)
        chat, disguise = self._disguised(checked([*PROBE.messages, reply]))
        text, end = self._render(chat, for_answer=True), answered.trained[-1][1]
        if not text.startswith(answered.text[:end]):
            what = "the chat template writes what stands before a reply otherwise once the chat goes on"
            raise UserError(what, where="chat template", fix="set data.chat_template to one that only appends")
        return self._encode_one(text[end:], disguise)

    def text(self, text: str) -> Rendered:
        """A plain text, trained whole: without control tokens inside, and with the end-of-text token behind it.

        Raises:
            UserError: the tokenizer has no end-of-text token.
        """
        (rendered,) = self.texts([text])
        return rendered

    def texts(self, texts: Sequence[str]) -> list[Rendered]:
        """Many texts at once. Raises UserError like `text`."""
        if not texts:
            return []
        begin, end = self._text_begin, self._text_end
        held = [self._encoder.data.is_in(text) for text in texts]
        ordinary = iter(self._encoder.encode([text for text, is_held in zip(texts, held, strict=True) if not is_held]))
        bodies = [self._encoder.encode_plain(text) if is_held else next(ordinary) for text, is_held in zip(texts, held, strict=True)]
        return [
            Rendered([*begin, *body, end], [False] * len(begin) + [True] * (len(body) + 1), is_held)
            for body, is_held in zip(bodies, held, strict=True)
        ]

    @property
    def stop_ids(self) -> list[int]:
        """The ids of the tokens that end a plain answer, such as that of `<|im_end|>`.

        Raises:
            UserError: the chat template cannot be used.
        """
        return [self._stop]

    def fingerprint(self) -> str:
        """Differs when the same data gives other tokens."""
        names = [self._tokenizer.special_tokens_map, self._tokenizer.chat_template, transformers.__version__]
        digest = hashlib.sha256(json.dumps(names, sort_keys=True).encode())
        digest.update(self._encoder.state().encode())
        return digest.hexdigest()

    def _check_template(self) -> None:
        """So that a template which cannot be used is one error and not one of each row."""
        self._stop  # noqa: B018

    @functools.cached_property
    def _stop(self) -> int:
        """Found in a chat of one question and its answer."""
        try:
            text = self._text_of(PROBE.messages, None)
            prompt = self._render(PROBE.up_to(1), for_answer=True)
        except UserError as error:
            raise UserError(error.what, where="chat template", fix=error.fix) from None
        ((start, end),) = text.trained
        if text.text.startswith(prompt) and start < len(prompt):
            what = "{% generation %} marks what stands in the prompt already"
            raise UserError(what, where="chat template", fix="begin the mark behind the header of the assistant's turn")
        return self._encoder.encode([text.text[start:end]])[0][-1]

    @functools.cached_property
    def _text_begin(self) -> list[int]:
        bos = self._tokenizer.bos_token_id
        return [bos] if bos is not None and self._tokenizer("a").input_ids[0] == bos else []

    @functools.cached_property
    def _text_end(self) -> int:
        if self._tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end-of-text token", where="eos_token", fix="name one in its tokenizer_config.json")
        return int(self._tokenizer.eos_token_id)

    def _text_of(self, messages: object, tools: object) -> _Text:
        chat, disguise = self._disguised(checked(messages, tools))
        if not any(chat.answers()):
            raise UserError("no assistant's turn, so there is nothing to learn", where="messages", fix="add the answer, or remove the row")
        if GENERATION_MARK.search(self._template(chat)):
            text, marks = self._render_marked(chat)
            return _Text(text, self._marked(chat, text, marks), disguise)
        text = self._render(chat)
        return _Text(text, self._prompted(chat, text), disguise)

    def _disguised(self, chat: Chat) -> tuple[Chat, Disguise | None]:
        """The chat with control text hidden, and what is hidden; None if there is nothing to hide."""
        fields = [(self._control(message, value), value) for message in chat.messages for key, value in message.items() if key != "role"]
        fields.append((self._encoder.data, chat.tools))
        if not any(control.touches(text) for control, value in fields for text in strings(value)):
            return chat, None
        disguise = Disguise([chat.messages, chat.tools])
        messages = [
            {key: value if key == "role" else self._control(message, value).hide_in(value, disguise) for key, value in message.items()}
            for message in chat.messages
        ]
        return Chat(messages, self._encoder.data.hide_in(chat.tools, disguise)), disguise

    def _control(self, message: Message, value: object) -> ControlText:
        """What is control text in a field: in the assistant's own text special tokens alone, elsewhere every control token."""
        is_own_text = message["role"] == "assistant" and isinstance(value, str)
        return self._encoder.answers if is_own_text else self._encoder.data

    # Rendering

    def _template(self, chat: Chat) -> str:
        if not self._tokenizer.chat_template:
            fix = "set data.chat_template=path/to/template.jinja, or use an instruct model"
            raise UserError("the tokenizer has no chat template", where="chat template", fix=fix)
        return self._tokenizer.get_chat_template(None, chat.tools)

    def _render(self, chat: Chat, *, for_answer: bool = False) -> str:
        text: str = self._run_template(chat, add_generation_prompt=for_answer)[0][0]
        return text

    def _render_marked(self, chat: Chat) -> tuple[str, list[Span]]:
        """The rendered text, and the parts of it that the template has marked with {% generation %}."""
        texts, marks = self._run_template(chat, return_assistant_tokens_mask=True)
        return texts[0], marks[0]

    def _run_template(self, chat: Chat, **options: bool) -> Any:
        template = self._template(chat)
        names: dict[str, Any] = {**self._tokenizer.special_tokens_map, **options, "tools": chat.tools}
        try:
            return render_jinja_template([chat.messages], chat_template=template, **names)
        except Exception as error:  # a template is a program of the model's author, and fails as it likes
            what = f"the chat template does not take it: {first_line(error)}"
            raise UserError(what, where="messages", fix="mend the chat, or set data.chat_template") from error

    # Finding the trained parts

    def _prompted(self, chat: Chat, text: str) -> list[Span]:
        """Each assistant's turn, from the end of the prompt for it to the first special token; those of the data are hidden."""
        spans = []
        for number, message in chat.answers():
            prompt = self._render(chat.up_to(number), for_answer=True)
            if not text.startswith(prompt):
                what = "the chat template writes what stands before this turn otherwise once the chat goes on"
                raise UserError(what, where=f"messages[{number}]", fix=MARK_THE_TURN)
            spans.append(self._turn(number, message, text, len(prompt), len(prompt)))
        return spans

    def _marked(self, chat: Chat, text: str, marks: list[Span]) -> list[Span]:
        """The template's own marks, each up to the special token that ends it or follows it."""
        answers = list(chat.answers())
        if len(marks) != len(answers):
            what = f"the chat template marks {len(marks)} turns with {{% generation %}}, the chat has {len(answers)} of the assistant"
            raise UserError(what, where="messages", fix="mark each of the assistant's turns once")
        ends = [self._stop_in(text, *mark) for mark in marks]
        return [self._turn(*answer, text, start, end) for answer, (start, _), end in zip(answers, marks, ends, strict=True)]

    def _stop_in(self, text: str, start: int, end: int) -> int:
        """Where a mark's last special token begins, if nothing but space follows it there; else the mark's end."""
        stops = [found.start() for found in self._encoder.stop.finditer(text, start, end) if not text[found.end() : end].strip()]
        return stops[-1] if stops else end

    def _turn(self, number: int, message: Message, text: str, start: int, not_before: int) -> Span:
        """An assistant's turn from `start` to the end of the first special token that does not stand before `not_before`."""
        where = f"messages[{number}]"
        stop = self._encoder.stop.search(text, not_before)
        if stop is None:
            raise UserError("no control token ends the assistant's turn in the chat template", where=where, fix=MARK_THE_TURN)
        said = text[start : stop.start()]
        if not _says(said, message):
            what = f"the chat template changes or leaves out what the assistant writes, and makes {said!r:.80} of it"
            raise UserError(what, where=where, fix=MARK_THE_TURN)
        return start, stop.end()

    # Encoding

    def _encode_in_pieces(self, texts: list[_Text]) -> list[Rendered]:
        """Each text cut where trained parts begin and end; the pieces of all of them are encoded in one call."""
        ordinary = iter(self._encoder.encode([piece for text in texts if not text.disguise for piece, _ in text.pieces()]))
        rendered = []
        for text in texts:
            ids: list[int] = []
            mask: list[bool] = []
            for piece, trained in text.pieces():
                tokens = self._encode_one(piece, text.disguise) if text.disguise else next(ordinary)
                ids += tokens
                mask += [trained] * len(tokens)
            rendered.append(Rendered(ids, mask, self._encoder.is_control_in(text.disguise)))
        return rendered

    def _encode_whole(self, text: _Text) -> Rendered:
        """For a tokenizer whose pieces cannot be put together: the whole text, if its ids begin with those of each prompt in it."""
        ids = self._encode_one(text.text, text.disguise)
        mask = [False] * len(ids)
        for start, end in text.trained:
            before, within = (self._encode_one(text.text[:part], text.disguise) for part in (start, end))
            if ids[: len(before)] != before or ids[: len(within)] != within:
                what = "the tokenizer joins the end of the prompt and the beginning of the answer into one token"
                raise UserError(what, where="messages", fix="let the answer begin with a letter, or remove the row")
            mask[len(before) : len(within)] = [True] * (len(within) - len(before))
        return Rendered(ids, mask, self._encoder.is_control_in(text.disguise))

    def _encode_one(self, text: str, disguise: Disguise | None) -> list[int]:
        return self._encoder.encode_disguised(text, disguise) if disguise else self._encoder.encode([text])[0]


def or_error(function: Callable[..., Result], *args: object) -> Result | UserError:
    try:
        return function(*args)
    except UserError as error:
        return error


def _says(said: str, message: Message) -> bool:
    """Whether a rendered turn holds the message's text, last if there are no calls, and the names of its calls.

    Space is left aside, which templates strip.
    """
    said, content = "".join(said.split()), "".join(message.get("content", "").split())
    names = ["".join(call.get("function", call)["name"].split()) for call in message.get("tool_calls", [])]
    return all(name in said for name in names) and (content in said if names else said.endswith(content))
