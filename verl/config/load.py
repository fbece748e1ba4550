"""Builds a typed config from the command line: `--config FILE.yaml` (repeatable, later files win) and `key=value` (wins over files)."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl import __version__
from verl.config.assignments import Assignment, argument, assignments_in, type_of
from verl.config.plugin_settings import check_settings, completed, groups_of
from verl.config.shared import TrainerConfig
from verl.errors import UserError

Config = TypeVar("Config")

BEST = "--best"
PLACE, NULLS = "trainer.default_local_dir", ("null", "Null", "NULL", "None", "~")
DEFAULT_PLACE = TrainerConfig().default_local_dir  # also for null, which would be a folder of that name

# Upstream's keys that are accepted, with the keys that they stand for.
ALIASES = {
    "optim.lr_warmup_steps_ratio": "optim.warmup_steps_ratio",
    "model.path": "model.partial_pretrain",
    "data.multiturn.messages_key": "data.messages_key",
    "data.multiturn.tools_key": "data.tools_key",
    "data.apply_chat_template_kwargs": "data.chat_template_kwargs",
}


def load_config(schema: type[Config], argv: list[str]) -> Config:
    """Build a config from command-line arguments, and check it.

    Args:
        schema: a dataclass of `verl.config`.
        argv: arguments after the command: `--config FILE`, `--best`, `key=value`, `--help`.
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
    given = read_words(argv, schema)
    defaults = _defaults(schema, given)
    config = _structured(defaults)
    known = _keys(config)
    for one in given:
        _assign(config, one, known, defaults)
    found: Config = _checked(config, best=BEST in argv)
    return found


def _checked(config: DictConfig, *, best: bool = False) -> Any:
    """Convert to the dataclass, run its checks and those of its plugins, and name the checkpoints that runs' directories stand for.

    Args:
        best: whether these are the best ones.
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
    from verl.config.values import misfit

    if (found := misfit(result)) is not None:
        raise UserError(found[1], where=found[0], fix="--help shows the key with an example of its type")
    result.check()
    check_settings(result)
    from verl.run_directory import name_checkpoints  # once in a run

    name_checkpoints(result, best=best)
    return result


def read_words(argv: list[str], schema: type) -> list[Assignment]:
    """Return the assignments of files and arguments; later ones win."""
    files, pairs = _split(argv, schema)
    given = [one for file in files for one in assignments_in(file)] + [argument(key, text) for key, text in pairs]
    return [replace(one, text=DEFAULT_PLACE) if one.key == PLACE and one.text in (None, *NULLS) else one for one in given]


def _defaults(schema: type[Config], given: list[Assignment]) -> Config:
    """Return the schema's defaults with the plugins that the user names and these plugins' keys.

    Raises:
        UserError: no such plugin.
    """
    defaults: Config = schema()
    config = OmegaConf.structured(defaults)
    known = set(_keys(config))
    for one in given:
        key = _canonical(one.key)
        if key in known and not _asks_resolver(one.value):
            with suppress(OmegaConfBaseException):  # a value of the wrong type, which `_assign` refuses
                OmegaConf.update(config, key, one.value_for(type_of(defaults, key)))
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


def to_yaml(config: object) -> str:
    """Return a config as YAML that `--config` reads, with `[hidden]` in place of secrets. Nothing in it is resolved once more."""
    from verl.config.resolvers import as_written  # a run writes it once

    return OmegaConf.to_yaml(as_written(config))


def describe(schema: type, argv: Sequence[str] = ()) -> str:
    """Return the text of `--help`: each key with its default and the comment above it.

    Args:
        argv: the other arguments; the keys of the plugins that they name are included.
    Raises:
        UserError: no such plugin.
    """
    from verl.config.help import help_text  # a run does not print it

    words = [word for number, word in enumerate(argv) if "=" in word or "--config" in argv[max(0, number - 1) : number + 1]]
    return help_text(_defaults(schema, read_words([word for word in words if word not in ("-h", "--help")], schema)))


def _split(argv: list[str], schema: type) -> tuple[list[Path], list[tuple[str, str]]]:
    files, pairs, words = [], [], iter(argv)
    for word in words:
        if word == "--config" or word.startswith("--config="):
            name = word.partition("=")[2] or next(words, "")
            if not name:
                raise UserError("--config names no file", fix="--config FILE.yaml")
            files.append(Path(name).expanduser())
        elif word == BEST:
            continue
        elif "=" not in word or word.startswith("-"):
            from verl.config.wrong_words import unreadable

            raise unreadable(word, [*words], _keys(OmegaConf.structured(schema())))
        else:
            key, _, text = word.partition("=")
            pairs.append((key.lstrip("+"), text))
    return files, pairs


def _assign(config: DictConfig, given: Assignment, known: list[str], defaults: object) -> None:
    key = given.key
    if given.value == {} and key in {group.path for group in groups_of(defaults)}:
        return  # a group without keys, as `to_yaml` writes it
    key_now = _canonical(key)
    if key_now not in known and not any(key_now.startswith(f"{name}.") for name in known if _is_mapping(config, name)):
        from verl.config.unknown_keys import refuse  # a right key needs none of its hints

        refuse(given, known, defaults)
    value = given.value_for(type_of(defaults, key_now))
    if _asks_resolver(value) or _asks_resolver(given.key):
        raise UserError(f"found {value!r}", where=given.where, fix="a config supports only ${key}; write the value itself")
    if isinstance(value, dict):
        from verl.config.values import check_names  # few keys have names of their own in them

        check_names(value, given.place)
    if "[hidden]" in str(value) and given.where != given.key:  # HIDDEN of verl.redaction
        fix = "give it again: verl writes no secrets into a run's config.yaml"
        raise UserError("found [hidden]", where=given.place, fix=fix)
    try:
        OmegaConf.update(config, key_now, value)
    except OmegaConfBaseException as error:
        from verl.config.values import example, not_a_number

        kind = type_of(defaults, key_now)
        fix = example(key, OmegaConf.select(config, key_now, throw_on_missing=False), kind)
        raise UserError(not_a_number(value, kind) or _first_line(error), where=given.place, fix=fix) from error


def _canonical(key: str) -> str:
    """Return the key with an alias replaced, which may be the name of a mapping that the key is a part of."""
    alias = next((alias for alias in ALIASES if key == alias or key.startswith(f"{alias}.")), "")
    return ALIASES[alias] + key[len(alias) :] if alias else key


def _is_mapping(config: DictConfig, key: str) -> bool:
    """Return whether the value of a key is a mapping, whose own keys the user chooses."""
    return OmegaConf.is_dict(OmegaConf.select(config, key, throw_on_missing=False, throw_on_resolution_failure=False))


def _asks_resolver(value: Any) -> bool:
    """Return whether a value, or a part of it at any depth, has a `${name:…}`, which would read the environment or run code."""
    if "${" not in str(value):
        return False
    from verl.config.resolvers import asks_resolver  # few values have an interpolation

    return asks_resolver(value)


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
    return (str(error).splitlines() or [type(error).__name__])[0]
