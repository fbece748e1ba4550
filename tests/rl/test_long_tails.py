"""Over-sampling takes the groups of answers that finish first, and loses no prompt."""

import itertools
import json
import math
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rl_runs import STEPS, check_same, run_on, train, write_folder
from runs import lines_of, metrics_of, timeless
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from verl.config.load import load_config
from verl.config.ppo import PPOConfig
from verl.data.prompts import Prompt
from verl.engine import restore
from verl.errors import UserError
from verl.rewards._scoring import Scored
from verl.rl import first_finished
from verl.rl.clock import Clock
from verl.rl.first_finished import _split, take_first
from verl.rl.samples import Sample
from verl.rollout import Completion, Options, Sampling, vllm
from verl.rollout.native import NativeRollout

OVER: dict[str, object] = {"rollout__oversample": 0.5, "rollout__max_new_tokens": 100}
STOPS = range(200, 240)  # of 770 tokens, so that lengths are about geometric, with a mean of 20
SOMETIMES = (
    "def score(prompt, response, row):\n    return float(int(row['reference'][-1]) % 2) * (sum(c in 'aeiou' for c in response) % 3)\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_folder(tmp_path_factory.mktemp("tails"))
    config = path / "model" / "generation_config.json"
    generation = json.loads(config.read_text())
    config.write_text(json.dumps({**generation, "eos_token_id": [*generation["eos_token_id"], *STOPS]}))
    (path / "sometimes.py").write_text(SOMETIMES)
    return path


def answered(run: Path, steps: int) -> list[list[dict[str, Any]]]:
    """The lines of each step's answers."""
    return [lines_of(run / "rollouts" / f"step_{step + 1}.jsonl") for step in range(steps)]


def longest_of(lines: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Tokens of the longest answer to each prompt, by its number."""
    return {number: max(line["tokens"] for line in lines if line["number"] == number) for number in {line["number"] for line in lines}}


# The rule, without a model


class FakeRollout:
    """Answers of given lengths, of which some run at a time; they end in any order if `shuffles`."""

    def __init__(self, lengths: Sequence[Sequence[int]], slots: int = 10**6, *, shuffles: bool = False, overstates: bool = False):
        self._flat = [length for group in lengths for length in group]
        self._slots, self._shuffles, self._overstates = slots, shuffles, overstates
        self.unfinished: dict[int, int] = {}
        self.steps, self.is_closed = 0, False

    def stream(self, prompts: object, sampling: Sampling, seeds: object) -> Iterator[list[tuple[int, Completion]]]:
        assert sampling.progress
        queue, running = list(range(len(self._flat))), dict[int, int]()
        self.unfinished = dict.fromkeys(queue, 0)
        try:
            while queue or running:
                while queue and len(running) < self._slots:
                    running[queue.pop(random.randrange(len(queue)) if self._shuffles else 0)] = 0
                grows = [number for number in running if not self._shuffles or random.random() < 0.5]
                self.steps += 1
                for number in grows:
                    running[number] += 1
                    self.unfinished[number] = running[number] + 1000 * self._overstates
                ended = [number for number in grows if running[number] == self._flat[number]]
                for number in ended:
                    del running[number], self.unfinished[number]
                yield [(number, Completion([7] * self._flat[number], "stop")) for number in ended]
        finally:
            self.is_closed = True

    def unfinished_tokens(self) -> dict[int, int]:
        return self.unfinished


class FakeAnswerer:
    """Rewards are equal in groups of even numbers."""

    def __init__(self, rollout: FakeRollout, n: int, *, aside: bool = False):
        self.rollout, self.sampling, self.scores_aside = rollout, Sampling(500, 1.0, n), aside
        self.scored_at: list[int] = []  # steps of the rollout

    def sample_of(self, number: int, prompt: Prompt, done: Completion) -> Sample:
        return Sample(prompt, number, [], done.token_ids, [True] * len(done.token_ids), None, "", done.finish_reason, 0)

    def scored(self, samples: Sequence[Sample]) -> Scored:
        self.scored_at.append(self.rollout.steps)
        if self.scores_aside:
            time.sleep(0.05)
        for place, sample in enumerate(samples):
            sample.reward = float(place * (sample.group % 2))
        return Scored(np.zeros(len(samples), np.float32), {}, [])


def lengths_of(seed: int, groups: int = 12, n: int = 3) -> list[list[int]]:
    drawn = np.random.default_rng(seed).lognormal(2, 1, (groups, n))
    return [[int(length) + 1 for length in group] for group in drawn]


def taken(
    lengths: Sequence[Sequence[int]],
    rollout: FakeRollout,
    wanted: int,
    *,
    with_spread: bool = False,
    aside: bool = False,
    numbers: Sequence[int] | None = None,
) -> list[int]:
    prompts = [(number, Prompt(str(number), "", [], [1], {})) for number in numbers or range(len(lengths))]
    answerer: Any = FakeAnswerer(rollout, len(lengths[0]), aside=aside)
    found = take_first(answerer, prompts, wanted, Clock(torch.device("cpu")), with_spread=with_spread)
    assert sorted(found.groups) == sorted(group.number for group in found.finished)
    return found.taken


def shortest(lengths: Sequence[Sequence[int]], wanted: int, numbers: Sequence[int]) -> list[int]:
    return sorted(numbers, key=lambda number: (max(lengths[number]), number))[:wanted]


@pytest.mark.parametrize("seconds", [0.0, 9.0])
@pytest.mark.parametrize("seed", range(5))
def test_what_is_taken_depends_on_the_lengths_alone(seed: int, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_finished, "CHECK_SECONDS", seconds)
    lengths, odd = lengths_of(seed), range(1, 12, 2)
    for rollout in (
        FakeRollout(lengths),
        FakeRollout(lengths, 4),
        FakeRollout(lengths, 4, shuffles=True),
        FakeRollout(lengths, shuffles=True),
    ):
        assert taken(lengths, rollout, 7) == shortest(lengths, 7, range(12))
        assert rollout.is_closed
        for aside in (False, True):
            assert taken(lengths, rollout, 4, with_spread=True, aside=aside) == shortest(lengths, 4, odd)


def test_a_wrong_count_of_tokens_would_be_noticed() -> None:
    every = [lengths_of(seed) for seed in range(5)]
    assert any(taken(each, FakeRollout(each, 2, overstates=True), 7) != shortest(each, 7, range(12)) for each in every)


def test_generation_ends_when_no_unfinished_group_can_be_among_the_first() -> None:
    lengths = [[3, 5], [4, 4], [5, 2], [90, 1], [2, 5]]
    rollout = FakeRollout(lengths)
    assert taken(lengths, rollout, 3) == [1, 0, 2] and rollout.steps == 5, "of equal ones, the earlier prompts"
    assert taken(lengths, rollout := FakeRollout(lengths), 5)[-1] == 3 and rollout.steps == 90


def test_with_few_slots_it_ends_as_soon_as_the_last_group_has_a_longer_answer() -> None:
    lengths = [[2, 2], [5, 5], [9, 9], [10**6, 1]]
    assert taken(lengths, rollout := FakeRollout(lengths, 2), 2) == [0, 1]
    assert rollout.steps == 2 + 5 + 9 + 5


def test_a_group_that_may_still_end_with_the_last_one_is_waited_for() -> None:
    """Prompt 3 is asked first. When its answers have ended, prompt 1 has one as long as they, and a short one that has not begun."""
    lengths = [[5, 5], [5, 3]]
    assert taken(lengths, FakeRollout(lengths, 1), 1, numbers=[3, 1]) == [1]


def test_groups_are_scored_while_others_are_generated() -> None:
    lengths = [[2, 2], [3, 3], [9, 9], [60_000, 2]]
    rollout = FakeRollout(lengths)
    answerer: Any = FakeAnswerer(rollout, 2, aside=True)
    clock = Clock(torch.device("cpu"))
    take_first(answerer, [(number, Prompt("", "", [], [1], {})) for number in range(4)], 4, clock, with_spread=False)
    assert rollout.steps == 60_000 and answerer.scored_at[0] < 10
    assert clock.seconds["score"] < 0.05 * len(answerer.scored_at), "only the last group is waited for"


# Runs


def test_a_step_takes_the_shortest_groups_and_every_prompt_is_trained_once_or_waits(folder: Path) -> None:
    lines = train(folder, "over", trainer__total_training_steps=6, trainer__save_freq=2, **OVER)
    steps = answered(folder / "over", 6)
    numbers = [sorted(longest_of(step)) for step in steps]
    assert all(len(found) == 4 for found in numbers)
    waiting = restore.read_position(folder / "over/global_step_6").abandoned
    drawn = restore.read_position(folder / "over/global_step_6").drawn
    assert sorted([*(number for found in numbers for number in found), *map(int, waiting)]) == list(range(drawn)), "none twice, none lost"
    assert [line["rl/asked_again"] for line in lines] == [0, 0, 4, 0, 0, 4]
    assert [line["rl/waiting_prompts"] for line in lines] == [2, 4, 0, 2, 4, 0]
    assert [line["rl/abandoned_answers"] for line in lines] == [8, 8, 0, 8, 8, 0]
    plain = train(folder, "plain", trainer__total_training_steps=1, data__prompts_per_step=6, rollout__max_new_tokens=100)
    of_all = longest_of(answered(folder / "plain", 1)[0])
    assert numbers[0] == sorted(sorted(of_all, key=lambda number: (of_all[number], number))[:4])
    assert lines[0]["rl/response_tokens"] < plain[0]["rl/response_tokens"]
    assert lines[0]["rl/response_tokens"] < lines[0]["perf/drawn_response_tokens"] < plain[0]["rl/response_tokens"]


def test_all_engines_take_the_same_groups_and_native_abandons_the_rest(folder: Path) -> None:
    native, hf = (train(folder, name, rollout__name=name, trainer__total_training_steps=3, **OVER) for name in ("native", "hf"))
    assert numbers_of(folder / "native") == numbers_of(folder / "hf")
    assert "over-sampling saves no time" in (folder / "hf/train.log").read_text()
    assert "over-sampling saves no time" not in (folder / "native/train.log").read_text()
    lost = [sum(line["perf/abandoned_tokens"] for line in lines) for lines in (native, hf)]
    assert 0 < lost[0] < lost[1]


def numbers_of(run: Path) -> list[list[int]]:
    return [[line["number"] for line in step] for step in answered(run, 3)]


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_two_processes_take_the_groups_that_one_does(folder: Path, name: str) -> None:
    keys: dict[str, object] = {**OVER, "algorithm__name": name, **({"reward__name": folder / "sometimes.py"} if name == "dapo" else {})}
    runs = [run_on(processes, folder, f"{name}_on_{processes}", **keys) for processes in (1, 2)]
    check_same(runs[1], runs[0])
    if name == "dapo":
        return
    assert len({number for step in answered(runs[0], STEPS) for number in longest_of(step)}) == 4 * STEPS
    names = ("rl/abandoned_answers", "rl/waiting_prompts", "rl/asked_again")
    assert [[line[name] for name in names] for line in metrics_of(runs[0])] == [
        [line[name] for name in names] for line in metrics_of(runs[1])
    ]


RESUMED: dict[str, object] = {**OVER, "trainer__total_training_steps": 4, "trainer__save_freq": 2}


def gone_on(folder: Path, output: str) -> list[dict[str, float]]:
    """A run of four steps, of which the last two are done again."""
    shutil.copytree(folder / "whole", folder / output)
    shutil.rmtree(folder / output / "global_step_4")
    return timeless(train(folder, output, **RESUMED))


def test_a_resumed_run_asks_the_prompts_that_wait_as_an_uninterrupted_one_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = timeless(train(folder, "whole", **RESUMED))
    assert gone_on(folder, "resumed") == whole
    found, expected = (load_file(folder / name / "global_step_4/model.safetensors") for name in ("resumed", "whole"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert answered(folder / "resumed", 4) == answered(folder / "whole", 4)
    read = restore.read_position
    monkeypatch.setattr(restore, "read_position", lambda directory: replace(read(directory), abandoned={}))
    assert gone_on(folder, "lost") != whole, "what a run does that has lost them"


def test_without_over_sampling_prompts_that_wait_are_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(folder, "kept", **{**RESUMED, "trainer__total_training_steps": 2})
    train(folder, "kept", **{**RESUMED, "rollout__oversample": 0, "trainer__resume_override": "true"})
    position = restore.read_position(folder / "kept/global_step_4")
    assert len(position.abandoned) == 4 and position.drawn == 12 + 2 * 4
    assert "4 prompts that over-sampling has abandoned" in capsys.readouterr().out
    state = folder / "kept/global_step_4/trainer/state.json"
    for wrong in ("x", "20", "-1"):
        state.write_text(json.dumps({**json.loads(state.read_text()), "abandoned": {wrong: 1}}))
        with pytest.raises(UserError, match="abandoned is"):
            restore.read_position(folder / "kept/global_step_4")


def test_dynamic_sampling_goes_on_until_enough_groups_have_spread(folder: Path) -> None:
    keys: dict[str, object] = {"algorithm__name": "dapo", "reward__name": folder / "sometimes.py", "trainer__total_training_steps": 3}
    refilled = train(folder, "dapo", rollout__max_new_tokens=100, **keys)
    lines = train(folder, "dapo_over", **{**OVER, "rollout__oversample": 3.0}, **keys)
    assert refilled[0]["rl/refills"] > lines[0]["rl/refills"] == 0
    for step, line in zip(answered(folder / "dapo_over", 3), lines, strict=True):
        rewards = {number: {answer["reward"] for answer in step if answer["number"] == number} for number in longest_of(step)}
        kept = {answer["number"] for answer in step if answer["trained"]}
        assert kept == {number for number, found in rewards.items() if len(found) > 1} and len(kept) == 4
        last = max((longest_of(step)[number], number) for number in kept)
        assert all((longest, number) <= last for number, longest in longest_of(step).items()), "a later one without spread is abandoned"
        assert line["rl/groups_without_spread"] == pytest.approx(1 - 4 / len(rewards))
    waiting = {int(number) for number in restore.read_position(folder / "dapo_over/global_step_3").abandoned}
    seen = [number for step in answered(folder / "dapo_over", 3) for number in longest_of(step)]
    position = restore.read_position(folder / "dapo_over/global_step_3")
    assert sorted([*seen, *waiting]) == list(range(position.drawn))


def test_failures_belong_to_the_group_of_their_row() -> None:
    groups = [[Sample(Prompt(where, "", [], [1], {}), 0, [], [], [], None, "", "stop", 0)] * 2 for where in ("a:1", "a:2")]
    errors = [UserError("failed", where=where) for where in ("a:2", "a:1", "a:2")]
    parts = _split(Scored(np.arange(4, dtype=np.float32), {"x": np.arange(4, dtype=np.float32)}, errors), groups)
    assert [[error.where for error in part.errors] for part in parts] == [["a:1"], ["a:2", "a:2"]]
    assert [part.each["x"].tolist() for part in parts] == [part.reward_A.tolist() for part in parts] == [[0, 1], [2, 3]]


FAILS = "def score(prompt, response, row):\n    if len(response) % 2:\n        raise ValueError('odd')\n    return float(len(response))\n"


def test_a_grader_that_fails_is_told_of_the_groups_that_have_finished(folder: Path) -> None:
    (folder / "fails.py").write_text(FAILS)
    keys: dict[str, object] = {**OVER, "reward__name": folder / "fails.py", "trainer__total_training_steps": 2}
    lines = train(folder, "zero", reward__on_error="zero", **keys)
    for step, line in zip(answered(folder / "zero", 2), lines, strict=True):
        assert line["reward/errors"] == sum(len(answer["response"]) % 2 for answer in step) > 0
    with pytest.raises(UserError, match="ValueError: odd") as caught:
        train(folder, "stops", **keys)
    assert str(caught.value.where).startswith(f"{folder / 'train.jsonl'}:")


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"rollout.oversample": -0.1}, "rollout.oversample"),
        ({"rollout.oversample": math.nan}, "rollout.oversample"),
        ({"rollout.oversample": 0.5, "rollout.tool": "calculator"}, "rollout.oversample=0.5 with rollout.tool=calculator"),
        (
            {"rollout.oversample": 0.5, "rollout.url": "http://localhost:8000", "rollout.name": "vllm"},
            "rollout.oversample=0.5 with rollout.url",
        ),
        ({"rollout.oversample": 0.5, "mapping.rollout": "[1]"}, "rollout.oversample=0.5 with mapping.rollout=[1]"),
    ],
)
def test_what_cannot_abandon_answers_is_refused(changes: dict[str, object], where: str, folder: Path) -> None:
    keys = {"data.train_files": folder / "train.jsonl", "model.partial_pretrain": folder / "model", **changes}
    with pytest.raises(UserError) as caught:
        load_config(PPOConfig, [f"{key}={value}" for key, value in keys.items()])
    assert caught.value.where == where and caught.value.fix


# What engines tell of unfinished answers


def test_native_tells_how_many_tokens_an_unfinished_answer_has(folder: Path) -> None:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder / "model")
    rollout = NativeRollout(model, [1, *STOPS], Options(max_sequences=5))
    told: list[dict[int, int]] = []
    lengths: dict[int, int] = {}
    for found in rollout.stream([[5, 6], [7, 8, 9]], Sampling(60, 1.0, 4, progress=True)):
        told.append(rollout.unfinished_tokens())
        lengths |= {number: len(done.token_ids) for number, done in found}
        assert set(told[-1]) == set(range(8)) - lengths.keys()
    assert max(lengths.values()) > 2 * min(lengths.values())
    for before, after in itertools.pairwise(told):
        assert all(before[number] <= after[number] <= before[number] + 1 for number in after)
    assert all(tokens < lengths[number] for counts in told for number, tokens in counts.items())
    assert any(tokens == lengths[number] - 1 for counts in told for number, tokens in counts.items()), "they are no lower bound alone"
    assert told[-1] == {}


class VllmEngine:
    """Answers of 3 and 5 tokens in place of vLLM's engine, one token a step; the second is admitted a step later."""

    def __init__(self, kind: str):
        self._kind, self._steps, self.aborted = kind, 0, list[str]()

    def add_request(self, number: str, prompt: object, params: object) -> None: ...

    def abort_request(self, numbers: list[str]) -> None:
        self.aborted = numbers

    def step(self) -> list[SimpleNamespace]:
        self._steps += 1
        found = []
        for number, first, length in (("0", 0, 3), ("1", 1, 5)):
            tokens = self._steps - first
            if 0 < tokens <= length and (self._kind == "CUMULATIVE" or tokens == length):
                ids = list(range(tokens))
                out = SimpleNamespace(token_ids=ids, logprobs=[{i: SimpleNamespace(logprob=-1.0)} for i in ids], finish_reason="stop")
                found.append(SimpleNamespace(request_id=number, finished=tokens == length, outputs=[out]))
        return found


@pytest.mark.parametrize(("progress", "kind"), [(True, "CUMULATIVE"), (False, "FINAL_ONLY")])
def test_vllm_in_this_process_tells_it_and_aborts_what_is_left(progress: bool, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "_tokens", list)
    monkeypatch.setattr(vllm, "_params", lambda sampling, seed, stop_ids: None)
    rollout, engine = object.__new__(vllm.VllmRollout), VllmEngine(kind)
    rollout.stop_ids, rollout.positions, rollout._asleep, rollout._version = [9], 100, set(), 0
    rollout._llm = SimpleNamespace(llm_engine=engine)
    stream = rollout.stream([[1], [2]], Sampling(10, 1.0, progress=progress))
    found = [(len(next(stream)), dict(rollout.unfinished_tokens())) for _ in range(3 if progress else 1)]
    if progress:
        assert found == [(0, {0: 1, 1: 0}), (0, {0: 2, 1: 1}), (1, {1: 2})]
    else:
        assert found == [(1, {1: 0})], "at least"
    stream.close()  # type: ignore[attr-defined]
    assert engine.aborted == ["1"]
