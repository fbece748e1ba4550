"""Errors of a command line that are found before torch is imported: its keys, their values, and files that are not there."""

import difflib
import importlib
import os
import shlex
import socket
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import urlsplit

from verl.commands import EVALUATE, PPO, REWARD, SFT, Command
from verl.errors import UserError, print_error
from verl.manifest import check_new_directory
from verl.plugin_outline import outlined
from verl.regular_file import check_directory
from verl.run_directory import RESULTS

SECONDS_TO_CONNECT = 10.0  # to the Hub
LONGEST_SHOWN = 160  # characters of a command line in an error
DATA = ("data.train_files", "data.val_files", "test_file")
PLACES = {"trainer.default_local_dir": "checkpoints/verl-sft/run", "output_dir": "results", "directory": "my-model"}  # with examples
FILES = ("data.chat_template",)
PLUGINS = {
    "trainer.logger": "verl.loggers",
    "rollout.name": "verl.rollout",
    "rollout.tool": "verl.tools",
    "samples.metric": "verl.rewards",
    "metric": "verl.rewards",
}

MODELS = (
    "model.partial_pretrain",
    "model.lora_adapter_path",
    "critic.partial_pretrain",
    "reward_model.path",
    "teacher.partial_pretrain",
    "model_path",
    "source",
)


def check(command: Command, words: Sequence[str]) -> list[str]:
    """Check the arguments of a command.

    Returns:
        the arguments, with the names of keys before those that stand alone.
    Raises:
        UserError: a key or a value is wrong, or a file or directory that a key names is not there.
        SystemExit: after printing for `--help` or `--version`.
    """
    from verl.config.load import load_config

    if command is EVALUATE and _compares(words):
        _check_finished(_without_options(EVALUATE, words))
    if not command.example or (command is EVALUATE and _compares(words)):  # a command that reads its words itself
        return list(words)
    given = named(command, words)
    with outlined():
        try:
            config = load_config(command.schema(), given)
        except UserError as error:
            if isinstance(error.__cause__, NameError | TypeError | AttributeError):  # an outline has not all of its file
                return given
            raise
    refuse_folders_of_runs(config, words, command.usage.split()[1])
    check_names(config)
    return given


def _compares(words: Sequence[str]) -> bool:
    """Return whether these are the arguments of `verl eval DIR --against OTHER`, which compares two finished evaluations."""
    return bool(words) and not words[0].startswith("-") and "=" not in words[0] and any(word.startswith("--against") for word in words)


def _check_finished(words: Sequence[str]) -> None:
    """Raise UserError if one of the directories of `verl eval DIR --against OTHER` is not of a finished evaluation."""
    name, other = words[0], next((word.removeprefix("against=") for word in words if word.startswith("against=")), "")
    from verl.eval.missing import no_evaluation

    for one, where, its_other in ((name, f"verl eval {name}", other), (other, f"against={other}", name)):
        if one and not (Path(one).expanduser() / RESULTS).is_file():
            raise no_evaluation(one, where, its_other)


def check_module(module: str, words: Sequence[str]) -> None:
    """Check the arguments of `python -m module`, before the module is imported. An error ends the process."""
    command = next(command for command in (SFT, PPO, REWARD, EVALUATE) if command.module == module)
    try:
        check(command, words)
    except UserError as error:
        print_error(error)
        raise SystemExit(error.exit_code) from None


def named(command: Command, words: Sequence[str]) -> list[str]:
    """Write the names of keys before the arguments that stand alone, such as the directory of `verl chat DIR`, and options as keys.

    Raises:
        UserError: there are more or fewer of them than the command takes.
    """
    if command.rewrite is not None:
        place, name = command.rewrite
        words = getattr(importlib.import_module(place), name)(words)
    words = _without_options(command, words)
    given, keys = list(words), [key for key in command.places if not any(word.startswith(f"{key}=") for word in words)]
    for number, word in enumerate(words):
        is_option = word.startswith("-") or "=" in word or (number > 0 and words[number - 1] == "--config")
        if not is_option and keys:
            given[number] = f"{keys.pop(0)}={word}"
        elif not is_option and _is_too_many(command, words[:number], word):
            fix = f"remove it: {command.usage.partition(' key=')[0]}"
            raise UserError(f"there is one word too many: {word!r}", where=f"verl {command.usage.split()[1]}", fix=fix)
    if keys and not any(word.startswith("--config") for word in words) and keys[0] in _required(command):
        shown = {"model_path": "a checkpoint", "source": "a checkpoint", "directory": "a new directory"}[keys[0]]
        raise UserError(f"{shown} must be given", where=command.usage.partition(" key=")[0], fix=f"write {command.example}")
    return given


