"""`verl chat DIR`: chat with a checkpoint in the terminal."""

import contextlib
import importlib
import io
import random
import sys

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from verl.config.commands import ChatConfig
from verl.config.load import load_config
from verl.data.render import Renderer
from verl.errors import UserError, exit_on_user_error, print_error
from verl.models.kind import GENERATES, check_kind
from verl.models.load import load_tokenizer
from verl.progress import quiet_libraries
from verl.rollout import Options, Rollout, Sampling, load_rollout, stream_tokens

HELP = "/reset clears the chat, /exit or Ctrl+D ends it, Ctrl+C stops an answer"
# The model's text must not control the terminal: all control characters but tab and line feed are removed.
REMOVED_CHARACTERS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])


class Chat:
    """A chat and the model that answers in it.

    Args:
        config: temperature, max_new_tokens and system prompt.
        rollout: generation engine of the model.
        tokenizer: the model's tokenizer.
        renderer: renderer of the tokenizer.
    """

    def __init__(self, config: ChatConfig, rollout: Rollout, tokenizer: PreTrainedTokenizerBase, renderer: Renderer):
        self._config, self._rollout, self._tokenizer, self._renderer = config, rollout, tokenizer, renderer
        self.reset()

    def reset(self) -> None:
        """Clear the chat, except for the system message."""
        self.messages = [{"role": "system", "content": self._config.system}] if self._config.system else []

    def ask(self, text: str) -> None:
        """Print the answer while it is generated, and add it to the chat. Ctrl+C stops it; the text so far is kept.

        Raises:
            UserError: the chat is too long or cannot be rendered; it is then unchanged.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = self._renderer.prompt(asked)
        positions = self._rollout.positions or sys.maxsize
        if len(prompt) >= positions:
            raise UserError(f"the chat of {len(prompt):,} tokens fills the model's {positions:,} positions", fix="clear it with /reset")
        answer = StreamedAnswer(self._tokenizer, self._rollout.stop_ids)
        sampling = Sampling(
            min(self._config.max_new_tokens, positions - len(prompt)), self._config.temperature, seed=random.randrange(2**31)
        )
        try:
            completion = stream_tokens(self._rollout, prompt, sampling, answer.add)
            print("" if completion.finish_reason == "stop" else f" [cut at {len(completion.token_ids):,} tokens]", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", flush=True)
        # A template may reject an empty answer, so a question without an answer is dropped.
        if answer.text.strip():
            self.messages = [*asked, {"role": "assistant", "content": answer.text}]


class StreamedAnswer:
    """Prints an answer token by token; an incomplete character is held back until it is complete."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int]):
        self._backend, self._stop_ids, self._stream = tokenizer.backend_tokenizer, stop_ids, DecodeStream(skip_special_tokens=True)
        self.text = ""

    def add(self, token: int) -> None:
        if token in self._stop_ids:
            return
        new = self._stream.step(self._backend, token) or ""
        self.text += new
        print(new.translate(REMOVED_CHARACTERS), end="", flush=True)


def talk(chat: Chat) -> None:
    """Read questions and commands until /exit or the end of the input."""
    shown = "\n> " if sys.stdin.isatty() else ""
    while True:
        try:
            text = input(shown).strip()
        except EOFError:
            print(end="\n" if shown else "")
            return
        except KeyboardInterrupt:
            print(f"\n{HELP}")
            continue
        if text == "/exit":
            return
        if text == "/reset":
            chat.reset()
        elif text.startswith("/"):
            print(HELP)
        elif text:
            try:
                chat.ask(text)
            except UserError as error:
                print_error(error)


def open_chat(config: ChatConfig) -> Chat:
    """Load the checkpoint. Raises UserError if it is invalid."""
    check_kind(config.model_path, GENERATES)
    tokenizer = load_tokenizer(config.model_path, trust_remote_code=config.trust_remote_code)
    renderer = Renderer(tokenizer)
    options = Options(
        max_sequences=1,
        url=config.rollout.url,
        gpu_memory_utilization=config.rollout.gpu_memory_utilization,
        trust_remote_code=config.trust_remote_code,
    )
    rollout = load_rollout(config.rollout.name, config.model_path, tokenizer, renderer.stop_ids, options)
    if sys.stdin.isatty():
        print(f"{config.model_path} on {rollout.describe()}; {HELP}")
    return Chat(config, rollout, tokenizer, renderer)


def prepare_terminal() -> None:
    """Enable arrow keys and history if available, and show undecodable bytes and unencodable characters as `?`."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def main(argv: list[str]) -> None:
    """Run the command: `DIR key=value …`, or `model_path=DIR key=value …`."""
    if argv and not argv[0].startswith("-") and "=" not in argv[0]:
        argv = [f"model_path={argv[0]}", *argv[1:]]
    config = load_config(ChatConfig, argv)
    prepare_terminal()
    try:
        with quiet_libraries():
            talk(open_chat(config))
    except KeyboardInterrupt:  # while the model was loading
        raise SystemExit(130) from None


if __name__ == "__main__":
    exit_on_user_error(main, sys.argv[1:])
