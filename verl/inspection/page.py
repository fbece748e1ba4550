"""What was found as one HTML page that needs no network. Rows are untrusted: all text is escaped, and the page may run no script."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from verl import __version__
from verl.inspection import words
from verl.inspection.result import Inspection, Lengths

TEMPLATE = "page.html.jinja"


def page(found: Inspection) -> str:
    """Return the page."""
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    # What is neither a template's own text nor escaped by this filter is escaped by autoescape, too; invisible characters by neither.
    environment.filters.update(printable=words.printable, number=lambda value: f"{value:,}", heights=_heights)
    environment.globals.update(words=words, version=__version__)
    return environment.get_template(TEMPLATE).render(found=found)


def _heights(lengths: Lengths) -> list[tuple[str, int, float]]:
    """Return the tokens, the number of documents, and the height in percent of each bar."""
    most = max(one.documents for one in lengths.bins)
    return [(f"{one.first:,}–{one.last:,}", one.documents, 100 * one.documents / most) for one in lengths.bins]
