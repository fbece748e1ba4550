"""The settings of runs that differ from the defaults, and the commands that repeat a run and its evaluations."""

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from verl.commands import EVALUATE, PPO, REWARD, SFT, Command
from verl.config.objects import word
from verl.config.plugin_settings import completed, groups_of
from verl.errors import UserError
from verl.plugin import names
from verl.redaction import redact
from verl.report.evaluations import Evaluation
from verl.report.runs import RunFiles

REQUIRED = "???"  # the default of a key that must be given
_PLAIN = re.compile(r"[A-Za-z_./~][\w./~@%+-]*")
_WORDS = {"null", "none", "true", "false", "yes", "no", "on", "off", "y", "n", "~", ".inf", ".nan"}
_TRAINERS = {"verl sft": SFT, "verl ppo": PPO, "verl reward": REWARD}


@dataclass(frozen=True)
class Setting:
    """A key that some run has another value of than the default.

    Attributes:
        values: of each run, as on the command line; None: the run has no such key.
        changed: of each run, whether its value is not the default.
        differs: whether the runs have different values.
    """

    key: str
    default: str
    values: list[str | None]
    changed: list[bool]

    @property
    def differs(self) -> bool:
        return len(set(self.values)) > 1


def trainer_of(run: RunFiles) -> str | None:
    """Return the command of a run, by the groups of its settings; None if they are not known."""
    if not run.config:
        return None
    return "verl ppo" if "rollout" in run.config else "verl reward" if "algorithm" in run.config else "verl sft"


def changed_settings(runs: Sequence[RunFiles]) -> list[Setting]:
    """Return the keys of which at least one run has not the default, in the order of config.yaml."""
    found = [dict(leaves(run.config)) for run in runs]
    defaults = [defaults_of(_TRAINERS[trainer], run.config) if (trainer := trainer_of(run)) else {} for run in runs]
    settings = []
    for key in dict.fromkeys(key for values in found for key in values):
        default = next((_default(known[key]) for known in defaults if key in known), "")
        values = [written(of_run[key]) if key in of_run else None for of_run in found]
        changed = [
            key in of_run and (key not in known or not _equal(of_run[key], known[key]))
            for of_run, known in zip(found, defaults, strict=True)
        ]
        if any(changed):
            settings.append(Setting(key, default, values, changed))
    return settings


def defaults_of(command: Command, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the default of each key of a command, with those of the plugins that a config names.

    The keys of a user's own file are left out: a report runs no code that a run's directory names.
    """
    defaults = command.schema()()
    plain, given = dict(leaves(defaults)), dict(leaves(config))
    for group in groups_of(defaults):
        name = given.get(group.named_by)
        if isinstance(name, str) and name in names(group.plugins.package):
            _set(defaults, group.named_by, name)
    try:
        found = dict(leaves(completed(defaults)))
    except UserError:  # a file of verl that is no plugin of this kind
        return plain
    # A method may change the default of a shared key, but what names it has its own default.
    return {**found, **{key: plain[key] for key in plain if key in {group.named_by for group in groups_of(defaults)}}}


def _set(config: Any, key: str, value: Any) -> None:
    *path, name = key.split(".")
    for group in path:
        config = getattr(config, group)
    setattr(config, name, value)


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield key and value of each key of a config: a dataclass or nested dicts. An empty dict is a value."""
    items = [(f.name, getattr(config, f.name)) for f in fields(config)] if is_dataclass(config) else list(config.items())
    for name, value in items:
        if is_dataclass(value) or (isinstance(value, Mapping) and value):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def written(value: Any) -> str:
    """Return a value as a person writes it on the command line: a text has quotes only where it would be read as something else."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) and value.lower() not in _WORDS else word("", value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return word("", value if isinstance(value, bool | int | float | Mapping) else str(value))


def _default(value: Any) -> str:
    """Return a default as the page shows it."""
    if isinstance(value, str):
        return "required" if value == REQUIRED else value
    return written(value)


def _equal(value: Any, default: Any) -> bool:
    if isinstance(value, list | tuple) and isinstance(default, list | tuple):
        return list(value) == list(default)
    return bool(value == default) and isinstance(value, bool) == isinstance(default, bool)


def command_of(run: RunFiles) -> list[str] | None:
    """Return the words that repeat a run; None if its settings are not known."""
    trainer = trainer_of(run)
    if trainer is None:
        return None
    defaults = defaults_of(_TRAINERS[trainer], run.config)
    given = [f"{key}={written(value)}" for key, value in leaves(run.config) if key not in defaults or not _equal(value, defaults[key])]
    processes = ["--gpus", str(run.processes)] if run.processes and run.processes > 1 else []
    return [*trainer.split(), *processes, *given]


def command_of_evaluation(evaluation: Evaluation) -> list[str] | None:
    """Return the words that repeat an evaluation; None if its settings are not known."""
    if not evaluation.settings:
        return None
    settings = redact(evaluation.settings)
    defaults = defaults_of(EVALUATE, settings)
    given = [f"{key}={written(value)}" for key, value in leaves(settings) if key not in defaults or not _equal(value, defaults[key])]
    return ["verl", "eval", *given]


def shell(words: Sequence[str]) -> str:
    """Return a command for a shell, one argument on a line."""
    head = [word for word in words if "=" not in word]
    rest = [word for word in words if "=" in word]
    return " \\\n  ".join([shlex.join(head), *map(shlex.quote, rest)])
