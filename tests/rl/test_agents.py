"""Agents that know only the `openai` package, through the endpoint: what they ask is trained on, and what goes wrong ends alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agent_runs import TALK, Table, program, told
from places import ROOT
from rl_runs import check_same, run_on, train, words, write_folder
from runs import PPO, lines_of, metrics_of
from transformers import AutoTokenizer

from verl.config.load import load_config
from verl.config.ppo import PPOConfig
from verl.data.prompts import Prompt
from verl.engine.engine import Engine
from verl.errors import UserError
from verl.rl.answering import Answerer
from verl.rl.episode import MOST_TURNS
from verl.rl.experience import Experience
from verl.rl.method import load_method
from verl.rl.samples import Sample
from verl.rollout import Completion, Sampling
from verl.rollout.live import Live

SERVED: dict[str, object] = {
    "rollout__serve": "true",
    "rollout__max_new_tokens": 60,
    "data__max_tokens_per_micro_batch": 1200,
    "rollout__max_sequences": 1,
}
# What goes wrong depends on the row's number.
ALL_WRONG = """
import os, time, openai

def run(row):
    client = openai.OpenAI(max_retries=0)
    def ask():
        chat = [{"role": "user", "content": row["question"]}]
        return client.chat.completions.create(model=os.environ["OPENAI_MODEL"], messages=chat, max_tokens=4)
    ask()
    kind = row["kind"]
    if kind == "hang":
        time.sleep(1000)
    if kind == "raise":
        raise ValueError("no sixes")
    if kind == "flood":
        while True:
            try:
                ask()
            except openai.RateLimitError:
                pass
    if kind == "leave":
        os._exit(3)
    return 1.0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("agents"))


@pytest.fixture(scope="module")
def table(folder: Path) -> Table:
    return Table(folder)


def test_what_an_agent_asks_is_its_answer(table: Table, folder: Path) -> None:
    samples, made = table.answers(program(folder, TALK))
    assert [sample.group for sample in samples] == [0, 0, 1, 1]
    for sample in samples:
        talk, again = sample.trajectories
        assert (talk.turns, again.turns) == (2, 1) and talk.prompt_ids == again.prompt_ids == sample.prompt.token_ids
        assert talk.logprobs is not None and len(talk.logprobs) == len(talk.answer_ids) == len(talk.answer_mask)
        assert sample.outcome is not None and sample.outcome.rewards == [len(again.text)]
    assert made.metrics_of(samples)[0] == {
        "agent/requests": 3.0,
        "agent/trajectories": 2.0,
        "agent/failed": 0,
        "agent/late": 0,
        "agent/flooded": 0,
    }


def test_an_answer_does_not_depend_on_time_or_on_the_answers_beside_it(table: Table, folder: Path) -> None:
    naps = "import os, random, time\n" + TALK.replace(
        "    for turn in range(2):\n", "    for turn in range(2):\n        time.sleep(random.random() / 5)\n"
    )
    samples, _ = table.answers(program(folder, TALK))
    slowly, _ = table.answers(program(folder, naps, "naps.py"))
    alone, _ = table.answers(program(folder, TALK), [(1, table.prompts[1])])
    one_by_one, _ = table.answers(program(folder, TALK), processes=1)
    assert told(slowly) == told(samples) == told(one_by_one) and told(alone) == told(samples)[2:]
    assert len({tuple(sample.answer_ids) for sample in samples}) == 4, "each has random numbers of its own"


