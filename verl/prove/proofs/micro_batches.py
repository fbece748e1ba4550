"""Loss and gradient do not depend on how the rows of a step are cut into micro-batches."""

import torch

from verl.algorithms import sft
from verl.data.pack import collate
from verl.prove import plain
from verl.prove.engines import gradients, in_any_dtype
from verl.prove.outcome import Outcome, compared_beside_rounding
from verl.prove.subject import Subject

GROUP, NAME = "fine-tuning", "micro-batches"


def prove(subject: Subject) -> Outcome:
    documents = subject.documents
    numbers = range(len(documents))
    cuts = {
        "2 × 4": [collate([documents[i] for i in numbers[start::2]], numbers[start::2]) for start in (0, 1)],
        "8 × 1": [collate([documents[i]], [i]) for i in numbers],
        "padded": [collate(documents[i : i + 4], numbers[i : i + 4], pad=True) for i in (0, 4)],
    }

    def compare(dtype: torch.dtype) -> dict[str, float]:
        built = subject.build(dtype)
        expected_loss, expected = plain.gradients(plain.load(subject.model, dtype), documents)
        differences = {}
        for name, batches in cuts.items():
            loss, found = gradients(built, batches, sft)
            differences[name] = max(abs(loss - expected_loss), plain.relative(found, expected))
        return differences

    differences, note = in_any_dtype(compare)
    return compared_beside_rounding(GROUP, NAME, differences, lambda: subject.rounding, path=note)
