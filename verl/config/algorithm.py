"""Keys of `algorithm` that all methods of reinforcement learning share; the trainer reads them."""

from dataclasses import dataclass
from typing import ClassVar

from verl.plugin import Plugins


@dataclass
class AlgorithmConfig:
    plugins: ClassVar[Plugins] = Plugins("verl.algorithms", "method of reinforcement learning", ("advantages", "Loss"))

    # The method: a name in verl/algorithms (ppo, grpo, dr_grpo, rloo, reinforce, dapo, gspo, distill) or path/to/file.py. Methods have more
    # keys.
    name: str = "grpo"
    # Optimizer updates per step; each takes an equal share of the step's prompts.
    updates_per_step: int = 1
    # Keep the reference model, to log the KL divergence of the actor from it; false saves memory and a forward pass. The reference is the
    # model that the run starts from, unless the method names another.
    keep_reference: bool = True
    # Old log-probabilities: computed by the "trainer", or those of the "rollout" at sampling time.
    old_logprobs: str = "trainer"
    # Exclude groups whose answers all have the same reward, and sample answers to more prompts in their place.
    dynamic_sampling: bool = False
    # Maximum number of times that dynamic sampling takes more prompts in one step.
    max_refills: int = 3
