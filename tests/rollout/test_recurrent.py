"""The native engine on models that carry a state from token to token: delta rules and short convolutions."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from served import random_prompts
from tiny import VOCABULARY, sharp
from transformers import (
    KimiLinearConfig,
    KimiLinearForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    OlmoHybridConfig,
    OlmoHybridForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

from verl.data.pack import collate
from verl.engine.scorers import TokenScorer
from verl.errors import UserError
from verl.models.attention.packed import PACKED
from verl.rollout import Completion, Options, Sampling, auto
from verl.rollout.hf import HfRollout
from verl.rollout.native import NativeRollout, recurrent
from verl.rollout.native.attention import RecurrentShape, StateCache
from verl.rollout.native.runner import Runner
from verl.rollout.native.scheduler import Scheduler
from verl.rollout.native.slots import Slots

# The package says that it is slow without its kernels.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

HANDS_ON = "kwargs" in inspect.signature(Lfm2ShortConv.forward).parameters
PROMPTS = [*(random_prompts()[i] for i in (0, 1, 2, 5)), [7]]  # 3, 11, 1, 30 and 1 tokens
GREEDY, DRAWN = Sampling(8), Sampling(8, temperature=1.0, n=2)
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512
)
IDS: dict[str, Any] = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
RULE: dict[str, Any] = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16)
HYBRID: dict[str, Any] = {"num_hidden_layers": 3, "layer_types": ["linear_attention", "linear_attention", "full_attention"]}
EXPERTS: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32)
KIMI: dict[str, Any] = dict(
    linear_num_heads=4,
    linear_head_dim=16,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    num_local_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
)
FAMILIES: dict[str, tuple[type[PreTrainedModel], PretrainedConfig]] = {
    "qwen3.5": (Qwen3_5ForCausalLM, Qwen3_5TextConfig(**SIZES, **IDS, **RULE, **HYBRID, head_dim=16)),
    "qwen3-next": (Qwen3NextForCausalLM, Qwen3NextConfig(**SIZES, **IDS, **RULE, **HYBRID, **EXPERTS, head_dim=16)),
    "olmo hybrid": (OlmoHybridForCausalLM, OlmoHybridConfig(**SIZES, **IDS, **{**RULE, "linear_num_value_heads": 2}, **HYBRID)),
    "kimi linear": (KimiLinearForCausalLM, KimiLinearConfig(**{**SIZES, "num_key_value_heads": 4}, **IDS, **HYBRID, **KIMI)),
    "lfm2": (Lfm2ForCausalLM, Lfm2Config(**SIZES, **IDS, num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"])),
    "lfm2, no attention": (Lfm2ForCausalLM, Lfm2Config(**SIZES, **IDS, num_hidden_layers=2, layer_types=["conv", "conv"])),
}


def model_of(family: str) -> PreTrainedModel:
    """A model whose states last for many tokens."""
    if family.startswith("lfm2") and not HANDS_ON:
        pytest.skip("this release of transformers does not hand the arguments of packed texts on to the convolutions of LFM2")
    model = sharp(*FAMILIES[family])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.fill_(-4)
    return model


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


@torch.no_grad()
def difference(model: PreTrainedModel, prompts: list[list[int]], answers: list[Completion], sampling: Sampling) -> float:
    """How far log-probabilities are from those of the plain model, on one text alone. A greedy token that it would not take counts 1."""
    worst, n = 0.0, len(answers) // len(prompts)
    plain: Any = type(model)(model.config).eval()
    plain.load_state_dict(model.state_dict())
    plain.set_attn_implementation("eager")
    for number, answer in enumerate(answers):
        prompt = prompts[number // n]
        logits_GV = plain(input_ids=torch.tensor([[*prompt, *answer.token_ids]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        logprob_GV, token_G = logits_GV.log_softmax(-1), torch.tensor(answer.token_ids)
        found_G = torch.tensor(answer.logprobs)
        worst = max(worst, float((logprob_GV.gather(1, token_G[:, None]).squeeze(1) - found_G).abs().max()))
        if sampling.temperature == 0 and not torch.equal(logprob_GV.argmax(-1), token_G):
            worst = 1.0
    return worst


def states_of(slots: Slots) -> list[torch.Tensor]:
    return [state_S for layer in slots.layers if isinstance(layer, StateCache) for state_S in layer if state_S is not None]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_the_plain_model(family: str) -> None:
    """Greedy and sampled, prompts of different lengths and of one token, fewer slots than requests, answers of different lengths."""
    model, prompts = model_of(family), PROMPTS
    rollout = auto.choose(model, list(range(64)), Options(max_sequences=4), is_shared=False)
    assert isinstance(rollout, NativeRollout)
    for sampling in (GREEDY, DRAWN):
        answers = rollout.generate(prompts, sampling)
        assert difference(model, prompts, answers, sampling) < 1e-5
    assert len({len(answer.token_ids) for answer in answers}) > 1


def test_greedy_answers_are_those_of_transformers_own_generation() -> None:
    model = model_of("qwen3.5")
    expected = HfRollout(model, [0]).generate(PROMPTS, GREEDY)
    found = NativeRollout(model, [0]).generate(PROMPTS, GREEDY)
    assert tokens(found) == tokens(expected)


def wrong_answers() -> float:
    """The difference of sampled answers in slots that are used again and again."""
    model = model_of("qwen3.5")
    answers = NativeRollout(model, [0], Options(max_sequences=1)).generate(PROMPTS, DRAWN)
    return difference(model, PROMPTS, answers, DRAWN)


def test_a_state_that_the_last_answer_left_in_a_slot_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of slots that start afresh: a prompt of one token is not prefilled."""
    monkeypatch.setattr(Slots, "clear_states", lambda *_: None)
    assert wrong_answers() > 1e-2


