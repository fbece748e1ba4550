"""An agent of the framework smolagents, through the endpoint: what it asks is recorded, turn by turn."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from agent_runs import Table
from places import ROOT
from rl_runs import write_folder
from tool_template import WITH_TOOLS
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from verl.data.render import Renderer
from verl.rl.episode import MOST_TURNS
from verl.rl.outcome import DONE
from verl.rollout import Completion, Sampling

pytest.importorskip("smolagents", reason="needs the extra agents")
TURNS = (
    'I add.\n<tool_call>{"name": "add", "arguments": {"a": 95, "b": 25}}</tool_call>',
    '<tool_call>{"name": "final_answer", "arguments": {"answer": "120"}}</tool_call>',
)


class Player:
    """An engine that says what a model does that knows the tools."""

    positions = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.stop_ids = Renderer(tokenizer).stop_ids
        self._turns = [[*tokenizer(text).input_ids, self.stop_ids[0]] for text in TURNS]

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int]) -> list[Completion]:
        turns = [self._turns[seed % MOST_TURNS] for seed in seeds]
        return [Completion(ids, "stop", [-0.5] * len(ids)) for ids in turns]


def test_an_agent_of_smolagents_calls_a_tool_and_answers(tmp_path: Path) -> None:
    write_folder(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = WITH_TOOLS
    tokenizer.save_pretrained(tmp_path / "model")
    table = Table(tmp_path, new_tokens=1200)
    table.rollout = Player(table.tokenizer)  # type: ignore[assignment]
    [sample], _ = table.answers(str(ROOT / "examples/agents/smol_agent.py"), [(0, table.prompts[0])], n=1)
    assert sample.outcome is not None and (sample.outcome.ending, sample.outcome.errors) == (DONE, [])
    first, second = sample.trajectories
    assert "Calling tools:" in table.tokenizer.decode(second.prompt_ids), "the framework writes calls as texts, so the chat is another one"
    assert sample.text == "120", "graders read what the agent has answered"
    for text, trajectory in zip(TURNS, (first, second), strict=True):
        assert trajectory.answer_ids == [*table.tokenizer(text).input_ids, table.rollout.stop_ids[0]] and all(trajectory.answer_mask)
