"""Writes the rows of steps whose update was skipped, because the loss or the gradient was not finite."""

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from verl.data.documents import Documents
from verl.data.loader import Loader
from verl.engine.skipped import refuse_more, tell
from verl.run import Run

SHOWN_TOKENS, SHOWN_CHARACTERS = 100, 200


def report(
    number: int, metrics: Mapping[str, float], in_a_row: int, most: int, loader: Loader, tokenizer: PreTrainedTokenizerBase, run: Run
) -> None:
    """Write the rows of a skipped step to skipped/step_N.jsonl, and log a warning. Every rank calls it.

    Args:
        number: number of the step, from 1.
        in_a_row: number of skipped steps in a row, with this one.
        most: the number that ends the run (trainer.max_nonfinite_steps).
    Raises:
        UserError: there are `most` of them.
    """
    documents = loader.documents
    assert isinstance(documents, Documents)
    first = [int(row) * documents.documents_per_row for row in loader.rows(number - 1)]
    rows = [{"place": documents.place(n), "row": n // documents.documents_per_row, "text": _text(documents, n, tokenizer)} for n in first]
    found = f"loss {metrics['train/loss']}, gradient norm {metrics['train/grad_norm']}"
    run.say(tell(f"step {number}", found, "the update was skipped", rows, run.directory / "skipped" / f"step_{number}.jsonl"))
    refuse_more(f"step {number}", found, rows, in_a_row, most)


def _text(documents: Documents, number: int, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(documents.document(number)[0][:SHOWN_TOKENS]))[:SHOWN_CHARACTERS]
