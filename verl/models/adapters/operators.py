"""Linear layers with LoRA adapters as fused operators, so that an adapter costs little more than its own small matmuls.

A plain implementation of `x Wᵀ + s (x Aᵀ) Bᵀ` reads and writes the layer's output once more for the sum, and its backward pass does the
same with the gradient of the input. These passes over memory take longer than the adapter's arithmetic. Here, the small matmul is fused
into the large one wherever that saves a pass: either their factors are concatenated (`x Wᵀ + h Bᵀ` is one matmul over the columns of
[x h]), or the matmul accumulates into its output. Layers with the same input share work, and the MLP is one operator. Frozen weights get no
gradients.

The operators are opaque to torch.compile, like attention. `use_operators` installs them in peft's modules.

Dimensions: T tokens, I inputs, O outputs, R rank, F intermediate size of the MLP.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from verl.dist import HAS_TRITON

# --- linear layers with the same input: one, or query, key and value


@torch.library.custom_op("verl::adapted_linears", mutates_args=())
def _linears(
    x_TI: Tensor, weights_OI: Sequence[Tensor], biases_O: Sequence[Tensor], a_RI: Sequence[Tensor], b_OR: Sequence[Tensor], scale: float
) -> list[Tensor]:
    """Return the outputs of the layers and, as the last tensor, scale * x Aᵀ of all adapters, concatenated, for the backward pass.

    Args:
        biases_O: biases of the layers; empty if the layers have none.
    """
    hidden_TR = _product(x_TI, torch.cat(list(a_RI)).T, scale)
    hiddens_TR = hidden_TR.split([len(a) for a in a_RI], dim=1)
    outputs = []
    for number, (weight_OI, h_TR, b) in enumerate(zip(weights_OI, hiddens_TR, b_OR, strict=True)):
        bias_O = biases_O[number] if biases_O else None
        if weight_OI.shape[0] > weight_OI.shape[1]:  # the input is the smaller side
            outputs.append(F.linear(torch.cat([x_TI, h_TR], 1), torch.cat([weight_OI, b], 1), bias_O))
        else:
            outputs.append(F.linear(x_TI, weight_OI, bias_O).addmm_(h_TR, b.T))
    return [*outputs, hidden_TR]


@torch.library.custom_op("verl::adapted_linears_backward", mutates_args=())
def _linears_backward(
    gradients_TO: Sequence[Tensor],
    x_TI: Tensor,
    hidden_TR: Tensor,
    weights_OI: Sequence[Tensor],
    a_RI: Sequence[Tensor],
    b_OR: Sequence[Tensor],
    scale: float,
) -> list[Tensor]:
    """Return the gradients with respect to x, each A and each B."""
    ranks = [len(a) for a in a_RI]
    hidden_gradient_TR = torch.cat([_product(gradient, b, scale) for gradient, b in zip(gradients_TO, b_OR, strict=True)], 1)
    if sum(len(weight) for weight in weights_OI) <= 2 * x_TI.shape[1]:  # concatenating the gradients costs less than accumulating
        x_gradient_TI = torch.cat([*gradients_TO, hidden_gradient_TR], 1) @ torch.cat([*weights_OI, *a_RI])
    else:
        x_gradient_TI = hidden_gradient_TR @ torch.cat(list(a_RI))
        for gradient, weight in zip(gradients_TO, weights_OI, strict=True):
            x_gradient_TI.addmm_(gradient, weight)
    a_gradients = [part.clone() for part in (hidden_gradient_TR.T @ x_TI).split(ranks)]
    b_gradients = [gradient.T @ h for gradient, h in zip(gradients_TO, hidden_TR.split(ranks, dim=1), strict=True)]
    return [x_gradient_TI, *a_gradients, *b_gradients]


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Compute scale * left @ right in one pass."""
    out = left.new_empty(left.shape[0], right.shape[1])
    return torch.addmm(out, left, right, beta=0, alpha=scale, out=out)


def _linears_shapes(x_TI: Tensor, weights_OI: Sequence[Tensor], biases: Any, a_RI: Sequence[Tensor], *others: Any) -> list[Tensor]:
    return [x_TI.new_empty(x_TI.shape[0], n) for n in (*(len(weight) for weight in weights_OI), sum(len(a) for a in a_RI))]


def _linears_backward_shapes(
    gradients: Any, x_TI: Tensor, hidden: Any, weights: Any, a_RI: Sequence[Tensor], b_OR: Sequence[Tensor], scale: float
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (x_TI, *a_RI, *b_OR)]


