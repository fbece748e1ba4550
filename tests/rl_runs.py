"""A small model with problems to answer, and a reward that its random answers differ in, for tests of reinforcement learning."""

import os
from pathlib import Path

import pytest
from forked import Forked
from places import free_port, run_ranks
from runs import PPO, as_words, lines_of, metrics_of
from tiny import write_problems_and_model

from verl.trainer import ppo_trainer

REWARD = '''"""The share of letters in the answer that are vowels."""


def score(prompt: str, response: str, row: dict) -> float:
    return sum(c in "aeiou" for c in response.lower()) / max(1, len(response))
'''
# The second half of the questions' numbers earn nothing, so that some groups have no spread.
SOMETIMES = (
    "def score(prompt, response, row):\n    return float(int(row['reference'][-1]) % 2) * (1 + sum(c in 'aeiou' for c in response))\n"
)
COMPARED = ("train/loss", "train/grad_norm", "rl/reward", "rl/reward_std", "rl/entropy", "rl/kl_k3", "rl/response_tokens")
OF_CRITIC = ("critic/loss", "critic/grad_norm", "rl/explained_variance")
STEPS = 3  # of runs on several processes


def write_folder(folder: Path) -> Path:
    write_problems_and_model(folder)
    (folder / "vowels.py").write_text(REWARD)
    return folder


def words(folder: Path, output: str, **changes: object) -> list[str]:
    keys: dict[str, object] = {
        "data.train_files": folder / "train.jsonl",
        "data.prompts_per_step": 4,
        "data.max_prompt_length": 128,
        "data.max_tokens_per_micro_batch": 600,
        "model.partial_pretrain": folder / "model",
        "model.enable_gradient_checkpointing": "false",
        "optim.lr": 1e-4,
        "critic.optim.lr": 1e-3,
        "reward.name": folder / "vowels.py",
        "rollout.samples_per_prompt": 4,
        "rollout.max_new_tokens": 12,
        "trainer.default_local_dir": folder / output,
        "trainer.total_training_steps": 4,
    }
    return as_words(keys, changes)


def train(folder: Path, output: str, **changes: object) -> list[dict[str, float]]:
    """Run in this process; the metrics of each step."""
    ppo_trainer.main(words(folder, output, **changes))
    return metrics_of(folder / output)


def run_on(processes: int, folder: Path, output: str, **changes: object) -> Path:
    """Run on so many processes; the run's directory."""
    argv = words(folder, output, trainer__total_training_steps=STEPS, trainer__save_freq="never", **changes)
    run_ranks(*PPO, *argv, processes=processes)
    return folder / output


def answers_of(run: Path) -> list[list[tuple[int, str]]]:
    """Prompts and answers of each step."""
    steps = [lines_of(run / "rollouts" / f"step_{step + 1}.jsonl") for step in range(STEPS)]
    return [[(line["number"], line["response"]) for line in step] for step in steps]


def check_same(found: Path, expected: Path, *, has_critic: bool = False) -> None:
    """That two runs drew the same answers and learned the same."""
    assert answers_of(found) == answers_of(expected)
    for here, there in zip(metrics_of(found), metrics_of(expected), strict=True):
        for name in (*COMPARED, *(OF_CRITIC if has_critic else ())):
            assert here[name] == pytest.approx(there[name], rel=1e-4, abs=1e-5), name


class Pair:
    """A process that trains, and one that generates for it; each can be looked at, and sent a signal, by itself."""

    def __init__(self, folder: Path, output: str, **changes: object):
        roles = {f"mapping__{role}": "[0]" for role in ("actor", "critic", "reference", "reward")} | {"mapping__rollout": "[1]"}
        command = [*PPO, *words(folder, output, **roles, **changes)]
        common = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.processes = [Forked(command, folder, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]

    def ends(self) -> list[tuple[int, str, str]]:
        """Exit code, standard output and standard error of both."""
        try:
            said = [process.communicate(timeout=90) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [(process.returncode, *texts) for process, texts in zip(self.processes, said, strict=True)]
