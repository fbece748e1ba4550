"""An adapter that `verl sft` trained gives the same loss with peft on transformers' model, and loads where verl generates."""

import torch
from peft import PeftModel

from verl.models.inference import load_for_inference
from verl.prove import plain
from verl.prove.outcome import Outcome, compared
from verl.prove.subject import Subject

GROUP, NAME = "adapter", "adapter = peft = merged"


def prove(subject: Subject) -> Outcome:
    result = subject.adapter()
    assert result.checkpoint is not None
    rows, trained = subject.rendered(subject.test_file), result.metrics[-1]["val/loss"]
    base = plain.load(subject.model)
    before = plain.mean_loss(base, rows)
    with_peft = plain.mean_loss(PeftModel.from_pretrained(base, str(result.checkpoint)).eval(), rows)
    merged = load_for_inference(str(result.checkpoint), device="cpu", dtype=torch.float32)
    differences = {"peft": abs(with_peft - trained), "merged": abs(plain.mean_loss(merged, rows) - trained)}
    if abs(trained - before) < 1e-3:
        differences["the adapter changes nothing"] = 1.0
    return compared(GROUP, NAME, differences, path=f"it changes the loss by {trained - before:+.2g}")
