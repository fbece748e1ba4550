"""The checkpoint of a run, loaded by transformers alone, has the loss of the model in the run, and the tensors of the original."""

from verl.prove.outcome import Outcome
from verl.prove.saved import loaded_again
from verl.prove.subject import Subject

GROUP, NAME = "fine-tuning", "reload"


def prove(subject: Subject) -> Outcome:
    result = subject.tuned()
    assert result.checkpoint is not None
    return loaded_again(subject, GROUP, NAME, result.checkpoint, result.metrics[-1]["val/loss"])
