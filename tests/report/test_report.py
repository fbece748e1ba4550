"""verl report on real runs and evaluations: the page in a browser, the files, the command."""

import html
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import rl_runs
import sft_runs
from learned import ROWS, write_rows
from places import ROOT

import verl
from verl.config.commands import EvalConfig
from verl.config.load import load_config, to_yaml
from verl.config.ppo import PPOConfig
from verl.config.sft import SFTConfig
from verl.errors import UserError
from verl.eval.sft_evaluator import evaluate
from verl.models.tiny import write_tiny_model
from verl.report import command, page
from verl.report.evaluations import find_evaluations, read_evaluation
from verl.report.runs import read_run
from verl.report.settings import command_of, command_of_evaluation, shell

STEPS = 60
ATTACK = "<script>window.attacked = 1</script><img src=x onerror='window.attacked = 1'>"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned four rows by heart, a worse one, one of reinforcement learning, and evaluations of two models."""
    folder = tmp_path_factory.mktemp("report")
    write_rows(folder / "train.jsonl", ROWS)
    write_tiny_model(folder / "model", [row["question"] + row["answer"] for row in ROWS])
    changes: dict[str, Any] = dict(
        data__train_batch_size=4, data__val_files=folder / "train.jsonl", optim__lr="3e-3", optim__lr_scheduler="constant"
    )
    sft_runs.train(folder, "good", trainer__total_training_steps=STEPS, trainer__test_freq=20, **changes)
    sft_runs.train(folder, "worse", trainer__total_training_steps=5, **{**changes, "optim__lr": "1e-3"})
    for model, output in (("model", "eval-before"), (f"good/global_step_{STEPS}", "good/eval")):
        evaluate(EvalConfig(str(folder / model), str(folder / "train.jsonl"), output_dir=str(folder / output), max_new_tokens=30))
    (rl := folder / "rl").mkdir()
    rl_runs.write_folder(rl)
    rl_runs.train(rl, "run", trainer__total_training_steps=2, trainer__test_freq=1, data__val_files=rl / "test.jsonl")
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> Path:
    return verl.write_report(folder / "good", folder / "worse", folder / "rl/run", out=folder / "all.html", png=folder / "png")


@pytest.fixture(scope="module")
def one(folder: Path) -> Path:
    """The page of a single run."""
    return verl.write_report(folder / "good", out=folder / "one.html")


def texts(path: Path) -> str:
    """The page without its tags, scripts and styles."""
    text = re.sub(r"<(script|style)\b.*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", text)))


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with sync_api.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Visit:
    """A page in a browser, with what went wrong and what it asked of the network."""

    def __init__(self, browser: Any, path: Path, **options: Any):
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.tab = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options}).new_page()
        self.tab.on("console", lambda message: self.errors.append(message.text))
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.failed: dict[str, str | None] = {}
        self.tab.on("requestfailed", lambda request: self.failed.update({request.url: request.failure}))
        self.tab.goto(path.as_uri())
        self.tab.wait_for_selector("html[data-ready=true]", state="attached", timeout=60_000)

    def count(self, selector: str) -> int:
        return int(self.tab.locator(selector).count())


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_plot_is_drawn_without_an_error_or_a_request(browser: Any, report: Path, width: int, theme: str) -> None:
    visit = Visit(browser, report, viewport={"width": width, "height": 800}, color_scheme=theme)
    visit.tab.evaluate("document.querySelectorAll('details.group').forEach(group => group.open = true)")
    visit.tab.wait_for_function(
        "[...document.querySelectorAll('.plot')].every(plot => plot.querySelector('.main-svg .scatterlayer .trace'))"
    )
    metrics = {name for run in ("good", "worse", "rl/run") for name in read_run(report.parent / run).metrics.names} - {"epoch"}
    assert visit.count(".plot") == len(metrics)
    ground = visit.tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(255, 255, 255)" if theme == "light" else "rgb(22, 24, 28)")
    assert visit.tab.evaluate("document.documentElement.scrollWidth") == width, "nothing sticks out of the page"
    assert visit.errors == []
    assert visit.requests == [report.as_uri()]


def test_the_switch_changes_the_colours_of_page_and_plots_and_is_remembered(browser: Any, one: Path) -> None:
    visit = Visit(browser, one, color_scheme="light")
    ink = "getComputedStyle(document.querySelector('.xtick text')).fill"
    light = visit.tab.evaluate(ink)
    for name in ("Light", "Dark"):
        visit.tab.click("#theme")
        assert visit.tab.inner_text("#theme") == name
    assert visit.tab.evaluate(ink) != light
    visit.tab.reload()
    visit.tab.wait_for_selector("html[data-ready=true]", state="attached")
    assert visit.tab.evaluate("document.documentElement.dataset.theme") == "dark"
    assert visit.errors == []


def test_a_logarithmic_axis_is_offered_where_all_values_are_positive(browser: Any, folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder / "worse", tmp_path / "run", ignore=shutil.ignore_patterns("global_step_*"))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "val/loss": 0.0, "train/loss": 0.5}) + "\n")
    visit = Visit(browser, verl.write_report(run))
    visit.tab.click("figure:has([data-metric='train/loss']) .log")
    assert visit.tab.evaluate("document.querySelector(\"[data-metric='train/loss']\").layout.yaxis.type") == "log"
    assert visit.tab.evaluate("document.querySelector(\"[data-metric='train/lr']\").layout.yaxis.type") == "linear"
    assert visit.tab.locator("figure:has([data-metric='val/loss']) .log").is_hidden()


def test_texts_of_a_run_and_of_answers_are_shown_and_not_run(browser: Any, folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder / "good", tmp_path / "<b>run</b>&amp;", ignore=shutil.ignore_patterns("global_step_*"))
    (run / "train.log").write_text(f"data.train_files: {ATTACK}\nwarning: {ATTACK}\nstep 1/2\n", encoding="utf-8")
    config = (run / "config.yaml").read_text(encoding="utf-8")
    (run / "config.yaml").write_text(config.replace("experiment_name: run", f'experiment_name: "{ATTACK}"'), encoding="utf-8")
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, f"my/{ATTACK}": 1.0, "</script><b>": 2.0}) + "\n", encoding="utf-8")
    for name in ("one", "two"):
        (run / name).mkdir()
        row = {
            "prompt": f"{ATTACK} \ud800 \u202e",
            "reference": ATTACK,
            "response": ATTACK,
            "extracted": ATTACK,
            "score": float(name == "two"),
        }
        (run / name / "predictions.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
        results = {"config": {"model_path": f"{name}{ATTACK}", "test_file": ATTACK}, "versions": {ATTACK: ATTACK}, "device": ATTACK}
        (run / name / "results.json").write_text(json.dumps(results), encoding="utf-8")
    written = verl.write_report(run)
    visit = Visit(browser, written)
    visit.tab.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    visit.tab.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 2")
    assert visit.tab.evaluate("window.attacked") is None
    assert visit.count("img") == 0 and visit.count("main b:not(.counts b, .range b)") == 0
    assert visit.errors == [] and visit.requests == [written.as_uri()]
    shown = texts(written)
    assert shown.count(ATTACK) > 10 and "<b>run</b>&amp;" in shown and "\\u202e" in shown


def test_the_policy_of_the_page_refuses_scripts_and_connections_of_others(browser: Any, one: Path, tmp_path: Path) -> None:
    """What escaping would let through, were it broken."""
    broken, foreign = tmp_path / "broken.html", "http://127.0.0.1:9/x"
    text = one.read_text(encoding="utf-8")
    broken.write_text(text.replace("<main>", f"<main>{ATTACK}<img src={foreign}>"), encoding="utf-8")
    visit = Visit(browser, broken)
    assert visit.tab.evaluate("window.attacked") is None
    assert {url: why for url, why in visit.failed.items() if why != "csp"} == {} and foreign in visit.failed
    open_page = tmp_path / "open.html"
    open_page.write_text(
        re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", broken.read_text(encoding="utf-8")), encoding="utf-8"
    )
    assert Visit(browser, open_page).tab.evaluate("window.attacked") == 1, "without the policy, it would run"


# What it says


def test_the_page_has_what_the_files_tell(report: Path) -> None:
    shown = texts(report)
    assert "Exact match 0.0% → 100.0% 4 questions, before and after" in shown
    assert "base model → good, step 60" in shown and "+100.0 percentage points" in shown and "p = 0.12" in shown
    assert "exact McNemar test over 4 questions" in shown and "Turned right 4" in shown
    assert ROWS[0]["answer"].splitlines()[1] in shown
    assert "data.train_files: rows 4 read, 4 used" in shown and "trained | #### 3<|im_end|>" in shown
    for heading in (
        "Training loss",
        "Validation loss",
        "Gradient norm",
        "Entropy",
        "Length of answers",
        "KL divergence from the reference",
    ):
        assert heading in shown
    assert re.search(r"optim\.lr 0\.003 0\.001 0\.0001 1e-05", shown), "of the runs, then the default"
    assert f"torch {metadata.version('torch')}" in shown
    assert "run, validation at step 0 → run, validation at step 2" in shown
    assert "Reward on validation prompts" in shown


def test_a_run_whose_settings_are_the_defaults_shows_no_others(folder: Path) -> None:
    keys = {setting.key for setting in page.changed_settings([read_run(folder / "good")])}
    assert keys == {
        "data.train_files", "data.val_files", "data.cache_dir", "data.train_batch_size", "data.max_length", "model.partial_pretrain",
        "optim.lr", "optim.lr_scheduler", "trainer.default_local_dir", "trainer.total_training_steps", "trainer.save_freq",
        "trainer.test_freq",
    }  # fmt: skip


@pytest.mark.parametrize(("run", "schema"), [("good", SFTConfig), ("rl/run", PPOConfig)])
def test_the_command_of_a_run_has_its_settings(folder: Path, run: str, schema: type[Any]) -> None:
    words = command_of(read_run(folder / run))
    assert words is not None
    again = shlex.split(shell(words).replace("\\\n", " "))
    assert load_config(schema, again[2:]) == load_config(schema, ["--config", str(folder / run / "config.yaml")])
    assert len(again) < 25, "only what differs from the defaults"


WORDS = [
    "data.response_key='007'",
    "data.chat_template_kwargs={a: 'on', b: [1, 'x, y']}",
    "trainer.logger=[console,tensorboard]",
    "data.prompt_key='two words: \"x\"'",
    "data.text_key='~'",
    "data.response_key=''",
]


@pytest.mark.parametrize("word", WORDS)
def test_a_value_that_yaml_would_read_otherwise_is_quoted(folder: Path, tmp_path: Path, word: str) -> None:
    config = load_config(SFTConfig, ["--config", str(folder / "good/config.yaml"), word])
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    words = command_of(read_run(tmp_path))
    assert words is not None
    assert load_config(SFTConfig, shlex.split(shell(words).replace("\\\n", " "))[2:]) == config


def test_the_command_of_an_evaluation_has_its_settings(folder: Path) -> None:
    words = command_of_evaluation(read_evaluation(folder / "good/eval"))
    assert words is not None
    found = load_config(EvalConfig, words[2:])
    assert (found.model_path, found.max_new_tokens) == (str(folder / f"good/global_step_{STEPS}"), 30)


def test_a_report_runs_no_code_that_a_run_names(folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder / "rl/run", tmp_path / "run", ignore=shutil.ignore_patterns("global_step_*"))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef score(*_): return 0\n")
    config = (run / "config.yaml").read_text(encoding="utf-8")
    (run / "config.yaml").write_text(config.replace(str(folder / "rl/vowels.py"), str(tmp_path / "evil.py")), encoding="utf-8")
    assert "evil.py" in (run / "config.yaml").read_text(encoding="utf-8")
    verl.write_report(run)
    assert not (tmp_path / "ran").exists()


def test_secrets_stay_out_of_the_page(folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder / "worse", tmp_path / "run", ignore=shutil.ignore_patterns("global_step_*"))
    secret = "hf_abcdefghijklmnopqrstuvwxyz"
    with (run / "config.yaml").open("a") as file:
        file.write(f"more:\n  token: {secret}\n")
    (run / "train.log").write_text(f"data.train_files: https://user:{secret}@host/x.jsonl\n")
    assert secret not in verl.write_report(run).read_text(encoding="utf-8")


def test_evaluations_are_found_in_a_run_and_beside_it_and_belong_to_their_models(folder: Path) -> None:
    runs = [read_run(folder / "worse"), read_run(folder / "good")]
    found = {one.path.name: (one.run, one.step) for one in find_evaluations(runs, [])}
    assert found == {"eval-before": (0, 0), "eval": (1, STEPS)}
    assert [one.path.name for one in find_evaluations(runs[:1], [folder / "good/eval"])] == ["eval-before", "eval"]


# Its files


def test_the_curves_are_written_as_pictures(report: Path) -> None:
    names = {path.name for path in (report.parent / "png").iterdir()}
    assert {"train_loss.png", "val_loss.png", "train_lr.png", "rl_reward.png", "rl_entropy.png", "perf_tokens_per_second.png"} <= names
    assert (report.parent / "png/train_loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_is_replaced_by_a_newer_one_and_nothing_else_is(folder: Path, tmp_path: Path) -> None:
    first = verl.write_report(folder / "worse", out=tmp_path / "page.html")
    assert verl.write_report(folder / "worse", out=first) == first
    (tmp_path / "mine.html").write_text("my notes")
    with pytest.raises(UserError, match="is no report of verl"):
        verl.write_report(folder / "worse", out=tmp_path / "mine.html")
    assert (tmp_path / "mine.html").read_text() == "my notes"


def test_the_page_is_written_into_the_first_run_and_never_into_a_checkpoint(folder: Path) -> None:
    assert verl.write_report(folder / "good" / f"global_step_{STEPS}") == (folder / "good").resolve() / "report.html"
    with pytest.raises(UserError, match="which may not be changed"):
        verl.write_report(folder / "good", out=folder / f"good/global_step_{STEPS}/report.html")


@pytest.mark.parametrize("name", ["plotly", "jinja2", "matplotlib"])
def test_a_package_that_is_missing_is_named_with_what_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf'{name} is not installed\n  fix: pip install "verl\[report\]"'):
        verl.write_report(tmp_path, png=tmp_path / "png")


def test_the_command_says_what_it_found_and_wrote(folder: Path) -> None:
    words = [sys.executable, "-m", "verl", "report", str(folder / "good"), "--out", str(folder / "said.html")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "good: all 60 steps done" in done.stdout
    assert "exact match 100.0%, 95% interval 51.0% to 100.0%" in done.stdout
    assert done.stdout.endswith(f"wrote {folder / 'said.html'}\n")
    wrong = subprocess.run([*words[:4], str(folder)], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert wrong.returncode == 2 and "is a folder of runs" in wrong.stderr


def test_a_report_without_a_run_is_refused() -> None:
    with pytest.raises(UserError, match="name a run's directory"):
        command.write_report([])
