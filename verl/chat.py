"""`verl chat DIR`: chat with a checkpoint in the terminal, or with two that answer the same questions side by side."""

import contextlib
import difflib
import importlib
import io
import locale
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from verl.config.commands import ChatConfig, optioned
from verl.config.load import load_config
from verl.data.render import Renderer
from verl.durable import replace_text
from verl.errors import UserError, exit_on_user_error, print_error
from verl.models.foreign import ADAPTER_CONFIG, newest_step
from verl.models.kind import GENERATES, check_kind
from verl.models.load import load_tokenizer
from verl.progress import quiet_libraries
from verl.redaction import holds_secret
from verl.rollout import Options, Rollout, Sampling, load_rollout, stream_tokens

HELP = "/help lists the commands, /exit or Ctrl+D ends the chat, Ctrl+C stops an answer"
COMMANDS = """\
/clear             forget the chat (/reset means the same)
/undo              forget the last question and its answer
/retry             answer the last question again
/system TEXT       begin anew with this system prompt; without TEXT, with the chat template's default
/set KEY=VALUE …   change temperature, top_k, top_p, seed or max_new_tokens; without any, show them
/exit              end the chat"""
SETTABLE = ("temperature", "top_k", "top_p", "seed", "max_new_tokens")
HISTORY_LINES = 1000
# The model's text must not control the terminal: all control characters but tab and line feed are removed.
REMOVED_CHARACTERS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])
Write = Callable[[str], object]


def print_now(text: str) -> None:
    print(text, end="", flush=True)


class Chat:
    """A chat and the model that answers in it.

    Attributes:
        config: sampling, system prompt, and the model's path.
    Args:
        rollout: generation engine of the model.
        tokenizer: the model's tokenizer.
        renderer: renderer of the tokenizer.
    """

    def __init__(self, config: ChatConfig, rollout: Rollout, tokenizer: PreTrainedTokenizerBase, renderer: Renderer):
        self.config, self._rollout, self._tokenizer, self._renderer = config, rollout, tokenizer, renderer
        self.reset()

    def reset(self) -> None:
        """Clear the chat, except for the system message."""
        self.messages = [{"role": "system", "content": self.config.system}] if self.config.system else []

    def undo(self) -> str | None:
        """Forget the last question and its answer. Returns the question; None if there is none."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            return None
        question = self.messages[-2]["content"]
        self.messages = self.messages[:-2]
        return question

    def ask(self, text: str, write: Write = print_now) -> bool:
        """Print the answer while it is generated, and add it to the chat. Ctrl+C stops it; the text so far is kept.

        Args:
            write: takes the pieces of the answer.
        Returns:
            False if it was stopped.
        Raises:
            UserError: the chat is too long or cannot be rendered; it is then unchanged.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = self._renderer.prompt(asked)
        positions = self._rollout.positions or sys.maxsize
        if len(prompt) >= positions:
            raise UserError(f"the chat of {len(prompt):,} tokens fills the model's {positions:,} positions", fix="clear it with /clear")
        answer = StreamedAnswer(self._tokenizer, self._rollout.stop_ids, write)
        is_whole = True
        try:
            completion = stream_tokens(self._rollout, prompt, self._sampling(positions - len(prompt)), answer.add)
            write("\n" if completion.finish_reason == "stop" else f" [cut at {len(completion.token_ids):,} tokens]\n")
        except KeyboardInterrupt:
            write(" [stopped]\n")
            is_whole = False
        # A template may reject an empty answer, so a question without an answer is dropped.
        if answer.text.strip():
            self.messages = [*asked, {"role": "assistant", "content": answer.text}]
        return is_whole

    def _sampling(self, room: int) -> Sampling:
        """Return how the next answer is drawn, in so many positions."""
        config = self.config
        seed = random.randrange(2**31) if config.seed is None else config.seed
        return Sampling(min(config.max_new_tokens, room), config.temperature, seed=seed, top_k=config.top_k, top_p=config.top_p)


