"""Delta rules and short convolutions over packed documents, on a CPU: a stand-in takes the place of flash-linear-attention.

Dimensions: T tokens, C channels, W width of a convolution.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, Qwen3_5TextConfig
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.models.qwen3_5 import modeling_qwen3_5

from verl.algorithms import sft
from verl.config.shared import ModelConfig, OptimConfig
from verl.data.batch import Batch
from verl.data.pack import collate
from verl.engine.decisions import Workload, choose_rule, choose_spread, decide
from verl.engine.engine import Engine
from verl.engine.hardware import ASSUMED, Hardware, measure
from verl.engine.layers import compile_layers, recompute_activations
from verl.engine.outline import Outline
from verl.engine.scorers import TokenScorer
from verl.engine.trial import choose_path, probe_documents
from verl.errors import UserError
from verl.models.attention import delta_rule
from verl.models.attention.delta_rule import LENGTHS, RuleChoice, refusal, use_rule
from verl.models.attention.packed import PACKED, PACKED_PATH

pytestmark = [
    pytest.mark.usefixtures("process_group"),
    # Of PyTorch's own making, while it traces and when its compiler is first imported.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

CPU, GPU = torch.device("cpu"), replace(ASSUMED, is_here=True)
NAME = "torch_chunk_gated_delta_rule"
OWN: Any = getattr(delta_rule._function(getattr(modeling_qwen3_5, NAME)), "replaced", getattr(modeling_qwen3_5, NAME)).__wrapped__
TRITON = "Triton >= 3.4.0 and < 3.7.1 on Hopper GPUs produces incorrect results for gated chunk_bwd_dqkwg"
RUN = Workload(total_steps=100, total_tokens=10**9, document_tokens=200.0, token_budget=8192)


def config(**changes: Any) -> Qwen3_5TextConfig:
    sizes: dict[str, Any] = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16
    )
    rule: dict[str, Any] = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16)
    kinds = ["linear_attention", "linear_attention", "full_attention"]
    return Qwen3_5TextConfig(vocab_size=512, layer_types=kinds, pad_token_id=None, **sizes, **rule, **changes)


# Some releases of transformers repeat the key heads before the rule, others in it.
RULE = choose_path(config(), "here").rule


def model_of() -> Any:
    """A model whose states last for many tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(), attn_implementation=PACKED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1)
            if name.endswith("A_log"):
                parameter.fill_(-4)
    return model


def per_document(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor | None = None, **options: Any) -> Any:
    """What flash-linear-attention computes, by transformers' own code on one document after the other."""
    if cu_seqlens is None:
        return OWN(q, k, v, g=g, beta=beta, **options)
    parts = zip(*(x.split(cu_seqlens.diff().tolist(), dim=1) for x in (q, k, v, g, beta)), strict=True)
    return torch.cat([OWN(*part[:3], g=part[3], beta=part[4], **options)[0] for part in parts], dim=1), None


def leaky(*args: Any, cu_seqlens: Tensor | None = None, **options: Any) -> Any:
    return per_document(*args, **options)


def broken(*args: Any, **options: Any) -> Any:
    output, state = per_document(*args, **options)
    if output.requires_grad:
        output.register_hook(_raise)
    return output, state


def _raise(gradient: Tensor) -> Tensor:
    raise RuntimeError(TRITON)


