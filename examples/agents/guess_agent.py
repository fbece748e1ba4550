"""An agent that has the model guess a number in four turns, and tells it whether the number is higher or lower.

It knows nothing of the trainer: only the `openai` package, and where its endpoint is.
"""

import os
from typing import Any

import openai

TURNS, LARGEST = 4, 7
CLIENT = openai.OpenAI(api_key="-")  # once, because it reads certificates; each run has an address and a key of its own


def run(row: dict[str, Any]) -> float:
    """Play for the number in `row["secret"]`. Return 1 if it was found, minus 0.1 for each turn that was no number of the game."""
    client = CLIENT.with_options(base_url=os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"])
    chat: list[Any] = [{"role": "user", "content": row["question"]}]
    reward = 0.0
    for _ in range(TURNS):
        message = client.chat.completions.create(model=os.environ["OPENAI_MODEL"], messages=chat).choices[0].message
        said = (message.content or "").strip()
        guess = int(said) if said.isascii() and said.isdigit() else 0
        if guess == row["secret"]:
            return reward + 1.0
        if 1 <= guess <= LARGEST:
            hint = "It is higher." if guess < row["secret"] else "It is lower."
        else:
            hint, reward = f"Say a number from 1 to {LARGEST}.", reward - 0.1
        chat += [{"role": "assistant", "content": said}, {"role": "user", "content": hint}]
    return reward
