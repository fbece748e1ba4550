"""Chats to token ids and loss masks, with the tokenizer's own chat template.

The trained span of an assistant's turn begins where its generation prompt ends, and ends with the control token that ends the turn. If the
span cannot be found exactly in the rendered text, the chat is refused. The text is cut at the span's ends before it is tokenized, so that
the tokens are the same as in inference, where prompt and answer are never tokenized as one text.
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
from verl.data.row import first_line
from verl.errors import UserError

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
MARK_THE_TURN = "set data.chat_template to a template with {% generation %} … {% endgeneration %} around the assistant's text"
PROBE = Chat([{"role": "user", "content": "Is the sky blue?"}, {"role": "assistant", "content": "Yes, it is."}])

Result = TypeVar("Result")
Span = tuple[int, int]  # start and end (exclusive) in a text, in characters


@dataclass(frozen=True)
class Rendered:
    """A tokenized document.

    Attributes:
        input_ids: token ids.
        loss_mask: whether each token is trained, that is, is a target.
        has_control_text: whether the data contained the text of a control token, which was encoded as plain text.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    has_control_text: bool = False

    def without_turns(self, number: int) -> "Rendered":
        """Return a copy with the first `number` turns as context. A turn is an unbroken run of trained tokens."""
        ends = [
            here
            for here, (is_trained, goes_on) in enumerate(zip(self.loss_mask, [*self.loss_mask[1:], False], strict=True), 1)
            if is_trained and not goes_on
        ]
        return self.without_first(ends[number - 1])

    def without_first(self, context: int) -> "Rendered":
        """Return a copy with the first `context` tokens untrained."""
        return Rendered(self.input_ids, [False] * context + self.loss_mask[context:], self.has_control_text)


