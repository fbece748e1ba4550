"""Inspects the data of a trainer's config: reads and examines the rows, and describes the run that they would make."""

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from verl.config.pairs import RewardTrainerConfig
from verl.config.ppo import PPOConfig
from verl.config.sft import SFTConfig
from verl.data.loader import Packing, describe_steps
from verl.data.mixture import mixture_of
from verl.data.preferences import columns_of
from verl.data.prompts import describe_draws
from verl.data.render import Renderer
from verl.data.source import Entry, describe_sources, resolve_entries
from verl.data.tables import Columns
from verl.data.template_end import added_end
from verl.engine.decisions import packing_of, packing_of_pairs
from verl.engine.hardware import ASSUMED
from verl.engine.outline import Outline
from verl.errors import UserError
from verl.inspection.copies import copies_in, overlap_of
from verl.inspection.lengths import fill_of, lengths_of
from verl.inspection.picks import Picks
from verl.inspection.reading import DocumentReading, PromptReading, Reading
from verl.inspection.result import DataSet, File, Finding, Inspection, Steps
from verl.inspection.scan import Scan, scan
from verl.inspection.shown import Shower
from verl.progress import quiet_libraries
from verl.trainer.inputs import read_tokenizer

TrainerConfig = SFTConfig | RewardTrainerConfig | PPOConfig


@dataclass(frozen=True)
class _Trainer:
    """What differs between the trainers.

    Attributes:
        packing: how rows become micro-batches; None for prompts, whose answers do not exist yet.
    """

    command: str
    unit: str
    reading: Reading
    rows_per_step: int
    limit: str
    stops_at_long: bool
    packing: Packing | None


def inspect(config: TrainerConfig, picks: Picks, *, exact: bool = False, console: Console | None = None) -> Inspection:
    """Inspect the data of a config.

    Args:
        picks: rows to show.
        exact: whether to tokenize all rows, however many; otherwise, a sample of very many.
        console: console of the progress bar.
    Raises:
        UserError: there is no such model or file, no row of a file can be read, or the chat template cannot be used.
    """
    since = time.perf_counter()
    trainer = _trainer_of(config)
    data: Any = config.data
    with quiet_libraries():
        outline = Outline(config.model)
        tokenizer = read_tokenizer(outline, data, may_have_head=trainer.command == "reward")
        train, of_train, entries = _read(config, trainer, "train", tokenizer, picks, exact, console)
        validation = None
        if data.val_files is not None:
            validation, of_validation, _ = _read(config, trainer, "val", tokenizer, Picks(), exact, console)
        stop_ids = sorted(of_train.stop_ids) or Renderer(tokenizer).stop_ids
        shower = Shower(tokenizer, trainer.reading)
        shown = [shower.show(number, row, why) for number, (why, row) in sorted(of_train.picked.items())]
        return Inspection(
            command=trainer.command,
            model=str(config.model.partial_pretrain),
            template=_template(data, tokenizer),
            stop_tokens=[str(token) for token in tokenizer.convert_ids_to_tokens(stop_ids)],
            train=train,
            validation=validation,
            overlap=[] if validation is None else overlap_of(of_validation, of_train),
            steps=_steps(config, trainer, train, of_train, entries),
            rows=shown,
            missing=sorted(of_train.missing),
            found=None if picks.text is None else of_train.matched,
            seconds=time.perf_counter() - since,
        )


def _trainer_of(config: TrainerConfig) -> _Trainer:
    data: Any = config.data
    if isinstance(config, PPOConfig):
        limit, stops = f"data.max_prompt_length={data.max_prompt_length}", data.overlong_prompts == "error"
        return _Trainer("ppo", "prompts", PromptReading(data), data.prompts_per_step, limit, stops, None)
    rows, limit, stops = (
        data.train_batch_size or data.micro_batch_size_per_gpu,
        f"data.max_length={data.max_length}",
        data.truncation == "error",
    )
    if isinstance(config, RewardTrainerConfig):
        _check_pairs(config)
        columns = columns_of(data, getattr(config.algorithm.plugins.load("algorithm.name", config.algorithm.name), "reads", "pairs"))
        unit = "rows" if columns.documents_per_row == 1 else "pairs"
        return _Trainer("reward", unit, DocumentReading(columns, data), rows, limit, stops, packing_of_pairs(data, ASSUMED))
    return _Trainer("sft", "rows", DocumentReading(Columns.of(data), data), rows, limit, stops, packing_of(data, ASSUMED))


