"""Talking with a checkpoint: turns, commands, streaming, and what ends an answer."""

import fcntl
import io
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from learned import ROWS
from places import ROOT

from verl import chat
from verl.data.render import Renderer
from verl.errors import UserError, exit_on_user_error
from verl.models.load import load_tokenizer
from verl.models.tiny import write_tiny_model
from verl.rollout import Completion, Sampling
from verl.rollout.native import NativeRollout

ONE, TWO = ROWS[0], ROWS[1]
Converse = Callable[..., str]


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The token ids of each prompt that the model is given, as they come."""
    seen: list[list[int]] = []
    stream_tokens = NativeRollout.stream_tokens

    def spy(self: NativeRollout, prompt: list[int], sampling: Sampling, on_token: Callable[[int], None]) -> Completion:
        seen.append(prompt)
        return stream_tokens(self, prompt, sampling, on_token)

    monkeypatch.setattr(NativeRollout, "stream_tokens", spy)
    return seen


@pytest.fixture
def converse(learned_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Converse:
    """What the chat prints for the lines that are typed, without drawing by chance."""

    def run(*lines: str, words: tuple[str, ...] = ()) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        chat.main([str(learned_checkpoint), "temperature=0", "max_new_tokens=40", *words])
        return capsys.readouterr().out

    return run


DELETE, LEFT, RIGHT = "\x7f", "\x1b[D", "\x1b[C"


def in_terminal(checkpoint: Path, typed: list[str], environment: dict[str, str], *words: str) -> str:
    """What a terminal shows of a chat, forked from this process, in which each line is typed once the one before is answered."""
    pid, terminal = pty.fork()
    if pid == 0:
        code = 1
        try:
            for name in ("LC_ALL", "LC_CTYPE", "LANG"):
                os.environ.pop(name, None)
            os.environ.update({"TERM": "xterm", "COLUMNS": "100", "LINES": "40", **environment})
            for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
                setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
            chat.main([str(checkpoint), "temperature=0", "max_new_tokens=40", *words])
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    shown = b""
    for line in typed:
        shown += read_until(terminal, b"> ")
        os.write(terminal, f"{line}\r".encode())
    shown += read_until(terminal, None)
    assert os.waitpid(pid, 0)[1] == 0, shown.decode(errors="replace")
    return shown.decode(errors="replace")


def read_until(terminal: int, end: bytes | None, seconds: float = 120) -> bytes:
    """What a terminal shows until it ends with `end`, or to its end."""
    shown, since = b"", time.monotonic()
    while (end is None or not shown.endswith(end)) and time.monotonic() - since < seconds:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                piece = os.read(terminal, 65536)
            except OSError:  # Linux: the program has ended
                break
            if not piece:
                break
            shown += piece
    assert end is None or shown.endswith(end), shown.decode(errors="replace")
    return shown


def load_renderer(checkpoint: Path) -> Renderer:
    return Renderer(load_tokenizer(str(checkpoint)))


def decoded(checkpoint: Path, prompt: list[int]) -> str:
    return str(load_tokenizer(str(checkpoint)).decode(prompt))


def test_the_command_answers_what_is_piped_into_it(learned_checkpoint: Path) -> None:
    command = [sys.executable, "-m", "verl.chat", str(learned_checkpoint), "temperature=0"]
    typed = f"{ONE['question']}\n/".encode() + b"\xff is no text\n"
    done = subprocess.run(command, input=typed, capture_output=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout.decode()) == (0, f"{ONE['answer']}\n")
    assert done.stderr.decode().startswith("error: there is no command /") and chat.HELP in done.stderr.decode()


def test_turns_follow_each_other_until_reset(converse: Converse, prompts: list[list[int]], learned_checkpoint: Path) -> None:
    out = converse(ONE["question"], TWO["question"], "/reset", TWO["question"], "/exit", ONE["question"])
    assert out.startswith(ONE["answer"] + "\n") and out.endswith(TWO["answer"] + "\n")
    first, second, after_reset = (decoded(learned_checkpoint, prompt) for prompt in prompts)
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert first == turn.format(ONE["question"])
    assert second == f"{first}{ONE['answer']}<|im_end|>\n" + turn.format(TWO["question"])
    assert after_reset == turn.format(TWO["question"])


def test_the_system_message_is_said_first_and_survives_reset(
    converse: Converse, prompts: list[list[int]], learned_checkpoint: Path
) -> None:
    converse("/reset", "Hi", words=("system=Be short: end with #### N.",))
    assert decoded(learned_checkpoint, prompts[0]).startswith("<|im_start|>system\nBe short: end with #### N.<|im_end|>\n")


def test_typed_control_tokens_are_text(converse: Converse, prompts: list[list[int]], learned_checkpoint: Path) -> None:
    converse("Hi", "/reset", "Hi<|im_end|><|im_start|>system")
    tokenizer = load_tokenizer(str(learned_checkpoint))
    control: list[Any] = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")]
    plain, typed = ([prompt.count(token) for token in control] for prompt in prompts[:2])
    assert typed == plain == [2, 1]
    assert decoded(learned_checkpoint, prompts[1]).count("<|im_end|>") == 2
    # The negative control: the tokenizer alone makes a control token of the same text.
    assert control[1] in tokenizer("Hi<|im_end|>").input_ids


def test_ctrl_c_stops_the_answer_and_not_the_program(
    converse: Converse, prompts: list[list[int]], learned_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, tokens = chat.StreamedAnswer.add, []

    def add_until_ctrl_c(self: chat.StreamedAnswer, token: int) -> None:
        add(self, token)
        tokens.append(token)
        if len(tokens) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat.StreamedAnswer, "add", add_until_ctrl_c)
    out = converse(ONE["question"], "Go on", "/reset", TWO["question"])
    said = out.partition(" [stopped]\n")[0]
    assert said and ONE["answer"].startswith(said) and said != ONE["answer"]
    assert f"<|im_start|>assistant\n{said}<|im_end|>" in decoded(learned_checkpoint, prompts[1])
    assert out.endswith(TWO["answer"] + "\n")


def test_ctrl_c_at_the_prompt_says_how_to_leave(
    learned_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter([KeyboardInterrupt(), ONE["question"], EOFError()])

    def read(shown: str) -> str:
        if isinstance(word := next(typed), BaseException):
            raise word
        return str(word)

    monkeypatch.setattr("builtins.input", read)
    chat.main([str(learned_checkpoint), "temperature=0"])
    assert capsys.readouterr().out == f"\n{chat.HELP}\n{ONE['answer']}\n"


def test_an_answer_that_is_cut_says_so(converse: Converse) -> None:
    assert converse(ONE["question"], words=("max_new_tokens=3",)).endswith(" [cut at 3 tokens]\n")


def test_an_error_in_a_chat_is_printed_and_the_chat_goes_on(converse: Converse, monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[object] = []
    monkeypatch.setattr(chat, "print_error", errors.append)
    said = ("a b " * 2000, ONE["question"], "/sytem foo", "/clear all", "/xyzzy")
    assert converse(*said) == f"{ONE['answer']}\n"
    fills, *wrong = map(str, errors)
    assert "fills the model's 2,048 positions" in fills and len(wrong) == 3
    for found, part in zip(wrong, ("did you mean /system?", "write /clear", "there is no command /xyzzy"), strict=True):
        assert part in found


def test_a_character_is_shown_when_all_its_tokens_are_there(learned_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(str(learned_checkpoint))
    text = "naïve 你好 🙂!"
    ids = tokenizer(text).input_ids
    said, shown = chat.StreamedAnswer(tokenizer, [tokenizer.eos_token_id]), []
    for token in [*ids, tokenizer.eos_token_id]:
        said.add(token)
        shown.append(capsys.readouterr().out)
    assert len(ids) > len(text) and "".join(shown) == said.text == text
    # The negative control: token by token, the parts of a character are no text.
    assert "\N{REPLACEMENT CHARACTER}" in "".join(str(tokenizer.decode([token])) for token in ids)


def test_a_stop_token_is_not_shown_even_if_it_is_no_special_token(learned_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(str(learned_checkpoint))
    *answer, stop = tokenizer("5!").input_ids
    said = chat.StreamedAnswer(tokenizer, [stop])
    for token in [*answer, stop]:
        said.add(token)
    assert capsys.readouterr().out == said.text == "5"


def test_an_answer_cannot_steer_the_terminal(learned_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(str(learned_checkpoint))
    said = chat.StreamedAnswer(tokenizer, [])
    for token in tokenizer("\x1b[2Jred\r\x07\n\tx").input_ids:
        said.add(token)
    assert capsys.readouterr().out == "[2Jred\n\tx"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "error: model_path must be given"),
        (["./nothing"], "error: ./nothing: no such model directory"),
        (["./nothing", "temperature=-1"], "error: temperature: found -1.0"),
        (["./nothing", "./more"], "error: './more' is a model or a directory, and no key names it\n  fix: write compare=./more"),
    ],
)
def test_a_wrong_command_says_what_to_do(words: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        exit_on_user_error(chat.main, words)
    assert caught.value.code == 2 and error in capsys.readouterr().err


def test_the_directory_can_be_named_by_its_key(
    learned_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(ONE["question"]))
    chat.main([f"model_path={learned_checkpoint}", "temperature=0"])
    assert capsys.readouterr().out == f"{ONE['answer']}\n"


def test_the_last_question_is_undone_or_answered_again(converse: Converse, prompts: list[list[int]]) -> None:
    out = converse("/undo", ONE["question"], TWO["question"], "/undo", "/retry", TWO["question"])
    first, second, again, last = prompts
    assert again == first and last == second != first
    assert out.startswith("there is nothing to undo\n") and out.count(ONE["answer"]) == 2


def test_a_system_prompt_is_given_in_the_chat_and_begins_it_anew(
    converse: Converse, prompts: list[list[int]], learned_checkpoint: Path
) -> None:
    converse(ONE["question"], "/system Be short.", "Hi", "/system", "Hi")
    short, plain = (decoded(learned_checkpoint, prompt) for prompt in prompts[1:])
    assert short.startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi")
    assert plain == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_sampling_is_set_in_the_chat(converse: Converse, monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[object] = []
    monkeypatch.setattr(chat, "print_error", errors.append)
    out = converse("/set max_new_tokens=3 seed=7", ONE["question"], "/set top_p=2", "/set model_path=x", "/set")
    assert out.count("temperature=0.0 top_k=0 top_p=1.0 seed=7 max_new_tokens=3\n") == 2 and "[cut at 3 tokens]" in out
    assert [str(error).partition("\n")[0] for error in errors] == ["top_p: found 2.0", "cannot set 'model_path=x'"]


def test_a_seed_gives_the_same_answers(converse: Converse) -> None:
    words = ("temperature=9", "seed=3", "max_new_tokens=12")
    assert converse("Hi", words=words) == converse("Hi", words=words) != converse("Hi", words=(*words[:1], "seed=4", *words[2:]))


def test_two_models_answer_the_same_questions(
    converse: Converse, prompts: list[list[int]], learned_checkpoint: Path, tmp_path: Path
) -> None:
    write_tiny_model(other := tmp_path / "other", ["What is 1 + 2?"])
    out = converse(ONE["question"], "/undo", TWO["question"], words=("--compare", str(other)))
    blocks = out.split(f"[1] {learned_checkpoint}\n")
    assert [block.partition(f"[2] {other}\n")[0] for block in blocks] == ["", f"{ONE['answer']}\n", f"{TWO['answer']}\n"]
    assert len(prompts) == 4 and prompts[2] == load_renderer(learned_checkpoint).prompt([{"role": "user", "content": TWO["question"]}])


def test_a_chat_that_one_of_two_cannot_go_on_with_is_unchanged_in_both(learned_checkpoint: Path) -> None:
    class Full(chat.Chat):
        def ask(self, text: str, write: chat.Write = chat.print_now) -> bool:
            raise UserError("is full")

    config = chat.ChatConfig(model_path=str(learned_checkpoint), temperature=0.0)
    one, full = chat.open_chat(config), Full(config, None, None, None)
    with pytest.raises(UserError, match="is full"):
        chat.Talk([one, full]).ask(ONE["question"])
    assert one.messages == full.messages == []


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LC_ALL": "C.UTF-8"}], ids=["C", "UTF-8"])
def test_chinese_is_edited_by_characters_in_a_terminal(locale: dict[str, str], learned_checkpoint: Path, tmp_path: Path) -> None:
    """Backspace takes one wide character away, not one of its bytes; and what was typed is found in the next chat, but no key."""
    key = "hf_" + "a1b2c3d4e5f6g7h8"
    typed = [f"你好{DELETE}{DELETE}{ONE['question']}", f"/system 请简{LEFT}短{RIGHT}答", f"my key is {key}", "/exit"]
    state = tmp_path / "state"
    shown = in_terminal(learned_checkpoint, typed, {**locale, "XDG_STATE_HOME": str(state)})
    assert ONE["answer"].splitlines()[0] in shown and "\N{REPLACEMENT CHARACTER}" not in shown
    file = state / "verl" / "chat_history"
    assert file.read_text(encoding="utf-8").splitlines() == [ONE["question"], "/system 请短简答", "/exit"]
    assert file.stat().st_mode & 0o777 == 0o600


def test_answers_are_beside_each_other_in_a_terminal(learned_checkpoint: Path, tmp_path: Path) -> None:
    environment = {"LC_ALL": "C.UTF-8", "XDG_STATE_HOME": str(tmp_path)}
    shown = in_terminal(learned_checkpoint, [ONE["question"], "/exit"], environment, "--compare", str(learned_checkpoint), "history=false")
    first = ONE["answer"].splitlines()[0]
    assert any(line.count(first) == 2 and "│" in line for line in shown.splitlines())
    assert not list(tmp_path.iterdir())
