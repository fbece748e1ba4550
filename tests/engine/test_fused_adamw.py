"""AdamW in one pass on a GPU, beside PyTorch's AdamW and beside the nearest values of the 8-bit code."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor

from verl import dist
from verl.config.shared import OptimConfig
from verl.engine.fused_adamw import FLOAT_MOMENTS, FusedAdamW
from verl.engine.moments import BLOCK
from verl.engine.optim import build_optimizer, optimizer_state, set_learning_rate

gpu = pytest.mark.gpu
DEVICE = torch.device("cuda")

EVEN = [(300, 128), (1024,), (2 * FLOAT_MOMENTS.chunk // 64, 64), (0, 128)]
ODD = [*EVEN, (17,), (5, 7, 3), (FLOAT_MOMENTS.chunk + 1,)]
BETAS = (0.9, 0.95)


@contextmanager
def waiting_refused() -> Iterator[None]:
    """Within, whoever makes the host wait for the GPU fails; at the end it is seen that one who does would have."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.ones((), device=DEVICE).item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    made = [nn.Parameter(torch.randn(shape).to(DEVICE, dtype)) for shape in shapes]
    for p in made:
        p.grad_dtype = None
    return made


def groups(trained: list[nn.Parameter]) -> list[dict[str, Any]]:
    decayed, plain = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]


def random_gradients(trained: list[nn.Parameter], dtype: torch.dtype = torch.float32) -> None:
    for p in trained:
        p.grad = torch.randn(p.shape).to(DEVICE, dtype)


@gpu
@pytest.mark.parametrize(
    ("gradient", "copied", "shapes"),
    [(torch.bfloat16, True, EVEN), (torch.bfloat16, True, ODD), (torch.float32, True, EVEN), (torch.float32, False, ODD)],
)
def test_ten_steps_are_those_of_torchs_adamw(gradient: torch.dtype, copied: bool, shapes: list[tuple[int, ...]]) -> None:
    mine, theirs = parameters(shapes), parameters(shapes)
    copies = {p: p.detach().bfloat16() for p in mine} if copied else {}
    fused = FusedAdamW(groups(mine), lr=0.0, betas=BETAS, eight_bit=False, copies=copies)
    plain = torch.optim.AdamW(groups([p for p in theirs if p.numel()]), lr=0.0, betas=BETAS)
    for step in range(10):
        set_learning_rate(fused, 1e-2 / (step + 1))
        set_learning_rate(plain, 1e-2 / (step + 1))
        random_gradients(mine, gradient)
        if step % 3 == 1:
            mine[1].grad = None  # neither moves nor counts a step
        before = [None if p.grad is None else p.grad.clone() for p in mine]
        factor = 1.0 if step % 2 else 0.3
        for p, other in zip(mine, theirs, strict=True):
            other.grad = None if p.grad is None else p.grad.float() * factor
        fused.step(torch.tensor(factor, device=DEVICE))
        plain.step()
        assert all(g is None or torch.equal(g, p.grad) for g, p in zip(before, mine, strict=True))
    for p, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p.detach(), other.detach(), rtol=3e-6, atol=3e-7)
        state = fused.state_of(p)
        for name, expected in plain.state[other].items():
            torch.testing.assert_close(state[name], expected, rtol=1e-5, atol=1e-6, check_device=False)
    assert all(torch.equal(copy, p.detach().bfloat16()) for p, copy in copies.items())


def test_a_checkpoint_of_torchs_adamw_is_one_of_this(tmp_path: Path, process_group: None) -> None:
    mine, theirs = ([nn.Parameter(torch.ones(4, 128)), nn.Parameter(torch.ones(128))] for _ in range(2))
    plain = torch.optim.AdamW(theirs, fused=True)
    for p, sign in zip(theirs, (1.0, -2.0), strict=True):
        p.grad = torch.full_like(p, sign)
    plain.step()
    theirs[1].grad = None
    plain.step()
    dcp.save({str(n): optimizer_state(plain, p) for n, p in enumerate(theirs)}, checkpoint_id=tmp_path / "theirs")
    first, second = (FusedAdamW(groups(mine), lr=0.0, betas=BETAS, eight_bit=False, copies={}) for _ in range(2))
    dcp.load({str(n): optimizer_state(first, p) for n, p in enumerate(mine)}, checkpoint_id=tmp_path / "theirs")
    dcp.save({str(n): optimizer_state(first, p) for n, p in enumerate(mine)}, checkpoint_id=tmp_path / "mine")
    dcp.load({str(n): optimizer_state(second, p) for n, p in enumerate(mine)}, checkpoint_id=tmp_path / "mine")
    assert second._steps.tolist() == [2.0, 1.0]
    for p, other in zip(mine, theirs, strict=True):
        state, expected = second.state_of(p), plain.state[other]
        assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


