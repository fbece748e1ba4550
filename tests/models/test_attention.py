"""Which FlashAttention a run calls, with stand-ins for the packages: the choice needs no GPU, the operator neither.

Dimensions: T tokens, N query heads, K key-value heads, D head size.
"""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import qwen2_config
from torch import Tensor
from transformers import LlamaConfig

from verl import doctor
from verl.engine.decisions import Workload, choose_attention, refusals
from verl.engine.description import describe_attention
from verl.engine.hardware import measure
from verl.errors import UserError
from verl.models.attention import flash, flash_trial, packed
from verl.models.attention.packed import AttentionChoice, packed_attention, use_attention
from verl.models.per_layer import heads_of

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
HEADS = flash.Heads(query=4, key_value=2, size=16)
BOUNDS = [0, 1, 131, 431]


def mask_of(tokens: int, cu_seqlens: Tensor, window: int | None) -> Tensor:
    """Which token (row) sees which (column)."""
    position_T = torch.arange(tokens)
    document_T = torch.bucketize(position_T, cu_seqlens[1:-1].long(), right=True)
    distance_TT = position_T[:, None] - position_T[None, :]
    return (document_T[:, None] == document_T[None, :]) & (distance_TT >= 0) & (distance_TT < (window or tokens))


def exact(query_TND: Tensor, key_TKD: Tensor, value_TKD: Tensor, cu_seqlens: Tensor, *, scale: float | None, window: int | None) -> Tensor:
    """Attention by one mask over all tokens."""
    q, k, v = (x.transpose(0, 1).float() for x in (query_TND, key_TKD, value_TKD))
    mask_TT = mask_of(len(query_TND), cu_seqlens, window)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TT, scale=scale, enable_gqa=True)
    return out.transpose(0, 1).to(query_TND.dtype).contiguous()


def window_of(tokens_before: int | None) -> int | None:
    return None if tokens_before is None else tokens_before + 1


def fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int | None, int | None],
    return_lse: bool,
    **_: object,
) -> tuple[Tensor, Tensor]:
    assert causal and return_lse and window_size[1] is None
    out = exact(q, k, v, cu_seqlens_q, scale=softmax_scale, window=window_of(window_size[0]))
    return out, torch.zeros(q.shape[1], q.shape[0])


