"""FlashAttention on a GPU, beside plain attention in float32 one document at a time: output, gradients, compiled layers.

Dimensions: T tokens, N query heads, K key-value heads, D head size.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from verl.models.attention import flash, flash_trial

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")]

# More documents than 256 take another way through FlashAttention-4's scheduler.
LENGTHS = {"ordinary": [1, 212, 130, 64, 700, 3], "many": [37] * 300, "long": [4096, 1500]}
KERNELS: list[flash.Kernel] = ["fa2", "fa3", "fa4", "short"]


def heads(size: int) -> flash.Heads:
    return flash.Heads(query=14, key_value=2, size=size)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Iterator[flash.Kernel]:
    if request.param != "fa2":
        refusal = flash_trial.refusal(request.param, torch.device("cuda", 0), torch.bfloat16, heads(64))
        if refusal is not None:
            pytest.skip(f"{flash.PACKAGES[request.param].name}: {refusal}")
    flash.activate(request.param)
    yield request.param
    flash.activate("fa2")


def tensors(lengths: list[int], size: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), n, size, device="cuda", dtype=torch.bfloat16).requires_grad_() for n in (14, 2, 2))
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device="cuda")
    return (q, k, v), bounds


def plain(query_TND: Tensor, key_TKD: Tensor, value_TKD: Tensor, lengths: list[int], window: int | None) -> Tensor:
    outputs = []
    for q, k, v in zip(*(x.float().split(lengths) for x in (query_TND, key_TKD, value_TKD)), strict=True):
        distance = torch.arange(len(q), device="cuda")[:, None] - torch.arange(len(q), device="cuda")
        mask = (distance >= 0) & (distance < (window or len(q)))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(outputs)


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("which", list(LENGTHS))
@pytest.mark.parametrize("window", [None, 100])
def test_output_and_gradients_are_those_of_plain_attention(kernel: flash.Kernel, size: int, which: str, window: int | None) -> None:
    lengths = LENGTHS[which]
    inputs, bounds = tensors(lengths, size)
    expected = plain(*inputs, lengths, window)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, inputs, weight)
    found = flash.flash_attention(*inputs, bounds, max(lengths), sliding_window=window, kernel=kernel)
    gradients = torch.autograd.grad(found, inputs, weight.bfloat16())
    assert max(map(difference, (found, *gradients), (expected, *wanted))) < 1e-2


def test_a_kernel_that_ignores_the_bounds_is_seen() -> None:
    lengths = LENGTHS["ordinary"]
    inputs, bounds = tensors(lengths, 64)
    found = flash.flash_attention(*inputs, bounds[[0, -1]].contiguous(), sum(lengths))
    assert difference(found, plain(*inputs, lengths, None)) > 0.1


def test_a_compiled_layer_keeps_the_kernel_as_one_node(kernel: flash.Kernel) -> None:
    def layer(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int) -> Tensor:
        return flash.flash_attention(query * 2, key, value, bounds, longest, kernel=kernel)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for which in ("ordinary", "long", "many"):
        lengths = LENGTHS[which]
        inputs, bounds = tensors(lengths, 64)
        expected = plain(inputs[0] * 2, *inputs[1:], lengths, None)
        weight = torch.randn_like(expected)
        wanted = torch.autograd.grad(expected, inputs, weight)
        found = compiled(*inputs, bounds, max(lengths))
        gradients = torch.autograd.grad(found, inputs, weight.bfloat16())
        assert max(map(difference, (found, *gradients), (expected, *wanted))) < 1e-2