def _keep_for_linears(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x_TI, weights, biases, a, b, ctx.scale = inputs
    ctx.layers, ctx.biases = len(weights), len(biases)
    ctx.save_for_backward(x_TI, output[-1], *weights, *a, *b)


def _linears_gradients(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    x_TI, hidden_TR, *rest = ctx.saved_tensors
    n = ctx.layers
    found = _linears_backward([g.contiguous() for g in gradients[:n]], x_TI, hidden_TR, rest[:n], rest[n : 2 * n], rest[2 * n :], ctx.scale)
    return found[0], [None] * n, [None] * ctx.biases, found[1 : n + 1], found[n + 1 :], None


_linears.register_fake(_linears_shapes)
_linears_backward.register_fake(_linears_backward_shapes)
_linears.register_autograd(_linears_gradients, setup_context=_keep_for_linears)


# --- the MLP: down(silu(gate(x)) * up(x))


@torch.library.custom_op("verl::adapted_mlp", mutates_args=())
def _mlp(
    x_TI: Tensor, gate_FI: Tensor, up_FI: Tensor, down_IF: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], scale: float
) -> list[Tensor]:
    """Return the output and four tensors for the backward pass.

    These are gate_TF, up_TF, scale * x Aᵀ of the adapters of gate and up, concatenated, and scale * p Aᵀ of the adapter of down, where
    p = silu(gate) * up.

    Args:
        a, b: A and B of the adapters of gate, up and down.
    """
    gate_rank, inputs = len(a[0]), x_TI.shape[1]
    hidden_TR = _product(x_TI, torch.cat([a[0], a[1]]).T, scale)
    # [up's hidden, x, gate's hidden]: x is adjacent to both, without a second copy of it
    # (contiguous: the concatenation then copies 16 bytes at a time)
    joined = torch.cat([hidden_TR[:, gate_rank:].contiguous(), x_TI, hidden_TR[:, :gate_rank].contiguous()], 1)
    up_end, gate_start = len(a[1]) + inputs, len(a[1])
    gate_TF = joined[:, gate_start:] @ torch.cat([gate_FI, b[0]], 1).T
    up_TF = joined[:, :up_end] @ torch.cat([b[1], up_FI], 1).T
    extended = _swiglu(gate_TF, up_TF, a[2], scale)
    output_TI = extended @ torch.cat([down_IF, b[2]], 1).T
    return [output_TI, gate_TF, up_TF, hidden_TR, extended[:, gate_TF.shape[1] :].clone()]


@torch.library.custom_op("verl::adapted_mlp_backward", mutates_args=())
def _mlp_backward(
    gradient_TI: Tensor, saved: Sequence[Tensor], weights: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], scale: float
) -> list[Tensor]:
    """Return the gradients with respect to x, each A and each B.

    Args:
        saved: x_TI and the tensors that `_mlp` returned for the backward pass.
        weights: frozen weights of gate, up and down.
        a, b: A and B of the adapters of gate, up and down.
    """
    x_TI, gate_TF, up_TF, hidden_TR, down_hidden_TR = saved
    gate_FI, up_FI, down_IF = weights
    gate_rank, up_rank, inputs = len(a[0]), len(a[1]), x_TI.shape[1]
    down_gradient_TR = _product(gradient_TI, b[2], scale)
    product_gradient_TF = torch.cat([gradient_TI, down_gradient_TR], 1) @ torch.cat([down_IF, a[2]])
    gate_gradient_TF, up_gradient_TF, gate_b, up_b, down_a_FR = _swiglu_backward(
        product_gradient_TF, gate_TF, up_TF, hidden_TR[:, :gate_rank], hidden_TR[:, gate_rank:], down_gradient_TR
    )
    del product_gradient_TF
    # gradients w.r.t. [up's hidden, x, gate's hidden]: the second matmul accumulates into the first where they overlap
    joined = x_TI.new_empty(x_TI.shape[0], up_rank + inputs + gate_rank)
    joined[:, :up_rank].zero_()
    torch.mm(gate_gradient_TF, torch.cat([gate_FI, b[0]], 1), out=joined[:, up_rank:])
    joined[:, : up_rank + inputs].addmm_(up_gradient_TF, torch.cat([b[1], up_FI], 1))
    hidden_gradient_TR = torch.empty_like(hidden_TR)
    torch.mul(joined[:, up_rank + inputs :], scale, out=hidden_gradient_TR[:, :gate_rank])
    torch.mul(joined[:, :up_rank], scale, out=hidden_gradient_TR[:, gate_rank:])
    x_gradient_TI = joined[:, up_rank : up_rank + inputs].addmm_(hidden_gradient_TR, torch.cat([a[0], a[1]]))
    gate_a, up_a = (part.clone() for part in (hidden_gradient_TR.T @ x_TI).split([gate_rank, up_rank]))
    return [x_gradient_TI, gate_a, up_a, down_a_FR.T.contiguous(), gate_b, up_b, gradient_TI.T @ down_hidden_TR]