def fake_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    *,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int | None,
    cu_seqlens_q: Tensor,
    **_: object,
) -> tuple[Tensor, ...]:
    """By the formula: an operator's own code runs below autograd."""
    assert causal and lse.shape == (q.shape[1], q.shape[0])
    shared, scale = q.shape[1] // k.shape[1], softmax_scale or q.shape[2] ** -0.5
    k_all, v_all = (x.repeat_interleave(shared, dim=1).float() for x in (k, v))
    mask = mask_of(len(q), cu_seqlens_q, window_of(window_size_left))
    share = (torch.einsum("tnd,snd->nts", q.float(), k_all) * scale).masked_fill(~mask, -torch.inf).softmax(-1)
    dshare = torch.einsum("tnd,snd->nts", dout.float(), v_all)
    dscore = share * (dshare - (share * dshare).sum(-1, keepdim=True)) * scale
    dq = torch.einsum("nts,snd->tnd", dscore, k_all)
    dk, dv = torch.einsum("nts,tnd->snd", dscore, q.float()), torch.einsum("nts,tnd->snd", share, dout.float())
    dk, dv = (x.unflatten(1, (-1, shared)).sum(2) for x in (dk, dv))
    return tuple(x.to(q.dtype).contiguous() for x in (dq, dk, dv))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hopper without packages. What runs on it runs on the CPU."""
    on_cpu = flash_trial._results
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(flash_trial, "_results", lambda kernel, device, dtype, heads: on_cpu(kernel, CPU, dtype, heads))
    monkeypatch.setattr(flash, "_inside_pytorch", lambda q, k, v, cu, _, scale, window: exact(q, k, v, cu, scale=scale, window=window))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
    monkeypatch.setattr(packed, "_kernel", "fa2")
    for package in flash.PACKAGES.values():
        monkeypatch.setitem(sys.modules, package.module, None)  # importing it fails as if it were not there


@pytest.fixture
def flash4(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = ModuleType("flash_attn.cute.interface")
    module.flash_attn_varlen_func, module._flash_attn_bwd = fake_forward, fake_backward
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


LONG = Workload(total_steps=1, total_tokens=10**6, document_tokens=5000.0, token_budget=32_768)


def chosen(
    wanted: str = "auto",
    device: torch.device = GPU,
    dtype: torch.dtype = torch.bfloat16,
    *,
    heads: tuple[flash.Heads, ...] = (HEADS,),
    workload: Workload = LONG,
) -> AttentionChoice:
    choice = choose_attention(wanted, measure(device), dtype, heads, workload)
    use_attention(choice)
    return choice


def described(wanted: str = "auto", device: torch.device = GPU, dtype: torch.dtype = torch.bfloat16) -> str:
    return describe_attention(chosen(wanted, device, dtype), device.type, dtype)


def test_without_packages_a_gpu_runs_what_is_inside_pytorch_and_says_what_could_be_installed(gpu: None) -> None:
    assert described() == ("PyTorch's FlashAttention-2 (FlashAttention-3: not installed; FlashAttention-4: not installed)")


def test_an_installed_package_that_passes_its_trial_is_taken(gpu: None, flash4: Any) -> None:
    assert described() == "FlashAttention-4 (FlashAttention-3: not installed)"
    assert packed._kernel == "fa4"


def test_the_one_inside_pytorch_can_be_asked_for(gpu: None, flash4: Any) -> None:
    assert described("fa2") == "PyTorch's FlashAttention-2"


SHORT = replace(LONG, document_tokens=300.0)


@pytest.mark.parametrize(("workload", "taken"), [(SHORT, "short"), (LONG, "fa4"), (replace(SHORT, token_budget=4096), "fa4")])
def test_short_documents_in_large_batches_get_the_kernels_for_them(
    gpu: None, flash4: Any, workload: Workload, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "verl.models.attention.short_triton", ModuleType("short"))
    monkeypatch.setattr(flash_trial, "_trial", lambda *_: None)
    assert chosen(workload=workload).kernel == taken == packed._kernel


def test_kernels_for_short_documents_that_do_not_fit_the_model_are_told_of(gpu: None, flash4: Any) -> None:
    choice = chosen(workload=SHORT)
    assert choice.kernel == "fa4" and "short" in choice.refused


@pytest.mark.parametrize("wanted", ["auto", "fa4"])
def test_a_package_has_to_serve_every_model_of_the_process(gpu: None, flash4: Any, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_trial, "_trial", lambda kernel, device, dtype, heads: "too wide" if heads.size > 128 else None)
    assert chosen(wanted, heads=(HEADS, flash.Heads(4, 2, 128))).kernel == "fa4"
    wide = flash.Heads(4, 2, 256)
    if wanted == "fa4":
        with pytest.raises(UserError, match="FlashAttention-4: too wide"):
            chosen(wanted, heads=(HEADS, wide))
    else:
        choice = chosen(wanted, heads=(HEADS, wide))
        assert choice.kernel == "fa2" and choice.refused["fa4"] == "too wide"


def test_a_kernel_is_tried_once_however_often_it_is_asked_for(gpu: None, flash4: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(flash_trial, "_trial", lambda kernel, *_: tried.append(kernel))
    hardware = measure(GPU)
    for _ in range(2):
        assert choose_attention("auto", hardware, torch.bfloat16, (HEADS,), LONG).kernel == "fa4"
    assert tried == ["fa4"]


def test_a_package_that_computes_something_else_is_not_taken(gpu: None, flash4: Any) -> None:
    def ignore_bounds(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return fake_forward(q, k, v, cu_seqlens_q=cu_seqlens_q[[0, -1]], **kwargs)

    flash4.flash_attn_varlen_func = ignore_bounds
    assert "FlashAttention-4: differs from FlashAttention-2 by" in described()
    assert packed._kernel == "fa2"


def test_a_package_with_wrong_gradients_is_not_taken(gpu: None, flash4: Any) -> None:
    def half(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return tuple(0.5 * x for x in fake_backward(*args, **kwargs))

    flash4._flash_attn_bwd = half
    assert "differs from FlashAttention-2 by" in described()


def test_a_package_that_breaks_is_not_taken_and_its_reason_is_told(gpu: None, flash4: Any) -> None:
    def break_(*args: object, **kwargs: object) -> None:
        raise AssertionError("head_dim 16 is not supported\nand more")

    flash4.flash_attn_varlen_func = break_
    assert "FlashAttention-4: fails on this machine: AssertionError: head_dim 16 is not supported)" in described()


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (ImportError("undefined symbol: _ZN3c10"), "cannot be imported: undefined symbol: _ZN3c10"),
        (ModuleNotFoundError("No module named 'cutlass'", name="cutlass"), "its dependency cutlass is not installed"),
        (ModuleNotFoundError("No module named 'flash_attn'", name="flash_attn"), "not installed"),
    ],
)
def test_why_a_package_cannot_be_imported_is_told(gpu: None, monkeypatch: pytest.MonkeyPatch, raised: ImportError, told: str) -> None:
    def fail(name: str) -> ModuleType:
        raise raised

    monkeypatch.setattr(flash_trial, "importlib", SimpleNamespace(import_module=fail))
    assert flash_trial.refusal("fa4", GPU, torch.bfloat16, HEADS) == told


def test_what_is_asked_for_by_name_must_run(gpu: None) -> None:
    with pytest.raises(UserError, match=r'model.attn_implementation: FlashAttention-4: not installed\n  fix: pip install "verl\[fa4\]"'):
        described("fa4")
    with pytest.raises(UserError, match="fa4 needs a GPU and bfloat16"):
        described("fa4", CPU, torch.float32)


def test_older_gpus_are_offered_no_package(gpu: None, flash4: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert described() == "PyTorch's FlashAttention-2"


def test_float32_and_cpus_take_the_plain_path(gpu: None, flash4: Any) -> None:
    assert "it needs bfloat16" in described(dtype=torch.float32)
    assert "no GPU" in described(device=CPU, dtype=torch.float32)
    assert "one document at a time (model.attn_implementation=sdpa)" in described("sdpa")


def test_flash_attention_3_replaces_what_pytorch_calls_and_gives_it_back(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch has its own switch for it; here the switch is a stand-in that is written down."""
    calls: list[str | None] = [None]
    monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))
    monkeypatch.setattr(flash.torch_attention, "activate_flash_attention_impl", calls.append, raising=False)
    monkeypatch.setattr(flash.torch_attention, "restore_flash_attention_impl", lambda: calls.append(None), raising=False)
    monkeypatch.setattr(flash.torch_attention, "current_flash_attention_impl", lambda: calls[-1], raising=False)
    assert described().startswith("FlashAttention-3 (FlashAttention-4: not installed")
    assert calls == [None, "FA3", None, "FA3"]  # the trial, and then the run
    described("fa2")
    assert calls[-1] is None