@gpu
def test_a_shard_is_updated_as_the_whole_is(process_group: None) -> None:
    whole = parameters(EVEN[:3])
    sharded = [nn.Parameter(distribute_tensor(p.detach().clone(), dist.mesh(DEVICE), [Shard(0)])) for p in whole]
    for trained in (whole, sharded):
        optimizer = FusedAdamW(groups(trained), lr=1e-2, betas=BETAS, eight_bit=True, copies={})
        for p in trained:
            p.grad = torch.ones_like(p)
        optimizer.step()
        state = optimizer.state_of(trained[0])
        assert type(state["exp_avg_codes"]) is type(trained[0].data) and state["exp_avg_scales"].shape == (300, 1)
    others: list[Any] = [p.detach() for p in sharded]
    assert all(torch.equal(p.detach(), other.full_tensor()) for p, other in zip(whole, others, strict=True))


def code_values(signed: bool) -> Tensor:
    """All values of torchao's dynamic code, sorted: seven levels, the middles of equal parts of 0.1 to 1; zero and one."""
    values = [0.0, 1.0]
    for level in range(7):
        parts = 2 ** (level + (0 if signed else 1))
        middles = [10.0 ** (level - 6) * (0.1 + 0.9 * (part + 0.5) / parts) for part in range(parts)]
        values += middles + ([-value for value in middles] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float64)


def test_the_values_of_the_code_are_torchaos() -> None:
    subclass = pytest.importorskip("torchao.optim.subclass_8bit")
    for signed, theirs in ((True, subclass.get_qmap_signed()), (False, subclass.get_qmap_unsigned())):
        torch.testing.assert_close(code_values(signed), torch.tensor(theirs, dtype=torch.float64), rtol=1e-6, atol=0)


