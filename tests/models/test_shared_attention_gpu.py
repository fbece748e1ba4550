"""Attention to shared prefixes on a GPU, beside plain attention in float32 of each document with its prefix; compiled layers; a model.

Dimensions: T tokens of the packed batch, U of the same documents without sharing; N query heads, K key-value heads, D head size.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tiny import qwen2_config, sharp
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import Qwen2ForCausalLM

from verl.data.batch import Batch
from verl.data.groups import collate_groups, grouped
from verl.data.pack import Document, collate
from verl.data.prefixes import Prefixes
from verl.engine.layers import compile_layers
from verl.engine.scorers import TokenScorer
from verl.models.attention import flash, flash_trial, packed, shared_trial
from verl.models.attention.packed import PACKED
from verl.models.attention.plain import attention_per_document
from verl.models.attention.shared import shared_attention
from verl.models.attention.shared_trial import without_sharing

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")]

GPU = torch.device("cuda", 0)
Layout = tuple[tuple[int, tuple[int, ...]], ...]  # tokens of each prompt, and of its answers
LAYOUTS: dict[str, Layout] = {
    "ordinary": ((131, (70, 1, 200)), (40, (33, 90)), (300, (5,)), (700, (256, 256, 31, 1))),
    "many groups": tuple((20 + n % 50, (10 + n % 7, 30)) for n in range(200)),
    "long": ((2048, (256,) * 8), (1500, (700, 3))),
    "one group": ((200, (17, 64)),),
}


def documents_of(layout: Layout) -> tuple[list[Document], list[range]]:
    random, documents, groups = np.random.default_rng(0), list[Document](), []
    for prompt, answers in layout:
        ids = random.integers(0, 512, prompt)
        groups.append(range(len(documents), len(documents) + len(answers)))
        for answer in answers:
            whole = np.concatenate([ids, random.integers(0, 512, answer)]).astype(np.int32)
            documents.append((whole, np.arange(len(whole)) >= prompt))
    return documents, groups


def shared_batch(layout: Layout) -> tuple[Batch, list[Document]]:
    documents, rows = documents_of(layout)
    groups = sorted((grouped(numbers, documents.__getitem__) for numbers in rows), key=lambda group: group.shared == 0)
    batch = collate_groups(groups, documents.__getitem__, multiple_of_tokens=128)
    return batch, [documents[n] for n in batch.sample_ids_S[: batch.documents].tolist()]


def prefixes_of(layout: Layout) -> Prefixes:
    batch, _ = shared_batch(layout)
    assert batch.prefixes is not None
    return batch.prefixes


def inputs(tokens: int, size: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(GPU).manual_seed(0)
    query, key, value = (
        torch.randn(tokens, number, size, device=GPU, generator=generator).to(dtype).requires_grad_() for number in (14, 2, 2)
    )
    return query, key, value


def exact(tensors: tuple[Tensor, Tensor, Tensor], prefixes: Prefixes) -> Tensor:
    """In float32, each document with its prefix by itself."""
    index_U, cu_seqlens, own_T = (x.to(GPU) for x in without_sharing(prefixes))
    query, key, value = (x.float()[index_U] for x in tensors)
    return attention_per_document(query, key, value, cu_seqlens)[own_T]


def differences(found: Tensor, expected: Tensor, tensors: tuple[Tensor, ...]) -> list[float]:
    weight = torch.randn(expected.shape, device=GPU, generator=torch.Generator(GPU).manual_seed(1))
    wanted = torch.autograd.grad(expected, tensors, weight.to(expected.dtype))
    gradients = torch.autograd.grad(found, tensors, weight.to(found.dtype))
    return [
        float(((f.float() - e.float()).norm() / e.float().norm()).detach())
        for f, e in zip((found, *gradients), (expected, *wanted), strict=True)
    ]


@pytest.fixture(params=["fa2", "fa3", "short"])
def kernel(request: pytest.FixtureRequest) -> Iterator[flash.Kernel]:
    """What PyTorch calls: its own version 2, or version 3 in its place; or verl's own for the attention of segments to themselves."""
    if request.param == "fa3":
        refusal = flash_trial.refusal(request.param, GPU, torch.bfloat16, flash.Heads(14, 2, 64))
        if refusal is not None:
            pytest.skip(refusal)
    flash.activate(request.param)
    yield request.param
    flash.activate("fa2")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("which", LAYOUTS)
def test_output_and_gradients_are_those_of_each_document_with_its_prefix(
    kernel: flash.Kernel, which: str, size: int, dtype: torch.dtype
) -> None:
    prefixes = prefixes_of(LAYOUTS[which])
    tensors = inputs(int(prefixes.segment_bounds[-1]), size, dtype)
    found = shared_attention(*tensors, prefixes.with_offsets(lambda x: x.to(GPU)), scale=None, short=kernel == "short")
    assert max(differences(found, exact(tensors, prefixes), tensors)) < 1e-2


