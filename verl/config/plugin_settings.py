"""Config keys of plugins: a method, a reward or an optimizer declares its keys as a dataclass `Settings` in its own file.

A config group such as `algorithm` is a dataclass of the keys that all of its plugins share; its `plugins` says where to find them. When the
plugin's name is known, the fields of the module's `Settings` are added to the group, with their types, defaults and comments. A field with
the name of a shared key changes the default of that key.

`Settings` may have `check(self) -> None`, which raises an error for a wrong value. If it raises a UserError, `where` is the key's name
without the group.
"""

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, TypeVar

from omegaconf import MISSING

from verl.errors import UserError
from verl.plugin import Plugins

Config = TypeVar("Config")


@dataclass
class NoSettings:
    """The `Settings` of a module that has none."""


@dataclass(frozen=True)
class Group:
    """A config group that has plugins.

    Attributes:
        path: key of the group, such as `critic.optim`.
        keys: the dataclass with the group's values.
        plugins: where its plugins are found.
        names: names of its plugins, as in the config.
    """

    path: str
    keys: Any
    plugins: Plugins
    names: list[str]

    @property
    def named_by(self) -> str:
        """Return the key that names the plugins."""
        return self.plugins.named_by or f"{self.path}.name"

    @property
    def shared(self) -> type:
        """Return the class of the keys that all plugins of the group share."""
        return next(kind for kind in type(self.keys).__mro__ if "plugins" in vars(kind))

    def settings(self) -> dict[str, type]:
        """Return the `Settings` class of each plugin, by name, each class once.

        Raises:
            UserError: no such plugin, or an invalid `Settings`.
        """
        found: dict[str, type] = {}
        for name in self.names:
            kind = settings_class(self.plugins.load(self.named_by, name))
            if kind not in found.values():
                found[name] = kind
        return found


def groups_of(config: Any) -> list[Group]:
    """Return the groups of a config that have plugins."""
    return [_group(config, path, keys) for path, keys in _walk(config) if hasattr(keys, "plugins")]


def _walk(keys: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(keys):
        value = getattr(keys, field.name)
        if dataclasses.is_dataclass(value):
            yield f"{prefix}{field.name}", value
            yield from _walk(value, f"{prefix}{field.name}.")


def _group(config: Any, path: str, keys: Any) -> Group:
    plugins: Plugins = keys.plugins
    given = keys.name if plugins.named_by is None else _at(config, plugins.named_by)
    names = given if isinstance(given, list) else [given]
    return Group(path, keys, plugins, [name for name in names if isinstance(name, str)])


def _at(config: Any, path: str) -> Any:
    """Return the value of a dotted key."""
    for name in path.split("."):
        config = getattr(config, name)
    return config


def completed(config: Config) -> Config:
    """Return a copy of the config with the keys of the plugins that it names added, at their defaults.

    Raises:
        UserError: no such plugin; two plugins have the same key; or a group has the keys of another plugin.
    """
    for group in groups_of(config):
        config = _with(config, group.path, _completed(group))
    return config


def _with(config: Config, path: str, value: Any) -> Config:
    name, _, rest = path.partition(".")
    changes: Any = {name: _with(getattr(config, name), rest, value) if rest else value}
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def _completed(group: Group) -> Any:
    shared, settings = group.shared, group.settings()
    _check_fields(group, shared, settings)
    kind = _joined(shared, tuple(settings.values()))
    if type(group.keys) is kind:
        return group.keys
    if type(group.keys) is not shared:
        fix, where = f"give it a {shared.__name__}, or the Settings of that file", f"{group.named_by}={', '.join(group.names)}"
        raise UserError(f"{group.path} has the keys of another {group.plugins.kind}", where=where, fix=fix)
    try:
        return _made(kind, group)
    except Exception as error:  # a default of a user's own may raise anything
        what = f"a default of its Settings cannot be made: {type(error).__name__}: {error}"
        raise UserError(what, where=f"{group.named_by}={', '.join(group.names)}", fix="correct the default there") from error


def _made(kind: type, group: Group) -> Any:
    """Return the group's values in the class that has the keys of its plugins too, with their defaults."""
    shared = group.shared
    plain = shared()
    values = {name: getattr(group.keys, name) for name in fields_of(shared)}
    return kind(**{name: value for name, value in values.items() if value != getattr(plain, name)})


def _check_fields(group: Group, shared: type, settings: dict[str, type]) -> None:
    """Raises UserError: two plugins have the same key, or a plugin redeclares a shared key with another type."""
    owners: dict[str, str] = {}
    for name, kind in settings.items():
        if reserved := {"name", "check"} & set(inspect.get_annotations(kind)):
            what = f"{reserved.pop()!r} cannot be a key of its Settings: every {group.plugins.kind} has one of this name"
            raise UserError(what, where=f"{group.named_by}={name}", fix="rename it")
        for key, hint in _own_hints(kind, shared).items():
            if key in owners and fields_of(kind)[key] is not fields_of(settings[owners[key]])[key]:  # both inherit the one
                what, fix = f"both {owners[key]} and {name} have a key {key!r}", "rename it in one of them"
                raise UserError(what, where=group.named_by, fix=fix)
            owners[key] = name
            if key in fields_of(shared) and hint != typing.get_type_hints(shared)[key]:
                what = f"{key!r} in its Settings is a key that every {group.plugins.kind} already has"
                raise UserError(what, where=f"{group.named_by}={name}", fix="rename it")


def _own_hints(kind: type, shared: type) -> dict[str, Any]:
    """Return the types of the fields of `Settings`, without shared keys that it inherits."""
    hints = typing.get_type_hints(kind)
    inherited = fields_of(shared) if issubclass(kind, shared) else {}
    return {name: hints[name] for name in fields_of(kind) if name not in inherited}


@cache
def _joined(shared: type, kinds: tuple[type, ...]) -> type:
    """Return a class with the shared keys and those of `kinds`; the same class for the same arguments."""
    if not kinds or all(kind is NoSettings for kind in kinds):
        return shared
    if len(kinds) == 1 and issubclass(kinds[0], shared):
        required = [f for f in fields_of(kinds[0]).values() if f.default is f.default_factory is dataclasses.MISSING]
        given = [(f.name, typing.get_type_hints(kinds[0])[f.name], dataclasses.field(default=MISSING, kw_only=True)) for f in required]
        return dataclasses.make_dataclass(shared.__name__, given, bases=kinds, namespace={"made_of": kinds}) if given else kinds[0]
    own = {name: (name, typing.get_type_hints(kind)[name], _copied(f)) for kind in kinds for name, f in fields_of(kind).items()}
    return dataclasses.make_dataclass(shared.__name__, own.values(), bases=(shared,), namespace={"made_of": kinds})


def _copied(field: Any) -> Any:
    """Copy a field. A field without a default must be given by the user."""
    if field.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=field.default_factory)
    return dataclasses.field(default=MISSING if field.default is dataclasses.MISSING else field.default)


