"""The parts of `verl ui` that need no browser: who may ask, the process that calls the API, what a run shows."""

import asyncio
import json
import re
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import write_problems_and_model

from verl.errors import UserError
from verl.ui import server
from verl.ui.curve import picture
from verl.ui.gate import Gate
from verl.ui.jobs import Job, Jobs, Worker
from verl.ui.texts import LANGUAGES, TEXTS
from verl.ui.watch import look

HERE = "127.0.0.1:7860"
COOKIE = "verl-ui-7860=secret"


def ask(path: str, query: str = "", kind: str = "http", **headers: str) -> tuple[int, dict[str, str], bool]:
    """Status and headers of a request through the gate, and whether the page behind it was asked."""
    reached, sent = [], list[Any]()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> None: ...

    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in {"host": HERE, **headers}.items()]
    scope = {"type": kind, "path": path, "query_string": query.encode(), "headers": pairs}
    asyncio.run(Gate(app, "secret", 7860)(scope, receive, send))
    given = {name.decode(): value.decode() for name, value in sent[0].get("headers", [])}
    return sent[0].get("status", sent[0].get("code")), given, bool(reached)


@pytest.mark.parametrize("path", ["/", "/en/", "/en/config", "/en/gradio_api/queue/join", "/en/gradio_api/upload", "/pages/1.html"])
def test_a_request_without_the_token_is_refused(path: str) -> None:
    assert ask(path)[::2] == (403, False)
    assert ask(path, cookie="verl-ui-7860=other")[::2] == (403, False)
    assert ask(path, cookie=COOKIE)[::2] == (200, True)


def test_the_address_with_the_token_gives_a_cookie_and_leads_to_the_page_in_the_browsers_language() -> None:
    for asked, language in (("zh-CN,zh;q=0.9", "zh"), ("de", "en")):
        status, headers, reached = ask("/", "token=secret", accept_language=asked)
        assert (status, headers["location"], reached) == (303, f"/{language}/", False)
        assert headers["set-cookie"].startswith(f"{COOKIE}; HttpOnly")
    assert ask("/", "token=wrong")[0] == 403


def test_a_request_of_another_page_or_under_another_name_is_refused() -> None:
    assert ask("/en/", cookie=COOKIE, origin="http://127.0.0.1:8888")[::2] == (403, False)
    assert ask("/en/", cookie=COOKIE, host="evil.example:7860")[::2] == (403, False)
    assert ask("/en/", cookie=COOKIE, origin=f"http://{HERE}")[::2] == (200, True)


def test_routes_that_serve_files_or_other_hosts_are_refused_with_the_token_too() -> None:
    for path in ("gradio_api/file=/etc/passwd", "gradio_api/proxy=https://huggingface.co", "monitoring", "gradio_api/runs", "static"):
        assert ask(f"/en/{path}", cookie=COOKIE)[::2] == (404, False), path
    assert ask("/pages/../../etc/passwd", cookie=COOKIE)[::2] == (404, False)
    assert ask("/en/", kind="websocket", cookie=COOKIE)[::2] == (1008, False)


def test_what_the_page_loads_may_come_from_this_machine_only() -> None:
    policy = ask("/en/", cookie=COOKIE)[1]["content-security-policy"]
    assert policy.startswith("default-src 'self'") and "http" not in policy


def test_every_text_is_there_in_each_language_with_the_same_values() -> None:
    for name, texts in TEXTS.items():
        assert len(texts) == len(LANGUAGES) and all(texts), name
        assert len({tuple(sorted(re.findall(r"{\w+}", text))) for text in texts}) == 1, name


