"""The position of a run: how far it is, and what identifies its rows. Each checkpoint has it in trainer/state.json."""

from dataclasses import dataclass, field

from verl.data.fingerprint import Fingerprint

STATE = "state.json"


@dataclass(frozen=True)
class Waited:
    """How long a run has waited for a better validation (trainer.patience).

    Attributes:
        metric: the metric that is to become better (trainer.best_metric).
        best, step: its best value, and the step of it; None and 0 if there is none yet.
        validations: number of validations since.
        rows: identity of the validation rows.
    """

    metric: str
    best: float | None
    step: int
    validations: int
    rows: str


@dataclass(frozen=True)
class Position:
    """Progress of a run, and the identity of its data, from which it resumes.

    Attributes:
        step: finished optimizer steps.
        tokens: tokens seen so far over all ranks, without filler.
        supervised_tokens: trained tokens so far.
        rows: rows of the training set.
        rows_per_step: global batch size in rows.
        seed: seed of the row order.
        data_fingerprint: identity of the tokenized rows; in checkpoints of older versions, a hash that cannot be compared.
        drawn: prompts drawn so far, in reinforcement learning.
        abandoned: prompts of over-sampling that wait to be asked again: their numbers, and the step that abandoned each; the oldest first.
        kl_coef: current KL coefficient, if it is adaptive.
        skipped, critic_skipped: updates so far that were skipped, because the loss or the gradient was not finite.
        settings: the keys that change what is learned, and what identifies models by content, as JSON (verl.config.trajectory); empty in
            checkpoints of older versions.
        total_steps: optimizer steps of the whole run; 0 in checkpoints of older versions.
        validation, validation_rows: finite metrics of the validation after this step, and the identity of its rows; empty without one.
        waited: how long the run has waited for a better validation; None without trainer.patience.
    """

    step: int
    tokens: int
    supervised_tokens: int
    rows: int
    rows_per_step: int
    seed: int
    data_fingerprint: Fingerprint | str
    drawn: int = 0
    abandoned: dict[str, int] = field(default_factory=dict)
    kl_coef: float | None = None
    skipped: int = 0
    critic_skipped: int = 0
    settings: dict[str, str] = field(default_factory=dict)
    total_steps: int = 0
    validation: dict[str, float] = field(default_factory=dict)
    validation_rows: str = ""
    waited: Waited | None = None
