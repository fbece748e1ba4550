"""Builds a typed config from the command line: `--config FILE.yaml` (repeatable, later files win) and `key=value` (wins over files)."""

import difflib
import math
import numbers
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl import __version__
from verl.config.plugin_settings import check_settings, comment_on, completed, fields_of, groups_of, settings_class
from verl.config.spellings import ALIASES, HINTS, REJECTED
from verl.errors import UserError

Config = TypeVar("Config")
Given = Mapping[str, Any] | str  # other forms of a config in the Python API


def load_config(schema: type[Config], argv: list[str]) -> Config:
    """Build a config from command-line arguments, and check it.

    Args:
        schema: a dataclass of `verl.config`.
        argv: arguments after the command: `--config FILE`, `key=value`, `--help`.
    Raises:
        UserError: an invalid argument, key, type or value.
        SystemExit: after printing for `--help` or `--version`.
    """
    if {"-h", "--help"} & set(argv):
        print(describe(schema, argv))
        raise SystemExit(0)
    if "--version" in argv:
        print(__version__)
        raise SystemExit(0)
    given = _given(argv)
    defaults = _defaults(schema, given)
    config = _structured(defaults)
    for one in given:
        _assign(config, one, defaults)
    found: Config = _checked(config)
    return found


def _checked(config: DictConfig) -> Any:
    """Convert to the dataclass, and run its checks and those of its plugins.

    Raises:
        UserError: a required key is missing, an interpolation fails, or a value is invalid.
    """
    try:
        missing = sorted(str(key) for key in OmegaConf.missing_keys(config))
        if missing:
            fix = f"add {' '.join(f'{key}=…' for key in missing)}; --help lists all keys"
            raise UserError(f"{' and '.join(missing)} must be given", fix=fix)
        result: Any = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(_first_line(error), where=error.full_key, fix="correct the ${…} in the value") from error
    result.check()
    check_settings(result)
    return result


@dataclass(frozen=True)
class _Given:
    """A value that the user gives for a key. `where` is the file's name, or the key itself for a command-line argument."""

    key: str
    value: Any
    where: str

    @property
    def place(self) -> str:
        return self.key if self.where == self.key else f"{self.where}: {self.key}"


def _given(argv: list[str]) -> list[_Given]:
    """Return the values from files and arguments; later ones win."""
    files, pairs = _split(argv)
    in_files = [_Given(key, value, str(file)) for file in files for key, value in _leaves(_read_yaml(file))]
    return in_files + [_Given(key, _parse(key, text), key) for key, text in pairs]


def _defaults(schema: type[Config], given: list[_Given]) -> Config:
    """Return the schema's defaults with the plugins that the user names and these plugins' keys.

    Raises:
        UserError: no such plugin.
    """
    defaults: Config = schema()
    config = OmegaConf.structured(defaults)
    for one in given:
        if _canonical(one.key) in _keys(config) and not _asks_resolver(one.value):
            with suppress(OmegaConfBaseException):  # a value of the wrong type, which `_assign` refuses
                OmegaConf.update(config, _canonical(one.key), one.value)
    for key in (group.named_by for group in groups_of(defaults)):
        try:
            name = OmegaConf.select(config, key)
        except OmegaConfBaseException as error:
            raise UserError(_first_line(error), where=key, fix="write the name itself") from error
        _set(defaults, key, OmegaConf.to_container(name) if OmegaConf.is_config(name) else name)
    return completed(defaults)


def _set(config: Any, key: str, value: Any) -> None:
    *path, name = key.split(".")
    for group in path:
        config = getattr(config, group)
    setattr(config, name, value)


def _structured(defaults: object) -> DictConfig:
    try:
        config: DictConfig = OmegaConf.structured(defaults)
    except OmegaConfBaseException as error:
        fix = "in its Settings, use the types that a config supports (bool, int, float, str, lists of these, Any), with defaults to match"
        raise UserError(_first_line(error), where=_owner(defaults, error.full_key), fix=fix) from error
    return config


def _owner(defaults: object, key: str | None) -> str | None:
    """Return the location, for the error message, of a key in a plugin's `Settings` whose type OmegaConf does not support."""
    group = next((group for group in groups_of(defaults) if not _is_supported(group.keys)), None)
    return key if group is None else f"{group.named_by}={','.join(group.names)}: {group.path}.{str(key or '').rpartition('.')[2]}"


def _is_supported(keys: object) -> bool:
    try:
        OmegaConf.structured(keys)
    except OmegaConfBaseException:
        return False
    return True


def config_of(schema: type[Config], given: Sequence[object]) -> Config:
    """Build a config from the arguments of the Python API. They are converted to command-line arguments and checked like them.

    Args:
        schema: a dataclass of `verl.config`.
        given: instances of `schema`, mappings, and command-line arguments; later ones win. From a dataclass, only values that differ from
            the defaults are used.
    Raises:
        UserError: an argument is none of these, or a key, type or value is invalid.
    """
    return load_config(schema, [word for part in given for word in _words_of(part, schema)])


