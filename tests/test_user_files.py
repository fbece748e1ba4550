"""Users' files that import their neighbours, and modules of the current folder."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from verl import plugin, user_files
from verl.errors import UserError


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


LATE = "from helper import VALUE\n\n\ndef late():\n    import helper\n    return helper.VALUE\n"


def test_files_in_two_folders_import_their_own_helpers_when_they_are_imported_and_later(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, mine=LATE, helper="from below import VALUE\n", below=f"VALUE = {name!r}\n")
    one, two = (plugin.load("verl.rewards", str(tmp_path / name / "mine.py")) for name in ("one", "two"))
    assert (one.VALUE, one.late(), two.VALUE, two.late()) == ("one", "one", "two", "two")
    assert "helper" not in sys.modules and not {str(tmp_path / name) for name in ("one", "two")} & {*sys.path}


def test_packages_and_relative_imports_beside_a_file_are_found(tmp_path: Path) -> None:
    write(tmp_path / "sub", __init__="X = 1\n", mod="Y = 2\n")
    lines = [
        "import sub.mod",
        "from sub import X, mod",
        "from .helper import Z",
        "import importlib",
        "H = importlib.import_module('helper').Z",
    ]
    mine = plugin.load("verl.rewards", str(write(tmp_path, helper="Z = 3\n", mine="\n".join(lines) + "\n") / "mine.py"))
    assert (mine.sub.mod.Y, mine.X, mine.mod.Y, mine.Z, mine.H) == (2, 1, 2, 3, 3)


def test_neighbours_shadow_no_module_of_python_and_none_of_a_library(tmp_path: Path) -> None:
    bad = "raise RuntimeError('the wrong file')\n"
    text = "import json, random\nimport rich.tree\nfrom rich.console import Console\n"
    folder = write(tmp_path, json=bad, random=bad, markdown_it=bad, pygments=bad, mine=text)
    assert plugin.load("verl.rewards", str(folder / "mine.py")).json.loads("1") == 1
    done = subprocess.run([sys.executable, "-c", "import rich.markdown"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0


def test_a_file_with_the_name_of_a_library_may_import_it(tmp_path: Path) -> None:
    folder = write(tmp_path, safetensors="from safetensors import safe_open\n")
    assert callable(plugin.load("verl.rewards", str(folder / "safetensors.py")).safe_open)


def test_a_folder_with_data_is_no_module(tmp_path: Path) -> None:
    (tmp_path / "yaml").mkdir()
    mine = plugin.load("verl.rewards", str(write(tmp_path, mine="import yaml\n") / "mine.py"))
    assert mine.yaml.safe_load("1") == 1


@pytest.mark.parametrize(
    ("helper", "place"),
    [
        ("def f():\n    return {}['no']\n", "helper.py:2"),
        ("import json\n\n\ndef f():\n    json.loads('{')\n", "helper.py:5"),
        ("def f(:\n", "helper.py:1"),
    ],
)
def test_an_error_in_a_neighbour_names_its_line(tmp_path: Path, helper: str, place: str) -> None:
    folder = write(tmp_path, helper=helper, mine="import helper\nhelper.f()\n")
    with pytest.raises(UserError, match="fails when it is imported") as caught:
        plugin.load("verl.rewards", str(folder / "mine.py"))
    assert str(caught.value.where).endswith(place)


NAMED = "from verl import plugin; print(plugin.load('verl.rewards', 'own.mine').VALUE)"


@pytest.mark.parametrize("path", [["", str(ROOT)], [str(ROOT)]])
def test_a_module_of_the_current_folder_may_be_named_from_a_script_too(tmp_path: Path, path: list[str]) -> None:
    write(tmp_path / "own", mine="from own.helper import VALUE\n", helper="import beside\nVALUE = beside.VALUE\n")
    write(tmp_path, beside="VALUE = 7\n")
    command = [sys.executable, "-c", f"import sys; sys.path[:1] = {path!r}; {NAMED}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "7\n", done.stderr


def test_a_named_module_that_fails_is_named_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "failing_package", mine="import json\njson.loads('{')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="JSONDecodeError") as caught:
        plugin.load("verl.rewards", "failing_package.mine")
    assert str(caught.value.where).endswith("mine.py:2")


@pytest.mark.parametrize("end", ["import os\nos._exit(0)\n", "import sys\nsys.exit(0)\n", "from os import _exit\n_exit(3)\n"])
def test_a_file_that_ends_the_process_when_it_is_imported_is_an_error(tmp_path: Path, end: str) -> None:
    with pytest.raises(UserError, match=r"fails when it is imported: SystemExit: [03]") as error:
        plugin.load("verl.rewards", str(write(tmp_path, mine=end) / "mine.py"))
    assert str(error.value.where).endswith("mine.py:2")


def test_a_fork_that_a_file_makes_when_it_is_imported_may_end(tmp_path: Path) -> None:
    fork = "import os\nchild = os.fork()\nif child == 0:\n    os._exit(7)\nCODE = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])\n"
    assert plugin.load("verl.rewards", str(write(tmp_path, mine=fork) / "mine.py")).CODE == 7


def test_an_interrupt_that_a_file_raises_when_it_is_imported_is_an_error(tmp_path: Path) -> None:
    folder = write(tmp_path, mine="X = 1\nraise KeyboardInterrupt\n", beside="import mine\n")
    with pytest.raises(UserError, match="fails when it is imported: RuntimeError: raised KeyboardInterrupt") as error:
        plugin.load("verl.rewards", str(folder / "mine.py"))
    assert str(error.value.where).endswith("mine.py:2")
    with pytest.raises(UserError, match="raised KeyboardInterrupt"):
        plugin.load("verl.rewards", str(folder / "beside.py"))


def test_ctrl_c_while_a_file_is_imported_is_an_interrupt(tmp_path: Path) -> None:
    text = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(10)\n"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start what runs in the background without it
    try:
        with pytest.raises(KeyboardInterrupt):
            plugin.load("verl.rewards", str(write(tmp_path, mine=text) / "mine.py"))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_file_that_takes_long_to_import_is_named_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(user_files, "SECONDS_BEFORE_NOTE", 0.2)
    plugin.load("verl.rewards", str(write(tmp_path, mine="import time\ntime.sleep(1)\n") / "mine.py"))
    assert "mine.py is being imported, for 0.2 s so far" in capfd.readouterr().err


def test_a_file_that_was_edited_is_imported_anew_with_its_neighbours(tmp_path: Path) -> None:
    path = write(tmp_path, mine="import helper\nX = helper.X\n", helper="X = 1\n") / "mine.py"
    assert plugin.load("verl.rewards", str(path)).X == 1
    write(tmp_path, mine="import helper\nX = 10 * helper.X\n", helper="X = 2\n")
    assert plugin.load("verl.rewards", str(path)).X == 20
