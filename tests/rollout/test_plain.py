"""Every engine against the plain model: eager attention, one text alone, no cache. What is not equal is refused, or another way taken."""

import contextlib
from typing import Any

import pytest
import torch
from tiny import sharp
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MBartConfig,
    MBartForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.mistral import modeling_mistral

from verl.errors import UserError
from verl.rollout import Options, Rollout, Sampling, _plain, auto
from verl.rollout import hf as rollout_hf
from verl.rollout.hf import HfRollout, Way
from verl.rollout.native import NativeRollout

VOCABULARY = 160
SIZES: dict[str, Any] = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
HEADS: dict[str, Any] = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512)
IDS: dict[str, Any] = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
MAMBA: dict[str, Any] = dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=16)
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 5.0, 9.0]}
PHI3 = Phi3Config(**SIZES, **HEADS, **IDS, original_max_position_embeddings=32, rope_parameters=LONGROPE)
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}

# What the native engine cannot run, and the way that transformers' own code takes.
OTHERS: dict[str, tuple[type[PreTrainedModel], PretrainedConfig, Way]] = {
    "capped logits": (Gemma2ForCausalLM, Gemma2Config(**SIZES, **HEADS, **IDS, sliding_window=16), Way("eager", "padded")),
    "a mixer beside attention": (FalconH1ForCausalLM, FalconH1Config(**SIZES, **HEADS, **IDS, **MAMBA), Way("sdpa", "padded")),
    "no attention": (MambaForCausalLM, MambaConfig(**SIZES, **IDS, state_size=8), Way("eager", "padded")),
    "alibi": (BloomForCausalLM, BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **IDS), Way("sdpa", "padded")),
    "positions counted from the padding": (
        MBartForCausalLM,
        MBartConfig(
            vocab_size=VOCABULARY, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64, is_decoder=True, **IDS
        ),
        Way("sdpa", "equal"),
    ),
}


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, VOCABULARY - 1, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def plain(model: Any, text: list[int]) -> torch.Tensor:
    """Log-probabilities of the next token after each of a text, from the plain model of the same weights."""
    copy = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    copy.set_attn_implementation("eager")
    return copy(input_ids=torch.tensor([text]), use_cache=False).logits[0].log_softmax(-1)


def difference(model: PreTrainedModel, rollout: Rollout, prompts: list[list[int]], new_tokens: int = 8) -> float:
    """How far log-probabilities of drawn tokens are from the plain model's; a greedy token that is not its first choice counts as 1."""
    worst = 0.0
    for sampling in (Sampling(new_tokens), Sampling(new_tokens, temperature=1.0)):
        for prompt, answer in zip(prompts, rollout.generate(prompts, sampling), strict=True):
            for number, (token, logprob) in enumerate(zip(answer.token_ids, answer.logprobs or [], strict=True)):
                expected_V = plain(model, [*prompt, *answer.token_ids[:number]])[-1]
                worst = max(worst, abs(float(expected_V[token]) - logprob))
                if sampling.temperature == 0 and expected_V[token] < expected_V.max() - 1e-4:
                    worst = 1.0
    return worst


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_native_engine_cannot_run_is_refused_and_generated_exactly_by_transformers_own_code(name: str) -> None:
    kind, config, way = OTHERS[name]
    model, prompts = sharp(kind, config), prompts_of(5, 40, 25, 40, 1)
    with pytest.raises(UserError, match=rf"{kind.__name__} cannot be run by the native engine: .*\n.*rollout\.name=auto") as caught:
        NativeRollout(model, [VOCABULARY])
    rollout = auto.choose(model, [0], Options(), is_shared=False)
    assert isinstance(rollout, HfRollout) and rollout.way == way
    assert caught.value.what in rollout.describe()
    assert difference(model, rollout, prompts) < 1e-5


def test_where_native_is_exact_it_is_the_default() -> None:
    model = sharp(MistralForCausalLM, MistralConfig(**SIZES, **HEADS, **IDS, sliding_window=16))
    rollout = auto.choose(model, [0], Options(), is_shared=False)
    assert isinstance(rollout, NativeRollout)
    assert difference(model, rollout, prompts_of(5, 40, 1)) < 1e-5


