"""Speculation of the native engine: the answers with drafts are those without, token for token, and it is off where it does not pay."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from rl_runs import train, write_folder
from runs import timeless
from served import random_prompts
from tiny import qwen2_config, sharp
from transformers import (
    CohereConfig,
    CohereForCausalLM,
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
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from verl.errors import UserError
from verl.generate import check_options
from verl.rollout import Completion, Options, Sampling
from verl.rollout.native import NativeRollout, engine, verification
from verl.rollout.native import speculation as rule
from verl.rollout.native.attention import LayerCache
from verl.rollout.native.drafts import LEAST_MATCH, SEARCHED, Drafter
from verl.rollout.native.scheduler import Compaction, Request
from verl.rollout.native.slots import SlotSize, State
from verl.rollout.native.speculation import CREDIT, DEBT, DRAFTS, SHARE, TRIAL, Always, Counts, Pace
from verl.rollout.native.verification import VerifyBatch, accept, attend_without_kernel

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
WINDOWS: dict[str, Any] = {"num_hidden_layers": 4, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
FAMILIES: dict[str, tuple[type[PreTrainedModel], PretrainedConfig]] = {
    "qwen2": (Qwen2ForCausalLM, qwen2_config(vocab_size=9000)),
    "llama, untied": (LlamaForCausalLM, LlamaConfig(**SHAPE, tie_word_embeddings=False)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=32)),
    "qwen3, experts": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**SHAPE, **EXPERTS)),
    "gemma3, windows": (Gemma3ForCausalLM, Gemma3TextConfig(**{**SHAPE, **WINDOWS}, head_dim=32)),
    "mistral, windows": (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=5)),
    "cohere, logits scaled": (CohereForCausalLM, CohereConfig(**{**SHAPE, "bos_token_id": None, "eos_token_id": None})),
    "gpt-neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**SHAPE)),
}
RULE: dict[str, Any] = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16)
RECURRENT: dict[str, Any] = {"num_hidden_layers": 3, "layer_types": ["linear_attention", "linear_attention", "full_attention"]}
GREEDY, DRAWN = Sampling(12), Sampling(12, temperature=1.0, n=3)
FILTERED = Sampling(12, temperature=1.3, n=3, top_k=50, top_p=0.8)
LONG = Sampling(60)  # greedy answers of random weights soon repeat themselves
NOTHING = np.zeros(0, dtype=np.float32)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is a verify step, whether it pays or not."""
    monkeypatch.setattr(engine, "Pace", Always)


def qwen2() -> PreTrainedModel:
    return sharp(Qwen2ForCausalLM, qwen2_config())


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


def flat_logprobs(completions: list[Completion]) -> torch.Tensor:
    return torch.tensor([x for completion in completions for x in completion.logprobs])


def with_drafts(model: PreTrainedModel, stop_ids: list[int], **options: Any) -> NativeRollout:
    """As a trainer has it: prompts of earlier calls, which would have other slots, are not kept."""
    rollout = NativeRollout(model, stop_ids, Options(speculate="auto", **{"compile": False, **options}), is_shared=True)
    assert "speculation where it pays" in rollout.describe()
    return rollout


def totals(rollout: NativeRollout) -> Counts:
    assert rollout.pace is not None
    return rollout.pace.total


