"""`.metadata` is read as PyTorch reads it, and whatever it names is not run."""

import builtins
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from verl.engine.stored_metadata import Reader, files_of, read_metadata
from verl.typed_json import DamageError

pytestmark = [pytest.mark.usefixtures("process_group"), pytest.mark.filterwarnings("ignore")]


def state(value: float = 1.0) -> dict[str, Any]:
    model = {"a": torch.full((3, 4), value), "b": torch.full((2,), value, dtype=torch.bfloat16), "none": torch.zeros(0)}
    return {"model": model, "optimizer": {"a": {"step": torch.tensor(value), "codes": torch.ones(4, dtype=torch.uint8)}}}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    dcp.save(state(), checkpoint_id=tmp_path)
    return tmp_path


def test_it_is_read_as_pytorch_reads_it(directory: Path) -> None:
    with (directory / ".metadata").open("rb") as file:
        expected = pickle.load(file)
    found = read_metadata(directory)
    assert found.state_dict_metadata == expected.state_dict_metadata and found.storage_data == expected.storage_data
    assert found.planner_data == expected.planner_data
    assert files_of(found) == {"__0_0.distcp": (directory / "__0_0.distcp").stat().st_size}


def test_pytorch_loads_with_it(directory: Path) -> None:
    loaded = state(0.0)
    dcp.load(loaded, storage_reader=Reader(directory))
    assert torch.equal(loaded["model"]["a"], state()["model"]["a"]) and loaded["optimizer"]["a"]["step"] == 1


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def attacks(canary: Path) -> dict[str, object]:
    command = f"touch {canary}"
    code = f"open({str(canary)!r}, 'w')"
    getattr_chain = Call(getattr, Call(getattr, Call(__import__, "os"), "system"), "__call__")
    stored = io.BytesIO()
    torch.save(Call(os.system, command), stored)
    return {
        "os.system": Call(os.system, command),
        "eval": Call(builtins.eval, code),
        "exec": Call(builtins.exec, code),
        "a chain of getattr": getattr_chain,
        "a payload of a storage": Call(torch.load, io.BytesIO(stored.getvalue())),
        "torch.storage": Call(torch.storage._load_from_bytes, stored.getvalue()),
        "inside what is expected": {"state_dict_metadata": {"a": Call(os.system, command)}},
        "a class of this file": Call,
    }


@pytest.mark.parametrize("name", sorted(attacks(Path("x"))))
def test_code_that_it_names_is_not_run(name: str, directory: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (directory / ".metadata").write_bytes(pickle.dumps(attacks(canary)[name]))
    with pytest.raises(DamageError, match=r"\.metadata names .*, which no checkpoint needs"):
        read_metadata(directory)
    with pytest.raises(dcp.api.CheckpointException):
        dcp.load(state(), storage_reader=Reader(directory))
    assert not canary.exists()


def raw(text: str) -> bytes:
    return text.encode("latin-1")


NAMED = "ctorch.distributed.checkpoint.metadata\nMetadata\n"
PICKLES = {
    "a class whose attributes are set": raw(f"{NAMED}(N}}S'__init__'\nctorch\nSize\nstb."),
    "an allowed getattr of a module": raw("cbuiltins\ngetattr\n(S'os'\nS'system'\ntR."),
    "an extension": raw("\x82\x01."),
    "a persistent id": raw("Pname\n."),
    "an index of the memo that would take 64 GB": raw("]r\xff\xff\xff\x7f."),
    "nothing but a stop": raw("."),
    "an instruction that does not exist": raw("\xff."),
}


@pytest.mark.parametrize("name", sorted(PICKLES))
def test_a_pickle_by_hand_is_refused_and_changes_no_class(name: str, directory: Path) -> None:
    before = dict(vars(dcp.metadata.Metadata))
    (directory / ".metadata").write_bytes(PICKLES[name])
    with pytest.raises(DamageError):
        read_metadata(directory)
    assert dict(vars(dcp.metadata.Metadata)) == before


def test_a_path_of_a_part_stays_inside(directory: Path) -> None:
    content = (directory / ".metadata").read_bytes()
    (directory / ".metadata").write_bytes(content.replace(b"__0_0.distcp", b"../_0.distcp"))
    with pytest.raises(DamageError, match=r"names '\.\./_0\.distcp', which is no part of the checkpoint"):
        read_metadata(directory)
