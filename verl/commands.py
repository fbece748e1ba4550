"""The commands, each with its module and its config class. Both are imported only when used."""

import importlib
from types import ModuleType
from typing import Any, NamedTuple

from verl.errors import UserError


class Command(NamedTuple):
    """A command of the command line and the Python API.

    Attributes:
        module: name of a module with `main(words)`, which runs the command with its command-line arguments.
        config: module and name of the config class.
        usage: usage line of `--help`.
        example: a command that works, for `--help` and errors.
        places: keys of the arguments that stand alone, without `key=`.
        rewrite: module and name of the function that rewrites the command's own options as `key=value`; None: it has none.
    """

    module: str
    config: tuple[str, str]
    usage: str
    example: str = ""
    places: tuple[str, ...] = ()
    rewrite: tuple[str, str] | None = None

    def schema(self) -> type[Any]:
        """Import and return the config class."""
        place, name = self.config
        schema: type[Any] = getattr(importlib.import_module(place), name)
        return schema

    def load(self) -> ModuleType:
        """Import and return the command's module.

        Raises:
            UserError: a package that it needs is not installed.
        """
        return load_module(self.module)


def load_module(name: str) -> ModuleType:
    """Import a module of verl. Raises UserError: a package that it needs is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("verl."):
            raise
        fix = 'pip install -c constraints.txt -e "."; verl doctor shows the rest'
        raise UserError(f"{error.name} is not installed", fix=fix) from error


SFT = Command(
    "verl.trainer.fsdp_sft_trainer",
    ("verl.config.sft", "SFTConfig"),
    "verl sft [--gpus N] key=value …",
    "verl sft data.train_files=train.jsonl model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct",
)
PPO = Command(
    "verl.trainer.ppo_trainer",
    ("verl.config.ppo", "PPOConfig"),
    "verl ppo [--gpus N] key=value …",
    "verl ppo data.train_files=train.jsonl model.partial_pretrain=checkpoints/verl-sft/run reward.name=gsm8k",
)
REWARD = Command(
    "verl.trainer.reward_trainer",
    ("verl.config.pairs", "RewardTrainerConfig"),
    "verl reward [--gpus N] key=value …",
    "verl reward data.train_files=pairs.jsonl model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct",
)
EVALUATE = Command(
    "verl.eval.sft_evaluator",
    ("verl.config.commands", "EvalConfig"),
    "verl eval key=value … [--against OTHER]",
    "verl eval model_path=checkpoints/verl-sft/run test_file=test.jsonl output_dir=results",
)
CHAT = Command(
    "verl.chat",
    ("verl.config.commands", "ChatConfig"),
    "verl chat DIR key=value …",
    "verl chat checkpoints/verl-sft/run",
    ("model_path",),
)
EXPORT = Command(
    "verl.models.export",
    ("verl.config.commands", "ExportConfig"),
    "verl export SRC NEW_DIR [--hub NAME] key=value …",
    "verl export checkpoints/verl-sft/run my-model",
    ("source", "directory"),
    ("verl.config.commands", "keyed"),
)
SERVE = Command(
    "verl.serve",
    ("verl.config.commands", "ServeConfig"),
    "verl serve DIR key=value …",
    "verl serve checkpoints/verl-sft/run",
    ("model_path",),
)
DEMO = Command("verl.demo.run", ("verl.config.commands", "DemoConfig"), "verl demo key=value …", "verl demo")


def trainer_config(words: list[str]) -> Any:
    """Build the config of the trainer whose arguments these are: of `verl sft`, or else of `verl reward` or `verl ppo`.

    Raises:
        UserError: as `verl.config.load.load_config`.
    """
    from verl.config.load import load_config
    from verl.config.trainers import closest

    return load_config(closest([command.schema() for command in (SFT, REWARD, PPO)], words), words)
