"""Ranks that die, hang, fail, are slow, or have numbers that are not finite: all end in time and say why, or all go on."""

import functools
import json
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from faults.started import make_folder, orphans, started, words
from places import HAS_GPU
from rl_runs import words as rl_words
from runs import command, metrics_of
from safetensors.torch import load_file
from sft_runs import train
from sft_runs import words as sft_words
from tiny import RandomDocuments

from verl import exchange, launch, peers, rendezvous
from verl.algorithms import sft
from verl.data.loader import Loader, Packing
from verl.data.pack import pack
from verl.deadline import Deadline
from verl.engine.contract import LossOut
from verl.errors import RANK_EXIT_CODE, SAVED_EXIT_CODE, RankError, UserError
from verl.session import session

SFT, PPO = (["-m", f"verl.trainer.{name}"] for name in ("fsdp_sft_trainer", "ppo_trainer"))
TWO, TWO_RL = ["-m", "verl", "sft", "--gpus", "2"], ["-m", "verl", "ppo", "--gpus", "2"]
TIMEOUT = 20 if HAS_GPU else 6  # seconds; several processes that load CUDA at once, and NCCL's first meeting, take ten
STEP = "verl.engine.engine:Engine.train_step"
SUM = "verl.engine.engine:Engine._sum_over_ranks"  # twice in a step; the other ranks wait for their devices
LOAD = "verl.engine.build:build"
slow = pytest.mark.faults


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("ranks"))


# A rank that is gone ends all


@slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("fault", "call", "what", "doing"),
    [
        (f"{STEP}:kill=2", 4, "was killed by SIGKILL", "training, step 4"),  # later than a heartbeat, which tells the step
        (f"{LOAD}:kill", 1, "was killed by SIGKILL", "loading the model"),
        (f"{STEP}:stop", 4, f"has given no sign of life for {TIMEOUT} s", "training, step 4"),
        (f"{LOAD}:stop", 1, f"has given no sign of life for {TIMEOUT} s", "loading the model"),
        (f"{STEP}:sleep", 4, "has hung for ", "training, step 4"),
        (f"{SUM}:sleep", 8, "has hung for ", "training, step 4"),
        (f"{STEP}:exit=2", 4, "ended with exit code 7", "training, step 4"),
        (f"{STEP}:raise", 4, "raised ValueError: a fault", "training, step 4"),
        (f"{LOAD}:raise", 1, "raised ValueError: a fault", "loading the model"),
    ],
    ids=["killed", "killed-loading", "stopped", "stopped-loading", "hangs", "hangs-within", "exits", "raises", "raises-loading"],
)
def test_a_rank_that_is_gone_ends_all_and_is_named(
    fault: str, call: int, what: str, doing: str, rank: int, folder: Path, tmp_path: Path
) -> None:
    argv = words(folder, tmp_path / "run", f"dist.timeout_seconds={TIMEOUT}")
    env = {"FAULT_RANK": rank, "FAULT_CALL": call}
    with started([*TWO, *argv], tmp_path / "work", fault=fault, env=env, forks=True) as found:
        found.wait_until_reached()
        found.since = time.monotonic()
        code, text = found.end(TIMEOUT + 40)
        assert code == RANK_EXIT_CODE and found.took < TIMEOUT + 30, text
        assert orphans(found) == []
    (line,) = (line for line in text.splitlines() if line.startswith("error: "))
    assert line.startswith(f"error: rank {rank} ({socket.gethostname()}) {what}") and doing in line and "waited for it" in line
    assert "gloo" not in text and text.count("Traceback (most recent call last)") == (":raise" in fault)


@slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_when_it_is_done_is_named(rank: int, folder: Path, tmp_path: Path) -> None:
    """Between its last word and the end of its process: the run is complete, but its exit code is that of a rank that is gone."""
    argv = words(folder, tmp_path / "run", "trainer.total_training_steps=2")
    with started(
        [*TWO, *argv], tmp_path / "work", fault="verl.rendezvous:wait_until_idle:kill", env={"FAULT_RANK": rank}, forks=True
    ) as found:
        code, text = found.end(90)
        assert code == RANK_EXIT_CODE and orphans(found) == []
    assert text.count("error: ") == 1 and f"error: rank {rank} ({socket.gethostname()}) was killed by SIGKILL after it was done" in text
    assert (tmp_path / "run" / "global_step_2").exists()


