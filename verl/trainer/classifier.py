"""Training of a classifier on texts or chats with labels: `verl reward algorithm.name=classify`.

To read the code, start at `train`; the loop is that of fine-tuning. A method of one's own is a module with `scorer = "labels"` and
`Loss(settings, labels_N)`, see verl.algorithms.classify.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from verl import dist
from verl.config.pairs import PairsConfig, RewardTrainerConfig
from verl.config.plugin_settings import settings_of
from verl.data.classified import ClassColumns, Classified, load_classified
from verl.data.confusion import Confusion
from verl.data.labels import Labels, are_named, labels_of
from verl.data.loader import Loader, epoch_lengths
from verl.data.report import show_first_row
from verl.engine.build import Built, check_context
from verl.engine.build_heads import build_reward_model
from verl.engine.decisions import Decisions, Workload, choose_spread, decide, packing_of_pairs
from verl.engine.hardware import Hardware, measure
from verl.engine.outline import Outline
from verl.errors import UserError
from verl.models.kind import CLASSIFIER, LANGUAGE_MODEL, REWARD_MODEL, check_kind, kind_of
from verl.models.load import check_is_model, load_tokenizer, read_config
from verl.run import Run, TrainResult
from verl.trainer.loop import train_loop
from verl.trainer.oddities import say_oddities
from verl.trainer.resume import begin, find_checkpoint
from verl.trainer.validation import Validation

MOST_NAMED = 20  # labels whose F1 is a metric of its own
OF_PAIRS = ("chosen_key", "rejected_key", "tools_key")


def train(config: RewardTrainerConfig, device: torch.device) -> TrainResult:
    """Train with a config. `verl.trainer.reward_trainer.train` calls it, in whose session it runs.

    Raises:
        UserError: the config, the data, the model or the checkpoint is invalid.
        Stopped: a signal or the time limit ended the run.
    """
    method = load_method(config)
    with Run(config) as run:
        run.checkpoint = find_checkpoint(config.trainer, run)
        outline, hardware = Outline(config.model), measure(device)
        tokenizer = read_tokenizer(config, outline)
        spread = choose_spread(outline, hardware)  # raises before the data is read
        rows, validation = load_data(config, method, tokenizer, run)
        loader = build_loader(config, rows, hardware)
        total_steps = loader.total_steps(config.trainer)
        start = begin(config.trainer, run, rows.documents, loader.rows_per_step, total_steps)
        if start is None:
            return run.result()
        others = None if validation is None else validation.documents
        say_oddities(run, rows.documents, others, outline, loader.rows_per_step, total_steps)
        workload = Workload.of(epoch_lengths(rows.documents, config.trainer.seed), total_steps, loader.steps_per_epoch, loader.packing)
        run.enter("loading the model")
        built = build(config, tokenizer, rows, decide(outline, hardware, workload, spread, scalar_head=True))
        run.say(f"{built.describe()}\nplan: {method.trains}, {loader.describe(total_steps)}; into {run.directory}")
        if run.checkpoint is not None:
            from verl.engine import restore  # a new run restores nothing

            run.enter("loading the checkpoint")
            restore.load(run.checkpoint, built.engine)
        from verl.trainer.saving import Saver

        checks: Any = None if validation is None else Checks.of(validation, method, loader, built, run)
        with run.stepping(built.engine.trained_weights), Saver(config.trainer, run, built, validation=others) as saver:
            train_loop(config.trainer, method.loss(rows), loader, checks, built, start, run, saver)
        return run.result()


def dry_run(config: RewardTrainerConfig, device: torch.device) -> None:
    """Print the labels of the rows and the steps of a run. It reads no weights. Raises UserError: as `train`."""
    method = load_method(config)
    rows = load(config, method, "train", read_tokenizer(config, Outline(config.model)))
    loader = build_loader(config, rows, measure(device))
    if dist.is_main():
        print(f"data.train_files: {rows}\nplan: {method.trains}, {loader.describe(loader.total_steps(config.trainer))}", flush=True)


@dataclass(frozen=True)
class Method:
    """The method of `algorithm.name`.

    Attributes:
        make: its `Loss`, which gets the settings and the labels.
        settings: keys of its file.
        labels: the labels as far as the config and the model that the run starts from name them.
        trains: the trained model, for the log.
    """

    make: Callable[[Any, torch.Tensor], Any]
    settings: Any
    labels: Labels
    trains: str

    def loss(self, rows: Classified) -> Any:
        """Return the loss for a data set."""
        return self.make(self.settings, torch.from_numpy(rows.labels_N))


def load_method(config: RewardTrainerConfig) -> Method:
    """Load the method that the config names, and check it against the model.

    Raises:
        UserError: adapters are configured, a key is one of pairs, or the model that the run starts from has other labels.
    """
    model, data, plain = config.model, config.data, PairsConfig()
    module = config.algorithm.plugins.load("algorithm.name", config.algorithm.name)
    if model.lora_rank > 0 or model.lora_adapter_path is not None:
        key = "model.lora_rank" if model.lora_rank > 0 else "model.lora_adapter_path"
        fix = "leave model.lora_rank and model.lora_adapter_path out"
        raise UserError("a classifier is trained whole, without adapters", where=key, fix=fix)
    for key in OF_PAIRS:
        if getattr(data, key) != getattr(plain, key):
            what = "is a key of pairs of answers, and the rows of a classifier have one text"
            raise UserError(what, where=f"data.{key}", fix="remove it; data.prompt_key and data.label_key name the columns")
    settings = settings_of(config.algorithm, module)
    labels = Labels(tuple(settings.labels or ()), settings.problem)
    if settings.problem == "number":
        labels = Labels(("LABEL_0",), "number")
    return Method(module.Loss, settings, _with_those_of_model(labels, model.partial_pretrain, model.trust_remote_code), module.trains)


def _with_those_of_model(labels: Labels, path: str, trusted: bool) -> Labels:
    """Return the labels, or those of the classifier that the run starts from. Raises UserError: it has others, or is of another kind."""
    check_kind(path, (LANGUAGE_MODEL, REWARD_MODEL if labels.problem == "number" else CLASSIFIER), where=f"model.partial_pretrain={path}")
    if kind_of(path) != CLASSIFIER or labels.problem == "number":
        return labels
    config = read_config(path, trust_remote_code=trusted)
    there = labels_of(config)
    if config.problem_type is None:  # it may have been trained for either
        there = replace(there, problem=labels.problem)
    if there.problem != labels.problem:
        what = f"was trained for {there.problem} label{'s' * (there.problem == 'several')} of a text"
        raise UserError(
            what, where=f"model.partial_pretrain={path}", fix=f"set algorithm.problem={there.problem}, or start from another model"
        )
    if labels.names and are_named(there) and there.names != labels.names:
        what = f"has the labels {', '.join(there.shown)}, not {', '.join(labels.shown)} in this order"
        raise UserError(what, where=f"model.partial_pretrain={path}", fix="remove algorithm.labels, or start from a language model")
    return there if are_named(there) else labels


def read_tokenizer(config: RewardTrainerConfig, outline: Outline) -> PreTrainedTokenizerBase:
    """Load the tokenizer. Raises UserError: there is no such model."""
    path, data = config.model.partial_pretrain, config.data
    check_is_model(path)
    options: dict[str, Any] = {"chat_template": data.chat_template, "chat_template_kwargs": data.chat_template_kwargs}
    tokenizer = load_tokenizer(path, trust_remote_code=config.model.trust_remote_code, **options)
    check_context(outline)
    return tokenizer


def load_data(
    config: RewardTrainerConfig, method: Method, tokenizer: PreTrainedTokenizerBase, run: Run
) -> tuple[Classified, Classified | None]:
    """Load the rows of training and validation. Raises UserError: a row is invalid, or the validation has a label that training lacks."""
    run.enter("reading and tokenizing the rows")
    rows = load(config, method, "train", tokenizer)
    dist.check_same(rows.documents.fingerprint, what="the rows", where="data.train_files")
    run.say(f"data.train_files: {rows}")
    run.show(partial(show_first_row, tokenizer, *rows.documents.document(0), name="read"))
    if missing := _without_rows(rows):
        run.say(f"warning: no row of data.train_files has the label {', '.join(missing)}")
    if config.data.val_files is None:
        return rows, None
    validation = load(config, method, "val", tokenizer, rows.labels)
    run.say(f"data.val_files: {validation}")
    return rows, validation


def load(
    config: RewardTrainerConfig, method: Method, kind: str, tokenizer: PreTrainedTokenizerBase, labels: Labels | None = None
) -> Classified:
    """Load the rows of `data.train_files` or `data.val_files`; `kind` is "train" or "val".

    Args:
        labels: the labels of the training rows; None: these are the training rows.
    Raises:
        UserError: a row is invalid, or all have the same label.
    """
    data, key = config.data, f"data.{kind}_files"
    columns = ClassColumns(data.prompt_key or "prompt", data.label_key)
    samples = getattr(data, f"{kind}_max_samples")
    found = load_classified(data, columns, labels or method.labels, getattr(data, key[5:]), tokenizer, key=key, max_samples=samples)
    if labels is None and len(found.labels.names) < 2 and found.labels.problem == "one":
        what = f"all {len(found.labels_N):,} rows have the label {found.labels.names[0]!r}, so there is nothing to learn"
        raise UserError(what, where=key, fix="give rows with other labels, or name all labels in algorithm.labels")
    return found


def _without_rows(rows: Classified) -> list[str]:
    if rows.labels.problem == "number":
        return []
    has = rows.labels_N if rows.labels_N.ndim == 1 else np.flatnonzero(rows.labels_N.sum(0))
    return [name for number, name in enumerate(rows.labels.shown) if number not in has]


def build_loader(config: RewardTrainerConfig, rows: Classified, hardware: Hardware) -> Loader:
    data = config.data
    return Loader(
        documents=rows.documents,
        packing=packing_of_pairs(data, hardware),
        rows_per_step=data.train_batch_size or data.micro_batch_size_per_gpu * dist.world_size(),
        seed=config.trainer.seed,
        rank=dist.rank(),
        world_size=dist.world_size(),
        pin=hardware.has_gpu,
    )


def build(config: RewardTrainerConfig, tokenizer: PreTrainedTokenizerBase, rows: Classified, decisions: Decisions) -> Built:
    """Build the classifier. Raises UserError: there is no such model, or it cannot have the head."""
    padding: int | None = tokenizer.pad_token_id
    documents = rows.documents
    if any(documents.document(number)[0][-1] == padding for number in range(len(documents))):
        padding = None  # transformers reads the score at the last token that is not padding
    options: dict[str, Any] = {"stop_ids": documents.stop_ids, "seed": config.trainer.seed, "labels": rows.labels}
    return build_reward_model(config.model, config.optim, tokenizer, decisions, padding=padding, **options)


@dataclass(frozen=True)
class Checks:
    """Measures a classifier in training, as `verl.trainer.validation.Validation` does. Every rank calls its methods.

    Attributes:
        mean: computes the means over rows: loss, and accuracy or mean absolute error.
        loss: keeps the predictions of the rows that `mean` goes through.
    """

    rows: Classified
    mean: Validation
    loss: Any
    run: Run

    @staticmethod
    def of(rows: Classified, method: Method, loader: Loader, built: Built, run: Run) -> "Checks":
        loss = method.loss(rows)
        return Checks(rows, Validation(rows.documents, loss, loader, built, run, None), loss, run)

    def names(self, step: int) -> dict[str, float]:
        """Return metrics by the names that `measure` will give them."""
        found = self.mean.names(step)
        return found | (self._confusion([], []).metrics("val/", MOST_NAMED) if self._has_labels else {})

    def measure(self, step: int) -> dict[str, float]:
        """Return the metrics after a step, and print the counts of each label. If the run stops meanwhile, there are none."""
        if not self._has_labels or not hasattr(self.loss, "predicted"):
            return self.mean.measure(step)
        self.loss.predicted = []
        try:
            found = self.mean.measure(step)
            kept = [(numbers.numpy(), predicted.numpy()) for numbers, predicted in self.loss.predicted]
        finally:
            self.loss.predicted = None
        everywhere = [one for of_rank in dist.gathered(kept) for one in of_rank]
        if not found or not everywhere:
            return found
        numbers, predicted = (np.concatenate(parts) for parts in zip(*everywhere, strict=True))
        confusion = self._confusion(self.rows.labels_N[numbers], predicted)
        self.run.say(f"step {step}: {confusion.describe()}")
        return found | confusion.metrics("val/", MOST_NAMED)

    @property
    def _has_labels(self) -> bool:
        return self.rows.labels.problem != "number"

    def _confusion(self, actual: Any, predicted: Any) -> Confusion:
        return Confusion.of(self.rows.labels, np.asarray(actual), np.asarray(predicted))
