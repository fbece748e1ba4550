"""The best checkpoint of a run by a metric of its validation (trainer.best_metric).

Each checkpoint has the metrics of its step's validation in state.json, from which a run that resumes knows the best one: a kill at any
point after the commit loses nothing. best_checkpoint.json and the link `best` in the run's directory are written from them, for people.
"""

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from verl import dist
from verl.config.best import best_mode
from verl.config.shared import TrainerConfig
from verl.data.fingerprint import Fingerprint
from verl.durable import replace_text
from verl.engine.checkpoint import committed, find_damage
from verl.engine.damage import read_position
from verl.engine.position import Position
from verl.errors import UserError
from verl.manifest import STEP
from verl.run import Run

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
    """The best checkpoint so far. A run that resumes knows it from its checkpoints.

    Args:
        rows: identity of the validation rows (`rows_of`); None: those of the newest checkpoint that was validated.
    """

    def __init__(self, config: TrainerConfig, run: Run, rows: str | None):
        assert config.best_metric is not None
        self._metric, self._mode, self._run = config.best_metric, best_mode(config), run
        self.record: Record | None = None
        self.record = dist.from_main(self._find(rows) if dist.is_main() else None)
        if self.record is not None:
            self._publish(self.record)

    @property
    def path(self) -> Path | None:
        """The best checkpoint; None if there is none yet."""
        return None if self.record is None else self._run.directory / self.record.checkpoint

    def improves(self, metrics: Mapping[str, float], being_written: Mapping[str, float] | None = None) -> bool:
        """Return whether a step's metrics have a better value than the best checkpoint. A step without validation has none.

        Args:
            being_written: metrics of a checkpoint that is not recorded yet.
        """
        values = [each.get(self._metric, math.nan) for each in (metrics, being_written or {})]
        if not math.isfinite(values[0]):
            return False
        others = [values[1]] if math.isfinite(values[1]) else []
        others += [] if self.record is None else [self.record.value]
        return all(values[0] < other if self._mode == "min" else values[0] > other for other in others)

    def keep(self, saved: Path, metrics: Mapping[str, float]) -> None:
        """Record a new checkpoint as the best one, if its metrics are better. Every rank calls it."""
        if self.improves(metrics):
            self.record = Record(saved.name, self._metric, self._mode, metrics[self._metric])
            self._publish(self.record)

    def check_names(self, metrics: Mapping[str, float]) -> None:
        """Raise UserError if the validation does not log the metric; `metrics` is what it logs."""
        if self._metric not in metrics:
            what = f"the validation of this run does not log {self._metric}"
            raise UserError(what, where="trainer.best_metric", fix=f"one of {', '.join(sorted(metrics))}")

    def _find(self, rows: str | None) -> Record | None:
        """Find the best of the checkpoints up to the one that the run resumes from. Those over other validation rows are not compared."""
        validated = [(path, position) for path, position in self._earlier() if self._metric in position.validation]
        rows = validated[-1][1].validation_rows if rows is None and validated else rows
        for path, position in validated:
            if position.validation_rows == rows and self.improves(position.validation):
                self.record = Record(path.name, self._metric, self._mode, position.validation[self._metric])
        if others := [path.name for path, position in validated if position.validation_rows != rows]:
            names = others[0] if len(others) == 1 else f"{others[0]} to {others[-1]}"
            what = f"{names}: {self._metric} is of other validation rows than this run's (data.val_files)"
            self._run.say(f"{what}; it is not compared, and the best checkpoint is chosen from the others")
        return self.record

    def _earlier(self) -> list[tuple[Path, Position]]:
        """Return the checkpoints of the run up to the one that it resumes from, oldest first. Later ones are damaged."""
        newest = self._run.checkpoint
        last = STEP.fullmatch(newest.resolve().name) if newest is not None else None
        steps = [path for path in committed(self._run.directory) if last and int(path.name.rpartition("_")[2]) <= int(last[1])]
        return [(path, read_position(path)) for path in steps if find_damage(path, hashes=False) is None]

    def _publish(self, record: Record) -> None:
        """Write best_checkpoint.json, and let `best` point at the checkpoint."""
        if dist.is_main():
            replace_text(self._run.directory / FILE, json.dumps(asdict(record), indent=2) + "\n")
            self._link(record.checkpoint)
            self._run.line(f"best so far: {record.checkpoint}, {self._metric} {record.value:.6g}", "best")

    def _link(self, name: str) -> None:
        """Let `best` point at the checkpoint. A file system without links, or a user's own `best`, is left alone."""
        temporary = self._run.directory / f"{LINK}.tmp"
        with suppress(OSError):
            if temporary.is_symlink():
                temporary.unlink()
            temporary.symlink_to(name)
            os.replace(temporary, self._run.directory / LINK)


def rows_of(fingerprint: Fingerprint) -> str:
    """Return what identifies validation rows, whose mean does not depend on their order."""
    return f"{fingerprint.rows}-{fingerprint.tokens}-{fingerprint.any_order}"