@slow
def test_without_the_launcher_a_dead_rank_is_found_by_the_others(folder: Path, tmp_path: Path) -> None:
    """As under srun, which starts the processes directly."""
    argv = words(folder, tmp_path / "run", f"dist.timeout_seconds={TIMEOUT}")
    meeting = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with (
        started([*SFT, *argv], tmp_path / "a", env={**meeting, "RANK": 0, "LOCAL_RANK": 0}, forks=True) as first,
        started(
            [*SFT, *argv],
            tmp_path / "b",
            fault=f"{STEP}:kill",
            env={**meeting, "RANK": 1, "LOCAL_RANK": 1, "FAULT_CALL": 4, "FAULT_RANK": 1},
            forks=True,
        ) as second,
    ):
        ended = second.end()
        assert ended[0] == -9, ended
        first.since = time.monotonic()
        code, text = first.end()
        assert code == RANK_EXIT_CODE and first.took < TIMEOUT + 30
    assert "error: rank 1 " in text and "has died, while training, step 4; rank 0 waited for it" in text and "Traceback" not in text


@slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_users_error_of_one_rank_is_told_and_ends_all_with_code_2(rank: int, folder: Path, tmp_path: Path) -> None:
    with started(
        [*TWO, *words(folder, tmp_path / "run")], tmp_path / "work", fault=f"{LOAD}:user_error", env={"FAULT_RANK": rank}
    ) as found:
        code, text = found.end(90)
        assert code == 2 and text.count("a fault of one rank") == 1 and "Traceback" not in text, text


# A rank that works alone is waited for


@slow
@pytest.mark.parametrize(
    ("fault", "call"),
    [
        (f"verl.data.documents:load_documents:sleep={TIMEOUT + 8}", 1),
        (f"verl.engine.build:build:sleep={TIMEOUT + 8}", 1),
        (f"verl.manifest:Manifest.write:sleep={TIMEOUT + 8}", 1),
        (f"verl.run:Run.log:sleep={TIMEOUT + 8}", 2),
        (f"verl.run_loggers:RunLoggers.start:sleep={TIMEOUT + 8}", 1),
    ],
    ids=["tokenizing", "loading", "hashing", "logging", "starting-a-logger"],
)
def test_work_of_one_rank_alone_takes_as_long_as_it_takes(fault: str, call: int, folder: Path, tmp_path: Path) -> None:
    argv = words(folder, tmp_path / "run", f"dist.timeout_seconds={TIMEOUT}", "trainer.total_training_steps=4")
    with started([*TWO, *argv], tmp_path / "work", fault=fault, env={"FAULT_RANK": 0, "FAULT_CALL": call}) as found:
        code, text = found.end(120)
        assert code == 0 and found.reached.exists(), text
    assert len(metrics_of(tmp_path / "run")) == 4


@slow
def test_a_slow_reward_of_one_rank_is_waited_for(folder: Path, tmp_path: Path) -> None:
    argv = rl_words(folder, "x", reward__name="gsm8k", trainer__total_training_steps=2, dist__timeout_seconds=TIMEOUT)
    fault = f"verl.rewards._scoring:Grader.scores:sleep={TIMEOUT + 8}"
    more = [f"trainer.default_local_dir={tmp_path / 'run'}"]
    with started([*TWO_RL, *argv, *more], tmp_path / "work", fault=fault, env={"FAULT_RANK": 1}) as found:
        code, text = found.end(120)
        assert code == 0 and found.reached.exists(), text


