"""Runs `verl inspect`: prints what was found, and writes it as a page or as JSON."""

import json
from pathlib import Path

from verl.disk import disk_errors_named
from verl.errors import UserError
from verl.inspection.inspection import TrainerConfig, inspect
from verl.inspection.page import page
from verl.inspection.picks import Picks
from verl.inspection.terminal import show
from verl.inspection.words import count, verdict


def run(config: TrainerConfig, picks: Picks, *, html: Path | None = None, json_file: Path | None = None, exact: bool = False) -> bool:
    """Inspect the data of a trainer's config, and print what was found.

    Args:
        html, json_file: files to write it to, too.
        exact: as in `verl.inspection.inspection.inspect`.
    Returns:
        whether the trainer would begin.
    Raises:
        UserError: the data or the model is invalid, or a row that was asked for does not exist; nothing is printed or written then.
        DiskError: a file cannot be written.
    """
    found = inspect(config, picks, exact=exact)
    if found.missing:
        place = f"{found.train.files[0].name}:1"
        fix = f"{found.train.key} has {count(found.train.rows, 'rows')}; name one by its number or its place, such as {place}"
        raise UserError(f"there is no row {' and no row '.join(found.missing)}", where="--row", fix=fix)
    show(found)
    if json_file is not None:
        _write(json_file, json.dumps(found.as_json(), ensure_ascii=False, indent=1) + "\n")
    if html is not None:
        _write(html, page(found))
    return verdict(found)[0]


def _write(path: Path, text: str) -> None:
    path = path.expanduser()
    with disk_errors_named(path, fix="choose another file"):
        # Half of a surrogate pair may be in the location of a row: names of files are bytes.
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    print(f"written: {path}", flush=True)
