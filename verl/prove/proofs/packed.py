"""Documents packed into one batch give the log-probabilities and the gradient of each document alone."""

from verl.algorithms import sft
from verl.data.pack import collate
from verl.prove import plain
from verl.prove.engines import gradients, is_slower, largest, relative, scores
from verl.prove.outcome import Outcome, compared
from verl.prove.subject import Subject

GROUP, NAME = "fine-tuning", "packed = alone"


def prove(subject: Subject) -> Outcome:
    built, documents = subject.build(), subject.documents
    batch = collate(documents, range(len(documents)))
    loss, found = gradients(built, [batch], sft)
    model = plain.load(subject.model)
    expected_loss, expected = plain.gradients(model, documents)
    differences = {
        "log-probabilities": largest(scores(built, documents), plain.trained_logprobs(model, documents)),
        "loss": abs(loss - expected_loss),
        "gradient": relative(found, expected),
    }
    return compared(GROUP, NAME, differences, path=subject.path_of(built), slower=is_slower(built))