@gpu
def test_a_moment_gets_the_nearest_code_and_goes_on_from_its_value() -> None:
    """With betas of zero the moments are the gradient and its square: 16,000 numbers from 1e-9 of a block's largest to all of it."""
    size = torch.logspace(-9, 0, 128 * BLOCK, dtype=torch.float64)
    gradient = (size * torch.tensor([1.0, -1.0]).repeat(len(size) // 2)).view(BLOCK, -1).T.float().contiguous()  # blocks of all sizes
    gradient[:, 0], gradient[::2, 1], gradient[1::2, 1] = 1.0, -1.0, 0.0
    weight = nn.Parameter(torch.zeros_like(gradient, device=DEVICE))
    optimizer = FusedAdamW([{"params": [weight], "weight_decay": 0.0}], lr=1.0, betas=(0.0, 0.0), eight_bit=True, copies={})
    weight.grad = gradient.to(DEVICE)
    optimizer.step()
    state = {name: tensor.cpu().clone() for name, tensor in optimizer.state_of(weight).items()}
    for name, signed, values in (("exp_avg", True, gradient.double()), ("exp_avg_sq", False, gradient.double().square())):
        assert torch.equal(state[f"{name}_scales"], torch.ones(len(gradient), 1))
        table = code_values(signed)
        distance = (table[state[f"{name}_codes"].long()] - values).abs()
        nearest = (table - values.unsqueeze(-1)).abs().amin(-1)
        torch.testing.assert_close(distance, nearest, rtol=3e-4, atol=1e-12)
        assert len(state[f"{name}_codes"].unique()) == 256
    before = weight.detach().clone()
    optimizer._betas = (0.5, 0.5)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    first, second = code_values(True)[state["exp_avg_codes"].long()], code_values(False)[state["exp_avg_sq_codes"].long()]
    expected = (0.5 * first / 0.75) / ((0.5 * second / 0.75).sqrt() + 1e-8)
    torch.testing.assert_close((before - weight).detach().cpu().double(), expected, rtol=1e-4, atol=1e-5)


@gpu
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_rounding_is_right_on_average_in_every_column(name: str) -> None:
    weight = nn.Parameter(torch.ones(4096, 128, dtype=torch.bfloat16, device=DEVICE))
    optimizer = build_optimizer([weight], OptimConfig(name=name, lr=2**-8 * 0.3, weight_decay=0.0))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert set(weight.unique().tolist()) == {1.0, 1 - 2**-8}
    moved = (weight < 1).double()
    assert moved.mean().item() == pytest.approx(0.3, abs=0.005)
    assert (moved.mean(0) - 0.3).abs().max() < 0.05 and (moved.mean(1) - 0.3).abs().max() < 0.25
    assert (moved[:, 1:] * moved[:, :-1]).mean().item() == pytest.approx(0.09, abs=0.005), "neighbours are rounded independently"


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_no_number_is_seen_in_the_weights(dtype: torch.dtype) -> None:
    (weight,) = parameters([(64, 128)], dtype)
    optimizer = FusedAdamW(groups([weight]), lr=1e-3, betas=BETAS, eight_bit=True, copies={})
    weight.grad = torch.full_like(weight, math.nan)
    optimizer.step()
    assert weight.isnan().all()


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_waits_for_nothing_though_gradients_have_moved(dtype: torch.dtype) -> None:
    trained = parameters(EVEN, dtype)
    optimizer = FusedAdamW(groups(trained), lr=1e-3, betas=BETAS, eight_bit=True, copies={})
    factor = torch.ones((), device=DEVICE)
    kept = []
    for step in range(3):
        random_gradients(trained, dtype)
        kept += [p.grad for p in trained]
        set_learning_rate(optimizer, 1e-3 * (1 + step))
        before = [p.detach().clone() for p in trained]
        with waiting_refused() if step else nullcontext():
            optimizer.step(factor)
        assert all(not torch.equal(p, b) for p, b in zip(trained, before, strict=True) if p.numel())


@gpu
@pytest.mark.parametrize("eight_bit", [False, True])
def test_a_step_that_is_not_finite_changes_nothing_and_does_not_count(eight_bit: bool) -> None:
    """Two steps with such a one between them are those two steps."""
    skipping, plain = parameters(EVEN), parameters(EVEN)
    copies = {p: p.detach().bfloat16() for p in skipping}
    mine = FusedAdamW(groups(skipping), lr=1e-2, betas=BETAS, eight_bit=eight_bit, copies=copies)
    theirs = FusedAdamW(groups(plain), lr=1e-2, betas=BETAS, eight_bit=eight_bit, copies={})
    factor = torch.ones((), device=DEVICE)
    for is_finite in (True, False, True):
        random_gradients(skipping)
        if not is_finite:
            skipping[0].grad.fill_(math.nan)
        for p, other in zip(skipping, plain, strict=True):
            other.grad = p.grad
        mine.step(factor, torch.tensor(is_finite, device=DEVICE))
        if is_finite:
            theirs.step(factor)
    for p, other in zip(skipping, plain, strict=True):
        assert torch.equal(p, other) and torch.equal(copies[p], p.detach().bfloat16())
        state = mine.state_of(p)
        assert all(torch.equal(state[name], expected) for name, expected in theirs.state_of(other).items())


@gpu
def test_a_step_whose_flag_is_on_the_device_waits_for_nothing() -> None:
    trained = parameters(EVEN)
    optimizer = FusedAdamW(groups(trained), lr=1e-3, betas=BETAS, eight_bit=False, copies={})
    random_gradients(trained)
    factor, finite = torch.ones((), device=DEVICE), torch.ones((), dtype=torch.bool, device=DEVICE)
    optimizer.step(factor, finite)
    before = [p.detach().clone() for p in trained]
    with waiting_refused():
        optimizer.step(factor, finite)
    assert all(not torch.equal(p, b) for p, b in zip(trained, before, strict=True) if p.numel())