@pytest.fixture
def unheard_window(monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """A model whose window of 4,096 tokens is in its mask, but not in what its attention is told, as in PhiMoE."""
    own = modeling_mistral.MistralAttention.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        window, self.__dict__["config"] = self.config.sliding_window, self.config
        self.config.sliding_window = None
        try:
            return own(self, *args, **kwargs)
        finally:
            self.config.sliding_window = window

    monkeypatch.setattr(modeling_mistral.MistralAttention, "forward", forward)
    return sharp(MistralForCausalLM, MistralConfig(**SIZES, **HEADS, **IDS, sliding_window=4096))


def test_a_window_that_attention_does_not_hear_of_is_noticed_though_it_is_longer_than_the_probes(unheard_window: PreTrainedModel) -> None:
    with pytest.raises(UserError, match=r"log-probabilities differ by .* from those of the plain model"):
        NativeRollout(unheard_window, [0])
    assert unheard_window.config.sliding_window == 4096


def test_with_the_windows_as_they_are_it_would_not_be(unheard_window: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: probes shorter than the window."""
    monkeypatch.setattr(_plain, "small_windows", lambda _: contextlib.nullcontext())
    NativeRollout(unheard_window, [0])


def test_a_refused_model_is_left_as_it_was() -> None:
    model = sharp(Gemma2ForCausalLM, Gemma2Config(**SIZES, **HEADS, **IDS))
    text, attention = prompts_of(20), model.config._attn_implementation
    before = model(input_ids=torch.tensor(text)).logits
    with pytest.raises(UserError):
        NativeRollout(model, [0])
    assert torch.equal(model(input_ids=torch.tensor(text)).logits, before)
    assert model.config._attn_implementation == attention and all("forward" not in vars(layer) for layer in model.model.layers)


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC])
def test_a_short_prompt_beside_a_long_one_keeps_its_rotary_embeddings(rope: dict[str, Any]) -> None:
    """Prompts below, beyond and across the length at which the embeddings change."""
    if rope is LONGROPE:
        model = sharp(Phi3ForCausalLM, PHI3)
    else:
        model = sharp(LlamaForCausalLM, LlamaConfig(**{**SIZES, **HEADS, **IDS, "max_position_embeddings": 32}, rope_parameters=rope))
    prompts = prompts_of(5, 60, 30, 40, 60)
    with pytest.raises(UserError, match=r"beyond 32 tokens .* rotary embeddings are others(?s:.*)rollout\.name=auto or hf"):
        NativeRollout(model, [0]).generate(prompts, Sampling(8))
    rollout = auto.choose(model, [0], Options(), is_shared=True)
    assert difference(model, rollout, prompts) < 1e-5
    assert difference(model, rollout, prompts_of(5, 20), 6) < 1e-5
    assert isinstance(auto.choose(model, [0], Options(), is_shared=True), auto.ByLength), "the model is left as it was"


def test_padded_to_a_long_prompt_it_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the test above."""
    monkeypatch.setattr(rollout_hf, "rope_limit", lambda _: None)
    model = sharp(Phi3ForCausalLM, PHI3)
    assert difference(model, HfRollout(model, [0]), prompts_of(5, 60)) > 1e-3


def test_where_padding_changes_answers_equal_prompts_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    own, model = rollout_hf.pad_left, sharp(MistralForCausalLM, MistralConfig(**SIZES, **HEADS, **IDS))
    monkeypatch.setattr(rollout_hf, "pad_left", lambda batch, pad_token: (ids := own(batch, pad_token=pad_token)[0], torch.ones_like(ids)))
    rollout = HfRollout(model, [0])
    assert rollout.way == Way("sdpa", "equal") and "prompts of equal length together" in rollout.describe()
    assert difference(model, rollout, prompts_of(5, 40, 25, 40, 1)) < 1e-5


def test_where_no_cache_is_exact_the_plain_model_generates(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Any, **__: Any) -> Any:
        raise AttributeError("'NoneType' object has no attribute 'state'")

    monkeypatch.setattr(HfRollout, "_generate_batch", lost)
    model = sharp(MistralForCausalLM, MistralConfig(**SIZES, **HEADS, **IDS))
    rollout = HfRollout(model, [0])
    assert "one prompt at a time, without a cache" in rollout.describe()
    assert difference(model, rollout, prompts_of(5, 9)) < 1e-5
    heard: list[int] = []
    assert rollout.stream_tokens(prompts_of(5)[0], Sampling(4), heard.append).token_ids == heard


def test_a_model_that_transformers_cannot_run_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    model = sharp(MistralForCausalLM, MistralConfig(**SIZES, **HEADS, **IDS))
    monkeypatch.setattr(type(model), "forward", broken)
    with pytest.raises(UserError, match="MistralForCausalLM cannot generate: RuntimeError: mat1 and mat2"):
        auto.choose(model, [0], Options(), is_shared=False)
