"""Programs of agents, and answers that they give with a small model, for tests of the endpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rl_runs import write_folder

from verl.config.agent import AgentConfig
from verl.config.ppo import PPOConfig, PromptConfig, RolloutConfig
from verl.data.prompts import Prompt, load_prompts
from verl.data.render import Renderer
from verl.models.load import load_tokenizer
from verl.rl.agents import AgentAnswers
from verl.rl.samples import Sample
from verl.rollout import Options, Rollout, Sampling, load_rollout

# A talk of some turns. It asks once more at the end, with the first message alone: a second trajectory.
TALK = """
import os, openai

CLIENT = None

def run(row):
    client = openai.OpenAI()
    chat = [{"role": "user", "content": row["question"]}]
    for turn in range(2):
        found = client.chat.completions.create(model=os.environ["OPENAI_MODEL"], messages=chat, max_tokens=8)
        chat += [found.choices[0].message, {"role": "user", "content": f"Go on, {turn}."}]
    found = client.chat.completions.create(model=os.environ["OPENAI_MODEL"], messages=chat[:1], max_tokens=8)
    return float(len(found.choices[0].message.content))
"""


def program(folder: Path, text: str, name: str = "agent.py") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


class Table:
    """A small model, its engine, and rows to answer.

    Args:
        new_tokens: most tokens of a trajectory after its prompt.
        max_sequences: answers at the same time. With one, not even rounding depends on what is asked at the same time.
    """

    def __init__(self, folder: Path, *, engine: str = "native", new_tokens: int = 100, max_sequences: int | None = 1):
        if not (folder / "model").exists():
            write_folder(folder)
        self.new_tokens, self.longest = new_tokens, 128 + new_tokens
        self.tokenizer = load_tokenizer(str(folder / "model"))
        options = Options(max_positions=self.longest, max_sequences=max_sequences)
        self.rollout: Rollout = load_rollout(engine, str(folder / "model"), self.tokenizer, Renderer(self.tokenizer).stop_ids, options)
        self.prompts = load_prompts(PromptConfig(max_prompt_length=128), str(folder / "train.jsonl"), self.tokenizer).prompts

    def sampling(self, n: int = 2, seed: int = 1) -> Sampling:
        return Sampling(self.new_tokens, temperature=1.0, n=n, seed=seed)

    def agents(self, given: str, **keys: Any) -> AgentAnswers:
        agent = AgentConfig(**{"program": given, "seconds": 60.0, **keys})
        data, rollout = PromptConfig(max_prompt_length=128), RolloutConfig(max_new_tokens=self.new_tokens)
        return AgentAnswers(PPOConfig(data=data, rollout=rollout, agent=agent), self.tokenizer)

    def answers(
        self, given: str, prompts: Sequence[tuple[int, Prompt]] | None = None, n: int = 2, **keys: Any
    ) -> tuple[list[Sample], AgentAnswers]:
        """Answers to the first rows, by an agent that is ended."""
        made = self.agents(given, **keys)
        try:
            return made.play(self.rollout, list(enumerate(self.prompts[:2])) if prompts is None else prompts, self.sampling(n)), made
        finally:
            made.close()


def told(samples: Sequence[Sample]) -> list[list[tuple[list[int], list[int], list[bool]]]]:
    """Tokens and masks of the trajectories of each answer."""
    return [[(one.prompt_ids, one.answer_ids, one.answer_mask) for one in sample.trajectories] for sample in samples]
