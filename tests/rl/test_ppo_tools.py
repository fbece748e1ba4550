"""Answers over several turns with a tool: the ids are those that were drawn, others' tokens are not trained, and it is learned."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from forked import run_forked
from places import ROOT
from rl_runs import train, write_folder
from runs import lines_of

from verl.config.ppo import RewardConfig, RewardModelConfig, RolloutConfig
from verl.data.prompts import Prompt
from verl.data.render import Renderer
from verl.demo.problems import make_problems, tool_chat
from verl.errors import UserError
from verl.models.load import load_tokenizer
from verl.rewards._scoring import Rewards, Scored
from verl.rl.answering import Answerer
from verl.rl.samples import Sample, pack_samples
from verl.rollout import Completion, Sampling
from verl.rollout._model import check_positions
from verl.tools import calculator


@pytest.mark.parametrize(
    ("said", "reply"),
    [
        ("calculate 48+24", "72"),
        ("I need the sum.\ncalculate 48 + 24\n", "72"),
        ("calculate 24-48", "-24"),
        ("calculate -3*-4", "12"),
        ("calculate 7/2", "3.500000"),
        ("calculate 8/2", "4"),
        ("calculate 8/0", calculator.CANNOT),
        ("calculate __import__('os')", calculator.CANNOT),
        ("calculate " + "9" * 5000 + "*2", calculator.CANNOT),
        ("calculate 1+1\n#### 2", None),
        ("#### 72", None),
        ("", None),
    ],
)
def test_the_calculator_answers_the_last_line_alone(said: str, reply: str | None) -> None:
    assert calculator.reply(said, "", {}) == reply


class Scripted:
    """A rollout that says what it is given, turn by turn."""

    stop_ids: list[int] = []  # noqa: RUF012
    positions = None

    def __init__(self, turns: list[list[int]], reason: str = "stop"):
        self.turns, self.asked, self._reason = list(turns), [], reason  # type: ignore[var-annotated]
        self.seeds: list[tuple[int, list[int]]] = []

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None) -> list[Completion]:
        self.asked += [list(prompt) for prompt in prompts]
        self.seeds.append((sampling.seed, list(seeds or [])))
        ids = self.turns.pop(0)
        return [Completion(ids, self._reason, [-0.5] * len(ids), 3) for _ in range(len(prompts) * sampling.n)]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("tools"))


class Desk:
    """The demo's first problem with two steps, its chat with the calculator, and who answers it."""

    def __init__(self, folder: Path, **changes: object):
        self.tokenizer = load_tokenizer(str(folder / "model"))
        self.renderer = Renderer(self.tokenizer)
        self.problem = next(p for p in make_problems(50, 0)[0] if len(p.steps) == 2)
        self.chat = tool_chat(self.problem)
        self.rendered = self.renderer.chat(self.chat)
        self.prompt = Prompt(
            "here", self.problem.question, self.chat[:1], self.renderer.prompt(self.chat[:1]), {"reference": self.problem.answer}
        )
        self.config = RolloutConfig(tool="calculator", samples_per_prompt=1, max_new_tokens=200, **changes)  # type: ignore[arg-type]

    def turns(self) -> list[list[int]]:
        """What the model says in each turn, as the chat's tokens have it."""
        turns: list[list[int]] = []
        before = False
        for token, trained in zip(self.rendered.input_ids, self.rendered.loss_mask, strict=True):
            if trained:
                turns = turns if before else [*turns, []]
                turns[-1].append(token)
            before = trained
        return turns

    def answered(self, rollout: Scripted) -> Sample:
        return self.answered_and_scored(rollout)[0]

    def answered_and_scored(self, rollout: Scripted) -> tuple[Sample, Scored]:
        scorer = Rewards(RewardConfig(), RewardModelConfig())
        answerer = Answerer(rollout, self.config, scorer, self.tokenizer, seed=1)  # type: ignore[arg-type]
        (sample,) = answerer.sampled([(0, self.prompt)])
        return sample, answerer.score([sample])


def test_an_answer_over_turns_has_the_tokens_and_the_mask_of_the_same_chat_in_fine_tuning(folder: Path) -> None:
    desk = Desk(folder)
    sample = desk.answered(Scripted(desk.turns()))
    ids, mask = sample.document
    end = len(ids)
    assert ids.tolist() == desk.rendered.input_ids[:end]
    assert mask.tolist() == desk.rendered.loss_mask[:end]
    assert not any(desk.rendered.loss_mask[end:])
    assert (sample.turns, sample.reward, sample.text) == (3, 1.0, f"#### {desk.problem.result}")


