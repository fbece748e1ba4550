"""Attention to a prefix that documents share: plain, and two parts joined by their log-sum-exp, with a stand-in for the GPU's kernels.

Dimensions: T tokens of the packed batch, U of the same documents without sharing; Q queries and X keys of a part; N query heads,
K key-value heads, D head size.
"""

from typing import Any

import pytest
import torch
from part_kernels import backward_part, forward_part, scores
from torch import Tensor

from verl.data.prefixes import Prefixes
from verl.models.attention import flash, packed, shared, shared_trial
from verl.models.attention.packed import packed_attention
from verl.models.attention.plain import attention_per_document
from verl.models.attention.shared import Part, shared_attention
from verl.models.attention.shared_trial import example, without_sharing

HEADS = flash.Heads(query=4, key_value=2, size=16)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "forward_part", forward_part)
    monkeypatch.setattr(shared, "backward_part", backward_part)


def inputs(tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(tokens, heads, 16, generator=generator, dtype=dtype).requires_grad_() for heads in (4, 2, 2))
    return query, key, value


def softmax_attention(query_UND: Tensor, key_UKD: Tensor, value_UKD: Tensor, bounds: Tensor, scale: float, window: int | None) -> Tensor:
    """Attention by one mask over all tokens, differentiated by autograd."""
    length = len(query_UND)
    score_NUU = scores(query_UND, key_UKD, Part(slice(0), slice(0), bounds, bounds, length, length, is_causal=True), scale)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    share_NUU = score_NUU.masked_fill(distance >= (window or length), -torch.inf).softmax(-1)
    return torch.einsum("nqx,xnd->qnd", share_NUU, value_UKD.repeat_interleave(2, 1))


def expected_of(tensors: tuple[Tensor, ...], prefixes: Prefixes, *, scale: float = 0.25, window: int | None = None) -> Tensor:
    index_U, bounds, own_T = without_sharing(prefixes)
    query, key, value = (x[index_U] for x in tensors)
    return softmax_attention(query, key, value, bounds, scale, window)[own_T]


def compared(found: Tensor, expected: Tensor, tensors: tuple[Tensor, ...]) -> list[float]:
    """The largest difference of the output and of each gradient."""
    weight = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(1))
    gradients = (torch.autograd.grad(x, tensors, weight) for x in (found, expected))
    return [float((f - e).detach().abs().max()) for f, e in zip((found, *next(gradients)), (expected, *next(gradients)), strict=True)]


def test_the_joined_parts_are_the_softmax_over_prefix_and_document(kernels: None) -> None:
    prefixes = example()
    tensors = inputs(int(prefixes.segment_bounds[-1]))
    found = shared_attention(*tensors, prefixes, scale=0.25)
    assert max(compared(found, expected_of(tensors, prefixes), tensors)) < 1e-12


