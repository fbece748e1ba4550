"""Requests that join while an engine generates."""

import asyncio
import random

import pytest
import torch
from served import random_prompts
from tiny import qwen2_config, sharp
from transformers import PreTrainedModel, Qwen2ForCausalLM

from verl.errors import UserError
from verl.rollout import Completion, Options, Rollout, Sampling
from verl.rollout.hf import HfRollout
from verl.rollout.live import Live
from verl.rollout.native import NativeRollout

STOP = 300
DRAWN = Sampling(24, temperature=1.0, seed=7)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return sharp(Qwen2ForCausalLM, qwen2_config())


def engine_of(model: PreTrainedModel, name: str) -> Rollout:
    made = NativeRollout if name == "native" else HfRollout
    return made(model, [STOP], Options(max_sequences=5, max_positions=64))


def drawn_live(
    engine: Rollout, prompts: list[list[int]], sampling: Sampling = DRAWN, naps: random.Random | None = None
) -> list[Completion]:
    """Each prompt is asked for after a nap of its own, with a seed of its own."""

    async def ask(live: Live, seed: int, prompt: list[int]) -> Completion:
        await asyncio.sleep(0 if naps is None else naps.random() * 0.2)
        return await live.submit(prompt, sampling, seed)

    async def ask_all() -> list[Completion]:
        async with Live(engine, max_new_tokens=24, positions=64) as live:
            return await asyncio.gather(*(ask(live, seed, prompt) for seed, prompt in enumerate(prompts)))

    return asyncio.run(ask_all())


def told(completions: list[Completion]) -> list[tuple[list[int], str]]:
    return [(completion.token_ids, completion.finish_reason) for completion in completions]


@pytest.mark.parametrize("name", ["native", "hf"])
def test_a_response_does_not_depend_on_when_it_was_asked_for(model: PreTrainedModel, name: str) -> None:
    engine, prompts = engine_of(model, name), random_prompts()[:12]
    whole = engine.generate(prompts, DRAWN)
    for found in (drawn_live(engine, prompts), drawn_live(engine, prompts, naps=random.Random(1))):
        assert told(found) == told(whole)
        for completion, expected in zip(found, whole, strict=True):
            assert completion.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert any(completion.finish_reason == "stop" for completion in whole), "else the test shows less"


@pytest.mark.parametrize("name", ["native", "hf"])
def test_requests_have_lengths_and_kinds_of_their_own(model: PreTrainedModel, name: str) -> None:
    engine, prompts = engine_of(model, name), random_prompts()[:6]
    kinds = [Sampling(4, temperature=1.0, seed=7), Sampling(9, logprobs=False), Sampling(24, temperature=1.0, seed=7)]

    async def ask_all() -> list[Completion]:
        async with Live(engine, max_new_tokens=24, positions=64) as live:
            return await asyncio.gather(*(live.submit(prompt, kinds[seed % 3], seed) for seed, prompt in enumerate(prompts)))

    for seed, found in enumerate(asyncio.run(ask_all())):
        [expected] = engine.generate([prompts[seed]], kinds[seed % 3], [seed])
        assert told([found]) == told([expected])
        assert (found.logprobs is None) == (seed % 3 == 1)


def test_a_request_joins_while_others_are_generated(model: PreTrainedModel) -> None:
    """A short response that comes late ends before long ones that came first."""
    engine, ended = NativeRollout(model, [], Options(max_sequences=5, max_positions=64)), list[str]()
    before = engine.scheduler

    async def ask(live: Live, name: str, tokens: int) -> None:
        await live.submit([5, 6, 7], Sampling(tokens), 0)
        ended.append(name)

    async def ask_all() -> None:
        async with Live(engine, max_new_tokens=40, positions=64) as live:
            long = asyncio.create_task(ask(live, "long", 40))
            while engine.scheduler is before or engine.scheduler.steps < 5:
                await asyncio.sleep(0)
            await ask(live, "short", 2)
            await long

    asyncio.run(ask_all())
    assert ended == ["short", "long"]


def test_a_request_that_is_too_long_fails_alone(model: PreTrainedModel) -> None:
    engine = engine_of(model, "native")
    engine.positions = 30

    async def ask_all() -> list[Completion | BaseException]:
        async with Live(engine, max_new_tokens=24, positions=64) as live:
            return await asyncio.gather(*(live.submit([5] * length, DRAWN, 0) for length in (3, 25)), return_exceptions=True)

    short, long = asyncio.run(ask_all())
    assert isinstance(short, Completion) and isinstance(long, UserError)


def test_an_engine_that_fails_fails_for_all_who_wait(model: PreTrainedModel) -> None:
    engine = engine_of(model, "hf")

    def fails(*_: object) -> list[Completion]:
        raise UserError("out of memory")

    engine.generate = fails  # type: ignore[assignment]
    with pytest.raises(UserError, match="out of memory"):
        drawn_live(engine, random_prompts()[:3])


def test_a_request_may_be_given_up(model: PreTrainedModel) -> None:
    engine = engine_of(model, "native")

    async def ask() -> Completion:
        async with Live(engine, max_new_tokens=24, positions=64) as live:
            given_up = asyncio.create_task(live.submit([5, 6, 7], DRAWN, 1))
            await asyncio.sleep(0)
            given_up.cancel()
            return await live.submit([5, 6, 7], DRAWN, 2)

    found = asyncio.run(ask())
    [expected] = engine.generate([[5, 6, 7]], DRAWN, [2])
    assert told([found]) == told([expected])
    assert torch.is_grad_enabled()
