"""TensorBoard files in the run's directory: `tensorboard --logdir DIRECTORY/tensorboard`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import yaml

from verl.errors import UserError
from verl.redaction import redact

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from verl.run import Run


class TensorBoard:
    def __init__(self, run: Run, writer: type[SummaryWriter]):
        self._run, self._open = run, writer
        self._writer: SummaryWriter | None = None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self._writer is None:
            self._writer = self._start(step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _start(self, step: int) -> SummaryWriter:
        """Open the writer. A resumed run repeats the steps after its checkpoint, so their earlier values are purged."""
        writer = self._open(str(self._run.directory / "tensorboard"), purge_step=step)
        writer.add_text("config", f"```yaml\n{yaml.safe_dump(redact(self._run.config), sort_keys=False)}```", step)
        return writer


def start(run: Run) -> TensorBoard:
    """Start the logger. Raises UserError if the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("tensorboard is not installed", where="trainer.logger", fix='pip install "verl[tensorboard]"') from error
    return TensorBoard(run, SummaryWriter)
