"""verl from Python, for programs and notebooks. Each function does what the command of its name does, in this process.

    import verl

    verl.sft("data.train_files=train.jsonl", "model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct")
    verl.sft({"data": {"train_files": "train.jsonl"}, "model": {"partial_pretrain": "Qwen/Qwen2.5-0.5B-Instruct"}})
    config = verl.SFTConfig()
    config.data.train_files, config.model.partial_pretrain = "train.jsonl", "Qwen/Qwen2.5-0.5B-Instruct"
    verl.sft(config, "optim.lr=1e-4")

A config is given as its dataclass, as a dict, nested or with dotted keys, as the words of a command line (`key=value`, `--config`,
`FILE`), or as several of these, of which later ones win. It is checked as on the command line, and is not changed.

What is wrong raises a `UserError`; nothing ends the process. Ctrl-C, SIGTERM and SIGUSR1 end a training run after its step, with a
checkpoint, and raise `Stopped`, which is a KeyboardInterrupt; a second one interrupts at once. Python hands signals to the main thread
alone: a run in another thread leaves them to the program, and goes on.

One run at a time is in a process. When it ends, however it does, the process is as before: process group, signal handlers, warnings,
levels of loggers, random numbers. On several GPUs, start the program with torchrun, and let every process make the same calls.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl.commands import EVALUATE, EXPORT, PPO, REWARD, SFT, Command
from verl.config.commands import keyed
from verl.config.load import Given, config_of
from verl.rollout import DEFAULTS, Options

if TYPE_CHECKING:
    from verl.config.commands import EvalConfig, ExportConfig
    from verl.config.pairs import RewardTrainerConfig
    from verl.config.ppo import PPOConfig
    from verl.config.sft import SFTConfig
    from verl.generate import TextRollout
    from verl.run import TrainResult


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found.

    Attributes:
        directory: of its files (output_dir).
        scores: the content of results.json, such as `exact_match` with its `confidence_interval_95`.
        rows: an object an answer, as predictions.jsonl has them: `prompt`, `response`, `score`, …
    """

    directory: Path
    scores: dict[str, Any]
    rows: list[dict[str, Any]]


def sft(*config: "SFTConfig | Given") -> "TrainResult":
    """Fine-tune a model on a file of questions and answers, as `verl sft` does.

    Raises:
        UserError: anything in the config, the data, the model or the checkpoint that is not right.
        Stopped: a signal ended the run after a step.
    """
    return _train(SFT, config)


def ppo(*config: "PPOConfig | Given") -> "TrainResult":
    """Go on from a fine-tuned checkpoint with reinforcement learning, as `verl ppo` does.

    Raises:
        UserError, Stopped: as `sft`.
    """
    return _train(PPO, config)


def reward(*config: "RewardTrainerConfig | Given") -> "TrainResult":
    """Train a reward model, or with `algorithm.name=dpo` a policy, on pairs of answers, as `verl reward` does.

    Raises:
        UserError, Stopped: as `sft`.
    """
    return _train(REWARD, config)


def evaluate(*config: "EvalConfig | Given") -> EvalResult:
    """Let a checkpoint answer a file of questions and compare the answers with the right ones, as `verl eval` does.

    Raises:
        UserError: anything in the config, the rows, the checkpoint or the grader that is not right.
    """
    settings: EvalConfig = config_of(EVALUATE.schema(), config)
    scores = EVALUATE.load().evaluate(settings)
    directory = Path(settings.output_dir).expanduser()
    lines = (directory / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return EvalResult(directory, scores, [json.loads(line) for line in lines])


def export(*config: "ExportConfig | Given | Path") -> Path:
    """Write a checkpoint as one Hugging Face directory, an adapter merged into its base, as `verl export` does.

        verl.export(run.checkpoint, "my-model", "dtype=bfloat16")

    Returns:
        the directory.
    Raises:
        UserError: no such checkpoint, or a directory that holds something.
    """
    settings = config_of(EXPORT.schema(), keyed(config))
    from verl.session import session  # loads torch, of which a wrong config has no need

    with session():
        directory: Path = EXPORT.load().export(settings)
        return directory


def load_rollout(path: "str | Path", name: str = "native", options: Options = DEFAULTS) -> "TextRollout":
    """Load a checkpoint for generation.

        model = verl.load_rollout("checkpoints/verl-sft/run/global_step_100")
        for answer in model.generate(["What is 17 + 25?", "What is 60 - 18?"]):
            print(answer)

    Args:
        path: a checkpoint: a Hugging Face model directory, a LoRA adapter directory, or a Hub name.
        name: generation engine: native, hf, vllm, or path/to/file.py.
        options: of the engine (`verl.rollout.Options`).
    Raises:
        UserError: no such engine, or a checkpoint that it cannot load.
    """
    from verl.generate import open_rollout  # loads torch

    return open_rollout(str(path), name, options)


def _train(command: Command, given: tuple[object, ...]) -> "TrainResult":
    config = config_of(command.schema(), given)
    from verl import run  # loads torch, of which a wrong config has no need

    trainer = command.load()
    if config.trainer.dry_run:
        trainer.dry_run(config)
        return run.TrainResult(None, Path(config.trainer.default_local_dir).expanduser(), [])
    result: TrainResult = trainer.train(config)
    return result
