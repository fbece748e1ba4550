"""Batched generation against transformers' own, one prompt after the other."""

from typing import Any

import pytest
import torch
from served import PROMPT_LENGTHS, random_prompts
from tiny import qwen2_config
from transformers import GenerationConfig, Qwen2ForCausalLM

from verl.rollout import Options, Sampling
from verl.rollout import hf as rollout_hf
from verl.rollout.hf import HfRollout

GREEDY = Sampling(max_new_tokens=12)


def random_model(**defaults: object) -> Qwen2ForCausalLM:
    """Weights far enough from zero that the most likely token depends on everything before it."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(qwen2_config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    model.generation_config = GenerationConfig(**defaults)
    return model


def plain(model: Any, prompt: list[int], stop_ids: list[int]) -> list[int]:
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=GREEDY.max_new_tokens, eos_token_id=stop_ids, pad_token_id=0, do_sample=False
    )
    return output[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def stop_ids() -> list[int]:
    """Tokens that the model writes after some of the prompts, so that answers end at different lengths."""
    model = random_model()
    return [plain(model, prompt, [])[at] for prompt, at in zip(random_prompts()[:3], (2, 5, 8), strict=True)]


def test_greedy_answers_in_batches_are_those_of_each_prompt_alone(stop_ids: list[int]) -> None:
    prompts, model = random_prompts(), random_model()
    expected = [plain(model, prompt, stop_ids) for prompt in prompts]
    for batch_size in (1, 3, 8):
        completions = HfRollout(model, stop_ids, Options(max_sequences=batch_size)).generate(prompts, GREEDY)
        assert [completion.token_ids for completion in completions] == expected
    assert len({len(token_ids) for token_ids in expected}) > 2


def test_without_the_attention_mask_they_would_differ(stop_ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the test above: the filler before short prompts is read as text."""
    prompts, rollout = random_prompts(), HfRollout(random_model(), stop_ids, Options(max_sequences=8))
    right = rollout.generate(prompts, GREEDY)
    pad_left = rollout_hf.pad_left
    monkeypatch.setattr(
        rollout_hf, "pad_left", lambda batch, pad_token: (ids := pad_left(batch, pad_token=pad_token)[0], torch.ones_like(ids))
    )
    wrong = rollout.generate(prompts, GREEDY)
    longest = PROMPT_LENGTHS.index(max(PROMPT_LENGTHS))
    assert wrong[longest].token_ids == right[longest].token_ids
    assert [completion.token_ids for completion in wrong] != [completion.token_ids for completion in right]


def test_an_answer_ends_with_its_first_stop_token_or_is_cut(stop_ids: list[int]) -> None:
    completions = HfRollout(random_model(), stop_ids, Options(max_sequences=8)).generate(random_prompts(), GREEDY)
    for completion in completions:
        stopped = completion.token_ids[-1] in stop_ids
        assert completion.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(completion.token_ids) == GREEDY.max_new_tokens
        assert not set(completion.token_ids[:-1]) & set(stop_ids)
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}


def test_stop_tokens_of_the_template_and_of_the_generation_config_both_end(stop_ids: list[int]) -> None:
    of_template, of_config = stop_ids[:1], stop_ids[1:]
    both = HfRollout(random_model(eos_token_id=of_config), of_template, Options(max_sequences=4))
    assert set(both.stop_ids) == set(stop_ids)
    assert both.generate(random_prompts(), GREEDY) == HfRollout(random_model(), stop_ids, Options(max_sequences=4)).generate(
        random_prompts(), GREEDY
    )
    assert HfRollout(random_model(eos_token_id=5), [5], Options(max_sequences=1)).stop_ids == [5]


def test_the_models_own_generation_defaults_are_put_aside(stop_ids: list[int]) -> None:
    defaults = {"repetition_penalty": 5.0, "do_sample": True, "temperature": 2.0, "top_k": 3, "no_repeat_ngram_size": 1}
    expected = HfRollout(random_model(), stop_ids, Options(max_sequences=4)).generate(random_prompts(), GREEDY)
    assert HfRollout(random_model(**defaults), stop_ids, Options(max_sequences=4)).generate(random_prompts(), GREEDY) == expected
    # The negative control: plain `generate` takes what a call leaves open from the model.
    with_defaults = [plain(random_model(**defaults), prompt, stop_ids) for prompt in random_prompts()]
    assert with_defaults != [completion.token_ids for completion in expected]


