"""Loads the method of `algorithm.name` for answers that are compared, or good or bad.

A method is a module of verl/algorithms, or a user's own file, with

    scorer: "token_logprobs" or "score"       input of the loss: a log-probability per token, or one score per answer
    Loss(settings: Settings)                  an `Algorithm` of verl.engine.contract; documents are pairs, or single answers

and optionally

    Settings                                  a dataclass of its keys in `algorithm`, see verl.config.plugin_settings
    reads: str                                "pairs" (the default): document 2k is a chosen answer, 2k + 1 the rejected one; "margins": so,
                                              and with `data.margin_key` batches are a `verl.data.numbered.NumberedBatch` with the margins;
                                              "labels": each document is an answer, whose number is 1 if it is good and 0 if it is bad
    needs_reference: bool                     reads `batch.ref_logprob_M`, log-probabilities under the model that the run starts from
    trains: str                               the trained model, for the log, such as "a policy by DPO"
    of_margins: list of str                   keys of Settings that only weigh the margins of rows
    measures: str                             names of the loss's metrics with spaces between, to notice a wrong `trainer.best_metric` early

A `Loss` for labels may also have

    estimate(out, batch) -> Tensor            a sum over questions with an answer to another one. Its mean over the rows of a step, on all
                                              ranks, is in `batch.estimate` of all micro-batches of the step
    notes(number_R) -> list[str]              what to say about the training rows
"""

from dataclasses import dataclass
from typing import Any, Literal

from verl.config.pairs import RewardTrainerConfig
from verl.config.plugin_settings import settings_of
from verl.data.preferences import READS, Reads
from verl.errors import UserError

SCORERS = ("token_logprobs", "score")


@dataclass(frozen=True)
class Preference:
    """A method.

    Attributes:
        loss: the loss to minimize, an `Algorithm` of verl.engine.contract.
        scorer: input of the loss: token_logprobs of a language model, or score of a reward model.
        reads: what its rows are.
        needs_reference: whether the loss reads log-probabilities under the model that the run starts from.
        trains: the trained model, for the log.
    """

    loss: Any
    scorer: Literal["token_logprobs", "score"]
    reads: Reads
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
    reads: Any = getattr(module, "reads", "pairs")
    if module.scorer not in SCORERS or (needs_reference and module.scorer == "score"):
        what = f"scorer={module.scorer!r} with needs_reference={needs_reference}"
        fix = f"set scorer to {' or '.join(SCORERS)}; a reference needs token_logprobs"
        raise UserError(what, where=f"algorithm.name={name}", fix=fix)
    if reads not in READS:
        raise UserError(f"reads={reads!r}", where=f"algorithm.name={name}", fix=f"set reads to {', '.join(READS)}")
    if module.scorer == "score" and (model.lora_rank > 0 or model.lora_adapter_path is not None):
        fix = "leave model.lora_rank and model.lora_adapter_path out, or set algorithm.name=dpo"
        key = "model.lora_rank" if model.lora_rank > 0 else "model.lora_adapter_path"
        raise UserError("a reward model is trained whole, without adapters", where=key, fix=fix)
    _check_reference(config, needs_reference)
    settings = settings_of(config.algorithm, module)
    for key in getattr(module, "of_margins", ()) if config.data.margin_key is None else ():
        if getattr(settings, key) != getattr(module.Settings(), key):
            fix = "set data.margin_key to the column of the margins, or remove this key"
            raise UserError("has no effect without data.margin_key", where=f"algorithm.{key}", fix=fix)
    loss = module.Loss(settings)
    return Preference(loss, module.scorer, reads, needs_reference, getattr(module, "trains", f"a model by {name}"))


def _check_reference(config: RewardTrainerConfig, needs_reference: bool) -> None:
    """Raises UserError: the reference cannot be computed as `algorithm.reference` says."""
    asked, place = config.algorithm.reference, f"algorithm.reference={config.algorithm.reference}"
    if asked != "auto" and not needs_reference:
        raise UserError(f"{config.algorithm.name} has no reference", where=place, fix="leave it out")
    if asked == "adapter_off" and not has_new_adapter(config):
        what = "only the model of a new adapter is the reference where its adapter is switched off"
        raise UserError(what, where=place, fix="set model.lora_rank without model.lora_adapter_path and trainable_tokens, or leave it out")


def has_new_adapter(config: RewardTrainerConfig) -> bool:
    """Return whether the model without its adapter is the model that the run starts from."""
    model = config.model
    return model.lora_rank > 0 and model.lora_adapter_path is None and model.trainable_tokens is None