@dataclass(frozen=True)
class _Text:
    """A rendered chat before tokenization: its text, the trained spans, and the hidden control text."""

    text: str
    trained: list[Span]
    disguise: Disguise | None

    def pieces(self) -> Iterator[tuple[str, bool]]:
        """Yield the text in pieces, alternately outside and inside the trained spans, with whether each is trained."""
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
        """Render one chat, with the assistant's turns trained.

        Args:
            messages: a list of {role, content}, or its JSON; the roles are system, user, assistant and tool.
            tools: None, a list of JSON schemas, or its JSON.
        Raises:
            UserError: the chat is invalid, or its trained tokens cannot be found exactly.
        """
        (rendered,) = self.chats([(messages, tools)])
        if isinstance(rendered, UserError):
            raise rendered
        return rendered

    def chats(self, chats: Sequence[tuple[object, object]]) -> list[Rendered | UserError]:
        """Render many chats at once, which is much faster.

        Args:
            chats: messages and tools of each chat, as for `chat`.
        Returns:
            one result per chat, or the error of a chat that is refused.
        Raises:
            UserError: the chat template cannot be used for any chat.
        """
        if chats:
            self._check_template()
        texts = [or_error(self._text_of, messages, tools) for messages, tools in chats]
        if not self._encoder.cuts:
            return [text if isinstance(text, UserError) else or_error(self._encode_whole, text) for text in texts]
        rendered = iter(self._encode_in_pieces([text for text in texts if not isinstance(text, UserError)]))
        return [text if isinstance(text, UserError) else next(rendered) for text in texts]

    def prompt(self, messages: object, tools: object = None) -> list[int]:
        """Return the tokens of a chat with its generation prompt. Raises UserError like `chat`."""
        chat, disguise = self._disguised(checked(messages, tools))
        return self._encode_one(self._render(chat, for_answer=True), disguise)

    def whole(self, messages: list[Message]) -> list[int]:
        """Return the tokens of a whole chat, without checks on the assistant's text: the input of a reward model.

        Raises:
            UserError: the chat template rejects the chat.
        """
        chat, disguise = self._disguised(Chat(messages))
        return self._encode_one(self._render(chat), disguise)

    def turn_after(self, reply: Message) -> list[int]:
        """Return the tokens between the end of an answer and the assistant's next turn: the reply and the generation prompt.

        They are rendered after a fixed question and answer, so that the sampled tokens of the real answer need not be tokenized again.

        Args:
            reply: the message that follows the answer, such as a tool's result.
        Raises:
            UserError: as `chat`, or the template changes earlier messages when the chat continues.
        """
        answered = self._text_of(PROBE.messages, None)
        chat, disguise = self._disguised(checked([*PROBE.messages, reply]))
        text, end = self._render(chat, for_answer=True), answered.trained[-1][1]
        if not text.startswith(answered.text[:end]):
            what = "the chat template changes the messages before a reply when the chat continues"
            raise UserError(what, where="chat template", fix="set data.chat_template to one that only appends")
        return self._encode_one(text[end:], disguise)

    def text(self, text: str) -> Rendered:
        """Tokenize a plain text, trained whole. Control tokens in it are encoded as text, and the end-of-text token is appended.

        Raises:
            UserError: the tokenizer has no end-of-text token.
        """
        (rendered,) = self.texts([text])
        return rendered

    def texts(self, texts: Sequence[str]) -> list[Rendered]:
        """Tokenize many texts at once. Raises UserError like `text`."""
        if not texts:
            return []
        begin, end = self._text_begin, self._text_end
        controls = [self._encoder.data.is_in(text) for text in texts]
        ordinary = iter(self._encoder.encode([text for text, has_control in zip(texts, controls, strict=True) if not has_control]))
        bodies = [
            self._encoder.encode_plain(text) if has_control else next(ordinary) for text, has_control in zip(texts, controls, strict=True)
        ]
        return [
            Rendered([*begin, *body, end], [False] * len(begin) + [True] * (len(body) + 1), has_control)
            for body, has_control in zip(bodies, controls, strict=True)
        ]

    @property
    def stop_ids(self) -> list[int]:
        """Ids of the tokens that end an answer without tool calls, such as `<|im_end|>`.

        Raises:
            UserError: the chat template cannot be used.
        """
        return [self._stop]

    def fingerprint(self) -> str:
        """Return a hash that changes when the same data would give different tokens."""
        names = [self._tokenizer.special_tokens_map, self._tokenizer.chat_template, transformers.__version__]
        digest = hashlib.sha256(json.dumps(names, sort_keys=True).encode())
        digest.update(self._encoder.state().encode())
        return digest.hexdigest()

    def _check_template(self) -> None:
        """Raise one error for an unusable template, not one per row."""
        self._stop  # noqa: B018

    @functools.cached_property
    def _stop(self) -> int:
        """The stop token, found in a chat of one question and its answer."""
        try:
            text = self._text_of(PROBE.messages, None)
            prompt = self._render(PROBE.up_to(1), for_answer=True)
        except UserError as error:
            raise UserError(error.what, where="chat template", fix=error.fix) from None
        ((start, end),) = text.trained
        if text.text.startswith(prompt) and start < len(prompt):
            what = "{% generation %} marks a part of the prompt"
            raise UserError(what, where="chat template", fix="begin the mark after the header of the assistant's turn")
        return self._encoder.encode([text.text[start:end]])[0][-1]

    @functools.cached_property
    def _text_begin(self) -> list[int]:
        bos = self._tokenizer.bos_token_id
        return [bos] if bos is not None and self._tokenizer("a").input_ids[0] == bos else []

    @functools.cached_property
    def _text_end(self) -> int:
        if self._tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end-of-text token", where="eos_token", fix="set one in its tokenizer_config.json")
        return int(self._tokenizer.eos_token_id)

    def _text_of(self, messages: object, tools: object) -> _Text:
        chat, disguise = self._disguised(checked(messages, tools))
        if not any(chat.answers()):
            raise UserError("the chat has no assistant turn to train", where="messages", fix="add the answer, or remove the row")
        if GENERATION_MARK.search(self._template(chat)):
            text, marks = self._render_marked(chat)
            return _Text(text, self._marked(chat, text, marks), disguise)
        text = self._render(chat)
        return _Text(text, self._prompted(chat, text), disguise)

    def _disguised(self, chat: Chat) -> tuple[Chat, Disguise | None]:
        """Return the chat with control text hidden, and the hidden text; None if there is nothing to hide."""
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
        """Return the control text to hide in a field: special tokens in the assistant's own text, every control token elsewhere."""
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
        """Return the rendered text and the spans that the template marks with {% generation %}."""
        texts, marks = self._run_template(chat, return_assistant_tokens_mask=True)
        return texts[0], marks[0]

    def _run_template(self, chat: Chat, **options: bool) -> Any:
        template = self._template(chat)
        names: dict[str, Any] = {**self._tokenizer.special_tokens_map, **options, "tools": chat.tools}
        try:
            return render_jinja_template([chat.messages], chat_template=template, **names)
        except Exception as error:  # a template is a program of the model's author and may raise anything
            what = f"the chat template rejects the chat: {first_line(error)}"
            raise UserError(what, where="messages", fix="correct the chat, or set data.chat_template") from error

    # Trained spans

    def _prompted(self, chat: Chat, text: str) -> list[Span]:
        """Find each assistant turn, from the end of its generation prompt to the first special token; those of the data are hidden."""
        spans = []
        for number, message in chat.answers():
            prompt = self._render(chat.up_to(number), for_answer=True)
            if not text.startswith(prompt):
                what = "the chat template changes the messages before this turn when the chat continues"
                raise UserError(what, where=f"messages[{number}]", fix=MARK_THE_TURN)
            spans.append(self._turn(number, message, text, len(prompt), len(prompt)))
        return spans

    def _marked(self, chat: Chat, text: str, marks: list[Span]) -> list[Span]:
        """Extend each of the template's marks to the special token that ends or follows it."""
        answers = list(chat.answers())
        if len(marks) != len(answers):
            what = f"the chat template marks {len(marks)} turns with {{% generation %}}, but the chat has {len(answers)} assistant turns"
            raise UserError(what, where="messages", fix="mark each assistant turn once")
        ends = [self._stop_in(text, *mark) for mark in marks]
        return [self._turn(*answer, text, start, end) for answer, (start, _), end in zip(answers, marks, ends, strict=True)]

    def _stop_in(self, text: str, start: int, end: int) -> int:
        """Return the start of a mark's last special token if only whitespace follows it in the mark, else the mark's end."""
        stops = [found.start() for found in self._encoder.stop.finditer(text, start, end) if not text[found.end() : end].strip()]
        return stops[-1] if stops else end

    def _turn(self, number: int, message: Message, text: str, start: int, not_before: int) -> Span:
        """Return the span from `start` to the end of the first special token at or after `not_before`.

        Raises:
            UserError: no special token ends the turn, or the span does not contain the message's text.
        """
        where = f"messages[{number}]"
        stop = self._encoder.stop.search(text, not_before)
        if stop is None:
            raise UserError("the chat template ends the assistant turn without a control token", where=where, fix=MARK_THE_TURN)
        said = text[start : stop.start()]
        if not _contains(said, message):
            what = f"the chat template changes or omits the assistant's text, and renders {said!r:.80}"
            raise UserError(what, where=where, fix=MARK_THE_TURN)
        return start, stop.end()

    # Encoding

    def _encode_in_pieces(self, texts: list[_Text]) -> list[Rendered]:
        """Cut each text at the ends of its trained spans, and encode the pieces of all texts in one call."""
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
        """Encode a whole text, for a tokenizer whose pieces cannot be concatenated.

        Raises:
            UserError: a token spans the boundary of a trained span.
        """
        ids = self._encode_one(text.text, text.disguise)
        mask = [False] * len(ids)
        for start, end in text.trained:
            before, within = (self._encode_one(text.text[:part], text.disguise) for part in (start, end))
            if ids[: len(before)] != before or ids[: len(within)] != within:
                what = "the tokenizer merges the end of the prompt and the beginning of the answer into one token"
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


def _contains(said: str, message: Message) -> bool:
    """Return whether a rendered turn contains the message's text, at its end if there are no tool calls, and the names of its calls.

    Whitespace is ignored, because templates strip it.
    """
    said, content = "".join(said.split()), "".join(message.get("content", "").split())
    names = ["".join(call.get("function", call)["name"].split()) for call in message.get("tool_calls", [])]
    return all(name in said for name in names) and (content in said if names else said.endswith(content))
