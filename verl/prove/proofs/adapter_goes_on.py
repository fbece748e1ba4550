"""An adapter is trained further from where it was: before its first step, the loss is the one that it had."""

from verl.prove import plain
from verl.prove.outcome import Outcome, compared
from verl.prove.subject import Subject

GROUP, NAME = "adapter", "going on"


def prove(subject: Subject) -> Outcome:
    from peft import PeftModel

    result = subject.adapter()
    keys = {"model.lora_adapter_path": str(result.checkpoint), "trainer.total_training_steps": 1, "trainer.save_freq": "never"}
    further = subject.fine_tune("further", **keys)
    base = plain.load(subject.model)
    adapted = PeftModel.from_pretrained(base, str(result.checkpoint)).eval()
    expected = plain.mean_loss(adapted, subject.rendered(subject.train_file))
    return compared(GROUP, NAME, {"loss": abs(further.metrics[0]["train/loss"] - expected)})
