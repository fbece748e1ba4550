"""Settings of environments that the model acts in over several turns."""

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from verl.config.unused import check_unused
from verl.errors import UserError, at_least, one_of
from verl.plugin import Plugins


@dataclass
class EnvironmentConfig:
    plugins: ClassVar[Plugins] = Plugins("verl.environments", "environment", ("Environment",))

    # Environment that the model acts in over several turns, and that rewards it: a name in verl/environments, a dotted module, or
    # path/to/file.py; null: none. Environments may have more keys.
    name: str | None = None
    # Maximum number of the model's turns in an episode. rollout.max_new_tokens bounds the tokens of all turns together.
    max_turns: int = 10
    # Time limit of each call of the environment, in seconds. What takes longer is ended, with its process if it has one of its own.
    step_seconds: float = 60.0
    # Time limit of a whole episode, generation included; it ends there with what it has. null: none.
    seconds: float | None = None
    # If the environment fails, or exceeds a limit of seconds: "end" ends the episode there with the rewards that it has, counts it
    # (environment/failed, environment/hung, environment/late) and says so; "stop" ends the run with an error that names the row.
    on_error: str = "end"
    # Maximum number of processes for your own environment, per training process; each plays one episode at a time. An environment of
    # verl that only computes needs none.
    processes: int = 256
    # Variables of the process environment that look like secrets and that your own environment needs, such as [OPENAI_API_KEY]; it does not
    # get the others.
    secrets: list[str] = field(default_factory=list)


class Generation(Protocol):
    """Keys of `rollout` that environments do not go together with."""

    tool: str | None
    oversample: float
    staleness: int


def check_environment(environment: EnvironmentConfig, rollout: Generation) -> None:
    """Check the keys of environments. Raises UserError naming the key."""
    at_least("environment.max_turns", environment.max_turns, 1)
    at_least("environment.step_seconds", environment.step_seconds, 0.001)
    at_least("environment.seconds", environment.seconds, 0.001)
    at_least("environment.processes", environment.processes, 1)
    one_of("environment.on_error", environment.on_error, ("end", "stop"))
    if environment.name is None:
        check_unused(environment, EnvironmentConfig(), "environment", "environment.name")
        return
    where = f"environment.name={environment.name}"
    if rollout.tool is not None:
        what, fix = "a tool replies as well, and both would answer the same turn", "remove rollout.tool, or environment.name"
        raise UserError(what, where=f"{where} with rollout.tool={rollout.tool}", fix=fix)
    if rollout.oversample > 0:
        what = "which episodes end first depends on the environment's time, so what is learned would depend on the clock"
        raise UserError(what, where=f"{where} with rollout.oversample={rollout.oversample:g}", fix="set rollout.oversample=0")
    if rollout.staleness > 0:
        what = "later turns depend on what the environment answers, so an episode cannot be drawn before its step"
        raise UserError(what, where=f"{where} with rollout.staleness={rollout.staleness}", fix="set rollout.staleness=0")
