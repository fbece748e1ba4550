"""Keys of `algorithm` that every method of reinforcement learning has: the trainer reads them, whatever the method."""

from dataclasses import dataclass
from typing import ClassVar

from verl.plugin import Plugins


@dataclass
class AlgorithmConfig:
    plugins: ClassVar[Plugins] = Plugins("verl.algorithms", "method of reinforcement learning", ("advantages", "Loss"))

    # The method: a name in verl/algorithms (ppo, grpo, dr_grpo, rloo, reinforce, dapo, gspo) or path/to/file.py. It has keys of its own.
    name: str = "grpo"
    # Optimizer steps on the answers of one step, each on as many prompts.
    updates_per_step: int = 1
    # Keep the reference, the model that the run starts from, to log the actor's divergence from it; false saves its memory and time.
    keep_reference: bool = True
    # Log-probabilities before the update: of the "trainer", or of the "rollout" as it drew the answers.
    old_logprobs: str = "trainer"
    # Leave out groups whose answers all have the same reward, and draw further prompts in their place.
    dynamic_sampling: bool = False
    # Times that further prompts are drawn in one step.
    max_refills: int = 3
