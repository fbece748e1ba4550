"""What only a GPU shows: FlashAttention over packed documents, bfloat16, offloading, Liger. Compared with plain transformers in float32."""

from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import largest_difference
from tiny import RandomDocuments, qwen2_config, write_model
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from verl import dist
from verl.algorithms import sft
from verl.config.shared import ModelConfig, OptimConfig
from verl.data.batch import Batch
from verl.data.loader import Loader, Packing, micro_batches
from verl.engine import checkpoint, restore
from verl.engine.checkpoint import Position
from verl.engine.contract import TokenOut
from verl.engine.description import describe_attention
from verl.engine.engine import Engine
from verl.engine.layers import compile_layers, recompute_activations
from verl.engine.logprobs import logprobs_with_gradient_
from verl.engine.scorers import TokenScorer
from verl.engine.trial import check_scorer
from verl.engine.weights import Sharding, Spread
from verl.models.adapters.lora import add_adapters
from verl.models.attention.packed import AttentionChoice
from verl.models.liger import use_liger
from verl.models.load import load_for_training
from verl.models.saved import export_model
from verl.trainer.meter import Meter

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("device")]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), qwen2_config(hidden_size=256, intermediate_size=512))


def engine_on(
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    offload: bool = False,
    lora: int = 0,
    liger: bool = False,
    compiled: bool = False,
    checkpointing: bool | str = True,
) -> Engine:
    loaded = load_for_training(str(path))
    if lora:
        add_adapters(loaded.model, ModelConfig(lora_rank=lora, lora_alpha=16), compute_dtype=dtype, seed=1)
    if liger:
        use_liger(loaded.model, device)
    if checkpointing:
        recompute_activations(loaded.model, selective=checkpointing == "selective")
    if compiled:
        compile_layers(loaded.model)
    scorer = TokenScorer(loaded.model)
    config = OptimConfig(lr=1e-2 if lora else 1e-4, warmup_steps_ratio=0.0)
    return Engine(scorer, config, total_steps=50, device=device, compute_dtype=dtype, spread=Spread(sharding=Sharding(cpu_offload=offload)))


PACKED = Packing(8, 480)
START = Position(step=0, tokens=0, supervised_tokens=0, rows=8, rows_per_step=8, seed=1, data_fingerprint="f")


def curve(engine: Engine, packing: Packing = PACKED, steps: int = 50) -> np.ndarray:
    # More documents than the steps take: a loss that is learned by heart to nearly zero has no meaningful ratio.
    loader = Loader(RandomDocuments(400), packing, rows_per_step=8, seed=1, pin=True)
    return np.array([float(engine.train_step(s.micro_batches, sft, s.number)["loss"]) for s in loader.steps(0, steps)])


@pytest.fixture(scope="module")
def plain_curve(model_path: Path) -> np.ndarray:
    dist.start()
    return curve(engine_on(model_path, torch.device("cuda", 0), torch.float32))


def test_flash_attention_is_taken_in_half_precision() -> None:
    assert "FlashAttention" in describe_attention(AttentionChoice(), "cuda", torch.bfloat16)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.bfloat16, 0.25)])
def test_documents_packed_have_the_logprobs_they_have_alone(
    dtype: torch.dtype, tolerance: float, model_path: Path, device: torch.device
) -> None:
    scorer = TokenScorer(load_for_training(str(model_path)).model).to(device, dtype).eval()
    if dtype == torch.float32:
        check_scorer(scorer)
    alone = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype, attn_implementation="eager").to(device).eval()  # type: ignore[arg-type]

    class OnGpu(torch.nn.Module):
        def forward(self, batch: Batch) -> TokenOut:
            return scorer(batch.to(device))

    class Alone(torch.nn.Module):
        def forward(self, ids: Tensor, use_cache: bool) -> Any:
            out = alone(ids.to(device), use_cache=use_cache)
            out.logits = out.logits.float().cpu()
            return out

    class ToCpu(torch.nn.Module):
        def forward(self, batch: Batch) -> TokenOut:
            out: TokenOut = OnGpu()(batch)
            out.logprob_M = out.logprob_M.cpu()
            return out

    assert largest_difference(ToCpu(), Alone()) < tolerance


@pytest.mark.parametrize("packing", [Packing(8, 480), Packing(1, 60), Packing(3, None)])
def test_the_curve_does_not_depend_on_how_rows_are_cut(
    packing: Packing, model_path: Path, device: torch.device, plain_curve: np.ndarray
) -> None:
    found = curve(engine_on(model_path, device, torch.float32), packing, steps=20)
    np.testing.assert_allclose(found, plain_curve[:20], rtol=1e-4)


