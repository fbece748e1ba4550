"""No test needs a network; tests marked `gpu` or `vllm` say why they were skipped."""

import gc
import importlib.util
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

os.environ["HF_HUB_OFFLINE"] = "1"
# The models of the tests are so small that threads would mostly wait for each other, and the cores have other tests to run.
os.environ.setdefault("OMP_NUM_THREADS", "1")


# The files that take longest begin, so that at the end no core waits for one of them.
LONG_FILES = """
project/test_notebook trainer/test_sft_trainer rl/test_ppo_robust engine/test_layers demo/test_demo engine/test_compact_adamw
rl/test_ppo_trainer plan/test_plan models/test_context_parallel trainer/test_nodes models/test_operators trainer/test_reward_trainer
rollout/test_native trainer/test_saving faults/test_attacks
""".split()


def pytest_configure() -> None:
    """Take Ctrl-C, and import flash-linear-attention."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts what runs in the background so, and so would its children
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if importlib.util.find_spec("fla"):  # it warns: with warnings as errors, transformers would take it for not installed
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("fla")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _skip(items, "gpu", _no_gpu)
    for item in items:
        if item.get_closest_marker("gpu"):  # PyTorch warns of its compiler, its profiler and its check for waiting
            item.add_marker(pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"))
    _skip(items, "learning", lambda: None if "learning" in config.getoption("-m") else "takes minutes: make learning")
    _skip(items, "faults", lambda: None if "faults" in config.getoption("-m") else "takes minutes: make faults")
    if "faults" in config.getoption("-m"):
        from faults.table import in_order

        workers = getattr(config, "workerinput", {}).get("workercount", 1)
        items[:] = in_order(items, [item.nodeid for item in items], workers)
    else:
        items.sort(key=_place_of_file)
    _skip(items, "families", lambda: None if "families" in config.getoption("-m") else "takes minutes: make prove")
    _skip(items, "vllm", lambda: None if importlib.util.find_spec("vllm") else "needs vLLM: make test-vllm")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if "faults" in config.getoption("-m"):
        from faults.table import lines_of

        stats = terminalreporter.stats
        terminalreporter.section("faults")
        for line in lines_of(stats.get("passed", []), [*stats.get("failed", []), *stats.get("error", [])]):
            terminalreporter.write_line(line)
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    if lines := [str(line) for report in reports for name, line in report.user_properties if name == "seen"]:
        terminalreporter.section("seen")
        terminalreporter.write("\n".join([*lines, ""]))


def _skip(items: list[pytest.Item], marker: str, why: Callable[[], str | None]) -> None:
    """Skip those with the marker where there is a reason to, which is looked for only if there are any."""
    marked = [item for item in items if item.get_closest_marker(marker)]
    if marked and (reason := why()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def _place_of_file(item: pytest.Item) -> int:
    name = item.nodeid.partition(".py::")[0].removeprefix("tests/")
    return LONG_FILES.index(name) if name in LONG_FILES else len(LONG_FILES)


def _no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "needs a CUDA device, none was found"


@pytest.fixture(scope="module", autouse=True)
def few_objects_to_collect() -> None:
    """A run collects garbage at its end, and need not look at all that was imported before: half a second for each."""
    gc.freeze()


@pytest.fixture
def device() -> "Iterator[torch.device]":
    """This process's device, in a group of processes of its own."""
    from verl import dist

    yield dist.start()
    dist.stop()


@pytest.fixture
def process_group(device: "torch.device") -> None:
    """This process alone in a group of processes."""


@pytest.fixture(scope="session")
def learned_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that answers the rows of tests/learned.py."""
    from learned import write_learned_checkpoint

    return write_learned_checkpoint(tmp_path_factory.mktemp("learned") / "checkpoint")
