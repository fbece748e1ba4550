"""`make shape` finds what is wrong with a small package that was made up for it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import shape
from shape import Example

LAYERS = "[importlinter:contract:arrows]\nlayers =\n    cli\n    engine | eval\n    data\n"
SOUND = {
    "verl/__init__.py": "__version__ = '1'\n",
    "verl/cli.py": "from verl.engine import step\n",
    "verl/engine/__init__.py": "",
    "verl/engine/step.py": "from ..data import rows\nfrom .rule import halve as halved\n\n\ndef run(batch, rate):\n    return rows\n",
    "verl/engine/rule.py": "from typing import NamedTuple\n\nHALF = 0.5\n\n\ndef halve(x):\n    return x * HALF\n",
    "verl/eval.py": "import verl.data.rows\n",
    "verl/data/__init__.py": "",
    "verl/data/rows.py": "from verl import __version__\n",
}


def write(root: Path, **more: str) -> Path:
    """The sound package, where `engine_rule="…"` adds lines to verl/engine/rule.py."""
    added = {f"verl/{name.replace('_', '/', 1)}.py": text for name, text in more.items()}
    for name in SOUND.keys() | added.keys():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(SOUND.get(name, "") + added.get(name, ""))
    (root / ".importlinter").write_text(LAYERS)
    return root


def found(root: Path) -> dict[str, list[str]]:
    return {row.what: row.details for row in shape.arrow_rows(root, shape.read_modules(root))}


CIRCLES, IN_FUNCTIONS, FOR_TYPES, UP = found_rows = (
    "import circles",
    "import circles, imports in functions too",
    "import circles, for type checkers too",
    "imports that point up or sideways",
)
CIRCLE = "verl.engine.rule <-> verl.engine.step"


def test_a_sound_package_has_no_circle_and_no_arrow_up(tmp_path: Path) -> None:
    assert found(write(tmp_path)) == {row: [] for row in found_rows}


@pytest.mark.parametrize(
    ("line", "rows"),
    [
        ("import verl.engine.step\n", {CIRCLES, IN_FUNCTIONS, FOR_TYPES}),
        ("from . import step\n", {CIRCLES, IN_FUNCTIONS, FOR_TYPES}),
        ("class Late:\n    from verl.engine.step import run\n", {CIRCLES, IN_FUNCTIONS, FOR_TYPES}),
        ("def late():\n    from verl.engine.step import run\n", {IN_FUNCTIONS, FOR_TYPES}),
        ("if TYPE_CHECKING:\n    from verl.engine.step import run\n", {FOR_TYPES}),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    from verl.engine.step import run\n", {CIRCLES, IN_FUNCTIONS, FOR_TYPES}),
    ],
)
def test_a_circle_is_found_wherever_the_import_stands(tmp_path: Path, line: str, rows: set[str]) -> None:
    circles = found(write(tmp_path, engine_rule=line))
    assert {row for row, details in circles.items() if details == [CIRCLE]} == rows
    assert not any(details for row, details in circles.items() if row not in rows)


def test_what_the_package_tells_type_checkers_of_its_own_names_is_no_circle(tmp_path: Path) -> None:
    root = write(tmp_path, data_rows="import verl\n")
    for line, circles in (
        ("if TYPE_CHECKING:\n    from verl.data.rows import verl\n", []),
        ("import verl.data.rows\n", ["verl <-> verl.data.rows"]),
    ):
        (root / "verl/__init__.py").write_text(line)
        assert found(root)[FOR_TYPES] == circles


def test_a_circle_of_three_is_one_circle(tmp_path: Path) -> None:
    assert found(write(tmp_path, data_rows="import verl.cli\n"))[CIRCLES] == ["verl.cli <-> verl.data.rows <-> verl.engine.step"]


@pytest.mark.parametrize("line", ["from verl.cli import main\n", "from verl import eval\n", "def late():\n    import verl.eval\n"])
def test_an_import_from_above_or_beside_is_found(tmp_path: Path, line: str) -> None:
    where = "verl.cli" if "cli" in line else "verl.eval"
    assert found(write(tmp_path, engine_rule=line))[UP] == [f"verl.engine.rule -> {where}"]


def test_the_layers_are_those_of_the_linter() -> None:
    layers = shape.read_layers(shape.ROOT)
    assert (
        layers[0] == {"__main__"}
        and layers[-2:] == [{"errors"}, {"redaction", "safe_path", "choices"}]
        and any({"trainer", "eval"} <= rooms for rooms in layers)
    )


def test_reach_counts_packages_only_if_they_import_something(tmp_path: Path) -> None:
    modules = shape.read_modules(write(tmp_path))
    reached = shape.reached(shape.import_graph(modules), "verl.eval")
    assert reached == {"verl", "verl.eval", "verl.data", "verl.data.rows"}
    assert {name for name in reached if modules[name].counts} == {"verl.eval", "verl.data.rows"}


def test_what_a_package_imports_is_reached_by_its_modules(tmp_path: Path) -> None:
    modules = shape.read_modules(write(tmp_path, data___init__="import verl.engine.rule\n"))
    assert "verl.engine.rule" in shape.reached(shape.import_graph(modules), "verl.eval")


def test_functions_are_measured_without_self_and_without_kernels(tmp_path: Path) -> None:
    long = "class A:\n    def long(self, a, /, b, *c, d=1, **e):\n" + "        a = b\n" * 60
    root = write(tmp_path, engine_rule=long, engine_rule_triton=long)
    functions = {f.place.split()[1]: f for f in shape.read_functions(shape.read_modules(root)) if f.place.startswith("rule")}
    assert (functions["long"].lines, functions["long"].parameters) == (61, 5)
    assert (functions["halve"].lines, functions["halve"].parameters) == (2, 1)
    assert [f.place for f in shape.read_functions(shape.read_modules(root)) if f.place.startswith("rule_triton")] == []


# The linter


@pytest.mark.parametrize(
    ("file", "line", "told"),
    [
        ("dist.py", "def late():\n    import verl.trainer.loop\n", "verl.dist is not allowed to import verl.trainer"),
        ("rewards/format.py", "import verl.rollout.hf\n", "verl.rewards is not allowed to import verl.rollout"),
        ("cellar.py", "", "verl.cellar"),
        ("data/pack.py", "import verl.data.loader\n", "No cycles are allowed in verl.data"),
        ("algorithms/sft.py", "import verl.engine.scorers\n", "verl.algorithms is not allowed to import verl.engine"),
        ("loggers/console.py", "if TYPE_CHECKING:\n    import verl.cli\n", None),
    ],
)
def test_make_check_holds_the_arrows(tmp_path: Path, file: str, line: str, told: str | None) -> None:
    shutil.copytree(shape.ROOT / "verl", tmp_path / "verl", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(shape.ROOT / ".importlinter", tmp_path)
    with (tmp_path / "verl" / file).open("a") as module:
        module.write(line)
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-logo", "--no-cache"], cwd=tmp_path, capture_output=True, text=True, env={"COLUMNS": "200"})
    assert done.returncode == (0 if told is None else 1), done.stderr
    assert (told or "0 broken") in done.stdout


# Examples

EXAMPLE = Example("a loss", "examples/loss.py")
USES = "from verl.engine.rule import HALF, halve\nimport verl.data.rows\nfrom verl.engine import step\nimport torch\n"


def with_example(root: Path, text: str, *, tested: bool = True, **more: str) -> tuple[int | None, list[str]]:
    write(root, **more)
    for name, content in {"examples/loss.py": text, "tests/a/test_it.py": "RUN = 'examples/loss.py'" if tested else ""}.items():
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text(content)
    return shape.files_to_touch(EXAMPLE, root, shape.read_modules(root))


def test_an_example_that_the_package_does_not_name_is_one_file(tmp_path: Path) -> None:
    assert with_example(tmp_path, USES) == (1, [])


def test_a_list_that_names_the_example_is_a_file_to_touch(tmp_path: Path) -> None:
    assert with_example(tmp_path, USES, cli="KNOWN = ['loss']\n") == (2, [])


@pytest.mark.parametrize(("line", "missing"), [("from verl.engine.rule import third", "third"), ("import verl.nothing", "nothing")])
def test_an_example_whose_imports_are_gone_does_not_count(tmp_path: Path, line: str, missing: str) -> None:
    number, (wrong,) = with_example(tmp_path, USES + line)
    assert number is None and missing in wrong


def test_an_example_without_a_test_does_not_count(tmp_path: Path) -> None:
    assert with_example(tmp_path, USES, tested=False) == (None, ["examples/loss.py: no test names it"])


def test_no_example_is_said_so(tmp_path: Path) -> None:
    assert shape.files_to_touch(EXAMPLE, write(tmp_path), {}) == (None, ["examples/loss.py: no example yet"])


# The table


def test_the_exit_code_is_1_if_a_wanted_number_is_missed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [shape.Row("circles", 1, 0, ["a <-> b"]), shape.Row("lines", 1234)]
    assert shape.report(rows[1:]) == 0 and shape.report([shape.Row("modules", 3, 3)]) == 0
    capsys.readouterr()
    assert shape.report(rows) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["circles", "1", "0", "missed"] and lines[2].split() == ["lines", "1,234"]
    assert lines[-2:] == ["circles:", "  a <-> b"]


def test_what_is_missing_is_missed() -> None:
    assert shape.report([shape.Row("files to touch", None, 1)]) == 1


def test_this_checkout_can_be_measured() -> None:
    found = {row.what: row.found for row in shape.measure(shape.ROOT)}
    assert (found["lines"] or 0) > 10_000 and (found["lines of the median function"] or 0) < 10
