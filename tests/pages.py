"""The pages of the documentation, what tests read from them (commands, links, anchors, tables), and the scripts beside them."""

import importlib.util
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from places import ROOT

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FRONT = ("README.md", "README.zh-CN.md")
PAGES = [*FRONT, *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
OTHERS = ["CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/README.md"]


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return [inside for name, inside in BLOCK.findall(text) if name == language]


def commands(text: str) -> list[list[str]]:
    """The words of each command in the ```bash blocks of a page."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def without_code(text: str) -> str:
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", BLOCK.sub("", text))


@dataclass(frozen=True)
class Link:
    page: str
    target: str

    @property
    def path(self) -> Path:
        """The file that it leads to."""
        name = self.target.partition("#")[0]
        return (ROOT / self.page).parent / name if name else ROOT / self.page

    @property
    def anchor(self) -> str:
        return self.target.partition("#")[2]


def links(page: str) -> list[Link]:
    """The links of a page into the repository."""
    shown = re.sub(r"<!--.*?-->", "", BLOCK.sub("", text_of(page)), flags=re.DOTALL)
    found = re.findall(r"\]\(([^)\s]+)\)", shown)
    return [Link(page, target) for target in found if not re.match(r"\w+:", target)]


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#{1,6} (.+?)\s*$", BLOCK.sub("", text), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "") for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a page: rows of cells, the head first and without the line below it."""
    found: list[list[list[str]]] = [[]]
    for line in BLOCK.sub("", text).splitlines():
        if line.startswith("|"):
            cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
            found[-1] += [cells] if set("".join(cells)) - set("-: ") else []
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def script(name: str) -> ModuleType:
    """A script of docs/, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found
