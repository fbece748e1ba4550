"""What an engine trains: a model that reads packed batches. And the heads that give a number in place of a distribution.

A critic is saved as a token classification model with one label, a reward model as a sequence classification model with one
label: `AutoModelForTokenClassification` and `AutoModelForSequenceClassification` load them.

Dimensions: T tokens of the packed batch, or of this process's part; M trained positions; S documents; H hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification, PreTrainedModel

from verl.data.batch import Batch
from verl.errors import UserError
from verl.models.attention import PACKED, USE_ANOTHER, packed_kwargs
from verl.models.context import sum_over_parts
from verl.models.load import Loaded, cannot_load, find_saved_dtypes, resolve, restore_stated_dtype
from verl.models.shards import load_without_values

# The derivative of what is minimized by each trained position's log-probability, slope_M in float32, where it is known before the
# model has run; or a function that gives that of some of them, from their log-probabilities and where they stand among all.
Slope: TypeAlias = Tensor | Callable[[Tensor, slice], Tensor]

SAME = 1e-3  # hidden states in float32 that differ by less, relative to the largest, are the same


class Scorer(nn.Module):
    """A model of the Hugging Face ecosystem that is called with packed batches."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, slope: Slope | None = None) -> Any:
        """What the model says of a batch; for `slope` see `verl.engine.engine.Algorithm`."""
        raise NotImplementedError

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states, hidden_TH."""
        hidden_1TH: Tensor = self.model.get_decoder()(
            input_ids=batch.input_ids_T[None],
            position_ids=batch.position_ids_T[None],
            attention_mask=None,
            use_cache=False,
            **packed_kwargs(batch),
        ).last_hidden_state
        return hidden_1TH[0]


@dataclass
class ValueOut:
    """What a critic says: `value_M`, float32, the reward that it expects before the token of that position is drawn."""

    value_M: Tensor


class ValueScorer(Scorer):
    """A critic: a value for each trained token."""

    def forward(self, batch: Batch, slope: Slope | None = None) -> ValueOut:
        hidden_MH = self.hidden(batch).index_select(0, batch.trained_M)
        return ValueOut(_apply_head(self.model, hidden_MH))


@dataclass
class ScoreOut:
    """What a reward model says: `score_S`, float32, one for each document, filler left out."""

    score_S: Tensor


class RewardScorer(Scorer):
    """A reward model: a score for each document, at its last token. Documents must not be padded."""

    def forward(self, batch: Batch, slope: Slope | None = None) -> ScoreOut:
        hidden_TH = self.hidden(batch)
        last_S = batch.cu_seqlens[1 : batch.documents + 1].long() - 1 - batch.first_token
        hidden_SH = hidden_TH.index_select(0, last_S.clamp(0, len(hidden_TH) - 1))
        score_S = _apply_head(self.model, hidden_SH)
        is_here_S = (last_S >= 0) & (last_S < len(hidden_TH))
        return ScoreOut(sum_over_parts(torch.where(is_here_S, score_S, 0.0), batch.parts))


def load_critic(
    path: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    values: bool = True,
) -> Loaded:
    """A critic for a ValueScorer, from one that was saved, or from a causal language model with a head of zeros.

    Args:
        values: whether to read them; without, the model is for sharding, where its files have what `load_without_values` needs.
    Raises:
        UserError: no such model, or an architecture without token classification.
    """
    return _load(AutoModelForTokenClassification, path, device, dtype, trust_remote_code, values)


def load_reward_model(
    path: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    values: bool = True,
) -> Loaded:
    """A reward model for a RewardScorer, from one that was saved, or from a causal language model with a head of zeros.

    With `trust_remote_code` it may be any model whose code gives it a module `score` from hidden states to one number.

    Args:
        values: as for `load_critic`.
    Raises:
        UserError: no such model, or not one that gives one number.
    """
    return _load(AutoModelForSequenceClassification, path, device, dtype, trust_remote_code, values)


@torch.no_grad()
def check_hidden(scorer: Scorer, *, where: str) -> None:
    """Compare last hidden states of two short packed documents with the architecture's own eager ones, each document alone.

    It shows for any architecture that its attention keeps documents apart. The weights must be float32 and not yet sharded.

    Raises:
        UserError: they differ.
    """
    from verl.data.pack import collate  # numpy arrays to a Batch, as in training

    model = scorer.model
    training, packed_attention = model.training, model.config._attn_implementation
    model.eval()
    documents = probe_documents(model.config.get_text_config().vocab_size)
    found_TH = scorer.hidden(collate(documents, range(len(documents))).to(model.device))
    model.set_attn_implementation("eager")
    ids = [torch.from_numpy(ids).long().to(model.device) for ids, _ in documents]
    expected_TH = torch.cat([model.get_decoder()(input_ids=ids_T[None], use_cache=False).last_hidden_state[0] for ids_T in ids])
    model.set_attn_implementation(packed_attention)
    model.train(training)
    difference = ((found_TH - expected_TH).abs().max() / expected_TH.abs().max()).item()
    if not difference < SAME:
        what = f"{type(model).__name__} in packed batches differs from the same model alone by {difference:.2g} of its hidden states"
        raise UserError(what, where=where, fix=USE_ANOTHER)


def probe_documents(vocabulary: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Two short documents of different tokens, all trained."""
    return [(np.arange(7, 7 + 31 * n, 31, dtype=np.int32) % vocabulary, np.ones(n, dtype=bool)) for n in (5, 3)]


