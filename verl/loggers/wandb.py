"""Weights & Biases.

If the package, the login or the network is missing, the logger reports it in one line and falls back to the console: no run waits or
stops for it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from verl.loggers._fallback import arguments_redacted, console_instead, first_line
from verl.redaction import redact

if TYPE_CHECKING:
    from verl.run import Run
    from verl.run_loggers import Logger

START_SECONDS = 30  # to wait for the server, before the run continues without it
FINISH_SECONDS = 60  # to upload the remaining data; the rest stays in the run's directory, for `wandb sync`


class _NoLoginError(Exception):
    pass


class Wandb:
    def __init__(self, run: Run, session: Any):
        self._run, self._session = run, session
        self._failed = False

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._attempt(self._session.log, metrics, step=step)

    def finish(self) -> None:
        self._attempt(self._session.finish)

    def _attempt(self, call: Any, *args: Any, **kwargs: Any) -> None:
        try:
            call(*args, **kwargs)
        except Exception as error:  # no failure of the service may stop the training
            if not self._failed:
                self._run.say(f"wandb: {first_line(error)}; metrics.jsonl has every step")
            self._failed = True


def start(run: Run) -> Logger:
    try:
        session = _open(run)
    except ModuleNotFoundError as error:
        reason = 'the package is not installed (pip install "verl[wandb]")' if error.name == "wandb" else first_line(error)
    except _NoLoginError:
        reason = "no login (wandb login, or WANDB_API_KEY; WANDB_MODE=offline keeps a run on disk)"
    except Exception as error:  # neither the service, the network nor a user's setting may stop the run
        reason = first_line(error)
    else:
        run.say(f"wandb: {'on disk, ' + session.dir if session.offline else session.url or 'disabled by WANDB_MODE'}")
        return Wandb(run, session)
    return console_instead(run, "wandb", reason)


def _open(run: Run) -> Any:
    import wandb

    with arguments_redacted():
        return _opened(wandb, run)


def _opened(wandb: Any, run: Run) -> Any:
    wandb.setup(wandb.Settings(silent=True))
    stays_local = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
    if not stays_local and not wandb.login(prompt=False, verify=False):
        raise _NoLoginError
    return wandb.init(
        project=run.project_name,
        name=run.experiment_name,
        dir=str(run.directory),
        config=redact(run.config),
        settings=wandb.Settings(silent=True, console="off", init_timeout=START_SECONDS, finish_timeout=FINISH_SECONDS),
    )