def _words_of(part: object, schema: type) -> list[str]:
    """Return one argument of the Python API as command-line arguments."""
    if isinstance(part, str):
        if part in ("-h", "--help", "--version"):
            raise UserError(f"found {part!r}", fix="docs/keys.md lists all keys, and verl.__version__ is the version")
        return [part]
    if isinstance(part, schema):
        completed(part)  # raises if a group has the keys of a plugin other than the one that it names
        defaults = dict(_leaves(_tree(schema())))
        return [f"{key}={_word(key, value)}" for key, value in _leaves(_tree(part)) if key not in defaults or defaults[key] != value]
    if isinstance(part, Mapping):
        return [f"{key}={_word(key, value)}" for key, value in _leaves(_tree(part))]
    what = f"the class {part.__name__}" if isinstance(part, type) else f"{type(part).__name__}"
    raise UserError(f"found {what}, expected {schema.__name__}, a dict or key=value", fix=f"{schema.__name__}() has the defaults")


def _tree(part: object) -> dict[str, Any]:
    """Return a dataclass or mapping as nested dicts, including attributes that are no fields, so that misspelled ones are reported."""
    values = dict(part) if isinstance(part, Mapping) else vars(part)
    return {str(key): _tree(value) if isinstance(value, Mapping) or _is_group(value) else value for key, value in values.items()}


def _is_group(value: object) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


def _word(key: str, value: object) -> str:
    """Return a value as text that `_parse` reads back."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, numbers.Integral):
        return str(int(value))
    if isinstance(value, numbers.Real):
        return repr(float(value)) if math.isfinite(value) else str(float(value)).replace("inf", ".inf").replace("nan", ".nan")
    if isinstance(value, (str, os.PathLike)):
        text = str(os.fspath(value))
        return '"' + "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text) + '"'
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_word(key, item) for item in value)}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_word(key, str(name))}: {_word(key, item)}" for name, item in value.items()) + "}"
    raise UserError(f"found {type(value).__name__}", where=key, fix="give text, a path, a number, true, false, null, or a list of these")


def to_yaml(config: object) -> str:
    """Return a config as YAML that `--config` reads."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def describe(schema: type, argv: Sequence[str] = ()) -> str:
    """Return the text of `--help`: each key with its default and the comment above it.

    Args:
        argv: the other arguments; the keys of the plugins that they name are included.
    Raises:
        UserError: no such plugin.
    """
    lines = [
        (schema.__doc__ or "").strip(),
        "",
        "  --config FILE.yaml   keys from a file; repeatable, later files win, key=value wins over all",
        "",
    ]
    words = [word for number, word in enumerate(argv) if "=" in word or "--config" in argv[max(0, number - 1) : number + 1]]
    defaults: Any = _defaults(schema, _given([word for word in words if word not in ("-h", "--help")]))
    return "\n".join([*lines, *_describe(defaults)])


def _describe(defaults: Any, prefix: str = "") -> list[str]:
    lines: list[str] = []
    for f in fields(defaults):
        value = getattr(defaults, f.name)
        if is_dataclass(value):
            lines += _describe(value, f"{prefix}{f.name}.")
            continue
        lines.append(f"  {prefix}{f.name}={shown(value)}")
        lines += [f"      {line}" for line in comment_on(type(defaults), f.name)]
    return lines


def shown(default: object) -> object:
    """Return a default as it is printed."""
    if default == "???":
        return "required"
    return "null" if default is None else str(default).lower() if isinstance(default, bool) else default


def _split(argv: list[str]) -> tuple[list[Path], list[tuple[str, str]]]:
    files, pairs, words = [], [], iter(argv)
    for word in words:
        if word == "--config" or word.startswith("--config="):
            name = word.partition("=")[2] or next(words, "")
            if not name:
                raise UserError("--config names no file", fix="--config FILE.yaml")
            files.append(Path(name).expanduser())
        elif "=" not in word or word.startswith("-"):
            raise UserError(f"cannot read {word!r}", fix="write key=value, such as optim.lr=1e-5; --help lists all keys")
        else:
            key, _, text = word.partition("=")
            pairs.append((key.lstrip("+"), text))
    return files, pairs


