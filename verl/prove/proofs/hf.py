"""Generation with transformers' `generate`, in batches, gives the answers of a plain loop without cache."""

from verl.prove.decoding import decoded
from verl.prove.outcome import Outcome
from verl.prove.subject import Subject

GROUP, NAME = "generation", "hf = plain"


def prove(subject: Subject) -> Outcome:
    return decoded(subject, "hf", GROUP, NAME)
