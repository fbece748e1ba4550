"""The native engine against transformers' own generation, and against the engine that trains."""

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import compress
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from served import random_prompts
from tiny import VOCABULARY, qwen2_config, sharp
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from verl.data.pack import collate
from verl.engine.layers import compile_layers, recompute_activations
from verl.engine.scorers import TokenScorer
from verl.errors import UserError
from verl.models.adapters.operators import use_operators
from verl.models.attention.packed import PACKED
from verl.rollout import Completion, Options, Sampling
from verl.rollout.hf import HfRollout
from verl.rollout.native import NativeRollout, runner, slots
from verl.rollout.native.runner import Runner
from verl.rollout.native.scheduler import Scheduler
from verl.rollout.native.slots import Slots

GREEDY, DRAWN = Sampling(12), Sampling(12, temperature=1.0, n=3)
SHAPE: dict[str, Any] = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=9000,  # more than two blocks of the sampler
    max_position_embeddings=512,
)
EXPERTS: dict[str, Any] = dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
WINDOWS = {"num_hidden_layers": 4, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
FAMILIES: dict[str, tuple[type[PreTrainedModel], PretrainedConfig]] = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "llama, untied": (LlamaForCausalLM, LlamaConfig(**SHAPE, tie_word_embeddings=False)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=32)),
    "gemma3, windows": (Gemma3ForCausalLM, Gemma3TextConfig(**{**SHAPE, **WINDOWS}, head_dim=32)),
    "mistral, windows": (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=5)),
    "cohere, logits scaled": (CohereForCausalLM, CohereConfig(**SHAPE)),
    "gpt-neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**SHAPE)),
}


def qwen2(**changes: object) -> PreTrainedModel:
    return sharp(Qwen2ForCausalLM, qwen2_config(**changes))


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


def flat_logprobs(completions: list[Completion]) -> torch.Tensor:
    return torch.tensor([x for completion in completions for x in completion.logprobs])