class _StrictLoader(yaml.SafeLoader):
    """YAML for configs: a duplicate key is an error, and 1e-5 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is given twice, first on line {seen[key.value]}", key.start_mark
                )
            seen[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except FileNotFoundError as error:
        raise UserError("no such config file", where=str(path), fix=f"the current folder is {Path.cwd()}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", where=str(path)) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"not YAML: {getattr(error, 'problem', error)}", where=f"{path}:{mark.line + 1}" if mark else str(path)) from error
    if loaded is not None and not isinstance(loaded, dict):
        raise UserError(f"found a {type(loaded).__name__}, expected keys and values", where=str(path))
    return loaded or {}


def _parse(key: str, text: str) -> Any:
    """Parse the value of a command-line argument."""
    if text == "" or text.startswith(("~/", "~\\")):  # `~` alone is YAML's null, `~/x` is a path
        return text
    try:
        value = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError:
        if text[0] in "[{":
            raise UserError(f"cannot read the value {text!r}", where=key, fix="write lists as [a,b]") from None
        return text
    if text[0] in "[{\"'":
        return value
    # Otherwise a number, true, false, null, or the text as typed: YAML would read `#### N` in `system=End with #### N` as a comment.
    is_word = len(text.split()) == 1 and not text.startswith("#")
    return value if is_word and isinstance(value, (bool, int, float, type(None))) else text


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in tree.items():
        path = f"{prefix}{key}"
        leaves += _leaves(value, f"{path}.") if isinstance(value, dict) and value else [(path, value)]
    return leaves


def _assign(config: DictConfig, given: _Given, defaults: object) -> None:
    known, key = _keys(config), given.key
    if given.value == {} and key in {group.path for group in groups_of(defaults)}:
        return  # a group without keys, as `to_yaml` writes it
    key_now = _canonical(key)
    if key_now not in known and not any(key_now.startswith(f"{name}.") for name in known if _is_mapping(config, name)):
        _refuse(given, known, defaults)
    if _asks_resolver(given.value):
        raise UserError(f"found {given.value!r}", where=given.where, fix="a config supports only ${key}; write the value itself")
    try:
        OmegaConf.update(config, key_now, given.value)
    except OmegaConfBaseException as error:
        raise UserError(_first_line(error), where=given.place, fix="--help shows the key with an example of its type") from error


def _canonical(key: str) -> str:
    """Return the key with an alias replaced, which may be the name of a mapping that the key is a part of."""
    alias = next((alias for alias in ALIASES if key == alias or key.startswith(f"{alias}.")), "")
    return ALIASES[alias] + key[len(alias) :] if alias else key


def _is_mapping(config: DictConfig, key: str) -> bool:
    """Return whether the value of a key is a mapping, whose own keys the user chooses."""
    return OmegaConf.is_dict(OmegaConf.select(config, key, throw_on_missing=False))


def _asks_resolver(value: Any) -> bool:
    return isinstance(value, str) and re.search(r"\$\{[^}]*:", value) is not None


def _refuse(given: _Given, known: list[str], defaults: object) -> None:
    key, place = given.key, None if given.where == given.key else given.where
    for rejected, fix in REJECTED.items():
        if key == rejected or key.startswith(f"{rejected}."):
            raise UserError(f"{key} is not supported here", where=place, fix=fix)
    if any(name.startswith(f"{key}.") for name in known):
        raise UserError(f"{key} is a group of keys", where=place, fix=", ".join(name for name in known if name.startswith(f"{key}.")))
    _refuse_key_of_another(given, defaults)
    last = key.rpartition(".")[2]
    near = [name for name in known if name == HINTS.get(last) or name.rpartition(".")[2] == last]
    near = near[:1] or _nearest(key, known)
    raise UserError(f"unknown key {key!r}", where=place, fix=f"did you mean {near[0]}?" if near else "--help lists all keys")


def _nearest(key: str, known: list[str]) -> list[str]:
    """Return the known key that is most similar, as a list of at most one: in its group, by its last part, or by its full name.

    Within a group, only the last parts are compared, because the group's name would make all of its keys similar.
    """
    path, _, last = key.rpartition(".")
    last_parts = {name.rpartition(".")[2]: name for name in known}
    beside = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == path}
    for names, cutoff in ((beside, 0.6), (last_parts, 0.75)):
        if found := difflib.get_close_matches(last, names, n=1, cutoff=cutoff):
            return [names[found[0]]]
    return difflib.get_close_matches(key, known, n=1, cutoff=0.8)


def _refuse_key_of_another(given: _Given, defaults: object) -> None:
    """Raises UserError: the key belongs to another plugin."""
    path, _, name = given.key.rpartition(".")
    for group in groups_of(defaults):
        others = [other for other, module in group.plugins.built_in().items() if name in fields_of(settings_class(module))]
        if path == group.path and others:
            others_lack = f"{' and '.join(group.names) or 'none'} {'have' if len(group.names) > 1 else 'has'} no such key"
            what = f"is a key of {', '.join(others)}; {others_lack}"
            raise UserError(what, where=given.place, fix=f"leave it out, or set {group.named_by}={others[0]}")


def _keys(config: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key in config:
        child, name = config._get_node(key), prefix + str(key)
        if isinstance(child, DictConfig) and not child._is_none() and is_dataclass(child._metadata.object_type):
            keys += _keys(child, f"{name}.")
        else:
            keys.append(name)
    return keys


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
