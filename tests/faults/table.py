"""The table that `make faults` prints: how many faults of each kind were tried, and how many held; and which tests it starts first."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

import pytest

TRIED = "tried"  # property of a test that tries more than one fault: how many
SAID = "said"  # property of a test: a line for the end of the table

GROUPS = {
    "test_kills": "kills at random moments",
    "test_rl_kills": "ranks and servers of RL that are killed",
    "test_saves": "kills and disks that fail at named points of a save",
    "test_damage": "damaged checkpoints and models",
    "test_disk": "full and broken disks",
    "test_signals": "signals in each phase",
    "test_nodes": "signals to a node, and what nodes share",
    "test_ranks": "ranks that die, hang, fail or are slow",
    "test_lock": "two runs in a directory",
    "test_directory": "resuming with changes",
    "test_inputs": "bad inputs and settings",
    "test_random_inputs": "random rows, files and settings",
    "test_attacks": "attacks",
}
LONGEST = ("test_kills", "test_rl_kills", "test_nodes", "test_random_inputs")  # minutes, or most of a minute, each

Item = TypeVar("Item")


def lines_of(held: Iterable[pytest.TestReport], fell: Iterable[pytest.TestReport]) -> list[str]:
    """Return the lines of the table.

    Args:
        held: reports of tests that passed.
        fell: reports of tests that failed.
    """
    counts = {name: [0, 0, 0, 0] for name in GROUPS}
    said = []
    for is_good, reports in ((1, held), (0, fell)):
        for report in reports:
            name = group_of(report.nodeid)
            if name in counts:
                found = dict(report.user_properties)
                faults = int(str(found.get(TRIED, 1)))
                for column, number in enumerate((1, is_good, faults, is_good * faults)):
                    counts[name][column] += number
                said += [f"  {found[SAID]}"] if SAID in found else []
    lines = [f"{GROUPS[name]:<56}" + "".join(f"{number:>8,}" for number in row) for name, row in counts.items() if row[0]]
    return [f"{'':<56}{'tests':>8}{'held':>8}{'faults':>8}{'held':>8}", *lines, *sorted(said)]


def group_of(test: str) -> str:
    """Return the name of the module of a test, given by its node id."""
    return test.partition(".py::")[0].rpartition("/")[2]


def in_order(items: Sequence[Item], names: Sequence[str], processes: int) -> list[Item]:
    """Return the tests in such an order that each process starts with some of the longest.

    pytest-xdist gives each process one of equal parts of the list at first, and takes from the ends of the parts what others have left.

    Args:
        items: the tests.
        names: their node ids.
    """
    places = [LONGEST.index(group_of(name)) if group_of(name) in LONGEST else len(LONGEST) for name in names]
    order = sorted(range(len(items)), key=places.__getitem__)
    first = sum(place < len(LONGEST) for place in places)
    long, rest = [items[number] for number in order[:first]], [items[number] for number in order[first:]]
    found: list[Item] = []
    for process in range(processes):
        part = long[process::processes]
        size = max(0, (len(items) - len(found)) // (processes - process) - len(part))
        found += [*part, *rest[:size]]
        rest = rest[size:]
    return [*found, *rest]
