"""The picture of a run: what a terminal shows, drawn without anything of another host."""

import io
import re

import pytest
from pages import script
from rich.console import Console
from rich.live import Live
from rich.text import Text

make_run_picture = script("make_run_picture")


def shown(written: str) -> list[str]:
    screen = make_run_picture.Screen()
    screen.feed(written)
    return [Text.from_ansi(line).plain.rstrip() for line in screen.text()]


def test_what_is_drawn_again_and_again_is_shown_as_it_was_last() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=40, color_system="truecolor")
    with Live(Text("step 1\nloss 7"), console=console, auto_refresh=False) as live:
        console.print("[green]saved[/]")
        live.update(Text("step 2\nloss 3.5"), refresh=True)
    written = console.file.getvalue().replace("\n", "\r\n")  # type: ignore[attr-defined]  # as a terminal gets it
    assert shown(written)[:3] == ["saved", "step 2", "loss 3.5"]


@pytest.mark.parametrize(
    ("written", "lines"),
    [
        ("ab\rc", ["cb"]),
        ("ab\r\nc", ["ab", "c"]),
        ("a\r\nb\x1b[1A\x1b[2Kc", [" c", "b"]),
        ("abc\b\b\x1b[Kd", ["ad"]),
        ("\x1b[31mab\x1b[0m", ["ab"]),
    ],
)
def test_a_sequence_does_what_a_terminal_does(written: str, lines: list[str]) -> None:
    assert shown(written) == lines


def test_a_command_is_folded_into_lines_that_fit() -> None:
    folded = make_run_picture.folded(make_run_picture.COMMAND)
    assert max(map(len, folded)) < make_run_picture.COLUMNS - 4
    assert " ".join(line.removesuffix(" \\") for line in folded) == make_run_picture.COMMAND


@pytest.mark.parametrize("drawn", ["new", "committed"])
def test_a_picture_asks_no_other_host(drawn: str) -> None:
    picture = (
        make_run_picture.svg(["\x1b[32msaved\x1b[0m a & b"]) if drawn == "new" else make_run_picture.PICTURE.read_text(encoding="utf-8")
    )
    assert re.findall(r"https?://[\w./-]+", picture.replace("http://www.w3.org/2000/svg", "")) in ([], ["https://www.textualize.io"])
    assert "saved" in picture and "@font-face" not in picture
