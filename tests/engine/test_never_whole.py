"""What is sharded is read by shards, whatever it is, and starts and trains as what was read whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from places import run_ranks
from tiny import write_problems_and_model

IN_BFLOAT16 = "adapters whose base scored first"
KINDS = ["all", "adapters", "adapters that drop", "an adapter to go on from", IN_BFLOAT16, "reference", "critic", "reward model"]


def run(processes: int, folder: Path) -> dict[str, Any]:
    output = folder / str(processes)
    output.mkdir()
    run_ranks("never_whole.py", folder / "model", output, processes=processes)
    found: dict[str, Any] = torch.load(output / "found.pt", weights_only=True)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    folder = write_problems_and_model(tmp_path_factory.mktemp("never_whole"))
    return run(1, folder), run(4, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_two_copies_of_two_shards_start_and_train_as_one_process(kind: str, found: tuple[dict[str, Any], dict[str, Any]]) -> None:
    one, four = (run[kind] for run in found)
    assert one["start"].keys() == four["start"].keys()
    for name, tensor in one["start"].items():
        torch.testing.assert_close(four["start"][name], tensor, rtol=0, atol=0, msg=name)
    if kind != "adapters that drop":  # each process draws what it drops
        assert four["losses"] == pytest.approx(one["losses"], rel=1e-2 if kind == IN_BFLOAT16 else 1e-5)


def test_a_new_head_says_nothing(found: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for kind in ("critic", "reward model"):
        heads = [tensor for name, tensor in found[1][kind]["start"].items() if name.startswith("score.")]
        assert heads and not any(tensor.any() for tensor in heads)
