"""The table that `make faults` prints: how many faults of each kind were tried, and how many runs held."""

from collections.abc import Iterable

import pytest

GROUPS = {
    "test_kills": "kills at random moments, each trainer",
    "test_saves": "kills and disks that fail at named points of a save",
    "test_damage": "damaged checkpoints and models",
    "test_disk": "full and broken disks",
    "test_signals": "signals in each phase",
    "test_nodes": "signals to a node, and what nodes share",
    "test_ranks": "ranks that die, hang, fail or are slow",
    "test_lock": "two runs in a directory",
    "test_directory": "resuming with changes",
    "test_inputs": "bad inputs and settings",
    "test_random_inputs": "random rows, files and settings (properties, each of thousands)",
    "test_attacks": "attacks",
}


def lines_of(held: Iterable[pytest.TestReport], fell: Iterable[pytest.TestReport]) -> list[str]:
    """Return the lines of the table.

    Args:
        held: reports of tests that passed.
        fell: reports of tests that failed.
    """
    counts = {name: [0, 0] for name in GROUPS}
    for column, reports in enumerate((held, fell)):
        for report in reports:
            name = report.nodeid.partition(".py::")[0].rpartition("/")[2]
            if name in counts:
                counts[name][column] += 1
    lines = [f"{GROUPS[name]:<66}{good + bad:>6}{good:>6}" for name, (good, bad) in counts.items() if good + bad]
    return [f"{'':<66}{'tried':>6}{'held':>6}", *lines]
