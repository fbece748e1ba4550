"""Documents packed into one batch give the log-probabilities and the gradient of each document alone."""

import torch

from verl.algorithms import sft
from verl.data.pack import collate
from verl.prove import plain
from verl.prove.engines import gradients, in_any_dtype, is_slower, largest, scores
from verl.prove.outcome import Outcome, compared_beside_rounding
from verl.prove.subject import Subject

GROUP, NAME = "fine-tuning", "packed = alone"


def prove(subject: Subject) -> Outcome:
    documents = subject.documents
    batch = collate(documents, range(len(documents)))

    def compare(dtype: torch.dtype) -> dict[str, float]:
        built, model = subject.build(dtype), plain.load(subject.model, dtype)
        loss, found = gradients(built, [batch], sft)
        expected_loss, expected = plain.gradients(model, documents)
        return {
            "log-probabilities": largest(scores(built, documents), plain.trained_logprobs(model, documents)),
            "loss": abs(loss - expected_loss),
            "gradient": plain.relative(found, expected),
        }

    differences, note = in_any_dtype(compare)
    built = subject.build()
    path = "; ".join(filter(None, (note, subject.path_of(built))))
    return compared_beside_rounding(GROUP, NAME, differences, lambda: subject.rounding, path=path, slower=is_slower(built))
