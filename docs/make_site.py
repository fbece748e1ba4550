"""Builds the site of the documentation, from the pages as they are read in the repository: python docs/make_site.py"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "site"
# Pages outside docs/.
OTHER_PAGES = ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/README.md")
# Pages of features that are being added. Until they are there, their lines of the navigation and of lists and tables are left out.
AWAITED: tuple[str, ...] = ()

LINK = re.compile(r"(?<!\\)\]\((?!\w+:|#)([^()\s#]+)((?:#[^()\s]*)?)\)")
CODE_BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".sh": "bash", ".sbatch": "bash", ".yaml": "yaml", ".json": "json", ".jsonl": "json", ".ipynb": "json"}
PICTURES = (".png", ".svg", ".jpg")
NOT_SEARCHED = "---\nsearch:\n  exclude: true\n---\n\n"


def main() -> None:
    if importlib.util.find_spec("zensical") is None:
        fix = 'make docs installs it, or pip install -c constraints.txt -e ".[docs]"; it needs Python 3.11 or newer'
        raise SystemExit(f"error: zensical is not installed\n  fix: {fix}")
    shutil.rmtree(BUILD, ignore_errors=True)
    gather(ROOT, BUILD)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", str(BUILD / "mkdocs.yml")]
    done = subprocess.run(command, cwd=BUILD, check=False)  # noqa: S603 (no word of it is a user's)
    if done.returncode == 0:
        print(f"open {BUILD / 'html' / 'index.html'}")
    raise SystemExit(done.returncode)


def gather(root: Path, build: Path) -> None:
    """Write the pages, what they show, and the settings of the site into a folder."""
    for page in pages(root):
        add_page(page, root, build / "pages")
    shutil.copytree(root / "docs" / "site", build / "pages" / "site")
    shutil.copytree(root / "docs" / "pictures", build / "pages" / "docs" / "pictures")
    write(build / "mkdocs.yml", settings(root))


def pages(root: Path) -> list[Path]:
    """Return the pages of the site, relative to the repository."""
    found = [Path(name) for name in OTHER_PAGES if (root / name).is_file()]
    return found + sorted(path.relative_to(root) for path in (root / "docs").rglob("*.md"))


def add_page(page: Path, root: Path, folder: Path) -> None:
    """Copy a page into the folder, at the same path, with what it links to.

    A file of code becomes a page that shows it, and a folder a page that lists it: a browser would download the one, and a site has no
    index of the other. Links to them are changed.
    """

    def linked(match: re.Match[str]) -> str:
        path = Path(os.path.normpath(page.parent / match[1]))
        there = root / path
        if there.suffix not in (".md", *PICTURES) and there.exists():
            shown = path / "index.md" if there.is_dir() else path.with_name(f"{path.name}.md")
            write(folder / shown, listing(there, root) if there.is_dir() else code(there, root))
            return f"]({os.path.relpath(shown, page.parent)})"
        return match[0]

    lines = (root / page).read_text(encoding="utf-8").splitlines(keepends=True)
    missing = [os.path.relpath(name, page.parent) for name in AWAITED if not (root / name).is_file()]
    shown = [line for line in lines if not (line.startswith(("- ", "| ")) and any(f"]({name})" in line for name in missing))]
    write(folder / page, outside_code("".join(shown), linked))


def outside_code(text: str, linked: Callable[[re.Match[str]], str]) -> str:
    """Replace the links of a page, but not what looks like one in a block of code."""
    parts, end = [], 0
    for block in CODE_BLOCK.finditer(text):
        parts += [LINK.sub(linked, text[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, LINK.sub(linked, text[end:])])


def code(path: Path, root: Path) -> str:
    """Return a page that shows a file."""
    text = path.read_text(encoding="utf-8")
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`+", text)), 3)
    return f"{NOT_SEARCHED}# {path.relative_to(root)}\n\n{fence}{LANGUAGES.get(path.suffix, 'text')}\n{text}\n{fence}\n"


def listing(path: Path, root: Path) -> str:
    """Return a page that lists the files of a folder."""
    names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in path.iterdir() if entry.name != "__pycache__")
    lines = "\n".join(f"- `{name}`" for name in names)
    return f"{NOT_SEARCHED}# {path.relative_to(root)}/\n\n{lines}\n"


def settings(root: Path) -> str:
    """Return mkdocs.yml as it is read in the build folder, without the pages that are still awaited."""
    lines = (root / "mkdocs.yml").read_text(encoding="utf-8").replace("build/site/", "").splitlines(keepends=True)
    return "".join(line for line in lines if not any(line.endswith(f": {page}\n") and not (root / page).is_file() for page in AWAITED))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
