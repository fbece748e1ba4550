"""Reads the directory of a run that is over, still running, resumed or damaged."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from verl import regular_file
from verl.config.yaml_text import Loader
from verl.errors import UserError
from verl.eval.files import is_evaluation
from verl.manifest import MANIFEST, STEP, steps_in
from verl.redaction import redact, redact_text
from verl.report.metrics import METRICS, Metrics, read_metrics
from verl.run_directory import folder_of_runs

CONFIG, LOG, STATE, BEST, ENVIRONMENT = "config.yaml", "train.log", "trainer_state.json", "best_checkpoint.json", "environment.json"
LARGEST_CONFIG, LARGEST_LOG = 2**20, 2**28  # bytes
MOST_LINES = 200  # of the beginning of a run that are shown
_STEP_LINE = re.compile(r"step \d[\d,]*/\d")
_DATA_LINE = re.compile(r"data\.(train|val)_files: ")


@dataclass
class RunFiles:
    """What a run's directory holds.

    Attributes:
        name: of the run on the page; no two have the same.
        config: config.yaml, as nested dicts without secrets; empty if it cannot be read.
        beginning: the lines that the run printed before its first step, the last time that it began.
        warnings: lines of its log that warn, each once.
        state: trainer_state.json.
        checkpoints: names of its checkpoints, by step.
        versions: version by package, as far as the files tell.
        stopped_early: whether trainer.patience ended it at its last step, by its log.
        notes: what is odd about the files, one sentence each.
        last_written: when its metrics were, in seconds since 1970; None if it has none. A copy of a run may have the time of the copy.
    """

    directory: Path
    name: str
    metrics: Metrics
    config: dict[str, Any] = field(default_factory=dict)
    beginning: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    checkpoints: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    processes: int | None = None
    stopped_early: bool = False
    notes: list[str] = field(default_factory=list)
    last_written: float | None = None

    def setting(self, key: str) -> Any:
        """Return the value of a key such as `optim.lr`; None if the config has none."""
        found: Any = self.config
        for name in key.split("."):
            found = found.get(name) if isinstance(found, dict) else None
        return found

    @property
    def steps(self) -> int:
        """Steps that are logged."""
        return max(self.metrics.steps, default=0)

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run; None if no file tells."""
        for found in (self.state.get("total_steps"), self.setting("trainer.total_training_steps"), self._planned()):
            if isinstance(found, int) and found > 0:
                return found
        return None

    @property
    def is_finished(self) -> bool | None:
        """Whether all steps are done, or trainer.patience has ended it; None if no file tells how many steps there are."""
        return self.stopped_early or (None if self.total_steps is None else self.steps >= self.total_steps)

    def _planned(self) -> int | None:
        found = next((match for line in self.beginning if (match := re.match(r"plan: ([\d,]+) steps?\b", line))), None)
        return int(found[1].replace(",", "")) if found else None

    def said(self, start: str) -> str | None:
        """Return what a line of the beginning says after `start`, such as `device: `; None if there is no such line."""
        return next((line.removeprefix(start) for line in self.beginning if line.startswith(start)), None)

    @property
    def data_lines(self) -> list[str]:
        """What the run said about its data, with the first row."""
        found, taking = [], False
        for line in self.beginning:
            if _DATA_LINE.match(line) or line.startswith("first row"):
                taking = True
            elif re.match(r"(device|model|plan|actor|critic): |step ", line):
                taking = False
            if taking:
                found.append(line)
        return found


def read_run(path: Path) -> RunFiles:
    """Read a run's directory; of a checkpoint, the directory that it is in. What is damaged is said in its notes.

    Raises:
        UserError: there is no such directory, or it is not of a run.
    """
    directory = path.expanduser()
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "is missing"
        raise UserError(f"{what}, expected the directory of a run", where=str(path), fix="name the run's trainer.default_local_dir")
    resolved = directory.resolve()
    if STEP.fullmatch(resolved.name) and any((resolved.parent / name).exists() for name in (CONFIG, METRICS)):
        directory = resolved.parent
    if not any((directory / name).exists() for name in (CONFIG, METRICS, LOG)) and not steps_in(directory):
        raise _no_run(path, directory)
    metrics = read_metrics(directory)
    run = RunFiles(directory, directory.resolve().name, metrics, notes=list(metrics.notes), last_written=_last_written(directory))
    run.config = _read_config(run)
    run.state, run.best = _read_json(run, STATE), _read_json(run, BEST)
    _read_log(run)
    _read_checkpoints(run)
    return run


