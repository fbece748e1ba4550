"""A training run with rewards of one's own that hang, end their process or cannot read a right answer."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from forked import Forked
from rl_runs import train, words, write_folder
from runs import PPO, lines_of, wait_for

from verl.errors import UserError

ONE_STEP: dict[str, object] = {"trainer__total_training_steps": 1, "trainer__save_freq": "never"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("own_code"))


def test_rewards_that_end_their_process_count_as_zero_and_are_named(folder: Path) -> None:
    (folder / "ends.py").write_text(
        "import os\nN = []\ndef score(prompt, response, row):\n    N.append(1)\n    os._exit(0) if len(N) == 3 else exit()\n"
    )
    (line,) = train(folder, "ends", reward__name=folder / "ends.py", reward__on_error="zero", **ONE_STEP)
    assert line["reward/errors"] == 16 and line["rl/reward"] == 0
    said = (folder / "ends/train.log").read_text()
    assert "16 rewards failed" in said and "raised SystemExit: None" in said and "ends.py:5)" in said
    with pytest.raises(UserError, match=r"train.jsonl:\d+: reward ends raised SystemExit: None \(.*ends.py:5\)"):
        train(folder, "ends", reward__name=folder / "ends.py", **ONE_STEP)


def test_groups_are_the_answers_to_one_prompt(folder: Path) -> None:
    text = "async def score_group(prompt, responses, row):\n    return [len(responses) + number / 10 for number in range(len(responses))]\n"
    (folder / "group.py").write_text(text)
    train(folder, "group", reward__name=folder / "group.py", **ONE_STEP)
    answers = lines_of(folder / "group/rollouts/step_1.jsonl")
    assert [round(answer["reward"], 1) for answer in answers] == [4.0, 4.1, 4.2, 4.3] * 4


def test_a_right_answer_that_cannot_be_read_stops_before_training(folder: Path) -> None:
    rows = (folder / "train.jsonl").read_text().splitlines()
    broken = {**json.loads(rows[2]), "answer": "it depends"}
    (folder / "bad.jsonl").write_text("\n".join([*rows[:2], json.dumps(broken), *rows[3:]]) + "\n")
    with pytest.raises(UserError, match=r"bad.jsonl:3: reward gsm8k finds no answer in 'it depends'"):
        train(folder, "unread", data__train_files=folder / "bad.jsonl", reward__name="gsm8k", **ONE_STEP)
    assert not (folder / "unread/metrics.jsonl").exists() or not (folder / "unread/metrics.jsonl").read_text()


HANGS = """
import os, time
from pathlib import Path

N = []


def score(prompt, response, row):
    N.append(1)
    if len(N) > 16:
        Path(__file__).with_suffix(".pid").write_text(str(os.getpid()))
        time.sleep(1000)
    return len(N)
"""


def test_a_signal_ends_a_run_that_waits_for_a_reward_with_the_steps_that_are_done(folder: Path) -> None:
    (folder / "hangs.py").write_text(HANGS)
    argv = words(folder, "hangs", reward__name=folder / "hangs.py", trainer__save_freq=-1)
    run = Forked([*PPO, *argv], folder, {**os.environ, "OMP_NUM_THREADS": "1"})
    wait_for((folder / "hangs.pid").exists)
    since = time.monotonic()
    run.send_signal(signal.SIGTERM)
    said = "".join(run.communicate(timeout=30))
    assert run.returncode == 75 and time.monotonic() - since < 10
    assert "Traceback" not in said
    assert f"after step 1; the same command resumes from {folder}/hangs/global_step_1" in said
    assert (folder / "hangs/global_step_1/manifest.json").is_file()
    worker = int((folder / "hangs.pid").read_text())
    wait_for(lambda: not Path(f"/proc/{worker}").exists(), seconds=10)
