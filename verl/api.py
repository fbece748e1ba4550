"""The Python API, for programs and notebooks. Each function does the same as the command of its name, in this process.

    import verl

    verl.sft("data.train_files=train.jsonl", "model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct")
    verl.sft({"data": {"train_files": "train.jsonl"}, "model": {"partial_pretrain": "Qwen/Qwen2.5-0.5B-Instruct"}})
    config = verl.SFTConfig()
    config.data.train_files, config.model.partial_pretrain = "train.jsonl", "Qwen/Qwen2.5-0.5B-Instruct"
    verl.sft(config, "optim.lr=1e-4")

A config is a dataclass, a dict (nested or with dotted keys), or command-line arguments (`key=value`, `--config`, `FILE`). You can pass
several; later ones win. Configs are checked as on the command line, and are not changed.

Wrong input raises `UserError`; no function exits the process. Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP stop a training run after the current
step: it saves a checkpoint and raises `Stopped`, a KeyboardInterrupt. A second signal interrupts at once. Python delivers signals only to
the main thread, so a run in another thread does not handle them and continues.

A process runs one training at a time. Afterwards, the process group, signal handlers, warnings filters, log levels and random-number state
are as before, even after an error. For several GPUs, start the program with torchrun and make the same calls in every process.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl.commands import EVALUATE, EXPORT, PPO, REWARD, SFT, Command, load_module, trainer_config
from verl.config.commands import keyed
from verl.config.objects import Given, config_of, words_of
from verl.inspection.picks import Picks
from verl.rollout import DEFAULTS, Options

if TYPE_CHECKING:
    from verl.config.commands import EvalConfig, ExportConfig
    from verl.config.pairs import RewardTrainerConfig
    from verl.config.ppo import PPOConfig
    from verl.config.sft import SFTConfig
    from verl.generate import TextRollout
    from verl.inspection.result import Inspection
    from verl.run import TrainResult


@dataclass(frozen=True)
class EvalResult:
    """Result of an evaluation.

    Attributes:
        directory: directory of its files (output_dir).
        scores: the contents of results.json, such as `exact_match` with its `confidence_interval_95`.
        rows: one dict per answer, as in predictions.jsonl: `prompt`, `response`, `score`, …
    """

    directory: Path
    scores: dict[str, Any]
    rows: list[dict[str, Any]]


def sft(*config: "SFTConfig | Given") -> "TrainResult":
    """Fine-tune a model on a file of questions and answers, as `verl sft` does.

    Raises:
        UserError: the config, the data, the model or the checkpoint is invalid.
        Stopped: a signal stopped the run after a step.
    """
    return _train(SFT, config)


def ppo(*config: "PPOConfig | Given") -> "TrainResult":
    """Train a fine-tuned checkpoint with reinforcement learning, as `verl ppo` does.

    Raises:
        UserError, Stopped: as `sft`.
    """
    return _train(PPO, config)


def reward(*config: "RewardTrainerConfig | Given") -> "TrainResult":
    """Train a reward model on pairs of answers, or with `algorithm.name=dpo`, `kto`, … a policy, as `verl reward` does.

    Raises:
        UserError, Stopped: as `sft`.
    """
    return _train(REWARD, config)


def evaluate(*config: "EvalConfig | Given") -> EvalResult:
    """Generate answers to a file of questions with a checkpoint, and grade them, as `verl eval` does.

    Raises:
        UserError: the config, a row, the checkpoint or the grader is invalid.
    """
    settings: EvalConfig = config_of(EVALUATE.schema(), config)
    scores = EVALUATE.load().evaluate(settings)
    directory = Path(settings.output_dir).expanduser()
    lines = (directory / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return EvalResult(directory, scores, [json.loads(line) for line in lines])


def export(*config: "ExportConfig | Given | Path") -> Path:
    """Write a checkpoint as one Hugging Face directory, as `verl export` does. An adapter is merged into its base model.

        verl.export(run.checkpoint, "my-model", "dtype=bfloat16")

    Returns:
        the directory.
    Raises:
        UserError: no such checkpoint, or the directory is not empty.
    """
    settings = config_of(EXPORT.schema(), keyed(config))
    from verl.session import session  # imports torch, which is slow; a wrong config fails before

    with session():
        directory: Path = EXPORT.load().export(settings)
        return directory


def inspect_data(
    *config: "SFTConfig | RewardTrainerConfig | PPOConfig | Given",
    rows: "Sequence[int | str]" = (),
    longest: bool = False,
    random: int = 0,
    text: str | None = None,
    exact: bool = False,
) -> "Inspection":
    """Read the data of a config, and return what a trainer would make of it, as `verl inspect` prints it. Nothing is written.

        found = verl.inspect_data("data.train_files=train.jsonl", "model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct")
        print(found.train.used, [finding.what for finding in found.train.copies], found.as_json())

    Args:
        config: that of `sft`, or else of `reward` or `ppo`.
        rows: numbers, from 1, or places (train.jsonl:17) of rows to show; with nothing to show, the first row is shown.
        longest: whether to show the longest rows.
        random: number of rows to show, drawn at random.
        text: show rows that contain this text.
        exact: whether to tokenize all rows; otherwise, a sample of very many.
    Raises:
        UserError: the config is invalid, or there is no such model or file. Invalid rows are findings, not errors.
    """
    picks = Picks([str(row) for row in rows], random, text, longest)
    picks.check()
    schemas = [command.schema() for command in (SFT, REWARD, PPO)]
    own = next((schema for schema in schemas if any(isinstance(part, schema) for part in config)), None)
    if own is not None:
        settings = config_of(own, config)
    else:
        settings = trainer_config([word for part in config for word in words_of(part, SFT.schema())])
    found: Inspection = load_module("verl.inspection.inspection").inspect(settings, picks, exact=exact)
    return found


def write_report(
    *runs: str | Path,
    evaluations: Sequence[str | Path] = (),
    out: str | Path | None = None,
    png: str | Path | None = None,
) -> Path:
    """Write a page about runs, one HTML file, as `verl report` does.

        verl.write_report(run.directory, evaluations=["eval-before", "eval-after"])

    Args:
        runs: directories of runs.
        evaluations: directories of evaluations, besides those that are in the runs' directories or beside them.
        out: the page; None: report.html in the first run's directory.
        png: directory for the curves as PNG; None: there are none.
    Returns:
        the page.
    Raises:
        UserError: a directory is not what it should be, a package is missing, or a file would be lost.
    """
    from verl.report import command

    places = [None if path is None else Path(path) for path in (out, png)]
    page, _, _ = command.write_report([*map(Path, runs)], [*map(Path, evaluations)], out=places[0], png=places[1])
    return page


def load_rollout(path: "str | Path", name: str = "auto", options: Options = DEFAULTS) -> "TextRollout":
    """Load a checkpoint for generation.

        model = verl.load_rollout("checkpoints/verl-sft/run/global_step_100")
        for answer in model.generate(["What is 17 + 25?", "What is 60 - 18?"]):
            print(answer)

    Args:
        path: checkpoint: a Hugging Face model directory, a LoRA adapter directory, or a Hub name.
        name: generation engine: auto, native, hf, vllm, or path/to/file.py.
        options: options of the engine.
    Raises:
        UserError: no such engine, or it cannot load the checkpoint.
    """
    from verl.generate import open_rollout  # imports torch

    return open_rollout(str(path), name, options)


def _train(command: Command, given: tuple[object, ...]) -> "TrainResult":
    config = config_of(command.schema(), given)
    from verl import run  # imports torch, which is slow; a wrong config fails before

    trainer = command.load()
    if config.trainer.dry_run:
        trainer.dry_run(config)
        return run.TrainResult(None, Path(config.trainer.default_local_dir).expanduser(), [])
    result: TrainResult = trainer.train(config)
    return result
