"""What `verl inspect` prints. Texts of the data are printed with their control characters escaped: a terminal obeys some of them."""

from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from verl.inspection import words
from verl.inspection.result import DataSet, Finding, Inspection, Lengths, Shown, ShownRow
from verl.inspection.words import Fact, printable
from verl.progress import open_console

STYLES = {
    "trained": "green",
    "stop": "bold black on green",
    "masked": "dim",
    "control": "blue",
    "spelled": "bold red",
    "left out": "italic yellow",
}
BAR = 40  # characters of the longest bar


def show(found: Inspection, console: Console | None = None) -> None:
    """Print what was found."""
    out = console or open_console(highlight=False)
    is_good, verdict = words.verdict(found)
    out.print(Text(printable(verdict), "bold green" if is_good else "bold red"), soft_wrap=True)
    _print_facts(out, words.of_run(found))
    for data in found.sets:
        out.print(_heading(data.key))
        _print_facts(out, words.of_set(data))
        if data.lengths is not None:
            out.print(_histogram(data.lengths))
        for group in words.groups_of(data):
            _print_group(out, group, data)
    if found.validation is not None:
        out.print(_heading("overlap"))
        _print_group(out, words.overlap_of(found), found.validation)
    if found.steps is not None:
        out.print(_heading("steps"))
        _print_facts(out, words.of_steps(found.steps, found.command))
    if found.rows or found.found is not None:
        out.print(_heading("rows"))
        if found.found is not None:
            out.print(Text(f"{words.count(found.found, 'rows')} with the text"))
        out.print(_legend(), soft_wrap=True)
    for row in found.rows:
        _print_row(out, row)


def _heading(text: str) -> Text:
    return Text(f"\n{text}", "bold")


def _print_facts(out: Console, facts: list[Fact]) -> None:
    for label, text in facts:
        out.print(Text.assemble((f"{label:<14}", "cyan"), printable(text)), soft_wrap=True)


def _print_group(out: Console, group: words.Group, data: DataSet) -> None:
    if not group.findings:
        out.print(Text.assemble((f"{group.title}: ", "cyan"), group.nothing), soft_wrap=True)
        return
    out.print(Text(f"{group.title}:", "bold red" if group.is_bad else "yellow"), soft_wrap=True)
    for finding in group.findings:
        for line in _lines(finding, data.unit):
            out.print(line, soft_wrap=True)


def _lines(finding: Finding, unit: str) -> Iterator[Text]:
    yield Text(f"  {printable(words.of_finding(finding, unit))}")
    if finding.example:
        yield Text(f"    such as: {printable(finding.example).replace(chr(10), ' ⏎ ')}", "dim")
    if finding.fix:
        yield Text(f"    fix: {printable(finding.fix)}", "dim")


def _histogram(lengths: Lengths) -> Table:
    most = max(one.documents for one in lengths.bins)
    table = Table.grid(padding=(0, 1))
    for justify in ("right", "left", "right"):
        table.add_column(justify=justify)
    for one in lengths.bins:
        bar = "█" * round(BAR * one.documents / most) or ("▏" if one.documents else "")
        table.add_row(f"{one.first:,}–{one.last:,}", Text(bar, "green"), f"{one.documents:,}")
    return table


def _legend() -> Text:
    parts = [(f" {text} ", STYLES[kind]) for kind, text in words.KINDS.items()]
    return Text.assemble(*(piece for part in parts for piece in (part, "  ")))


def _print_row(out: Console, row: ShownRow) -> None:
    """Print a row in frames on a terminal, and as lines in a pipe or a file, which has no width."""
    title = Text(f"row {row.number:,}, {printable(row.place)} ({printable(row.why)})", "bold")
    if out.is_terminal:
        out.print(_framed(row, title))
        return
    lines = [title, *([Text(printable(row.note))] if row.note else [])]
    lines += [line for one in row.documents for line in (Text(_named(one)), _text(one))]
    lines += [Text(f"{printable(name)} {printable(value)}") for name, value in row.columns.items()]
    out.print(*lines, sep="\n", soft_wrap=True)


def _framed(row: ShownRow, title: Text) -> RenderableType:
    parts: list[RenderableType] = [Text(printable(row.note), "yellow")] if row.note else []
    if row.documents:
        parts.append(_side_by_side([_document(one) for one in row.documents]))
    if row.columns:
        parts.append(_table(row.columns))
    return Panel(Group(*parts), title=title, title_align="left")


def _side_by_side(documents: list[Panel]) -> Table:
    table = Table.grid(padding=(0, 1), expand=True)
    for _ in documents:
        table.add_column(ratio=1)
    table.add_row(*documents)
    return table


def _table(columns: dict[str, str]) -> Table:
    table = Table.grid(padding=(0, 1))
    for name, value in columns.items():
        table.add_row(Text(printable(name), "cyan"), Text(printable(value)))
    return table


def _document(shown: Shown) -> Panel:
    return Panel(_text(shown), title=_named(shown), title_align="left", border_style="dim")


def _named(shown: Shown) -> str:
    size = f"{words.count(shown.tokens, 'tokens')}, {shown.trained:,} trained" if shown.tokens else ""
    return f"{shown.name} {size}".strip()


def _text(shown: Shown) -> Text:
    return Text.assemble(*((printable(part.text), STYLES[part.kind]) for part in shown.parts))
