"""Checks of the keys of what is measured at validations: sample answers, the best checkpoint, early stopping."""

import difflib
from collections.abc import Sequence
from typing import Protocol

from verl.config.shared import TrainerConfig
from verl.errors import UserError, at_least, one_of

# Metrics whose best value is known from the end of their name.
BEST_MODES = {
    "loss": "min",
    "perplexity": "min",
    "kl": "min",
    "divergence": "min",
    "cross_entropy": "min",
    "exact_match": "max",
    "accuracy": "max",
    "reward": "max",
    "margin": "max",
    "f1": "max",
}
# What the validation of fine-tuning measures, and with a teacher.
ANSWERS = ("loss", "exact_match")
TAUGHT = (*ANSWERS, "cross_entropy", "divergence", "teacher_gap", "teacher_agreement")


def check_best(trainer: TrainerConfig, val_files: object, measured: Sequence[str] | None) -> None:
    """Check the keys of the best checkpoint and of early stopping. Raises UserError naming the key.

    Args:
        measured: what the validation measures, without `val/`; None: not known yet.
    """
    one_of("trainer.best_mode", trainer.best_mode, (None, "min", "max"))
    at_least("trainer.patience", trainer.patience, 1)
    if trainer.best_metric is None:
        for key in ("best_mode", "patience"):
            if getattr(trainer, key) is not None:
                fix = "set trainer.best_metric, such as val/loss"
                raise UserError("there is no trainer.best_metric", where=f"trainer.{key}", fix=fix)
        return
    if not trainer.best_metric.startswith("val/"):
        what = f"{trainer.best_metric} is no metric of the validation"
        name = trainer.best_metric.rpartition("/")[2]
        fix = f"did you mean val/{name}?" if name in (measured or ()) else f"give one that begins with val/, such as {_example(measured)}"
        raise UserError(what, where="trainer.best_metric", fix=fix)
    if val_files is None:
        raise UserError("there are no validation rows", where="trainer.best_metric", fix="set data.val_files")
    if trainer.save_freq == "never":
        raise UserError("trainer.save_freq=never saves no checkpoint", where="trainer.best_metric", fix="set another trainer.save_freq")
    name = trainer.best_metric.removeprefix("val/")
    if measured is not None and name not in measured:
        near = difflib.get_close_matches(name, measured, n=1)
        names = ", ".join(f"val/{one}" for one in measured)
        fix = f"did you mean val/{near[0]}? The validation measures {names}" if near else f"write one of {names}"
        raise UserError(f"the validation does not measure {trainer.best_metric}", where="trainer.best_metric", fix=fix)
    best_mode(trainer)


def _example(measured: Sequence[str] | None) -> str:
    return f"val/{measured[0]}" if measured else "val/loss"


def best_mode(trainer: TrainerConfig) -> str:
    """Return "min" or "max". Raises UserError: neither the config nor the metric's name says which."""
    name = str(trainer.best_metric)
    found = trainer.best_mode or mode_of(name)
    if found is None:
        what = f"it is not known whether the best {name} is the smallest or the largest"
        raise UserError(what, where="trainer.best_mode", fix="set trainer.best_mode=min or trainer.best_mode=max")
    return found


class Sampled(Protocol):
    """Keys of sample answers."""

    rows: int
    max_new_tokens: int


def check_sampled(samples: Sampled, trainer: TrainerConfig, val_files: object, text_key: str | None) -> None:
    """Check the keys of sample answers. Raises UserError naming the key."""
    at_least("samples.rows", samples.rows, 0)
    at_least("samples.max_new_tokens", samples.max_new_tokens, 1)
    if samples.rows == 0:
        if trainer.best_metric == "val/exact_match":
            what = "no rows are answered in this run, so that val/exact_match is not known"
            raise UserError(what, where="trainer.best_metric", fix="set samples.rows, such as 32, or trainer.best_metric=val/loss")
        return
    if val_files is None:
        raise UserError("there are no validation rows to answer", where="samples.rows", fix="set data.val_files")
    if text_key:
        raise UserError("plain text has no questions to answer", where="samples.rows", fix="set it to 0, or remove data.text_key")


def mode_of(metric: str) -> str | None:
    """Return whether a metric is best where it is smallest ("min") or largest ("max"), if its name says so."""
    return next((mode for end, mode in BEST_MODES.items() if metric.endswith(("/" + end, "_" + end))), None)
