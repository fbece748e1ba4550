"""Build the engines of critics, reward models and classifiers, which have a head of their own."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from verl.config.shared import ModelConfig, OptimConfig
from verl.data.labels import Labels
from verl.engine.build import Built, cast_weights, loading_device, make_engine, prepare_layers, prepare_process
from verl.engine.decisions import Decisions
from verl.engine.engine import Engine
from verl.engine.router_loss import find_router_loss
from verl.engine.trial import check_hidden
from verl.engine.value_scorers import LabelScorer, RewardScorer, ValueScorer
from verl.models.heads import load_critic, load_reward_model
from verl.models.load import Loaded, check_vocabulary
from verl.models.saved import cast, export_model, gather, write_model
from verl.models.shards import small_twin


@dataclass(frozen=True)
class Critic:
    """An engine with a value head, with everything needed to save its model as a Hugging Face directory."""

    engine: Engine
    loaded: Loaded

    def export(self, directory: Path) -> None:
        """Write a token classification model with one label. Every rank calls it."""
        directory.mkdir(exist_ok=True)
        with self.engine.weights.in_model():
            export_model(directory, self.loaded.model, self.loaded.saved_dtypes)

    def gathered(self, copies: dict[str, torch.Tensor]) -> Callable[[Path], None]:
        """Prepare `export`, as `Built.gathered` does."""
        trained, dtypes = self.engine.weights.trained, self.loaded.saved_dtypes
        with self.engine.weights.in_model():
            weights = gather(self.loaded.model, dtypes, copies={id(trained[name]): copy for name, copy in copies.items()})

        def write(directory: Path) -> None:
            directory.mkdir(exist_ok=True)
            write_model(directory, self.loaded.model, cast(weights, dtypes), dtypes)

        return write


def build_critic(settings: ModelConfig, optim: OptimConfig, path: str, actor: Built, decisions: Decisions, *, seed: int) -> Critic:
    """Build a critic: a model with a value head, fully trained, and distributed like the actor.

    Args:
        settings: model settings of the actor; its adapter is not applied to the critic.
        path: path of a critic, or of a causal language model, which gets a head of zeros.
        decisions: result of `decide` for the critic.
    Raises:
        UserError: no such model, it cannot have the head or be trained on packed batches, or it lacks tokens of the actor.
    """
    torch.manual_seed(seed)
    home, values = loading_device(decisions), not decisions.is_sharded
    forward = decisions.path
    loaded = load_critic(path, device=home, trust_remote_code=settings.trust_remote_code, values=values, attention=forward.attention)
    check_vocabulary(loaded.model, actor.tokenizer, path)
    check_hidden(ValueScorer(_model_to_check(loaded, decisions), forward), where=path)
    cast_weights(loaded.model, decisions.param_dtype)
    prepare_layers(loaded.model, decisions)
    return Critic(make_engine(ValueScorer(loaded.model, forward), optim, loaded, decisions), loaded)


def build_reward_model(
    settings: ModelConfig,
    optim: OptimConfig,
    tokenizer: PreTrainedTokenizerBase,
    decisions: Decisions,
    *,
    stop_ids: list[int],
    padding: int | None,
    seed: int,
    labels: Labels | None = None,
) -> Built:
    """Build a reward model, which gives one score per document, or a classifier. All of its weights are trained.

    Args:
        settings: model settings; `partial_pretrain` is such a model, or a causal language model, which gets a head of zeros.
        decisions: result of `decide` for this model.
        padding: `pad_token_id` of the saved model, which transformers' class needs for batches of several documents; None: no padding.
        stop_ids: same as in `build`.
        labels: the labels of a classifier; None: a reward model.
    Raises:
        UserError: no such model, or it cannot have the head.
    """
    prepare_process(decisions, seed)
    path, forward = settings.partial_pretrain, decisions.path
    options: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code, "attention": forward.attention}
    options |= {"device": loading_device(decisions), "values": not decisions.is_sharded}
    loaded = load_reward_model(path, labels=1 if labels is None else len(labels.names), **options)
    check_vocabulary(loaded.model, tokenizer, path)
    check_hidden(RewardScorer(_model_to_check(loaded, decisions), forward), where=path)
    loaded.model.config.pad_token_id = padding
    if labels is not None:
        labels.write(loaded.model.config)
    cast_weights(loaded.model, decisions.param_dtype)
    compiler = prepare_layers(loaded.model, decisions, liger=settings.use_liger)
    scorer = RewardScorer if labels is None else LabelScorer
    engine = make_engine(scorer(loaded.model, forward), optim, loaded, decisions)
    _, notes = find_router_loss(loaded.model, settings.router_aux_loss_coef)
    return Built(engine, decisions, compiler, loaded, None, tokenizer, stop_ids, None, notes)


def _model_to_check(loaded: Loaded, decisions: Decisions) -> PreTrainedModel:
    """Return the model to check against eager attention: itself, or a small twin if it is on the meta device."""
    return loaded.model if loaded.fill is None else small_twin(loaded.model, decisions.device, decisions.path.attention)
