"""Models without a packed path: documents run through the model's own code, one at a time, each with fresh states.

Dimensions: T tokens of the batch; L tokens of one document; M trained positions; H hidden size; V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from verl import dist as processes
from verl.data.batch import Batch
from verl.engine.contract import TokenOut
from verl.engine.logprobs import Entropy, LogitRule, scores_of_logits
from verl.models.load import decoder_of


def hidden_states(scorer: nn.Module, model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the last hidden states of each document alone, hidden_TH. Those of filler are 0.

    Args:
        scorer: the model with its heads, the module that may be sharded.
    """
    decoder = decoder_of(model)

    def compute(ids_1L: Tensor) -> Tensor:
        hidden_1LH: Tensor = decoder(input_ids=ids_1L, use_cache=False).last_hidden_state
        return hidden_1LH[0]

    parts = [hidden_LH + _of_root(scorer) for _, hidden_LH in _of_documents(scorer, batch, compute)]
    missing = len(batch.input_ids_T) - sum(map(len, parts))
    return torch.cat([*parts, parts[-1].new_zeros(missing, parts[-1].shape[1])])


def own_scores(scorer: nn.Module, model: PreTrainedModel, batch: Batch, temperature: float, entropy: Entropy) -> TokenOut:
    """Score the batch's trained tokens from the model's own logits."""
    rule, outs = LogitRule(temperature=temperature), []

    def compute(ids_1L: Tensor) -> Tensor:
        logits_1LV: Tensor = model(input_ids=ids_1L, use_cache=False).logits
        return logits_1LV[0]

    for tokens, logits_LV in _of_documents(scorer, batch, compute):
        logits_LV = logits_LV + _of_root(scorer)
        mine_M = batch.trained_M[(batch.trained_M >= tokens.start) & (batch.trained_M < tokens.stop)]
        outs.append(scores_of_logits(logits_LV[mine_M - tokens.start], batch.target_T[mine_M], rule, entropy))
    logprob_M, entropy_M = (torch.cat(parts) for parts in zip(*outs, strict=True))
    return TokenOut(logprob_M, entropy_M if entropy else None)


def _of_documents(scorer: nn.Module, batch: Batch, compute: Callable[[Tensor], Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Yield the tokens of each document, without filler, and what the model computes of it.

    With sharded weights, every forward pass gathers them from all ranks. So each rank takes as many as the rank with the most documents;
    the surplus ones are multiplied by 0, and so are those of a rank without documents, which must still take part in the backward pass.
    """
    bounds = batch.cu_seqlens[: batch.documents + 1].tolist()
    documents = [slice(start, stop) for start, stop in pairwise(bounds)]
    nothing: Tensor | float = 0.0
    for _ in range(_most(scorer, len(documents), batch.input_ids_T.device) - len(documents)):
        nothing = nothing + compute(batch.input_ids_T[None, :1])[:1] * 0.0
    for tokens, real in zip(documents, batch.real_lengths(), strict=False):
        found = compute(batch.input_ids_T[None, tokens][:, :real])  # what some models compute of a text depends on how long it is
        found = F.pad(found, (0, 0, 0, tokens.stop - tokens.start - real))
        yield tokens, found if isinstance(nothing, float) else found + nothing
    if not documents:
        assert isinstance(nothing, Tensor)
        yield slice(0, 1), nothing


def _most(scorer: nn.Module, documents: int, device: torch.device) -> int:
    """Return the number of forward passes of each rank, at least 1."""
    most = max(documents, 1)
    if not isinstance(scorer, FSDPModule) or processes.world_size() == 1:
        return most
    over_ranks = torch.tensor([most], device=device)
    dist.all_reduce(over_ranks, op=dist.ReduceOp.MAX, group=processes.group())
    return int(over_ranks)


# Ranks exchange the gradients of a sharded module in one message, of the weights that have one. Some architectures do not use all weights
# for a short document, and then the messages of two ranks would not match. So every weight gets a gradient, which may be 0.


def use_all_weights(layers: Iterable[nn.Module]) -> None:
    """Let the output of each layer depend on all of its weights, by a term of 0. Call this before the layers are sharded."""
    for layer in layers:
        layer.register_forward_hook(_depend_on_all)


def _depend_on_all(layer: nn.Module, inputs: Any, output: Any) -> Any:
    if not torch.is_grad_enabled():
        return output
    if isinstance(output, tuple):
        return (output[0] + _zero(layer.parameters()).to(output[0].dtype), *output[1:])
    return output + _zero(layer.parameters()).to(output.dtype)


def _of_root(scorer: nn.Module) -> Tensor | float:
    """Return a 0 that depends on the weights outside the sharded layers."""
    if not (isinstance(scorer, FSDPModule) and torch.is_grad_enabled()):
        return 0.0
    inside = {p for part in scorer.modules() if part is not scorer and isinstance(part, FSDPModule) for p in part.parameters()}
    return _zero(p for p in scorer.parameters() if p not in inside)


def _zero(parameters: Iterable[Tensor]) -> Tensor:
    return torch.stack([p.reshape(-1)[:1].sum().float() for p in parameters if p.requires_grad] or [torch.zeros(())]).sum() * 0.0