def _last_written(directory: Path) -> float | None:
    try:
        return (directory / METRICS).stat().st_mtime
    except OSError:
        return None


def _no_run(path: Path, directory: Path) -> UserError:
    """Say what a directory is that is no run's."""
    if is_evaluation(directory):
        return UserError("is an evaluation, not a run", where=str(path), fix=f"name the run first, then: --eval {path}")
    if (found := folder_of_runs(str(path), lambda run: f"verl report {run}")) is not None:
        return UserError(found.what, where=found.where, fix=f"{found.fix}; several are compared")
    what = f"has no {CONFIG}, no {METRICS} and no checkpoint, so it is no run's directory"
    return UserError(what, where=str(path), fix="name the run's trainer.default_local_dir")


def _read_config(run: RunFiles) -> dict[str, Any]:
    try:
        found = Loader.read(regular_file.read(run.directory / CONFIG, LARGEST_CONFIG, follow=True).decode("utf-8"))
    except FileNotFoundError:
        run.notes.append(f"{CONFIG} is missing, so the settings are not known.")
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        run.notes.append(f"{CONFIG} cannot be read, so the settings are not known: {str(error).splitlines()[0]}.")
        return {}
    if not isinstance(found, dict):
        run.notes.append(f"{CONFIG} holds no settings.")
        return {}
    config: dict[str, Any] = redact(found)
    return config


def _read_json(run: RunFiles, name: str) -> dict[str, Any]:
    """Read a file that a run may lack."""
    try:
        found = json.loads(regular_file.read(run.directory / name, follow=True).decode("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        run.notes.append(f"{name} cannot be read ({str(error).splitlines()[0]}), and is left out.")
        return {}
    return found if isinstance(found, dict) else {}


def _read_log(run: RunFiles) -> None:
    """Read the beginning of a run and its warnings from train.log."""
    try:
        text = redact_text(regular_file.read(run.directory / LOG, LARGEST_LOG, follow=True).decode("utf-8", errors="replace"))
    except OSError as error:
        why = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror or error})"
        run.notes.append(f"{LOG} {why}, so the data report and the device are not known.")
        return
    lines = text.splitlines()
    run.warnings = list(dict.fromkeys(line for line in lines if line.lower().startswith("warning:")))
    run.stopped_early = any(line.startswith(f"stopped early after step {run.steps} of ") for line in lines)
    begins = [number for number, line in enumerate(lines) if line.startswith("data.train_files: ")]
    for line in lines[begins[-1] if begins else 0 :]:
        if _STEP_LINE.match(line) or len(run.beginning) == MOST_LINES:
            break
        run.beginning.append(line)


def _read_checkpoints(run: RunFiles) -> None:
    """Note the checkpoints, and the versions that the run began with, or else those that wrote the newest checkpoint."""
    run.versions = {str(name): str(version) for name, version in _read_json(run, ENVIRONMENT).items()}
    found = [path for path in steps_in(run.directory) if path.is_dir()]
    run.checkpoints = [path.name for path in found]
    if found:
        newest = found[-1].name
        manifest, model = _read_json(run, f"{newest}/{MANIFEST}"), _read_json(run, f"{newest}/config.json")
        versions = {"verl": manifest.get("verl"), "transformers": model.get("transformers_version")}
        run.versions = {name: str(version) for name, version in versions.items() if version is not None} | run.versions
        run.processes = processes if isinstance(processes := manifest.get("world_size"), int) else None


def name_apart(runs: list[RunFiles]) -> None:
    """Give runs with directories of the same name longer names, with the folders that they are in."""
    depth = 2
    while len({run.name for run in runs}) < len(runs) and depth < 20:
        names = [run.name for run in runs]
        for run in runs:
            if names.count(run.name) > 1:
                run.name = "/".join(run.directory.resolve().parts[-depth:])
        depth += 1
