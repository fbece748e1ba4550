"""Two ranks give the losses and gradient norms of one."""

from functools import partial

from verl.prove.outcome import Outcome, compared_beside_rounding
from verl.prove.ranks import on_ranks
from verl.prove.subject import Subject

GROUP, NAME = "fine-tuning", "one rank = two"
COMPARED = {"loss": "train/loss", "gradient norm": "train/grad_norm", "other rows": "val/loss"}


def prove(subject: Subject) -> Outcome:
    one = subject.tuned()
    run = partial(subject.fine_tune, "two-ranks", **{"trainer.save_freq": "never"})
    two = on_ranks(run, 2, subject.folder / "ranks")
    differences = {}
    for name, key in COMPARED.items():
        pairs = [(a[key], b[key]) for a, b in zip(one.metrics, two.metrics, strict=True) if key in a]
        scale = max(1.0, *(abs(a) for a, _ in pairs)) if key.endswith("norm") else 1.0
        differences[name] = max(abs(a - b) for a, b in pairs) / scale
    return compared_beside_rounding(GROUP, NAME, differences, lambda: subject.rounding_after_steps)
