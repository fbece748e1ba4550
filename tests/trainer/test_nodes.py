"""Two nodes on one machine: two torchrun agents that meet over loopback, each with one process."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from forked import Forked
from places import ROOT
from runs import SFT, losses, metrics_of, wait_for
from tiny import write_problems_and_model

from verl.trainer import fsdp_sft_trainer

STEPS = 24
# What SLURM does for a batch script: a task on each node, signals to all processes of a task but those in sessions of their own, and
# the highest exit code.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
nodes = range(int(os.environ["SLURM_JOB_NUM_NODES"]))
tasks = [subprocess.Popen(words, env={{**os.environ, "SLURM_NODEID": str(node)}}, start_new_session=True) for node in nodes]
open(os.environ["TASKS"], "w").write(" ".join(str(task.pid) for task in tasks))
signal.signal(signal.SIGUSR1, lambda number, frame: [os.killpg(task.pid, number) for task in tasks])
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" >>"$REQUEUED"; fi
"""
TORCHRUN = f"""#!/usr/bin/env bash
exec {sys.executable} -m torch.distributed.run "$@"
"""
# A step takes it a moment, so that a signal comes while there are steps left; its finish takes what that of a logger with a network may.
LOGGER = """
import time
from pathlib import Path

class Slow:
    def __init__(self, folder): self.folder = folder
    def log(self, step, metrics): time.sleep(0.1)
    def finish(self):
        time.sleep({seconds})
        (self.folder / "logger-finished").touch()

def start(run): return Slow(run.directory)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems in train.jsonl, a small model with its tokenizer, and two loggers that take their time."""
    folder = write_problems_and_model(tmp_path_factory.mktemp("nodes"), 40, 4)
    for name, seconds in (("paced", 0), ("slow", 3)):
        (folder / f"{name}.py").write_text(LOGGER.format(seconds=seconds))
    return folder


def words(folder: Path, output: object, *more: str) -> list[str]:
    return [
        f"data.train_files={folder / 'train.jsonl'}",
        f"data.cache_dir={folder / 'cache'}",
        "data.train_batch_size=6",
        "data.max_length=256",
        "data.num_workers=1",
        f"model.partial_pretrain={folder / 'model'}",
        f"trainer.default_local_dir={output}",
        f"trainer.total_training_steps={STEPS}",
        "trainer.save_freq=-1",
        "optim.lr=1e-3",
        *more,
    ]


@pytest.fixture(scope="module")
def one_process(folder: Path) -> list[float]:
    fsdp_sft_trainer.main(words(folder, folder / "one"))
    return losses(metrics_of(folder / "one"))


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}


def free_port() -> int:
    """From those that no program gets by chance, and that the batch script makes of a job's number."""
    for port in random.sample(range(20000, 30000), 100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise AssertionError("no free port")


@contextmanager
def nodes(places: list[Path], *argv: str) -> Iterator[list[Forked]]:
    """Agents of torchrun, one a node, each in its place; those still there at the end are killed."""
    rendezvous = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=test"]
    command = ["-m", "torch.distributed.run", f"--nnodes={len(places)}", "--nproc_per_node=1", *rendezvous, *SFT, *argv]
    agents = [Forked(command, place, environment()) for place in places]
    try:
        yield agents
    finally:
        for agent in agents:
            agent.terminate()
        for agent in agents:
            agent.wait(40)


def test_two_nodes_train_what_one_process_trains(folder: Path, one_process: list[float]) -> None:
    new_cache = f"data.cache_dir={folder / 'cache of two'}"  # which both make at the same time
    with nodes([folder, folder], *words(folder, folder / "two", "trainer.save_freq=16", new_cache)) as agents:
        said = ["".join(agent.communicate(timeout=90)) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert sum("on each of 2 processes" in text for text in said) == 1  # the first process speaks for all
    assert losses(metrics_of(folder / "two")) == pytest.approx(one_process, rel=1e-5)
    assert sorted(path.name for path in (folder / "two").glob("global_step_*")) == ["global_step_16", f"global_step_{STEPS}"]
    ranks = (folder / "two" / "global_step_16" / "trainer").glob("rng_*.safetensors")
    assert sorted(path.name for path in ranks) == ["rng_0.safetensors", "rng_1.safetensors"]
    resume = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={folder / 'two' / 'global_step_16'}"]
    fsdp_sft_trainer.main(words(folder, folder / "onward", *resume))
    assert losses(metrics_of(folder / "onward")) == pytest.approx(one_process[16:], rel=1e-5)


@pytest.mark.parametrize("differs", ["trainer.default_local_dir", "data.train_files"])
def test_what_the_nodes_must_share_and_do_not_ends_the_run_before_a_model_is_loaded(differs: str, folder: Path, tmp_path: Path) -> None:
    """A name that means another folder, or another file, on each node."""
    places = [tmp_path / "node0", tmp_path / "node1"]
    rows = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    for number, place in enumerate(places):
        place.mkdir()
        (place / "rows.jsonl").write_text("".join(rows[number:]))
    output = "run" if differs == "trainer.default_local_dir" else tmp_path / "run"
    with nodes(places, *words(folder, output, "data.train_files=rows.jsonl")) as agents:
        said = "".join(text for agent in agents for text in agent.communicate(timeout=90))
    assert [agent.returncode for agent in agents] == [1, 1]
    found = {
        "trainer.default_local_dir": "does not see the first node's folder of this name",
        "data.train_files": f"data.train_files: the rows on {socket.gethostname()} differ from those",
    }
    assert said.count("error: ") == 1 and found[differs] in said and "model: " not in said
    assert said.count("exitcode  : 2 ") == 2
    assert not list(tmp_path.rglob("run/.*"))


@pytest.mark.faults
def test_a_signal_to_one_node_ends_both_after_the_same_step(folder: Path, one_process: list[float]) -> None:
    output = folder / "signalled"
    with nodes([folder, folder], *words(folder, output, f"trainer.logger={folder / 'paced.py'}")) as agents:
        wait_for(lambda: (output / "metrics.jsonl").exists() and len(losses(metrics_of(output))) >= 2)
        subprocess.run(["pkill", "-USR1", "-P", str(agents[1].pid)], check=True)
        said = "".join(text for agent in agents for text in agent.communicate(timeout=60))
    assert sorted(re.findall(r"exitcode  : (-?\d+) ", said)) == ["75", "75"]
    (checkpoint,) = output.glob("global_step_*")
    done = len(losses(metrics_of(output)))
    assert checkpoint.name == f"global_step_{done}" and 2 <= done < STEPS and f"the same command resumes from {checkpoint}" in said
    fsdp_sft_trainer.main(words(folder, output))
    assert losses(metrics_of(output)) == pytest.approx(one_process, rel=1e-5)


@pytest.mark.faults
def test_no_process_leaves_before_the_first_ones_loggers_are_finished(folder: Path) -> None:
    """torchrun ends those that are left: without a wait, the first process among them."""
    output = folder / "logged"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "verl.trainer.fsdp_sft_trainer"]
    command += words(folder, output, f"trainer.logger={folder / 'slow.py'}")
    agent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())
    wait_for(lambda: (output / "metrics.jsonl").exists() and len(losses(metrics_of(output))) >= 2)
    subprocess.run(["pkill", "-TERM", "-P", str(agent.pid)], check=True)
    said = agent.communicate(timeout=60)[0]
    assert (output / "logger-finished").exists() and "exitcode  : 75 " in said


