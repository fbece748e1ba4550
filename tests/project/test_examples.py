"""The example scripts, run with stand-ins for what they start: their words are a config that the trainer takes.

Those of reinforcement learning and of pairs are then run with the same words, at the size of the demo's model; so is the classifier's.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from judges import forget, graded, prompt_of, served
from places import ROOT
from tiny import write_problems_and_model

from verl import plugin
from verl.config.load import load_config
from verl.config.pairs import RewardTrainerConfig
from verl.config.ppo import PPOConfig
from verl.config.sft import SFTConfig
from verl.demo.problems import make_problems
from verl.errors import UserError
from verl.trainer import ppo_trainer, reward_trainer

SCRIPTS = [*sorted((ROOT / "examples" / "sft").glob("*.sh")), *sorted((ROOT / "examples" / "slurm").glob("*.sbatch"))]
PPO = ROOT / "examples" / "ppo"
ENVIRONMENT = {
    "HEAD": "node1",
    "SLURM_JOB_ID": "12345",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NODEID": "0",
    "SLURM_CPUS_ON_NODE": "64",
    "SLURM_GPUS_ON_NODE": "8",
}
STAND_INS = {
    # What is started last writes down its words.
    "torchrun": f'exec {sys.executable} -c "import json, sys; json.dump(sys.argv[1:], open(\\"$CAPTURED\\", \\"w\\"))" "$@"',
    "python": 'exec "$(dirname "$0")/torchrun" "$@"',
    # On one node, without SLURM's own options.
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": "[[ $1 == show ]] && printf 'node1\\nnode2\\n'",
}


@dataclass(frozen=True)
class Started:
    """What a script started.

    Attributes:
        options: torchrun's own, such as nproc_per_node; none where there is one process.
        words: key=value, for the trainer.
        module: the trainer.
    """

    options: dict[str, str]
    words: list[str]
    module: str

    @property
    def processes(self) -> int:
        return int(self.options.get("nnodes", 1)) * int(self.options.get("nproc_per_node", 1))


def start(script: Path, folder: Path, *words: str) -> Started:
    """Run a script with the stand-ins in place of the programs that it starts."""
    commands = folder / "commands"
    commands.mkdir(exist_ok=True)
    for name, text in STAND_INS.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (commands / name).chmod(0o755)
    captured = folder / "captured.json"
    path = f"{commands}:{os.environ['PATH']}"
    done = subprocess.run(
        [script, *words], env={**os.environ, **ENVIRONMENT, "PATH": path, "CAPTURED": str(captured)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    argv = json.loads(captured.read_text())
    module = argv.index("-m")
    options = dict(word.removeprefix("--").partition("=")[::2] for word in argv[:module])
    return Started(options, argv[module + 2 :], argv[module + 1])


def check(started: Started) -> SFTConfig:
    """The config of what was started, after the checks that need the number of processes."""
    assert started.module == "verl.trainer.fsdp_sft_trainer"
    config = load_config(SFTConfig, started.words)
    rows = config.data.train_batch_size or config.data.micro_batch_size_per_gpu * started.processes
    assert rows % started.processes == 0, f"{rows} rows a step on {started.processes} processes"
    for owner, key in ((config.model, "context_parallel_size"), (config.model.fsdp_config, "shard_size")):
        assert started.processes % (getattr(owner, key, None) or 1) == 0, f"{key} on {started.processes} processes"
    return config


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_starts_what_the_trainer_takes_and_passes_further_words_on(script: Path, tmp_path: Path) -> None:
    assert subprocess.run(["bash", "-n", script]).returncode == 0 and os.access(script, os.X_OK)
    config = check(start(script, tmp_path))
    assert config.model.partial_pretrain.startswith("Qwen/Qwen2.5-") and config.trainer.resume_mode == "auto"
    again = check(start(script, tmp_path, "optim.lr=3e-6", "data.train_files=two words.jsonl"))
    assert again.optim.lr == 3e-6 and again.data.train_files == "two words.jsonl" and again.trainer == config.trainer


def test_each_way_of_the_list_has_its_script(tmp_path: Path) -> None:
    shapes = {}
    for script in SCRIPTS:
        started = start(script, tmp_path)
        config = check(started)
        shapes[script.name] = (started.processes, config.model.lora_rank > 0, config.model.fsdp_config.cpu_offload)
    assert shapes == {
        "qwen25_05b_one_gpu.sh": (1, False, False),
        "qwen25_05b_four_gpus.sh": (4, False, False),
        "qwen25_15b_lora_16gb.sh": (1, True, False),
        "qwen25_7b_four_gpus.sh": (4, False, False),
        "qwen25_7b_four_gpus_offload.sh": (4, False, True),
        "qwen25_7b_many_nodes.sh": (16, False, False),
        "sft.sbatch": (16, False, False),
    }


def test_a_step_of_7b_is_one_micro_batch_of_each_gpu(tmp_path: Path) -> None:
    """As the scripts say, for rows of GSM8K's 213 tokens: a second one would keep gradients whole."""
    checked = 0
    for script in SCRIPTS:
        started = start(script, tmp_path)
        data, model = check(started).data, check(started).model
        if "7B" in model.partial_pretrain:
            assert data.train_batch_size is not None and data.max_tokens_per_micro_batch is not None
            assert 0.75 < data.train_batch_size * 213 / started.processes / data.max_tokens_per_micro_batch < 0.95
            checked += 1
    assert checked == 4


