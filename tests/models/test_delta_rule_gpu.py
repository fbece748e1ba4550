"""Delta rules on a GPU by flash-linear-attention: packed documents beside each alone, in bfloat16, and beside the model's own code."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextTopKRouter

from verl.algorithms import sft
from verl.config.shared import OptimConfig
from verl.data.pack import collate
from verl.engine.decisions import choose_rule
from verl.engine.engine import Engine
from verl.engine.hardware import measure
from verl.engine.layers import compile_layers, recompute_activations
from verl.engine.scorers import TokenScorer
from verl.engine.trial import check_scorer, choose_path, probe_documents
from verl.models.attention import delta_rule
from verl.models.attention.delta_rule import RuleChoice, refusal, use_rule
from verl.models.load import load_for_training, read_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("device"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]

SIZES: dict[str, Any] = dict(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
EXPERTS: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, shared_expert_intermediate_size=64)
# With the largest relative difference of gradients: in bfloat16, some tokens choose other experts.
MODELS: dict[str, tuple[Any, PretrainedConfig, float]] = {
    "qwen3.5": (Qwen3_5ForCausalLM, Qwen3_5TextConfig(**SIZES), 0.05),
    "qwen3-next": (Qwen3NextForCausalLM, Qwen3NextConfig(**SIZES, **EXPERTS), 0.15),
}
DOCUMENTS = probe_documents(4096, (300, 1, 65, 700, 2, 64, 129))


@pytest.fixture(params=MODELS)
def model_path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model whose states last for many tokens."""
    kind, config, _ = MODELS[request.param]
    torch.manual_seed(0)
    model = kind(config)
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.data.fill_(-4)
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def kernels(model_path: Path, device: torch.device) -> RuleChoice:
    choice = choose_rule(choose_path(read_config(str(model_path)), str(model_path)).rule, measure(device), torch.bfloat16)
    if choice.refused is not None:
        pytest.skip(choice.describe())
    use_rule(choice)
    return choice


def scorer_of(path: Path, device: torch.device, dtype: torch.dtype) -> TokenScorer:
    return TokenScorer(load_for_training(str(path), device=device, dtype=dtype).model)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def loss_and_gradient(scorer: TokenScorer, groups: list[list[int]], device: torch.device, dtype: torch.dtype) -> tuple[float, Tensor]:
    engine = Engine(scorer, OptimConfig(), total_steps=1, device=device, compute_dtype=dtype)
    batches = [collate([DOCUMENTS[i] for i in rows], rows, multiple_of_tokens=128 if len(rows) > 1 else 1) for rows in groups]
    loss = engine.backward(batches, sft)["loss"].item()
    return loss, torch.cat([p.grad.float().flatten() for p in engine.trained if p.grad is not None])


PACKED, ALONE = [list(range(len(DOCUMENTS)))], [[i] for i in range(len(DOCUMENTS))]


class Routes:
    """The experts that each router chose for the tokens of a packed batch, given to the same tokens in another batch.

    In bfloat16, rounding moves a token to other experts where two of them are nearly even. That is a step of the
    model itself, not an error of packing, so documents are compared with the same experts.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.chosen: dict[str, Tensor] = {}
        self.first: int | None = None  # of the tokens that are scored now; None while the choices are noted
        self.others = 0
        for name, module in model.named_modules():
            if isinstance(module, Qwen3NextTopKRouter):
                module.register_forward_hook(lambda router, _, output, name=name: self._route(name, router, output))

    def _route(self, name: str, router: Qwen3NextTopKRouter, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, experts = output
        if self.first is None:
            self.chosen[name] = experts
            return output
        noted = self.chosen[name][self.first : self.first + len(experts)]
        self.others += int((noted.sort().values != experts.sort().values).any(-1).sum())
        weights = logits.float().softmax(-1).gather(-1, noted)
        return logits, (weights / weights.sum(-1, keepdim=True)).to(logits.dtype), noted


@torch.no_grad()
def test_log_probabilities_of_packed_documents_are_those_of_each_alone(kernels: RuleChoice, model_path: Path, device: torch.device) -> None:
    scorer = scorer_of(model_path, device, torch.bfloat16).eval()
    routes = Routes(scorer.model)
    packed_M = scorer(collate(DOCUMENTS, PACKED[0], multiple_of_tokens=128).to(device)).logprob_M
    alone, first = [], 0
    for document in DOCUMENTS:
        routes.first = first
        first += len(document[0])
        if len(document[0]) > 1:
            alone.append(scorer(collate([document], [0]).to(device)).logprob_M)
    difference = float((packed_M - torch.cat(alone)).abs().max())
    print(f"largest difference of log-probabilities, packed and alone: {difference:.2g}; choices of other experts: {routes.others}")
    assert difference <= 1e-2
    use_rule(RuleChoice(kernels.rule, "to compare"))
    routes.first = 0
    own_M = scorer(collate(DOCUMENTS, PACKED[0], multiple_of_tokens=128).to(device)).logprob_M
    assert float((packed_M - own_M).abs().max()) <= 5e-2


@pytest.mark.parametrize("layers", ["eager", "compiled", "compiled, checkpointed", "compiled, selective"])
def test_loss_and_gradient_are_those_of_the_models_own_code_on_each_document(
    layers: str, kernels: RuleChoice, model_path: Path, device: torch.device
) -> None:
    use_rule(RuleChoice(kernels.rule, "to compare"))
    expected, gradient = loss_and_gradient(scorer_of(model_path, device, torch.float32), ALONE, device, torch.float32)
    use_rule(kernels)
    scorer = scorer_of(model_path, device, torch.float32)
    if "checkpointed" in layers or "selective" in layers:
        recompute_activations(scorer.model, selective="selective" in layers)
    if "compiled" in layers:
        compile_layers(scorer.model)
    loss, found = loss_and_gradient(scorer, PACKED, device, torch.bfloat16)
    print(f"{layers}: loss {loss:.5f} and {expected:.5f}, relative difference of the gradients {relative(found, gradient):.2g}")
    assert abs(loss - expected) <= 1e-2
    limit = next(limit for kind, _, limit in MODELS.values() if isinstance(scorer.model, kind))
    assert relative(found, gradient) <= limit


def test_a_kernel_that_ignores_the_bounds_is_seen(kernels: RuleChoice, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    real = delta_rule._call
    monkeypatch.setattr(delta_rule, "_call", lambda *args, cu_seqlens=None, **options: real(*args, **options))
    found = refusal(kernels.rule, device, torch.bfloat16)
    assert found is not None and "differs from the model's own code" in found


def test_the_check_before_training_holds_in_float32(model_path: Path, device: torch.device) -> None:
    """Without the package too: a GPU in float32 computes by the model's own code."""
    check_scorer(scorer_of(model_path, device, torch.float32))
