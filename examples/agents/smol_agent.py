"""An agent of the framework smolagents, with a tool: `agent.program=examples/agents/smol_agent.py` (extra `agents`).

The model calls the tool in the form of its chat template, and gives its answer with the framework's own tool `final_answer`. The agent's
text is that answer, which graders read; a run that does not come to one has the model's last turn.
"""

import os
from typing import Any

from smolagents import OpenAIModel, ToolCallingAgent, tool

STEPS = 4
# Short, because each chat begins with it.
SYSTEM = "Calculate with the tools. Give the result with final_answer."


@tool
def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first number.
        b: the second number.
    """
    return a + b


def run(row: dict[str, Any]) -> str | None:
    """Answer the question of a row."""
    # The endpoint samples what the model says, and cannot force a call: tool_choice is "auto".
    model = OpenAIModel(os.environ["OPENAI_MODEL"], tool_choice="auto")
    agent = ToolCallingAgent([add], model, max_steps=STEPS, verbosity_level=0)
    agent.prompt_templates["system_prompt"] = SYSTEM
    result = agent.run(row["question"], return_full_result=True)
    return str(result.output) if result.state == "success" else None
