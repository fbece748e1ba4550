"""What is said about a directory that has no finished evaluation: what it is instead, and the command that evaluates it."""

import difflib
import json
import shlex
from pathlib import Path

from verl.errors import UserError
from verl.eval.files import PREDICTIONS, RESULTS
from verl.run_directory import folder_of_runs, is_run_directory

FIX = "name the output_dir of a finished evaluation, or a checkpoint"


def no_evaluation(name: str, where: str, other: str | None = None) -> UserError:
    """Return the error of a directory that is not of a finished evaluation.

    Args:
        other: the directory with which it is compared; if it is of a finished evaluation, its questions are to be answered.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return _no_directory(folder, where)
    if (folder / PREDICTIONS).is_file() and not (folder / RESULTS).is_file():
        fix = "run its command again, with overwrite=true"
        return UserError(f"is an evaluation that was interrupted: it has no {RESULTS}", where=where, fix=fix)
    if inside := sorted(str(path) for path in folder.iterdir() if (path / RESULTS).is_file()):
        what = f"is not an evaluation, and has {', '.join(inside[:3])} in it"
        return UserError(what, where=where, fix=f"name one of them, such as {inside[0]}")
    if (found := folder_of_runs(name, lambda run: evaluating(run, other))) is not None:
        return UserError(found.what, where=where, fix=str(found.fix).replace("name", "evaluate", 1))
    is_model = any((folder / file).is_file() for file in ("config.json", "adapter_config.json"))
    if is_model or is_run_directory(name):
        what = f"is a {'checkpoint' if is_model else 'run'}, not an evaluation: it has no {RESULTS}"
        return UserError(what, where=where, fix=f"evaluate it first: {evaluating(shlex.quote(name), other)}")
    return UserError(f"is not an evaluation: it has no {RESULTS}", where=where, fix=FIX)


def _no_directory(folder: Path, where: str) -> UserError:
    beside = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, beside, n=1)
    fix = f"did you mean {folder.parent / near[0]}?" if near else f"{FIX}; the current folder is {Path.cwd()}"
    return UserError("is a file, not an evaluation" if folder.exists() else "no such directory", where=where, fix=fix)


def evaluating(model: str, other: str | None = None) -> str:
    """Return a command that evaluates a model into a directory beside it, on the questions of another evaluation if there is one."""
    rows = "test.jsonl"
    try:
        found = json.loads((Path(other or "").expanduser() / RESULTS).read_text(encoding="utf-8"))["config"]["test_file"]
        rows = shlex.quote(found) if isinstance(found, str) else rows
    except (OSError, ValueError, LookupError, TypeError):
        pass  # it is not evaluated either
    return f"verl eval model_path={model} test_file={rows} output_dir={model.rstrip('/')}-eval"