Install = Callable[[Callable[..., Any]], list[Tensor | None]]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a stand-in for the package, as if the model's module was imported after it; it notes the bounds it is given."""
    monkeypatch.setattr(delta_rule, "_fits_kernels", lambda query: True)
    monkeypatch.setattr(delta_rule, "_by_kernels", {})

    def install(kernel: Callable[..., Any]) -> list[Tensor | None]:
        bounds: list[Tensor | None] = []

        def chunk_gated_delta_rule(  # transformers passes on what has a name here
            q: Tensor,
            k: Tensor,
            v: Tensor,
            g: Tensor,
            beta: Tensor,
            initial_state: Tensor | None = None,
            output_final_state: bool = False,
            use_qk_l2norm_in_kernel: bool = False,
            cu_seqlens: Tensor | None = None,
        ) -> Any:
            bounds.append(cu_seqlens)
            return kernel(q, k, v, g, beta, cu_seqlens=cu_seqlens, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel)

        modules: list[Any] = [ModuleType(name) for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule")]
        for module in modules:
            monkeypatch.setitem(sys.modules, module.__name__, module)
        modules[2].chunk_gated_delta_rule = chunk_gated_delta_rule
        wrapped = use_kernel_func_from_hub_with_fallback("chunk_gated_delta_rule", "fla")(OWN)
        monkeypatch.setattr(modeling_qwen3_5, NAME, wrapped)
        delta_rule._replace(modeling_qwen3_5)
        return bounds

    return install


@pytest.fixture
def without_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla", None)
    monkeypatch.setitem(sys.modules, "fla.ops", None)


# --- convolutions


@pytest.mark.parametrize("lengths", [[7, 1, 2, 0, 12], [3], [1, 1]])
def test_a_convolution_and_its_gradients_are_those_of_each_document_alone(lengths: list[int]) -> None:
    torch.manual_seed(0)
    tokens, bounds = sum(lengths), torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    hidden_1CT, weight_CW, bias_C = (torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in ((1, 6, tokens), (6, 4), (6,)))
    parts = [part for part in hidden_1CT.split(lengths, dim=2) if part.shape[2]]
    expected = torch.cat([F.silu(F.conv1d(x, weight_CW[:, None], bias_C, padding=3, groups=6)[:, :, : x.shape[2]]) for x in parts], dim=2)
    found = delta_rule._convolve_apart(hidden_1CT, weight_CW, bias_C, "silu", bounds=bounds)
    weights, inputs = torch.randn_like(expected), (hidden_1CT, weight_CW, bias_C)
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found, inputs, weights), torch.autograd.grad(expected, inputs, weights), strict=True):
        torch.testing.assert_close(one, other)


# --- the trial of the package


def test_the_last_state_of_each_packed_document_is_its_state_alone() -> None:
    lengths, generator = [3, 70, 1, 64, 5], torch.Generator().manual_seed(0)
    shapes = RULE.shapes if RULE is not None else ()
    query, key, value, decay, beta = (torch.randn(1, sum(lengths), *shape, generator=generator) for shape in shapes)
    inputs, bounds = (query, key, value, -0.01 * decay.abs(), beta.sigmoid()), F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    packed = vars(modeling_qwen3_5)[NAME](*inputs[:3], g=inputs[3], beta=inputs[4], cu_seqlens=bounds, output_final_state=True)[1]
    for number, part in enumerate(zip(*(x.split(lengths, 1) for x in inputs), strict=True)):
        _, state = OWN(*part[:3], g=part[3], beta=part[4], output_final_state=True)
        torch.testing.assert_close(packed[number], state[0], atol=1e-5, rtol=0)


def test_a_package_that_computes_each_document_alone_is_taken(install: Install) -> None:
    bounds = install(per_document)
    for dtype in (torch.float32, torch.bfloat16):
        assert refusal(RULE, CPU, dtype) is None
    assert all(found is not None and found.diff().tolist() == list(LENGTHS) for found in bounds)


def test_a_state_that_is_carried_into_the_next_document_is_seen_clearly(install: Install) -> None:
    install(leaky)
    found = refusal(RULE, CPU, torch.bfloat16)
    assert found is not None and found.startswith("differs from the model's own code by ") and float(found.split()[-1]) > 0.2


def test_a_package_that_fails_in_the_backward_pass_alone_is_refused_with_its_words(install: Install) -> None:
    install(broken)
    assert refusal(RULE, CPU, torch.float32) == f"fails on this machine: RuntimeError: {TRITON}"


