"""The settings of a built-in plugin, without what its file imports: to check a command line or to print its keys, torch is not needed.

An outline is a module with the `Settings` of the plugin's file, in which all its other names are there and have no value.
"""

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from verl import plugin

# What `Settings` are made with: modules that import no library that takes time.
LIGHT = (
    "dataclasses",
    "typing",
    "collections.abc",
    "verl.errors",
    "verl.config",
    "verl.plugin",
    "verl.algorithms._settings",
    "verl.algorithms._checks",
)


@contextmanager
def outlined() -> Iterator[None]:
    """In this context, `verl.plugin` loads outlines of built-in plugins that have not been imported yet."""
    before, plugin.import_built_in = plugin.import_built_in, lambda name: outline(name) or importlib.import_module(name)
    try:
        yield
    finally:
        plugin.import_built_in = before


def outline(name: str) -> ModuleType | None:
    """Return the outline of a module of verl; None if it has been imported, or cannot be outlined."""
    if name in sys.modules:
        return None
    key = f"{name} (outline)"
    if key not in sys.modules:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            return None
        module = ModuleType(key)
        module.__file__ = spec.origin  # where `inspect` finds the comments
        sys.modules[key] = module
        try:
            _fill(module, ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
        except Exception:  # what cannot be made of a part of the file is made by importing all of it
            del sys.modules[key]
            return None
    return sys.modules[key]


def _fill(module: ModuleType, tree: ast.Module) -> None:
    kept = [node for node in tree.body if _is_needed(node)]
    for node in tree.body:
        for name in set(_names(node)) - {"Settings"}:
            setattr(module, name, None)
    code = compile(ast.Module(kept, []), str(module.__file__), "exec")
    exec(code, module.__dict__)  # noqa: S102  # statements of verl's own file, as an import would


def _is_needed(node: ast.stmt) -> bool:
    if isinstance(node, ast.ImportFrom):
        return any(node.module == name or (node.module or "").startswith(f"{name}.") for name in LIGHT)
    if isinstance(node, ast.Assign):  # a constant, which a message may name
        return isinstance(node.value, ast.Constant)
    return isinstance(node, ast.ClassDef) and node.name == "Settings"


def _names(node: ast.stmt) -> list[str]:
    """Return the names that a statement at the top of a file defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name.partition(".")[0] for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
