"""Text generation from Python: a checkpoint answers questions given as text or chats."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from verl.config.commands import check_sampling
from verl.data.render import Renderer
from verl.errors import UserError
from verl.models.format_check import check_format
from verl.models.kind import GENERATES, check_kind
from verl.models.load import load_tokenizer
from verl.models.prompt_format import system_of
from verl.progress import quiet_libraries
from verl.rollout import Completion, Options, Rollout, Sampling, load_rollout
from verl.run_directory import checkpoint_in, is_run_directory

Message = Mapping[str, Any]  # {"role": …, "content": …}


@dataclass(frozen=True)
class Answer:
    """One answer. `str(answer)` is its text.

    Attributes:
        text: the generated text, without the stop token.
        finish_reason: "stop", or "length" if the answer was cut at max_new_tokens or at the end of the model's context.
        token_ids: the generated tokens, including the stop token.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    token_ids: list[int]

    def __str__(self) -> str:
        return self.text


class TextRollout:
    """A checkpoint loaded for generation. Use it in a `with` statement, or call `close`, to free its memory.

    Attributes:
        rollout: the generation engine, for token ids and log-probabilities (`verl.rollout`).
        tokenizer: the checkpoint's tokenizer.
    """

    def __init__(self, path: str, rollout: Rollout, tokenizer: PreTrainedTokenizerBase, renderer: Renderer):
        self.rollout, self.tokenizer = rollout, tokenizer
        self._path, self._renderer = path, renderer

    def generate(
        self,
        prompts: "str | Sequence[str | Sequence[Message]] | Sequence[Message]",
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        n: int = 1,
        seed: int = 1,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> list[Answer]:
        """Answer questions, each rendered with the checkpoint's chat template.

        Args:
            prompts: one or several questions. Each is a text, or a chat: a list of {"role": …, "content": …} that ends with a user turn.
            max_new_tokens: maximum tokens per answer; the model's context length may reduce it.
            temperature: sampling temperature; 0 is greedy decoding.
            n: answers per question.
            seed, top_k, top_p: sampling settings, see `verl.rollout.Sampling`.
        Returns:
            the answers in the order of the questions; the `n` answers to a question are consecutive.
        Raises:
            UserError: an argument is invalid; the chat template rejects a chat; a chat is longer than the model's context; or the
                checkpoint was trained with another system prompt.
        """
        check_sampling(max_new_tokens, temperature, n, top_k, top_p)
        chats = [_chat(prompt) for prompt in _several(prompts)]
        if not chats:
            return []
        key = "the chat's system message"
        check_format(self._path, self.tokenizer, self._renderer.stop_ids, [system_of(chat) for chat in chats], key=key)
        tokens = [self._renderer.prompt(chat) for chat in chats]
        sampling = Sampling(self._longest_answer(tokens, max_new_tokens), temperature, n, seed, top_k, top_p, logprobs=False)
        with quiet_libraries():
            return [self._answer(completion) for completion in self.rollout.generate(tokens, sampling)]

    def close(self) -> None:
        """Free the model's memory. The object cannot generate afterwards."""
        self.rollout.close()

    def __enter__(self) -> "TextRollout":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _longest_answer(self, prompts: list[list[int]], wanted: int) -> int:
        """Return `wanted`, or fewer tokens if the longest prompt leaves fewer positions. Raises UserError if it leaves none."""
        positions, longest = self.rollout.positions, max(map(len, prompts))
        if positions is not None and longest >= positions:
            what = f"the prompt's {longest:,} tokens do not fit into the model's {positions:,} positions"
            raise UserError(what, where=self._path, fix="shorten the question")
        return wanted if positions is None else min(wanted, positions - longest)

    def _answer(self, completion: Completion) -> Answer:
        return Answer(completion.text(self.tokenizer), completion.finish_reason, completion.token_ids)


def open_rollout(path: str, name: str, options: Options) -> TextRollout:
    """Load a checkpoint with its tokenizer and chat template.

    Raises:
        UserError: no such engine, or it cannot load the checkpoint.
    """
    path = checkpoint_in(path, "path") if is_run_directory(path) else path
    check_kind(path, GENERATES)
    check_options(options)
    with quiet_libraries():
        tokenizer = load_tokenizer(path, trust_remote_code=options.trust_remote_code)
        renderer = Renderer(tokenizer)
        return TextRollout(path, load_rollout(name, path, tokenizer, renderer.stop_ids, options), tokenizer, renderer)


def check_options(options: Options) -> None:
    """Raise UserError that names an option with a wrong value."""
    for key in ("max_sequences", "max_positions"):
        value = getattr(options, key)
        if value is not None and not (type(value) is int and value >= 1):
            raise UserError(f"found {value!r}", where=key, fix="give a whole number of at least 1, or None")
    for key, kinds in (("compile", (bool, type(None))), ("trust_remote_code", (bool,))):
        if not isinstance(getattr(options, key), kinds):
            raise UserError(f"found {getattr(options, key)!r}", where=key, fix="give True or False")
    if options.speculate not in ("auto", "never"):
        raise UserError(f"found {options.speculate!r}", where="speculate", fix="give auto or never")
    share = options.gpu_memory_utilization
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 < share <= 1.0:
        raise UserError(f"found {share!r}", where="gpu_memory_utilization", fix="give a number above 0, up to 1")
    if options.url is not None and not (isinstance(options.url, str) and options.url.startswith(("http://", "https://"))):
        raise UserError(f"found {options.url!r}", where="url", fix="give the address of a server, such as http://localhost:8000")
    if options.weights_folder is not None and not isinstance(options.weights_folder, str):
        raise UserError(f"found {options.weights_folder!r}", where="weights_folder", fix="give the path of a folder, or None")


def _several(prompts: object) -> Sequence[object]:
    """Return a list of questions; a single question (a text, or a chat, which is a list of messages) becomes a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise UserError(
            f"found {type(prompts).__name__}, expected a question or a list of questions", where="prompts", fix="give a text or a list"
        )
    return [prompts] if prompts and isinstance(prompts[0], Mapping) else prompts


def _chat(prompt: object) -> list[dict[str, Any]]:
    """Return a question as a chat. Raises UserError if it is neither a text nor a chat."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if isinstance(prompt, Sequence) and all(isinstance(message, Mapping) for message in prompt):
        return [dict(message) for message in prompt]
    raise UserError(f"found {prompt!r:.80}", where="prompts", fix='give each question as text, or as [{"role": …, "content": …}, …]')
