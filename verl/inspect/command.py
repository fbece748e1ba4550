"""Runs `verl inspect key=value …`, and prints or writes what it found."""

import json
from pathlib import Path
from typing import Any

from verl.commands import PPO, REWARD, SFT
from verl.config.load import load_config
from verl.errors import UserError
from verl.inspect.picks import Picks


def run(words: list[str], picks: Picks, *, html: Path | None = None, json_file: Path | None = None, exact: bool = False) -> None:
    """Inspect the data that the arguments of a trainer name, and print what was found.

    Args:
        html, json_file: files to write it to, too.
        exact: as in `verl.inspect.inspection.inspect`.
    Raises:
        UserError: the config, the data or the model is invalid; a row that was asked for does not exist; or a file cannot be written.
    """
    config = config_of(words)
    picks.check()
    for path in (html, json_file):
        _check_parent(path)
    from verl.inspect.inspection import inspect  # imports torch; what is wrong with the arguments is found before
    from verl.inspect.terminal import show

    found = inspect(config, picks, exact=exact)
    show(found)
    if json_file is not None:
        _write(json_file, json.dumps(found.as_json(), ensure_ascii=False, indent=1) + "\n")
    if html is not None:
        from verl.inspect.page import page

        _write(html, page(found))


def config_of(words: list[str]) -> Any:
    """Build the config of the trainer whose arguments these are: that of `verl sft`, or else of `verl reward` or `verl ppo`.

    Raises:
        UserError: they are no trainer's; the error is that of `verl sft`.
    """
    try:
        return load_config(SFT.schema(), words)
    except UserError as error:
        for command in (REWARD, PPO):
            try:
                return load_config(command.schema(), words)
            except UserError:
                continue
        raise error


def _check_parent(path: Path | None) -> None:
    if path is not None and not path.expanduser().parent.is_dir():
        raise UserError(f"there is no folder {str(path.parent)!r}", where=str(path), fix=f"mkdir -p {path.parent}")


def _write(path: Path, text: str) -> None:
    from verl.disk import disk_errors_named

    path = path.expanduser()
    with disk_errors_named(path.parent, fix="choose another file"):
        # Half of a surrogate pair may be in the location of a row: file names are bytes.
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    print(f"written: {path}")
