"""Reinforcement learning raises exact match on the demo's own problems, from an early checkpoint of the demo's own model.

A quarter of an hour a seed on two cores, so only `pytest -m learning` runs it; tests/test_ppo_learning.py shows the same in a
minute on an easier task.
"""

import json
from pathlib import Path

import pytest
from rl import metrics_of

from verl.config import EvalConfig
from verl.demo.problems import write_problems
from verl.demo.run import RECIPE, RL_RECIPE
from verl.eval.sft_evaluator import evaluate
from verl.models.tiny import write_tiny_model
from verl.trainer import fsdp_sft_trainer, ppo_trainer

pytestmark = [pytest.mark.learning, pytest.mark.timeout(2400)]

STEPS, EVERY = 1500, 100  # of fine-tuning; reinforcement learning starts where a checkpoint first answers a quarter
LOWEST, HIGHEST = 0.25, 0.45
# As the demo's, and minutes long: 85 steps of GRPO, or 45 of PPO, which trains on all answers and has a critic.
GRPO = [*RL_RECIPE, "trainer.total_training_steps=85"]
PPO = [*RL_RECIPE, "algorithm.name=ppo", "algorithm.lam=0.95", "critic.optim.lr=1e-3", "trainer.total_training_steps=45"]
FAR_TOO_HIGH = [*RL_RECIPE, "optim.lr=1e-2", "trainer.total_training_steps=10"]


class Start:
    """The demo's problems, and its model as it is early in fine-tuning.

    Attributes:
        exact_match: greedy, on the held-out problems.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        train, _ = write_problems(folder / "train.jsonl", folder / "test.jsonl", 24_000, 400, seed)
        write_tiny_model(folder / "model", (text for problem in train for text in (problem.question, problem.answer)), seed=seed)
        words = [f"data.train_files={folder}/train.jsonl", f"data.cache_dir={folder}/cache", f"model.partial_pretrain={folder}/model"]
        steps = [f"trainer.total_training_steps={STEPS}", f"trainer.save_freq={EVERY}", "trainer.max_ckpt_to_keep=null"]
        fsdp_sft_trainer.main([*words, *RECIPE, *steps, f"trainer.default_local_dir={folder}/sft", f"trainer.seed={seed}"])
        for step in range(EVERY, STEPS, EVERY):
            self.checkpoint = folder / "sft" / f"global_step_{step}"
            self.exact_match = self._exact_match(self.checkpoint)
            if self.exact_match >= LOWEST:
                break
        assert LOWEST <= self.exact_match <= HIGHEST

    def after(self, output: str, words: list[str]) -> float:
        """Exact match after reinforcement learning."""
        directory = self.folder / output
        files = [f"data.train_files={self.folder}/train.jsonl", f"model.partial_pretrain={self.checkpoint}"]
        ppo_trainer.main([*files, *words, f"trainer.default_local_dir={directory}", f"trainer.seed={self.seed}"])
        return self._exact_match(directory / f"global_step_{metrics_of(directory)[-1]['step']}")

    def _exact_match(self, checkpoint: Path) -> float:
        output = self.folder / "evaluation"
        config = EvalConfig(
            model_path=str(checkpoint), test_file=str(self.folder / "test.jsonl"), output_dir=str(output), max_new_tokens=64
        )
        evaluate(config)
        found: float = json.loads((output / "results.json").read_text())["exact_match"]
        return found


@pytest.fixture(scope="module", params=[1, 2], ids=lambda seed: f"seed {seed}")
def start(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Start:
    return Start(tmp_path_factory.mktemp("learning"), request.param)


def test_grpo_raises_exact_match_by_a_fifth(start: Start) -> None:
    assert start.after("grpo", GRPO) >= start.exact_match + 0.20


def test_ppo_with_a_critic_raises_it_by_a_seventh(start: Start) -> None:
    assert start.after("ppo", PPO) >= start.exact_match + 0.15


def test_at_a_learning_rate_far_too_high_it_falls(start: Start) -> None:
    assert start.after("wild", FAR_TOO_HIGH) < start.exact_match
