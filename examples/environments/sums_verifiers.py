"""An environment of the package verifiers: sums of two numbers, with a tool that adds. docs/environments_built_in.md has the command."""

import random

import verifiers
from datasets import Dataset
from verifiers.types import Messages

DRAW = random.Random(1)
ROWS = [
    {"question": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in ((DRAW.randint(1, 99), DRAW.randint(1, 99)) for _ in range(512))
]


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first number.
        b: the second number.
    """
    return a + b


def ends_with_the_sum(completion: Messages, answer: str) -> float:
    """Return 1 if the last turn ends with the right number, else 0."""
    return float(str(completion[-1]["content"]).rstrip(" .").endswith(answer))


def load_environment(max_turns: int = 4) -> verifiers.Environment:
    """Return the environment, as verifiers asks for it."""
    rubric = verifiers.Rubric(funcs=[ends_with_the_sum])
    return verifiers.ToolEnv(dataset=Dataset.from_list(ROWS), rubric=rubric, tools=[add], max_turns=max_turns)