@pytest.mark.parametrize(("wait", "waits"), [(exchange.wait, True), (lambda work, _: work.wait(timeout=0.3), False)], ids=["yes", "no"])
def test_a_rank_that_waits_for_others_says_so(wait: Callable[[Any, None], None], waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that of two ranks that do not get on, the other one is named."""
    monkeypatch.setattr(peers, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(exchange, "ONE_SECOND", 0.3)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    watched = peers.Peers(server, 0, rendezvous.Place(0, 1, "127.0.0.1", server.port, has_server=True), 100.0)
    beats = dist.PrefixStore("peers 0", server)
    never = threading.Lock()
    never.acquire()

    def look() -> None:
        time.sleep(0.15)
        found.append(json.loads(beats.get("beat 0")))

    found = list[dict[str, Any]]()
    other = threading.Thread(target=look)
    other.start()
    wait(SimpleNamespace(wait=functools.partial(never.acquire, True)), None)
    other.join()
    watched.leave()
    assert [beat["waits"] for beat in found] == [waits], found


# Ranks that cannot meet


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


GOOD = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changes", "where", "what"),
    [
        ({"RANK": "x"}, "RANK", "found 'x', expected a number"),
        ({"RANK": "-1"}, "RANK", "found -1, but WORLD_SIZE=2, so the ranks are 0 to 1"),
        ({"RANK": "2"}, "RANK", "found 2, but WORLD_SIZE=2, so the ranks are 0 to 1"),
        ({"RANK": ""}, "RANK", "found '', expected a number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE", "found 0, expected at least 1 process"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE", "found 'two', expected a number"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT", "found 99999, expected a port"),
        ({"MASTER_PORT": "a"}, "MASTER_PORT", "found 'a', expected a number"),
    ],
)
def test_a_wrong_variable_is_refused(changes: Mapping[str, str], where: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**GOOD, **changes}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(what)) as refused:
        rendezvous.read_place()
    assert refused.value.where == where and refused.value.tells


@pytest.mark.parametrize(("local_rank", "what"), [("2", "has no GPU: there are only 2"), ("-1", "has no GPU"), ("a", "found 'a'")])
def test_a_process_without_a_gpu_is_refused(local_rank: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(UserError, match=what):
        rendezvous.read_local_rank(2)


def test_a_port_that_is_in_use_is_named() -> None:
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = int(server.getsockname()[1])
        with pytest.raises(UserError, match="the port cannot be opened") as refused:
            rendezvous.open_store(rendezvous.Place(0, 2, "127.0.0.1", port, has_server=True))
    assert refused.value.where == f"MASTER_ADDR=127.0.0.1 MASTER_PORT={port}"


@pytest.mark.parametrize(
    ("host", "what"), [("no-such-host.invalid", "there is no such host"), ("127.0.0.1", "reaches no rank 0 there within 1 s")]
)
def test_a_store_that_is_not_there_is_named(host: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "START_SECONDS", 1.0)
    with pytest.raises(UserError, match=what):
        rendezvous.open_store(rendezvous.Place(1, 2, host, free_port(), has_server=False))


@slow
@pytest.mark.parametrize(
    "changes",
    [{"RANK": "x"}, {"RANK": "5"}, {"WORLD_SIZE": "0"}, {"RANK": "1", "MASTER_ADDR": "nowhere.invalid"}, {"RANK": "1", "MASTER_PORT": "1"}],
    ids=lambda changes: ",".join(f"{name}={value}" for name, value in changes.items()),
)
def test_a_process_that_cannot_meet_others_ends_within_half_a_minute(changes: Mapping[str, str], folder: Path, tmp_path: Path) -> None:
    with started([*SFT, *words(folder, tmp_path / "run")], tmp_path / "work", env={**GOOD, **changes}) as found:
        found.since = time.monotonic()
        code, text = found.end()
        assert code == 2 and found.took < 30 + 10, text  # and the time to import torch
    assert text.count("error: ") == 1 and "fix: " in text and "Traceback" not in text


@slow
def test_two_processes_of_one_rank_are_refused(folder: Path, tmp_path: Path) -> None:
    meeting = {**GOOD, "MASTER_PORT": str(free_port())}
    argv = words(folder, tmp_path / "run")
    with (
        started([*SFT, *argv], tmp_path / "a", env={**meeting, "RANK": "0", "WORLD_SIZE": "3"}, forks=True) as first,
        started([*SFT, *argv], tmp_path / "b", env={**meeting, "RANK": "1", "WORLD_SIZE": "3"}, forks=True) as second,
        started([*SFT, *argv], tmp_path / "c", env={**meeting, "RANK": "1", "WORLD_SIZE": "3"}, forks=True) as third,
    ):
        ends = [found.end() for found in (first, second, third)]
    assert [code for code, _ in ends] == [2, 2, 2], ends
    assert sum("another process is rank 1 too" in text for _, text in ends) == 1


def test_rank_0_keeps_the_store_until_the_others_have_read_why_the_start_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 reads late: only when it is told that rank 0 leaves. Rank 2 never comes, and is not waited for."""
    monkeypatch.setattr(peers, "LEAVE_SECONDS", 100.0)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
    store, read = dist.PrefixStore("peers 0", client), list[str]()
    store.add("here 1", 1)
    store.set("verdict", json.dumps(["two processes are rank 1", 1, 2, -1]))

    def read_late() -> None:
        store.wait(["left 0"], timedelta(seconds=100))
        read.append(store.get("verdict").decode())
        store.set("left 1", json.dumps({"code": 2, "what": "", "signal": None}))

    other = threading.Thread(target=read_late)
    other.start()
    since = time.monotonic()
    try:
        with pytest.raises(RankError, match="two processes are rank 1"):
            peers.Peers(server, 0, rendezvous.Place(0, 3, "127.0.0.1", server.port, has_server=True), 100.0)
        assert read, "rank 0 is gone, and the store with it, before rank 1 has read why"
        assert time.monotonic() - since < 60, "rank 2 was waited for"
    finally:
        dist.PrefixStore("peers 0", server).set("left 0", "")  # the other thread ends in any case
        other.join()


# A rank with one batch less cannot be


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("packing", [Packing(2, None), Packing(2, 130), Packing(2, 400)], ids=["padded", "packed", "loosely-packed"])
def test_all_ranks_have_as_many_micro_batches_in_every_step(packing: Packing, ranks: int) -> None:
    documents = RandomDocuments(23)
    loaders = [Loader(documents, packing, 7, seed=3, rank=rank, world_size=ranks) for rank in range(ranks)]
    for number in range(2 * loaders[0].steps_per_epoch):
        taken = [loader.step(number).micro_batches for loader in loaders]
        assert len({len(batches) for batches in taken}) == 1
        rows = sorted(int(row) for batches in taken for batch in batches for row in batch.sample_ids_S if row >= 0)
        assert rows == sorted(loaders[0].rows(number).tolist())


def test_a_plan_that_forgets_the_other_ranks_would_be_noticed() -> None:
    groups = pack([50, 50, 50], token_budget=60, multiple_of=1)
    assert len({len(groups[rank::2]) for rank in range(2)}) == 2


# Numbers that are not finite


def broken_in(steps: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the loss be no number in these steps, which have one micro-batch each."""
    calls, whole = [0], sft.loss

    def loss(out: Any, batch: Any) -> LossOut:
        calls[0] += 1
        found = whole(out, batch)
        return LossOut(found.sum * math.nan, found.metric_sums) if calls[0] in steps else found

    monkeypatch.setattr(sft, "loss", loss)


@pytest.fixture(scope="module")
def plain(folder: Path) -> list[dict[str, float]]:
    return train(folder, "plain", trainer__total_training_steps=6)


def test_a_skipped_step_changes_nothing_and_its_rows_are_written(
    folder: Path, plain: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken_in({3, 4}, monkeypatch)
    found = train(folder, "skips", trainer__total_training_steps=6, trainer__save_freq=1)
    assert [line.get("train/skipped") for line in found] == [None, None, 1.0, 1.0, None, None]
    # The schedule waits: as long as nothing is skipped, it is that of a run without skipped steps.
    rates = [line["train/lr"] for line in plain]
    assert [line["train/lr"] for line in found] == [rates[0], rates[1], rates[2], rates[2], rates[2], rates[3]]
    weights = [load_file(folder / f"skips/global_step_{step}/model.safetensors") for step in range(1, 7)]
    changed = [any(not torch.equal(one[name], other[name]) for name in one) for one, other in pairwise(weights)]
    assert changed == [True, False, False, True, True]
    said = capsys.readouterr().out
    assert "warning: step 3: loss nan" in said and "the update was skipped; its 6 rows are in" in said
    rows = [json.loads(line) for line in (folder / "skips/skipped/step_3.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and {*rows[0]} == {"place", "row", "text"}
    assert all(re.fullmatch(r".*train\.jsonl:\d+", row["place"]) and "<|im_start|>user" in row["text"] for row in rows)
    lines = (folder / "train.jsonl").read_text().splitlines()
    assert all(json.loads(lines[int(row["place"].rpartition(":")[2]) - 1])["question"][:40] in row["text"] for row in rows)


def test_a_resumed_run_goes_on_with_the_rate_after_the_skipped_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_in({3, 4}, monkeypatch)
    whole = train(folder, "whole", trainer__total_training_steps=6, trainer__save_freq=1)
    source = folder / "whole" / "global_step_4"
    assert json.loads((source / "trainer" / "state.json").read_text())["skipped"] == 2
    monkeypatch.undo()
    resumed = train(
        folder, "resumed", trainer__total_training_steps=6, trainer__resume_mode="resume_path", trainer__resume_from_path=source
    )
    for name in ("train/lr", "train/loss", "train/grad_norm"):
        assert [line[name] for line in resumed] == [line[name] for line in whole[4:]]


@pytest.mark.parametrize(("most", "step"), [(3, 4), (1, 2)])
def test_so_many_skipped_steps_in_a_row_end_the_run(most: int, step: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_in({2, 3, 4, 5}, monkeypatch)
    with pytest.raises(UserError, match=rf"loss nan, .*{most} times in a row .*train\.jsonl:\d+") as stopped:
        train(folder, f"stops{most}", trainer__total_training_steps=6, trainer__max_nonfinite_steps=most)
    assert stopped.value.where == f"step {step}" and "lower optim.lr" in str(stopped.value.fix)


def test_skipped_steps_that_are_not_in_a_row_do_not_end_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_in({1, 2, 4, 5}, monkeypatch)
    assert len(train(folder, "apart", trainer__total_training_steps=6)) == 6


@slow
def test_a_loss_that_is_no_number_on_one_rank_is_skipped_on_both(folder: Path, tmp_path: Path) -> None:
    """The second process multiplies its loss by NaN in step 3."""
    program = tmp_path / "program.py"
    program.write_text(
        "import math, os, sys\n"
        "from verl.algorithms import sft\n"
        "from verl.engine.contract import LossOut\n"
        "from verl.trainer import fsdp_sft_trainer\n"
        "whole, calls = sft.loss, []\n"
        "def loss(out, batch):\n"
        "    calls.append(1)\n"
        "    found = whole(out, batch)\n"
        "    return LossOut(found.sum * math.nan, found.metric_sums) if len(calls) == 3 and os.environ['RANK'] == '1' else found\n"
        "sft.loss = loss\n"
        "fsdp_sft_trainer.main(sys.argv[1:])\n"
    )
    argv = sft_words(folder, "x", trainer__total_training_steps=5, trainer__default_local_dir=tmp_path / "run", trainer__save_freq=1)
    done = command(program, *argv, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.get("train/skipped") for line in metrics_of(tmp_path / "run")] == [None, None, 1.0, None, None]
    first, second, third = (load_file(tmp_path / f"run/global_step_{step}/model.safetensors") for step in (2, 3, 4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(second[name], third[name]) for name in first)


# The parts


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([0, 0], 0),
        ([75, 75], SAVED_EXIT_CODE),
        ([143, 143], 143),
        ([143, 75], SAVED_EXIT_CODE),
        ([2, 2], 2),
        ([1, 1], 1),
        ([1, 3], RANK_EXIT_CODE),
        ([3, 3], RANK_EXIT_CODE),
        ([3, -9], RANK_EXIT_CODE),
        ([0, -11], RANK_EXIT_CODE),
        ([-9], 137),
        ([4, 4], 4),
    ],
)
def test_the_launcher_ends_with_the_code_of_its_processes(codes: list[int], code: int) -> None:
    assert launch.code_of(codes) == code


def test_the_time_limit_leaves_time_for_a_step_and_a_save(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("verl.deadline.time.monotonic", lambda: now[0])
    monkeypatch.setattr("verl.deadline.time.time", lambda: now[0])
    deadline = Deadline(100.0, started=980.0, save_bytes=5e9)  # 80 seconds are left; a save is expected to take 10
    for step, (seconds, is_near) in enumerate([(20, False), (20, False), (6, True)], 1):
        deadline.enter("training", step)
        now[0] += seconds
        assert deadline.is_near() == is_near, step  # 60, 40 and 34 left; 35 needed
    assert np.isclose(now[0], 1046.0)


@pytest.mark.parametrize(("error", "frees"), [(RankError("gone"), False), (UserError("wrong"), True)])
def test_gpu_memory_is_not_freed_while_the_gpu_waits_for_a_rank_that_is_gone(
    error: UserError, frees: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would wait, too, and hold the interpreter's lock."""
    freed: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(1))
    monkeypatch.setattr("verl.session._initialized_gpus", list)

    @session()
    def run() -> None:
        raise error

    with pytest.raises(UserError):
        run()
    assert bool(freed) == frees
