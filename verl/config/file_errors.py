"""What is said about a config file that is not YAML with keys at its top."""

from pathlib import Path

import yaml

from verl.errors import UserError

ROWS = (".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".txt")  # ends of the names of files of rows
EXAMPLE = "`data: {train_files: train.jsonl}`"


def refuse_kind(path: Path) -> None:
    """Raise UserError if what is given as a config file is a directory, or by its name a file of rows."""
    if path.is_dir():
        found = sorted(str(one) for end in ("yaml", "yml") for one in path.glob(f"*.{end}"))
        fix = f"did you mean --config {found[0]}?" if found else "give a YAML file, such as the config.yaml of a run"
        raise UserError("is a directory, expected a config file", where=f"--config {path}", fix=fix)
    if path.name.lower().endswith(ROWS) and path.is_file():
        fix = f"write data.train_files={path}, or test_file={path} for verl eval"
        raise UserError("is a file of rows, expected a config file with keys", where=f"--config {path}", fix=fix)


def not_yaml(path: Path, error: yaml.YAMLError) -> UserError:
    """Return the error of a file that cannot be parsed."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error).partition("\n")[0]
    where = f"{path}:{mark.line + 1}" if mark else str(path)
    if problem == "but found another document":
        fix = "keep the keys of one document; for several, write several files, each with --config"
        return UserError("a second YAML document begins here (---), expected one", where=where, fix=fix)
    fix = "correct the file: one `key: value` per line, groups indented with spaces"
    return UserError(f"not YAML: {problem}", where=where, fix=fix)


def without_keys(path: Path, loaded: object) -> UserError:
    """Return the error of a config file that has no keys at its top."""
    if loaded is None:
        return UserError("the config file has no keys", where=str(path), fix=f"write keys, such as {EXAMPLE}, or leave out --config")
    if isinstance(loaded, list) and loaded and all(isinstance(item, dict) and {"role", "from"} & item.keys() for item in loaded):
        fix = f'a config has keys, such as {EXAMPLE}; rows are written as JSONL: {{"messages": [{{"role": …, "content": …}}, …]}}'
        return UserError("found a list of chat messages, which is data and no config", where=str(path), fix=fix)
    kind = "text" if isinstance(loaded, str) else f"a {type(loaded).__name__}"
    return UserError(f"found {kind}, expected keys and values", where=str(path), fix=f"write keys, such as {EXAMPLE}")
