"""A step's numbers are read when it is done: on a GPU one step late, and never later than a pause."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from verl.data.loader import Step
from verl.engine.checkpoint import Position
from verl.trainer.meter import Meter

START = Position(step=0, tokens=0, supervised_tokens=0, rows=8, rows_per_step=2, seed=1, data_fingerprint="f")


class Reached:
    """A GPU that comes to each place in its work two seconds after the one before, whenever the host asks."""

    milliseconds = 0.0

    def __init__(self, *, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        Reached.milliseconds += 2000.0
        self.at = Reached.milliseconds

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Reached") -> float:
        return end.at - self.at


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Meter:
    monkeypatch.setattr("verl.trainer.meter.training_flops", lambda model: lambda tokens, trained: 1.0)
    monkeypatch.setattr("verl.trainer.meter.peak_flops", lambda device: None)
    monkeypatch.setattr("verl.engine.matrix_rate.matrix_rate", lambda device: 0.25)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "Event", Reached)
    device = torch.device("cpu" if request.param == "cpu" else "cuda")
    trained = [SimpleNamespace(is_cuda=request.param == "cuda")]
    engine: Any = SimpleNamespace(device=device, trained=trained, scorer=SimpleNamespace(model=None), learning_rate=lambda step: 0.1)
    return Meter(engine, START)


def add(meter: Meter, number: int, loss: float = 1.0) -> None:
    step = Step(number=number, epoch=0, tokens=10, trained_tokens=4, micro_batches=[])
    meter.add(step, {"loss": torch.tensor(loss), "grad_norm": torch.tensor(1.0)})


def read(meter: Meter, *, wait: bool) -> list[int]:
    return [number for number, _ in meter.finished(wait=wait)]


@pytest.mark.parametrize("meter", ["cuda"], indirect=True)
def test_a_step_takes_the_time_that_the_gpu_took_though_the_host_looks_at_two_at_once(meter: Meter) -> None:
    add(meter, 0)
    add(meter, 1)
    found = [metrics for _, metrics in meter.finished(wait=True)]
    assert [metrics["perf/step_seconds"] for metrics in found] == [2.0, 2.0]
    assert [metrics["perf/tokens_per_second"] for metrics in found] == [5.0, 5.0]
    meter.start()  # at 8 seconds: what lies between is nobody's
    add(meter, 2)
    assert [metrics["perf/step_seconds"] for _, metrics in meter.finished(wait=True)] == [2.0]
    assert meter.end_epoch(0) == "epoch 1: 30 tokens, 5 tokens/s"


@pytest.mark.parametrize("meter", ["cuda"], indirect=True)
def test_mfu_is_of_the_measured_rate_and_of_the_data_sheets_where_that_is_known(meter: Meter) -> None:
    add(meter, 0)
    meter._peak = None
    ((_, found),) = meter.finished(wait=True)
    assert found["perf/mfu_of_measured"] == 1.0 / 2.0 / 0.25 and "perf/mfu" not in found
    meter._peak = 0.5
    add(meter, 1)
    ((_, found),) = meter.finished(wait=True)
    assert found["perf/mfu"] == 1.0


@pytest.mark.gpu
def test_the_matrix_rate_of_a_gpu_leaves_its_random_numbers_and_its_peak_of_memory() -> None:
    from verl.engine.matrix_rate import matrix_rate

    device = torch.device("cuda", torch.cuda.current_device())
    state, peak = torch.cuda.get_rng_state(device), torch.cuda.max_memory_allocated(device)
    rate = matrix_rate(device)
    assert rate is not None and 1e12 < rate < 1e16
    assert (
        torch.equal(torch.cuda.get_rng_state(device), state) and torch.cuda.max_memory_allocated(device) <= peak + 2**27
    )  # cuBLAS keeps its workspace


@pytest.mark.parametrize("meter", ["cuda"], indirect=True)
def test_on_a_gpu_the_newest_step_is_left_running_until_a_pause(meter: Meter) -> None:
    add(meter, 0)
    assert read(meter, wait=False) == []
    add(meter, 1)
    assert read(meter, wait=False) == [1]
    add(meter, 2)
    assert read(meter, wait=True) == [2, 3]
    assert meter.tokens == 30 and meter.supervised_tokens == 12


@pytest.mark.parametrize("meter", ["cpu", "offloaded"], indirect=True)
def test_where_the_host_updates_the_weights_each_step_is_read_at_once(meter: Meter) -> None:
    for number in range(3):
        add(meter, number)
        assert read(meter, wait=False) == [number + 1]


@pytest.mark.parametrize("meter", ["cuda", "cpu"], indirect=True)
def test_a_step_whose_loss_is_not_finite_counts_as_skipped_and_does_not_use_up_its_learning_rate(meter: Meter) -> None:
    meter._engine.learning_rate = lambda step: float(step)
    for number, loss in enumerate([1.0, math.nan, math.inf, 1.0]):
        add(meter, number, loss)
    found = [(metrics["train/lr"], metrics.get("train/skipped"), meter.skipped_in_a_row) for _, metrics in meter.finished(wait=True)]
    assert found == [(0.0, None, 0), (1.0, 1.0, 1), (1.0, 1.0, 2), (1.0, None, 0)]
