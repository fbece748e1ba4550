"""The panel of a run is drawn where it can be, says what is there, and never ends the run."""

import io
import math
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from runs import run_with

from verl import panel, progress, run_view
from verl.panel import Panel, curve, filled
from verl.run import Run
from verl.run_view import History

STEP = {"train/loss": 2.5, "train/lr": 1e-5, "perf/tokens_per_second": 1234.0}


def terminal(width: int = 100, **options: Any) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=True, force_jupyter=False, width=width, height=20, **options), file


def shown(run: Run, metrics: dict[str, float], width: int = 100) -> str:
    """What the panel of a run shows after three steps."""
    console, _ = terminal(width)
    run._view = view = run_view.RunView(run, console, 0)
    for step in range(1, 4):
        view.log(step, {**STEP, "train/loss": 4.0 - step, **metrics})
    console = Console(file=(file := io.StringIO()), width=width, force_jupyter=False)
    console.print(view._panel._drawn())
    return file.getvalue()


def test_it_has_step_loss_curve_validation_speed_memory_time_and_phase(tmp_path: Path) -> None:
    run = run_with(tmp_path, total_steps=10)
    run.checkpoint = tmp_path / "global_step_2"
    metrics = {"val/loss": 1.5, "perf/mfu": 0.4321, "perf/mfu_of_measured": 0.5512, "perf/peak_memory_gib": 12.34}
    text = shown(run, metrics)
    for part in (
        "verl sft · ",
        "step 3/10",
        "30%",
        "left",
        "train/loss 1.0000 (3.0000 at step 1)",
        "█▅▁",
        "val/loss 1.5 at step 3 (best 1.5 at step 1)",
        "1,234 tokens/s",
        "MFU 55.1% of the measured matrix rate, 43.2% of the data sheet's",
        "12.3 GiB of GPU memory",
        "newest checkpoint global_step_2",
    ):
        assert part in text, (part, text)


def test_it_says_how_much_of_a_step_is_waited(tmp_path: Path) -> None:
    run = run_with(tmp_path, total_steps=10)
    assert "1,234 tokens/s · waits 12% · " in shown(run, {"perf/waiting_share": 0.123})
    assert "waits" not in shown(run, {})


def test_the_best_value_of_the_validation_is_that_of_its_name(tmp_path: Path) -> None:
    run = run_with(tmp_path, total_steps=10)
    console, _ = terminal()
    view = run_view.RunView(run, console, 0)
    for step, (loss, match) in enumerate([(2.0, 0.1), (1.0, 0.6), (1.5, 0.2)], 1):
        view.log(step, {"val/loss": loss, "val/exact_match": match})
    (line,) = view._validation()
    assert line == "val/loss 1.5 at step 3 (best 1 at step 2) · val/exact_match 0.2 at step 3 (best 0.6 at step 2)"


@pytest.mark.parametrize("width", [1, 7, 20, 49, 50, 80, 300])
def test_it_fits_any_width(width: int, tmp_path: Path) -> None:
    run = run_with(tmp_path, total_steps=10)
    text = shown(run, {"val/loss": 1.5}, width)
    assert max(map(len, text.splitlines())) <= width
    assert len(text.splitlines()) <= 8


def test_without_utf8_it_is_ascii(tmp_path: Path) -> None:
    class Plain(io.StringIO):
        encoding = "ascii"

    run = run_with(tmp_path, total_steps=10)
    console = Console(file=Plain(), force_terminal=True, force_jupyter=False, width=100)
    view = run_view.RunView(run, console, 0)
    view.log(1, {**STEP, "val/loss": 1.0})
    view.log(2, {**STEP, "train/loss": 1.0})
    assert "".join(view._lines(90, True)).isascii() and console.options.ascii_only