@pytest.mark.parametrize(
    "planted",
    [
        lambda part, output, logsumexp: (output, logsumexp + 0.1 * (not part.is_causal)),
        lambda part, output, logsumexp: (output * (1.0 if part.is_causal else 0.99), logsumexp),
    ],
    ids=["another log-sum-exp", "another output"],
)
def test_a_part_that_is_wrong_is_seen(kernels: None, planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    monkeypatch.setattr(shared, "forward_part", lambda q, k, v, part, scale: planted(part, *forward_part(q, k, v, part, scale)))
    prefixes = example()
    tensors = inputs(int(prefixes.segment_bounds[-1]))
    found = shared_attention(*tensors, prefixes, scale=0.25)
    assert max(compared(found, expected_of(tensors, prefixes), tensors)) > 1e-2


def test_the_gradient_of_a_part_alone_is_not_that_of_the_joined_softmax(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the backward pass of each part gets its own output and log-sum-exp."""

    def by_itself(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, logsumexp: Tensor, part: Part, scale: float) -> Any:
        return backward_part(gradient, q, k, v, *forward_part(q, k, v, part, scale), part, scale)

    monkeypatch.setattr(shared, "backward_part", by_itself)
    prefixes = example()
    tensors = inputs(int(prefixes.segment_bounds[-1]))
    output, *gradients = compared(shared_attention(*tensors, prefixes, scale=0.25), expected_of(tensors, prefixes), tensors)
    assert output < 1e-12 and min(gradients) > 1e-2


@pytest.mark.parametrize("window", [None, 300, 100, 7])
def test_without_a_gpu_each_document_sees_its_prefix_and_itself(window: int | None) -> None:
    prefixes = example()
    tensors = inputs(int(prefixes.segment_bounds[-1]))
    found = attention_per_document(*tensors, prefixes, scale=0.25, sliding_window=window)
    assert max(compared(found, expected_of(tensors, prefixes, window=window), tensors)) < 1e-12


@pytest.mark.parametrize("window", [None, 100])
def test_soft_caps_and_sinks_see_the_prefix_too(window: int | None) -> None:
    """A cap that no score reaches and a sink without weight change nothing; the steps are others."""
    prefixes = example()
    tensors = inputs(int(prefixes.segment_bounds[-1]))
    more = {"soft_cap": 1e9, "sink_N": torch.full((4,), -1e9, dtype=torch.float64)}
    found = attention_per_document(*tensors, prefixes, scale=0.25, sliding_window=window, **more)
    assert max(compared(found, expected_of(tensors, prefixes, window=window), tensors)) < 1e-6


def test_a_window_that_reaches_no_further_than_documents_is_none(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention takes a window that no document reaches; another one takes the plain way."""
    monkeypatch.setattr(packed, "has_flash", lambda *_: True)
    monkeypatch.setattr(packed, "_kernel", "fa2")
    prefixes = example()
    assert prefixes.longest_document == 331
    tensors = inputs(int(prefixes.segment_bounds[-1]))
    query, key, value = (x.transpose(0, 1)[None] for x in tensors)
    calls = []
    monkeypatch.setattr(shared, "forward_part", lambda *arguments: calls.append(1) or forward_part(*arguments))
    for window in (331, 330):
        options: dict[str, Any] = {"scaling": 0.25, "sliding_window": window, "prefixes": prefixes}
        found, _ = packed_attention(
            torch.nn.Module(), query, key, value, None, cu_seq_lens_q=prefixes.segment_bounds, max_length_q=1, **options
        )
        assert max(compared(found[0], expected_of(tensors, prefixes, window=window), tensors)) < 1e-12
        assert len(calls) == 2


def test_a_compiled_layer_keeps_the_operator_as_one_node_and_compiles_once(kernels: None) -> None:
    compiles = []

    def backend(graph: Any, example_inputs: Any) -> Any:
        compiles.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    def heads_of(hidden_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (hidden_TH * 2).split([64, 32, 32], dim=1)  # heads have a fixed size, as in a model
        return query.unflatten(1, (4, 16)), key.unflatten(1, (2, 16)), value.unflatten(1, (2, 16))

    def layer(hidden_TH: Tensor, **options: Any) -> Tensor:
        return shared_attention(*heads_of(hidden_TH), options["prefixes"], scale=0.25)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for prompts, answers in (((77,), ((20, 33, 48, 9),)), ((131, 40), ((70, 1, 200), (33, 90))), ((64, 50), ((30, 30), (80, 3)))):
        prefixes = examples(prompts, answers)
        hidden_TH = torch.randn(int(prefixes.segment_bounds[-1]), 128).requires_grad_()
        found = compiled(hidden_TH, prefixes=prefixes)
        assert max(compared(found, expected_of(heads_of(hidden_TH), prefixes), (hidden_TH,))) < 1e-4
    assert len(compiles) == 1 and str(compiles[0]).count("shared_attention") == 1


def examples(prompts: tuple[int, ...], answers: tuple[tuple[int, ...], ...]) -> Prefixes:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_trial, "PROMPTS", prompts)
        patch.setattr(shared_trial, "ANSWERS", answers)
        return example()


def test_the_operator_keeps_what_pytorch_asks_of_operators(kernels: None) -> None:
    prefixes = example()
    bounds = [prefixes.segment_bounds, prefixes.group_bounds, prefixes.prefix_bounds]
    arguments = (*inputs(int(prefixes.segment_bounds[-1]), torch.float32), bounds, prefixes.sizes, 0.25, False)
    asked = ("test_schema", "test_faketensor", "test_autograd_registration")
    found = torch.library.opcheck(shared._shared, arguments, test_utils=asked, raise_exception=False)
    assert found == dict.fromkeys(asked, "SUCCESS")


@pytest.fixture
def gpu(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the trial runs on a GPU runs on the CPU."""

    def alone(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        return softmax_attention(query, key, value, cu_seqlens, query.shape[-1] ** -0.5, None)

    monkeypatch.setattr(flash, "flash_attention", alone)


def test_kernels_that_compute_this_pass_the_trial(gpu: None) -> None:
    assert shared_trial.refusal(torch.device("cpu"), torch.float32, HEADS) is None


def test_kernels_that_compute_something_else_do_not(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(0.5 * x for x in backward_part(*arguments))

    monkeypatch.setattr(shared, "backward_part", half)
    assert "its attention differs from that of each document by 0.5" in str(shared_trial.refusal(torch.device("cpu"), torch.float32, HEADS))


def test_kernels_that_fail_are_told_of(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("FA3 flash_attention forward unsupported: no\nand more")

    monkeypatch.setattr(shared, "forward_part", fail)
    said = shared_trial.refusal(torch.device("cpu"), torch.float32, HEADS)
    assert said == "its attention fails on this machine: RuntimeError: FA3 flash_attention forward unsupported: no"
