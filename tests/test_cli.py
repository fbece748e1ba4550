"""The verl command: quick to answer, and a thin way to the modules that do the work."""

import importlib
import json
import os
import re
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forked import run_forked
from places import ROOT
from rich.console import Console
from runs import as_words
from tiny import write_problems_and_model

import verl
from verl import cli, doctor, early, parent, signals
from verl.config.commands import ChatConfig, DemoConfig, EvalConfig, ExportConfig
from verl.config.load import describe
from verl.config.pairs import RewardTrainerConfig
from verl.config.ppo import PPOConfig
from verl.config.sft import SFTConfig
from verl.errors import UserError
from verl.progress import open_console
from verl.prove.report import Report

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}


def command(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "verl", *words], capture_output=True, text=True, env=ENVIRONMENT, timeout=200, **options)


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["verl", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("words", "takes"),
    [
        (["-m", "verl.trainer.ppo_trainer", "a=b"], True),
        (["-u", "-m", "verl.trainer.fsdp_sft_trainer"], True),
        (["-m", "torch.distributed.run", "-m", "verl.trainer.ppo_trainer"], False),  # the ranks that it starts do
        (["-mverl.cli", "sft"], False),
    ],
)
def test_a_process_that_runs_a_trainer_takes_its_signals_from_the_start(
    words: list[str], takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    monkeypatch.setattr(signals, "own_process", lambda: taken.append("signals"))
    monkeypatch.setattr(parent, "end_with_launcher", lambda: taken.append("parent"))
    monkeypatch.setattr(early, "check_module", lambda module, words: None)
    monkeypatch.setattr(sys, "argv", ["-m"])
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, *words])
    verl._begin_trainer()
    assert taken == (["signals", "parent"] if takes else [])


def test_help_lists_the_commands_in_half_a_second() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of the processor's time: on a busy machine, more passes on the clock.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    assert done.returncode == 0
    assert all(f"│ {name}" in done.stdout for name in ("sft", "plan", "eval", "chat", "demo", "doctor"))


