"""Models on packed batches: log-probabilities of tokens, values of a critic, scores of a reward model.

Dimensions: T tokens of the packed batch, or of this rank's slice; M trained positions; S documents; H hidden size; V vocabulary;
R rank of an adapter.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from verl.data.batch import Batch
from verl.engine.contract import Slope, TokenOut
from verl.engine.logprobs import Entropy, LogitRule, token_scores
from verl.models.attention.packed import PACKED_PATH, ForwardPath, packed_kwargs
from verl.models.load import decoder_of

if TYPE_CHECKING:
    from verl.models.rope import LengthRope

FIXED = ("default", "linear", "llama3", "yarn")  # rotary embeddings whose frequencies do not depend on the length of a document


class Scorer(nn.Module):
    """A transformers model that takes packed batches.

    The scorers' `forward(batch, slope)` returns the model's outputs for a batch; for `slope` see `verl.engine.contract.Algorithm`.

    Attributes:
        path: how the model computes a batch; the model is loaded with its attention.
        rope: rotary embeddings whose frequencies depend on the length of a document (`verl.models.rope`); None if they do not.
    """

    def __init__(self, model: PreTrainedModel, path: ForwardPath = PACKED_PATH):
        super().__init__()
        self.model, self.path = model, path
        self.rope = _length_rope(model)

    def hidden(self, batch: Batch) -> Tensor:
        """Return the last hidden states, hidden_TH."""
        if not self.path.packed:
            from verl.engine.one_by_one import hidden_states  # few architectures need it

            return hidden_states(self, self.model, batch)
        with nullcontext() if self.rope is None else self.rope.documents(batch):
            return self._packed(batch)

    def _packed(self, batch: Batch) -> Tensor:
        hidden_1TH: Tensor = decoder_of(self.model)(
            input_ids=batch.input_ids_T[None],
            position_ids=batch.position_ids_T[None],
            attention_mask=None,
            use_cache=False,
            **packed_kwargs(batch),
        ).last_hidden_state
        return hidden_1TH[0]


def _length_rope(model: PreTrainedModel) -> "LengthRope | None":
    if all(getattr(module, "rope_type", "default") in FIXED for module in model.modules()):
        return None
    from verl.models.rope import length_rope  # few models have it

    return length_rope(model)


class TokenScorer(Scorer):
    """A causal language model that computes the log-probabilities of given tokens (`TokenOut`) on packed batches.

    The model and its output layer are one module, so that FSDP gathers the output embedding, which may be tied to the input embedding,
    exactly while it is used.

    Attributes:
        temperature: divisor of the logits, the same as in sampling.
        entropy: True to compute the entropy, "gradient" to compute it with a gradient for a loss with an entropy term.
        teacher: `verl.engine.teachers.Teacher.scores` of a model from which this one learns; None: no teacher.
    """

    def __init__(self, model: PreTrainedModel, temperature: float = 1.0, entropy: Entropy = False, path: ForwardPath = PACKED_PATH):
        super().__init__(model, path)
        self.rule = LogitRule.of(model.config)
        self.temperature, self.entropy = temperature, entropy
        self.teacher: Callable[..., TokenOut] | None = None

    def forward(self, batch: Batch, slope: Slope | None = None) -> TokenOut:
        """Score the batch's trained tokens; for `slope` see `token_scores`."""
        if self.path.own_logits:
            from verl.engine.one_by_one import own_scores  # as above

            return own_scores(self, self.model, batch, self.temperature, self.entropy)
        hidden_TH = self.hidden(batch)
        # Not `hidden_TH[trained_M]`, whose backward pass sorts to sum duplicates: positions are unique.
        hidden_MH, target_M = hidden_TH.index_select(0, batch.trained_M), batch.target_T[batch.trained_M]
        hidden_MH, weight_VH, bias_V = _output_layer(self.model.get_output_embeddings(), hidden_MH)
        rule = replace(self.rule, temperature=self.temperature)
        if self.teacher is not None:
            return self.teacher(batch, (hidden_MH, weight_VH, bias_V, rule), target_M, slope, bool(self.entropy))
        return token_scores(hidden_MH, weight_VH, bias_V, target_M, rule, slope, self.entropy)


def _output_layer(head: Any, hidden_MH: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the hidden states, weight and bias of the output layer's matmul.

    An adapter of rank R on the layer extends hidden states and weight by R columns, so that both matmuls are one, and the adapter's
    contribution is not lost in rounding, as it would be in a sum with the weight.
    """
    weight_VH, bias_V = head.weight, getattr(head, "bias", None)
    for name in getattr(head, "lora_A", ()):
        product_MR = head.lora_A[name](head.lora_dropout[name](hidden_MH)) * head.scaling[name]
        hidden_MH, weight_VH = torch.cat([hidden_MH, product_MR], 1), torch.cat([weight_VH, head.lora_B[name].weight], 1)
    return hidden_MH, weight_VH, bias_V