@contextmanager
def slurm_job(folder: Path, output: Path, *more: str, restarts: int) -> Iterator[subprocess.Popen[str]]:
    """The batch script on two nodes of one process each, with stand-ins for SLURM's commands."""
    commands = output.parent / "commands"
    commands.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("torchrun", TORCHRUN)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    variables = environment(
        PATH=f"{commands}:{os.environ['PATH']}",
        TASKS=str(output.parent / "tasks"),
        REQUEUED=str(output.parent / "requeued"),
        NODE_CACHE=str(output.parent / "node-cache"),
        SLURM_JOB_ID=str(free_port()),
        SLURM_JOB_NODELIST="node[1-2]",
        SLURM_JOB_NUM_NODES="2",
        SLURM_CPUS_ON_NODE="2",
        SLURM_RESTART_COUNT=str(restarts),
    )
    script = [str(ROOT / "examples" / "slurm" / "sft.sbatch"), *words(folder, output, "data.max_tokens_per_micro_batch=1024", *more)]
    job = subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables)
    try:
        yield job
    finally:
        job.kill()


@pytest.mark.faults
def test_a_slurm_job_saves_at_a_signal_goes_back_into_the_queue_and_goes_on(folder: Path, one_process: list[float], tmp_path: Path) -> None:
    output, requeued = tmp_path / "run", tmp_path / "requeued"

    def trained_since(steps: int) -> Callable[[], bool]:
        return lambda: (output / "metrics.jsonl").exists() and len(losses(metrics_of(output))) >= steps + 2

    paced, slow = (f"trainer.logger={folder / name}" for name in ("paced.py", "slow.py"))
    with slurm_job(folder, output, slow, restarts=0) as job:  # the time limit comes near; while the run leaves, a second signal comes
        wait_for(trained_since(0))
        job.send_signal(signal.SIGUSR1)
        wait_for(lambda: (output / "trainer_state.json").exists())
        job.send_signal(signal.SIGTERM)
        said = job.communicate(timeout=60)[0]
    first = len(losses(metrics_of(output)))
    assert (output / "logger-finished").exists()
    assert job.returncode == 75 and f"the same command resumes from {output}/global_step_{first}" in said
    assert requeued.read_text().split()[0] == "requeue" and len(requeued.read_text().splitlines()) == 1

    with slurm_job(folder, output, paced, restarts=1) as job:  # preemption: TERM to a node's task, and the batch shell hears nothing
        wait_for(trained_since(first))
        os.killpg(int((tmp_path / "tasks").read_text().split()[1]), signal.SIGTERM)
        said = job.communicate(timeout=60)[0]
    second = len(losses(metrics_of(output)))
    assert first < second < STEPS and f"resuming from {output}/global_step_{first}" in said
    assert len(requeued.read_text().splitlines()) == 2

    fsdp_sft_trainer.main(words(folder, output))  # what is left, without SLURM
    assert losses(metrics_of(output)) == pytest.approx(one_process, rel=1e-5)
