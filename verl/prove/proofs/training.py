"""`verl sft` has the losses of a plain loop with torch's AdamW, in each step and on other rows afterwards."""

from verl.prove import plain
from verl.prove.outcome import TOLERANCE, Outcome, compared, compared_beside_rounding
from verl.prove.subject import LOOPS, STEPS, Subject

GROUP, NAME = "fine-tuning", "verl sft = a plain loop"
SMALL = 1e-2  # what one token with another expert changes at most


def prove(subject: Subject) -> Outcome:
    steps = [step for step in subject.tuned().metrics if "train/loss" in step]
    found = [*(step["train/loss"] for step in steps), steps[-1]["val/loss"]]
    differences = _differences(found, subject.plain_losses(plain.load(subject.model)))
    outcome = compared_beside_rounding(GROUP, NAME, differences, lambda: subject.rounding_after_steps)
    if outcome.state == "holds" or not max(differences.values()) < SMALL:
        return outcome
    # Rounding may send a token to another expert, which is a step and no error. Then another plain loop has the same losses.
    for model in subject.rounded(range(1, LOOPS + 1)):
        differences = _differences(found, subject.plain_losses(model))
        if max(differences.values()) <= TOLERANCE:
            return compared(GROUP, NAME, differences, path="beside a plain loop whose weights differ by rounding")
    return outcome


def _differences(found: list[float], expected: list[float]) -> dict[str, float]:
    names = [*(f"step {number}" for number in range(1, STEPS + 1)), "other rows"]
    return {name: abs(one - other) for name, one, other in zip(names, found, expected, strict=True)}
