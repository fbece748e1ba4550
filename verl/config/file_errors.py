"""What is said about a config file that is not YAML with keys at its top."""

from pathlib import Path

import yaml

from verl.errors import UserError

EXAMPLE = "`data: {train_files: train.jsonl}`"


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
