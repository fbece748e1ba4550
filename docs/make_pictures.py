"""Makes the pictures of docs/report.md: python docs/make_pictures.py [RUN [--eval DIR]…]

Without a run, it first trains one as `verl demo` does, in a temporary folder: minutes on a CPU. It needs Chromium, and the extras `dev` and
`report`.
"""

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

import verl

PICTURES = Path(__file__).with_name("pictures")
LARGEST = 200_000  # bytes of a picture
WIDTH = 1120
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# What stands at the top of a picture, and its height.
PARTS = {"report": ("#summary", 1090), "report-evaluation": ("#evaluation", 700), "report-answers": ("#answers > h2:last-of-type", 820)}


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--eval", action="append", default=[], type=Path)
    given = parser.parse_args(words)
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        run = given.run or demo(Path(scratch))
        page = verl.write_report(run, evaluations=given.eval, out=Path(scratch) / "report.html")
        take(page)


def demo(folder: Path) -> Path:
    """Run the demo in a folder, and return the directory of its fine-tuning."""
    subprocess.run([sys.executable, "-m", "verl", "demo"], cwd=folder, check=True)
    return folder / "demo-run" / "checkpoints"


def take(page: Path) -> None:
    """Write a picture of each section in both themes."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise SystemExit(f"error: found none of {', '.join(BROWSERS)}\n  fix: apt-get install chromium")
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        for theme in ("light", "dark"):
            tab = browser.new_context(viewport={"width": WIDTH, "height": 900}, color_scheme=theme).new_page()
            tab.goto(page.as_uri())
            tab.wait_for_selector("html[data-ready=true]", state="attached")
            tab.evaluate("document.querySelector('#answers > details[open] .answer')?.setAttribute('open', '')")
            for name, (part, height) in PARTS.items():
                tab.set_viewport_size({"width": WIDTH, "height": height})
                tab.evaluate("part => document.querySelector(part)?.scrollIntoView({behavior: 'instant'})", part)
                tab.wait_for_timeout(500)
                save(tab.screenshot(), PICTURES / f"{name}-{theme}.png")
        browser.close()


def save(png: bytes, path: Path) -> None:
    """Write a picture in 96 colours, which the page needs no more of."""
    picture: Any = Image.open(io.BytesIO(png)).convert("RGB")
    picture.quantize(96, dither=Image.Dither.NONE).save(path, optimize=True)
    size = path.stat().st_size
    print(f"wrote {path}: {size:,} bytes")
    if size > LARGEST:
        raise SystemExit(f"error: {path} has more than {LARGEST:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