def test_the_heads_of_a_model_are_read_from_its_configuration() -> None:
    assert heads_of(qwen2_config()) == (flash.Heads(query=4, key_value=2, size=16),)
    assert heads_of(LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=32)) == (flash.Heads(query=4, key_value=4, size=32),)


def arguments(dtype: torch.dtype = torch.float32, tokens: int = BOUNDS[-1]) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(tokens, heads, 16, generator=generator, dtype=dtype).requires_grad_() for heads in (4, 2, 2))
    return (q, k, v, torch.tensor([0, 1, 131, tokens], dtype=torch.int32), 300)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_operator_has_the_output_and_the_gradients_of_the_package(flash4: Any, window: int | None, compiled: bool) -> None:
    def layer(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        doubled = 2 * query.transpose(0, 1).contiguous().transpose(0, 1)  # not contiguous, as a projection may be
        return flash.flash_attention(doubled, key, value, cu_seqlens, longest, scale=0.3, sliding_window=window, kernel="fa4")

    call = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager") if compiled else layer
    for tokens in (431, 500):
        query, key, value, cu_seqlens, longest = arguments(tokens=tokens)
        expected = exact(2 * query, key, value, cu_seqlens, scale=0.3, window=window)
        weight = torch.randn_like(expected)
        wanted = torch.autograd.grad(expected, (query, key, value), weight)
        out = call(query, key, value, cu_seqlens, longest)
        torch.testing.assert_close(out, expected)
        for found, right in zip(torch.autograd.grad(out, (query, key, value), weight), wanted, strict=True):
            torch.testing.assert_close(found, right)


def test_the_operator_keeps_what_pytorch_asks_of_operators(flash4: Any) -> None:
    asked = ("test_schema", "test_faketensor", "test_autograd_registration")
    found = torch.library.opcheck(flash._flash4, arguments(), test_utils=asked, raise_exception=False)
    assert found == dict.fromkeys(asked, "SUCCESS")


def test_an_operator_whose_shapes_in_tracing_are_others_would_be_found() -> None:
    @torch.library.custom_op("verl_tests::doubled", mutates_args=())
    def doubled(x: Tensor) -> Tensor:
        return 2 * x

    doubled.register_fake(lambda x: x.new_empty(len(x) + 1))
    found = torch.library.opcheck(doubled, (torch.ones(3),), test_utils=("test_faketensor",), raise_exception=False)
    assert found["test_faketensor"] != "SUCCESS"


def test_without_a_gpu_each_document_is_computed_alone(gpu: None) -> None:
    query, key, value, cu_seqlens, longest = arguments()
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    found, _ = packed_attention(torch.nn.Module(), q, k, v, None, cu_seq_lens_q=cu_seqlens, max_length_q=longest)
    torch.testing.assert_close(found[0], exact(query, key, value, cu_seqlens, scale=None, window=None))


def test_the_doctor_names_the_kernel_and_what_could_be_installed(gpu: None) -> None:
    found = list(doctor._attention(refusals(measure(GPU), torch.bfloat16, [HEADS])))
    assert [(f.name, f.found, f.state) for f in found] == [
        ("attention", "PyTorch's FlashAttention-2", "ok"),
        ("FlashAttention-3", "not installed", "absent"),
        ("FlashAttention-4", "not installed", "absent"),
    ]
    assert found[2].advice == 'pip install "verl[fa4]"'


def test_the_doctor_warns_of_a_package_that_does_not_work() -> None:
    found = list(doctor._attention({"fa3": None, "fa4": "cannot be imported: undefined symbol"}))
    assert found[0].found == "FlashAttention-3"
    assert (found[1].found, found[1].state) == ("cannot be imported: undefined symbol", "warning")
