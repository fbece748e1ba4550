"""Settings of agents that answer through a chat endpoint over the run's engine."""

from dataclasses import dataclass, field
from typing import Protocol

from verl.config.unused import check_unused
from verl.errors import UserError, at_least, one_of

MOST_REQUESTS = 2**16  # of a run; each has random numbers of its own
ADDRESS = ("OPENAI_BASE_URL", "OPENAI_API_KEY")  # of the endpoint; each run has its own, and none has those of the trainer's environment


@dataclass
class AgentConfig:
    # With rollout.serve=true: the agent's program, run once for each answer. path/to/agent.py with a function run(row), or a command, which
    # reads the row as JSON from standard input. Its OpenAI client finds the endpoint by itself (OPENAI_BASE_URL, OPENAI_API_KEY); the
    # model's name is in OPENAI_MODEL.
    program: str | None = None
    # Maximum number of requests of a run.
    requests: int = 32
    # Time limit of a run, in seconds, generation included.
    seconds: float = 300.0
    # If a run fails, or exceeds a limit: "end" keeps what the model has answered until then, counts it (agent/failed, agent/late,
    # agent/flooded) and says so; "stop" ends the training run with an error that names the row.
    on_error: str = "end"
    # Maximum number of runs at the same time, per training process; each is a process of its own.
    processes: int = 64
    # Environment variables that look like secrets and that the agent needs, such as [SEARCH_API_KEY]; it does not get the others. Nor does
    # it get the trainer's OPENAI_API_KEY: each run has one of its own.
    secrets: list[str] = field(default_factory=list)


class Generation(Protocol):
    """Of the keys in `rollout`, those that an agent must fit."""

    serve: bool
    tool: str | None
    oversample: float
    staleness: int


def check_agent(agent: AgentConfig, rollout: Generation, environment: str | None) -> None:
    """Check the keys of agents. Raises UserError naming the key.

    Args:
        environment: name of the environment, if there is one.
    """
    if not 1 <= agent.requests <= MOST_REQUESTS:
        raise UserError(f"found {agent.requests}", where="agent.requests", fix=f"give a number from 1 to {MOST_REQUESTS:,}")
    at_least("agent.seconds", agent.seconds, 0.001)
    at_least("agent.processes", agent.processes, 1)
    one_of("agent.on_error", agent.on_error, ("end", "stop"))
    if own := [name for name in agent.secrets if name in ADDRESS]:
        what = f"each run has {own[0]} of its own; with that of your environment, the agent would ask another model than the trained one"
        fix = f"remove {own[0]} from agent.secrets; pass a key of another service under another name"
        raise UserError(what, where=f"agent.secrets=[{','.join(agent.secrets)}]", fix=fix)
    if not rollout.serve:
        if agent.program is not None:
            what = "the agent has no endpoint to ask"
            raise UserError(what, where=f"agent.program={agent.program}", fix="set rollout.serve=true, or remove this key")
        check_unused(agent, AgentConfig(), "agent", "agent.program and rollout.serve=true")
        return
    if agent.program is None:
        fix = "set agent.program=path/to/agent.py with a function run(row), or a command"
        raise UserError("there is no agent to ask the endpoint", where="rollout.serve=true", fix=fix)
    where = "rollout.serve=true"
    if rollout.tool is not None:
        what, fix = "an agent has its own tools, and both would answer the same turn", "remove rollout.tool"
        raise UserError(what, where=f"{where} with rollout.tool={rollout.tool}", fix=fix)
    if environment is not None:
        what = "the model would act in an environment, and not answer the agent"
        raise UserError(what, where=f"{where} with environment.name={environment}", fix="remove one of them")
    if rollout.oversample > 0:
        what = "which runs end first depends on the agent's time, so what is learned would depend on the clock"
        raise UserError(what, where=f"{where} with rollout.oversample={rollout.oversample:g}", fix="set rollout.oversample=0")
    if rollout.staleness > 0:
        what = "an agent's requests depend on what was answered before, so they cannot be drawn before their step"
        raise UserError(what, where=f"{where} with rollout.staleness={rollout.staleness}", fix="set rollout.staleness=0")