@pytest.mark.parametrize(
    "code",
    [
        "import verl; assert verl.__version__ and verl.__file__",
        "import sys; sys.argv = ['verl', '--help']; from verl.cli import main; main()",
        "import sys; sys.argv = ['verl', 'sft', '--help']; from verl.cli import main; main()",
        "import sys; sys.argv = ['verl', 'eval', '--help']; from verl.cli import main; main()",
        "import sys; sys.argv = ['verl', 'sft', '--gpus', '2', 'optim.lrr=1']; from verl.cli import main; main()",
    ],
)
def test_torch_is_not_loaded_before_it_is_needed(code: str) -> None:
    check = "import atexit, os, sys; atexit.register(lambda: 'torch' in sys.modules and os._exit(77)); "
    done = subprocess.run([sys.executable, "-c", check + code], capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert done.returncode in (0, 2), done.stderr


def test_loading_torch_would_be_noticed() -> None:
    with pytest.raises(AssertionError):
        test_torch_is_not_loaded_before_it_is_needed("import torch")


@pytest.mark.parametrize(
    ("word", "other"), [("algorithm.name=dpo", "reward"), ("algorithm.name=grpo", "ppo"), ("data.prompts_per_step=4", "ppo")]
)
def test_the_plan_of_another_trainer_is_answered_with_its_own_command(
    word: str, other: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = ("data.train_files=rows.jsonl", "model.partial_pretrain=model")
    assert call(monkeypatch, "plan", *needed, word) == 2
    said = capsys.readouterr().err
    assert f"plans verl sft only, and these are arguments of verl {other}" in said and f"verl {other} trainer.dry_run=true" in said
    assert call(monkeypatch, "plan", *needed, word, "optim.lrr=1") == 2
    assert "unknown key" in capsys.readouterr().err


def test_version_is_the_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"{verl.__version__}\n"


def test_the_installed_command_is_this_one() -> None:
    (script,) = metadata.entry_points(group="console_scripts", name="verl")
    assert script.load() is cli.main


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("sft", SFTConfig),
        ("ppo", PPOConfig),
        ("reward", RewardTrainerConfig),
        ("eval", EvalConfig),
        ("chat", ChatConfig),
        ("export", ExportConfig),
        ("demo", DemoConfig),
    ],
)
def test_help_of_a_command_shows_its_keys(
    name: str, schema: type, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, name, "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"verl {name} ")
    assert shown.endswith(f"{describe(schema)}\n")


MODULES = {
    "sft": "verl.trainer.fsdp_sft_trainer",
    "ppo": "verl.trainer.ppo_trainer",
    "reward": "verl.trainer.reward_trainer",
    "eval": "verl.eval.sft_evaluator",
    "chat": "verl.chat",
    "export": "verl.models.export",
    "demo": "verl.demo.run",
    "doctor": "verl.doctor",
}


@pytest.mark.parametrize(("name", "module"), MODULES.items())
def test_a_command_hands_its_words_to_its_module_as_they_are(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(main=given.append))
    monkeypatch.setattr(early, "check", lambda command, words: list(words))
    words = ["--config", "a b.yaml", "data.train_files=[a.jsonl,b.csv]", "DIR", "-x", "optim.lr=1e-5", "--config=c.yaml"]
    assert call(monkeypatch, name, *words) == 0
    assert given == [words]


@pytest.mark.parametrize("module", MODULES.values())
def test_each_module_has_a_main(module: str) -> None:
    assert callable(importlib.import_module(module).main)


@pytest.mark.parametrize(("error", "code"), [(UserError("wrong"), 2), (SystemExit(143), 143), (None, 0)])
def test_exit_codes_pass_through(error: BaseException | None, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def main(_: list[str]) -> None:
        if error:
            raise error

    monkeypatch.setitem(sys.modules, "verl.chat", SimpleNamespace(main=main))
    monkeypatch.setattr(early, "check", lambda command, words: list(words))
    assert call(monkeypatch, "chat", "DIR") == code


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "verl.doctor")
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    assert call(monkeypatch, "doctor") == 2
    assert "packaging.requirements is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", ["sft optim.lrr=1", "sft --gpus 2 optim.lrr=1", "sft --gpus 0", "eval model=x", "chat", "teach", "doctor me"]
)
def test_a_wrong_word_ends_with_code_2(words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, *words.split()) == 2
    assert "error" in capsys.readouterr().err.lower()


# Several processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_problems_and_model(tmp_path_factory.mktemp("cli"), 16, 4)


def words(folder: Path, train_file: str, output: str) -> list[str]:
    keys = {
        "data.train_files": folder / train_file,
        "data.cache_dir": folder / "cache",
        "model.partial_pretrain": folder / "model",
        "trainer.default_local_dir": folder / output,
        "trainer.total_training_steps": 2,
    }
    return as_words(keys, {})


