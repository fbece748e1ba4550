"""Answers of agents: programs that ask a chat endpoint over the run's engine (`rollout.serve`), each run once for an answer.

A run has a key of its own, by which its requests are known. What it has asked and got is joined into trajectories (`verl.rl.trajectories`),
which are the tokens of its answer. A run that fails, hangs or asks too often is ended; its answer is what it has until then.
"""

import asyncio
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from verl.config.agent import AgentConfig
from verl.config.ppo import PPOConfig, longest_sample
from verl.config.workers import WorkersConfig
from verl.data.prompts import Prompt
from verl.data.render import Renderer
from verl.endpoint.reply import Reply
from verl.endpoint.request import ChatRequest, RefusedError, Terms, read_request
from verl.endpoint.server import LOOPBACK, Endpoint, check_installed
from verl.errors import AbandonedError, UserError
from verl.rl.samples import Sample
from verl.rl.trajectories import Trajectories
from verl.rollout import Completion, Rollout, Sampling
from verl.rollout.live import Live
from verl.rollout.waves import cut
from verl.workers.agents import Agents, Result, load_program
from verl.workers.calls import Failure

MODEL = "policy"  # its name in requests
FIX = "correct the agent, or set agent.on_error=end, which keeps what the model has answered until then"


def check_agent_program(config: AgentConfig) -> None:
    """Raise UserError if the agent's program, or a package of the endpoint, is missing."""
    assert config.program is not None
    load_program(config.program)
    check_installed()


@dataclass
class Outcomes:
    """How runs of the agent have ended since they were last told.

    Attributes:
        runs: number of runs.
        requests, trajectories: their number.
        counts: number of failed runs, by kind: "failed", "late", "flooded".
        errors: of failed runs, each with the place of its row.
    """

    runs: int = 0
    requests: int = 0
    trajectories: int = 0
    counts: dict[str, int] = field(default_factory=lambda: {"failed": 0, "late": 0, "flooded": 0})
    errors: list[UserError] = field(default_factory=list)
