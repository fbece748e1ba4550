"""The rows of `verl reward`, with all that its method reads beside the tokens: labels, margins, and the reference's log-probabilities."""

from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from verl import dist
from verl.config.pairs import PairsConfig, RewardTrainerConfig
from verl.data.documents import Documents
from verl.data.loader import Loader
from verl.data.preferences import columns_of, with_numbers
from verl.engine.build import Built
from verl.engine.references import AdapterOffReference
from verl.run import Run
from verl.trainer.inputs import load_data
from verl.trainer.preference import Preference, has_new_adapter
from verl.trainer.preference_steps import PreferenceLoader, preference_loader
from verl.trainer.reference_scores import ReferenceScores


def load_preferences(
    data: PairsConfig, method: Preference, tokenizer: PreTrainedTokenizerBase, run: Run
) -> tuple[Documents, Documents | None]:
    """Load the training and validation rows as the method reads them. Every rank calls it.

    Raises:
        UserError: a file or a row is invalid.
    """
    columns = columns_of(data, method.reads)
    train, validation = load_data(data, columns, tokenizer, run)
    if method.reads == "labels" and columns.documents_per_row == 2:
        run.say("each pair is read as two rows: a good answer and a bad one")
    both = ((train, "train"), (validation, "val"))
    numbered = [None if rows is None else with_numbers(rows, data, method.reads, kind) for rows, kind in both]
    for rows, kind in zip(numbered, ("train", "val"), strict=True):
        dist.check_same(None if rows is None else rows.fingerprint, what="the rows", where=f"data.{kind}_files")
    notes = getattr(method.loss, "notes", None)
    for line in notes(getattr(numbered[0], "number_R", None)) if notes else ():
        run.say(f"data.train_files: {line}" if not line.startswith("warning: ") else line)
    assert numbered[0] is not None
    return numbered[0], numbered[1]


def prepared(
    config: RewardTrainerConfig,
    method: Preference,
    loader: Loader,
    validation: Documents | None,
    built: Built,
    run: Run,
    total_steps: int,
) -> tuple[PreferenceLoader, Documents | None]:
    """Return a loader of all that the loss reads, and the validation rows. Every rank calls it, while the model is the initial one."""
    if not method.needs_reference:
        return preference_loader(loader, method.loss, built.engine, None), validation
    run.enter("computing the reference's log-probabilities")
    live = _is_live(config, loader, total_steps)
    reference = AdapterOffReference(built) if live else None
    stored = ReferenceScores.of(built, run) if not live or validation is not None else None
    whole = preference_loader(loader, method.loss, built.engine, reference)
    if stored is not None and validation is not None:
        validation = _scored(stored, validation, "val", replace(loader, documents=validation), None)
    if live:
        run.say("reference: the model without its adapter, in each step")
        return whole, validation
    assert stored is not None
    train: Any = loader.documents
    # The epochs of a mixture have different rows.
    steps = min(total_steps, loader.steps_per_epoch) if train.choice is None or total_steps <= loader.steps_per_epoch else None
    return replace(whole, documents=_scored(stored, train, "train", loader, steps)), validation


def _is_live(config: RewardTrainerConfig, loader: Loader, total_steps: int) -> bool:
    """Return whether the reference computes in each step. `auto` does so where that costs no more than computing it before."""
    asked = config.algorithm.reference
    return asked == "adapter_off" or (asked == "auto" and has_new_adapter(config) and total_steps <= loader.steps_per_epoch)


def _scored(stored: ReferenceScores, documents: Any, name: str, loader: Loader, steps: int | None) -> Any:
    found = stored.add_to(documents, name, loader, steps=steps)
    others = getattr(documents, "mismatched", None)
    if others is None:
        return found
    return replace(found, mismatched=stored.add_to(others, f"{name}-mismatched", replace(loader, documents=others), steps=steps))