def test_gpus_starts_so_many_processes(folder: Path) -> None:
    done = run_forked("-m", "verl", "sft", *words(folder, "train.jsonl", "out"), "--gpus", 2, folder=folder)
    assert done.returncode == 0, done.stderr
    assert "× 2" in done.stdout
    assert [json.loads(line)["step"] for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_a_broken_row_ends_them_with_code_2_and_nothing_but_its_place(folder: Path) -> None:
    """In new interpreters, whose start and end must say nothing either."""
    (folder / "broken.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n{"question": "2 + 2?", "answer": null}\n')
    done = command("sft", *words(folder, "broken.jsonl", "broken"), "--gpus", "1")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {folder}/broken.jsonl:2: ")
    assert len(done.stderr.splitlines()) == 2


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(early, "check", lambda command, words: list(words))
    with pytest.raises(UserError, match="found 2 GPUs"):
        cli.launch(4, ["data.train_files=train.jsonl", "model.partial_pretrain=model"], cli.SFT)


# Doctor


def test_doctor_says_what_is_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "doctor") == 0
    shown = capsys.readouterr().out
    for part in ("python", "torch", "transformers", "attention", "current folder", "downloaded models"):
        assert part in shown


def test_in_a_pipe_no_command_wraps_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal, and where COLUMNS says how wide one is, lines are wrapped in words."""
    (place := tmp_path / ("deep" * 20) / ("folder" * 20)).mkdir(parents=True)
    monkeypatch.setenv("HF_HOME", str(place))
    monkeypatch.setenv("COLUMNS", "80")
    finding = doctor.Finding("disk", "downloaded models", f"1 GiB free in {place}", "warning", f"free {place}")
    doctor.report([finding], open_console())
    Report(subject_named(str(place)))
    shown = capsys.readouterr().out
    assert shown.count(f"1 GiB free in {place}") == 2 and f"fix: free {place}" in shown and f"verl prove {place}: a model\n" in shown
    assert open_console(force_terminal=True).width == 80


def subject_named(name: str) -> Any:
    return SimpleNamespace(name=name, describe=lambda: "a model")


def requirement(text: str) -> doctor.Requirement:
    return doctor.Requirement(text)


@pytest.mark.parametrize(
    ("text", "extra", "state", "advice"),
    [
        ("rich>=1", None, "ok", ""),
        ("rich>=9999", None, "missing", 'pip install "rich>=9999"'),
        ("no-such-package>=1", None, "missing", 'pip install "no-such-package>=1"'),
        ("no-such-package>=1", "wandb", "absent", 'pip install "verl[wandb]"'),
        ("rich>=9999", "wandb", "warning", 'pip install "verl[wandb]"'),
    ],
)
def test_doctor_knows_what_is_missing_and_what_is_only_optional(text: str, extra: str | None, state: str, advice: str) -> None:
    found = doctor._package(requirement(text), extra)
    assert (found.state, found.advice) == (state, advice)


def test_doctor_ends_with_1_if_something_needed_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    missing = doctor.Finding("needed", "peft", "not installed", "missing", 'pip install "peft>=0.18"')
    monkeypatch.setattr(doctor, "examine", lambda: [missing])
    assert call(monkeypatch, "doctor") == 1
    assert 'missing: peft: not installed\n  fix: pip install "peft>=0.18"' in capsys.readouterr().out


def test_doctor_names_what_the_docs_say_that_an_extra_brings() -> None:
    table = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8").partition("| extra |")[2].partition("\n\n")[0]
    rows = [[re.findall(r"`([\w-]+)`", cell) for cell in line.split("|")[1:3]] for line in table.splitlines() if line.startswith("| `")]
    brought = {name for extras, packages in rows for name in packages or extras if extras != ["dev"]}
    assert len(brought) > 5
    assert brought <= {found.name for found in doctor.examine() if found.group == "optional"}


def test_doctor_lists_each_gpu_and_its_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (139 * 2**30, 140 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=140 * 2**30))
    found = {finding.name: finding.found for finding in doctor._devices()}
    assert found["GPU 0"] == found["GPU 1"] == "H200, 139 of 140 GiB free"
    assert "FlashAttention" in found["attention"]


def test_doctor_warns_of_what_is_off() -> None:
    off = [
        doctor._no_gpu(has_driver=True, cuda=None),
        doctor._no_gpu(has_driver=True, cuda="13.0"),
        doctor._gpu(0, "T4", 15, 16, (7, 5)),
        doctor._gpu(0, "H200", 10, 140, (9, 0)),
    ]
    assert [found.state for found in off] == ["warning"] * 4
    assert all(found.advice for found in off)
    assert doctor._no_gpu(has_driver=False, cuda=None).state == "ok"
    assert doctor._gpu(0, "H200", 139, 140, (9, 0)).state == "ok"


def test_doctor_warns_of_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._space("cache", tmp_path / "not" / "yet" / "made").state == "ok"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    assert doctor._space("cache", tmp_path).state == "warning"


def test_doctors_report_fits_a_narrow_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.report(doctor.examine(), Console(width=60))
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 60