def _is_too_many(command: Command, before: Sequence[str], word: str) -> bool:
    """Return whether a word without `=` is one too many: it is no key, and no value of the word before it."""
    keys = {field.name for field in fields(command.schema())}
    follows = bool(before) and (before[-1] in keys or before[-1].startswith("-") or before[-1].endswith("="))
    return bool(command.places) and "compare" not in keys and word not in keys and ":" not in word and not follows


def _without_options(command: Command, words: Sequence[str]) -> list[str]:
    """Rewrite `--key VALUE`, `--key=VALUE` and, of a key that is true or false, `--key` as `key=VALUE`, for keys that are in no group."""
    schema = command.schema()
    hints = {name: hint for name, hint in get_type_hints(schema).items() if name in schema.__dataclass_fields__ and not is_dataclass(hint)}
    found, rest = list[str](), iter(words)
    for word in rest:
        name, sign, value = word[2:].partition("=")
        key = name.replace("-", "_")
        if not word.startswith("--") or key not in hints:
            found.append(word)
        elif sign or hints[key] is bool:
            found.append(f"{key}={value if sign else 'true'}")
        elif (value := next(rest, "")) and not value.startswith("--"):
            found.append(f"{key}={value}")
        else:
            raise UserError(f"{word} needs a value", fix=f"write {key}=<value>")
    return found


def _required(command: Command) -> list[str]:
    """Return the keys of a command that have no default."""
    return [field.name for field in fields(command.schema()) if field.default == "???"]


def refuse_folders_of_runs(config: Any, words: Sequence[str], name: str) -> None:
    """Raise UserError if a key names a folder of runs in place of a checkpoint or a run; its fix is the command line `words` of `name`."""
    from verl.run_directory import folder_of_runs

    for key in (*MODELS, "compare", "against"):
        value = _value(config, key)
        if not isinstance(value, str) or any((Path(value).expanduser() / file).is_file() for file in ("config.json", RESULTS)):
            continue
        found = folder_of_runs(value, lambda run, value=value: _with_run(words, name, value, run))  # type: ignore[misc]
        if found is not None:
            raise UserError(found.what, where=f"{key}={value}", fix=found.fix)


def _with_run(words: Sequence[str], name: str, folder: str, run: str) -> str:
    """Return a command line with a run in place of a folder of runs; a long one has other arguments left out."""
    typed = [f"{sign[0]}{sign[1]}{run}" if sign[2] == folder else shlex.quote(word) for word in words if (sign := _parts(word))]
    shown = typed if len(" ".join(typed)) <= LONGEST_SHOWN else [*(word for word in typed if run in word), "…"]
    return " ".join(["verl", name, *shown])


def _parts(word: str) -> tuple[str, str, str]:
    """Return the key of a word, its `=` and its value; of a word without a key, the value alone."""
    key, sign, value = word.partition("=")
    return (key, sign, value) if sign else ("", "", word)


def check_names(config: Any) -> None:
    """Check that what keys name is there. Raises UserError."""
    for key, example in PLACES.items():
        if isinstance(place := _value(config, key), str):
            check_directory(Path(place).expanduser(), f"{key}={place}", f"give a directory, such as {key}={example}")
    _check_outputs(config)
    for key in DATA:
        _check_data(_value(config, key), key)
    for key in FILES:
        name = _value(config, key)
        if isinstance(name, str) and not Path(name).expanduser().is_file():
            raise UserError("no such file", where=f"{key}={name}", fix=f"give the path of a file; the current folder is {Path.cwd()}")
    for key, package in PLUGINS.items():
        names = _value(config, key)
        for name in names if isinstance(names, list) else [names]:
            _check_plugin(name, key, package)
    for key in MODELS:
        value = _value(config, key)
        for model in value if isinstance(value, list) else [value]:
            check_model(model, key, may_classify=hasattr(config, "test_file"))
    if isinstance(against := _value(config, "against"), str) and not (Path(against).expanduser() / RESULTS).is_file():
        check_model(against, "against")


