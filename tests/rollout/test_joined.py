"""What the native engine computes once: query, key and value as one product, and prompts that are in the slots already."""

from typing import Any

import pytest
import torch
from served import random_prompts
from tiny import qwen2_config, sharp
from transformers import PreTrainedModel, Qwen2ForCausalLM

import verl.rollout.native.runner as runner_module
from verl.models import linear
from verl.rollout import Completion, Sampling
from verl.rollout.native import NativeRollout
from verl.rollout.native.joined import join_linears
from verl.rollout.native.runner import Runner

GREEDY, DRAWN = Sampling(12), Sampling(8, temperature=1.0, n=2)


def qwen2() -> PreTrainedModel:
    return sharp(Qwen2ForCausalLM, qwen2_config())


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


@pytest.fixture
def plain_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "is_faster", lambda: False)


def joined(model: PreTrainedModel) -> NativeRollout:
    """An engine with joined layers, as on a GPU."""
    rollout = NativeRollout(model, [0])
    rollout.runner._joined = join_linears(rollout.runner._layers)
    assert len(rollout.runner._joined) == model.config.num_hidden_layers
    return rollout


@pytest.mark.usefixtures("plain_linears")
@pytest.mark.parametrize("bias", [True, False])
def test_joined_layers_give_the_same_answers(bias: bool) -> None:
    model: Any = qwen2()
    if not bias:
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(layer.self_attn, name).bias = None
    prompts = random_prompts()
    for sampling in (GREEDY, DRAWN):
        expected, found = NativeRollout(model, [0]).generate(prompts, sampling), joined(model).generate(prompts, sampling)
        assert tokens(found) == tokens(expected)
        for one, other in zip(found, expected, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.usefixtures("plain_linears")
def test_joined_layers_follow_weights_that_change_without_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = qwen2()
    rollout, prompts = joined(model), random_prompts()
    rollout.generate(prompts, GREEDY)
    rollout.update_weights([(name, 3 * p.detach()) for name, p in model.named_parameters() if ".q_proj." in name], 1)
    expected = NativeRollout(model, [0]).generate(prompts, GREEDY)
    assert tokens(rollout.generate(prompts, GREEDY)) == tokens(expected)
    monkeypatch.setattr(Runner, "refresh", lambda self: None)
    model.model.layers[0].self_attn.q_proj.weight.data *= -3
    rollout.update_weights((), 2)
    assert tokens(rollout.generate(prompts, GREEDY)) != tokens(NativeRollout(model, [0]).generate(prompts, GREEDY))


def test_layers_that_are_not_plain_are_not_joined() -> None:
    model: Any = qwen2()
    attention = model.model.layers[0].self_attn
    attention.q_proj.register_forward_hook(lambda module, args, output: output * 2)
    model.model.layers[1].self_attn.k_proj = torch.nn.Sequential(model.model.layers[1].self_attn.k_proj)
    for module in model.modules():
        module.__dict__.pop("forward", None)
    assert len(join_linears(model.model.layers)) == model.config.num_hidden_layers - 2


@pytest.mark.usefixtures("plain_linears")
def test_compiled_layers_take_joined_layers_and_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = qwen2()
    prompts, compiled = random_prompts(), list[int]()
    expected = NativeRollout(model, [0]).generate(prompts, DRAWN)
    rollout = joined(model)

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(sum("prefill_attention" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    rollout.runner._fast_layer = torch.compile(runner_module._run_layer, fullgraph=True, dynamic=True, backend=backend)
    monkeypatch.setattr(runner_module, "COMPILED_PROMPTS", 1)
    assert tokens(rollout.generate(prompts, DRAWN)) == tokens(expected)
    assert 1 in compiled and 0 in compiled  # prompts, and decode steps
    graphs = len(compiled)
    assert tokens(rollout.generate(prompts[:3], DRAWN)) == tokens(expected[:6]) and len(compiled) <= graphs + 1


def test_prompts_in_the_slots_are_not_computed_again_until_the_weights_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = qwen2()
    prompts, computed = [*random_prompts(), [1, 2, 3]], list[int]()
    prefill = Runner.prefill
    monkeypatch.setattr(Runner, "prefill", lambda self, batch, slots: (computed.append(len(batch)), prefill(self, batch, slots)))
    for is_shared in (False, True):
        rollout = NativeRollout(model, [0], is_shared=is_shared)
        first = rollout.generate(prompts, DRAWN)
        computed.clear()
        rollout.generate(prompts[::-1], DRAWN)
        found = rollout.generate(prompts, DRAWN)
        assert tokens(found) == tokens(first)
        assert bool(computed) == is_shared
        rollout.update_weights((), 1)
        computed.clear()
        rollout.generate(prompts, GREEDY)
        assert computed


def test_a_prefill_that_fails_leaves_no_prompt_that_counts_as_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    rollout, prompts = NativeRollout(qwen2(), [0]), random_prompts()
    expected, prefill = rollout.generate(prompts, GREEDY), Runner.prefill
    rollout.update_weights((), 1)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "prefill", stop)
    with pytest.raises(KeyboardInterrupt):
        rollout.generate(prompts, GREEDY)
    monkeypatch.setattr(Runner, "prefill", prefill)
    assert tokens(rollout.generate(prompts, GREEDY)) == tokens(expected)