def test_the_nodes_of_a_slurm_job_meet_at_the_first_one(tmp_path: Path) -> None:
    options = start(ROOT / "examples" / "slurm" / "sft.sbatch", tmp_path).options
    assert options["rdzv_endpoint"] == "node1:22345" and options["rdzv_conf"] == "is_host=1" and options["rdzv_id"] == "12345.0"


@pytest.mark.parametrize(
    ("name", "right", "wrong", "said"),
    [
        ("qwen25_7b_four_gpus.sh", "data.max_length=", "data.max_lenght=", "unknown key 'data.max_lenght'"),
        ("sft.sbatch", "model.enable_gradient_checkpointing=true", "model.enable_gradient_checkpointing=some", "found 'some'"),
        ("qwen25_7b_many_nodes.sh", "NODES * 8 * 64", "NODES * 8 * 64 + 8", "1032 rows a step on 16 processes"),
        ("qwen25_7b_four_gpus.sh", "data.max_tokens_per_micro_batch=16384", "data.max_tokens_per_micro_batch=1024", "cannot hold a row"),
    ],
)
def test_a_script_with_a_mistake_fails(name: str, right: str, wrong: str, said: str, tmp_path: Path) -> None:
    (script,) = (path for path in SCRIPTS if path.name == name)
    text = script.read_text(encoding="utf-8")
    assert text.count(right) == 1
    mistaken = tmp_path / name
    mistaken.write_text(text.replace(right, wrong), encoding="utf-8")
    mistaken.chmod(0o755)
    with pytest.raises((UserError, AssertionError), match=said):
        check(start(mistaken, tmp_path))


# Pairs and reinforcement learning


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems, pairs of answers to them, and a small model."""
    folder = write_problems_and_model(tmp_path_factory.mktemp("ppo"))
    problems, _ = make_problems(24, 1, seed=5)
    answers = [problem.answer for problem in problems]
    rows = [
        {"prompt": problem.question, "chosen": problem.answer, "rejected": other}
        for problem, other in zip(problems, answers[1:] + answers[:1], strict=True)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def small(folder: Path, output: str, rows: str, **changes: object) -> list[str]:
    """Words that bring a run down to the size of a test."""
    keys: dict[str, object] = {
        "data.train_files": folder / rows,
        "data.val_files": folder / rows,
        "data.val_max_samples": 4,
        "model.partial_pretrain": folder / "model",
        "trainer.total_training_steps": 2,
        "trainer.default_local_dir": folder / output,
        **changes,
    }
    return [f"{key}={value}" for key, value in keys.items()]


def run_small(name: str, module: ModuleType, folder: Path, tmp_path: Path, rows: str, **changes: object) -> list[dict[str, float]]:
    """Run a script's own words with smaller ones behind them, in this process; the metrics of each step."""
    started = start(PPO / name, tmp_path, *small(folder, name, rows, **changes))
    assert started.module == module.__name__ and started.options == {}
    module.main(started.words)
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


