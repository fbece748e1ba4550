"""Chats to token ids and loss masks, with the tokenizer's own chat template.

The trained span of an assistant's turn begins where its generation prompt ends, and ends with the control token that ends the turn. If the
span cannot be found exactly in the rendered text, the chat is refused. The text is cut at the span's ends before it is tokenized, so that
the tokens are the same as in inference, where prompt and answer are never tokenized as one text. Plain chats are handled here; `turns`
handles chats with thoughts, tools or marks, and templates that change earlier turns.
"""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import transformers
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from verl.data.chat import PLAIN_KEYS, Chat, ChatInput, Message, RenderedText, checked
from verl.data.encode import ControlText, Disguise, Encoder, strings
from verl.data.row import first_line
from verl.errors import UserError

if TYPE_CHECKING:
    from verl.data.turns import Turns

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
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
        notes: what the report says about the document.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    has_control_text: bool = False
    notes: tuple[str, ...] = ()

    def without_first(self, context: int) -> "Rendered":
        """Return a copy with the first `context` tokens untrained."""
        return replace(self, loss_mask=[False] * context + self.loss_mask[context:])


@dataclass(frozen=True)
class _Text:
    """A rendered chat before tokenization: its text, the trained spans, the hidden control text, and notes for the report."""

    text: str
    trained: list[Span]
    disguise: Disguise | None
    notes: tuple[str, ...] = ()

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
        self.encoder = Encoder(tokenizer, "\n".join(templates.values()) if isinstance(templates, dict) else templates or "")

    def chat(self, messages: object, tools: object = None) -> Rendered:
        """Render one chat, with the assistant's turns trained.

        Args:
            messages, tools: as for `verl.data.chat.checked`.
        Raises:
            UserError: the chat is invalid, or its trained tokens cannot be found exactly.
        """
        (rendered,) = self.chats([ChatInput(messages, tools)])
        if isinstance(rendered, UserError):
            raise rendered
        return rendered

    def chats(self, chats: Sequence[ChatInput]) -> list[Rendered | UserError]:
        """Render many chats at once, which is much faster.

        Returns:
            one result per chat, or the error of a chat that is refused.
        Raises:
            UserError: the chat template cannot be used for any chat.
        """
        if chats:
            self._check_template()
        texts = [or_error(self._text_of, chat) for chat in chats]
        if not self.encoder.cuts:
            return [text if isinstance(text, UserError) else or_error(self._encode_whole, text) for text in texts]
        rendered = iter(self._encode_in_pieces([text for text in texts if not isinstance(text, UserError)]))
        return [text if isinstance(text, UserError) else next(rendered) for text in texts]

    def prompt(self, messages: object, tools: object = None, template_kwargs: object = None, *, is_data: bool = True) -> list[int]:
        """Return the tokens of a chat with its generation prompt. Raises UserError like `chat`.

        Args:
            is_data: whether the contents are data, to which a chat template must not be applied; else they may say anything.
        """
        chat, disguise = self._disguised(checked(messages, tools, template_kwargs))
        if is_data:
            self._check_contents(chat, disguise)
        text = self._render(chat, for_answer=True)
        if not self._shows_plainly(chat, text) or any("</think>" in message["content"] for message in chat.messages):
            text = self._turns(chat, []).asked()
        return self._encode_one(text, disguise)

    def whole(self, messages: list[Message]) -> list[int]:
        """Return the tokens of a whole chat, without checks on the assistant's text: the input of a reward model.

        Raises:
            UserError: the chat template rejects the chat.
        """
        chat, disguise = self._disguised(Chat(messages))
        return self._encode_one(self._render(chat), disguise)

    def turn_after(self, *replies: Message, answer: Message = PROBE.messages[1]) -> list[int]:
        """Return the tokens between the end of an answer and the assistant's next turn: the replies and the generation prompt.

        They are rendered after a fixed question and answer, so that the sampled tokens of the real answer need not be tokenized again.

        Args:
            replies: the messages that follow the answer, such as a tool's result. `answer` is the fixed one.
        Raises:
            UserError: as `chat`, or the template changes earlier messages when the chat continues.
        """
        answered = self._text_of(ChatInput([PROBE.messages[0], answer]))
        chat, disguise = self._disguised(checked([PROBE.messages[0], answer, *replies]))
        text, end = self._render(chat, for_answer=True), answered.trained[-1][1]
        if not text.startswith(answered.text[:end]):
            what = "the chat template changes the messages before a reply when the chat continues"
            raise UserError(what, where="chat template", fix="set data.chat_template to one that only appends")
        return self._encode_one(text[end:], disguise)

    def text(self, text: str) -> Rendered:
        """Tokenize a plain text, trained whole. Control tokens in it are encoded as text, and the end-of-text token is appended.

        Raises:
            UserError: the tokenizer has no end-of-text token, or a chat template has been applied to the text already.
        """
        (rendered,) = self.texts([text])
        if isinstance(rendered, UserError):
            raise rendered
        return rendered

    def texts(self, texts: Sequence[str]) -> list[Rendered | UserError]:
        """Tokenize many texts at once. Control tokens in a RenderedText are tokens.

        Returns:
            one result per text, or the error of a text that is refused.
        Raises:
            UserError: the tokenizer has no end-of-text token.
        """
        controls = [not isinstance(text, RenderedText) and self.encoder.data.is_in(text) for text in texts]
        ordinary = iter(self.encoder.encode([text for text, has_control in zip(texts, controls, strict=True) if not has_control]))
        bodies = [
            self.encoder.encode_plain(text) if has_control else next(ordinary) for text, has_control in zip(texts, controls, strict=True)
        ]
        return [or_error(self._whole_text, *both) for both in zip(texts, bodies, controls, strict=True)]

    def _whole_text(self, text: str, body: list[int], has_control: bool) -> Rendered:
        """Return a text that is trained whole, between the tokens that begin and end a text.

        Raises:
            UserError: a chat template is applied to the text although it is not a RenderedText, or that of another tokenizer.
        """
        begin, end = self._text_begin, [self._text_end]
        if isinstance(text, RenderedText) or _may_be_applied(text):
            from verl.data import applied_templates  # rarely needed

            if not isinstance(text, RenderedText):
                applied_templates.check_text(text, self._special)
            else:
                applied_templates.check_rendered(text, has_tokens=self.encoder.data.is_in(text))
                begin = [] if body[: len(begin)] == begin else begin
                end = [] if applied_templates.ends_with_control(text, self._special) else end
        return Rendered([*begin, *body, *end], [False] * len(begin) + [True] * len([*body, *end]), has_control)

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
        digest.update(self.encoder.state().encode())
        if self._end is not self.encoder.stop:
            digest.update(self._end.pattern.encode())
        return digest.hexdigest()

    def _check_template(self) -> None:
        """Raise one error for an unusable template, not one per row."""
        self._stop  # noqa: B018

    @functools.cached_property
    def _stop(self) -> int:
        """The stop token, found in a chat of one question and its answer."""
        try:
            text = self._text_of(ChatInput(PROBE.messages))
        except UserError as error:
            raise UserError(error.what, where="chat template", fix=error.fix) from None
        ((start, end),) = text.trained
        return self.encoder.encode([text.text[start:end]])[0][-1]

    @functools.cached_property
    def _end(self) -> re.Pattern[str]:
        """Matches what ends a turn (`template_end.pattern_of_end`)."""
        from verl.data.template_end import pattern_of_end  # rows in the cache need none

        return pattern_of_end(self._tokenizer, self.encoder.stop, self.encoder.control)

    @functools.cached_property
    def _reads_parts(self) -> bool:
        """Whether the template prints a content only as a list of parts, as some templates of vision models do."""
        answer = PROBE.messages[1]["content"]

        def shows(*, parts: bool) -> bool:
            text = or_error(self._fill, PROBE, _with_parts(PROBE.messages) if parts else PROBE.messages, {})
            return not isinstance(text, UserError) and answer in text[0][0]

        return not shows(parts=False) and shows(parts=True)

    @functools.cached_property
    def _special(self) -> tuple[str, ...]:
        return tuple(self.encoder.special)

    @functools.cached_property
    def _text_begin(self) -> list[int]:
        bos = self._tokenizer.bos_token_id
        return [bos] if bos is not None and self._tokenizer("a").input_ids[0] == bos else []

    @functools.cached_property
    def _text_end(self) -> int:
        if self._tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end-of-text token", where="eos_token", fix="set one in its tokenizer_config.json")
        return int(self._tokenizer.eos_token_id)

    def _text_of(self, given: ChatInput) -> _Text:
        chat, disguise = self._disguised(checked(given.messages, given.tools, given.template_kwargs))
        trained, notes = chat.trained_turns(given), (*given.notes, *chat.notes)
        self._check_contents(chat, disguise)
        if GENERATION_MARK.search(self._template(chat)):
            found = self._turns(chat, trained).marked(*self._render_marked(chat))
        else:
            text = self._render(chat)
            if (spans := self._plain_spans(chat, text, trained)) is not None:
                return _Text(text, spans, disguise, notes)
            found = self._turns(chat, trained).located()
        return _Text(found.text, found.spans, disguise, (*notes, *found.notes))

    def _check_contents(self, chat: Chat, disguise: Disguise | None) -> None:
        """Raise UserError if a chat template is already applied to a content."""
        contents = [message.get("content") or "" for message in chat.messages]
        if disguise is not None or any(map(_may_be_applied, contents)):
            from verl.data.applied_templates import check_messages  # rarely needed

            shown = [disguise.show(content) if disguise else content for content in contents]
            check_messages([{**message, "content": text} for message, text in zip(chat.messages, shown, strict=True)], self._special)

    def _turns(self, chat: Chat, trained: list[int]) -> "Turns":
        from verl.data.turns import Turns  # most data has only plain chats

        return Turns(chat, trained, lambda chat, for_answer: self._render(chat, for_answer=for_answer), self._end, self._template(chat))

    def _disguised(self, chat: Chat) -> tuple[Chat, Disguise | None]:
        """Return the chat with control text hidden, and the hidden text; None if there is nothing to hide."""
        fields = [(self._control(message, value), value) for message in chat.messages for key, value in message.items() if key != "role"]
        fields += [(self.encoder.data, chat.tools), (self.encoder.data, chat.template_kwargs)]
        if not any(control.touches(text) for control, value in fields for text in strings(value)):
            return chat, None
        disguise, hide = Disguise([chat.messages, chat.tools, chat.template_kwargs]), self.encoder.data.hide_in
        messages = [
            {key: value if key == "role" else self._control(message, value).hide_in(value, disguise) for key, value in message.items()}
            for message in chat.messages
        ]
        shown = replace(chat, messages=messages, tools=hide(chat.tools, disguise), template_kwargs=hide(chat.template_kwargs, disguise))
        return shown, disguise

    def _control(self, message: Message, value: object) -> ControlText:
        """Return the control text to hide in a field: special tokens in the assistant's own text, every control token elsewhere."""
        is_own_text = message["role"] == "assistant" and isinstance(value, str)
        return self.encoder.answers if is_own_text else self.encoder.data

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
        messages = _with_parts(chat.messages) if self._reads_parts else chat.messages
        found = or_error(self._fill, chat, messages, options)
        if isinstance(found, UserError) and any("tool_calls" in message for message in messages):
            from verl.data.messages import with_arguments_as_text  # DeepSeek's templates

            found = or_error(self._fill, chat, with_arguments_as_text(messages), options)
        if isinstance(found, UserError):
            raise found
        return found

    def _fill(self, chat: Chat, messages: list[Message], options: dict[str, bool]) -> Any:
        from verl.data.template_limits import limit  # whoever has the rows in the cache renders none

        template = self._template(chat)
        names: dict[str, Any] = {**self._tokenizer.special_tokens_map, **chat.template_kwargs, **options, "tools": chat.tools}
        try:
            limit()
            return render_jinja_template([messages], chat_template=template, **names)
        except Exception as error:  # a template is a program of the model's author and may raise anything
            what = f"the chat template rejects the chat: {first_line(error)}"
            raise UserError(what, where="messages", fix="correct the chat, or set data.chat_template") from error

    # Trained spans

    def _plain_spans(self, chat: Chat, text: str, trained: list[int]) -> list[Span] | None:
        """Return the span of each turn to train, from the end of its generation prompt to the first special token.

        Special tokens of the data are hidden. The result is None if `Turns` must find the spans.
        """
        if not self._shows_plainly(chat, text) or not any(message["role"] == "user" for message in chat.messages[: trained[0]]):
            return None
        spans = []
        for number in trained:
            prompt = self._render(chat.up_to(number), for_answer=True)
            stop = self._end.search(text, len(prompt)) if text.startswith(prompt) else None
            if stop is None or not _says(text[len(prompt) : stop.start()], chat.messages[number]["content"]):
                return None
            spans.append((len(prompt), stop.end()))
        return spans

    def _shows_plainly(self, chat: Chat, text: str) -> bool:
        """Return whether the chat is plain, and the rendered text has what the others say."""
        return (
            chat.tools is None
            and not chat.template_kwargs
            and all(
                message.keys() == PLAIN_KEYS and (message["role"] == "assistant" or message["content"].strip() in text)
                for message in chat.messages
            )
        )

    # Encoding

    def _encode_in_pieces(self, texts: list[_Text]) -> list[Rendered]:
        """Cut each text at the ends of its trained spans, and encode the pieces of all texts in one call."""
        ordinary = iter(self.encoder.encode([piece for text in texts if not text.disguise for piece, _ in text.pieces()]))
        rendered = []
        for text in texts:
            ids: list[int] = []
            mask: list[bool] = []
            for piece, trained in text.pieces():
                tokens = self._encode_one(piece, text.disguise) if text.disguise else next(ordinary)
                ids += tokens
                mask += [trained] * len(tokens)
            rendered.append(Rendered(ids, mask, self.encoder.is_control_in(text.disguise), text.notes))
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
        return Rendered(ids, mask, self.encoder.is_control_in(text.disguise), text.notes)

    def _encode_one(self, text: str, disguise: Disguise | None) -> list[int]:
        return self.encoder.encode_disguised(text, disguise) if disguise else self.encoder.encode([text])[0]


def or_error(function: Callable[..., Result], *args: object) -> Result | UserError:
    try:
        return function(*args)
    except UserError as error:
        return error


def _with_parts(messages: list[Message]) -> list[Message]:
    """Return the messages with each content as a list of one part."""
    return [{**message, "content": [{"type": "text", "text": message.get("content") or ""}]} for message in messages]


def _may_be_applied(text: str) -> bool:
    """Return whether a text begins or ends with a bracket, as one does to which a chat template is applied."""
    return text.lstrip()[:1] in ("<", "[") or text.rstrip()[-1:] in (">", "]")


def _says(said: str, content: str) -> bool:
    """Return whether a rendered turn ends with the message's text, and has no thought besides. Whitespace is ignored."""
    if "</think>" not in content and content.lstrip().startswith("<think>"):
        return False  # perhaps a thought that is not closed
    if "</think>" in content and said.count("</think>") != content.count("</think>"):
        return False
    return "".join(said.split()).endswith("".join(content.split()))