def test_a_prompt_that_is_taken_from_a_slot_that_went_on_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of prompts that are computed again: keys and values of a prompt stay in a slot, its state does not."""
    init = Scheduler.__init__
    monkeypatch.setattr(Scheduler, "__init__", lambda *args, keeps_prompts=True, **options: init(*args, **options))
    assert wrong_answers() > 1e-2


def test_requests_that_start_together_share_the_state_of_their_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    prefill = Runner.prefill
    monkeypatch.setattr(Runner, "prefill", lambda self, batch, slots: (seen.extend(p.prompt for p in batch), prefill(self, batch, slots)))
    model = model_of("qwen3.5")
    rollout = NativeRollout(model, [0])
    seen.clear()  # the probes of the check when the engine is made
    answers = rollout.generate(PROMPTS, DRAWN)
    assert difference(model, PROMPTS, answers, DRAWN) < 1e-5
    assert sorted(seen) == sorted(tuple(prompt) for prompt in PROMPTS if len(prompt) > 1)


def test_states_stay_where_they_are_so_that_a_cuda_graph_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    places: set[tuple[int, ...]] = set()
    decode = Runner.decode

    def watched(self: Runner, slots: Slots, *others: Any) -> None:
        decode(self, slots, *others)
        places.add(tuple(state_S.data_ptr() for state_S in states_of(slots)))

    rollout = NativeRollout(model_of("qwen3.5"), [0], Options(max_sequences=4))
    monkeypatch.setattr(Runner, "decode", watched)
    rollout.generate(PROMPTS, DRAWN)
    assert len(places) == 1 and len(next(iter(places))) == 4


def test_log_probabilities_are_those_of_the_trainer_after_an_update() -> None:
    model, prompts = model_of("qwen3.5"), [prompt for prompt in PROMPTS if len(prompt) > 1]
    rollout = NativeRollout(model, [0], is_shared=True)
    for version in (1, 2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        rollout.update_weights([], version)
        answers = rollout.generate(prompts, DRAWN)
        found = torch.tensor([x for answer in answers for x in answer.logprobs or []])
        assert (found - trainer_logprobs(model, prompts, answers)).abs().max() < 1e-5


def trainer_logprobs(model: PreTrainedModel, prompts: list[list[int]], answers: list[Completion]) -> torch.Tensor:
    own, n = model.config._attn_implementation, len(answers) // len(prompts)
    model.set_attn_implementation(PACKED)
    texts = [(prompts[i // n], answer.token_ids) for i, answer in enumerate(answers)]
    documents = [(np.array([*p, *a], dtype=np.int32), np.arange(len(p) + len(a)) >= len(p)) for p, a in texts]
    with torch.no_grad():
        found = TokenScorer(model)(collate(documents, list(range(len(documents))))).logprob_M
    model.set_attn_implementation(own)
    return found


def test_in_half_precision_the_check_holds() -> None:
    model = model_of("qwen3.5").to(torch.bfloat16)  # type: ignore[arg-type]
    rollout = NativeRollout(model, [0], Options(max_sequences=4))
    shapes = [shape for shape in rollout.runner.shapes if isinstance(shape, RecurrentShape)]
    assert [(shape.convolution.dtype, shape.rule.dtype) for shape in shapes if shape.convolution and shape.rule] == [
        (torch.bfloat16, torch.float32)
    ] * 2
    assert difference(model, PROMPTS, rollout.generate(PROMPTS, DRAWN), DRAWN) < 0.3


def test_a_stream_of_tokens_is_the_answer_and_training_finds_the_model_as_it_was() -> None:
    model: Any = model_of("lfm2")
    rollout, heard = NativeRollout(model, [0], is_shared=True), list[int]()
    text = torch.tensor([PROMPTS[0]])
    before = model(input_ids=text).logits
    completion = rollout.stream_tokens(PROMPTS[2], GREEDY, heard.append)
    assert heard == completion.token_ids and [completion] == rollout.generate(PROMPTS[2:3], GREEDY)
    rollout.sleep()
    assert rollout.slots.size is None and not rollout.slots.layers
    assert rollout.generate(PROMPTS[2:3], GREEDY) == [completion]
    assert torch.equal(model(input_ids=text).logits, before)


def test_a_state_that_decoding_does_not_hand_on_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check when the engine is made, with each of the two states lost between prefill and decoding."""
    store = recurrent._store
    for lost in ("convolution", "rule"):

        def forget(cache: Any, name: str, *others: Any, lost: str = lost) -> None:
            if name != lost or not isinstance(cache, StateCache):
                store(cache, name, *others)

        monkeypatch.setattr(recurrent, "_store", forget)
        with pytest.raises(UserError, match=r"Qwen3_5ForCausalLM cannot be run by the native engine: log-probabilities differ"):
            NativeRollout(model_of("qwen3.5"), [0])