def test_another_engine_gives_the_same_answers(table: Table, folder: Path) -> None:
    samples, _ = table.answers(program(folder, TALK))
    of_hf, _ = Table(folder, engine="hf", max_sequences=None).answers(program(folder, TALK))
    assert told(of_hf) == told(samples)
    for ours, theirs in zip(samples, of_hf, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_runs_that_hang_raise_flood_or_leave_are_ended_counted_and_told(table: Table, folder: Path) -> None:
    kinds = ["hang", "raise", "flood", "leave", "good", "good"]
    prompts = [(number, table.prompts[number]) for number in range(len(kinds))]
    for (_, prompt), kind in zip(prompts, kinds, strict=True):
        prompt.row["kind"] = kind
    began = time.monotonic()
    samples, made = table.answers(program(folder, ALL_WRONG), prompts, n=1, seconds=4.0, requests=5)
    assert time.monotonic() - began < 4.0 + 10.0
    found, _ = made.metrics_of(samples)
    assert (found["agent/failed"], found["agent/late"], found["agent/flooded"]) == (2.0, 1.0, 1.0)
    said = [f"{error.where}: {error.what}" for sample in samples if sample.outcome is not None for error in sample.outcome.errors]
    for where, text in {0: "did not end within 4 s (agent.seconds)", 1: "raised ValueError: no sixes", 3: "ended with exit code 3"}.items():
        assert any(line.startswith(f"{prompts[where][1].where}: the agent {text}") for line in said)
    assert any("has asked more than 5 times (agent.requests)" in line for line in said)
    assert [sample.outcome.rewards for sample in samples if sample.outcome is not None] == [[]] * 4 + [[1.0]] * 2
    assert all(sample.trained_tokens > 0 for sample in samples), "what the model has answered until then is kept"
    assert len(samples[2].trajectories) == 5


def test_a_run_that_asks_nothing_is_an_empty_answer(folder: Path) -> None:
    text = "def run(row):\n    return 1.0 if row['question'] < 'M' else 0.0\n"
    found = train(folder, "silent", agent__program=program(folder, text, "silent.py"), trainer__total_training_steps=1, **SERVED)
    assert (found[0]["rl/response_tokens"], found[0]["agent/requests"], found[0]["rl/turns"]) == (0.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def learned(folder: Path) -> Path:
    """A run of two steps with a validation."""
    validated = {"data__val_files": folder / "test.jsonl", "data__val_max_samples": 3}
    train(folder, "learned", agent__program=program(folder, TALK), trainer__total_training_steps=2, **validated, **SERVED)
    return folder / "learned"


def test_the_trainer_learns_from_an_agent_and_a_run_repeats_itself(folder: Path, learned: Path) -> None:
    again = train(folder, "again", agent__program=program(folder, TALK), trainer__total_training_steps=2, **SERVED)
    once = [line for line in metrics_of(learned) if "train/loss" in line]
    for line, same in zip(once, again, strict=True):
        assert line["train/grad_norm"] > 0 and line["rl/largest_rollout_difference"] < 1e-4
        for name in (name for name in same if name.startswith(("rl/", "train/", "reward/", "agent/"))):
            assert line[name] == pytest.approx(same[name], abs=1e-5), name
    for answer in lines_of(learned / "rollouts/step_1.jsonl"):
        assert answer["turns"] == 3 and answer["earlier_turns"][1] == "Go on, 0." and len(answer["more"]) == 1
        assert answer["reward/agent"] == len(answer["more"][0][-1]) and answer["ending"] == "done"


def test_failures_are_told_and_the_step_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = TALK.replace("    return float", "    if ord(row['question'][0]) % 2:\n        return 1 / 0\n    return float")
    found = train(folder, "broken", agent__program=program(folder, broken, "broken.py"), trainer__total_training_steps=2, **SERVED)
    said = capsys.readouterr().out
    assert sum(line["agent/failed"] for line in found) > 0 and len(found) == 2
    assert "runs of the agent were ended; the model's answers until then are kept (agent.on_error=end)" in said
    assert "the agent raised ZeroDivisionError: division by zero" in said and "broken.py:" in said
    with pytest.raises(UserError, match="the agent raised ZeroDivisionError") as caught:
        train(folder, "stopped", agent__program=folder / "broken.py", agent__on_error="stop", **SERVED)
    assert "train.jsonl:" in str(caught.value.where)


def test_a_validation_answers_greedily_and_may_name_a_temperature(folder: Path, learned: Path) -> None:
    keys = {
        "data__val_files": folder / "test.jsonl",
        "data__val_max_samples": 3,
        "trainer__test_freq": 1,
        "trainer__total_training_steps": 1,
    }
    hot = program(folder, TALK.replace("max_tokens=8", "max_tokens=8, temperature=1.0"), "hot.py")
    before, *_ = train(folder, "hot", agent__program=hot, **keys, **SERVED)
    assert {"val/reward", "val/agent"} <= before.keys()
    greedy, hotter = (lines_of(run / "rollouts/validation_0.jsonl") for run in (learned, folder / "hot"))
    assert all(line["earlier_turns"][0] == line["more"][0][0] for line in greedy), "the same question has the same greedy answer"
    assert any(line["earlier_turns"][0] != line["more"][0][0] for line in hotter)


def test_a_signal_ends_a_run_whose_agents_hang(folder: Path) -> None:
    given = program(
        folder, "import time\n\n\ndef run(row):\n    open(__file__ + '.began', 'w').close()\n    time.sleep(1000)\n", "asleep.py"
    )
    argv = words(folder, "signalled", agent__program=given, agent__seconds=900, **SERVED)
    run = subprocess.Popen(
        [sys.executable, *PPO, *argv],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 100
        while not Path(f"{given}.began").exists() and time.monotonic() < deadline and run.poll() is None:
            time.sleep(0.1)
        began = time.monotonic()
        run.send_signal(signal.SIGTERM)
        said, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    assert time.monotonic() - began < 15.0 and run.returncode == 128 + signal.SIGTERM, said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollout__serve": "true"}, "there is no agent to ask the endpoint"),
        ({"rollout__serve": "true", "reward__name": "null"}, "there is no agent to ask the endpoint"),
        ({"agent__program": "agent.py"}, "the agent has no endpoint to ask"),
        ({**SERVED, "agent__program": "agent.py", "rollout__tool": "calculator"}, "an agent has its own tools"),
        ({**SERVED, "agent__program": "agent.py", "environment__name": "calculator"}, "would act in an environment"),
        ({**SERVED, "agent__program": "agent.py", "rollout__oversample": 0.5}, "depend on the clock"),
        ({**SERVED, "agent__program": "agent.py", "rollout__staleness": 1}, "cannot be drawn before their step"),
        ({**SERVED, "agent__program": "agent.py", "agent__requests": 0}, "agent.requests"),
        ({**SERVED, "agent__program": "agent.py", "agent__on_error": "weep"}, "agent.on_error"),
        (
            {**SERVED, "agent__program": "agent.py", "agent__secrets": "[A_KEY,OPENAI_API_KEY]"},
            "agent.secrets=[A_KEY,OPENAI_API_KEY]: each run",
        ),
        ({**SERVED, "agent__program": "agent.py", "agent__secrets": "[OPENAI_BASE_URL]"}, "would ask another model than the trained one"),
    ],
)
def test_what_does_not_fit_an_agent_is_refused_before_anything_begins(folder: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(PPOConfig, words(folder, "refused", **changes))
    assert said in f"{caught.value.where}: {caught.value.what}"


def test_a_missing_program_is_refused_before_the_model_is_loaded(folder: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        train(folder, "missing", agent__program="missing.py", **SERVED)
    assert not (folder / "missing").exists()


# --- the same as an environment, and as one answer

ENVIRONMENT = """
class Environment:
    def reset(self, row, seed):
        self.turn, self.seed = 0, seed
        return {"messages": [{"role": "user", "content": f"{row['question']} {seed % 9}"}]}

    def step(self, message):
        self.turn += 1
        said = f"{len(message['content'])} letters, {self.turn}."
        return {"messages": [{"role": "user", "content": said}], "reward": message["content"].count("e"), "done": self.turn == 3}

    def close(self):
        pass
"""
SAME_AS_AGENT = """
import os, openai

def run(row):
    client = openai.OpenAI()
    chat = [{"role": "user", "content": f"{row['question']} {int(os.environ['AGENT_SEED']) % 9}"}]
    reward = 0
    for turn in range(3):
        try:
            found = client.chat.completions.create(model=os.environ["OPENAI_MODEL"], messages=chat).choices[0]
        except openai.BadRequestError as error:
            assert error.code == "context_length_exceeded"
            break
        if found.finish_reason == "length":
            break
        reward += found.message.content.count("e")
        chat += [found.message, {"role": "user", "content": f"{len(found.message.content)} letters, {turn + 1}."}]
    return reward
"""


def stops_often(folder: Path) -> Path:
    """A model whose turns end, so that a chat has several."""
    target = folder / "stopping"
    if not target.exists():
        shutil.copytree(folder / "model", target)
        config = json.loads((target / "generation_config.json").read_text())
        tokens = AutoTokenizer.from_pretrained(target)
        (target / "generation_config.json").write_text(
            json.dumps({**config, "eos_token_id": [*config["eos_token_id"], *range(0, len(tokens), 6)]})
        )
    return target


@dataclass
class Recorded:
    """What a run's first step has learned from: its answers, and the gradient of each weight."""

    samples: list[Sample] = field(default_factory=list)
    gradient: list[torch.Tensor] = field(default_factory=list)


@contextmanager
def recorded() -> Iterator[Recorded]:
    found = Recorded()
    backward, score = Engine.backward, Answerer.score

    def backward_and_record(engine: Engine, *arguments: Any, **options: Any) -> Any:
        out = backward(engine, *arguments, **options)
        found.gradient = found.gradient or [weight.grad.clone() for weight in engine.trained if weight.grad is not None]
        return out

    def score_and_record(answerer: Answerer, samples: Sequence[Sample]) -> Any:
        out = score(answerer, samples)
        found.samples = found.samples or list(samples)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "backward", backward_and_record)
        patch.setattr(Answerer, "score", score_and_record)
        yield found


def test_an_agent_has_the_trajectories_and_the_gradient_of_the_same_environment(folder: Path) -> None:
    common: dict[str, object] = {
        "model__partial_pretrain": stops_often(folder), "reward__name": "null", "rollout__max_new_tokens": 60, "rollout__max_sequences": 1,
        "data__max_tokens_per_micro_batch": 1200, "trainer__total_training_steps": 1, "trainer__save_freq": "never",
    }  # fmt: skip
    found = {}
    kinds: dict[str, dict[str, object]] = {
        "environment": {"environment__name": program(folder, ENVIRONMENT, "world.py"), "environment__max_turns": 3},
        "agent": {"rollout__serve": "true", "agent__program": program(folder, SAME_AS_AGENT, "same.py")},
    }
    for name, changes in kinds.items():
        with recorded() as learned_from:
            [line] = train(folder, f"as_{name}", **common, **changes)
        found[name] = learned_from, line
    (of_environment, expected), (of_agent, metrics) = found["environment"], found["agent"]
    assert expected["train/grad_norm"] > 0 and expected["rl/turns"] > 1.2, "else the test shows nothing"
    assert told(of_agent.samples) == told(of_environment.samples)
    for one, other in zip(of_agent.samples, of_environment.samples, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-6)
        assert (one.reward, one.turns, one.finish_reason, one.text) == (other.reward, other.turns, other.finish_reason, other.text)
    for name in ("train/loss", "train/grad_norm", "rl/reward", "rl/entropy", "rl/turns", "rl/truncated", "rl/response_tokens"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
    assert len(of_agent.gradient) == len(of_environment.gradient) > 0
    for mine, theirs in zip(of_agent.gradient, of_environment.gradient, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


TALKATIVE = """
import os, openai

def run(row):
    client = openai.OpenAI(max_retries=0)
    chat = [{"role": "user", "content": row["question"]}]
    for turn in range(25):
        found = client.chat.completions.create(model=os.environ["OPENAI_MODEL"], messages=chat, max_tokens=4)
        chat += [{"role": "assistant", "content": found.choices[0].message.content}, {"role": "user", "content": "On."}]
"""


def test_no_token_of_a_thousand_turns_is_made_again_from_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, asked = Table(folder, new_tokens=400, max_sequences=None), []
    submit = Live.submit

    async def submit_and_record(live: Live, prompt_ids: list[int], sampling: Sampling, seed: int) -> Completion:
        done = await submit(live, prompt_ids, sampling, seed)
        asked.append((seed // MOST_TURNS, seed % MOST_TURNS, prompt_ids, done.token_ids))
        return done

    monkeypatch.setattr(Live, "submit", submit_and_record)
    samples, _ = table.answers(program(folder, TALKATIVE, "talkative.py"), list(enumerate(table.prompts[:4])), n=10)
    assert len(asked) == sum(sample.turns for sample in samples) == 1000
    retokenized, otherwise = 0, 0
    for place, sample in enumerate(samples):
        ids, mask = sample.document
        for _, turn, read, drawn in sorted(one for one in asked if one[0] == place):
            kept = ids[len(read) : len(read) + len(drawn)]
            retokenized += (
                int((kept != drawn).sum()) + int((ids[: len(read)] != read).sum()) + int((~mask[len(read) : len(read) + len(drawn)]).sum())
            )
            otherwise += table.tokenizer(table.tokenizer.decode(drawn)).input_ids != drawn
            assert turn < 25
    assert retokenized == 0 and otherwise > 100, "the texts of many turns would give other tokens, else the test shows nothing"


# --- several trajectories of one answer


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "dapo", "gspo", "reinforce", "ppo"])
def test_trajectories_share_the_advantage_that_their_answer_would_have_as_one(folder: Path, name: str) -> None:
    """The statistics of a group are over its answers, however many trajectories each has."""
    prompt, draw = Prompt("here", "Q", [], [1], {}), np.random.default_rng(0)
    lengths, rewards = [[3, 2], [4], [1, 5, 2], [2]], [1.0, 0.0, 0.5, 0.25]

    def answer(parts: list[int], reward: float) -> Sample:
        made = [Sample(prompt, 0, [1], [7] * part, [True] * part, [0.0] * part, "", "stop", 0) for part in parts]
        made[0].reward, made[0].more = reward, made[1:]
        return made[0]

    values = [draw.random(sum(parts)).astype(np.float32) for parts in lengths]
    method = load_method(load_config(PPOConfig, [*words(folder, "unused"), f"algorithm.name={name}"]))
    found = []
    for split in (lengths, [[sum(parts)] for parts in lengths]):
        answers = [answer(parts, reward) for parts, reward in zip(split, rewards, strict=True)]
        each = [part for of, parts in zip(values, split, strict=True) for part in np.split(of, np.cumsum(parts)[:-1])]
        experience = Experience(
            answers, [one for of in answers for one in of.trajectories], [], values=each, old_logprobs=each, ref_logprobs=each
        )
        learned = experience.advantages(method, method.settings, 10)
        assert [len(one) for one in learned.advantages] == [part for parts in split for part in parts]
        found.append(np.concatenate(learned.advantages))
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    assert len(set(found[0].tolist())) >= 4, "else the test shows nothing"


# --- ranks


def test_each_process_has_agents_of_its_own_and_ranks_that_only_generate_answer_them(folder: Path) -> None:
    keys: dict[str, object] = {**SERVED, "agent__program": program(folder, TALK)}
    roles = {f"mapping__{role}": "[0]" for role in ("actor", "critic", "reference", "reward")} | {"mapping__rollout": "[1]"}
    alone = run_on(1, folder, "alone", **keys)
    check_same(run_on(2, folder, "two", **keys), alone)
    check_same(run_on(2, folder, "apart", **keys, **roles), alone)
