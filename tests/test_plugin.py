"""A name in the config is a file: a built-in one, a module, or the user's own."""

import pickle
from pathlib import Path

import pytest

from verl import plugin
from verl.errors import UserError

LOGGER = "def start(run):\n    return None\n"


def test_a_bare_name_is_a_module_of_the_folder() -> None:
    assert plugin.load("verl.loggers", "console", needs=("start",)).__name__ == "verl.loggers.console"


def test_helpers_of_the_folder_are_no_plugins() -> None:
    assert plugin.names("verl.loggers") == ["console", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]
    with pytest.raises(UserError):
        plugin.load("verl.loggers", "_redact")


def test_a_path_is_the_users_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(LOGGER)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert plugin.load("verl.loggers", f"{tmp_path}/mine.py", needs=("start",)).start(None) is None
    assert plugin.load("verl.loggers", "~/mine.py").__file__ == str(tmp_path / "mine.py")


def test_a_dotted_name_is_any_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "mine.py").write_text(LOGGER)
    monkeypatch.syspath_prepend(tmp_path)
    assert plugin.load("verl.loggers", "own_package.mine", needs=("start",)).start(None) is None


@pytest.mark.parametrize(
    ("name", "found", "fix"),
    [
        (
            "wanbd",
            "no loggers named 'wanbd'",
            "did you mean 'wandb'? console, mlflow, swanlab, tensorboard, trackio, wandb, or path/to/file.py",
        ),
        ("own.missing", "no module 'own'", "path of a .py file"),
        ("missing.py", "no such file", "the current folder is"),
    ],
)
def test_what_does_not_exist_is_answered_with_what_does(name: str, found: str, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        plugin.load("verl.loggers", name)
    assert found in caught.value.what
    assert fix in (caught.value.fix or "")


def test_a_file_without_the_function_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("begin = 1\n")
    with pytest.raises(UserError, match="has no function 'start'") as caught:
        plugin.load("verl.loggers", str(tmp_path / "empty.py"), needs=("start",))
    assert caught.value.where == str(tmp_path / "empty.py")


@pytest.mark.parametrize(("code", "line"), [("def start(:\n", 1), ("import os\n\nos.missing\n", 3)])
def test_a_file_that_fails_when_it_is_imported_is_named_with_its_line(code: str, line: int, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(code)
    with pytest.raises(UserError, match="fails when it is imported") as caught:
        plugin.load("verl.loggers", str(tmp_path / "broken.py"))
    assert caught.value.where == f"{tmp_path / 'broken.py'}:{line}"


def test_a_file_runs_once_however_often_and_under_whatever_name_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(f"print('it runs')\n{LOGGER}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    first, *others = [plugin.load("verl.loggers", name) for name in ("mine.py", "./mine.py", "~/mine.py", f"{tmp_path}/mine.py")]
    assert all(other is first for other in others)
    assert plugin.load("verl.rewards", "mine.py") is first
    assert capsys.readouterr().out == "it runs\n"


def test_a_file_that_has_changed_runs_anew(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("value = 1\n")
    assert plugin.load("verl.loggers", str(mine)).value == 1
    mine.write_text("value = 2\n")
    assert plugin.load("verl.loggers", str(mine)).value == 2
    mine.write_text("value = missing\n")
    for _ in range(2):
        with pytest.raises(UserError, match="'missing' is not defined"):
            plugin.load("verl.loggers", str(mine))


def test_files_of_one_name_in_two_folders_are_two_modules(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text("class Kept:\n    pass\n")
    one, two = (plugin.load("verl.loggers", str(tmp_path / folder / "mine.py")) for folder in ("one", "two"))
    assert isinstance(pickle.loads(pickle.dumps(one.Kept())), one.Kept) and isinstance(pickle.loads(pickle.dumps(two.Kept())), two.Kept)