def test_bfloat16_follows_the_float32_curve(model_path: Path, device: torch.device, plain_curve: np.ndarray) -> None:
    found = curve(engine_on(model_path, device, torch.bfloat16))
    assert np.abs(found / plain_curve - 1).max() < 1.5e-2


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1.5e-2)])
def test_compiled_layers_follow_the_plain_curve(
    dtype: torch.dtype, tolerance: float, checkpointing: bool | str, model_path: Path, device: torch.device, plain_curve: np.ndarray
) -> None:
    torch._dynamo.reset()
    found = curve(engine_on(model_path, device, dtype, compiled=True, checkpointing=checkpointing))
    assert np.abs(found / plain_curve - 1).max() < tolerance


def test_batches_of_other_sizes_compile_nothing_again(model_path: Path, device: torch.device) -> None:
    torch._dynamo.reset()
    counters.clear()
    engine = engine_on(model_path, device, torch.bfloat16, compiled=True, checkpointing=False)
    # Not a multiple of 128: a batch of as many tokens as the model is wide would be taken for a case of its own.
    curve(engine, Packing(8, 480, multiple_of_tokens=96), steps=2)
    graphs = counters["stats"]["unique_graphs"]
    curve(engine, Packing(8, 200, multiple_of_tokens=96), steps=10)
    engine.evaluate(micro_batches(RandomDocuments(), np.arange(4), Packing(8, 480)), sft)
    assert graphs == counters["stats"]["unique_graphs"] > 0


def test_each_kind_of_checkpointing_keeps_less(model_path: Path, device: torch.device) -> None:
    def peak(checkpointing: bool | str) -> int:
        torch._dynamo.reset()
        engine = engine_on(model_path, device, torch.bfloat16, compiled=True, checkpointing=checkpointing)
        batch = micro_batches(RandomDocuments(2000), np.arange(2000), Packing(1, 500_000))
        engine.backward(batch, sft)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        engine.backward(batch, sft)
        return torch.cuda.max_memory_allocated() - before

    full, selective, none = (peak(kind) for kind in (True, "selective", False))
    assert full < 0.9 * selective < 0.9 * 0.9 * none


