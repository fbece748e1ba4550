"""Assignments of values to keys, from the command line and from YAML files.

Each value is kept twice: as YAML reads it, and as text. A key that holds text takes the text as it was written, so that the name `1.10`
does not become the number 1.1, and `on` does not become true.
"""

import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from verl.errors import UserError

NUMBER = re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$")
NULL = "!!null null"  # null also for a key that holds text, where `null` alone is a text of four letters


@dataclass(frozen=True)
class Assignment:
    """A value that the user gives for a key.

    Attributes:
        value: the value as YAML reads it, or the error of a list that cannot be read.
        text: the same with each scalar as it was written; of a command-line argument, all that follows `=`.
        where: name of the file; of an argument, the key itself.
    """

    key: str
    value: Any
    text: Any
    where: str

    @property
    def place(self) -> str:
        return self.key if self.where == self.key else f"{self.where}: {self.key}"

    def value_for(self, kind: Any) -> Any:
        """Return the value for a key of the type `kind`: text is kept as it was written.

        Raises:
            UserError: it is a list that cannot be read, and the key is not text.
        """
        found = _fitted(kind, self.value, self.text)
        if isinstance(found, UserError):
            raise found
        return found


def argument(key: str, text: str) -> Assignment:
    """Return the assignment of a command-line argument `key=text`."""
    if text == NULL:
        return Assignment(key, None, None, key)
    value = _value_of(key, text)
    is_quoted = text[:1] in ('"', "'") and isinstance(value, str)
    return Assignment(key, value, value if is_quoted else text, key)


def assignments_in(path: Path) -> list[Assignment]:
    """Return the assignments of a YAML file.

    Raises:
        UserError: the file is missing, cannot be read, or is not YAML with keys at the top.
    """
    try:
        written = path.read_text(encoding="utf-8")
        loaded = yaml.load(written, Loader=_Loader)  # noqa: S506 - a SafeLoader
        texts = yaml.load(written, Loader=_TextLoader)  # noqa: S506 - a SafeLoader
    except FileNotFoundError as error:
        raise UserError("no such config file", where=str(path), fix=f"the current folder is {Path.cwd()}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", where=str(path)) from error
    except yaml.YAMLError as error:
        from verl.config.file_errors import not_yaml  # most files are right

        raise not_yaml(path, error) from error
    if not isinstance(loaded, dict):
        from verl.config.file_errors import without_keys

        raise without_keys(path, loaded)
    return [Assignment(key, value, text, str(path)) for key, value, text in _paired_leaves(loaded, texts)]


def type_of(config: object, key: str) -> Any:
    """Return the declared type of a dotted key of a config, such as `str | None`; Any if the key is unknown."""
    name, _, rest = key.partition(".")
    kind: Any = typing.get_type_hints(type(config)).get(name, Any) if is_dataclass(config) else Any
    if not rest:
        return kind
    return _items_of(kind, dict) if typing.get_origin(kind) is dict else type_of(getattr(config, name, None), rest)


def _fitted(kind: Any, value: Any, text: Any) -> Any:
    """Return the value, with its text in place of every scalar that is declared as text."""
    options = _options(kind)
    if value is None and (type(None) in options or text == ""):
        return None
    if all(option is str for option in options - {type(None)}) and isinstance(text, str):
        return text
    if isinstance(value, list | dict):
        texts = yaml.load(text, Loader=_TextLoader) if isinstance(text, str) else text  # noqa: S506 - a SafeLoader
        items = next((_items_of(option, type(value)) for option in options if typing.get_origin(option) is type(value)), Any)
        if isinstance(value, list):
            return [_fitted(items, *both) for both in zip(value, texts, strict=True)]
        return {name: _fitted(items, value[name], texts[name]) for name in value}
    return value


def _options(kind: Any) -> set[Any]:
    """Return the types that a declared type allows: of a union each, of a literal those of its values."""
    if typing.get_origin(kind) in (Union, types.UnionType):
        return {option for part in typing.get_args(kind) for option in _options(part)}
    if typing.get_origin(kind) is Literal:
        return {type(option) for option in typing.get_args(kind)}
    return {kind}


def _items_of(kind: Any, container: type) -> Any:
    """Return the type of a container's items; Any if `kind` is another type."""
    return typing.get_args(kind)[-1] if typing.get_origin(kind) is container else Any


def _paired_leaves(values: dict[str, Any], texts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted key, the value and the text of each leaf of two equal trees."""
    for value, (key, text) in zip(values.values(), texts.items(), strict=True):
        if isinstance(value, dict) and value:
            yield from _paired_leaves(value, text, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value, text


def _value_of(key: str, text: str) -> Any:
    """Return the value of a command-line argument, or the error of a list that cannot be read."""
    if text == "" or text.startswith(("~/", "~\\")):  # `~` alone is YAML's null, `~/x` is a path
        return text
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError:
        return UserError(f"cannot read the value {text!r}", where=key, fix="write lists as [a,b]") if text[0] in "[{" else text
    if text[0] in "[{\"'":
        return value
    # Otherwise a number, true, false, null, or the text as typed: YAML would read `#### N` in `system=End with #### N` as a comment.
    is_word = len(text.split()) == 1 and not text.startswith("#")
    return value if is_word and isinstance(value, (bool, int, float, type(None))) else text


class _Loader(yaml.SafeLoader):
    """YAML for configs: a duplicate key is an error, keys are text, and 1e-5 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is given twice, first on line {seen[key.value]}", key.start_mark
                )
            seen[key.value] = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+0123456789."))


class _TextLoader(_Loader):
    """The same YAML with every scalar as the text that was written; only an explicit tag, such as `!!null`, gives it another type."""

    yaml_implicit_resolvers = {"<": _Loader.yaml_implicit_resolvers["<"]}  # noqa: RUF012 - the merge of mappings, `<<: *name`
