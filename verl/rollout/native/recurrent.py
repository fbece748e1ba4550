"""State that linear attention and short convolutions carry from token to token, in slots.

The functions of `verl.models.attention.delta_rule` give their inputs to the `SlotState` of their layer. Prefill computes packed prompts,
and stores the last inputs of the convolution and the last state of the rule in the slots of each prompt. In a decode step, the newest
token of each sequence continues from the state in its slot. It is changed in place, so that a CUDA graph finds it at its address.

Dimensions: S slots, B slots in use, T packed tokens, D prompts, P slots that get a prompt; C channels and W width of a convolution,
X = W - 1.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from verl.models.attention.delta_rule import own_code
from verl.rollout.native.attention import DecodeBatch, PrefillBatch, ShapeProbe, StateCache, StateShape


class SlotState(NamedTuple):
    """What a layer carries, for one forward pass; see `verl.models.attention.delta_rule.CarriedState`."""

    cache: StateCache | ShapeProbe
    batch: PrefillBatch | DecodeBatch

    def convolve(
        self,
        function: Callable[..., Tensor],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **_: Any,
    ) -> Tensor:
        """Compute a causal depthwise convolution with weight_CW and bias_C of hidden_1CT (prefill) or hidden_BC1 (decode)."""
        if isinstance(self.batch, PrefillBatch):
            last_DCX = _last_inputs(hidden[0], self.batch.cu_seqlens, weight.shape[1] - 1)
            _store(self.cache, "convolution", last_DCX, self.batch)
            return function(hidden, weight, bias, activation, cu_seq_lens_q=self.batch.cu_seqlens)
        assert isinstance(self.cache, StateCache) and self.cache.convolution is not None
        earlier_BCX = self.cache.convolution[: len(hidden)]
        input_BCW = torch.cat([earlier_BCX, hidden], dim=2)
        earlier_BCX.copy_(input_BCW[:, :, 1:])
        precise = torch.promote_types(hidden.dtype, torch.float32)
        output_BC = (input_BCW.to(precise) * weight).sum(2).to(weight.dtype)
        if bias is not None:
            output_BC = output_BC + bias
        if activation is not None:
            output_BC = ACT2FN[activation](output_BC)
        return output_BC[:, :, None].to(hidden.dtype)

    def compute(self, module: str, name: str, inputs: Sequence[Tensor], **options: Any) -> tuple[Tensor, None]:
        """Compute the rule of this name in a module of transformers, of query, key, value, decay and beta."""
        options = {key: value for key, value in options.items() if key not in ("slot_cache", "slot_batch")}
        options |= {"initial_state": None, "output_final_state": True}
        query, key, value, g, beta = inputs
        functions = vars(sys.modules[module])
        if isinstance(self.batch, PrefillBatch):
            output, state_D = functions[name](query, key, value, g=g, beta=beta, cu_seqlens=self.batch.cu_seqlens, **options)
            _store(self.cache, "rule", state_D, self.batch)
            return output, None
        assert isinstance(self.cache, StateCache) and self.cache.rule is not None
        state_B = self.cache.rule[: len(query)]
        # Kernels are tried for packed documents; a single token of each sequence is computed by the model's own code.
        step = own_code(functions.get(name.replace("chunk", "recurrent"), functions[name]).replaced)
        output, new_state_B = step(query, key, value, g=g, beta=beta, **(options | {"initial_state": state_B}))
        state_B.copy_(new_state_B)
        return output, None


def _store(cache: StateCache | ShapeProbe, name: str, state_D: Tensor, batch: PrefillBatch) -> None:
    if isinstance(cache, ShapeProbe):
        cache.states.append((name, StateShape(tuple(state_D.shape[1:]), state_D.dtype)))
        return
    own: Tensor | None = getattr(cache, name)
    assert own is not None
    own[batch.slot_P] = state_D[batch.prompt_P].to(own.dtype)


def _last_inputs(hidden_CT: Tensor, bounds: Tensor, number: int) -> Tensor:
    """Return the last inputs of each document, DC and `number`; 0 where it is shorter."""
    token_DX = bounds[1:, None] - number + torch.arange(number, device=bounds.device)
    inputs_CDX = hidden_CT[:, token_DX.clamp(min=0)]
    return torch.where(token_DX >= bounds[:-1, None], inputs_CDX, 0).transpose(0, 1)
