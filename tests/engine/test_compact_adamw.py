"""Less memory for the optimizer: 8-bit moments and bfloat16 weights train as AdamW does, and resume bit for bit."""

import builtins
import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from decided import SHORT_RUN, decided
from places import run_ranks
from tiny import RandomDocuments, qwen2_config, write_model
from torch import nn

from verl.algorithms import sft
from verl.config.load import load_config
from verl.config.sft import SFTConfig
from verl.config.shared import ModelConfig, OptimConfig
from verl.data.loader import Loader, Packing
from verl.engine import checkpoint, restore
from verl.engine.build import Built, build
from verl.engine.checkpoint import Position
from verl.engine.engine import Engine
from verl.engine.optim import build_optimizer, optimizer_state, set_learning_rate
from verl.errors import UserError

pytestmark = pytest.mark.usefixtures("process_group")

if TYPE_CHECKING:
    from verl.engine.fused_adamw import FusedAdamW
    from verl.engine.optim import Optimizer

pytest.importorskip("torchao", reason='needs torchao: pip install "verl[8bit]"')

# As few numbers as there may be: on a CPU 8-bit moments take long for each.
VOCABULARY = 64
SHAPE = {"hidden_size": 128, "intermediate_size": 128, "vocab_size": VOCABULARY}
WHERE = Position(step=3, tokens=0, supervised_tokens=0, rows=24, rows_per_step=4, seed=1, data_fingerprint="f")
STEPS = 20
SMALL = {"adamw_8bit": "float32", "adamw": "bfloat16"}  # each of the two settings alone; the third case is both


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), qwen2_config(**SHAPE, num_hidden_layers=1))


