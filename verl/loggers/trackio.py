"""Trackio. It logs to the local disk; `trackio show` opens its dashboard."""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING, Any

from verl.errors import UserError
from verl.redaction import redact

if TYPE_CHECKING:
    from verl.run import Run


class Trackio:
    def __init__(self, trackio: Any):
        self._trackio = trackio

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._trackio.log(metrics, step=step)

    def finish(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._trackio.finish()


def start(run: Run) -> Trackio:
    """Start the logger. Raises UserError if the package is missing or rejects the project's name."""
    try:
        import trackio
    except ImportError as error:
        raise UserError("trackio is not installed", where="trainer.logger", fix='pip install "verl[trackio]"') from error
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            trackio.init(project=run.project_name, name=run.experiment_name, config=redact(run.config), embed=False)
    except ValueError as error:
        raise UserError(str(error), where="trainer.project_name", fix="choose another name") from error
    run.say(f'trackio: trackio show --project "{run.project_name}"')
    return Trackio(trackio)
