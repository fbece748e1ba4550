"""Reference models: frozen engines that compute the log-probabilities of the actor's training tokens."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from verl.config.shared import ModelConfig
from verl.data.batch import Batch
from verl.engine.build import Built, make_engine
from verl.engine.decisions import Decisions
from verl.engine.engine import Engine
from verl.engine.outline import Outline
from verl.engine.scorers import TokenScorer
from verl.errors import UserError
from verl.models.attention.packed import ForwardPath
from verl.models.load import Loaded, check_vocabulary, load_for_training, load_tokenizer
from verl.models.shards import load_without_values


class AdapterOffReference:
    """Reference of an actor with a new adapter: the actor itself, with the adapter disabled while it scores."""

    def __init__(self, actor: Built):
        assert actor.adapted is not None
        self._adapted, self._engine = actor.adapted, actor.engine

    def score(self, micro_batches: Iterable[Batch]) -> list[Any]:
        """Same as `Engine.score`."""
        scorer: Any = self._engine.scorer
        entropy, scorer.entropy = scorer.entropy, False
        try:
            with self._adapted.disable_adapter():
                # disable_adapter also freezes the adapters, and FSDP2's first forward pass would then treat them as frozen.
                for parameter in self._engine.trained:
                    parameter.requires_grad = True
                return self._engine.score(micro_batches)
        finally:
            scorer.entropy = entropy


def build_reference(settings: ModelConfig, actor: Built, path: str | None = None) -> Engine | AdapterOffReference:
    """Build a frozen model in the compute dtype, distributed like the actor. It scores with the actor's temperature.

    Args:
        settings: model settings of the actor.
        path: path of another model with the actor's vocabulary; None: the model that the actor starts from.
    Raises:
        UserError: no such model, or it has another vocabulary.
    """
    adapter = settings.lora_adapter_path if path is None else None
    if path is None and actor.adapted is not None and adapter is None and settings.trainable_tokens is None:
        return AdapterOffReference(actor)
    if path is not None:
        _check_same_tokens(actor.tokenizer, path, trust_remote_code=settings.trust_remote_code)
    decisions = replace(actor.decisions, graph_tokens=0)  # it has no backward pass
    source = path or settings.partial_pretrain
    forward = decisions.path if path is None else Outline(replace(settings, partial_pretrain=path)).path
    loaded = load_frozen(source, adapter, decisions, forward, trust_remote_code=settings.trust_remote_code)
    check_vocabulary(loaded.model, actor.tokenizer, source)
    temperature = getattr(actor.engine.scorer, "temperature", 1.0)
    return make_engine(TokenScorer(loaded.model, temperature, path=forward), None, loaded, decisions)


def load_frozen(source: str, adapter: str | None, decisions: Decisions, forward: ForwardPath, *, trust_remote_code: bool) -> Loaded:
    """Load a model in the compute dtype, with the adapter of a directory merged into it.

    Args:
        decisions: those of the trained model, by which this one is distributed.
        forward: how this one computes a batch.
    Raises:
        UserError: no such model, or the adapter does not fit it.
    """
    dtype, loaded = decisions.compute_dtype, None
    if decisions.is_sharded and adapter is None:
        loaded = load_without_values(source, dtype=dtype, trust_remote_code=trust_remote_code, attention=forward.attention)
    if loaded is None:
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "attention": forward.attention}
        loaded = load_for_training(source, device=decisions.device, dtype=dtype, **options)
    if adapter is not None:
        from verl.models.adapters.files import attach

        attach(loaded.model, adapter).merge_and_unload()
    return loaded


def _check_same_tokens(tokenizer: PreTrainedTokenizerBase, path: str, *, trust_remote_code: bool) -> None:
    """Raise UserError if a token of the actor has another id, or none, in the tokenizer of the model at `path`."""
    mine, theirs = tokenizer.get_vocab(), load_tokenizer(path, trust_remote_code=trust_remote_code).get_vocab()
    odd = [token for token, number in mine.items() if theirs.get(token) != number]
    if odd:
        found = theirs.get(odd[0], "no token")
        raise UserError(
            f"{len(odd):,} of the actor's tokens have other ids in this model: {odd[0]!r} is {mine[odd[0]]} for the actor and {found} here",
            where=path,
            fix="choose a model of the actor's family, with the same tokenizer",
        )
