"""`make shape`: how the code hangs together, in numbers, with the wanted ones beside them.

    python tests/shape.py [FOLDER]     measure this checkout or another one; exit code 1 if a wanted number is missed

It reads the source and imports none of it. Importing `verl.engine.optim` also imports `verl.engine` and `verl`; such an `__init__.py`
is counted if it imports something. Kernels (`*_triton.py`) are left out where functions are measured.
"""

import ast
import configparser
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "verl"
SFT_ENTRY = f"{PACKAGE}.trainer.fsdp_sft_trainer"
LONGEST, MOST_PARAMETERS = 60, 8

Graph = Mapping[str, set[str]]  # module -> modules that it imports


# Modules and what they import


@dataclass(frozen=True)
class Module:
    name: str
    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def lines(self) -> int:
        return self.text.count("\n")

    @property
    def counts(self) -> bool:
        return self.path.name != "__init__.py" or any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(self.tree))


def read_modules(root: Path, package: str = PACKAGE) -> dict[str, Module]:
    """Modules of a package by their full names."""
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = Module(name, path)
    return found


def import_graph(modules: Mapping[str, Module], *, functions: bool = False, types: bool = False) -> Graph:
    """What each module imports at its top level, and also in its functions, and also under `if TYPE_CHECKING:`."""
    graph: dict[str, set[str]] = {}
    for name, module in modules.items():
        targets = {target for node in _nodes(module.tree, functions, types) for target in _targets(node, module)}
        graph[name] = {known for target in targets if (known := _known(target, modules))} - {name}
    return graph