@pytest.mark.skipif(HANDS_ON, reason="this release of transformers hands them on")
def test_a_convolution_that_is_not_given_the_arguments_of_its_layer_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"Lfm2ForCausalLM cannot be run by the native engine: it has other decode state"):
        NativeRollout(sharp(*FAMILIES["lfm2"]), [0])


def test_a_layer_with_two_states_of_a_kind_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    convolve = recurrent.SlotState.convolve
    monkeypatch.setattr(
        recurrent.SlotState,
        "convolve",
        lambda self, *args, **options: (convolve(self, *args, **options), convolve(self, *args, **options))[1],
    )
    with pytest.raises(UserError, match=r"Lfm2ForCausalLM cannot be run by the native engine: it has other decode state"):
        NativeRollout(model_of("lfm2"), [0])


def test_the_last_inputs_of_a_prompt_shorter_than_the_convolution_begin_with_zeros() -> None:
    hidden_CT, bounds = torch.arange(1.0, 15.0).view(2, 7), torch.tensor([0, 1, 6, 7])
    assert recurrent._last_inputs(hidden_CT, bounds, 3).tolist() == [
        [[0, 0, 1], [0, 0, 8]],
        [[4, 5, 6], [11, 12, 13]],
        [[0, 0, 7], [0, 0, 14]],
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu_the_same_holds_with_cuda_graphs(family: str, compiles: bool) -> None:
    model = model_of(family).to("cuda")  # type: ignore[arg-type]
    rollout = NativeRollout(model, [0], Options(max_sequences=6, compile=compiles))
    # In float32, the grouped product of experts copies from the host.
    assert (rollout.runner.why_eager is not None) == (family in ("qwen3-next", "kimi linear"))
    for sampling in (GREEDY, DRAWN):
        expected = HfRollout(model, [0]).generate(PROMPTS, sampling)
        found = rollout.generate(PROMPTS, sampling)
        assert bool(rollout.runner._graphs) == (rollout.runner.why_eager is None)
        assert tokens(found) == tokens(expected)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=1e-4, rtol=0)
