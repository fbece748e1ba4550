"""Each planted fault shows in the line of `verl prove` that is there for it, and the same line holds without it."""

import importlib
import shutil
from pathlib import Path

import pytest
from families import qwen3
from prove import planted
from prove.configs import families
from prove.planted import Fault

from verl.progress import quiet_libraries
from verl.prove import command
from verl.prove.outcome import Outcome

FAULTS = [
    Fault("qwen2", "packed", planted.attention_across_documents),
    Fault("qwen2", "mask", planted.messages_one_by_one),
    Fault("qwen2", "mask", planted.everything_is_trained),
    Fault("qwen2", "mask", planted.stop_token_is_masked),
    Fault("qwen2", "micro_batches", planted.mean_of_means),
    Fault("qwen2", "adapter_loads", planted.merged_without_experts),
    Fault("qwen2", "adapter_loads", planted.adapter_raises),
    Fault("qwen2", "hf", planted.padding_is_attended),
    Fault("qwen2, windows", "packed", planted.windows_are_lost_in_training),
    Fault("qwen2, windows", "native", planted.windows_are_lost_in_generation),
    Fault("phi3, longrope", "packed", planted.frequencies_of_the_longest, "verl.models.rope"),
    Fault("qwen3_moe", "auxiliary_loss", planted.router_loss_is_lost, "verl.engine.router_loss"),
    Fault("opt, functional dropout", "randomness", planted.dropout_stays_on, "verl.rl.still"),
]
QUICK = ("packed", "mask", "micro_batches")  # in `make test`; the others in `make prove`


def line(folder: Path, fault: Fault) -> Outcome:
    """The fault's line, of a twin of its family; its template is Qwen3's, which looks at a message's neighbours."""
    config = folder / "config"
    shutil.rmtree(config, ignore_errors=True)
    families()[fault.family]().save_pretrained(config)
    if fault.proof == "mask":
        qwen3().save_pretrained(config)
    scratch = folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    path = config if fault.proof == "mask" else config / "config.json"
    with quiet_libraries():
        subject = command.make_subject(str(path), scratch, real=False)
        return command.outcome_of(importlib.import_module(f"verl.prove.proofs.{fault.proof}"), subject)


def marks(fault: Fault) -> list[pytest.MarkDecorator]:
    slow = [] if fault.proof in QUICK and fault.family == "qwen2" else [pytest.mark.families]
    return slow if fault.is_there else [pytest.mark.skip(reason=f"no {fault.needs}")]


@pytest.mark.parametrize("fault", [pytest.param(fault, id=fault.plant.__name__, marks=marks(fault)) for fault in FAULTS])
def test_a_planted_fault_is_wrong_and_without_it_the_line_holds(fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert line(tmp_path, fault).state in ("holds", "slower")
    fault.plant(monkeypatch)
    broken = line(tmp_path, fault)
    assert broken.state == "wrong", broken
