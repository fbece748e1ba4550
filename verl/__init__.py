"""verl: post-training of language models, from a file of questions and answers to a Hugging Face directory."""

import importlib
import logging

__version__ = "0.1.0"

# Where torchao is installed transformers imports it, and it tells of kernels that it cannot load; so does bitsandbytes. None is used here.
for _name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
    logging.getLogger(_name).setLevel(logging.ERROR)

_PLACES = {
    "SFTConfig": "verl.config.sft",
    "PPOConfig": "verl.config.ppo",
    "RewardTrainerConfig": "verl.config.pairs",
    "EvalConfig": "verl.config.commands",
    "ChatConfig": "verl.config.commands",
    "ExportConfig": "verl.config.commands",
    "DemoConfig": "verl.config.commands",
}


def __getattr__(name: str) -> object:
    """Import what a name stands for when it is first asked for, so that `import verl` loads nothing else."""
    if name not in _PLACES:
        raise AttributeError(f"module 'verl' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
