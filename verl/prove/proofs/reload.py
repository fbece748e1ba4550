"""The checkpoint of a run, loaded by transformers alone, has the loss of the model in the run, and the tensors of the original."""

from verl.prove import plain
from verl.prove.outcome import Outcome, compared
from verl.prove.saved import differing_tensors
from verl.prove.subject import Subject

GROUP, NAME = "fine-tuning", "reload"


def prove(subject: Subject) -> Outcome:
    result = subject.tuned()
    assert result.checkpoint is not None
    loss = plain.mean_loss(plain.load(result.checkpoint), subject.rendered(subject.test_file))
    differing = differing_tensors(subject.model, result.checkpoint)
    path = f"{len(differing)} tensors differ in name, shape or dtype, such as {differing[0]}" if differing else "same names, shapes, dtypes"
    return compared(GROUP, NAME, {"loss": abs(loss - result.metrics[-1]["val/loss"]), **({"tensors": 1.0} if differing else {})}, path=path)
