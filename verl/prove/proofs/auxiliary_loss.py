"""Where the config asks for the routers' load-balancing loss, its gradient is transformers', however the rows are cut up."""

import torch

from verl.algorithms import sft
from verl.data.pack import collate
from verl.prove import plain
from verl.prove.engines import gradients, in_any_dtype
from verl.prove.outcome import Outcome, compared_beside_rounding
from verl.prove.subject import Subject

GROUP, NAME = "experts", "auxiliary loss"
COEFFICIENT = 0.1  # larger than usual, so that it shows


def prove(subject: Subject) -> Outcome:
    text = subject.config.get_text_config(decoder=True)
    key = next((key for key in ("router_aux_loss_coef", "aux_loss_coef") if hasattr(text, key)), None)
    if key is None or not hasattr(text, "output_router_logits"):
        return Outcome(GROUP, NAME, "none", "no load-balancing loss in the config")
    asking = subject.variant("auxiliary-loss", {"output_router_logits": True, key: COEFFICIENT})
    documents = asking.documents
    try:
        loss, gradient = plain.gradients_with_router_loss(plain.load(asking.model), documents, COEFFICIENT)
    except Exception as error:  # transformers' own code
        return Outcome(GROUP, NAME, "none", f"transformers' own loss fails: {type(error).__name__}: {' '.join(str(error).split())[:120]}")
    if not gradient:
        return Outcome(GROUP, NAME, "none", "transformers gives none")

    def compare(dtype: torch.dtype) -> dict[str, float]:
        _, expected = plain.gradients_with_router_loss(plain.load(asking.model, dtype), documents, COEFFICIENT)
        built, found = asking.build(dtype), {}
        for size in (len(documents), 1):
            batches = [collate(documents[i : i + size], range(i, i + size)) for i in range(0, len(documents), size)]
            found[f"{len(batches)} × {size}"] = plain.relative(gradients(built, batches, sft)[1], expected)
        return found

    differences, note = in_any_dtype(compare)
    path = "; ".join(filter(None, (f"loss {loss:.3f}", note)))
    return compared_beside_rounding(GROUP, NAME, differences, lambda: asking.rounding, path=path)