def test_a_package_that_is_not_there_or_lacks_something_is_named(without_package: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(RULE, CPU, torch.float32) == "not installed"

    def lacks(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'einops'", name="einops")

    monkeypatch.setattr(delta_rule.importlib, "import_module", lacks)
    assert refusal(RULE, CPU, torch.float32) == "its dependency einops is not installed"


# --- which one computes, and what is said of it


def gpu(refused: str | None) -> Hardware:
    return replace(GPU, refusal=lambda kernel, *_: refused if kernel == "fla" else None)


def test_the_first_lines_say_what_computes_and_what_a_faster_one_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla", SimpleNamespace(__version__="0.6.0"))
    slow = "PyTorch's operations, documents of similar length at a time: exact, but slower (flash-linear-attention: {})"

    def said(hardware: Hardware, dtype: torch.dtype = torch.bfloat16) -> str:
        return choose_rule(RULE, hardware, dtype).describe()

    assert said(gpu(None)) == "flash-linear-attention 0.6.0, without CUDA graphs"
    assert said(gpu("not installed")) == slow.format('not installed; pip install "verl[fla]"')
    assert said(gpu(f"fails on this machine: RuntimeError: {TRITON}")) == slow.format(f"fails on this machine: RuntimeError: {TRITON}")
    assert said(gpu(None), torch.float32) == slow.format("it needs bfloat16 or float16")
    assert said(measure(CPU)) == slow.format("no GPU")


def outline_of(**settings: Any) -> Outline:
    with torch.device("meta"):
        return Outline(ModelConfig(partial_pretrain="x", **settings), AutoModelForCausalLM.from_config(config()))


def test_its_micro_batches_are_no_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels read the lengths of the documents on the host."""
    outline = outline_of(compile=True)
    found = decide(outline, gpu(None), RUN, choose_spread(outline, gpu(None)))
    assert found.path.packed and found.compiled and found.graph_tokens == 0 and found.rule is not None and found.rule.refused is None
    outline.path = PACKED_PATH
    assert decide(outline, gpu(None), RUN, choose_spread(outline, gpu(None))).graph_tokens > 0


def test_a_document_of_such_a_model_is_not_split_over_processes() -> None:
    with pytest.raises(UserError, match="carry a state from token to token"):
        choose_path(config(), "here", context_size=2)


# --- models


def batch_of(lengths: tuple[int, ...] = (70, 3, 130)) -> Batch:
    return collate(probe_documents(512, lengths), range(len(lengths)), multiple_of_tokens=8)


def loss_and_gradients(model: Any, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    engine = Engine(TokenScorer(model), OptimConfig(), total_steps=1, device=CPU, compute_dtype=torch.float32)
    loss = engine.backward(batches, sft)["loss"].item()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


def one_by_one() -> list[Batch]:
    return [collate([document], [index]) for index, document in enumerate(probe_documents(512, (70, 3, 130)))]


def check_equal(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-5 * largest, msg=name)


def test_a_model_on_the_package_gives_of_packed_documents_what_it_gives_of_each_alone(install: Install) -> None:
    bounds = install(per_document)
    expected = loss_and_gradients(model_of(), one_by_one())
    assert not bounds  # none was chosen
    use_rule(RuleChoice(RULE))
    check_equal(loss_and_gradients(model_of(), [batch_of()]), expected)
    assert all(found is not None and found.tolist()[:4] == [0, 70, 73, 203] for found in bounds) and bounds


@pytest.mark.parametrize("leak", ["convolution", "rule"])
def test_what_one_document_lets_into_the_next_would_be_seen(leak: str, install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(leaky if leak == "rule" else per_document)
    use_rule(RuleChoice(RULE))
    expected = loss_and_gradients(model_of(), one_by_one())
    if leak == "convolution":
        monkeypatch.setattr(modeling_qwen3_5, "causal_conv1d_fn", modeling_qwen3_5.causal_conv1d_fn.replaced)
    with pytest.raises(AssertionError):
        check_equal(loss_and_gradients(model_of(), [batch_of()]), expected)


def test_a_convolution_that_knows_no_documents_is_refused_by_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_qwen3_5, "causal_conv1d_fn", getattr(modeling_qwen3_5.causal_conv1d_fn, "replaced", None))
    monkeypatch.setattr("verl.engine.trial.keep_documents_apart", lambda model: None)
    path = choose_path(config(rms_norm_eps=1e-4), "here")
    assert not path.packed and "Qwen3_5GatedDeltaNet carries its state into the next document" in path.why


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_compiled_and_recomputed_layers_give_the_same(checkpointing: str, install: Install) -> None:
    install(per_document)
    use_rule(RuleChoice(RULE))
    expected = loss_and_gradients(model_of(), [batch_of()])
    torch._dynamo.reset()
    model = model_of()
    if checkpointing != "none":
        recompute_activations(model, selective=checkpointing == "selective")
    compile_layers(model, backend="aot_eager")
    check_equal(loss_and_gradients(model, [batch_of()]), expected)
    assert counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()
