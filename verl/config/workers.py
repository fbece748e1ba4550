"""Settings of the processes that run users' own code."""

from dataclasses import dataclass, field

from verl.errors import at_least


@dataclass(kw_only=True)
class WorkersConfig:
    # Processes that run the user's own code: each of your own rewards, and rollout.tool, has this many per training process. Global state
    # is that of a process, so a reward that keeps state needs 1.
    workers: int = 1
    # Time limit of your own code for one answer, in seconds. `score_group` has this much for each answer of the group.
    timeout_seconds: float = 60.0
    # Environment variables that look like secrets and that your own code needs, such as [OPENAI_API_KEY]; it does not get the others.
    secrets: list[str] = field(default_factory=list)
    # Whether your own code sees the GPU of its training process. Each of its processes then takes GPU memory of its own.
    use_gpu: bool = False


def check_workers(config: WorkersConfig) -> None:
    """Check the keys of workers. Raises UserError naming the key."""
    at_least("reward.workers", config.workers, 1)
    at_least("reward.timeout_seconds", config.timeout_seconds, 0.001)