def let_see_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token of a verify step attends to the one after it, too."""

    def attend(query: Any, key: Any, value: Any, cache: LayerCache, batch: VerifyBatch, *others: Any) -> torch.Tensor:
        return attend_without_kernel(query, key, value, cache, batch._replace(place_2B=batch.place_2B + torch.tensor([[1], [0]])), *others)

    monkeypatch.setattr(verification, "attend_without_kernel", attend)


def check_equal(found: list[Completion], expected: list[Completion]) -> None:
    assert tokens(found) == tokens(expected)
    assert [c.finish_reason for c in found] == [c.finish_reason for c in expected]
    torch.testing.assert_close(flat_logprobs(found), flat_logprobs(expected), atol=1e-5, rtol=0)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_without_drafts_token_by_token(family: str) -> None:
    """Greedy, sampled and filtered, prompts of different lengths, prefixes shared, fewer slots than requests, and many rows."""
    model, prompts = sharp(*FAMILIES[family]), random_prompts()
    for sampling in (GREEDY, LONG, DRAWN, FILTERED):
        stop_ids = [tokens(NativeRollout(model, [0]).generate(prompts[:1], sampling))[0][3], 0]
        expected = NativeRollout(model, stop_ids).generate(prompts, sampling)
        for rows in (3, None):
            rollout = with_drafts(model, stop_ids, max_sequences=rows)
            check_equal(rollout.generate(prompts, sampling), expected)
            assert totals(rollout).computed >= totals(rollout).active > 0
        if sampling is LONG:
            assert totals(rollout).kept > totals(rollout).active


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_in_runs_of_right_drafts_stop_tokens_and_limits_end_an_answer_where_they_should(temperature: float) -> None:
    """The same prompt with the same seed four times, one after the other: all drafts of the later ones are right."""
    model, prompt = qwen2(), random_prompts()[1]
    [whole] = tokens(NativeRollout(model, [0]).generate([prompt], Sampling(14, temperature), [5]))
    for end in range(len(whole)):
        for stop_ids, longest in (([whole[end]], 14), ([0], end + 1)):
            sampling = Sampling(longest, temperature)
            expected = NativeRollout(model, stop_ids).generate([prompt] * 4, sampling, [5] * 4)
            rollout = with_drafts(model, stop_ids, max_sequences=1)
            check_equal(rollout.generate([prompt] * 4, sampling, [5] * 4), expected)
            length, total = len(expected[0].token_ids), totals(rollout)
            if longest == 1:  # nothing comes after it
                assert total == Counts()
                continue
            assert total.kept == 4 * length
            assert total.active <= length + 3 * -(-length // (DRAFTS + 1)), "runs are as long as they can be"


@pytest.mark.usefixtures("always")
def test_wrong_drafts_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts at random: their keys and values are overwritten before they are read."""
    model, prompts, generator = qwen2(), random_prompts(), torch.Generator().manual_seed(3)
    expected = NativeRollout(model, [0]).generate(prompts, DRAWN)

    def guess(self: Drafter, state: State, rows: int, number: int, used: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        room_B = (state.limit_S[:rows] - state.generated_S[:rows] - 1).clamp(0, number) * state.active_S[:rows]
        return torch.randint(0, 512, (rows, number), generator=generator), room_B.long()

    rollout = with_drafts(model, [0], max_sequences=5)
    monkeypatch.setattr(Drafter, "draft", guess)
    check_equal(rollout.generate(prompts, DRAWN), expected)
    assert totals(rollout).computed > 3 * totals(rollout).kept


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("wrong", ["the next number", "fresh numbers", "one position behind", "later drafts are seen"])
def test_another_random_number_or_position_would_give_other_answers(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls. The seeds are equal, so that drafts are right where verification is."""
    model, prompts = qwen2(), random_prompts()[:1] * 4
    expected = NativeRollout(model, [0]).generate(prompts, Sampling(14, 1.0), [5] * 4)
    rollout = with_drafts(model, [0], max_sequences=1)
    uniforms, packed = VerifyBatch.uniforms, VerifyBatch.packed

    def behind(state: State, rows: int, count_B: torch.Tensor) -> VerifyBatch:
        batch = packed(state, rows, count_B)
        return batch._replace(position_T=(batch.position_T - (batch.ahead_T > 0).long()))

    if wrong == "the next number":
        monkeypatch.setattr(VerifyBatch, "uniforms", lambda self, state: uniforms(self._replace(ahead_T=self.ahead_T + 1), state))
    elif wrong == "fresh numbers":
        monkeypatch.setattr(VerifyBatch, "uniforms", lambda self, state: torch.rand_like(uniforms(self, state)))
    elif wrong == "one position behind":
        monkeypatch.setattr(VerifyBatch, "packed", behind)
    else:
        let_see_one_more(monkeypatch)
    found = rollout.generate(prompts, Sampling(14, 1.0), [5] * 4)
    monkeypatch.undo()
    assert tokens(found) != tokens(expected) or (flat_logprobs(found) - flat_logprobs(expected)).abs().max() > 1e-3


@pytest.mark.usefixtures("always")
def test_later_answers_to_a_prompt_take_their_drafts_from_earlier_ones() -> None:
    model, prompts = qwen2(), random_prompts()[:2]
    rollout = with_drafts(model, [0], max_sequences=2)
    first = rollout.generate([*prompts, *prompts], Sampling(20, 1.0), [1, 2, 1, 2])
    assert tokens(first[:2]) == tokens(first[2:])
    together = totals(rollout).kept / totals(rollout).active
    rollout.generate([*prompts, *prompts], Sampling(20, 1.0), [1, 2, 3, 4])
    assert together > 1.5 > totals(rollout).kept / totals(rollout).active


@pytest.mark.usefixtures("always")
def test_a_call_does_not_depend_on_the_calls_before_it() -> None:
    """Bit for bit, as resuming needs: neither its texts nor its counts outlive a call."""
    prompts, model = random_prompts(), qwen2()
    rollout = with_drafts(model, [0], max_sequences=3)
    rollout.update_weights((), 1)  # as in training; else prompts stay in their slots
    first, counts = rollout.generate(prompts, LONG), totals(rollout)
    rollout.generate(prompts[::-1], DRAWN)
    assert rollout.generate(prompts, LONG) == first and totals(rollout) == counts


@pytest.mark.usefixtures("always")
def test_streamed_tokens_are_those_of_the_answer() -> None:
    rollout, [prompt, *_], heard = with_drafts(qwen2(), [0]), random_prompts(), list[int]()
    completion = rollout.stream_tokens(prompt, LONG, heard.append)
    assert heard == completion.token_ids and totals(rollout).steps < len(heard)
    check_equal([completion], NativeRollout(qwen2(), [0]).generate([prompt], LONG))


def test_without_logprobs_the_tokens_are_the_same() -> None:
    rollout, prompts = with_drafts(qwen2(), [0]), random_prompts()
    silent = rollout.generate(prompts, Sampling(60, logprobs=False))
    assert tokens(silent) == tokens(NativeRollout(qwen2(), [0]).generate(prompts, LONG))


# --- what is checked and said


def test_a_verify_step_that_is_not_the_plain_model_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check when the engine is made: drafts that see those after them. It goes on without speculation, and says why."""
    let_see_one_more(monkeypatch)
    rollout = NativeRollout(qwen2(), [0], Options(speculate="auto"))
    monkeypatch.undo()
    assert "no speculation (log-probabilities differ by" in rollout.describe()
    check_equal(rollout.generate(random_prompts(), LONG), NativeRollout(qwen2(), [0]).generate(random_prompts(), LONG))
    assert rollout.pace is None


def test_verification_that_keeps_no_draft_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VerifyBatch, "uniforms", lambda self, state: torch.rand(len(self.row_T)))
    assert "no speculation (of drafts that are right, none is kept)" in NativeRollout(qwen2(), [0], Options(speculate="auto")).describe()


@pytest.mark.filterwarnings("ignore::UserWarning")  # the package says that it is slow without its kernels
def test_a_model_with_a_recurrent_state_does_not_speculate() -> None:
    model = sharp(Qwen3_5ForCausalLM, Qwen3_5TextConfig(**{**SHAPE, **RULE, **RECURRENT}, head_dim=16))
    rollout = NativeRollout(model, [0], Options(speculate="auto"))
    assert rollout.describe().endswith("no speculation (it has a recurrent state)")
    assert rollout.generate([[5, 6, 7]], LONG) and rollout.pace is None


def test_by_default_it_does_not_speculate() -> None:
    rollout = NativeRollout(qwen2(), [0])
    rollout.generate(random_prompts(), GREEDY)
    assert rollout.pace is None and "speculation" not in rollout.describe()
    with pytest.raises(UserError, match="speculate"):
        check_options(Options(speculate="sometimes"))


# --- when it pays


def pace_after(kept: float, computed: float, *, rows: int = 8, steps: int = 1000, device: str = "cpu") -> tuple[Pace, float]:
    """The pace of a call in which each verify step keeps and computes so much for each row; and the time that it took, in decode steps."""
    pace, time = Pace(device), 0.0
    while pace.total.steps + pace.decode_steps < steps:
        taken = pace.steps(8, rows)
        if taken:
            counts = Counts(taken, int(taken * rows * kept), taken * rows, int(taken * rows * computed))
            pace.verified(counts, rows)
            time += taken * (pace._fixed + pace._lookup + rows * computed) / (pace._fixed + rows)
        else:
            pace.decoded(1)
            time += 1
    return pace, time


def test_where_drafts_are_wrong_trials_lose_no_more_than_their_share_of_the_time() -> None:
    for rows in (1, 8, 64):
        for device in ("cpu", "cuda"):
            pace, time = pace_after(1.0, DRAFTS + 1, rows=rows, device=device)
            assert time - 1000 < SHARE * 1000 + TRIAL * DRAFTS and 0 < pace.total.steps < 200


def test_where_drafts_are_right_verify_steps_are_taken_alone() -> None:
    pace, time = pace_after(3.0, 4.0, rows=4)
    assert pace.decode_steps == DEBT / SHARE and pace.total.kept / pace.total.active / (time / 1000) > 1.5


def test_the_fewer_rows_are_left_the_sooner_it_tries_again() -> None:
    """The long tail of a step: a few answers go on, when the others to the same prompts have ended."""
    many, few = (pace_after(1.0, 5.0, rows=rows, device="cuda")[0].total.steps for rows in (64, 2))
    assert few > 2 * many


def test_when_no_request_waits_the_slower_rows_decide() -> None:
    """Two of four rows repeat themselves, the others gain nothing: in the mean verify steps pay, and the call would end later."""
    counts, added = Counts(2, 4 * 3 * 2, 4 * 2, 4 * 5 * 2), [10, 2, 2, 10]
    in_the_mean, by_the_slower = Pace("cuda"), Pace("cuda")
    for pace, each in ((in_the_mean, ()), (by_the_slower, added)):
        pace.decoded(1000)
        pace.verified(counts, 4, each)
    assert in_the_mean.steps(8, 4) > 0 and by_the_slower.steps(8, 4) == 0


def test_with_more_rows_than_a_gpu_has_time_for_it_never_tries() -> None:
    pace = Pace("cuda")
    pace.decoded(1000)
    assert pace.steps(8, 2) == TRIAL
    assert pace.steps(8, rule.MOST_TOKENS["cuda"] // (DRAFTS + 1) + 1) == 0


def test_a_balance_that_was_earned_outlasts_a_few_wrong_drafts() -> None:
    pace = Pace("cpu")
    for _ in range(10):
        pace.verified(Counts(1, 12, 4, 16), 4)
    assert pace._balance == CREDIT and pace.steps(8, 4) == 8
    pace.verified(Counts(1, 4, 4, 20), 4)
    assert pace.steps(8, 4) == TRIAL
    for _ in range(4):
        pace.verified(Counts(1, 4, 4, 20), 4)
    assert pace.steps(8, 4) == 0


def test_answers_are_those_without_drafts_where_the_engine_decides() -> None:
    model, prompts = qwen2(), random_prompts()
    for sampling in (Sampling(200), Sampling(60, temperature=1.0, n=4)):
        rollout = with_drafts(model, [0], max_sequences=4)
        check_equal(rollout.generate(prompts, sampling), NativeRollout(model, [0], Options(max_sequences=4)).generate(prompts, sampling))
        total = totals(rollout)
        assert rollout.pace.decode_steps > 0 and total.steps > 0
        assert (total.steps > rollout.pace.decode_steps) == (sampling.temperature == 0)


def test_a_resumed_run_that_speculates_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, taken = write_folder(tmp_path), list[Counts]()
    verified = Pace.verified
    monkeypatch.setattr(Pace, "verified", lambda self, counts, *args: (taken.append(counts), verified(self, counts, *args))[1])
    changes: dict[str, object] = dict(rollout__speculate="auto", rollout__max_sequences=3, rollout__max_new_tokens=24, trainer__save_freq=2)
    whole = train(folder, "whole", **changes)
    assert sum(counts.kept - counts.active for counts in taken) > 0
    train(folder, "resumed", **changes, trainer__total_training_steps=2)
    resumed = train(folder, "resumed", **changes, trainer__resume_override="true")
    assert timeless(resumed) == timeless(whole)
    for step in (3, 4):
        found, expected = ((folder / run / "rollouts" / f"step_{step}.jsonl").read_text() for run in ("resumed", "whole"))
        assert found == expected


# --- drafts


def drafter_of(slots: int = 3, positions: int = 40, longest: int = 16) -> tuple[Drafter, State]:
    size = SlotSize(slots, positions, longest)
    return Drafter(size, torch.device("cpu")), State.empty(slots, longest, [0], torch.device("cpu"))


def begin(drafter: Drafter, state: State, *seated: tuple[int, tuple[int, ...]], limit: int = 16) -> None:
    requests = [(slot, Request(slot, prompt, limit, NOTHING)) for slot, prompt in seated]
    drafter.begin(requests)
    state.begin(requests)


def answer(state: State, slot: int, *ids: int) -> None:
    for token in ids:
        row = torch.full((slot + 1,), -1)
        row[slot] = token
        active_S = state.active_S.clone()
        state.active_S[: slot + 1] = 0
        state.active_S[slot] = active_S[slot]
        state.advance(row, None)
        active_S[slot] = state.active_S[slot]
        state.active_S.copy_(active_S)


def drafts_of(drafter: Drafter, state: State, slot: int, number: int = 4) -> list[int]:
    drafter.record(state, slot + 1)
    draft_BK, count_B = drafter.draft(state, slot + 1, number)
    return draft_BK[slot, : count_B[slot]].tolist()


def test_drafts_follow_the_longest_match_in_the_prompt_then_the_last_one() -> None:
    drafter, state = drafter_of()
    begin(drafter, state, (0, (1, 2, 3, 4, 50, 9, 3, 4, 60, 7, 3, 4, 70, 8, 2, 3)))
    answer(state, 0, 4)
    assert drafts_of(drafter, state, 0) == [50, 9, 3, 4], "2 3 4 is longer than 3 4"
    begin(drafter, state, (1, (1, 1, 1, 1, 3, 4, 60, 7, 3, 4, 70, 8, 2, 3)))
    answer(state, 1, 4)
    assert drafts_of(drafter, state, 1) == [70, 8, 2, 3]
    begin(drafter, state, (2, (1, 2, 3, 4, 5, 6, 7, 8)))
    assert drafts_of(drafter, state, 2) == [] and LEAST_MATCH == 2


def test_a_text_that_repeats_itself_goes_on_repeating_itself() -> None:
    drafter, state = drafter_of()
    begin(drafter, state, (0, (1, 2, 3, 4)))
    answer(state, 0, 5, 6, 5, 6, 5, 6)
    assert drafts_of(drafter, state, 0) == [5, 6, 5, 6]


def test_drafts_come_from_answers_that_run_and_that_have_ended_and_not_from_other_prompts() -> None:
    drafter, state = drafter_of()
    prompt = (1, 2, 3, 4, 5)
    begin(drafter, state, (0, prompt), (1, prompt), (2, (9, *prompt)))
    answer(state, 0, 11, 12, 13, 14, 15)
    drafter.record(state, 3)
    assert drafts_of(drafter, state, 1) == [11, 12, 13, 14]
    assert drafts_of(drafter, state, 2) == []
    drafter.end([0])
    begin(drafter, state, (0, (30, 31, 32, 33)))
    assert drafts_of(drafter, state, 1) == [11, 12, 13, 14], "the text stays when its slot is used again"
    answer(state, 1, 11, 12)
    assert drafts_of(drafter, state, 1) == [13, 14, 15]
    drafter.move(Compaction([1], [0], 21, 1))
    state.move(torch.tensor([1]), torch.tensor([0]))
    assert drafts_of(drafter, state, 0) == [13, 14, 15]
    drafter.reset()
    begin(drafter, state, (0, prompt))
    assert drafts_of(drafter, state, 0) == []


def test_the_oldest_ended_text_makes_room_and_the_latest_are_searched() -> None:
    drafter, state = drafter_of(slots=SEARCHED + 2)
    prompt = (1, 2, 3, 4, 5)
    for number in range(3 * SEARCHED):
        begin(drafter, state, (0, prompt))
        answer(state, 0, 100 + number, 7, 8)
        drafter.record(state, 1)
        drafter.end([0])
    begin(drafter, state, (0, prompt))
    assert drafts_of(drafter, state, 0, 1) == [100 + 3 * SEARCHED - 1]
    assert len(drafter._prompt_of) == 2 * (SEARCHED + 2) == len(drafter._texts_of[prompt])


def test_an_answer_gets_no_drafts_behind_its_limit_or_its_end() -> None:
    drafter, state = drafter_of()
    begin(drafter, state, (0, (7, 7, 7, 7, 7)), limit=3)
    assert drafts_of(drafter, state, 0) == [7, 7], "of 3 tokens, the last one follows the second draft"
    answer(state, 0, 7, 7)
    assert drafts_of(drafter, state, 0) == []
    begin(drafter, state, (1, (7, 7, 7, 7, 7)))
    answer(state, 1, 7, 0)
    assert drafts_of(drafter, state, 1) == []


# --- verification


def test_what_is_kept_ends_with_the_first_wrong_draft_the_stop_token_or_the_limit() -> None:
    state = State.empty(5, 6, [0], torch.device("cpu"))
    state.active_S[:4] = 1
    state.limit_S[:] = 6
    state.generated_S.copy_(torch.tensor([1, 1, 1, 3, 2]))
    state.position_S.copy_(torch.tensor([10, 20, 30, 40, 50]))
    state.token_S.copy_(torch.tensor([1, 2, 3, 4, 5]))
    state.answer_SG[:] = -1
    token_BQ = torch.tensor([[5, 6, 7, 8], [5, 0, 7, 8], [9, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8]])
    draft_BK = torch.tensor([[5, 6, 9], [5, 0, 7], [5, 6, 7], [5, 6, 7], [5, 6, 7]])
    kept_B = accept(state, token_BQ, -token_BQ.float(), draft_BK, torch.tensor([3, 3, 3, 2, 3]))
    assert kept_B.tolist() == [3, 2, 1, 3, 0]
    assert state.answer_SG.tolist() == [
        [-1, 5, 6, 7, -1, -1],
        [-1, 5, 0, -1, -1, -1],
        [-1, 9, -1, -1, -1, -1],
        [-1, -1, -1, 5, 6, 7],
        [-1] * 6,
    ]
    assert torch.equal(state.logprob_SG, torch.where(state.answer_SG > 0, -state.answer_SG.float(), 0.0))
    assert state.generated_S.tolist() == [4, 3, 2, 6, 2]
    assert state.active_S.tolist() == [1, 0, 1, 0, 0]
    assert state.token_S.tolist() == [7, 2, 9, 4, 5] and state.position_S.tolist() == [13, 20, 31, 40, 50]


@pytest.mark.parametrize("window", [0, 1, 3, 9])
def test_attention_is_that_of_one_token_after_the_other(window: int) -> None:
    """Against softmax over the visible positions, token by token, with and without unused tokens."""
    torch.manual_seed(1)
    key_SJLD, value_SJLD = torch.randn(3, 2, 24, 8), torch.randn(3, 2, 24, 5)
    position_B, count_B = torch.tensor([0, 13]), torch.tensor([3, 1])
    state = State.empty(3, 4, [0], torch.device("cpu"))
    state.position_S[:2] = position_B
    for batch in (VerifyBatch.whole(state, 2, count_B, 4), VerifyBatch.packed(state, 2, count_B)):
        cache = LayerCache(key_SJLD.clone(), value_SJLD.clone())
        query_TND, key_TJD, value_TJD = (torch.randn(len(batch.row_T), n, d) for n, d in ((4, 8), (2, 8), (2, 5)))
        found_TND = attend_without_kernel(query_TND, key_TJD, value_TJD, cache, batch, 0.3, window)
        for t, (row, ahead) in enumerate(zip(batch.row_T.tolist(), batch.ahead_T.tolist(), strict=True)):
            if ahead > count_B[row]:
                continue
            at = int(position_B[row]) + ahead
            assert torch.equal(cache.key[row, :, at], key_TJD[t]) and torch.equal(cache.value[row, :, at], value_TJD[t])
            first = max(0, at + 1 - window) if window else 0
            for head in range(4):
                score_L = cache.key[row, head // 2, first : at + 1] @ query_TND[t, head] * 0.3
                expected_D = score_L.softmax(0) @ cache.value[row, head // 2, first : at + 1]
                torch.testing.assert_close(found_TND[t, head], expected_D, atol=1e-6, rtol=1e-5)
        # Unused tokens write nothing.
        assert torch.equal(cache.key[1, :, 15:], key_SJLD[1, :, 15:]) and torch.equal(cache.key[2], key_SJLD[2])


# --- on a GPU

SHAPES = [
    # heads, key heads, key size, value size
    (14, 2, 64, 64),
    (12, 2, 128, 128),
    (28, 4, 128, 128),
    (4, 4, 48, 48),
    (8, 1, 96, 64),
    (8, 4, 256, 256),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_on_a_gpu_the_kernel_attends_as_plain_pytorch_does(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    heads, key_heads, size, value_size = shape
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, device="cuda").to(dtype)

    from verl.rollout.native import verification_triton

    for rows, width, window in ((1, 2, 0), (4, 5, 0), (4, 5, 3), (64, 5, 200), (300, 3, 0)):
        key_SJLD, value_SJLD = normal(rows + 1, key_heads, 700, size), normal(rows + 1, key_heads, 700, value_size)
        state = State.empty(rows + 1, 8, [0], torch.device("cuda"))
        state.position_S.copy_(torch.randint(0, 690, (rows + 1,)))
        state.position_S[0] = 0
        count_B = torch.randint(0, width, (rows,), device="cuda")
        batch = VerifyBatch.whole(state, rows, count_B, width)
        query_TND, key_TJD, value_TJD = (normal(rows * width, n, d) for n, d in ((heads, size), (key_heads, size), (key_heads, value_size)))
        caches = [LayerCache(key_SJLD.clone(), value_SJLD.clone()) for _ in range(2)]
        # In float32, of the values in their own dtype.
        exact = LayerCache(*(x.float() for x in caches[0]))
        expected_TND = attend_without_kernel(query_TND.float(), key_TJD.float(), value_TJD.float(), exact, batch, 0.1, window)
        attend_without_kernel(query_TND, key_TJD, value_TJD, caches[0], batch, 0.1, window)
        found_TND = verification_triton.attend(query_TND, key_TJD, value_TJD, *caches[1], batch.place_2B, 0.1, window)
        used_T = batch.ahead_T <= count_B[batch.row_T]
        bound = 1e-5 if dtype == torch.float32 else 2e-2
        assert (found_TND[used_T].float() - expected_TND[used_T]).abs().max() < bound and found_TND.isfinite().all()
        assert all(torch.equal(one, other) for one, other in zip(*caches, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.usefixtures("always")
def test_on_a_gpu_answers_are_those_without_drafts(compiles: bool) -> None:
    """In float32, with CUDA graphs: token for token, but for a draw that falls between two tokens, within rounding."""
    for family in ("qwen2", "qwen3", "mistral, windows"):
        model: Any = sharp(*FAMILIES[family]).to("cuda")  # type: ignore[arg-type]
        prompts = random_prompts()
        for sampling in (LONG, DRAWN, FILTERED):
            expected = NativeRollout(model, [0], Options(max_sequences=6, compile=compiles)).generate(prompts, sampling)
            rollout = with_drafts(model, [0], max_sequences=6, compile=compiles)
            for _ in range(2):  # the second time, all steps are CUDA graphs
                check_mostly_equal(rollout.generate(prompts, sampling), expected, at_most=int(sampling.temperature > 0), atol=1e-4)
            assert rollout.runner._graphs and totals(rollout).steps > 0
            if sampling is LONG and "windows" not in family:  # with a window, these random weights do not repeat themselves
                assert totals(rollout).kept > 1.02 * totals(rollout).active


def check_mostly_equal(found: list[Completion], expected: list[Completion], *, at_most: int, atol: float) -> None:
    """That all answers are equal but for so many, up to the first token that is not."""
    pairs = list(zip(found, expected, strict=True))
    assert sum(one.token_ids != other.token_ids for one, other in pairs) <= at_most
    for one, other in pairs:
        same = next((i for i, (x, y) in enumerate(zip(one.token_ids, other.token_ids, strict=False)) if x != y), len(one.token_ids))
        logprobs = (torch.tensor((c.logprobs or [])[:same]) for c in (one, other))
        torch.testing.assert_close(*logprobs, atol=atol, rtol=0)


@pytest.mark.gpu
@pytest.mark.usefixtures("always")
def test_on_a_gpu_log_probabilities_in_bfloat16_are_as_close_to_float32_as_without_drafts() -> None:
    """In half precision, the rounding of a product depends on its number of rows, so that nearly equal tokens may change places."""
    model: Any = qwen2().to("cuda")  # type: ignore[arg-type]
    half: Any = qwen2().to("cuda", torch.bfloat16)  # type: ignore[arg-type]
    prompts = random_prompts()

    def difference(make: Callable[[], NativeRollout], sampling: Sampling) -> float:
        rollout = make()
        answers, n = rollout.generate(prompts, sampling), sampling.n
        worst = []
        for number, one in enumerate(answers):
            prompt = prompts[number // n]
            with torch.no_grad():
                logits_GV = model(torch.tensor([[*prompt, *one.token_ids]], device="cuda")).logits[0, len(prompt) - 1 : -1]
            expected_G = logits_GV.log_softmax(-1).gather(1, torch.tensor(one.token_ids, device="cuda")[:, None]).squeeze(1).cpu()
            worst.append(float((expected_G - torch.tensor(one.logprobs)).abs().mean()))
        return max(worst)

    for sampling in (LONG, DRAWN):
        without, found = (difference(make, sampling) for make in (lambda: NativeRollout(half, [0]), lambda: with_drafts(half, [0])))
        assert found < 1.5 * without + 0.02


@pytest.mark.gpu
def test_on_a_gpu_repeated_calls_are_equal_bit_for_bit() -> None:
    model: Any = qwen2().to("cuda")  # type: ignore[arg-type]
    rollout = with_drafts(model, [0], max_sequences=6)
    rollout.generate(random_prompts(), Sampling(100))  # records
    first, counts = rollout.generate(random_prompts(), Sampling(100)), totals(rollout)
    assert rollout.generate(random_prompts(), Sampling(100)) == first and totals(rollout) == counts and counts.steps > 0
