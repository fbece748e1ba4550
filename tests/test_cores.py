"""A run on a CPU takes the cores that are free, and says where it has to wait for one."""

import json
from pathlib import Path

import pytest
import torch

from verl import cores


@pytest.fixture(autouse=True)
def threads_kept() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "3200000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu.max": "something else\n"}, 8),
        ({}, 8),
    ],
)
def test_a_containers_quota_and_the_affinity_limit_the_cores(
    files: dict[str, str], found: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(8)))
    assert cores.usable() == found


def test_idle_cores_are_counted_now_and_only_those_that_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = cores.os.sysconf("SC_CLK_TCK")
    stat = tmp_path / "stat"
    stat.write_text("cpu 0 0 0 0 0\ncpu0 0 0 0 0 0\ncpu1 0 0 0 0 0\ncpu2 0 0 0 0 0\n")
    monkeypatch.setattr(cores, "STAT", stat)
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: {0, 2})
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(cores.time, "perf_counter", lambda: next(clock))
    after = f"cpu 0 0 0 9 9\ncpu0 7 7 7 {ticks} 0\ncpu1 0 0 0 {2 * ticks} 0\ncpu2 0 0 0 {ticks} {ticks}\n"
    monkeypatch.setattr(cores.time, "sleep", lambda _: stat.write_text(after))
    assert cores.idle() == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("usable", "idle", "threads", "said"),
    [
        (8, 8.0, 8, None),
        (8, 7.6, 8, None),
        (8, 3.0, 3, "other processes keep 5.0 of 8 cores busy: computing with 3 threads"),
        (2, 0.1, 1, "other processes keep 1.9 of 2 cores busy: computing with 1 thread;"),
        (1, 0.0, 1, None),
    ],
)
def test_threads_are_as_many_as_cores_are_free(
    usable: int, idle: float, threads: int, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "usable", lambda: usable)
    monkeypatch.setattr(cores, "idle", lambda: idle)
    found, text = cores.choose_threads()
    assert found == threads and (text is None if said is None else said in str(text))


def test_without_a_count_of_idle_cores_the_load_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "usable", lambda: 8)
    monkeypatch.setattr(cores, "idle", lambda: None)
    monkeypatch.setattr(cores.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(cores.os, "getloadavg", lambda: (5.2, 0.0, 0.0))
    assert cores.choose_threads()[0] == 3


def test_the_users_own_number_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(cores, "choose_threads", lambda: (3, "busy"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    cores.take(said.append)
    assert torch.get_num_threads() == 1 and said == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cores.take(said.append)
    assert torch.get_num_threads() == 3 and said == ["busy"]


def test_a_run_that_resumes_keeps_its_number_because_sums_are_rounded_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cores, "choose_threads", lambda: (1, "busy"))
    monkeypatch.setattr(cores, "usable", lambda: 4)
    said: list[str] = []
    for content, threads in (('{"threads": 3}', 3), ('{"threads": 9}', 1), ("{}", 1), ("not JSON", 1), ('{"threads": "3"}', 1)):
        (tmp_path / "trainer_state.json").write_text(content)
        cores.take(said.append, tmp_path)
        assert torch.get_num_threads() == threads, content


def test_waiting_for_a_core_is_said_and_not_too_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduled, now = tmp_path / "schedstat", [0.0]
    monkeypatch.setattr(cores, "SCHEDULED", scheduled)
    monkeypatch.setattr(cores.time, "monotonic", lambda: now[0])

    def at(seconds: float, waited: float) -> str | None:
        now[0] = seconds
        scheduled.write_text(f"1 {int(waited * 1e9)} 3\n")
        return starvation.look()

    scheduled.write_text("1 0 3\n")
    starvation = cores.Starvation()
    assert at(29, 29) is None
    assert "this run waits for a core 60% of the time" in str(at(50, 30))
    assert at(60, 40) is None
    assert at(90, 35) is None, "since the last look, it has hardly waited"
    monkeypatch.setattr(cores, "SCHEDULED", tmp_path / "none")
    assert cores.Starvation().look() is None, "a system that does not say"


def test_the_number_of_threads_is_in_the_runs_state() -> None:
    from verl.trainer import saving

    assert saving.THREADS == "threads" and json.dumps({saving.THREADS: torch.get_num_threads()})