@pytest.fixture(scope="module")
def wide_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Norms wide enough that among their weights, which lie 1e-2 apart, some are rounded on within 50 steps of 1e-6."""
    shape = qwen2_config(hidden_size=512, head_dim=16, intermediate_size=16, num_hidden_layers=1, vocab_size=VOCABULARY)
    return write_model(tmp_path_factory.mktemp("wide"), shape)


def built_of(path: Path, name: str = "adamw", param_dtype: str = "float32", *, lr: float = 1e-3, **model: object) -> Built:
    settings = ModelConfig(partial_pretrain=str(path), param_dtype=param_dtype, enable_gradient_checkpointing=False, **model)  # type: ignore[arg-type]
    optim = OptimConfig(name=name, lr=lr, warmup_steps_ratio=0.0, lr_scheduler="constant")
    decisions = decided(settings, replace(SHORT_RUN, total_steps=100))
    return build(settings, optim, FakeTokenizer(), decisions, stop_ids=[1], seed=1)  # type: ignore[arg-type]


class FakeTokenizer:
    """As much of a tokenizer as `build` looks at."""

    all_special_ids: tuple[int, ...] = ()
    added_tokens_decoder: tuple[int, ...] = ()

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0}


def train(engine: Engine, start: int, stop: int) -> list[float]:
    loader = Loader(RandomDocuments(vocabulary=VOCABULARY), Packing(4, 240), rows_per_step=4, seed=1)
    return [float(engine.train_step(step.micro_batches, sft, step.number)["loss"]) for step in loader.steps(start, stop)]


@cache
def plain_losses(path: Path) -> list[float]:
    return train(built_of(path).engine, 0, STEPS)


def unmoved(engine: Engine, steps: int) -> list[str]:
    torch.manual_seed(1)  # of the rounding
    before = {name: p.detach().clone() for name, p in engine.weights.trained.items()}
    loader = Loader(RandomDocuments(longest=8, vocabulary=VOCABULARY), Packing(4, 240), rows_per_step=4, seed=1)
    batches = next(iter(loader.steps(0, 1))).micro_batches
    for step in range(steps):
        engine.train_step(batches, sft, step)
    return [name for name, p in engine.weights.trained.items() if torch.equal(before[name], p)]


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_every_bfloat16_tensor_moves_at_a_learning_rate_of_one_in_a_million(name: str, wide_model_path: Path) -> None:
    assert unmoved(built_of(wide_model_path, name, "bfloat16", lr=1e-6).engine, 50) == []


def test_without_stochastic_rounding_bfloat16_tensors_stand_still(wide_model_path: Path) -> None:
    engine = built_of(wide_model_path, "adamw_8bit", "bfloat16", lr=1e-6).engine
    engine.optimizer._torchao.bf16_stochastic_round = False  # type: ignore[union-attr]
    norms = {name for name in engine.weights.trained if "norm" in name}
    assert len(norms) == 3 and norms <= set(unmoved(engine, 50))


def test_stochastic_rounding_is_right_on_average() -> None:
    """A step of a hundredth of the distance between two numbers moves a hundredth of the weights."""
    weight = nn.Parameter(torch.ones(256, 256, dtype=torch.bfloat16))  # bfloat16's next number below 1 is 1 - 2**-8
    optimizer = build_optimizer([weight], OptimConfig(name="adamw_8bit", lr=2**-8 / 100, weight_decay=0.0))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert set(weight.unique().tolist()) == {1.0, 1 - 2**-8}
    assert (weight < 1).float().mean().item() == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_at_learning_rate_zero_no_weight_moves(param_dtype: str, model_path: Path) -> None:
    engine = built_of(model_path, "adamw_8bit", param_dtype, lr=0.0).engine
    assert len(unmoved(engine, 3)) == len(engine.trained)


def test_the_learning_rate_of_a_step_is_the_one_that_was_set() -> None:
    weight = nn.Parameter(torch.ones(64, 128))
    optimizer = build_optimizer([weight], OptimConfig(name="adamw_8bit", lr=1.0, weight_decay=0.0))
    for rate, expected in ((0.0, 1.0), (0.25, 0.75)):
        set_learning_rate(optimizer, rate)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), torch.full_like(weight, expected))


@pytest.mark.parametrize(("name", "param_dtype"), [*SMALL.items(), ("adamw_8bit", "bfloat16")])
def test_the_loss_curve_is_that_of_plain_adamw(name: str, param_dtype: str, model_path: Path) -> None:
    plain, small = plain_losses(model_path), train(built_of(model_path, name, param_dtype).engine, 0, STEPS)
    assert plain[-1] < 0.8 * plain[0]
    assert small == pytest.approx(plain, rel=0.03)


def test_a_wrong_scale_of_the_moments_shows_in_the_loss_curve(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: 8-bit moments without their scale by blocks."""
    import torchao.optim.subclass_8bit as subclass

    plain = plain_losses(model_path)[:10]
    monkeypatch.setattr(subclass, "scale_tensor", lambda values, block: (values, torch.ones(values.numel() // block)))
    wrong = train(built_of(model_path, "adamw_8bit").engine, 0, 10)
    assert wrong != pytest.approx(plain, rel=0.03)


def test_the_moments_take_a_quarter_of_the_memory(model_path: Path) -> None:
    def memory(name: str) -> int:
        engine = built_of(model_path, name).engine
        states = [optimizer_state(engine.optimizer, p) for p in engine.trained]
        return sum(tensor.nbytes for state in states for key, tensor in state.items() if key != "step")

    assert memory("adamw_8bit") / memory("adamw") == pytest.approx(0.25, abs=0.02)


def test_bfloat16_weights_keep_their_moments_in_float32(model_path: Path) -> None:
    engine = built_of(model_path, "adamw", "bfloat16").engine
    train(engine, 0, 1)
    states = [optimizer_state(engine.optimizer, p) for p in engine.trained]
    assert {p.dtype for p in engine.trained} == {torch.bfloat16}
    assert {tensor.dtype for state in states for tensor in state.values()} == {torch.float32}


@pytest.mark.parametrize("lora_rank", [0, 32])
@pytest.mark.parametrize(("name", "param_dtype"), [*SMALL.items(), ("adamw_8bit", "bfloat16")])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    name: str, param_dtype: str, lora_rank: int, model_path: Path, tmp_path: Path
) -> None:
    built = [built_of(model_path, name, param_dtype, lr=1e-2, lora_rank=lora_rank) for _ in range(2)]
    torch.manual_seed(7)
    losses = train(built[0].engine, 0, 3)
    saved = checkpoint.save(tmp_path, built[0].engine, WHERE, lambda directory: None)
    losses += train(built[0].engine, 3, 6)
    restore.load(saved, built[1].engine)
    assert train(built[1].engine, 3, 6) == losses[3:]
    for one, other in zip(built[0].engine.trained, built[1].engine.trained, strict=True):
        assert torch.equal(one, other)


def test_a_lost_scale_of_the_moments_shows_on_resuming(model_path: Path, tmp_path: Path) -> None:
    """Negative control: the codes alone do not go on the same way."""
    first, resumed = (built_of(model_path, "adamw_8bit", lr=1e-2).engine for _ in range(2))
    train(first, 0, 3)
    saved = checkpoint.save(tmp_path, first, WHERE, lambda directory: None)
    whole = train(first, 3, 5)
    restore.load(saved, resumed)
    for p in resumed.trained:
        for key, tensor in optimizer_state(resumed.optimizer, p).items():
            if key.endswith("_scales"):
                tensor.zero_()
    assert train(resumed, 3, 5) != whole


def test_another_rounding_shows_on_resuming(model_path: Path, tmp_path: Path) -> None:
    """Negative control: stochastic rounding from another random state is another run."""
    first, resumed = (built_of(model_path, "adamw_8bit", "bfloat16").engine for _ in range(2))
    train(first, 0, 3)
    saved = checkpoint.save(tmp_path, first, WHERE, lambda directory: None)
    whole = train(first, 3, 6)
    restore.load(saved, resumed)
    torch.manual_seed(99)
    assert train(resumed, 3, 6) != whole


@pytest.mark.parametrize("now", [("adamw", "float32"), ("adamw_8bit", "bfloat16")])
def test_a_checkpoint_of_another_optimizer_is_refused(now: tuple[str, str], model_path: Path, tmp_path: Path) -> None:
    first = built_of(model_path, "adamw_8bit").engine
    saved = checkpoint.save(tmp_path, first, WHERE, lambda directory: None)
    with pytest.raises(UserError, match="this run trains other tensors") as caught:
        restore.load(saved, built_of(model_path, *now).engine)
    assert caught.value.fix is not None and "optim.name" in caught.value.fix


def test_packed_batches_are_compared_in_float32_before_the_weights_become_bfloat16(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import verl.engine.trial as module

    seen: list[Any] = []
    monkeypatch.setattr(module, "check_scorer", lambda scorer: seen.extend(p.dtype for p in scorer.parameters()))
    built = built_of(model_path, "adamw_8bit", "bfloat16")
    assert set(seen) == {torch.float32} and built.engine.trained[0].dtype == torch.bfloat16
    assert built.loaded.model.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("on_disk", [torch.float32, torch.bfloat16])
def test_bfloat16_weights_are_written_in_the_dtype_they_had_on_disk(on_disk: torch.dtype, tmp_path: Path) -> None:
    from verl.models.saved import export_model

    original = write_model(tmp_path / "original", dtype=on_disk)
    built = built_of(original, "adamw_8bit", "bfloat16")
    with built.engine.weights.in_model():
        export_model(tmp_path / "written", built.loaded.model, built.loaded.saved_dtypes)
    from safetensors.torch import load_file

    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("original", "written"))
    assert {name: tensor.dtype for name, tensor in before.items()} == {name: tensor.dtype for name, tensor in after.items()}
    assert all(torch.equal(before[name].bfloat16(), after[name].bfloat16()) for name in before)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
def test_a_gpus_update_is_the_cpus_and_waits_for_nothing() -> None:
    shapes = [(300, 1024), (1024,), (256, 384), (90, 100)]

    def trained_on(device: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(shape).to(device)) for shape in shapes]
        optimizer = build_optimizer(weights, OptimConfig(name="adamw_8bit"))
        gradients = [[torch.randn(shape).to(device) for shape in shapes] for _ in range(4)]
        for step in range(4):
            set_learning_rate(optimizer, 1e-2 / (step + 1))
            for weight, gradient in zip(weights, gradients[step], strict=True):
                weight.grad = gradient
            torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
            optimizer.step()
            torch.cuda.set_sync_debug_mode("default")
        return [weight.detach().cpu() for weight in weights]

    for on_gpu, on_cpu in zip(trained_on("cuda"), trained_on("cpu"), strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=0, atol=2e-3)  # of a step of 1e-2; a moment may round the other way
        assert (on_gpu - on_cpu).abs().mean() < 1e-5


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
def test_on_a_gpu_rounding_is_right_on_average_and_goes_on_from_its_random_state() -> None:
    def steps(weight: nn.Parameter, optimizer: "Optimizer | FusedAdamW", number: int) -> None:
        for _ in range(number):
            weight.grad = torch.ones_like(weight)
            optimizer.step()

    weight = nn.Parameter(torch.ones(256, 256, dtype=torch.bfloat16, device="cuda"))
    optimizer = build_optimizer([weight], OptimConfig(name="adamw_8bit", lr=2**-8 / 100, weight_decay=0.0))
    steps(weight, optimizer, 2)
    assert (weight < 1).float().mean().item() == pytest.approx(0.02, rel=0.2)
    before, random_state = weight.detach().clone(), torch.cuda.get_rng_state()
    steps(weight, optimizer, 2)
    after = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(before)
    torch.cuda.set_rng_state(random_state)
    steps(weight, optimizer, 2)
    assert torch.equal(weight, after) and not torch.equal(before, after)


@pytest.mark.parametrize(
    ("name", "param_dtype", "where"),
    [("adamw_8bit", "float32", "optim.name=adamw_8bit"), ("adamw", "bfloat16", "model.param_dtype=bfloat16")],
)
def test_a_missing_torchao_names_its_extra(name: str, param_dtype: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(module: str, *args: object, **kwargs: object) -> object:
        if module.startswith("torchao"):
            raise ModuleNotFoundError("No module named 'torchao'", name="torchao")
        return real(module, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.delitem(sys.modules, "verl.engine.compact_adamw", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    weight = nn.Parameter(torch.ones(2, 2, dtype=getattr(torch, param_dtype)))
    with pytest.raises(UserError) as caught:
        build_optimizer([weight], OptimConfig(name=name))
    assert caught.value.where == where and caught.value.fix == 'pip install "verl[8bit]"'


@pytest.mark.parametrize(("key", "value"), [("optim.name", "adamw_8bit"), ("model.param_dtype", "bfloat16")])
def test_offloading_to_the_host_goes_with_the_plain_optimizer_alone(key: str, value: str) -> None:
    config = SFTConfig()
    config.model.fsdp_config.cpu_offload = True
    config.check()
    group, _, field = key.partition(".")
    setattr(getattr(config, group), field, value)
    with pytest.raises(UserError) as caught:
        config.check()
    assert caught.value.where is not None and caught.value.where.startswith(f"{key}={value}")


@pytest.mark.parametrize(
    ("word", "there"),
    [("optim.name=lion", "adamw, adamw_8bit, or path/to/file.py"), ("model.param_dtype=float16", "write one of float32 or bfloat16")],
)
def test_an_unknown_optimizer_or_dtype_names_those_there_are(word: str, there: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(SFTConfig, ["data.train_files=train.jsonl", "model.partial_pretrain=model", word])
    assert caught.value.fix == there


def test_a_checkpoint_of_two_processes_resumes_on_two_and_on_one(tmp_path: Path) -> None:
    """With rows of the vocabulary that two processes cannot share evenly."""
    model = write_model(tmp_path / "model", qwen2_config(**{**SHAPE, "vocab_size": VOCABULARY + 1}))
    results = {}
    for processes, name in ((2, "two"), (1, "one")):
        run_ranks("compact_adamw.py", model, tmp_path, name, processes=processes)
        results[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert results["two"]["resumed"] == results["two"]["whole"]
    assert results["two"]["codes"] > 10
    assert results["one"]["resumed"] == pytest.approx(results["two"]["whole"], rel=2e-2)
    assert results["one"]["moments"] == results["two"]["moments"]