def _nodes(tree: ast.AST, functions: bool, types: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        inside = node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not functions:
            inside = ast.Module([], [])
        if not types and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            inside = ast.Module(node.orelse, [])
        yield node
        yield from _nodes(inside, functions, types)


def _targets(node: ast.AST, module: Module) -> list[str]:
    """The full names that an import statement asks for."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        package = module.name if module.path.name == "__init__.py" else module.name.rpartition(".")[0]
        above = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*above, *filter(None, [node.module])])
    return [f"{base}.{alias.name}" for alias in node.names]


def _known(target: str, modules: Mapping[str, Module]) -> str | None:
    """The module that a name is, or is defined in."""
    return next((name for name in (target, target.rpartition(".")[0]) if name in modules), None)


def reached(graph: Graph, start: str) -> set[str]:
    """Every module that importing this one imports, itself and the packages around each included."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name in graph and name not in found:
            found.add(name)
            waiting += [*graph[name], name.rpartition(".")[0]]
    return found


def circles(graph: Graph) -> list[list[str]]:
    """Groups of modules of which each imports every other, directly or through others."""
    below = {name: _below(graph, name) for name in graph}
    groups = {frozenset(other for other in below[name] if name in below[other]) for name in graph}
    return sorted(sorted(group) for group in groups if group)


def _below(graph: Graph, start: str) -> set[str]:
    found: set[str] = set()
    waiting = [*graph[start]]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += graph[name]
    return found


def read_layers(root: Path) -> list[set[str]]:
    """Rooms of the package, from the top, as the contract in .importlinter has them."""
    parser = configparser.ConfigParser()
    parser.read_string((root / ".importlinter").read_text(encoding="utf-8"))
    lines = parser["importlinter:contract:arrows"]["layers"].split("\n")
    return [{room.strip() for room in line.split("|")} for line in lines if line.strip()]


def upward(graph: Graph, layers: list[set[str]]) -> list[str]:
    """Imports from a room above or beside the module's own."""
    floor = {room: number for number, rooms in enumerate(layers) for room in rooms}
    arrows = ((name, other) for name in sorted(graph) for other in sorted(graph[name]))
    return [f"{a} -> {b}" for a, b in arrows if _room(a) != _room(b) and _points_up(floor, _room(a), _room(b))]


def _room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def _points_up(floor: Mapping[str, int], room: str, other: str) -> bool:
    """The package itself, which holds the version, is below all; the linter reports a room without a layer."""
    return room in floor and other in floor and floor[other] <= floor[room]


# Functions


@dataclass(frozen=True)
class Function:
    place: str
    lines: int
    parameters: int


def read_functions(modules: Mapping[str, Module]) -> list[Function]:
    """Functions and methods, kernels aside."""
    found = []
    for module in modules.values():
        if not module.path.name.endswith("_triton.py"):
            for node in ast.walk(module.tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    lines = (node.end_lineno or node.lineno) - node.lineno + 1
                    found.append(Function(f"{module.path.name}:{node.lineno} {node.name}", lines, _parameters(node)))
    return found


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Without `self` and `cls`."""
    arguments = function.args
    several = [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
    named = [*arguments.posonlyargs, *arguments.args]
    return len(named) + len(arguments.kwonlyargs) + len(several) - (bool(named) and named[0].arg in ("self", "cls"))


# Files to touch for something new: worked examples, each a file that needs no edit of the package


@dataclass(frozen=True)
class Example:
    what: str
    file: str
    wanted: int = 1


EXAMPLES = (
    Example("an RL method with keys of its own", "examples/algorithms/asymre.py"),
    Example("a preference loss", "examples/algorithms/cpo.py"),
    Example("a reward with keys of its own", "examples/rewards/cosine_length.py"),
    Example("an environment with keys of its own", "examples/environments/countdown.py"),
    Example("an optimizer", "examples/optimizers/lion.py", 2),
    Example("a teacher for distillation", "examples/algorithms/distillation.py"),
)


def files_to_touch(example: Example, root: Path, modules: Mapping[str, Module]) -> tuple[int | None, list[str]]:
    """The example's own file and those of the package that name it; None where it is not there, or cannot work.

    Returns:
        the number, and what is wrong with the example.
    """
    path = root / example.file
    if not path.exists():
        return None, [f"{example.file}: no example yet"]
    missing = [f"{example.file}: imports {target}, which is not there" for target in _missing(path, root, modules)]
    tests = [test.read_text(encoding="utf-8") for test in (root / "tests").rglob("test_*.py")]
    if not any(re.search(rf"\b{path.stem}\b", text) and "examples" in text for text in tests):
        missing.append(f"{example.file}: no test names it")
    return (None, missing) if missing else (1 + sum(_names(module, path.stem) for module in modules.values()), [])


def _missing(path: Path, root: Path, modules: Mapping[str, Module]) -> list[str]:
    """Imports of the package in a file that nothing in the package answers to."""
    module = Module(path.stem, path)
    targets = [target for node in ast.walk(module.tree) for target in _targets(node, module) if target.split(".")[0] == PACKAGE]
    return [target for target in targets if target not in modules and not _defines(modules.get(target.rpartition(".")[0]), target)]


def _defines(module: Module | None, target: str) -> bool:
    """Whether a module has a name: it defines, assigns or imports it."""
    if module is None:
        return False
    name = target.rpartition(".")[2]
    return any(name in (getattr(node, "name", None), getattr(node, "id", None)) for node in _nodes(module.tree, False, False))


def _names(module: Module, name: str) -> bool:
    """Whether a module has the name in a string of its own, as a list of what there is or a special case would."""
    return any(isinstance(node, ast.Constant) and node.value == name for node in ast.walk(module.tree))


# The table


@dataclass(frozen=True)
class Row:
    what: str
    found: int | None
    wanted: int | None = None
    details: list[str] = field(default_factory=list)

    @property
    def missed(self) -> bool:
        return self.wanted is not None and (self.found is None or self.found > self.wanted)


def measure(root: Path) -> list[Row]:
    modules = read_modules(root)
    return [*arrow_rows(root, modules), *reach_rows(modules), *example_rows(root, modules), *size_rows(modules)]


def arrow_rows(root: Path, modules: Mapping[str, Module]) -> list[Row]:
    top, inner, all_of_them = (import_graph(modules, functions=f, types=t) for f, t in ((False, False), (True, False), (True, True)))
    all_of_them = {
        **all_of_them,
        PACKAGE: inner[PACKAGE],
    }  # what the package's own names are, it tells type checkers, and imports when asked
    found = {"": circles(top), ", imports in functions too": circles(inner), ", for type checkers too": circles(all_of_them)}
    up = upward(inner, read_layers(root))
    return [
        *(Row(f"import circles{kind}", len(groups), 0, [" <-> ".join(group) for group in groups]) for kind, groups in found.items()),
        Row("imports that point up or sideways", len(up), 0, up),
    ]


def reach_rows(modules: Mapping[str, Module]) -> list[Row]:
    graph = import_graph(modules)
    sft, grpo, entry = (
        [modules[name] for name in reached(graph, start) if modules[name].counts]
        for start in (f"{PACKAGE}.algorithms.sft", f"{PACKAGE}.algorithms.grpo", SFT_ENTRY)
    )
    return [
        Row("modules that algorithms/sft.py reaches", len(sft) - 1, 10, _listed(sft)),  # not counting itself
        Row("modules that algorithms/grpo.py reaches", len(grpo) - 1, 14, _listed(grpo)),
        Row("modules that the SFT entry reaches", len(entry) - 1, 50, _listed(entry)),
        Row("lines that the SFT entry reaches", sum(module.lines for module in entry), 9000),
    ]


def _listed(modules: list[Module]) -> list[str]:
    return [f"{module.name} ({module.lines} lines)" for module in sorted(modules, key=lambda module: module.name)]


def example_rows(root: Path, modules: Mapping[str, Module]) -> list[Row]:
    found = {example: files_to_touch(example, root, modules) for example in EXAMPLES}
    return [Row(f"files to touch: {e.what}", number, e.wanted, wrong) for e, (number, wrong) in found.items()]


def size_rows(modules: Mapping[str, Module]) -> list[Row]:
    functions = sorted(read_functions(modules), key=lambda function: -function.lines)
    long = [f"{f.place}: {f.lines} lines" for f in functions if f.lines > LONGEST]
    wide = [f"{f.place}: {f.parameters} parameters" for f in functions if f.parameters > MOST_PARAMETERS]
    return [
        Row(f"functions over {LONGEST} lines", len(long), 0, long),
        Row(f"functions with more than {MOST_PARAMETERS} parameters", len(wide), 0, wide),
        Row("lines of the longest function", functions[0].lines),
        Row("lines of the median function", int(median(function.lines for function in functions))),
        Row("files", len(modules)),
        Row("lines", sum(module.lines for module in modules.values())),
    ]


def report(rows: list[Row]) -> int:
    """Print the table, and under it what is behind each number that was missed; 1 if there is one."""
    print(f"{'':<52}{'found':>8}{'wanted':>16}")
    for row in rows:
        found = "none" if row.found is None else f"{row.found:,}"
        wanted = "" if row.wanted is None else f"at most {row.wanted:,}" if row.wanted else "0"
        print(f"{row.what:<52}{found:>8}{wanted:>16}{'  missed' if row.missed else ''}".rstrip())
    for row in rows:
        if row.missed and row.details:
            print(f"\n{row.what}:", *row.details, sep="\n  ")
    return int(any(row.missed for row in rows))


if __name__ == "__main__":
    raise SystemExit(report(measure(Path(sys.argv[1]) if sys.argv[1:] else ROOT)))
