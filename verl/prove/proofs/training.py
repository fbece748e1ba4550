"""`verl sft` has the losses of a plain loop with torch's AdamW, in each step and on other rows afterwards."""

from verl.prove import plain
from verl.prove.outcome import Outcome, compared_beside_rounding
from verl.prove.subject import LR, STEPS, Subject

GROUP, NAME = "fine-tuning", "verl sft = a plain loop"


def prove(subject: Subject) -> Outcome:
    result = subject.tuned()
    model = plain.load(subject.model)
    expected = plain.train(model, subject.rendered(subject.train_file), steps=STEPS, lr=LR, weight_decay=0.01, clip=1e6)
    after = plain.mean_loss(model, subject.rendered(subject.test_file))
    steps = [step for step in result.metrics if "train/loss" in step]
    losses = {f"step {i + 1}": abs(step["train/loss"] - value) for i, (step, value) in enumerate(zip(steps, expected, strict=True))}
    differences = losses | {"other rows": abs(steps[-1]["val/loss"] - after)}
    return compared_beside_rounding(GROUP, NAME, differences, lambda: subject.rounding_after_steps)
