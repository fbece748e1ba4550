"""Two steps of GRPO: the log-probabilities at which answers are sampled are those of the trainer, before and after an update."""

from verl.prove.outcome import Outcome, compared
from verl.prove.subject import Subject

GROUP, NAME = "reinforcement", "rollout = trainer"
REWARD = '''"""The share of bytes in the answer that are letters."""


def score(prompt, response, row):
    return sum(character.isalpha() for character in response) / max(1, len(response))
'''


def prove(subject: Subject) -> Outcome:
    reward = subject.folder / "letters.py"
    reward.write_text(REWARD, encoding="utf-8")
    result = subject.reinforce("grpo", reward, **{"trainer.total_training_steps": 2})
    differences = {f"step {i + 1}": step["rl/largest_rollout_difference"] for i, step in enumerate(result.metrics)}
    ratios = [step["rl/largest_ratio"] for step in result.metrics]
    return compared(GROUP, NAME, differences | {"ratio before an update": max(abs(ratio - 1.0) for ratio in ratios)})