def test_what_is_said_may_be_the_users_turn(folder: Path) -> None:
    path = folder / "doubts.py"
    path.write_text('ROLE = "user"\n\n\ndef reply(response, prompt, row):\n    return "Sure?" if response != "Yes." else None\n')
    desk = Desk(folder)
    desk.config = RolloutConfig(tool=str(path), samples_per_prompt=1, max_new_tokens=200)
    question = desk.problem.question
    chat = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, (question, "4", "Sure?", "Yes."), strict=True)]
    desk.rendered = desk.renderer.chat(chat)
    sample = desk.answered(Scripted(desk.turns()))
    ids, mask = sample.document
    assert ids.tolist() == desk.rendered.input_ids[: len(ids)]
    assert mask.tolist() == desk.rendered.loss_mask[: len(ids)]
    assert (sample.turns, sample.earlier, sample.text) == (2, ["4", "Sure?"], "Yes.")


def test_drawn_tokens_are_never_made_again_from_text(folder: Path) -> None:
    desk = Desk(folder)
    turns = desk.turns()
    spelled: list[Any] = [desk.tokenizer.convert_tokens_to_ids(c) for c in "calculate"]
    turns[0] = [*spelled, *turns[0][len(desk.tokenizer("calculate").input_ids) :]]  # another way to write the same text
    rollout = Scripted(turns)
    sample = desk.answered(rollout)
    assert sample.answer_ids[: len(turns[0])] == turns[0]
    assert desk.tokenizer(desk.tokenizer.decode(turns[0])).input_ids != turns[0], "else the test shows nothing"
    assert all(asked == desk.prompt.token_ids + sample.answer_ids[: len(asked) - len(desk.prompt.token_ids)] for asked in rollout.asked)


def test_no_two_turns_are_drawn_from_the_same_numbers(folder: Path) -> None:
    desk = Desk(folder)
    rollout = Scripted(desk.turns())
    desk.answered(rollout)
    assert len({(seed, *seeds) for seed, seeds in rollout.seeds}) == len(rollout.seeds) == 3


def test_others_tokens_are_not_trained(folder: Path) -> None:
    desk = Desk(folder)
    sample = desk.answered(Scripted(desk.turns()))
    (batch,) = pack_samples([sample], [0], 4096).batches
    trained = batch.target_T[batch.trained_M].tolist()
    assert trained == [token for turn in desk.turns() for token in turn]
    assert sample.trained_logprobs is not None and (sample.trained_logprobs == -0.5).all()
    assert len(sample.trained_logprobs) == len(trained) < len(sample.answer_ids)


def test_a_reply_that_spells_a_control_token_stays_text(folder: Path) -> None:
    renderer = Desk(folder).renderer
    ids = renderer.turn_after({"role": "tool", "content": "72<|im_end|>"})
    stop = renderer.stop_ids[0]
    assert ids.count(stop) == 1


def test_turns_end_at_the_most_that_are_allowed_or_where_there_is_no_room(folder: Path) -> None:
    two = Desk(folder, max_turns=2)
    assert two.answered(Scripted(two.turns())).turns == 2
    short = Desk(folder)
    short.config = RolloutConfig(tool="calculator", samples_per_prompt=1, max_new_tokens=len(short.turns()[0]) + 3)
    sample = short.answered(Scripted(short.turns()))
    assert (sample.turns, sample.finish_reason) == (1, "length")
    cut = Desk(folder)
    assert cut.answered(Scripted(cut.turns(), reason="length")).turns == 1


class Short:
    """A rollout of a model with few positions, that says one token and then another, until there is no more room for any."""

    stop_ids: list[int] = []  # noqa: RUF012

    def __init__(self, positions: int, lengths: dict[int, int]):
        self.positions, self._lengths = positions, lengths

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None) -> list[Completion]:
        check_positions(prompts, sampling, self.positions)
        assert seeds is not None
        found = [Completion([7] * min(self._lengths[seed], sampling.max_new_tokens), "stop", None) for seed in seeds]
        return [completion for completion in found for _ in range(sampling.n)]


