"""verl: post-training of language models, from a file of questions and answers to a Hugging Face directory.

    import verl

    run = verl.sft("data.train_files=train.jsonl", "model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct")
    found = verl.evaluate({"model_path": run.checkpoint, "test_file": "test.jsonl", "output_dir": "eval-run"})
    print(found.scores["exact_match"])

`verl.api` says what each function takes and returns.
"""

import importlib

importlib.import_module("verl.safe_path")  # first: it removes the current folder from where Python looks for all that follows

import logging  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import warnings  # noqa: E402
from typing import TYPE_CHECKING  # noqa: E402

if TYPE_CHECKING:  # what editors and type checkers see; when the program runs, `__getattr__` below imports a name as it is asked for
    from verl.api import EvalResult as EvalResult
    from verl.api import evaluate as evaluate
    from verl.api import export as export
    from verl.api import inspect_data as inspect_data
    from verl.api import load_rollout as load_rollout
    from verl.api import ppo as ppo
    from verl.api import reward as reward
    from verl.api import sft as sft
    from verl.api import write_report as write_report
    from verl.config.commands import EvalConfig as EvalConfig
    from verl.config.commands import ExportConfig as ExportConfig
    from verl.config.pairs import RewardTrainerConfig as RewardTrainerConfig
    from verl.config.ppo import PPOConfig as PPOConfig
    from verl.config.sft import SFTConfig as SFTConfig
    from verl.errors import Stopped as Stopped
    from verl.errors import UserError as UserError
    from verl.generate import Answer as Answer
    from verl.generate import TextRollout as TextRollout
    from verl.run import TrainResult as TrainResult

    RewardConfig = RewardTrainerConfig

__version__ = "0.1.0"

_PLACES = {  # public names: module and name there
    "SFTConfig": ("verl.config.sft", "SFTConfig"),
    "PPOConfig": ("verl.config.ppo", "PPOConfig"),
    # The config of `verl.reward`; its class has the longer name because `reward.*` are settings of another kind (verl.config.ppo).
    "RewardConfig": ("verl.config.pairs", "RewardTrainerConfig"),
    "RewardTrainerConfig": ("verl.config.pairs", "RewardTrainerConfig"),
    "EvalConfig": ("verl.config.commands", "EvalConfig"),
    "ExportConfig": ("verl.config.commands", "ExportConfig"),
    "sft": ("verl.api", "sft"),
    "ppo": ("verl.api", "ppo"),
    "reward": ("verl.api", "reward"),
    "evaluate": ("verl.api", "evaluate"),
    "export": ("verl.api", "export"),
    "inspect_data": ("verl.api", "inspect_data"),
    "load_rollout": ("verl.api", "load_rollout"),
    "write_report": ("verl.api", "write_report"),
    "TrainResult": ("verl.run", "TrainResult"),
    "EvalResult": ("verl.api", "EvalResult"),
    "TextRollout": ("verl.generate", "TextRollout"),
    "Answer": ("verl.generate", "Answer"),
    "UserError": ("verl.errors", "UserError"),
    "Stopped": ("verl.errors", "Stopped"),
}
__all__ = sorted(_PLACES)

# Where torchao is installed transformers imports it, and it tells of kernels that it cannot load; so does bitsandbytes. None is used here.
for _name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
    logging.getLogger(_name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", "IProgress not found")  # tqdm's in a notebook without ipywidgets, which nothing here needs


def __getattr__(name: str) -> object:
    """Import what a name stands for when it is first asked for, so that `import verl` loads nothing else."""
    if name not in _PLACES:
        raise AttributeError(f"module 'verl' has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})


_TRAINERS = [f"verl.trainer.{name}" for name in ("fsdp_sft_trainer", "ppo_trainer", "reward_trainer")]


def _begin_trainer() -> None:
    """If this process runs a trainer, handle signals and check its arguments from now on: importing torch takes seconds."""
    words = sys.orig_argv
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""  # the first: a launcher's words have another one
    if sys.argv[:1] == ["-m"] and module.startswith("verl.trainer."):  # as `python -m` looks for the module
        importlib.import_module("verl.signals").own_process()
        importlib.import_module("verl.parent").end_with_launcher()
    if sys.argv[:1] == ["-m"] and module in ("verl.eval.sft_evaluator", *_TRAINERS) and "RANK" not in os.environ:
        importlib.import_module("verl.early").check_module(module, sys.argv[1:])


_begin_trainer()
