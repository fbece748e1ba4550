"""The notebook as a person runs it, and what a run looks like in a real kernel."""

from pathlib import Path
from typing import Any

import pytest
from places import ROOT
from tiny import write_problems_and_model

nbformat = pytest.importorskip("nbformat", reason="needs nbclient and ipykernel, which the extra dev brings")
NotebookClient = pytest.importorskip("nbclient").NotebookClient

THREE_STEPS = ROOT / "examples" / "notebooks" / "three_steps.ipynb"


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def run(notebook: Any, folder: Path, **options: Any) -> Any:
    """The notebook with its outputs, in a kernel whose current folder is this one."""
    NotebookClient(notebook, timeout=800, kernel_name="python3", resources={"metadata": {"path": str(folder)}}, **options).execute()
    return notebook


def texts(cell: Any, name: str = "stdout") -> str:
    return "".join(output["text"] for output in cell["outputs"] if output["output_type"] == "stream" and output["name"] == name)


def bars(cell: Any) -> list[dict[str, str]]:
    """Progress bars, but for those that are taken away again."""
    found = [output["data"] for output in cell["outputs"] if output["output_type"] == "display_data"]
    return [data for data in found if data["text/plain"]]


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = [cell for cell in read(THREE_STEPS)["cells"] if cell["cell_type"] == "code"]
    assert [cell for cell in cells if cell["outputs"] or cell["execution_count"] is not None] == []


@pytest.mark.timeout(900)  # a minute and a half on two cores that do nothing else
def test_the_notebook_runs_and_its_last_cell_shows_that_the_model_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cells = [cell for cell in run(read(THREE_STEPS), tmp_path)["cells"] if cell["cell_type"] == "code"]
    before, after = (int(word.rstrip("%")) for word in texts(cells[-1]).split() if word.endswith("%"))
    assert after > before + 30
    assert [texts(cell, "stderr") for cell in cells] == [""] * len(cells), "no warning, no other library's bar"
    (bar,) = bars(cells[2])
    assert bar["text/plain"].startswith("╭─ verl sft") and "train/loss " in bar["text/plain"] and "text/html" in bar
    assert len(bars(cells[3])) == 2, "a panel for each evaluation"
    assert "saved notebook-run/checkpoints/global_step_" in texts(cells[2]) and "step 2/" not in texts(cells[2])
    assert (tmp_path / "notebook-run" / "exported" / "config.json").is_file()


TRAINS = """
import verl
verl.sft({
    "data": {"train_files": "train.jsonl", "cache_dir": "cache", "train_batch_size": 6, "max_length": 256},
    "model.partial_pretrain": "model",
    "trainer": {"default_local_dir": "run", "total_training_steps": 20, "save_freq": -1, "logger": "interrupts.py"},
})
"""
SHOWS_HANDLER = """
import signal
print(signal.getsignal(signal.SIGINT).__name__)
"""


@pytest.mark.timeout(600)
def test_interrupting_the_kernel_ends_the_run_with_a_checkpoint_and_the_kernel_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    write_problems_and_model(tmp_path)
    (tmp_path / "interrupts.py").write_text(INTERRUPTS)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in (TRAINS, SHOWS_HANDLER)])
    first, second = run(notebook, tmp_path, allow_errors=True)["cells"]
    (error,) = [output for output in first["outputs"] if output["output_type"] == "error"]
    (checkpoint,) = (tmp_path / "run").glob("global_step_*")
    assert error["ename"] == "Stopped"
    assert error["evalue"] == f"stopped by SIGINT; the same call resumes from run/{checkpoint.name}"
    (bar,) = bars(first)
    assert "2/20" in bar["text/plain"] or "3/20" in bar["text/plain"]
    assert texts(second) == "default_int_handler\n"


# As the kernel's button does, while the second step's metrics are logged.
INTERRUPTS = """
import os
import signal

class Logger:
    def log(self, step, metrics):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    def finish(self):
        pass

def start(run):
    return Logger()
"""
