"""Loading of plugins. A bare name is a module in a package of verl, a dotted name is any module, a path is a user's own file."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from verl.errors import UserError

import_built_in: Callable[[str], ModuleType] = importlib.import_module  # verl.plugin_outline replaces it for a while


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
    if "." in name:
        from verl import user_files  # most runs have none

        module = user_files.from_file(Path(name).expanduser(), kind) if name.endswith(".py") else user_files.from_name(name, kind)
    else:
        existing = names(package)
        if name not in existing:
            from verl.plugin_errors import unknown

            raise unknown(kind, name, existing)
        module = import_built_in(f"{package}.{name}")
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
        any_of: whether one of the attributes in `needs` is enough.
    """

    package: str
    kind: str
    needs: tuple[str, ...]
    named_by: str | None = None
    any_of: bool = False

    def load(self, key: str, name: str) -> ModuleType:
        """Load the plugin `name`, which the user gave for `key`.

        Raises:
            UserError: no such module, or it is not a plugin of this kind.
        """
        if "." not in name and name not in names(self.package):
            from verl.plugin_errors import unknown

            raise unknown(self.package.rpartition(".")[2], name, list(self.built_in()), where=key)
        module = load(self.package, name)
        if not self._is_one(module):
            missing = [repr(attribute) for attribute in self.needs if not hasattr(module, attribute)]
            fix = f"{', '.join(self.built_in())}, or path/to/file.py with {(' or ' if self.any_of else ', ').join(self.needs)}"
            what = f"is no {self.kind}: it has no {' and no '.join(missing) if self.any_of else missing[0]}"
            raise UserError(what, where=f"{key}={name}", fix=fix)
        return module

    def built_in(self) -> dict[str, ModuleType]:
        """Return the built-in plugins, by name."""
        modules = {name: load(self.package, name) for name in names(self.package)}
        return {name: module for name, module in modules.items() if self._is_one(module)}

    def _is_one(self, module: ModuleType) -> bool:
        return (any if self.any_of else all)(hasattr(module, attribute) for attribute in self.needs)
