"""verl's own engine gives the answers of a plain loop without cache."""

from verl.prove.decoding import decoded
from verl.prove.outcome import Outcome
from verl.prove.subject import Subject

GROUP, NAME = "generation", "native = plain"


def prove(subject: Subject) -> Outcome:
    return decoded(subject, "native", GROUP, NAME)
