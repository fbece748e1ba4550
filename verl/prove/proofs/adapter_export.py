"""`verl export` merges an adapter into a model that transformers alone loads, with the same loss and the same names on disk."""

from verl.config.commands import ExportConfig
from verl.models.export import export
from verl.prove.outcome import Outcome
from verl.prove.saved import loaded_again
from verl.prove.subject import Subject, silent

GROUP, NAME = "adapter", "export"


def prove(subject: Subject) -> Outcome:
    result = subject.adapter()
    target = subject.folder / "exported"
    with silent():
        export(ExportConfig(source=str(result.checkpoint), directory=str(target)))
    return loaded_again(subject, GROUP, NAME, target, result.metrics[-1]["val/loss"])