def settings_class(module: ModuleType) -> type:
    """Return a module's `Settings` class, or NoSettings.

    Raises:
        UserError: it is not a dataclass, or the type of a field is not defined.
    """
    kind: type = getattr(module, "Settings", NoSettings)
    if "__dataclass_fields__" not in vars(kind):  # a subclass of a dataclass without @dataclass would lose its own fields
        raise UserError("Settings is not a dataclass", where=module.__file__, fix="write @dataclass above it")
    try:
        typing.get_type_hints(kind)
    except NameError as error:
        raise UserError(f"Settings: {error}", where=module.__file__, fix="import the types of its fields") from error
    return kind


def settings_of(keys: Any, module: ModuleType) -> Any:
    """Return an instance of a module's `Settings` with the values of its group; keys that the group lacks have their defaults."""
    kind = settings_class(module)
    return kind(**{name: getattr(keys, name) for name in fields_of(kind) if hasattr(keys, name)})


def check_settings(config: Any) -> None:
    """Run the `check` of each plugin's `Settings`.

    Raises:
        UserError: a value is wrong.
    """
    for group in groups_of(config):
        for name in group.names:
            settings = settings_of(group.keys, group.plugins.load(group.named_by, name))
            try:
                getattr(settings, "check", lambda: None)()
            except UserError as error:
                raise UserError(error.what, where=_placed(group.path, error.where, settings), fix=error.fix) from error
            except Exception as error:  # a user's file may raise anything
                fix = f"give another value in {group.path}"
                raise UserError(f"{type(error).__name__}: {error}", where=f"{group.named_by}={name}", fix=fix) from error


def _placed(path: str, where: str | None, settings: Any) -> str:
    """Return the full name of a key of `Settings`; any other place as it is."""
    if where is None:
        return path
    return f"{path}.{where}" if re.split(r"\W", where, maxsplit=1)[0] in fields_of(type(settings)) else where


def fields_of(kind: type) -> dict[str, Any]:
    return {f.name: f for f in dataclasses.fields(kind)}
