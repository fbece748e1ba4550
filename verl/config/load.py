"""From a command line to a typed config: `--config FILE.yaml` (repeatable, later wins) and then `key=value` (wins over files)."""

import dataclasses
import difflib
import inspect
import math
import numbers
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl import __version__
from verl.config.spellings import ANSWERED, ELSEWHERE, SAME
from verl.errors import UserError

Config = TypeVar("Config")
Given = Mapping[str, Any] | str  # what a program may give in place of a config, or beside it


def load_config(schema: type[Config], argv: list[str]) -> Config:
    """The config that a command line asks for, checked.

    Args:
        schema: a dataclass of `verl.config`.
        argv: words after the command: `--config FILE`, `key=value`, `--help`.
    Raises:
        UserError: a word, key, type or value that is not right.
        SystemExit: after `--help`.
    """
    if {"-h", "--help"} & set(argv):
        print(describe(schema))
        raise SystemExit(0)
    if "--version" in argv:
        print(__version__)
        raise SystemExit(0)
    files, pairs = _split(argv)
    config = OmegaConf.structured(schema)
    for file in files:
        for key, value in _leaves(_read_yaml(file)):
            _assign(config, key, value, where=str(file))
    for key, text in pairs:
        _assign(config, key, _parse(key, text), where=key)
    try:
        missing = sorted(str(key) for key in OmegaConf.missing_keys(config))
        if missing:
            fix = f"add {' '.join(f'{key}=…' for key in missing)}; --help lists all keys"
            raise UserError(f"{' and '.join(missing)} must be given", fix=fix)
        result: Any = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(_first_line(error), where=error.full_key, fix="mend the ${…} in the value") from error
    result.check()
    return result


def config_of(schema: type[Config], given: Sequence[object]) -> Config:
    """The config that a program asks for, checked as a command line is: what it gives is written as the words that say the same.

    Args:
        schema: a dataclass of `verl.config`.
        given: dataclasses of this schema, mappings and words, of which later ones win. Of a dataclass, what differs from its defaults.
    Raises:
        UserError: something that is none of these, or a key, type or value that is not right.
    """
    return load_config(schema, [word for part in given for word in _words_of(part, schema)])


def _words_of(part: object, schema: type) -> list[str]:
    if isinstance(part, str):
        if part in ("-h", "--help", "--version"):
            raise UserError(f"found {part!r}", fix="docs/keys.md lists all keys, and verl.__version__ is the version")
        return [part]
    if isinstance(part, schema):
        defaults = dict(_leaves(_tree(schema())))
        return [f"{key}={_word(key, value)}" for key, value in _leaves(_tree(part)) if key not in defaults or defaults[key] != value]
    if isinstance(part, Mapping):
        return [f"{key}={_word(key, value)}" for key, value in _leaves(_tree(part))]
    what = f"the class {part.__name__}" if isinstance(part, type) else f"{type(part).__name__}"
    raise UserError(f"found {what}, expected {schema.__name__}, a dict or key=value", fix=f"{schema.__name__}() makes one of the defaults")


def _tree(part: object) -> dict[str, Any]:
    """A dataclass or mapping as nested dicts, with attributes that a dataclass was given and does not have."""
    values = dict(part) if isinstance(part, Mapping) else vars(part)
    return {str(key): _tree(value) if isinstance(value, Mapping) or _is_group(value) else value for key, value in values.items()}


def _is_group(value: object) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _word(key: str, value: object) -> str:
    """A value as `_parse` reads it."""
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
    """A config as a YAML file that `--config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def describe(schema: type) -> str:
    """Each key with its default and the comment above it, for `--help`."""
    lines = [
        (schema.__doc__ or "").strip(),
        "",
        "  --config FILE.yaml   keys from a file; repeatable, later files win, key=value wins over all",
        "",
    ]
    lines += _describe(schema, None, "")
    return "\n".join(lines)


def _describe(schema: type, group: object, prefix: str) -> list[str]:
    """Lines of a schema's keys; `group` holds their defaults where the config that the schema is part of has its own."""
    source = inspect.getsource(schema)
    lines: list[str] = []
    for f in dataclasses.fields(schema):
        own = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        default = own if group is None else getattr(group, f.name)
        if dataclasses.is_dataclass(default):
            lines += _describe(type(default), default, f"{prefix}{f.name}.")
            continue
        comment = re.search(rf"((?:    #.*\n)+)    {f.name}:", source)
        shown = (
            "required"
            if default == "???"
            else "null"
            if default is None
            else str(default).lower()
            if isinstance(default, bool)
            else default
        )
        lines.append(f"  {prefix}{f.name}={shown}")
        lines += [f"      {text.strip()[2:]}" for text in comment[1].splitlines()] if comment else []
    return lines


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
    """YAML as people write configs: a key given twice is an error, and 1e-5 is a number."""

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
    if text == "" or text.startswith(("~/", "~\\")):  # `~` alone is YAML's null, `~/x` a path
        return text
    try:
        value = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError:
        if text[0] in "[{":
            raise UserError(f"cannot read the value {text!r}", where=key, fix="write lists as [a,b]") from None
        return text
    if text[0] in "[{\"'":
        return value
    # Else a number, true, false or null, or the text as typed: in `system=End with #### N` YAML would see a comment.
    is_word = len(text.split()) == 1 and not text.startswith("#")
    return value if is_word and isinstance(value, (bool, int, float, type(None))) else text


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in tree.items():
        path = f"{prefix}{key}"
        leaves += _leaves(value, f"{path}.") if isinstance(value, dict) and value else [(path, value)]
    return leaves


def _assign(config: DictConfig, key: str, value: Any, *, where: str) -> None:
    known = _keys(config)
    key_now = SAME.get(key, key)
    if key_now not in known or SAME.get(key) not in (None, *known):
        _refuse(key, known, where)
    if isinstance(value, str) and re.search(r"\$\{[^}]*:", value):
        raise UserError(f"found {value!r}", where=where, fix="only ${key} is replaced in a config; write the value itself")
    try:
        OmegaConf.update(config, key_now, value)
    except OmegaConfBaseException as error:
        place = key if where == key else f"{where}: {key}"
        raise UserError(_first_line(error), where=place, fix="--help shows the key with an example of its type") from error


def _refuse(key: str, known: list[str], where: str) -> None:
    place = None if where == key else where
    for answered, fix in ANSWERED.items():
        if key == answered or key.startswith(f"{answered}."):
            raise UserError(f"{key} is not supported here", where=place, fix=fix)
    if any(name.startswith(f"{key}.") for name in known):
        raise UserError(f"{key} is a group of keys", where=place, fix=", ".join(name for name in known if name.startswith(f"{key}.")))
    last = key.rpartition(".")[2]
    near = [name for name in known if name == ELSEWHERE.get(last) or name.rpartition(".")[2] == last]
    near = near[:1] or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    raise UserError(f"unknown key {key!r}", where=place, fix=f"did you mean {near[0]}?" if near else "--help lists all keys")


def _keys(config: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key in config:
        child, name = config._get_node(key), prefix + str(key)
        keys += _keys(child, f"{name}.") if isinstance(child, DictConfig) and not child._is_none() else [name]
    return keys


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
