"""`verl export` merges an adapter into a model that transformers alone loads, with the same loss and the same names on disk."""

from verl.config.commands import ExportConfig
from verl.models.export import export
from verl.prove import plain
from verl.prove.outcome import Outcome, compared
from verl.prove.saved import differing_tensors
from verl.prove.subject import Subject, silent

GROUP, NAME = "adapter", "export"


def prove(subject: Subject) -> Outcome:
    result = subject.adapter()
    target = subject.folder / "exported"
    with silent():
        export(ExportConfig(source=str(result.checkpoint), directory=str(target)))
    loss = plain.mean_loss(plain.load(target), subject.rendered(subject.test_file))
    differing = differing_tensors(subject.model, target)
    path = f"{len(differing)} tensors differ in name, shape or dtype, such as {differing[0]}" if differing else "same names, shapes, dtypes"
    return compared(GROUP, NAME, {"loss": abs(loss - result.metrics[-1]["val/loss"]), **({"tensors": 1.0} if differing else {})}, path=path)
