"""Data sets on the Hugging Face Hub: their configurations, splits and rows."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from verl.data.formats.arrow import ROWS_PER_BATCH, table_rows, used_columns
from verl.data.row import Rows, Wanted, first_line
from verl.errors import UserError

TRAINING, EVALUATION = ("train",), ("test", "validation", "valid", "val", "dev")  # splits, the first that exists is taken
LISTED = re.compile(r"(?:available|multiple)[^:\[\n]*:\s*\[?([^\]\n]+)", re.IGNORECASE)  # the configurations in an error of `datasets`

LOADED: dict[tuple[str, str], datasets.DatasetDict] = {}  # by name and configuration


def resolve(entry: str, *, for_training: bool) -> str:
    """Return `name:config:split` of an entry `name`, `name:config`, `name:config:split` or `name::split`.

    Args:
        for_training: whether the split `train` is taken where none is named; else `test`, or `validation` if there is no `test`.
    Raises:
        UserError: there is no such data set, configuration or split; or there are several configurations and none is named.
    """
    name, config, split = [*entry.split(":"), "", ""][:3]
    splits = _splits(name, config)
    config = next(iter(splits.values())).info.config_name or config or "default"
    LOADED[name, config] = splits
    wanted = (split,) if split else TRAINING if for_training else EVALUATION
    found = next((one for one in wanted if one in splits), None)
    if found is None:
        kinds = "split train" if for_training else "split for evaluation (test or validation)"
        what = f"the data set has no {f'split {split}' if split else kinds}; it has {', '.join(splits)}"
        examples = " or ".join(f"{name}:{config}:{one}" for one in splits)
        raise UserError(what, where=entry, fix=f"name the split: {examples}")
    return f"{name}:{config}:{found}"


def describe(source: str) -> str:
    """Return the choice of a data set's configuration and split, in one line."""
    name, config, split = source.split(":")
    return f"{name}: configuration {config}, split {split} (of {', '.join(_splits(name, config))})"


def rows(source: str, wanted: Wanted | None = None) -> Rows:
    """Yield the rows of a resolved data set. `wanted` is as in `verl.data.source.read_rows_and_errors`."""
    dataset = _dataset(source)
    used, unread = used_columns(dataset.features.arrow_schema, wanted)
    return table_rows(source, _batches(dataset.select_columns(used) if unread else dataset), unread)


def files(source: str) -> list[Path]:
    """Return the files in which `datasets` keeps a resolved data set."""
    return [Path(part["filename"]) for part in _dataset(source).cache_files]


def _batches(dataset: datasets.Dataset) -> Iterator[Any]:
    for table in dataset.with_format("arrow").iter(ROWS_PER_BATCH):
        yield from table.combine_chunks().to_batches()


def _dataset(source: str) -> datasets.Dataset:
    name, config, split = source.split(":")
    return _splits(name, config)[split]


def _splits(name: str, config: str) -> datasets.DatasetDict:
    """Download a data set, or find it in the cache of `datasets`. An empty `config` asks for the only one, or the default one."""
    if (name, config) in LOADED:
        return LOADED[name, config]
    datasets.disable_progress_bars()
    try:
        return LOADED.setdefault((name, config), datasets.load_dataset(name, config or None))
    except Exception as error:  # the Hub, the network or the data set's own reader may raise anything
        raise _error(name, config, error) from error


def _error(name: str, config: str, error: Exception) -> UserError:
    found = LISTED.search(str(error))
    configs = sorted(part.strip(" '\"") for part in found[1].split(",")) if found else []
    if configs:
        what = f"the data set has no configuration {config}" if config else "the data set has several configurations"
        return UserError(f"{what}: {', '.join(configs)}", where=name, fix=f"name one: {' or '.join(f'{name}:{one}' for one in configs)}")
    what = f"no such file, and the data set cannot be loaded from the Hub: {first_line(error)}"
    return UserError(what, where=name, fix=f"check the name and the network, or give a path; the current folder is {Path.cwd()}")