def test_what_is_waited_for_replaces_what_is_done(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    view = run_view.RunView(run, terminal()[0], 0)
    view.waiting("waiting for a tool, 9 s")
    assert view._state().startswith("waiting for a tool, 9 s")
    view.waiting(None)
    assert "waiting" not in view._state()


def test_a_long_phase_says_for_how_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = run_view.RunView(run_with(tmp_path), terminal()[0], 0)
    clock = iter([100.0, 175.0])
    monkeypatch.setattr(run_view.signals, "place", lambda: ("saving", 4, 0, False))
    monkeypatch.setattr(run_view.signals, "where", lambda: "saving, step 4")
    monkeypatch.setattr(run_view.time, "monotonic", lambda: next(clock))
    assert view._state() == "saving, step 4"
    assert view._state() == "saving, step 4, for 1:15"


def test_a_terminal_without_a_cursor_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    console, _ = terminal()
    assert Panel(lambda width, ascii_only: ["x"], "title", console).is_drawn
    monkeypatch.setenv("TERM", "dumb")
    assert not Panel(lambda width, ascii_only: ["x"], "title", terminal()[0]).is_drawn
    assert not Panel(lambda width, ascii_only: ["x"], "title", Console(file=io.StringIO())).is_drawn


def test_no_color_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console, file = terminal()
    drawn = Panel(lambda width, ascii_only: ["a line"], "title", console)
    drawn.start()
    drawn.stop()
    assert "a line" in file.getvalue() and "\x1b[3" not in file.getvalue()


class Gone(io.StringIO):
    """A terminal that somebody has closed."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


def test_a_terminal_that_is_gone_ends_the_drawing_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panel, "SECONDS_BETWEEN_DRAWINGS", 0.01)
    console, file = terminal()
    drawn = Panel(lambda width, ascii_only: ["a line"], "title", console)
    drawn.start()
    time.sleep(0.1)
    console.file = Gone()
    time.sleep(0.1)
    assert not drawn.is_drawn and "a line" in file.getvalue()
    drawn.stop()
    gone = Panel(lambda width, ascii_only: ["a line"], "title", Console(file=Gone(), force_terminal=True, force_jupyter=False))
    gone.start()
    gone.changed()
    gone.stop()
    assert not gone.is_drawn


def test_an_error_in_what_is_shown_ends_the_drawing_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panel, "SECONDS_BETWEEN_DRAWINGS", 0.01)
    calls: list[int] = []

    def lines(width: int, ascii_only: bool) -> list[str]:
        calls.append(width)
        if len(calls) > 2:
            raise ValueError("a value that no format takes")
        return ["a line"]

    drawn = Panel(lines, "title", terminal()[0])
    drawn.start()
    time.sleep(0.2)
    assert not drawn.is_drawn
    drawn.stop()


def test_standard_output_is_what_it_was_afterwards() -> None:
    import sys

    before = sys.stdout, sys.stderr
    for file in (io.StringIO(), Gone()):
        drawn = Panel(lambda width, ascii_only: ["x"], "title", Console(file=file, force_terminal=True, force_jupyter=False))
        drawn.start()
        drawn.stop()
        assert (sys.stdout, sys.stderr) == before


def test_it_is_drawn_a_few_times_a_second_and_once_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panel, "SECONDS_BETWEEN_DRAWINGS", 0.05)
    calls: list[int] = []
    drawn = Panel(lambda width, ascii_only: calls.append(width) or ["x"], "title", terminal()[0])  # type: ignore[func-returns-value]
    drawn.start()
    for _ in range(1000):
        drawn.changed()
    time.sleep(0.2)
    drawn.stop()
    assert 2 <= len(calls) < 20


def test_in_a_notebook_it_is_drawn_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs: list[dict[str, str]] = []

    def display(output: dict[str, str], **_: object) -> "Handle":
        outputs.append(output)
        return Handle()

    class Handle:
        def update(self, output: dict[str, str], *, raw: bool) -> None:
            outputs[-1] = output

    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", display)
    drawn = Panel(lambda width, ascii_only: [f"{width} columns"], "title", Console(file=io.StringIO()))
    drawn.start()
    drawn.stop()
    (output,) = outputs
    assert "columns" in output["text/plain"] and drawn.is_drawn


# Curves


def test_a_curve_has_the_means_of_equal_parts() -> None:
    assert curve([0, 7], 10) == "▁█"
    assert curve(list(range(8)), 8) == "▁▂▃▄▅▆▇█"
    assert curve([0, 0, 7, 7], 2) == "▁█"
    assert curve([5.0] * 9, 3) == "▁▁▁"
    assert curve([], 5) == "" == curve([1.0], 0)
    assert curve([1, math.nan, 3, math.inf], 4) == "▁×█×"
    assert curve([0, math.nan, 7], 9, ascii_only=True) == "_x#"


def test_a_bar_is_filled_by_its_share() -> None:
    assert filled(0.5, 4) == "━━──" and filled(2, 3) == "━━━" and filled(0, 2, ascii_only=True) == ".."


def test_a_long_history_keeps_its_shape_and_little_else() -> None:
    history = History()
    for step in range(1, 100_001):
        history.add(step, float(step))
    assert len(history.values) < run_view.MOST_KEPT and history.values == sorted(history.values)
    assert history.first == (1, 1.0) and history.last == 100_000.0
    assert curve(history.values, 8) == "▁▂▃▄▅▆▇█"


# Lines where nothing is drawn


def test_of_the_lines_of_steps_the_first_the_last_and_one_in_ten_seconds_are_printed_and_all_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from verl import run as run_module

    now = [1000.0]
    monkeypatch.setattr(run_module.time, "monotonic", lambda: now[0])
    with run_with(tmp_path, "trainer.logger=console") as run:
        run.start_logging(0, 100)
        for step in range(1, 101):
            run.log(step, STEP)
            now[0] += 1.0
            run.line(f"saved global_step_{step}", "saved", is_last=step == 100)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[1] for line in printed if line.startswith("step ")] == [f"{n}/100" for n in (*range(1, 100, 10), 100)]
    assert len([line for line in printed if line.startswith("saved ")]) == 11 and "saved global_step_100" in printed
    kept = (tmp_path / "train.log").read_text().splitlines()
    assert len([line for line in kept if line.startswith("step ")]) == 100 == len([line for line in kept if line.startswith("saved ")])
    assert all("train/loss 2.5000" in line for line in printed if line.startswith("step "))


def test_only_rank_0_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("verl.dist.is_main", lambda: False)
    run = run_with(tmp_path)
    run.start_logging(0, 3)
    run.log(1, STEP)
    run.line("a line")
    assert run._view is None and capsys.readouterr().out == ""
