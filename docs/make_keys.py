"""Writes docs/keys.md from verl/config/ and the Settings of methods, rewards and optimizers: python docs/make_keys.py"""

import re
from pathlib import Path
from typing import Any

from verl.commands import CHAT, DEMO, EVALUATE, EXPORT, PPO, REWARD, SERVE, SFT
from verl.config.algorithm import AlgorithmConfig
from verl.config.environment import EnvironmentConfig
from verl.config.help import comment_on, shown
from verl.config.load import ALIASES, describe
from verl.config.pairs import PreferenceConfig
from verl.config.plugin_settings import completed, fields_of, groups_of, settings_class
from verl.config.ppo import RewardConfig
from verl.config.shared import OptimConfig
from verl.config.unknown_keys import REJECTED

PAGE = Path(__file__).with_name("keys.md")
COMMANDS: dict[str, Any] = {
    "verl sft": SFT.schema(),
    "verl ppo": PPO.schema(),
    "verl reward": REWARD.schema(),
    "verl eval": EVALUATE.schema(),
    "verl chat DIR": CHAT.schema(),
    "verl export SRC DIR": EXPORT.schema(),
    "verl serve DIR": SERVE.schema(),
    "verl demo": DEMO.schema(),
}
# Groups whose keys depend on what is named.
GROUPS = {
    "Methods of `verl ppo`, named by `algorithm.name`": ("algorithm", AlgorithmConfig),
    "Methods of `verl reward`, named by `algorithm.name`": ("algorithm", PreferenceConfig),
    "Rewards, named by `reward.name` in `verl ppo` and by `metric` in `verl eval`": ("reward", RewardConfig),
    "Environments, named by `environment.name`": ("environment", EnvironmentConfig),
    "Optimizers, named by `optim.name`, and by `critic.optim.name` with keys in `critic.optim`": ("optim", OptimConfig),
}
HEAD = """\
# Keys

All keys of all commands. `python docs/make_keys.py` generates this page from `verl/config/` and from the `Settings` of methods, rewards,
environments and optimizers. Give a value as `key=value`, or in a YAML file with `--config FILE.yaml` (repeatable; later files win, and
`key=value` wins over all files). Write lists as `[a,b]`, no value as `null`, and your home folder as `~`. An unknown key is an error that
names the closest key.

Methods, rewards, environments and optimizers have more keys, in tables after those of the commands.
`verl ppo algorithm.name=path/to/file.py --help` shows the keys of a file of your own.
"""


def page() -> str:
    parts = [HEAD]
    for command, schema in COMMANDS.items():
        parts += [f"## `{command}`\n", "| key | default | meaning |", "|---|---|---|"]
        parts += [f"| `{key}` | {_code(default)} | {_cell(meaning)} |" for key, default, meaning in keys(schema)]
        parts.append("")
    parts += ["## Keys of methods, rewards, environments and optimizers\n"]
    for heading, (prefix, group) in GROUPS.items():
        parts += [f"### {heading}\n", *own_keys(prefix, group), ""]
    parts += ["## Other spellings that are read\n", "| written | read as |", "|---|---|"]
    parts += [f"| `{written}` | `{read}` |" for written, read in ALIASES.items()]
    parts += ["", "## Keys of other trainers that are rejected\n", "| key | what to do |", "|---|---|"]
    parts += [f"| `{key}` | {_cell(fix)} |" for key, fix in REJECTED.items()]
    return "\n".join(parts) + "\n"


def keys(schema: type) -> list[tuple[str, str, str]]:
    """Key, default and meaning, from what --help prints, without the keys of methods, rewards and optimizers.

    A key without a text of its own shares that of the key before.
    """
    of_plugins = {
        f"{group.path}.{key}"
        for group in groups_of(completed(schema()))
        for key in fields_of(type(group.keys)).keys() - fields_of(group.shared)
    }
    found: list[tuple[str, str, str]] = []
    meaning = ""
    for key, default, text in re.findall(r"^  ([\w.]+)=(.*)\n((?:      .*\n?)*)", describe(schema), re.MULTILINE):
        meaning = " ".join(line.strip() for line in text.splitlines()) or meaning
        if key not in of_plugins:
            found.append((key, default, meaning))
    return found


def own_keys(prefix: str, group: Any) -> list[str]:
    """A table of the keys that the built-in plugins of a group have of their own, a column with the defaults of each plugin."""
    kinds = {name: settings_class(module) for name, module in group.plugins.built_in().items()}
    kinds = {name: kind for name, kind in kinds.items() if fields_of(kind)}
    owners = {key: kind for kind in kinds.values() for key in fields_of(kind) if key != "name"}
    rows, meaning = [], ""
    for key, owner in owners.items():
        meaning = " ".join(comment_on(owner, key)) or meaning
        defaults = [_code(str(shown(getattr(kind(), key)))) if key in fields_of(kind) else "" for kind in kinds.values()]
        if key not in fields_of(group) or len(set(defaults)) > 1:
            rows.append(f"| `{prefix}.{key}` | {' | '.join(defaults)} | {_cell(meaning)} |")
    head = f"| key | {' | '.join(f'`{name}`' for name in kinds)} | meaning |"
    return [head, "|---" * (2 + len(kinds)) + "|", *rows]


def _code(default: str) -> str:
    return default if default == "required" else f"`{default}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
