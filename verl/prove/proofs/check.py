"""The check before training takes the model, in its own size, to be computed as its twin is."""

from verl.engine.trial import choose_path
from verl.prove.outcome import Outcome
from verl.prove.subject import Subject

GROUP, NAME = "fine-tuning", "the check before training"


def prove(subject: Subject) -> Outcome:
    of_model, of_twin = (choose_path(config, subject.name) for config in (subject.given, subject.config))
    said = "packed" if of_model.packed else of_model.why
    if of_model.packed == of_twin.packed:
        return Outcome(GROUP, NAME, "holds" if of_model.packed else "slower", said, 0.0)
    other = "packed" if of_twin.packed else "one document at a time"
    return Outcome(GROUP, NAME, "wrong" if of_model.packed else "slower", f"{said}; as it is compared here, without dropout: {other}")
