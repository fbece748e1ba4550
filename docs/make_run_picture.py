"""Draws docs/pictures/run.svg: a real run on generated problems, as a terminal shows it: python docs/make_run_picture.py"""

import inspect
import io
import os
import pty
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "pictures" / "run.svg"
COLUMNS, ROWS = 112, 34
# What is typed: the demo's problems and its model with random weights, which need a larger learning rate than pretrained ones.
COMMAND = "verl sft data.train_files=train.jsonl data.val_files=test.jsonl model.partial_pretrain=model optim.lr=1e-3 trainer.test_freq=100"
TRAIN_ROWS, TEST_ROWS = 1600, 64
ESCAPE = re.compile(r"\x1b\[([\d;?]*)([A-Za-z])|\x1b\][^\x07]*\x07|([\r\n\b])|([^\x1b\r\n\b])")


class Screen:
    """What a terminal shows, of the few sequences that rich writes.

    Attributes:
        lines: each line's cells, a character with the style before it.
    """

    def __init__(self) -> None:
        self.lines: list[list[tuple[str, str]]] = [[]]
        self.row = self.column = 0
        self.style = ""

    def feed(self, text: str) -> None:
        for match in ESCAPE.finditer(text):
            numbers, letter, control, character = match.groups()
            if letter:
                self.sequence(numbers, letter)
            elif control == "\n":
                self.row += 1
                self.lines += [] if self.row < len(self.lines) else [[]]
            elif control:
                self.column = 0 if control == "\r" else max(0, self.column - 1)
            elif character:
                self.put(character)

    def sequence(self, numbers: str, letter: str) -> None:
        count = int(numbers) if numbers.isdigit() else 1
        if letter == "m":
            self.style = "" if numbers in ("", "0") else f"{self.style}\x1b[{numbers}m"
        elif letter == "A":
            self.row = max(0, self.row - count)
        elif letter == "K":
            line = self.lines[self.row]
            line[:] = [] if numbers == "2" else line[: self.column]

    def put(self, character: str) -> None:
        line = self.lines[self.row]
        line += [(" ", "")] * (self.column + 1 - len(line))
        line[self.column] = (character, self.style)
        self.column += 1

    def text(self) -> list[str]:
        return ["".join(f"{style}{character}\x1b[0m" if style else character for character, style in line) for line in self.lines]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        screen = run(folder)
    shown = (
        [f"\x1b[1;32m$\x1b[0m {line}" for line in folded(COMMAND)[:1]]
        + [f"    {line}" for line in folded(COMMAND)[1:]]
        + tidy(screen.text())
    )
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(svg(shown), encoding="utf-8")


def prepare(folder: Path) -> None:
    """Write the demo's problems and its model with random weights."""
    from verl.demo.problems import write_problems
    from verl.models.tiny import write_tiny_model

    train, _ = write_problems(folder / "train.jsonl", folder / "test.jsonl", TRAIN_ROWS, TEST_ROWS, seed=1)
    write_tiny_model(folder / "model", (f"{problem.question}\n{problem.answer}" for problem in train))


def run(folder: Path) -> Screen:
    """Run the command in a terminal of its own, and return what that terminal shows at the end."""
    inside, outside = pty.openpty()[::-1]
    size = {"COLUMNS": str(COLUMNS), "LINES": str(ROWS), "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    command = [sys.executable, "-m", *shlex.split(COMMAND)]
    with subprocess.Popen(command, cwd=folder, stdin=inside, stdout=inside, stderr=inside, env={**os.environ, **size}) as process:  # noqa: S603
        os.close(inside)
        screen = Screen()
        screen.feed(b"".join(parts_of(outside)).decode("utf-8", "replace"))
    if process.returncode:
        raise SystemExit("\n".join(Text.from_ansi(line).plain for line in screen.text()))
    return screen


def parts_of(terminal: int) -> Iterator[bytes]:
    """Read from a terminal until nobody writes into it any more, which is an error on Linux."""
    with suppress(OSError):
        while part := os.read(terminal, 65536):
            yield part


def folded(command: str) -> list[str]:
    """The command in lines that fit."""
    lines = [""]
    for word in command.split():
        if len(lines[-1]) + len(word) > COLUMNS - 8:
            lines[-1] += " \\"
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines


def tidy(lines: list[str]) -> list[str]:
    """The lines that fit into a picture: the first and the last ones."""
    lines = [line for line in lines if Text.from_ansi(line).plain.strip()]
    if len(lines) <= ROWS:
        return lines
    return [*lines[: ROWS * 2 // 3], "\x1b[2m…\x1b[0m", *lines[-ROWS // 3 :]]


def svg(lines: list[str]) -> str:
    """The lines as a picture of a terminal, which asks no other host for a font."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for line in [*lines, ""]:
        console.print(Text.from_ansi(line), soft_wrap=False, overflow="ellipsis", no_wrap=True)
    template = inspect.signature(console.export_svg).parameters["code_format"].default
    template = re.sub(r"@font-face \{\{.*?\}\}\n", "", template, flags=re.DOTALL)
    template = template.replace("Fira Code,", "ui-monospace, Menlo, Consolas,")
    return console.export_svg(title="verl sft", code_format=template, unique_id="run")


if __name__ == "__main__":
    main()
