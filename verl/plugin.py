"""A plugin is a file: a name is a module of a folder of verl, a dotted name is any module, a path is the user's own file."""

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

_files: dict[Path, tuple[bytes, ModuleType]] = {}  # users' files that have run, with what they said then


def _unknown(kind: str, name: str, existing: list[str]) -> UserError:
    near = difflib.get_close_matches(name, existing, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"no {kind} named {name!r}", fix=f"{hint}{', '.join(existing)}, or path/to/file.py")


def names(package: str) -> list[str]:
    """Names of the plugins that a package of verl holds, such as `names("verl.loggers")`."""
    folder = importlib.import_module(package).__path__
    return sorted(module.name for module in pkgutil.iter_modules(folder) if not module.name.startswith("_"))


def load(package: str, name: str, *, needs: tuple[str, ...] = ()) -> ModuleType:
    """The module that a name in the config stands for.

    Args:
        package: the folder that bare names are looked up in, such as `verl.loggers`.
        name: a bare name (`wandb`), a dotted module (`mine.loggers.csv`), or a path that ends in `.py`.
        needs: functions that the module has to have.
    Raises:
        UserError: no such file, module or name, with the names that exist; or a needed function is missing.
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
    """What the plugins of a group of keys are, such as those of `algorithm`.

    Attributes:
        package: the folder that bare names are looked up in.
        kind: what one of them is called in errors.
        needs: what its module must have.
        named_by: the key that names one of them, or a list; None: the group's own `name`.
    """

    package: str
    kind: str
    needs: tuple[str, ...]
    named_by: str | None = None

    def load(self, key: str, name: str) -> ModuleType:
        """The module that the key `key` names.

        Raises:
            UserError: no such module, or one of another kind.
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
        """Those of the package, by name."""
        modules = {name: load(self.package, name) for name in names(self.package)}
        return {name: module for name, module in modules.items() if self._is_one(module)}

    def _is_one(self, module: ModuleType) -> bool:
        return all(hasattr(module, attribute) for attribute in self.needs)


def _from_file(path: Path, kind: str) -> ModuleType:
    """The module of a file. As an import does, it runs once however often it is asked for, and anew only if it says something else."""
    if not path.is_file():
        raise UserError(f"no such file for a plugin of {kind}", where=str(path), fix=f"the current folder is {Path.cwd()}")
    place, said = path.resolve(), _read(path)
    before, module = _files.get(place, (None, None))
    if module is None or before != said:
        module = _run(path, said, f"verl_plugin_{path.stem}_{zlib.crc32(bytes(place)):08x}")
        _files[place] = said, module
    return module


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path), fix="give a file that you may read") from error


def _run(path: Path, said: bytes, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        # Not by the spec's loader, which may take the compiled file of a moment ago for this one.
        exec(compile(said, str(path), "exec"), module.__dict__)  # noqa: S102
    except Exception as error:  # a user's file fails as it likes
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
        place = f"{path}:{line}" if line else str(path)
        raise UserError(f"fails when it is imported: {type(error).__name__}: {error}", where=place, fix="mend the file") from error
    return module
