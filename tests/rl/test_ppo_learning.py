"""Reinforcement learning raises exact match on problems with other numbers, and a learning rate far too high does not.

The problems are the demo's, answered with a calculator, so that fine-tuning takes seconds. It is stopped early, and of most two-step
answers it has seen the end written so that the grader does not read it: what is left to learn is to calculate better, and to answer as is
asked for. It takes minutes, so only `make learning` runs it; the notebook and the demo show with all tests that fine-tuning learns.
"""

import json
import random
from pathlib import Path

import pytest
from runs import metrics_of

from verl import dist
from verl.config.load import load_config
from verl.config.ppo import PPOConfig, RewardConfig, RewardModelConfig
from verl.data.prompts import load_prompts
from verl.data.render import Renderer
from verl.demo.problems import make_problems, tool_chat
from verl.models.load import load_tokenizer
from verl.models.tiny import write_tiny_model
from verl.rewards._scoring import Rewards
from verl.rl.answering import Answerer
from verl.rollout import Options, load_rollout
from verl.trainer import fsdp_sft_trainer, ppo_trainer

pytestmark = [pytest.mark.learning, pytest.mark.timeout(600)]
STEPS = 220
UNREAD = 0.7  # of the answers in two steps, the share that ends otherwise than the grader reads it
FINE_TUNING = (
    "data.messages_key=messages data.train_batch_size=16 data.max_length=256 data.max_tokens_per_micro_batch=4096 "
    "model.enable_gradient_checkpointing=false optim.lr=2e-3 optim.lr_scheduler=linear trainer.save_freq=-1 "
    f"trainer.total_training_steps={STEPS} trainer.logger=verl.demo.milestones"
)
REINFORCEMENT = (
    "data.max_prompt_length=64 data.prompts_per_step=16 rollout.max_new_tokens=96 rollout.tool=calculator rollout.max_turns=4 "
    "rollout.temperature=0.7 model.enable_gradient_checkpointing=false algorithm.keep_reference=false optim.betas=[0.9,0.99] "
    "trainer.save_freq=never"
)
GRPO = "algorithm.name=grpo optim.lr=1e-4 trainer.total_training_steps=15"
PPO = "algorithm.name=ppo optim.lr=1e-4 algorithm.lam=0.95 critic.optim.lr=1e-3 trainer.total_training_steps=15"
FAR_TOO_HIGH = "optim.lr=1e-2"
LOWEST, HIGHEST = 0.2, 0.45  # greedy exact match of a start that has something to learn, and can


class Start:
    """Problems, and an early fine-tuned checkpoint that answers some of them.

    Attributes:
        exact_match: greedy, on the held-out problems.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        train, test = make_problems(6000, 150, seed)
        chats, draw = [tool_chat(problem) for problem in train], random.Random(seed)
        for problem, chat in zip(train, chats, strict=True):
            if len(problem.steps) == 2 and draw.random() < UNREAD:
                chat[-1]["content"] = f"The answer is {problem.result}."
        rows = [{**problem.row(), "messages": chat} for problem, chat in zip(train, chats, strict=True)]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "test.jsonl").write_text("".join(json.dumps(problem.row()) + "\n" for problem in test))
        write_tiny_model(folder / "model", [message["content"] for chat in chats for message in chat], seed=seed)
        words = [f"data.train_files={folder}/train.jsonl", f"data.cache_dir={folder}/cache", f"model.partial_pretrain={folder}/model"]
        fsdp_sft_trainer.main([*words, f"trainer.default_local_dir={folder}/sft", f"trainer.seed={seed}", *FINE_TUNING.split()])
        self.checkpoint = folder / "sft" / f"global_step_{STEPS}"
        self.exact_match = exact_match(self.checkpoint, folder)
        assert LOWEST <= self.exact_match <= HIGHEST

    def after(self, output: str, words: str) -> float:
        """Exact match after reinforcement learning."""
        files = [f"data.{kind}_files={self.folder}/{name}.jsonl" for kind, name in (("train", "train"), ("val", "test"))]
        more = [
            f"model.partial_pretrain={self.checkpoint}",
            f"trainer.default_local_dir={self.folder}/{output}",
            f"trainer.seed={self.seed}",
        ]
        ppo_trainer.main([*files, *more, *REINFORCEMENT.split(), *words.split()])
        lines = metrics_of(self.folder / output)
        assert lines[0]["val/exact_match"] == pytest.approx(self.exact_match)
        return lines[-1]["val/exact_match"]


def exact_match(checkpoint: Path, folder: Path) -> float:
    """Greedy, with the calculator, on the held-out problems."""
    words = [f"data.train_files={folder}/test.jsonl", f"model.partial_pretrain={checkpoint}", *REINFORCEMENT.split()]
    config = load_config(PPOConfig, words)
    tokenizer = load_tokenizer(str(checkpoint))
    rollout = load_rollout("native", str(checkpoint), tokenizer, Renderer(tokenizer).stop_ids, Options())
    answerer = Answerer(rollout, config.rollout, Rewards(RewardConfig(), RewardModelConfig()), tokenizer, seed=1)
    samples = answerer.greedy(load_prompts(config.data, config.data.train_files, tokenizer).prompts)
    answerer.score(samples)
    dist.stop()
    return sum(sample.reward for sample in samples) / len(samples)


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda seed: f"seed {seed}")
def start(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Start:
    return Start(tmp_path_factory.mktemp("learning"), request.param)


def test_grpo_raises_exact_match_by_a_fifth(start: Start) -> None:
    assert start.after("grpo", GRPO) >= start.exact_match + 0.20


def test_ppo_with_a_critic_raises_it_by_a_seventh(start: Start) -> None:
    assert start.after("ppo", PPO) >= start.exact_match + 0.15


def test_at_a_learning_rate_far_too_high_it_falls(start: Start) -> None:
    assert start.after("wild", f"{GRPO} {FAR_TOO_HIGH} trainer.total_training_steps=5") < start.exact_match
