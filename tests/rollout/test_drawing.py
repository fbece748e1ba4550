"""Responses that are added, stopped between decode steps, and gone on with, by the native engine."""

import pytest
import torch
from served import random_prompts
from tiny import qwen2_config, sharp
from transformers import PreTrainedModel, Qwen2ForCausalLM

from verl.rollout import Options, Sampling
from verl.rollout._plain import plain_logprobs
from verl.rollout.drawing import Drawing, begin, can_continue, versions_of
from verl.rollout.hf import HfRollout
from verl.rollout.native import NativeRollout

DRAWN = Sampling(24, temperature=1.0, n=3, seed=7)
STOP = 300
SEQUENCES = 5


@pytest.fixture
def model() -> PreTrainedModel:
    return sharp(Qwen2ForCausalLM, qwen2_config())


def engine_of(model: PreTrainedModel) -> NativeRollout:
    return NativeRollout(model, [STOP], Options(max_sequences=SEQUENCES, max_positions=64))


def prompts_of_equal_and_other_lengths() -> list[list[int]]:
    prompts = random_prompts()[:6]
    return [*prompts, prompts[0]]


def drawings_of(prompts: list[list[int]]) -> list[Drawing]:
    return [Drawing(prompt, seed, number) for seed, prompt in enumerate(prompts) for number in range(DRAWN.n)]


def draw_on(engine: NativeRollout, drawings: list[Drawing], steps: int | None = None) -> None:
    """Draw to the end, or so many calls."""
    running = begin(engine, DRAWN, SEQUENCES, 64)
    running.add(drawings)
    while running.has_work and steps != 0:
        running.step()
        steps = None if steps is None else steps - 1
    running.stop()


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_response_that_is_stopped_and_goes_on_is_the_same(model: PreTrainedModel, steps: int) -> None:
    engine, prompts = engine_of(model), prompts_of_equal_and_other_lengths()
    whole = engine.generate(prompts, DRAWN)
    drawings = drawings_of(prompts)
    for _ in range(3):
        draw_on(engine, drawings, steps)
        engine.generate(prompts[:1], Sampling(4))  # something else meanwhile
    assert not all(drawing.so_far.is_finished for drawing in drawings), "else the test shows nothing"
    draw_on(engine, drawings)
    for drawing, expected in zip(drawings, whole, strict=True):
        found = drawing.so_far
        assert (found.token_ids, found.finish_reason, found.is_finished) == (expected.token_ids, expected.finish_reason, True)
        assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_responses_may_come_while_others_are_drawn(model: PreTrainedModel) -> None:
    engine, prompts = engine_of(model), prompts_of_equal_and_other_lengths()
    whole = engine.generate(prompts, DRAWN)
    drawings = drawings_of(prompts)
    running = begin(engine, DRAWN, SEQUENCES, 64)
    for place, drawing in enumerate(drawings):  # the last ones come when rows have been left out of decode steps
        running.add([drawing])
        for _ in range(5 if place < 10 else 30):
            if running.has_work:
                running.step()
    while running.has_work:
        running.step()
    for drawing, expected in zip(drawings, whole, strict=True):
        assert drawing.so_far.token_ids == expected.token_ids
        assert drawing.so_far.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def renew(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return {name: tensor + 0.05 * torch.randn_like(tensor) * tensor.abs().mean() for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("stops", [True, False], ids=["stopped", "not stopped"])
def test_tokens_after_new_weights_have_their_probabilities_only_if_the_tokens_before_are_computed_anew(
    model: PreTrainedModel, stops: bool
) -> None:
    engine = engine_of(model)
    drawings = drawings_of(prompts_of_equal_and_other_lengths())[:SEQUENCES]
    before, after = (sharp(Qwen2ForCausalLM, qwen2_config()) for _ in range(2))
    new = renew(model)
    after.load_state_dict(new, strict=False)
    running = begin(engine, DRAWN, SEQUENCES, 64)
    running.add(drawings)
    for _ in range(8):
        running.step()
    if stops:
        running.stop()
    engine.update_weights(new.items(), 1)
    if stops:
        draw_on(engine, drawings)
    while running.has_work:
        running.step()
    worst = 0.0
    for drawing in drawings:
        found = drawing.so_far
        text = [*drawing.prompt, *found.token_ids]
        old_G, new_G = (plain_logprobs(each, text, len(drawing.prompt)).detach() for each in (before, after))
        is_old_G = torch.arange(len(found.token_ids)) < 8
        if stops and len(found.token_ids) > 8:
            assert versions_of(found) == [0] * 8 + [1] * (len(found.token_ids) - 8)
        expected_G = torch.where(is_old_G, old_G, new_G)
        worst = max(worst, float((torch.tensor(found.logprobs) - expected_G).abs().max()))
    assert worst < 1e-4 if stops else worst > 1e-2


def test_prompts_are_computed_again_where_a_call_has_written_into_their_slots(model: PreTrainedModel) -> None:
    engine, prompts = engine_of(model), random_prompts()[:4]
    sampling = Sampling(12)
    first = engine.generate(prompts, sampling)
    engine.generate(prompts[3:], sampling)  # in the slot that has its prompt; decode steps write into those before it
    again = engine.generate(prompts[:3], sampling)
    for found, expected in zip(again, first, strict=False):
        assert found.token_ids == expected.token_ids and found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_transformers_own_generation_cannot_stop(model: PreTrainedModel) -> None:
    assert can_continue(engine_of(model)) and not can_continue(HfRollout(model, [STOP]))