def test_a_look_at_a_run_that_is_writing_takes_what_is_complete(tmp_path: Path) -> None:
    assert look(tmp_path / "none").points == []
    old = "step 9/9 · train/loss 1.0\n"
    (tmp_path / "train.log").write_text(f"{old}step 1/1,200 · train/loss 2.0\nstep 2/1,200 · train/loss 1.5 · eta 1:02:03\n")
    rows = [{"step": 1, "train/loss": 3.0}, {"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": None}, {"step": 2, "val/loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 3, "tra')
    seen = look(tmp_path, len(old))
    assert (seen.step, seen.total, seen.left) == (2, 1200, "1:02:03")
    assert seen.points == [(1, 2.0, "train/loss"), (2, 1.0, "val/loss")]
    assert old not in seen.log


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [1e-9, 1e9], [-5.0, 3.0]])
def test_a_curve_stays_in_its_picture(values: list[float]) -> None:
    drawn = picture([(step, value, "<b>") for step, value in enumerate(values, 1)], 10, "step")
    places = [tuple(map(float, point.split(","))) for line in re.findall(r'polyline points="([^"]+)"', drawn) for point in line.split()]
    assert len(places) == len(values) and all(0 <= x <= 720 and 0 <= y <= 240 for x, y in places)
    assert "<b>" not in drawn


# The process that calls the API


def wait_for(done: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)


def test_a_run_is_stopped_with_a_checkpoint_and_goes_on_from_it(tmp_path: Path) -> None:
    write_problems_and_model(tmp_path)
    run, jobs = str(tmp_path / "run"), Jobs(tmp_path)
    keys = {"data.train_files": str(tmp_path / "train.jsonl"), "model.partial_pretrain": str(tmp_path / "model")}
    call: dict[str, Any] = {"given": [{**keys, "trainer.default_local_dir": run}, "trainer.total_training_steps=400"]}
    job = jobs.start("train", call, run)
    with pytest.raises(UserError, match="one call runs at a time"):
        jobs.start("train", call, run)
    wait_for(lambda: look(Path(run)).step >= 2 or job.answer)
    assert jobs.stop()
    wait_for(lambda: job.answer)
    assert job.answer is not None and Path(job.answer["stopped"]).is_dir(), job.answer
    wait_for(lambda: jobs.running is None)
    stopped = int(Path(job.answer["stopped"]).name.rpartition("_")[2])
    again = jobs.start("train", call, run)
    wait_for(lambda: look(Path(run), again.log_start).step or again.answer)
    jobs.close()
    assert look(Path(run), again.log_start).step > stopped
    assert again.answer is None or "stopped" in again.answer


def test_an_error_of_the_user_comes_back_as_what_where_and_fix(tmp_path: Path) -> None:
    worker = Worker()
    answer = worker.ask("train", {"given": ["model.partial_pretrian=x"]})
    worker.close()
    assert answer["error"]["where"] == "model.partial_pretrian" or "partial_pretrian" in answer["error"]["what"]
    assert "model.partial_pretrain" in answer["error"]["fix"]


def test_a_process_that_dies_is_an_error_with_its_last_words() -> None:
    worker = Worker()
    answer = worker.ask("no_such_call", {})
    worker.close()
    assert "exit code 1" in answer["error"]["what"] and "KeyError: 'no_such_call'" in answer["error"]["fix"]


def test_after_an_answer_of_the_chat_another_call_may_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    class Stub:
        def ask(self, kind: str, arguments: dict[str, Any]) -> dict[str, Any]:
            asked.append(kind)
            return {"result": ["4"]}

        def stop(self) -> None: ...
        def close(self) -> None: ...
        def wait(self) -> None: ...

    monkeypatch.setattr("verl.ui.jobs.Worker", Stub)
    jobs = Jobs(tmp_path)
    assert jobs.chat({}) == {"result": ["4"]} and jobs.running is None
    job = jobs.start("evaluate", {})
    wait_for(lambda: job.answer)
    assert asked == ["chat", "evaluate"] and not jobs.stop()
    assert isinstance(job, Job) and jobs.show("a.html") == jobs.show("a.html") != jobs.show("b.html")


# The command


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="needs the extra ui")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="--port") as error:
            server.open_ui(tmp_path, taken.getsockname()[1])
    assert error.value.fix == "give another port, or none"


def test_without_gradio_the_command_that_installs_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="gradio is not installed") as error:
        server.open_ui(tmp_path)
    assert error.value.fix is not None and "[ui]" in error.value.fix