def _check_pairs(config: RewardTrainerConfig) -> None:
    """Raise UserError if the rows of a method are no pairs but texts with labels."""
    name = config.algorithm.name
    if config.algorithm.plugins.load("algorithm.name", name).scorer == "labels":
        fix = "verl reward trainer.dry_run=true reads all rows and counts the labels"
        raise UserError(
            "shows chats, pairs and prompts, and no texts with labels", where=f"verl inspect with algorithm.name={name}", fix=fix
        )


def _read(
    config: TrainerConfig,
    trainer: _Trainer,
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    picks: Picks,
    exact: bool,
    console: Console | None,
) -> tuple[DataSet, Scan, list[Entry]]:
    """Read the rows of data.train_files or data.val_files; `kind` is "train" or "val"."""
    data: Any = config.data
    key = f"data.{kind}_files"
    entries, limit = resolve_entries(getattr(data, key.partition(".")[2]), key), getattr(data, f"{kind}_max_samples")
    found = scan(
        entries,
        tokenizer,
        trainer.reading,
        picks,
        limit=None if limit == -1 else limit,
        workers=getattr(data, "num_workers", None),
        exact=exact,
        console=console,
    )
    return _data_set(key, trainer, found, entries), found, entries


def _data_set(key: str, trainer: _Trainer, found: Scan, entries: list[Entry]) -> DataSet:
    counts = iter(found.rows_by_source)
    files = [File(str(source), next(counts, 0)) for entry in entries for source in entry.sources]
    if found.long.rows and trainer.stops_at_long:
        longest = int(found.joined("whole").max())
        name, _, _ = trainer.limit.partition("=")
        keep = f"{name}={longest} keeps them whole; " + (
            "data.overlong_prompts=drop drops them"
            if trainer.command == "ppo"
            else "data.truncation=right or data.truncation=left cuts them"
        )
        what = f"longer than {trainer.limit}"
        found.invalid[what] = Finding(what, found.long.rows, found.long.places, f"the longest has {longest:,} tokens", keep)
    lengths, trained = found.joined("lengths"), found.joined("trained")
    return DataSet(
        key=key,
        unit=trainer.unit,
        files=files,
        rows=found.rows,
        tokenized=found.tokenized,
        one_in=found.one_in,
        used=found.used,
        cut=0 if trainer.stops_at_long or trainer.command == "ppo" else found.long.rows,
        tokens=int(lengths.sum()),
        trained_tokens=int(trained.sum()),
        recognised=[*describe_sources(entries), *found.notes.lines()],
        invalid=found.invalid.sorted(),
        dropped=found.dropped.sorted(),
        lengths=lengths_of(found.joined("whole")),
        trained=lengths_of(trained) if trained.any() else None,
        copies=copies_in(found),
        compared=len(found.joined("compared")),
        control=found.control.sorted(),
        characters=found.characters.sorted(),
    )


def _template(data: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        return "none: the tokenizer has no chat template"
    name = f"data.chat_template={data.chat_template}" if data.chat_template else "the tokenizer's own"
    values = f", with {data.chat_template_kwargs}" if data.chat_template_kwargs else ""
    end = added_end(tokenizer)
    return f"{name}{values}{f'; it writes no end after the last answer, so {end} is added' if end else ''}"


def _steps(config: TrainerConfig, trainer: _Trainer, train: DataSet, found: Scan, entries: list[Entry]) -> Steps | None:
    """Return the steps of a run on one GPU; None if there is nothing to train."""
    if not train.used:
        return None
    scale = 1 if not train.is_sample else int((found.joined("digests") != 0).sum()) / max(1, train.tokenized)
    rows = round(train.used * scale)
    tokens = train.tokens * scale
    mixture = mixture_of(entries, found.rows_by_source, np.flatnonzero(found.joined("digests")), train.key)
    if mixture is not None:
        train.recognised.append(mixture.identity)
        tokens, rows = tokens * mixture.rows / rows, mixture.rows
    per_step, epochs, asked = trainer.rows_per_step, config.trainer.total_epochs, config.trainer.total_training_steps
    if trainer.packing is None:
        total = asked or max(1, rows * epochs // per_step)
        return Steps(total, max(1, rows // per_step), per_step, describe_draws(rows, per_step, total), round(tokens))
    per_epoch = math.ceil(rows / per_step)
    per_row = len(trainer.reading.names)
    fill, many = fill_of(found.joined("lengths").reshape(-1, per_row).sum(1), trainer.packing, per_step, config.trainer.seed)
    text = f"of {describe_steps(rows, per_step, trainer.unit)}"
    return Steps(
        asked or per_epoch * epochs, per_epoch, per_step, text, round(tokens), fill, trainer.packing.token_budget is not None, many
    )