def has_head(path: str, *, trust_remote_code: bool = False) -> bool:
    """Whether a model on disk is more than a language model.

    Raises:
        UserError: no such model.
    """
    architectures = _config(path, trust_remote_code).architectures or ["ForCausalLM"]
    return not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)


def _load(kind: Any, path: str, device: torch.device | str, dtype: torch.dtype, trust_remote_code: bool, values: bool) -> Loaded:
    source, config = resolve(path), _config(path, trust_remote_code)
    if type(config) not in kind._model_mapping:
        if not (trust_remote_code and "AutoModel" in getattr(config, "auto_map", {})):
            fix = "choose a model such as Qwen2, Qwen3, Llama or Mistral"
            raise UserError(f"transformers has no {config.model_type} with a head for this", where=path, fix=fix)
        kind = AutoModel
    if any(name.endswith("Classification") for name in config.architectures or []) and config.num_labels != 1:
        raise UserError(f"gives {config.num_labels} numbers, not one", where=path, fix="give a model with one label, or a language model")
    if not values and kind is not AutoModel:
        loaded = load_without_values(path, dtype=dtype, trust_remote_code=trust_remote_code, kind=kind, head=_head)
        if loaded is not None:
            _leave_out_dropout(loaded.model)
            return loaded
    options = {} if kind is AutoModel else {"num_labels": 1}
    try:
        model, report = kind.from_pretrained(
            source,
            dtype=dtype,
            device_map=str(device),
            trust_remote_code=trust_remote_code,
            attn_implementation=PACKED,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise cannot_load("model", path, error) from error
    _leave_out_dropout(model)
    _start_at_zero(model, set(report["missing_keys"]), path)
    saved_dtypes = find_saved_dtypes(model, source)
    restore_stated_dtype(model, path, saved_dtypes, trust_remote_code=trust_remote_code)
    return Loaded(model, saved_dtypes)


def _leave_out_dropout(model: PreTrainedModel) -> None:
    """Of the head, which is called without it."""
    if hasattr(model, "dropout"):
        model.dropout = nn.Identity()


def _config(path: str, trust_remote_code: bool) -> Any:
    try:
        return AutoConfig.from_pretrained(resolve(path), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise cannot_load("model", path, error) from error


def _start_at_zero(model: PreTrainedModel, missing: set[str], path: str) -> None:
    """A head that the file lacks says 0 of everything, so that the first advantages are the rewards themselves."""
    head = {id(parameter) for parameter in _head(model).parameters()}
    for name, parameter in model.named_parameters():
        if name not in missing:
            continue
        if id(parameter) not in head:
            raise UserError(f"lacks {name}", where=path, fix="give a complete model directory")
        nn.init.zeros_(parameter)


def _apply_head(model: PreTrainedModel, hidden_MH: Tensor) -> Tensor:
    """A number for each row. In float32 where the head is one layer: bfloat16 would tell only every 256th of a value apart."""
    head = _head(model)
    if isinstance(head, nn.Linear):
        return F.linear(hidden_MH.float(), head.weight.float(), None if head.bias is None else head.bias.float()).squeeze(-1)
    number_M1: Tensor = head(hidden_MH)
    return number_M1.float().squeeze(-1)


def _head(model: PreTrainedModel) -> nn.Module:
    for name in ("score", "classifier"):
        if isinstance(head := getattr(model, name, None), nn.Module):
            return head
    raise UserError(f"{type(model).__name__} has no module `score`", fix="choose a model such as Qwen2, Qwen3, Llama or Mistral")