PAIRS = {"data.train_batch_size": 4, "data.max_length": 256, "data.max_tokens_per_micro_batch": 1024}
ROLLOUTS = {"data.prompts_per_step": 4, "rollout.max_new_tokens": 8, "data.max_prompt_length": 128, "data.max_tokens_per_micro_batch": 1024}


def test_the_reward_model_script_and_then_ppo_against_that_model(folder: Path, tmp_path: Path) -> None:
    pairs = run_small("qwen25_05b_reward_model.sh", reward_trainer, folder, tmp_path, "pairs.jsonl", **PAIRS)
    assert len(pairs) == 2 and "val/accuracy" in pairs[-1]
    model = {"reward_model.path": folder / "qwen25_05b_reward_model.sh" / "global_step_2"}
    steps = run_small("qwen25_05b_ppo_reward_model.sh", ppo_trainer, folder, tmp_path, "train.jsonl", **ROLLOUTS, **model)
    assert any(key.endswith("reward/model") for key in steps[-1]) and any(key.endswith("reward/format") for key in steps[-1])
    assert (folder / "qwen25_05b_ppo_reward_model.sh" / "global_step_2" / "config.json").is_file()


def test_the_grpo_script(folder: Path, tmp_path: Path) -> None:
    steps = run_small("qwen25_05b_grpo_gsm8k.sh", ppo_trainer, folder, tmp_path, "train.jsonl", **ROLLOUTS)
    assert steps[-1]["step"] == 2 and "rl/reward" in steps[-1]


def test_the_judge_script_asks_a_service_and_gates_by_the_format(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(monkeypatch, tmp_path) as service:
        service.reply = lambda number, body: graded(f'{{"right": {number % 11}, "clear": 5}}' if number else "I would rather not.")
        keys = {**ROLLOUTS, "reward.judge_url": service.url, "data.val_files": "null", "data.val_max_samples": "null"}
        steps = run_small("qwen25_05b_grpo_judge.sh", ppo_trainer, folder, tmp_path, "train.jsonl", **keys)
        asked = [prompt_of(body) for _, _, body in service.requests]
        forget(monkeypatch)
        (folder / "qwen25_05b_grpo_judge.sh").rename(folder / "first")
        again = run_small("qwen25_05b_grpo_judge.sh", ppo_trainer, folder, tmp_path, "train.jsonl", **keys)
        assert len(service.requests) == len(asked), "the same answers in another run cost no request"
        assert [step["rl/reward"] for step in again] == [step["rl/reward"] for step in steps]
    assert steps[-1]["reward/judge"] > 0 and steps[-1]["reward/gated"] > 0.8 and steps[0]["reward/errors"] >= 1
    assert len(set(asked)) == len(asked) and "- right: the final number is the right one" in asked[0]


def test_the_classifier_learns_a_little_in_a_few_steps(tmp_path: Path) -> None:
    example = plugin.load("examples", str(ROOT / "examples" / "classification" / "operations.py"))
    found = example.main(tmp_path, ["trainer.total_training_steps=12", "optim.lr=2e-3"])
    assert 0.3 < found <= 1.0


def test_the_dpo_script(folder: Path, tmp_path: Path) -> None:
    steps = run_small("qwen25_05b_dpo.sh", reward_trainer, folder, tmp_path, "pairs.jsonl", **PAIRS)
    assert steps[0]["train/margin"] == 0 and steps[-1]["val/loss"] < 0.7


@pytest.mark.parametrize("script", sorted(PPO.glob("*.sh")), ids=lambda path: path.name)
def test_a_script_of_reinforcement_learning_passes_further_words_on(script: Path, tmp_path: Path) -> None:
    assert subprocess.run(["bash", "-n", script]).returncode == 0 and os.access(script, os.X_OK)
    schema = {"verl.trainer.ppo_trainer": PPOConfig, "verl.trainer.reward_trainer": RewardTrainerConfig}
    started = start(script, tmp_path, "optim.lr=3e-6")
    assert load_config(schema[started.module], started.words).optim.lr == 3e-6