class StreamedAnswer:
    """Prints an answer token by token; an incomplete character is held back until it is complete."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int], write: Write = print_now):
        self._backend, self._stop_ids, self._stream = tokenizer.backend_tokenizer, stop_ids, DecodeStream(skip_special_tokens=True)
        self._write = write
        self.text = ""

    def add(self, token: int) -> None:
        if token in self._stop_ids:
            return
        new = self._stream.step(self._backend, token) or ""
        self.text += new
        self._write(new.translate(REMOVED_CHARACTERS))


class Talk:
    """A conversation with one model, or with two side by side."""

    def __init__(self, chats: Sequence[Chat]):
        self._chats, self._console = chats, Console()

    def ask(self, text: str) -> None:
        """Answer a question. Raises UserError: a chat is too long or cannot be rendered; all are then unchanged."""
        if len(self._chats) == 1:
            self._chats[0].ask(text)
            return
        before = [chat.messages for chat in self._chats]
        try:
            self._ask_all(text)
        except UserError:
            for chat, messages in zip(self._chats, before, strict=True):
                chat.messages = messages
            raise

    def _ask_all(self, text: str) -> None:
        """Show the answers side by side while they are generated, one after the other; in a pipe, one below the other."""
        answers = ["" for _ in self._chats]
        drawn = Live(console=self._console, transient=True, auto_refresh=False) if self._console.is_terminal else None
        with drawn or contextlib.nullcontext():
            for number, chat in enumerate(self._chats):

                def write(piece: str, number: int = number) -> None:
                    answers[number] += piece
                    if drawn is not None:
                        drawn.update(self._beside([last_lines(one, self._console) for one in answers]), refresh=True)

                if not chat.ask(text, write):
                    break
        if drawn is not None:
            self._console.print(self._beside(answers))
        else:
            for number, (chat, answer) in enumerate(zip(self._chats, answers, strict=True), 1):
                print(f"[{number}] {chat.config.model_path}\n{answer}", end="", flush=True)

    def _beside(self, answers: Sequence[str]) -> Table:
        table = Table(expand=True)
        for chat in self._chats:
            table.add_column(Text(chat.config.model_path), ratio=1, overflow="fold")
        table.add_row(*(Text(answer.rstrip("\n")) for answer in answers))
        return table

    def obey(self, line: str) -> None:
        """Obey a command, such as `/undo`. Raises UserError: there is none of this name, or it has a wrong value."""
        word, _, rest = line.partition(" ")
        alone: dict[str, Callable[[], Any]] = {
            "/clear": self._clear,
            "/reset": self._clear,
            "/undo": self._undo,
            "/retry": self._retry,
            "/help": lambda: print(COMMANDS),
        }
        if word in alone and not rest.strip():
            alone[word]()
        elif word == "/system":
            self._change(system=rest.strip() or None)
            self._clear()
        elif word == "/set":
            self._set(rest.split())
        elif word in alone:
            raise UserError(f"{word} takes no words after it", fix=f"write {word}")
        else:
            near = difflib.get_close_matches(word, [*alone, "/system", "/set", "/exit"], n=1)
            raise UserError(f"there is no command {word}", fix=f"did you mean {near[0]}? {HELP}" if near else HELP)

    def _clear(self) -> None:
        for chat in self._chats:
            chat.reset()

    def _undo(self) -> str | None:
        """Forget the last question, and return it; None if there is none."""
        questions = [chat.undo() for chat in self._chats]
        if not any(questions):
            print("there is nothing to undo")
        return next(filter(None, questions), None)

    def _retry(self) -> None:
        if question := self._undo():
            self.ask(question)

    def _change(self, **values: Any) -> None:
        for chat in self._chats:
            chat.config = replace(chat.config, **values)

    def _set(self, words: list[str]) -> None:
        """Change how answers are drawn, and show it. Raises UserError: a key is none of SETTABLE, or a value is wrong."""
        for word in words:
            if word.partition("=")[0] not in SETTABLE or "=" not in word:
                raise UserError(f"cannot set {word!r}", fix=f"/set KEY=VALUE, of {', '.join(SETTABLE)}")
        values = {name: getattr(self._chats[0].config, name) for name in SETTABLE}
        kept = [f"{name}={'null' if value is None else value}" for name, value in values.items()]
        changed = load_config(ChatConfig, ["model_path=any", *kept, *words])
        self._change(**{name: getattr(changed, name) for name in SETTABLE})
        print(" ".join(f"{name}={'null' if (value := getattr(changed, name)) is None else value}" for name in SETTABLE))


def last_lines(text: str, console: Console) -> str:
    """Return the end of a text that fits into a column, even of wide characters: what is drawn anew must not scroll."""
    width = max(1, (console.width // 2 - 4) // 2)
    lines = [line[at : at + width] for line in text.split("\n") for at in range(0, max(1, len(line)), width)]
    most = max(1, console.height - 8)
    return text if len(lines) <= most else "\n".join(lines[-most:])


def talk(chats: Sequence[Chat]) -> None:
    """Read questions and commands until /exit or the end of the input."""
    conversation = Talk(chats)
    is_typed = sys.stdin.isatty()
    while True:
        try:
            print(end="\n" if is_typed else "", flush=True)  # not in the prompt, whose columns the line editor counts
            text = input("> " if is_typed else "").strip()
        except EOFError:
            print(end="\n" if is_typed else "")
            return
        except KeyboardInterrupt:
            print(f"\n{HELP}")
            continue
        if text == "/exit":
            return
        try:
            if text.startswith("/"):
                conversation.obey(text)
            elif text:
                conversation.ask(text)
        except UserError as error:
            print_error(error)


def open_chat(config: ChatConfig) -> Chat:
    """Load the checkpoint. Raises UserError if it is invalid."""
    path = newest_in(config.model_path)
    check_kind(path, GENERATES)
    tokenizer = load_tokenizer(path, trust_remote_code=config.trust_remote_code)
    renderer = Renderer(tokenizer)
    options = Options(
        max_sequences=1,
        url=config.rollout.url,
        gpu_memory_utilization=config.rollout.gpu_memory_utilization / (1 if config.compare is None else 2),
        trust_remote_code=config.trust_remote_code,
        speculate=config.rollout.speculate,
    )
    rollout = load_rollout(config.rollout.name, path, tokenizer, renderer.stop_ids, options)
    if sys.stdin.isatty():
        print(f"{path} on {rollout.describe()}; {HELP}")
    return Chat(replace(config, model_path=path), rollout, tokenizer, renderer)


def newest_in(path: str) -> str:
    """Return the newest checkpoint of a run's directory; any other path as it is."""
    folder = Path(path).expanduser()
    has_model = any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG))
    newest = newest_step(folder) if folder.is_dir() and not has_model else None
    return path if newest is None else str(newest)


