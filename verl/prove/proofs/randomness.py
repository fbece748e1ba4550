"""With the dropout and jitter of the model's own config, answers are still sampled at the log-probabilities of the trainer."""

from verl.prove.outcome import Outcome, compared
from verl.prove.proofs.grpo import differences_of, write_reward
from verl.prove.subject import Subject

GROUP, NAME = "reinforcement", "nothing random"


def prove(subject: Subject) -> Outcome:
    if not subject.random:
        return Outcome(GROUP, NAME, "none", "no dropout and no jitter in the config")
    dropping = subject.variant("random", dict(subject.random))
    result = dropping.reinforce("grpo", write_reward(dropping), **{"trainer.total_training_steps": 1})
    text = ", ".join(f"{name}={value:g}" for name, value in subject.random.items())
    return compared(GROUP, NAME, differences_of(result), path=text)