@pytest.mark.parametrize("which", LAYOUTS)
def test_the_plain_path_on_a_gpu_is_the_same(which: str) -> None:
    prefixes = prefixes_of(LAYOUTS[which])
    tensors = inputs(int(prefixes.segment_bounds[-1]), 64)
    found = attention_per_document(*tensors, prefixes.with_offsets(lambda x: x.to(GPU)))
    assert max(differences(found, exact(tensors, prefixes), tensors)) < 1e-2


def test_documents_that_see_their_siblings_are_seen() -> None:
    """Negative control."""
    prefixes = prefixes_of(LAYOUTS["long"])
    tensors = inputs(int(prefixes.segment_bounds[-1]), 64)
    inner = (prefixes.segment_bounds < prefixes.numbers.group_tokens) & ~torch.isin(prefixes.segment_bounds, prefixes.group_bounds)
    of = prefixes.numbers
    sizes = of._replace(longest_segment=max(of.longest_segment, of.longest_group))
    wrong = prefixes._replace(segment_bounds=prefixes.segment_bounds[~inner].contiguous(), sizes=torch.tensor(sizes))
    found = shared_attention(*tensors, wrong.with_offsets(lambda x: x.to(GPU)), scale=None)
    assert min(differences(found, exact(tensors, prefixes), tensors)) > 0.03


def test_the_trial_passes_here() -> None:
    for short in (False, True):
        assert shared_trial.refusal(GPU, torch.bfloat16, flash.Heads(14, 2, 64), flash.Heads(28, 4, 128), short=short) is None


def test_queries_that_are_not_contiguous_give_the_same(kernel: flash.Kernel) -> None:
    """Slices of a joint projection."""
    prefixes = prefixes_of(LAYOUTS["ordinary"])
    joint = torch.randn(int(prefixes.segment_bounds[-1]), 18, 64, device=GPU, dtype=torch.bfloat16)
    tensors = tuple(x.detach().requires_grad_() for x in joint.split([14, 2, 2], dim=1))
    query, key, value = tensors
    assert not query.is_contiguous()
    found = shared_attention(query, key, value, prefixes.with_offsets(lambda x: x.to(GPU)), scale=None, short=kernel == "short")
    assert max(differences(found, exact((query, key, value), prefixes), tensors)) < 1e-2


# A model


def model_of(dtype: torch.dtype) -> Any:
    model: Any = sharp(
        Qwen2ForCausalLM, qwen2_config(hidden_size=256, intermediate_size=512, max_position_embeddings=4096, num_hidden_layers=3)
    )
    model.set_attn_implementation(PACKED)
    return model.to(GPU, dtype)


def scores_and_gradient(scorer: TokenScorer, batch: Batch) -> tuple[Tensor, Tensor]:
    scorer.zero_grad()
    logprob_M = scorer(batch.to(GPU)).logprob_M
    (logprob_M * torch.arange(len(logprob_M), device=GPU).sin()).sum().backward()
    return logprob_M.detach().float(), torch.cat([p.grad.flatten().float() for p in scorer.parameters() if p.grad is not None])


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("which", ["ordinary", "long"])
def test_a_model_is_as_near_to_float32_with_shared_prompts_as_without(which: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_kernel", "fa2")
    shared, documents = shared_batch(LAYOUTS[which])
    alone = collate(documents, range(len(documents)), multiple_of_tokens=128)
    exact_of = {
        name: scores_and_gradient(TokenScorer(model_of(torch.float32)), batch) for name, batch in (("with", shared), ("without", alone))
    }
    assert distance(exact_of["with"][0], exact_of["without"][0]) < 1e-5  # plain attention in float32
    assert distance(exact_of["with"][1], exact_of["without"][1]) < 1e-4
    model = model_of(torch.bfloat16)
    if compiled:
        compile_layers(model)
    scorer = TokenScorer(model)
    with_sharing, without = scores_and_gradient(scorer, shared), scores_and_gradient(scorer, alone)
    for found, usual, expected in zip(with_sharing, without, exact_of["without"], strict=True):
        assert distance(found, expected) < 1.3 * distance(usual, expected) + 1e-3


def test_compiled_layers_are_not_compiled_for_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_kernel", "fa2")
    model = model_of(torch.bfloat16)
    compile_layers(model)
    scorer, graphs = TokenScorer(model), []
    for which in ("one group", "ordinary", "long", "many groups"):
        scores_and_gradient(scorer, shared_batch(LAYOUTS[which])[0])
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1]
