"""Loading of plugins. A bare name is a module in a package of verl, a dotted name is any module, a path is a user's own file."""

import difflib
import importlib
import importlib.util
import pkgutil
import sys
import traceback
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from verl.errors import UserError

_files: dict[Path, tuple[bytes, ModuleType]] = {}  # imported users' files: content and module by path


def _unknown(kind: str, name: str, existing: list[str]) -> UserError:
    near = difflib.get_close_matches(name, existing, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"no {kind} named {name!r}", fix=f"{hint}{', '.join(existing)}, or path/to/file.py")


def names(package: str) -> list[str]:
    """Return the names of the plugins in a package, as in `names("verl.loggers")`."""
    folder = importlib.import_module(package).__path__
    return sorted(module.name for module in pkgutil.iter_modules(folder) if not module.name.startswith("_"))


def load(package: str, name: str, *, needs: tuple[str, ...] = ()) -> ModuleType:
    """Load the module that a name in the config refers to.

    Args:
        package: package for bare names, such as `verl.loggers`.
        name: a bare name (`wandb`), a dotted module (`mine.loggers.csv`), or a path that ends in `.py`.
        needs: functions that the module must have.
    Raises:
        UserError: no such file, module or name; or a needed function is missing.
    """
    kind = package.rpartition(".")[2]
    if name.endswith(".py"):
        module = _from_file(Path(name).expanduser(), kind)
    elif "." in name:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(
                f"no module {error.name!r} for {kind} {name!r}", fix="check the spelling, or give the path of a .py file"
            ) from error
    else:
        existing = names(package)
        if name not in existing:
            raise _unknown(kind, name, existing)
        module = importlib.import_module(f"{package}.{name}")
    for function in needs:
        if not callable(getattr(module, function, None)):
            raise UserError(f"has no function {function!r}", where=name, fix=f"a plugin of {kind} needs {', '.join(needs)}")
    return module


@dataclass(frozen=True)
class Plugins:
    """The plugins of a config group, such as `algorithm`.

    Attributes:
        package: package for bare names.
        kind: name of such a plugin in error messages.
        needs: attributes that a plugin's module must have.
        named_by: the key that names a plugin or a list of plugins; None means the group's own `name`.
    """

    package: str
    kind: str
    needs: tuple[str, ...]
    named_by: str | None = None

    def load(self, key: str, name: str) -> ModuleType:
        """Load the plugin `name`, which the user gave for `key`.

        Raises:
            UserError: no such module, or it is not a plugin of this kind.
        """
        if "." not in name and name not in names(self.package):
            raise _unknown(self.package.rpartition(".")[2], name, list(self.built_in()))
        module = load(self.package, name)
        if not self._is_one(module):
            missing = next(attribute for attribute in self.needs if not hasattr(module, attribute))
            fix = f"{', '.join(self.built_in())}, or path/to/file.py with {', '.join(self.needs)}"
            raise UserError(f"is no {self.kind}: it has no {missing!r}", where=f"{key}={name}", fix=fix)
        return module

    def built_in(self) -> dict[str, ModuleType]:
        """Return the built-in plugins, by name."""
        modules = {name: load(self.package, name) for name in names(self.package)}
        return {name: module for name, module in modules.items() if self._is_one(module)}

    def _is_one(self, module: ModuleType) -> bool:
        return all(hasattr(module, attribute) for attribute in self.needs)


def _from_file(path: Path, kind: str) -> ModuleType:
    """Import a file. Like any import, it runs only once, unless its content has changed."""
    if not path.is_file():
        raise UserError(f"no such file for a plugin of {kind}", where=str(path), fix=f"the current folder is {Path.cwd()}")
    place, source = path.resolve(), _read(path)
    before, module = _files.get(place, (None, None))
    if module is None or before != source:
        module = _run(path, source, f"verl_plugin_{path.stem}_{zlib.crc32(bytes(place)):08x}")
        _files[place] = source, module
    return module


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path), fix="make the file readable") from error


def _run(path: Path, source: bytes, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        # The spec's loader is not used, because it could load stale bytecode of a file that has just changed.
        exec(compile(source, str(path), "exec"), module.__dict__)  # noqa: S102
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
        place = f"{path}:{line}" if line else str(path)
        raise UserError(f"fails when it is imported: {type(error).__name__}: {error}", where=place, fix="correct the file") from error
    return module
