"""What is decided for a model on this machine's CPU, for tests that build one without a trainer."""

import torch

from verl.config.shared import ModelConfig
from verl.engine.decisions import Decisions, Workload, choose_spread, decide
from verl.engine.hardware import measure
from verl.engine.outline import Outline

SHORT_RUN = Workload(total_steps=10, total_tokens=1000, document_tokens=100.0, token_budget=512)


def decided(settings: ModelConfig, workload: Workload = SHORT_RUN, *, scalar_head: bool = False) -> Decisions:
    outline, hardware = Outline(settings), measure(torch.device("cpu"))
    return decide(outline, hardware, workload, choose_spread(outline, hardware), scalar_head=scalar_head)
