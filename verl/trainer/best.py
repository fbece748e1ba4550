"""The best checkpoint of a run by a metric of its validation (trainer.best_metric).

The run's directory has best_checkpoint.json, which says which checkpoint it is and by which value, and a link `best` to it for people.
"""

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from verl import dist
from verl.config.checks import best_mode
from verl.config.shared import TrainerConfig
from verl.durable import replace_text
from verl.engine.checkpoint import find_damage
from verl.errors import UserError
from verl.run import Run
from verl.typed_json import DamageError, read

FILE, LINK = "best_checkpoint.json", "best"


@dataclass(frozen=True)
class Record:
    """Contents of best_checkpoint.json.

    Attributes:
        checkpoint: name of its directory in the run's directory.
        mode: "min" or "max".
    """

    checkpoint: str
    metric: str
    mode: str
    value: float


class Best:
    """The best checkpoint so far. A run that resumes knows it from the file."""

    def __init__(self, config: TrainerConfig, run: Run):
        assert config.best_metric is not None
        self._metric, self._mode, self._run = config.best_metric, best_mode(config), run
        self.record = dist.from_main(self._read() if dist.is_main() else None)

    @property
    def path(self) -> Path | None:
        """The best checkpoint; None if there is none yet."""
        return None if self.record is None else self._run.directory / self.record.checkpoint

    def improves(self, metrics: Mapping[str, float]) -> bool:
        """Return whether a step's metrics have a better value than the best checkpoint. A step without validation has none."""
        value = metrics.get(self._metric, math.nan)
        if math.isnan(value):
            return False
        return self.record is None or (value < self.record.value if self._mode == "min" else value > self.record.value)

    def keep(self, saved: Path, metrics: Mapping[str, float]) -> None:
        """Record a new checkpoint as the best one, if its metrics are better. Every rank calls it."""
        if not self.improves(metrics):
            return
        self.record = Record(saved.name, self._metric, self._mode, metrics[self._metric])
        if dist.is_main():
            replace_text(self._run.directory / FILE, json.dumps(asdict(self.record), indent=2) + "\n")
            self._link(saved.name)
            self._run.say(f"best so far: {saved.name}, {self._metric} {self.record.value:.6g}")

    def check_names(self, metrics: Mapping[str, float]) -> None:
        """Raise UserError if the validation does not log the metric; `metrics` is what it logs."""
        if self._metric not in metrics:
            what = f"the validation of this run does not log {self._metric}"
            raise UserError(what, where="trainer.best_metric", fix=f"one of {', '.join(sorted(metrics))}")

    def _read(self) -> Record | None:
        """Read which checkpoint was the best one, if it is still there and the metric is the same."""
        path = self._run.directory / FILE
        if not os.path.lexists(path):
            return None
        try:
            record = read(path, Record)
        except DamageError as error:
            self._run.say(f"warning: {error}; the best checkpoint is chosen anew")
            return None
        directory = path.with_name(Path(record.checkpoint).name)
        damage = find_damage(directory, hashes=False)
        if (record.metric, record.mode) != (self._metric, self._mode) or damage is not None:
            why = f"by {record.metric} ({record.mode})" if damage is None else f"but {damage}"
            self._run.say(f"the best checkpoint was {directory.name}, {why}; it is chosen anew")
            return None
        return record

    def _link(self, name: str) -> None:
        """Let `best` point at the checkpoint. A file system without links, or a user's own `best`, is left alone."""
        temporary = self._run.directory / f"{LINK}.tmp"
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(name)
            os.replace(temporary, self._run.directory / LINK)
