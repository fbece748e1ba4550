"""The method of `algorithm.name` for pairs of answers: what it is given, and what it minimizes.

A method is a module of verl/algorithms, or a file of one's own, with

    scorer: "token_logprobs" or "score"       what it learns from: each token's log-probability, or one score for a whole answer
    Loss(settings: Settings)                  an `Algorithm` of verl.engine.contract, over documents that are pairs

and, where it needs them,

    Settings                                  a dataclass: its keys in `algorithm`, see verl.config.own_keys
    needs_reference: bool                     `batch.ref_logprob_M` is there: log-probabilities under the model that the run starts from
    trains: str                               what comes of it, in words, such as "a policy by DPO"
"""

from dataclasses import dataclass
from typing import Literal

from verl.config.own_keys import settings_of
from verl.config.pairs import RewardTrainerConfig
from verl.engine.contract import Algorithm
from verl.errors import UserError

SCORERS = ("token_logprobs", "score")


@dataclass(frozen=True)
class Preference:
    """A method for pairs of answers.

    Attributes:
        loss: what it minimizes.
        scorer: what the engine's scorer gives: token_logprobs of a language model, or score of a reward model.
        needs_reference: whether it reads log-probabilities under the model that the run starts from.
        trains: what comes of it, in words.
    """

    loss: Algorithm
    scorer: Literal["token_logprobs", "score"]
    needs_reference: bool
    trains: str


def load_preference(config: RewardTrainerConfig) -> Preference:
    """The method that the config names.

    Raises:
        UserError: no such method, one for other data, or one that cannot train what the config says.
    """
    name, model = config.algorithm.name, config.model
    module = config.algorithm.plugins.load("algorithm.name", name)
    needs_reference = bool(getattr(module, "needs_reference", False))
    if module.scorer not in SCORERS or (needs_reference and module.scorer == "score"):
        what = f"scorer={module.scorer!r} with needs_reference={needs_reference}"
        raise UserError(what, where=f"algorithm.name={name}", fix=f"give one of {', '.join(SCORERS)}; a reference has token_logprobs")
    if module.scorer == "score" and (model.lora_rank > 0 or model.lora_adapter_path is not None):
        fix = "leave model.lora_rank and model.lora_adapter_path out, or set algorithm.name=dpo"
        key = "model.lora_rank" if model.lora_rank > 0 else "model.lora_adapter_path"
        raise UserError("a reward model is trained whole, without adapters", where=key, fix=fix)
    loss = module.Loss(settings_of(config.algorithm, module))
    return Preference(loss, module.scorer, needs_reference, getattr(module, "trains", f"a model by {name}"))
