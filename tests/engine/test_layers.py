"""Compiled layers, traced on the CPU with an attention that a graph can hold, as FlashAttention on a GPU is."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_forked
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from tiny import RandomDocuments, qwen2_config, write_model
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.fx import GraphModule
from transformers import AttentionInterface

from verl import dist
from verl.algorithms import sft
from verl.config.shared import OptimConfig
from verl.data.loader import Loader, Packing
from verl.engine.engine import Engine
from verl.engine.layers import Compiler, compile_layers, decoder_layers, recompute_activations
from verl.engine.scorers import TokenScorer
from verl.models.attention.packed import PACKED, packed_attention
from verl.models.load import load_for_training

# Of PyTorch's own making, while it traces and when its compiler is first imported.
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
LAYERS = 2


@torch.library.custom_op("verl_test::flash_attention", mutates_args=())
def opaque_attention(query_1TND: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    return query_1TND.clone()


opaque_attention.register_fake(lambda query_1TND, cu_seqlens, max_seqlen: torch.empty_like(query_1TND))
opaque_attention.register_autograd(lambda context, gradient: (gradient, None, None))


def traceable(
    module: object,
    query_1NTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    mask: None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[Tensor, None]:
    others_1NTD = (key_1KTD * value_1KTD).repeat_interleave(query_1NTD.shape[1] // key_1KTD.shape[1], 1)
    return opaque_attention((query_1NTD * others_1NTD).transpose(1, 2).contiguous(), cu_seq_lens_q, max_length_q), None


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), qwen2_config(num_hidden_layers=LAYERS))


@pytest.fixture(autouse=True)
def process() -> Iterator[torch.device]:
    torch._dynamo.reset()
    counters.clear()
    AttentionInterface.register(PACKED, traceable)
    yield dist.start()
    AttentionInterface.register(PACKED, packed_attention)
    dist.stop()


def train(model_path: Path, backend: Any, *, checkpointing: bool | str = False) -> list[int]:
    """Graphs that have been compiled after each of a few steps of different sizes."""
    model = load_for_training(str(model_path)).model
    if checkpointing:
        recompute_activations(model, selective=checkpointing == "selective")
    compile_layers(model, backend=backend)
    engine = Engine(TokenScorer(model), OptimConfig(), total_steps=50, device=torch.device("cpu"), compute_dtype=torch.float32)
    graphs = []
    for packing, steps in ((Packing(8, 480, 96), 2), (Packing(8, 200, 96), 4)):
        for step in Loader(RandomDocuments(100), packing, rows_per_step=8, seed=1).steps(0, steps):
            engine.train_step(step.micro_batches, sft, step.number)
            graphs.append(counters["stats"]["unique_graphs"])
    return graphs


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
def test_all_layers_and_all_sizes_share_one_graph_without_breaks(checkpointing: bool | str, model_path: Path) -> None:
    assert set(train(model_path, "aot_eager", checkpointing=checkpointing)) == {1}
    assert not counters["graph_break"]


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
def test_a_layers_numbers_are_constants_and_no_tensors(checkpointing: bool | str, model_path: Path) -> None:
    shapes: list[tuple[int, ...]] = []

    def look(graph: GraphModule, inputs: Sequence[Any]) -> Any:
        shapes.extend(tuple(x.shape) for x in inputs if isinstance(x, Tensor))
        return make_boxed_func(graph.forward)

    train(model_path, aot_autograd(fw_compiler=look), checkpointing=checkpointing)
    assert shapes and () not in shapes


def test_each_kind_of_checkpointing_computes_as_many_products_again_as_it_says(model_path: Path) -> None:
    def products_in_backward(checkpointing: bool | str) -> int:
        found: Counter[str] = Counter()

        def count(graph: GraphModule, inputs: Sequence[Any]) -> Any:
            found.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
            return make_boxed_func(graph.forward)

        backend = aot_autograd(
            fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
            bw_compiler=count,
            partition_fn=min_cut_rematerialization_partition,
        )
        torch._dynamo.reset()
        train(model_path, backend, checkpointing=checkpointing)
        assert found["verl_test.flash_attention.default"] == (checkpointing is True)
        return found["aten.mm.default"] + found["aten.addmm.default"]

    gradients = 2 * 7  # of q, k, v, o, gate, up and down, by their input and by their weight
    assert products_in_backward(False) == gradients
    assert products_in_backward(True) == gradients + 6  # down's output is the layer's own, and is not needed
    assert gradients < products_in_backward("selective") <= gradients + 3


def test_layers_are_compiled_where_that_was_decided(model_path: Path) -> None:
    model = load_for_training(str(model_path)).model
    assert not Compiler(False, model).on
    assert not any(module._compiled_call_impl for module in model.modules())
    assert Compiler(True, model).on
    assert all(layer._compiled_call_impl for layer in decoder_layers(model))


def test_compiling_again_after_the_first_step_is_a_warning(model_path: Path) -> None:
    compiler = Compiler(True, load_for_training(str(model_path)).model)
    counters["stats"]["unique_graphs"] = 1
    assert "compiled the layers in" in str(compiler.note())
    assert compiler.note() is None
    counters["stats"]["unique_graphs"] = 2
    assert "warning" in str(compiler.note())


def test_a_first_step_that_compiled_nothing_is_a_warning(model_path: Path) -> None:
    compiler = Compiler(True, load_for_training(str(model_path)).model)
    assert "compiled none of the layers" in str(compiler.note())
    assert compiler.note() is None
    assert Compiler(False, load_for_training(str(model_path)).model).note() is None


OPERATOR = """
import torch
from verl.engine.layers import compile_layers

@torch.library.custom_op("verl::test_scale", mutates_args=())
def scale(x: torch.Tensor) -> torch.Tensor:
    return 2 * x

@torch.library.custom_op("verl::test_scale_backward", mutates_args=())
def backward({parameters}) -> torch.Tensor:
    return 2 * gradient

scale.register_fake(torch.empty_like)
backward.register_fake(lambda gradient, x: torch.empty_like(gradient))
scale.register_autograd(
    lambda context, gradient: backward(gradient, {argument}),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)

class Layer(torch.nn.Module):
    def forward(self, x):
        return scale(x)

class Model(torch.nn.Module):
    _no_split_modules = ["Layer"]

    def __init__(self):
        super().__init__()
        self.layer = Layer()

model, x = Model(), torch.ones(3, requires_grad=True)
compile_layers(model)
model.layer(x).sum().backward()
print(x.grad.tolist())
"""


def test_code_that_another_release_compiled_is_not_used_if_an_operator_changed(tmp_path: Path) -> None:
    """PyTorch finds compiled code by the forward graph, in which an operator of the backward pass does not occur."""
    for parameters, argument in (
        ("gradient: torch.Tensor, x: torch.Tensor", "context.saved_tensors[0]"),
        ("gradient: torch.Tensor, x: list[torch.Tensor]", "list(context.saved_tensors)"),
    ):
        (tmp_path / "operator_in_a_layer.py").write_text(OPERATOR.format(parameters=parameters, argument=argument))
        done = run_forked(tmp_path / "operator_in_a_layer.py", folder=tmp_path, env={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
        assert done.returncode == 0 and "[2.0, 2.0, 2.0]" in done.stdout, done.stderr[-2000:]