def prepare_terminal() -> None:
    """Make the line editor edit characters, not bytes, and show undecodable bytes and unencodable characters as `?`."""
    with contextlib.suppress(locale.Error):
        locale.setlocale(locale.LC_CTYPE, "")
        if locale.nl_langinfo(locale.CODESET).upper() != "UTF-8":  # LC_ALL=C, as in containers: it would edit bytes
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
            os.environ["LC_ALL"] = "C.UTF-8"  # Python asks the environment again for each line
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextlib.contextmanager
def history(is_kept: bool) -> Iterator[None]:
    """Read the lines of earlier chats for the arrow keys, and at the end write those of this one, except for secrets."""
    try:
        readline: Any = importlib.import_module("readline")
    except ImportError:
        is_kept = False
    if not is_kept or not sys.stdin.isatty():
        yield
        return
    file = history_file()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in file.read_text(encoding="utf-8").splitlines()[-HISTORY_LINES:]:
            readline.add_history(line)
    try:
        yield
    finally:
        lines = [str(readline.get_history_item(number)) for number in range(1, readline.get_current_history_length() + 1)]
        kept = [line for line in lines if not holds_secret(line)][-HISTORY_LINES:]
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_text(file, "".join(f"{line}\n" for line in kept), private=True)
        except (OSError, UnicodeEncodeError) as error:
            print(f"the typed lines were not kept in {file}: {error}", file=sys.stderr)


def history_file() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "verl" / "chat_history"


def main(argv: list[str]) -> None:
    """Run the command: `DIR --compare DIR2 key=value …`, or `model_path=DIR compare=DIR2 key=value …`."""
    words = optioned(argv, {"--compare": "compare"})
    if words and not words[0].startswith("-") and "=" not in words[0]:
        words = [f"model_path={words[0]}", *words[1:]]
    config = load_config(ChatConfig, words)
    prepare_terminal()
    try:
        with quiet_libraries(), history(config.history):
            paths = [config.model_path] if config.compare is None else [config.model_path, config.compare]
            talk([open_chat(replace(config, model_path=path)) for path in paths])
    except KeyboardInterrupt:  # while the model was loading
        raise SystemExit(130) from None


if __name__ == "__main__":
    exit_on_user_error(main, sys.argv[1:])