def _swiglu(gate_TF: Tensor, up_TF: Tensor, a_RF: Tensor, scale: float) -> Tensor:
    """Compute p = silu(gate) * up, and return [p, scale * p Aᵀ], of shape [tokens, F + R]."""
    tokens, width = gate_TF.shape
    joined = gate_TF.new_empty(tokens, width + len(a_RF))
    product_TF, hidden_TR = joined[:, :width], joined[:, width:]
    if _has_kernels(gate_TF, [len(a_RF)]):
        from verl.models.adapters import swiglu_triton

        swiglu_triton.forward(gate_TF, up_TF, product_TF)
    else:
        torch.mul(F.silu(gate_TF), up_TF, out=product_TF)
    torch.addmm(hidden_TR, product_TF, a_RF.T, beta=0, alpha=scale, out=hidden_TR)
    return joined


def _swiglu_backward(
    product_gradient_TF: Tensor, gate_TF: Tensor, up_TF: Tensor, gate_hidden_TR: Tensor, up_hidden_TR: Tensor, down_gradient_TR: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Same as `verl.models.adapters.swiglu_triton.backward`, with a fallback without Triton."""
    if _has_kernels(gate_TF, [x.shape[1] for x in (gate_hidden_TR, up_hidden_TR, down_gradient_TR)]):
        from verl.models.adapters import swiglu_triton

        return swiglu_triton.backward(product_gradient_TF, gate_TF, up_TF, gate_hidden_TR, up_hidden_TR, down_gradient_TR)
    silu_TF = F.silu(gate_TF)
    up_gradient_TF = product_gradient_TF * silu_TF
    gate_gradient_TF = torch.ops.aten.silu_backward(product_gradient_TF * up_TF, gate_TF)
    down_a_FR = silu_TF.mul_(up_TF).T @ down_gradient_TR
    return gate_gradient_TF, up_gradient_TF, gate_gradient_TF.T @ gate_hidden_TR, up_gradient_TF.T @ up_hidden_TR, down_a_FR


def _has_kernels(gate_TF: Tensor, ranks: Sequence[int]) -> bool:
    if not (HAS_TRITON and gate_TF.is_cuda and gate_TF.dtype == torch.bfloat16):
        return False
    from verl.models.adapters import swiglu_triton

    return max(ranks) <= swiglu_triton.LARGEST_RANK


def _mlp_shapes(x_TI: Tensor, gate_FI: Tensor, up: Any, down: Any, a: Sequence[Tensor], *others: Any) -> list[Tensor]:
    width = len(gate_FI)
    return [x_TI.new_empty(x_TI.shape[0], n) for n in (x_TI.shape[1], width, width, len(a[0]) + len(a[1]), len(a[2]))]


def _mlp_backward_shapes(gradient: Any, saved: Sequence[Tensor], weights: Any, a: Any, b: Any, scale: float) -> list[Tensor]:
    x_TI = saved[0]
    tokens, inputs = x_TI.shape
    x_gradient_TI = x_TI.new_empty(tokens, len(a[1]) + inputs + len(a[0]))[:, len(a[1]) : len(a[1]) + inputs]  # strides as in memory
    return [x_gradient_TI, *(x.new_empty(x.shape) for x in (*a, *b))]


def _keep_for_mlp(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x_TI, gate, up, down, a, b, ctx.scale = inputs
    ctx.save_for_backward(x_TI, *output[1:], gate, up, down, *a, *b)


def _mlp_gradients(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    *saved, a0, a1, a2, b0, b1, b2 = ctx.saved_tensors
    found = _mlp_backward(gradients[0].contiguous(), saved[:5], saved[5:], [a0, a1, a2], [b0, b1, b2], ctx.scale)
    return found[0], None, None, None, found[1:4], found[4:], None


_mlp.register_fake(_mlp_shapes)
_mlp_backward.register_fake(_mlp_backward_shapes)
_mlp.register_autograd(_mlp_gradients, setup_context=_keep_for_mlp)


# --- peft's modules


def use_operators(adapted: PeftModel, *, checkpointed: bool = False) -> None:
    """Replace the forward pass of adapted layers by these operators, in place, wherever the result is the same.

    peft still runs adapters with dropout or DoRA, several active adapters, and layers that are not plain nn.Linear.

    Args:
        checkpointed: whether activation checkpointing is on. Query, key and value are then separate operators, because a compiled layer
            would lose the outputs that the first call computes for the others.
    """
    for module in list(adapted.modules()):
        if all(_is_plain(getattr(module, name, None)) for name in ("gate_proj", "up_proj", "down_proj")) and _is_swiglu(module):
            kind: Any = type(module)
            module.__class__ = _as_operator(kind)
            continue
        siblings: list[Any] = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj")]
        if (
            not checkpointed
            and all(map(_is_plain, siblings))
            and len({(s.in_features, s.scaling["default"], s.base_layer.bias is None) for s in siblings}) == 1
        ):
            group = _Siblings(siblings)
            for sibling in siblings:
                sibling.siblings = group
    for module in adapted.modules():
        if _is_plain(module):
            module.__class__ = AdaptedLinear


def _is_plain(module: Any) -> bool:
    return (
        type(module) is LoraLinear
        and type(module.base_layer) is nn.Linear
        and module.active_adapters == ["default"]
        and not module.merged
        and not module.lora_variant
        and not module.lora_bias["default"]
        and isinstance(module.lora_dropout["default"], nn.Identity)
    )


def _is_swiglu(module: nn.Module) -> bool:
    parts: list[Any] = [module.gate_proj, module.up_proj, module.down_proj]
    return (
        type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")  # names in PyTorch and in some transformers releases
        and all(part.base_layer.bias is None for part in parts)
        and len({part.scaling["default"] for part in parts}) == 1
        and set(dict(module.named_children())) == {"gate_proj", "up_proj", "down_proj", "act_fn"}
    )


class AdaptedLinear(LoraLinear):
    """peft's linear layer with an adapter, with the operators as its forward pass."""

    siblings: "_Siblings | None" = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not _is_supported(self, x):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        if self.siblings is not None:
            return self.siblings.output(self, x)
        return _outputs([self], x)[0]


class _Siblings:
    """Layers that are called one after another with the same input. The first call computes the outputs of all."""

    def __init__(self, members: list[LoraLinear]):
        self.members = members
        self.x: Tensor | None = None
        self.outputs: list[Tensor] = []

    def output(self, member: LoraLinear, x: Tensor) -> Tensor:
        if member is self.members[0]:
            self.x, self.outputs = x, _outputs(self.members, x)
        elif self.x is not x:
            return _outputs([member], x)[0]
        number = next(i for i, m in enumerate(self.members) if m is member)
        output = self.outputs[number]
        if number == len(self.members) - 1:
            self.x, self.outputs = None, []
        return output


@cache
def _as_operator(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of an architecture's MLP that runs the operator. All layers get the same one, so that they share compiled code."""

    def forward(self: Any, x: Tensor) -> Tensor:
        parts = [self.gate_proj, self.up_proj, self.down_proj]
        if not all(_is_supported(part, x) for part in parts):
            result: Tensor = kind.forward(self, x)
            return result
        a, b = _factors(parts)
        weights = [part.base_layer.weight for part in parts]
        output: Tensor = _mlp(x.flatten(0, -2), *weights, a, b, parts[0].scaling["default"])[0]
        return output.view(x.shape)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, "__doc__": kind.__doc__})


def _is_supported(layer: Any, x: Tensor) -> bool:
    return (
        isinstance(layer, LoraLinear)
        and not layer.disable_adapters
        and not layer.merged
        and layer.lora_A["default"].weight.dtype == x.dtype
    )


def _outputs(layers: Sequence[Any], x: Tensor) -> list[Tensor]:
    a, b = _factors(layers)
    biases = [layer.base_layer.bias for layer in layers if layer.base_layer.bias is not None]
    weights = [layer.base_layer.weight for layer in layers]
    outputs = _linears(x.flatten(0, -2), weights, biases, a, b, layers[0].scaling["default"])
    return [output.view(*x.shape[:-1], output.shape[-1]) for output in outputs[:-1]]


def _factors(layers: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
    return [layer.lora_A["default"].weight for layer in layers], [layer.lora_B["default"].weight for layer in layers]
