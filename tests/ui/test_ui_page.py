"""`verl ui` in a browser, through its three steps: choose and look at data, train and stop, ask, evaluate and report."""

import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from places import ROOT, free_port
from tiny import write_problems_and_model

pytest.importorskip("gradio", reason="needs the extra ui")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
SECONDS = 120_000  # milliseconds until a call has ended


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_problems_and_model(tmp_path_factory.mktemp("ui"))


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """The printed address, with its token. At its end, the page ends by a signal with exit code 0."""
    command = [sys.executable, "-m", "verl", "ui", "--dir", str(folder / "experiments"), "--port", str(free_port())]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (folder / "errors").open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env)
        assert process.stdout is not None
        with process, process.stdout:
            found = re.search(r"http://127\.0\.0\.1:\d+/\?token=\S+", process.stdout.readline())
            assert found is not None, (folder / "errors").read_text()
            yield found[0]
            process.terminate()
            assert process.wait(60) == 0
    assert "Traceback" not in (folder / "errors").read_text()


class Visit:
    """The page in a browser, with all that it wrote to the console and asked for."""

    def __init__(self, browser: Any, address: str, **options: Any):
        self.messages: list[str] = []
        self.hosts: set[str] = set()
        self.tab = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "locale": "en-US", **options}).new_page()
        self.tab.on("console", lambda message: self.messages.append(message.text))
        self.tab.on("pageerror", lambda error: self.messages.append(str(error)))
        self.tab.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        self.tab.goto(address)
        self.tab.wait_for_selector("#model", timeout=60_000)

    def fill(self, name: str, text: object) -> None:
        self.tab.fill(f"#{name} textarea, #{name} input", str(text))

    def step(self, number: int) -> None:
        self.tab.get_by_role("tab").nth(number - 1).click()

    def until(self, name: str, words: str) -> str:
        """Wait for a text that matches, or an error, and return it."""
        test = f"new RegExp({words!r}).test(document.querySelector('#{name}').innerText) || document.querySelector('#{name} .wrong')"
        self.tab.wait_for_function(test, timeout=SECONDS)
        return str(self.tab.inner_text(f"#{name}"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def test_three_steps_without_a_word_on_the_console_or_a_request_to_another_host(browser: Any, address: str, folder: Path) -> None:
    visit = Visit(browser, address)
    visit.fill("model", folder / "model")
    visit.fill("data", folder / "train.jsonl")
    visit.tab.locator("input[type=file]").nth(1).set_input_files(folder / "test.jsonl")
    visit.tab.wait_for_function("document.querySelector('#validation textarea, #validation input').value.endsWith('uploads/test.jsonl')")
    visit.tab.click("#inspect")
    assert "Rows: 80, steps: 20" in visit.until("found", "Rows")
    assert visit.tab.frame_locator("#found iframe").get_by_text("verl sft would train on 80 rows").count() == 1

    visit.step(2)
    visit.fill("epochs", 2)
    visit.fill("lr", "1e-3")
    visit.tab.click("#start")
    assert visit.until("status", "Done").endswith("run/global_step_40")
    visit.tab.wait_for_selector("#curve polyline >> nth=1", state="attached")
    assert "done: 40 steps" in visit.until("log", "done: 40 steps")

    visit.step(3)
    visit.fill("tokens", 8)
    visit.fill("question", "<img src=http://example.com/x.png> What is 17 + 25?")
    visit.tab.click("#ask")
    for name in ("mine", "base"):
        visit.tab.wait_for_selector(f"#{name} .bot", timeout=SECONDS)
        assert "<img src=http://example.com/x.png> What" in visit.tab.inner_text(f"#{name}"), "it is text, not a picture that is loaded"
    visit.fill("test", folder / "test.jsonl")
    visit.tab.click("#evaluate")
    assert re.search(r"exact_match \d+\.\d% \(95% interval", visit.until("scores", "%"))
    visit.tab.click("#evaluate-base")
    visit.tab.wait_for_function("document.querySelector('#scores').innerText.split('exact_match').length === 3", timeout=SECONDS)
    visit.tab.click("#write-report")
    visit.until("report", "Open")
    visit.tab.frame_locator("#report iframe").get_by_text("all 40 steps done").wait_for(timeout=SECONDS)
    assert visit.messages == []
    assert visit.hosts == {address.split("/")[2]}


def test_an_error_says_where_what_and_what_to_do_and_a_reload_still_shows_the_run(browser: Any, address: str, folder: Path) -> None:
    visit = Visit(browser, address, locale="zh-CN")
    assert visit.tab.inner_text("h1") == "微调模型"
    visit.tab.click("#inspect")
    assert "没有填写" in visit.until("found", "填写") and "解决办法" in visit.tab.inner_text("#found")
    visit.fill("model", folder / "model")
    visit.fill("data", folder / "gone.jsonl")
    visit.step(2)
    visit.tab.click("#start")
    assert re.search(r"gone\.jsonl.*解决办法", visit.until("status", "办法"), re.DOTALL)
    visit.tab.click("text=English")
    visit.tab.wait_for_selector("h1:has-text('Fine-tune a model')")
    visit.step(2)
    assert "gone.jsonl" in visit.until("status", "gone")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out_of_a_phone(browser: Any, address: str, scheme: str) -> None:
    visit = Visit(browser, address, viewport={"width": 390, "height": 800}, color_scheme=scheme)
    for number in (1, 2, 3):
        visit.step(number)
        assert visit.tab.evaluate("document.documentElement.scrollWidth") == 390


def test_without_the_token_nothing_is_served(address: str) -> None:
    base = address.partition("?")[0]
    for path in (
        "",
        "en/",
        "en/config",
        "en/gradio_api/info",
        "en/gradio_api/queue/data",
        "en/gradio_api/file=/etc/passwd",
        "pages/1.html",
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(base + path, timeout=10)
        with refused.value:
            assert refused.value.code == 403