def _check_outputs(config: Any) -> None:
    """Check that what a command will write is not there already, and where a model is pushed to."""
    if isinstance(results := _value(config, "output_dir"), str):
        from verl.eval.files import check_results

        check_results(Path(results).expanduser(), f"output_dir={results}", overwrite=config.overwrite)
    if isinstance(target := _value(config, "directory"), str):
        check_new_directory(Path(target).expanduser())
    if isinstance(repository := _value(config, "hub"), str):
        from verl.models.foreign import check_repository

        check_repository(repository)


def _value(config: Any, key: str) -> Any:
    """Return the value of a key; None if the config has no such key."""
    for name in key.split("."):
        config = getattr(config, name, None)
    return config


def _check_data(files: Any, key: str) -> None:
    """Check that local files are there. Whether a data set is on the Hub is asked when it is read."""
    from verl.data.source import is_on_hub, resolve_entries

    for one in files if isinstance(files, list | tuple) else [files]:
        name = one.get("path") if isinstance(one, dict) else one
        if name == "":
            raise UserError("is empty", where=key, fix=f"give a file, such as {key}=train.jsonl")
        if isinstance(name, str) and name and not is_on_hub(name):
            resolve_entries(name, key)


def _check_plugin(name: Any, key: str, package: str) -> None:
    from verl import plugin
    from verl.plugin_errors import unknown

    if not isinstance(name, str) or (key == "rollout.name" and name == "auto"):
        return
    if name.endswith(".py") and not Path(name).expanduser().is_file():
        raise UserError(f"no file {name!r}", where=key, fix=f"give the path of a file; the current folder is {Path.cwd()}")
    if "." not in name and name not in (known := plugin.names(package)):
        raise unknown(package.rpartition(".")[2], name, known, where=key)


def check_model(name: Any, key: str, *, may_classify: bool = False) -> None:
    """Check that a local model is there, and is of a kind that the key takes. A name on the Hub is looked up when it is loaded.

    Args:
        may_classify: whether the command also takes a classifier, as the evaluator does.
    """
    if not isinstance(name, str):
        return
    from verl.models import kind

    folder = Path(os.path.expanduser(name))
    if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        from verl.models.foreign import refuse_path

        try:
            refuse_path(name)
        except UserError as error:
            raise UserError(error.what, where=f"{key}={name}", fix=error.fix) from error
        if not folder.exists():
            _check_hub(name, key)
    if key in ("model_path", "source", "against"):
        kind.check_kind(name, (*kind.GENERATES, *((kind.CLASSIFIER,) if may_classify else ())), where=f"{key}={name}")
    elif key == "model.lora_adapter_path":
        kind.check_kind(name, (kind.ADAPTER,), where=f"{key}={name}")


def _check_hub(name: str, key: str) -> None:
    """Raise UserError if a model is to be downloaded and the Hub cannot be reached, which the Hub's library tries for up to a minute."""
    from huggingface_hub import constants, try_to_load_from_cache

    has_proxy = any(
        os.environ.get(variable) for kind in ("https", "http", "all") for variable in (f"{kind}_proxy", f"{kind.upper()}_PROXY")
    )
    if has_proxy or any(isinstance(try_to_load_from_cache(name, file), str) for file in ("config.json", "adapter_config.json")):
        return
    beside = [path.name for path in Path().iterdir() if path.is_dir()] if "/" not in name else []
    near = difflib.get_close_matches(name, beside, n=1)
    here = f"did you mean the directory {near[0]}? Else " if near else ""
    mirror = f"{here}set HF_ENDPOINT to a mirror, such as https://hf-mirror.com; or give the directory of a model that is here"
    if constants.HF_HUB_OFFLINE:
        raise UserError("is not downloaded, and HF_HUB_OFFLINE is set", where=f"{key}={name}", fix=f"unset HF_HUB_OFFLINE; {mirror}")
    place = urlsplit(constants.ENDPOINT)
    try:
        port = place.port or (80 if place.scheme == "http" else 443)
        socket.create_connection((place.hostname or "", port), timeout=SECONDS_TO_CONNECT).close()
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        what = f"is not downloaded, and {constants.ENDPOINT} cannot be reached ({reason})"
        raise UserError(what, where=f"{key}={name}", fix=mirror) from error
