"""Writes docs/keys.md from verl/config/: python docs/make_keys.py"""

import re
from pathlib import Path
from typing import Any

import verl
from verl.config.load import describe
from verl.config.spellings import ANSWERED, SAME

PAGE = Path(__file__).with_name("keys.md")
COMMANDS: dict[str, Any] = {
    "verl sft": verl.SFTConfig,
    "verl ppo": verl.PPOConfig,
    "verl reward": verl.RewardTrainerConfig,
    "verl eval": verl.EvalConfig,
    "verl chat DIR": verl.ChatConfig,
    "verl export SRC DIR": verl.ExportConfig,
    "verl demo": verl.DemoConfig,
}
HEAD = """\
# Keys

Every key of every command, made from `verl/config/` by `python docs/make_keys.py`. A value is given as `key=value`, or in a YAML file
that `--config FILE.yaml` names (repeatable; later files win, and `key=value` wins over all files). Lists are written `[a,b]`, nothing is
`null`, and `~` is your home folder. A key that is not here is an error that names the nearest one.
"""


def page() -> str:
    parts = [HEAD]
    for command, schema in COMMANDS.items():
        parts += [f"## `{command}`\n", "| key | default | meaning |", "|---|---|---|"]
        parts += [f"| `{key}` | {_code(default)} | {_cell(meaning)} |" for key, default, meaning in keys(schema)]
        parts.append("")
    parts += ["## Other spellings that are read\n", "| written | read as |", "|---|---|"]
    parts += [f"| `{written}` | `{read}` |" for written, read in SAME.items()]
    parts += ["", "## Keys of other trainers that are answered with an error\n", "| key | what to do |", "|---|---|"]
    parts += [f"| `{key}` | {_cell(answer)} |" for key, answer in ANSWERED.items()]
    return "\n".join(parts) + "\n"


def keys(schema: type) -> list[tuple[str, str, str]]:
    """Key, default and meaning, from what --help prints. A key without a text of its own shares that of the key before."""
    found: list[tuple[str, str, str]] = []
    meaning = ""
    for key, default, text in re.findall(r"^  ([\w.]+)=(.*)\n((?:      .*\n?)*)", describe(schema), re.MULTILINE):
        meaning = " ".join(line.strip() for line in text.splitlines()) or meaning
        found.append((key, default, meaning))
    return found


def _code(default: str) -> str:
    return default if default == "required" else f"`{default}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
