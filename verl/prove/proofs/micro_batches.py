"""Loss and gradient do not depend on how the rows of a step are cut into micro-batches."""

from verl.algorithms import sft
from verl.data.pack import collate
from verl.prove import plain
from verl.prove.engines import gradients, relative
from verl.prove.outcome import Outcome, compared
from verl.prove.subject import Subject

GROUP, NAME = "fine-tuning", "micro-batches"


def prove(subject: Subject) -> Outcome:
    built, documents = subject.build(), subject.documents
    expected_loss, expected = plain.gradients(plain.load(subject.model), documents)
    differences = {}
    for size in (4, 1):
        batches = [collate(documents[i : i + size], range(i, i + size)) for i in range(0, len(documents), size)]
        loss, found = gradients(built, batches, sft)
        differences[f"{len(batches)} × {size}"] = max(abs(loss - expected_loss), relative(found, expected))
    padded = [collate(documents[i : i + 4], range(i, i + 4), pad=True) for i in range(0, len(documents), 4)]
    loss, found = gradients(built, padded, sft)
    differences["padded"] = max(abs(loss - expected_loss), relative(found, expected))
    return compared(GROUP, NAME, differences)
