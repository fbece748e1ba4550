"""`all-linear` leaves the router of a mixture of experts as it is."""

from verl.prove.experts import routers
from verl.prove.outcome import Outcome
from verl.prove.plain import load
from verl.prove.saved import tensors
from verl.prove.subject import Subject

GROUP, NAME = "experts", "router untouched"


def prove(subject: Subject) -> Outcome:
    names = routers(load(subject.model))
    if not names:
        return Outcome(GROUP, NAME, "none", "no router")
    result = subject.adapter()
    assert result.checkpoint is not None
    adapted = [name for name in tensors(result.checkpoint) if any(f".{router}." in name for router in names)]
    if adapted:
        return Outcome(GROUP, NAME, "wrong", f"{len(adapted)} tensors adapt it, such as {adapted[0]}", 1.0)
    return Outcome(GROUP, NAME, "holds", f"no adapter on {len(names)} routers such as {names[0]}", 0.0)
