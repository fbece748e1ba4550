"""From a command line to a typed config: `--config FILE.yaml` (repeatable, later wins) and then `key=value` (wins over files)."""

import difflib
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl import __version__
from verl.config.own_keys import check_own_keys, comment_on, completed, fields_of, groups_of, settings_class
from verl.config.spellings import ANSWERED, ELSEWHERE, SAME
from verl.errors import UserError

Config = TypeVar("Config")


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


def checked(config: Config) -> Config:
    """A config that was made in Python as a command line would give it: with the own keys of what it names, references resolved.

    Raises:
        UserError: a value that is not right, or missing.
    """
    found: Config = _checked(_structured(completed(config)))
    return found


def _checked(config: DictConfig) -> Any:
    try:
        missing = sorted(str(key) for key in OmegaConf.missing_keys(config))
        if missing:
            fix = f"add {' '.join(f'{key}=…' for key in missing)}; --help lists all keys"
            raise UserError(f"{' and '.join(missing)} must be given", fix=fix)
        result: Any = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(_first_line(error), where=error.full_key, fix="mend the ${…} in the value") from error
    result.check()
    check_own_keys(result)
    return result


@dataclass(frozen=True)
class _Given:
    """A value that somebody gives a key; `where` is the file's name, or the key's where it is a word."""

    key: str
    value: Any
    where: str

    @property
    def place(self) -> str:
        return self.key if self.where == self.key else f"{self.where}: {self.key}"


def _given(argv: list[str]) -> list[_Given]:
    """What files and words give, in the order in which it counts."""
    files, pairs = _split(argv)
    in_files = [_Given(key, value, str(file)) for file in files for key, value in _leaves(_read_yaml(file))]
    return in_files + [_Given(key, _parse(key, text), key) for key, text in pairs]


def _defaults(schema: type[Config], given: list[_Given]) -> Config:
    """The config before anything is given but the names of plugins, whose own keys are in it.

    Raises:
        UserError: no such plugin.
    """
    defaults: Config = schema()
    config = OmegaConf.structured(defaults)
    for one in given:
        if SAME.get(one.key, one.key) in _keys(config) and not _asks_resolver(one.value):
            with suppress(OmegaConfBaseException):  # a value of the wrong type, which `_assign` answers
                OmegaConf.update(config, SAME.get(one.key, one.key), one.value)
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
        fix = "give the fields of Settings types that a config may have: bool, int, float, str, lists of them, or Any"
        raise UserError(_first_line(error), where=error.full_key, fix=fix) from error
    return config


def to_yaml(config: object) -> str:
    """A config as a YAML file that `--config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def describe(schema: type, argv: Sequence[str] = ()) -> str:
    """Each key with its default and the comment above it, for `--help`.

    Args:
        argv: words beside `--help`; the plugins that they name have their own keys shown.
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
    """A default as it is printed."""
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


def _assign(config: DictConfig, given: _Given, defaults: object) -> None:
    known, key = _keys(config), given.key
    if given.value == {} and key in {group.path for group in groups_of(defaults)}:
        return  # a group without keys, as `to_yaml` writes it
    key_now = SAME.get(key, key)
    if key_now not in known or SAME.get(key) not in (None, *known):
        _refuse(given, known, defaults)
    if _asks_resolver(given.value):
        raise UserError(f"found {given.value!r}", where=given.where, fix="only ${key} is replaced in a config; write the value itself")
    try:
        OmegaConf.update(config, key_now, given.value)
    except OmegaConfBaseException as error:
        raise UserError(_first_line(error), where=given.place, fix="--help shows the key with an example of its type") from error


def _asks_resolver(value: Any) -> bool:
    return isinstance(value, str) and re.search(r"\$\{[^}]*:", value) is not None


def _refuse(given: _Given, known: list[str], defaults: object) -> None:
    key, place = given.key, None if given.where == given.key else given.where
    for answered, fix in ANSWERED.items():
        if key == answered or key.startswith(f"{answered}."):
            raise UserError(f"{key} is not supported here", where=place, fix=fix)
    if any(name.startswith(f"{key}.") for name in known):
        raise UserError(f"{key} is a group of keys", where=place, fix=", ".join(name for name in known if name.startswith(f"{key}.")))
    _refuse_key_of_another(given, defaults)
    last = key.rpartition(".")[2]
    near = [name for name in known if name == ELSEWHERE.get(last) or name.rpartition(".")[2] == last]
    near = near[:1] or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    raise UserError(f"unknown key {key!r}", where=place, fix=f"did you mean {near[0]}?" if near else "--help lists all keys")


def _refuse_key_of_another(given: _Given, defaults: object) -> None:
    """Raises UserError if the key is one of another plugin."""
    path, _, name = given.key.rpartition(".")
    for group in groups_of(defaults):
        others = [other for other, module in group.plugins.built_in().items() if name in fields_of(settings_class(module))]
        if path == group.path and others:
            has_not = f"{' and '.join(group.names) or 'none'} {'have' if len(group.names) > 1 else 'has'} no such key"
            what = f"is a key of {', '.join(others)}; {has_not}"
            raise UserError(what, where=given.place, fix=f"leave it out, or set {group.named_by}={others[0]}")


def _keys(config: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key in config:
        child, name = config._get_node(key), prefix + str(key)
        keys += _keys(child, f"{name}.") if isinstance(child, DictConfig) and not child._is_none() else [name]
    return keys


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
