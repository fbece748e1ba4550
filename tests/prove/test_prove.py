"""`verl prove`: a table of what holds for a model, and what is wrong with a broken verl."""

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prove import run_families
from prove.configs import IN_TESTS, families
from tiny import qwen2_config, write_model
from transformers import Qwen2Config

from verl.errors import UserError
from verl.prove import command
from verl.prove.outcome import Outcome, compared, compared_beside_rounding
from verl.prove.proofs import training
from verl.prove.saved import loaded_again
from verl.prove.tokenizer import byte_tokenizer

Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What is found for a Qwen2 with windows, by the names of the lines."""
    folder = tmp_path_factory.mktemp("prove")
    config = Qwen2Config(use_sliding_window=True, sliding_window=4096, max_window_layers=14, num_hidden_layers=28)
    config.save_pretrained(folder)
    assert command.prove(str(folder / "config.json"), json_file=folder / "found.json") == 0
    summary = json.loads((folder / "found.json").read_text())
    return {outcome["name"]: outcome for outcome in summary["outcomes"]}


def test_all_lines_of_qwen2_with_windows_hold(found: Found) -> None:
    assert {outcome["state"] for outcome in found.values()} <= {"holds", "none"}


def test_each_line_was_compared_with_something(found: Found) -> None:
    assert all(outcome["difference"] is not None for outcome in found.values() if outcome["state"] == "holds")


def test_a_name_without_a_model_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no-such-model"):
        command.prove(str(tmp_path / "no-such-model"))


def test_a_config_alone_has_no_weights_to_prove(tmp_path: Path) -> None:
    Qwen2Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="without weights"):
        command.prove(str(tmp_path / "config.json"), real=True)


def test_a_model_itself_in_bfloat16_may_differ_by_its_rounding_on_disk_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    model = write_model(tmp_path / "model", qwen2_config(), dtype=torch.bfloat16)
    byte_tokenizer().save_pretrained(model)
    subject = command.make_subject(str(model), tmp_path / "runs", real=True)
    result = subject.tuned()
    assert result.checkpoint is not None
    loss = result.metrics[-1]["val/loss"]
    same = loaded_again(subject, "fine-tuning", "reload", result.checkpoint, loss)
    assert same.state == "holds" and same.difference > 1e-5 and "rounding on disk" in same.found
    assert loaded_again(subject, "fine-tuning", "reload", result.checkpoint, loss + 0.05).state == "wrong"


@pytest.mark.parametrize(("difference", "state"), [(0.0, "holds"), (9e-6, "holds"), (2e-5, "wrong"), (float("nan"), "wrong")])
def test_a_difference_above_the_tolerance_is_wrong_and_so_is_nan(difference: float, state: str) -> None:
    found: Outcome = compared("fine-tuning", "packed = alone", {"loss": difference})
    assert found.state == state


@pytest.mark.parametrize(
    ("difference", "rounding", "state"),
    [(9e-6, None, "holds"), (5e-5, 3e-5, "holds"), (5e-5, 2e-5, "wrong"), (2e-3, None, "wrong"), (float("nan"), None, "wrong")],
)
def test_rounding_is_measured_where_it_could_be_all(difference: float, rounding: float | None, state: str) -> None:
    def measured() -> float:
        assert rounding is not None
        return rounding

    assert compared_beside_rounding("fine-tuning", "one rank = two", {"loss": difference}, measured).state == state


@pytest.mark.parametrize("family", IN_TESTS)
def test_no_line_of_a_family_is_wrong(family: str, tmp_path: Path) -> None:
    families()[family]().save_pretrained(tmp_path)
    command.prove(str(tmp_path / "config.json"), json_file=tmp_path / "found.json")
    outcomes = json.loads((tmp_path / "found.json").read_text())["outcomes"]
    assert [outcome for outcome in outcomes if outcome["state"] == "wrong"] == []


def test_the_table_counts_what_is_exact_and_shows_what_is_wrong(tmp_path: Path) -> None:
    lines = {"packed = alone": "slower", "reload": "holds", "export": "refused", "native = plain": "refused", "hf = plain": "holds"}
    outcomes = [{"name": name, "state": state, "found": "1e-7; its own code"} for name, state in lines.items()]
    for name, last in (("gemma2", "holds"), ("rwkv", "wrong")):
        grpo = {"name": "rollout = trainer", "state": last, "found": "traceback: KeyError"}
        (tmp_path / f"{name}.json").write_text(json.dumps({"family": name, "outcomes": [*outcomes, grpo]}))
    rows = run_families.table(tmp_path).splitlines()
    assert "| gemma2 | exact, slower | exact, slower | refused | exact | one document at a time: its own code; hf |" in rows
    assert "| GRPO | 1 |" in rows and "| wrong somewhere; lines that end in a traceback | 1; 1 |" in rows
    assert any(row.startswith("| rwkv |") and "**wrong**" in row for row in rows)


class _Loops:
    """A subject whose runs have these losses, and its plain loops, by the seed of their rounding, those."""

    def __init__(self, found: list[float], loops: dict[int, list[float]]):
        self.model, self._loops = "", loops
        steps = [{"train/loss": loss} for loss in found[:-1]]
        self._metrics = [*steps[:-1], steps[-1] | {"val/loss": found[-1]}]

    def tuned(self) -> Any:
        return SimpleNamespace(metrics=self._metrics)

    def rounded(self, seeds: Iterable[int]) -> Iterable[int]:
        return seeds

    def plain_losses(self, seed: int) -> list[float]:
        return self._loops.get(seed, self._loops[0])

    rounding_after_steps = 1e-6


@pytest.mark.parametrize(
    ("found", "state"),
    [
        ([2.0, 1.9, 1.8, 1.7], "holds"),
        ([2.0, 1.9, 1.8, 1.7 + 1e-6], "holds"),
        ([2.0, 1.9002, 1.8002, 1.7012], "holds"),  # as in the loop in which a token has another expert
        ([2.0, 1.9002, 1.8002, 1.7013], "wrong"),  # as in none of them
        ([2.0, 1.9002, 1.8, 1.7], "wrong"),
    ],
)
def test_losses_are_those_of_one_of_the_plain_loops_that_rounding_makes(
    found: list[float], state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.plain, "load", lambda _: 0)
    subject: Any = _Loops(found, {0: [2.0, 1.9, 1.8, 1.7], 3: [2.0, 1.9002, 1.8002, 1.7012]})
    assert training.prove(subject).state == state