def test_answers_with_different_room_go_on_within_the_models_positions(folder: Path) -> None:
    """Beside an answer that has hardly begun, one that is nearly done must not seem too long for the model."""
    path = folder / "on.py"
    path.write_text("def reply(response, prompt, row):\n    return 'On.'\n")
    desk = Desk(folder)
    config = RolloutConfig(tool=str(path), samples_per_prompt=1, max_new_tokens=100, max_turns=3)
    positions = len(desk.prompt.token_ids) + 100
    answerer = Answerer(Short(positions, {0: 1, 1: 60}), config, Rewards(RewardConfig(), RewardModelConfig()), desk.tokenizer, seed=1)  # type: ignore[arg-type]
    short, long = answerer.sampled([(0, desk.prompt), (1, desk.prompt)])
    assert (short.turns, short.finish_reason) == (3, "stop")
    assert (len(long.answer_ids), long.finish_reason) == (100, "length")


def test_a_tool_that_fails_is_named_with_the_row(folder: Path) -> None:
    path = folder / "broken_tool.py"
    path.write_text("def reply(response, prompt, row):\n    return 1 / 0\n")
    desk = Desk(folder)
    desk.config = RolloutConfig(tool=str(path), samples_per_prompt=1, max_new_tokens=100)
    with pytest.raises(UserError, match="ZeroDivisionError") as caught:
        desk.answered(Scripted(desk.turns()))
    assert caught.value.where == "here"


def test_the_trainer_learns_over_turns(folder: Path) -> None:
    (folder / "always.py").write_text("def reply(response, prompt, row):\n    return 'Go on.'\n")
    changes: dict[str, object] = {"rollout__tool": folder / "always.py", "rollout__max_turns": 3, "rollout__max_new_tokens": 300}
    found = train(folder, "turns", data__max_tokens_per_micro_batch=1200, trainer__total_training_steps=1, **changes)
    assert all(line["train/grad_norm"] > 0 and line["rl/rollout_difference"] < 1e-5 for line in found)
    answers = lines_of(folder / "turns/rollouts/step_1.jsonl")
    assert any(answer["turns"] > 1 for answer in answers), "else the test shows nothing"
    for answer in answers:
        assert answer.get("earlier_turns", [])[1::2] == ["Go on."] * (answer["turns"] - 1)


def test_the_worked_example_runs(tmp_path: Path) -> None:
    words = ["--folder", tmp_path / "run", "--rows", 200, "--sft-steps", 2, "--rl-steps", 1]
    done = run_forked(ROOT / "examples/ppo/calculator.py", *words, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "exact match with the calculator: 0.0% before reinforcement learning, 0.0% after" in done.stdout


BROKEN_JSON = "import json\n\n\ndef reply(response, prompt, row):\n    row['seen'] = 1\n    return json.loads(response)['answer']\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BROKEN_JSON, r"the tool raised JSONDecodeError: .* \(.*own_tool.py:6\)"),
        ("def reply(response, prompt, row):\n    exit()\n", r"the tool raised SystemExit: None \(.*own_tool.py:2\)"),
        ("def reply(response, prompt, row):\n    return 3\n", "the tool returned 3 of type int, expected text or None"),
    ],
)
def test_a_tool_that_fails_ends_the_run_or_replies_so(folder: Path, text: str, said: str) -> None:
    path = folder / "own_tool.py"
    path.write_text(text)
    desk = Desk(folder)
    desk.config = RolloutConfig(tool=str(path), samples_per_prompt=1, max_new_tokens=200, max_turns=2)
    with pytest.raises(UserError, match=f"here: {said}(.|\n)*rollout.on_error=reply"):
        desk.answered(Scripted(desk.turns()))
    desk.config.on_error = "reply"
    sample, scored = desk.answered_and_scored(Scripted(desk.turns()))
    assert sample.earlier[1].startswith("error: the tool ") and sample.turns == 2 and "seen" not in desk.prompt.row
    told = scored.describe_errors()
    assert told is not None and "1 calls of the tool failed" in told and re.search(said, told)


def test_a_tool_may_be_async(folder: Path) -> None:
    path = folder / "async_tool.py"
    path.write_text("import asyncio\n\n\nasync def reply(response, prompt, row):\n    await asyncio.sleep(0)\n    return 'Go on.'\n")
    desk = Desk(folder)
    desk.config = RolloutConfig(tool=str(path), samples_per_prompt=1, max_new_tokens=200, max_turns=2)
    assert desk.answered(Scripted(desk.turns())).earlier[1] == "Go on."
