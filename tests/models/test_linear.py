"""Matrix products on CPUs of which PyTorch's own use half."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from verl.models import linear
from verl.models.linear import CHUNK_ROWS, add_outer, multiply, use_whole_cpu

pytestmark = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="a PyTorch without oneDNN")


@pytest.fixture
def on_such_a_cpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """As on a CPU where oneDNN is the faster. Returns the shapes of what it multiplied, as they come."""
    seen: list[tuple[int, ...]] = []
    call = linear._call

    def watched(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append((len(rows), *weight.shape))
        return call(rows, weight, bias)

    monkeypatch.setattr(linear, "is_faster", lambda: True)
    monkeypatch.setattr(linear, "_call", watched)
    return seen


def layer_and_rows(rows: int, *, bias: bool = True) -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(1)
    return nn.Linear(192, 256, bias=bias), torch.randn(2, rows, 192)


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_the_plain_layer(on_such_a_cpu: list[tuple[int, ...]], bias: bool) -> None:
    layer, rows = layer_and_rows(200, bias=bias)
    upstream = torch.randn(256, 200, 2).permute(2, 1, 0)  # not contiguous, as attention's are
    found = []
    for _ in ("plain", "through oneDNN"):
        layer.zero_grad()
        given = rows.clone().requires_grad_()
        out = layer(given)
        out.backward(upstream)
        found.append([out.detach(), given.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
        use_whole_cpu(layer)
    assert len(on_such_a_cpu) == 6  # pieces of 256 and 128 rows, thrice; the last 16 go with PyTorch's own
    for plain, other in zip(*found, strict=True):
        assert plain is not None and other is not None
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-4)


def test_frozen_weights_get_no_gradient(on_such_a_cpu: list[tuple[int, ...]]) -> None:
    layer, rows = layer_and_rows(200)
    layer.requires_grad_(False)
    use_whole_cpu(layer)
    layer(rows.requires_grad_()).sum().backward()
    assert layer.weight.grad is None and rows.grad is not None
    assert len(on_such_a_cpu) == 4


def test_small_products_and_other_dtypes_stay_as_they_are(on_such_a_cpu: list[tuple[int, ...]]) -> None:
    layer, rows = layer_and_rows(4)
    use_whole_cpu(layer)
    assert torch.equal(layer(rows), F.linear(rows, layer.weight, layer.bias))
    half, rows = layer.to(torch.bfloat16), torch.randn(4, 400, 192, dtype=torch.bfloat16)
    assert half(rows).dtype == torch.bfloat16
    assert on_such_a_cpu == []


@pytest.mark.parametrize(("outputs", "calls"), [(8000, 1), (9000, 0)])
def test_a_product_that_is_bound_by_writing_it_stays_as_it_is(on_such_a_cpu: list[tuple[int, ...]], outputs: int, calls: int) -> None:
    multiply(torch.randn(256, 16), torch.randn(outputs, 16), out=torch.empty(256, outputs))
    assert len(on_such_a_cpu) == calls


@pytest.mark.parametrize("rows", [4, 400])
def test_products_without_a_gradient_are_those_of_pytorch(on_such_a_cpu: list[tuple[int, ...]], rows: int) -> None:
    layer, (given, _) = layer_and_rows(rows)
    weight = layer.weight.detach()
    expected = given @ weight.T
    torch.testing.assert_close(multiply(given, weight, out=torch.empty(rows, 256)), expected, rtol=1e-4, atol=1e-4)
    add_outer(total := torch.ones(256, 192), expected, given)
    torch.testing.assert_close(total, expected.T @ given + 1, rtol=1e-4, atol=1e-2)
    assert bool(on_such_a_cpu) == (rows > 4)


def test_whatever_the_number_of_rows_few_shapes_reach_onednn(on_such_a_cpu: list[tuple[int, ...]]) -> None:
    """For each it keeps memory."""
    layer, _ = layer_and_rows(4)
    use_whole_cpu(layer)
    for rows in range(300, 3000, 37):
        layer(torch.randn(rows, 192)).sum().backward()
    assert len(set(on_such_a_cpu)) <= 2 * len(CHUNK_ROWS)
    assert max(rows for rows, *_ in on_such_a_cpu) == CHUNK_ROWS[0]


def test_compiled_layers_stay_as_they_are(on_such_a_cpu: list[tuple[int, ...]]) -> None:
    layer, _ = layer_and_rows(4)
    layer._compiled_call_impl = layer._call_impl  # as `layer.compile()` leaves it
    use_whole_cpu(nn.Sequential(layer))
    assert "forward" not in layer.__dict__


def test_a_layer_of_such_a_cpu_compiles_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    linear.is_faster.cache_clear()
    layer, rows = layer_and_rows(200)
    use_whole_cpu(layer)
    assert "forward" in layer.__dict__
    with torch.no_grad():
        compiled = torch.compile(lambda x: layer(x), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(rows), F.linear(rows, layer.weight, layer.bias))
    linear.is_faster.cache_clear()


def test_an_output_can_be_changed_where_it_lies(on_such_a_cpu: list[tuple[int, ...]]) -> None:
    """As architectures do that clamp queries and keys."""
    layer, rows = layer_and_rows(200)
    expected = layer(rows).clamp(-0.5, 0.5)
    use_whole_cpu(layer)
    torch.testing.assert_close(layer(rows).clamp_(-0.5, 0.5), expected, rtol=1e-4, atol=1e-4)
    assert on_such_a_cpu


def test_elsewhere_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "is_faster", lambda: False)
    layer, _ = layer_and_rows(4)
    use_whole_cpu(layer)
    assert "forward" not in layer.__dict__


@pytest.mark.parametrize(
    ("cpuinfo", "found"), [("vendor_id\t: AuthenticAMD\nmodel\t: 2\n", "AuthenticAMD"), ("CPU part : 0xd40\n", ""), (None, "")]
)
def test_the_maker_of_the_cpu_is_read(monkeypatch: pytest.MonkeyPatch, cpuinfo: str | None, found: str) -> None:
    def read(*args: object, **kwargs: object) -> str:
        if cpuinfo is None:
            raise FileNotFoundError
        return cpuinfo

    monkeypatch.setattr("pathlib.Path.read_text", read)
    assert linear._vendor() == found