def test_sampling_draws_from_the_whole_distribution() -> None:
    """At a very high temperature all tokens are as likely; cut to the 50 likeliest, as transformers does by default, only 50 would come."""
    (prompt, *_), sampling = random_prompts(), Sampling(max_new_tokens=1, temperature=1e6, n=400)
    completions = HfRollout(random_model(), [0], Options(max_sequences=400)).generate([prompt], sampling)
    assert len(completions) == 400
    assert len({completion.token_ids[0] for completion in completions}) > 200


def test_a_low_temperature_draws_the_likeliest_token(stop_ids: list[int]) -> None:
    rollout = HfRollout(random_model(), stop_ids, Options(max_sequences=8))
    cold = rollout.generate(random_prompts(), Sampling(GREEDY.max_new_tokens, temperature=1e-4))
    assert [completion.token_ids for completion in cold] == [c.token_ids for c in rollout.generate(random_prompts(), GREEDY)]


def test_the_seed_alone_decides_what_is_drawn() -> None:
    rollout, state = HfRollout(random_model(), [0], Options(max_sequences=4)), torch.get_rng_state()
    one, two = (Sampling(6, temperature=1.0, n=2, seed=seed) for seed in (1, 2))
    first = rollout.generate(random_prompts(), one)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert rollout.generate(random_prompts(), one) == first
    assert rollout.generate(random_prompts(), two) != first
    assert first[0::2] != first[1::2]


def test_long_prompts_come_first_and_answers_carry_their_numbers() -> None:
    rollout, prompts = HfRollout(random_model(), [0], Options(max_sequences=3)), random_prompts()
    sampling = Sampling(4, temperature=1.0, n=2)
    batches = list(rollout.stream(prompts, sampling))
    numbers = [number for batch in batches for number, _ in batch]
    assert [len(batch) for batch in batches] == [3, 3, 3, 3, 3, 1]
    assert sorted(numbers) == list(range(16))
    lengths = [PROMPT_LENGTHS[number // 2] for number in numbers]
    assert lengths == sorted(lengths, reverse=True)
    done = dict(pair for batch in batches for pair in batch)
    assert rollout.generate(prompts, sampling) == [done[number] for number in range(16)]


def test_streamed_tokens_are_those_of_the_answer(stop_ids: list[int]) -> None:
    rollout = HfRollout(random_model(), stop_ids, Options(max_sequences=1))
    for prompt in random_prompts()[:3]:
        heard: list[int] = []
        completion = rollout.stream_tokens(prompt, GREEDY, heard.append)
        assert heard == completion.token_ids
        assert [completion] == rollout.generate([prompt], GREEDY)


def test_an_exception_of_the_callback_ends_the_answer() -> None:
    heard: list[int] = []

    def listen(token: int) -> None:
        heard.append(token)
        if len(heard) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        HfRollout(random_model(), [0], Options(max_sequences=1)).stream_tokens(random_prompts()[0], GREEDY, listen)
    assert len(heard) == 3


@pytest.mark.gpu
def test_on_a_gpu_the_same_holds(stop_ids: list[int]) -> None:
    prompts, model = random_prompts(), random_model().to("cuda")  # type: ignore[arg-type]
    expected = [plain(random_model(), prompt, stop_ids) for prompt in prompts]
    rollout, state = HfRollout(model, stop_ids, Options(max_sequences=8)), torch.cuda.get_rng_state()
    assert [completion.token_ids for completion in rollout.generate(prompts, GREEDY)] == expected
    one, two = (Sampling(6, temperature=1.0, n=2, seed=seed) for seed in (1, 2))
    assert rollout.generate(prompts, one) == rollout.generate(prompts, one) != rollout.generate(prompts, two)
    assert torch.equal(torch.cuda.get_rng_state(), state)
