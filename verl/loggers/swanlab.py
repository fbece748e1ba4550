"""SwanLab: in its cloud, or on disk with SWANLAB_MODE=offline or local.

If the login or the network is missing, the logger reports it in one line and falls back to the console: no run waits or stops for it.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from verl.errors import UserError
from verl.loggers._fallback import arguments_redacted, console_instead, first_line
from verl.redaction import redact

if TYPE_CHECKING:
    from verl.run import Run
    from verl.run_loggers import Logger


class SwanLab:
    def __init__(self, session: Any):
        self._session = session

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._session.log(metrics, step=step)

    def finish(self) -> None:
        with _silent(), _own_interrupts():
            self._session.finish()


def start(run: Run) -> Logger:
    """Start the logger. If the service cannot be used, the console takes its place. Raises UserError if the package is missing."""
    try:
        import swanlab
    except ImportError as error:
        raise UserError("swanlab is not installed", where="trainer.logger", fix='pip install "verl[swanlab]"') from error
    try:
        with arguments_redacted(), _silent(), _own_interrupts():
            session = _opened(swanlab, run)
    except (Exception, SystemExit) as error:  # neither the service, the network nor a user's setting may stop the run
        reason = first_line(error)
        no_login = "no login (swanlab login, or SWANLAB_API_KEY; SWANLAB_MODE=offline keeps a run on disk)"
        return console_instead(run, "swanlab", no_login if "no API key" in reason else reason)
    if session.mode == "online":
        said = str(session.url)
    else:
        said = "disabled by SWANLAB_MODE" if session.mode == "disabled" else f"on disk, {session.dir}"
    run.say(f"swanlab: {said}")
    return SwanLab(session)


def _opened(swanlab: Any, run: Run) -> Any:
    """Start SwanLab's run. It records neither the terminal, nor the command and the address of a repository, which may have secrets."""
    settings = swanlab.Settings(
        interactive=False,
        terminal=swanlab.Settings.Terminal(proxy_type="none"),
        probe=swanlab.Settings.Probe(runtime=False, git=False),
    )
    return swanlab.init(
        project=run.project_name,
        name=run.experiment_name,
        log_dir=os.environ.get("SWANLAB_LOG_DIR") or str(run.directory / "swanlog"),
        mode=os.environ.get("SWANLAB_MODE"),
        config=redact(run.config),
        settings=settings,
    )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _own_interrupts() -> Iterator[None]:
    """After this context, Ctrl-C does what it did before: SwanLab would end its own run and the process with it, without a checkpoint."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGINT, before)