def engine_logprobs(model: PreTrainedModel, prompts: list[list[int]], answers: list[Completion], temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities that the trainer's scorer gives the answers, packed."""
    own = model.config._attn_implementation
    model.set_attn_implementation(PACKED)
    n = len(answers) // len(prompts)
    texts = [(prompts[i // n], answer.token_ids) for i, answer in enumerate(answers)]
    documents = [(np.array([*p, *a], dtype=np.int32), np.arange(len(p) + len(a)) >= len(p)) for p, a in texts]
    scorer = TokenScorer(model)
    scorer.rule = replace(scorer.rule, factor=scorer.rule.factor / temperature)
    with torch.no_grad():
        found = scorer(collate(documents, list(range(len(documents))))).logprob_M
    model.set_attn_implementation(own)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_transformers_token_by_token(family: str) -> None:
    """Greedy and sampled, prompts of different lengths, fewer slots than requests."""
    model, prompts = sharp(*FAMILIES[family]), random_prompts()
    for sampling in (GREEDY, DRAWN, Sampling(8, temperature=1.3, n=2, top_k=50, top_p=0.8)):
        stop_ids = [tokens(HfRollout(model, [0]).generate(prompts[:1], sampling))[0][3], 0]
        expected = HfRollout(model, stop_ids).generate(prompts, sampling)
        found = NativeRollout(model, stop_ids, Options(max_sequences=3)).generate(prompts, sampling)
        assert tokens(found) == tokens(expected)
        assert [c.finish_reason for c in found] == [c.finish_reason for c in expected]
        torch.testing.assert_close(flat_logprobs(found), flat_logprobs(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("engine", [NativeRollout, HfRollout])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_answers_without_logprobs_are_the_same(engine: type, sampling: Sampling) -> None:
    rollout, prompts = engine(qwen2(), [0]), random_prompts()
    silent = rollout.generate(prompts, replace(sampling, logprobs=False))
    assert tokens(silent) == tokens(rollout.generate(prompts, sampling))
    if sampling == GREEDY:
        assert {answer.logprobs for answer in silent} == {None}


def test_sampled_answers_depend_on_the_seeds_alone() -> None:
    prompts, model = random_prompts(), qwen2()
    seeds = [7 * i for i in range(len(prompts))]
    whole = NativeRollout(model, [0]).generate(prompts, DRAWN, seeds)
    for i in (5, 2):
        alone = NativeRollout(model, [0]).generate(prompts[i : i + 1], DRAWN, seeds[i : i + 1])
        assert tokens(alone) == tokens(whole[3 * i : 3 * i + 3])
    assert len({tuple(x) for x in tokens(whole)}) == len(whole)
    other = NativeRollout(model, [0]).generate(prompts, replace(DRAWN, seed=2), seeds)
    assert tokens(other) != tokens(whole)


def test_log_probabilities_are_those_of_the_engine() -> None:
    """I6, with its known wrong ways: another temperature, stale weights."""
    prompts, model = random_prompts(), qwen2()
    rollout = NativeRollout(model, [0], Options(max_sequences=4), is_shared=True)
    for version in (1, 2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        rollout.update_weights([], version)
        for temperature in (1.0, 0.7):
            answers = rollout.generate(prompts, replace(DRAWN, temperature=temperature))
            assert {answer.version for answer in answers} == {version}
            found = flat_logprobs(answers)
            assert (found - engine_logprobs(model, prompts, answers, temperature)).abs().max() < 1e-5
            assert (found - engine_logprobs(model, prompts, answers, temperature * 1.01)).abs().max() > 1e-3
    stale = rollout.generate(prompts, DRAWN)
    with torch.no_grad():
        next(iter(model.parameters())).add_(0.05)
    assert (flat_logprobs(stale) - engine_logprobs(model, prompts, stale)).abs().max() > 1e-3


def test_weights_of_its_own_are_filled_by_name() -> None:
    prompts, trained, rollout = random_prompts(), qwen2(), NativeRollout(qwen2(), [0])
    for version in (1, 2, 3):
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        before = rollout.generate(prompts, GREEDY)
        assert (flat_logprobs(before) - engine_logprobs(trained, prompts, before)).abs().max() > 1e-3
        rollout.update_weights(trained.named_parameters(), version)
        after = rollout.generate(prompts, GREEDY)
        assert (flat_logprobs(after) - engine_logprobs(trained, prompts, after)).abs().max() < 1e-5
        assert {answer.version for answer in after} == {version}
    with pytest.raises(ValueError, match="is not a parameter"):
        rollout.update_weights([("model.nothing", torch.zeros(1))], 4)


def test_a_prompt_goes_through_the_model_once_for_all_answers_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, model = random_prompts(), qwen2()
    seen: list[Any] = []
    prefill = Runner.prefill
    monkeypatch.setattr(Runner, "prefill", lambda self, batch, slots: (seen.extend(p.prompt for p in batch), prefill(self, batch, slots)))
    expected = tokens(HfRollout(model, [0]).generate(prompts, DRAWN))
    for number in (24, 2):
        rollout = NativeRollout(model, [0], Options(max_sequences=number))
        seen.clear()  # the probes of the check when the engine is made
        assert tokens(rollout.generate(prompts, DRAWN)) == expected
        assert sorted(seen) == sorted(tuple(prompt) for prompt in prompts if len(prompt) > 1)
        seen.clear()


def test_without_the_copied_keys_and_values_answers_would_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of prefix sharing: a slot without the prompt's keys and values gives other answers."""
    prompts, model = random_prompts(), qwen2()
    expected = NativeRollout(model, [0], Options(max_sequences=2)).generate(prompts, DRAWN)
    monkeypatch.setattr(Slots, "copy", lambda *_: None)
    assert tokens(NativeRollout(model, [0], Options(max_sequences=2)).generate(prompts, DRAWN)) != tokens(expected)


def test_keys_and_values_of_old_weights_are_not_shared_after_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two answers to one prompt, one after the other in the same slot; the weights change in between."""
    prompt, trained = random_prompts()[:1], qwen2()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))

    def second_answer() -> Completion:
        rollout = NativeRollout(qwen2(), [0], Options(max_sequences=1))
        answers = rollout.stream(prompt, replace(DRAWN, n=2))
        next(answers)
        rollout.update_weights(trained.named_parameters(), 1)
        [(_, completion)] = next(answers)
        return completion

    expected = replace(NativeRollout(trained, [0]).generate(prompt, replace(DRAWN, n=2))[1], version=1)
    assert tokens([second_answer()]) == tokens([expected])
    assert (flat_logprobs([second_answer()]) - flat_logprobs([expected])).abs().max() < 1e-5
    monkeypatch.setattr(Scheduler, "forget_prompts", lambda _: None)  # the negative control
    assert tokens([second_answer()]) != tokens([expected])


def test_a_model_in_training_generates_and_is_left_as_it_was() -> None:
    """Adapters as operators, layers compiled and checkpointed: the plain layers answer, and training goes on with its own."""
    model = qwen2()
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    prompts, expected = random_prompts(), HfRollout(model, [0]).generate(random_prompts(), DRAWN)
    use_operators(adapted)
    recompute_activations(model)
    compile_layers(model, backend="eager")
    model.set_attn_implementation(PACKED)
    model.train()
    layer = model.model.layers[0]
    forward, compiled = layer.forward, layer._compiled_call_impl
    assert tokens(NativeRollout(model, [0], is_shared=True).generate(prompts, DRAWN)) == tokens(expected)
    assert tokens(HfRollout(model, [0], is_shared=True).generate(prompts, DRAWN)) == tokens(expected)
    assert layer.forward is forward and layer._compiled_call_impl is compiled and model.training
    assert model.config._attn_implementation == PACKED


def test_answers_are_the_same_after_sleep_and_with_longer_ones_later() -> None:
    rollout, prompts = NativeRollout(qwen2(), [0]), random_prompts()
    first = rollout.generate(prompts, GREEDY)
    rollout.sleep()
    assert rollout.slots.size is None and not rollout.slots.layers
    rollout.wake()
    assert rollout.generate(prompts, GREEDY) == first
    longer = rollout.generate(prompts, Sampling(30))
    assert [ids[:12] for ids in tokens(longer)] == tokens(first)
    assert rollout.generate(prompts, GREEDY) == first
    rollout.close()


def test_streamed_tokens_are_those_of_the_answer() -> None:
    rollout, prompts = NativeRollout(qwen2(), [0], Options(max_sequences=1)), random_prompts()
    for sampling in (GREEDY, replace(DRAWN, n=1)):
        for prompt in prompts[:3]:
            heard: list[int] = []
            completion = rollout.stream_tokens(prompt, sampling, heard.append)
            assert heard == completion.token_ids
            assert [completion] == rollout.generate([prompt], sampling)


def test_an_exception_of_the_callback_ends_the_answer() -> None:
    rollout, heard = NativeRollout(qwen2(), [0]), []

    def listen(token: int) -> None:
        heard.append(token)
        if len(heard) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rollout.stream_tokens(random_prompts()[0], GREEDY, listen)
    assert len(heard) == 3
    assert tokens(rollout.generate(random_prompts(), GREEDY)) == tokens(HfRollout(qwen2(), [0]).generate(random_prompts(), GREEDY))


def test_what_the_engine_cannot_run_is_refused() -> None:
    with pytest.raises(UserError, match=r"(?s)Gemma2ForCausalLM.*soft-capping.*rollout\.name=auto or hf"):
        NativeRollout(sharp(Gemma2ForCausalLM, Gemma2Config(**SHAPE, head_dim=16)), [0])
    with pytest.raises(UserError, match="a prompt with its response may have 542 tokens, but the model has 512 positions"):
        NativeRollout(qwen2(), [0]).generate(random_prompts(), Sampling(512))


def test_prompts_of_unequal_lengths_are_answered_faster_on_a_cpu_than_by_transformers_own() -> None:
    """In processor seconds of one thread, taken in turn: the best of both, because other work on the machine slows single runs."""
    model: Any = sharp(Qwen2ForCausalLM, Qwen2Config(**{**SHAPE, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 30_000}))
    prompts = [[i % VOCABULARY for i in range(n, 2 * n)] for n in (*range(4, 34), 250, 300)]

    def seconds(rollout: Callable[[Sampling], object]) -> float:
        since = time.process_time()
        rollout(Sampling(12))
        return time.process_time() - since

    def plain(sampling: Sampling) -> None:
        ids = torch.tensor([[0] * (300 - len(prompt)) + prompt for prompt in prompts])
        model.generate(ids, attention_mask=(ids > 0).long(), max_new_tokens=sampling.max_new_tokens, do_sample=False, pad_token_id=0)

    native, threads = NativeRollout(model, [VOCABULARY]), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ours = theirs = float("inf")
        for turn in range(9):
            ours = min(ours, seconds(lambda sampling: native.generate(prompts, sampling)))
            theirs = min(theirs, seconds(plain))
            if turn >= 2 and ours < theirs:
                break
    finally:
        torch.set_num_threads(threads)
    assert ours < theirs, f"{ours:.2f} s, transformers {theirs:.2f} s"


@pytest.mark.gpu
def test_on_a_gpu_only_slots_that_take_much_memory_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = qwen2().to("cuda")  # type: ignore[arg-type]
    rollout, prompts = NativeRollout(model, [0]), random_prompts()
    first = rollout.generate(prompts, GREEDY)
    graphs, held = dict(rollout.runner._graphs), torch.cuda.memory_allocated()
    rollout.sleep()
    assert rollout.runner._graphs == graphs and rollout.slots.size is not None
    del graphs  # which hold memory
    monkeypatch.setattr(slots, "WORTH_FREEING", 0.0)
    rollout.sleep()
    assert not rollout.runner._graphs and rollout.slots.size is None and torch.cuda.memory_allocated() < held
    assert rollout.generate(prompts, GREEDY) == first


@pytest.mark.gpu
@pytest.mark.parametrize("compiles", [False, True])
def test_on_a_gpu_the_same_holds(compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "COMPILED_PROMPTS", 1)
    for family in ("qwen2", "qwen3", "mistral, windows"):
        model, prompts = sharp(*FAMILIES[family]).to("cuda"), random_prompts()  # type: ignore[arg-type]
        for sampling in (GREEDY, DRAWN, Sampling(8, temperature=1.3, n=2, top_k=50, top_p=0.8)):
            expected = HfRollout(model, [0]).generate(prompts, sampling)
            found = NativeRollout(model, [0], Options(max_sequences=6, compile=compiles)).generate(prompts, sampling)
            same = [one.token_ids == other.token_ids for one, other in zip(found, expected, strict=True)]
            # A draw that falls between two tokens, within rounding, may take the other one.
            assert all(same) or (sampling is not GREEDY and same.count(False) == 1)
            found, expected = (list(compress(answers, same)) for answers in (found, expected))
            torch.testing.assert_close(flat_logprobs(found), flat_logprobs(expected), atol=1e-4, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("experts", "dtype", "records"),
    [("grouped_mm", torch.bfloat16, True), ("grouped_mm", torch.float32, False), ("eager", torch.bfloat16, False)],
)
def test_on_a_gpu_code_that_cannot_be_a_cuda_graph_runs_without_one(experts: str, dtype: torch.dtype, records: bool) -> None:
    model: Any = sharp(Qwen3MoeForCausalLM, Qwen3MoeConfig(**SHAPE, **EXPERTS)).to("cuda", dtype)  # type: ignore[arg-type]
    model.set_experts_implementation(experts)
    rollout, prompts = NativeRollout(model, [0], Options(max_sequences=6)), random_prompts()
    found = rollout.generate(prompts, GREEDY)
    assert bool(rollout.runner._graphs) == records and ("without CUDA graphs" in rollout.describe()) == (not records)
    if dtype == torch.float32:
        assert tokens(found) == tokens(HfRollout(model, [0]).generate(prompts, GREEDY))
    other = NativeRollout(qwen2().to("cuda"), [0])  # type: ignore[arg-type]
    other.generate(prompts, GREEDY)
    assert other.runner._graphs
