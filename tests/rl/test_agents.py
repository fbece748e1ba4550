"""Agents that know only the `openai` package, through the endpoint: what they ask is trained on, and what goes wrong ends alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from agent_runs import TALK, Table, program, told
from places import ROOT
from rl_runs import train, words, write_folder
from runs import PPO, lines_of

from verl.config.load import load_config
from verl.config.ppo import PPOConfig
from verl.errors import UserError

SERVED: dict[str, object] = {"rollout__serve": "true", "rollout__max_new_tokens": 60, "data__max_tokens_per_micro_batch": 1200}
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
    assert made.metrics_of(samples) == {
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
    of_hf, _ = Table(folder, engine="hf").answers(program(folder, TALK))
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
    found = made.metrics_of(samples)
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


def test_the_trainer_learns_from_an_agent_and_repeats_itself(folder: Path) -> None:
    given = program(folder, TALK)
    once, again = (train(folder, name, agent__program=given, trainer__total_training_steps=2, **SERVED) for name in ("once", "again"))
    for line, same in zip(once, again, strict=True):
        assert line["train/grad_norm"] > 0 and line["rl/largest_rollout_difference"] < 1e-4
        assert {name: value for name, value in line.items() if name.startswith(("rl/", "train/", "reward/"))} == pytest.approx(
            {name: value for name, value in same.items() if name.startswith(("rl/", "train/", "reward/"))}, abs=1e-5
        )
    for answer in lines_of(folder / "once/rollouts/step_1.jsonl"):
        assert answer["turns"] == 3 and answer["earlier_turns"][1] == "Go on, 0." and len(answer["more"]) == 1
        assert answer["reward/agent"] == len(answer["more"][0][-1])


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


def test_a_validation_answers_greedily_and_may_name_a_temperature(folder: Path) -> None:
    keys = {
        "data__val_files": folder / "test.jsonl",
        "data__val_max_samples": 3,
        "trainer__test_freq": 1,
        "trainer__total_training_steps": 1,
    }
    named = TALK.replace("max_tokens=8", "max_tokens=8, temperature=0.0 if os.environ.get('GREEDY') else 1.0")
    found = [train(folder, f"greedy{number}", agent__program=program(folder, named, "named.py"), **keys, **SERVED) for number in range(2)]
    assert found[0][0]["val/reward"] == found[1][0]["val/reward"] and "val/agent" in found[0][0]


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
        ({"agent__program": "agent.py"}, "the agent has no endpoint to ask"),
        ({**SERVED, "agent__program": "agent.py", "rollout__tool": "calculator"}, "an agent has its own tools"),
        ({**SERVED, "agent__program": "agent.py", "environment__name": "calculator"}, "would act in an environment"),
        ({**SERVED, "agent__program": "agent.py", "rollout__oversample": 0.5}, "depend on the clock"),
        ({**SERVED, "agent__program": "agent.py", "rollout__staleness": 1}, "cannot be drawn before their step"),
        ({**SERVED, "agent__program": "agent.py", "agent__requests": 0}, "agent.requests"),
        ({**SERVED, "agent__program": "agent.py", "agent__on_error": "weep"}, "agent.on_error"),
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
