"""Two steps of GRPO: the log-probabilities at which answers are sampled are those of the trainer, before and after an update."""

from pathlib import Path

from verl.prove.outcome import Outcome, compared_beside_rounding
from verl.prove.subject import Subject
from verl.run import TrainResult

GROUP, NAME = "reinforcement", "rollout = trainer"
REWARD = '''"""The share of bytes in the answer that are letters."""


def score(prompt, response, row):
    return sum(character.isalpha() for character in response) / max(1, len(response))
'''


def prove(subject: Subject) -> Outcome:
    result = subject.reinforce("grpo", write_reward(subject), **{"trainer.total_training_steps": 2})
    return compared_beside_rounding(GROUP, NAME, differences_of(result), lambda: subject.rounding_of_decoding)


def write_reward(subject: Subject) -> Path:
    path = subject.folder / "letters.py"
    path.write_text(REWARD, encoding="utf-8")
    return path


def differences_of(result: TrainResult) -> dict[str, float]:
    """Return how far the rollout's log-probabilities are from the trainer's in each step, and the ratios from 1 before its update."""
    found = {f"step {i + 1}": step["rl/largest_rollout_difference"] for i, step in enumerate(result.metrics)}
    ratio = max(abs(step["rl/largest_ratio"] - 1.0) for step in result.metrics)
    return found | {"ratio before an update": ratio}