def test_memory_is_flat_in_the_data_and_linear_in_the_token_budget(model_path: Path, device: torch.device) -> None:
    def peak(rows: int, budget: int) -> int:
        """Bytes beyond the model's own over a few steps, whose micro-batches are filled up to the budget."""
        engine = engine_on(model_path, device, torch.bfloat16, checkpointing=False)
        loader = Loader(RandomDocuments(rows), Packing(1, budget, multiple_of_tokens=budget), rows_per_step=rows // 2, seed=1, pin=True)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for step in loader.steps(0, 2):
            engine.train_step(step.micro_batches, sft, step.number)
        return torch.cuda.max_memory_allocated() - before

    small, middle, large = (peak(4000, budget) for budget in (8192, 16_384, 32_768))
    assert peak(16_000, 16_384) == pytest.approx(middle, rel=0.01)
    assert large - middle == pytest.approx(2 * (middle - small), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [8192, 151_936, 5, 10_001])
def test_one_kernel_gives_logprobs_and_the_gradient_of_the_logits(vocabulary: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(70, vocabulary, device=device) * 5).to(dtype)
    logits[0] = -300.0  # a row of equal numbers far from zero
    logits[1, 8192:] += 90  # rows whose maximum is far above that of their first columns, once and twice
    logits[2, 9000:] += 150
    logits[2, 10_000:] += 150
    logits[3, : vocabulary // 2] = float("-inf")
    target, slope = torch.randint(0, vocabulary, (70,), device=device), torch.randn(70, device=device)
    target[3] = vocabulary - 1
    exact = logits.double().requires_grad_()
    expected = torch.log_softmax(exact * 0.5, -1).gather(1, target[:, None]).squeeze(1)
    (gradient,) = torch.autograd.grad((expected * slope).sum(), exact)
    found, scale = logprobs_with_gradient_(logits, target, 0.5)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        logits.double() * (scale * slope).double()[:, None], gradient, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=1e-7
    )


def test_offloading_to_the_host_changes_nothing_but_memory(model_path: Path, device: torch.device, plain_curve: np.ndarray) -> None:
    engine = engine_on(model_path, device, torch.float32, offload=True)
    np.testing.assert_allclose(curve(engine, steps=20), plain_curve[:20], rtol=1e-4)
    assert all(p.device.type == "cpu" for p in engine.trained)


def test_a_run_with_offloading_measures_its_steps(model_path: Path, device: torch.device) -> None:
    """The gradient's norm is in host memory, the loss on the GPU; the meter stacks both, each step when it is done."""
    engine = engine_on(model_path, device, torch.bfloat16, offload=True)
    meter = Meter(engine, START)
    for step in Loader(RandomDocuments(400), PACKED, rows_per_step=8, seed=1).steps(0, 3):
        meter.add(step, engine.train_step(step.micro_batches, sft, step.number))
        (number, measured), *others = meter.finished(wait=False)  # no step is in hand: its seconds are its own
        assert number == step.number + 1 and not others
        assert measured["perf/step_seconds"] > 1e-3


@pytest.mark.parametrize(
    "changes", [{}, {"compiled": True}, {"compiled": True, "checkpointing": "selective"}, {"compiled": True, "lora": 8}]
)
def test_the_host_waits_for_nothing_in_a_step(changes: dict[str, Any], model_path: Path, device: torch.device) -> None:
    """From a batch in pinned memory to the metrics on their way: whatever would wait raises."""
    torch._dynamo.reset()
    engine = engine_on(model_path, device, torch.bfloat16, **changes)
    meter = Meter(engine, START)
    steps = list(Loader(RandomDocuments(400), PACKED, rows_per_step=8, seed=1, pin=True).steps(0, 8))
    for step in steps[:5]:
        meter.add(step, engine.train_step(step.micro_batches, sft, step.number))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in steps[5:]:
            meter.add(step, engine.train_step(step.micro_batches, sft, step.number))
        with pytest.raises(RuntimeError, match="synchroniz"):
            float(engine.trained[0].sum())  # so it does raise
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(list(meter.finished(wait=True))) == 8


def liger_curve(path: Path) -> np.ndarray:
    device = dist.start()
    return curve(engine_on(path, device, torch.float32, liger=True), steps=20)


def test_liger_follows_the_plain_curve(model_path: Path, plain_curve: np.ndarray) -> None:
    """In a process of its own: Liger replaces functions of transformers for every model of the process."""
    pytest.importorskip("liger_kernel")
    with get_context("spawn").Pool(1) as pool:
        np.testing.assert_allclose(pool.apply(liger_curve, (model_path,)), plain_curve[:20], rtol=1e-3)


def test_adapters_learn_beside_bfloat16_weights(model_path: Path, device: torch.device) -> None:
    engine = engine_on(model_path, device, torch.bfloat16, lora=8)
    assert {p.dtype for p in engine.trained} == {torch.float32}
    assert {p.dtype for p in engine.scorer.parameters() if not p.requires_grad} == {torch.bfloat16}
    found = curve(engine)
    assert found[-5:].mean() < found[:5].mean() - 0.05


def test_every_trained_tensor_moves_at_a_learning_rate_of_one_in_a_million_in_bfloat16(model_path: Path, device: torch.device) -> None:
    loaded = load_for_training(str(model_path))
    config = OptimConfig(lr=1e-6, lr_scheduler="constant", warmup_steps_ratio=0.0, weight_decay=0.0)
    engine = Engine(TokenScorer(loaded.model), config, total_steps=100, device=device, compute_dtype=torch.bfloat16)
    before = [p.detach().clone() for p in engine.trained]
    curve(engine, steps=100)
    assert all(not torch.equal(b, p.detach()) for b, p in zip(before, engine.trained, strict=True))


def test_a_run_resumed_on_a_gpu_is_the_uninterrupted_one(model_path: Path, device: torch.device, tmp_path: Path) -> None:
    loader = Loader(RandomDocuments(), Packing(8, 480), rows_per_step=8, seed=1)

    def train(engine: Engine, start: int, stop: int) -> list[float]:
        return [float(engine.train_step(s.micro_batches, sft, s.number)["loss"]) for s in loader.steps(start, stop)]

    loaded = load_for_training(str(model_path))
    engine = Engine(TokenScorer(loaded.model), OptimConfig(lr=1e-3), total_steps=8, device=device, compute_dtype=torch.bfloat16)
    train(engine, 0, 3)
    where = Position(step=3, tokens=0, supervised_tokens=0, rows=24, rows_per_step=8, seed=1, data_fingerprint="f")
    saved = checkpoint.save(tmp_path, engine, where, partial(export_model, model=loaded.model, saved_dtypes=loaded.saved_dtypes))
    rest = train(engine, 3, 8)
    resumed = Engine(
        TokenScorer(load_for_training(str(model_path)).model),
        OptimConfig(lr=1e-3),
        total_steps=8,
        device=device,
        compute_dtype=torch.bfloat16,
    )
    restore.load(saved, resumed)
    np.testing.assert_allclose(train(resumed, 3, 8), rest, rtol=1e-3)


def test_an_evaluation_batch_of_no_rows_is_served(model_path: Path, device: torch.device) -> None:
    engine = engine_on(model_path, device, torch.bfloat16)
    batches = micro_batches(RandomDocuments(), np.arange(1), Packing(8, 480), rank=1, world_size=2)
    assert np.isfinite(float(engine.evaluate([*batches, *micro_batches(RandomDocuments(), np.arange(4), Packing(8, 480))], sft)["loss"]))
