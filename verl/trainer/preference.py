"""Loads the method of `algorithm.name` for pairs of answers.

A method is a module of verl/algorithms, or a user's own file, with

    scorer: "token_logprobs" or "score"       input of the loss: a log-probability per token, or one score per answer
    Loss(settings: Settings)                  an `Algorithm` of verl.engine.contract; documents are pairs

and optionally

    Settings                                  a dataclass of its keys in `algorithm`, see verl.config.plugin_settings
    needs_reference: bool                     reads `batch.ref_logprob_M`, log-probabilities under the model that the run starts from
    trains: str                               the trained model, for the log, such as "a policy by DPO"
"""

from dataclasses import dataclass
from typing import Literal

from verl.config.pairs import RewardTrainerConfig
from verl.config.plugin_settings import settings_of
from verl.engine.contract import Algorithm
from verl.errors import UserError

SCORERS = ("token_logprobs", "score")


@dataclass(frozen=True)
class Preference:
    """A method for pairs of answers.

    Attributes:
        loss: the loss to minimize.
        scorer: input of the loss: token_logprobs of a language model, or score of a reward model.
        needs_reference: whether the loss reads log-probabilities under the model that the run starts from.
        trains: the trained model, for the log.
    """

    loss: Algorithm
    scorer: Literal["token_logprobs", "score"]
    needs_reference: bool
    trains: str


def is_for_labels(config: RewardTrainerConfig) -> bool:
    """Return whether the method trains a classifier, see verl.trainer.classifier. Raises UserError: there is no such method."""
    return bool(config.algorithm.plugins.load("algorithm.name", config.algorithm.name).scorer == "labels")


def load_preference(config: RewardTrainerConfig) -> Preference:
    """Load the method that the config names.

    Raises:
        UserError: there is no such method, it is for other data, or it cannot train the configured model.
    """
    name, model = config.algorithm.name, config.model
    module = config.algorithm.plugins.load("algorithm.name", name)
    needs_reference = bool(getattr(module, "needs_reference", False))
    if module.scorer not in SCORERS or (needs_reference and module.scorer == "score"):
        what = f"scorer={module.scorer!r} with needs_reference={needs_reference}"
        fix = f"set scorer to {' or '.join(SCORERS)}; a reference needs token_logprobs"
        raise UserError(what, where=f"algorithm.name={name}", fix=fix)
    if module.scorer == "score" and (model.lora_rank > 0 or model.lora_adapter_path is not None):
        fix = "leave model.lora_rank and model.lora_adapter_path out, or set algorithm.name=dpo"
        key = "model.lora_rank" if model.lora_rank > 0 else "model.lora_adapter_path"
        raise UserError("a reward model is trained whole, without adapters", where=key, fix=fix)
    loss = module.Loss(settings_of(config.algorithm, module))
    return Preference(loss, module.scorer, needs_reference, getattr(module, "trains", f"a model by {name}"))
