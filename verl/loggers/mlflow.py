"""MLflow, in the store that `mlflow` itself uses: MLFLOW_TRACKING_URI, or a database in the current directory.

Steps are sent by a thread, so that training does not wait for a server. If the server or the disk fails, the run continues without the
logger.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from verl.errors import UserError
from verl.loggers._fallback import console_instead, first_line
from verl.redaction import redact

if TYPE_CHECKING:
    from verl.run import Run
    from verl.run_loggers import Logger

FINISH_SECONDS = 60  # to send what is left
PARAMS_AT_ONCE, LONGEST_PARAM = 100, 6000  # limits of MLflow
NOT_IN_NAMES = re.compile(r"[^/\w.\- ]")  # characters that MLflow refuses in the name of a metric
# A server that does not answer is given up after seconds, not minutes; what the user has set stays. verl sends nothing to MLflow's makers.
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class MLflow:
    """See `verl.run_loggers.Logger`.

    Args:
        client: a `mlflow.MlflowClient`.
        own: names of the environment variables to remove at the end.
    """

    def __init__(self, run: Run, client: Any, run_id: str, own: list[str]):
        self._run, self._client, self._run_id, self._own = run, client, run_id, own
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._sent: deque[Future[None]] = deque()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Queue the metrics of a step. Raises what an earlier step has failed with."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [Metric(NOT_IN_NAMES.sub("_", name), float(value), now, step) for name, value in metrics.items()]
        self._sent.append(self._sender.submit(self._client.log_batch, self._run_id, metrics=values))
        while self._sent and self._sent[0].done():
            self._sent.popleft().result()

    def finish(self) -> None:
        """Wait for the steps that are queued, and end the run."""
        status = "FAILED" if sys.exc_info()[0] is not None else "KILLED" if self._run.stopping() else "FINISHED"
        self._sent.append(self._sender.submit(self._client.set_terminated, self._run_id, status))
        try:
            done, left = wait(self._sent, timeout=FINISH_SECONDS)
        finally:
            self._sender.shutdown(wait=False, cancel_futures=True)
            _forget(self._own)
        for future in done:
            future.result()
        if left:
            raise TimeoutError(f"{len(left):,} calls were not answered within {FINISH_SECONDS} s")


def start(run: Run) -> Logger:
    """Start the logger. If the store cannot be used, the console takes its place. Raises UserError if the package is missing."""
    own = [name for name in DEFAULTS if name not in os.environ]
    os.environ.update({name: DEFAULTS[name] for name in own})
    try:
        import mlflow
    except ImportError as error:
        _forget(own)
        raise UserError("mlflow is not installed", where="trainer.logger", fix='pip install "verl[mlflow]"') from error
    try:
        with _quiet():
            client = mlflow.MlflowClient()
            run_id, said = _open(client, run)
    except Exception as error:  # neither the server nor its database may stop the run
        _forget(own)
        return console_instead(run, "mlflow", first_line(error))
    run.say(f"mlflow: {said}")
    return MLflow(run, client, run_id, own)


def _forget(own: list[str]) -> None:
    for name in own:
        os.environ.pop(name, None)


def _open(client: Any, run: Run) -> tuple[str, str]:
    """Create a run in the project's experiment, with its settings. Return its id, and how to see it."""
    from mlflow.entities import Param

    found = client.get_experiment_by_name(run.project_name)
    experiment = found.experiment_id if found is not None else client.create_experiment(run.project_name)
    run_id: str = client.create_run(
        experiment, run_name=run.experiment_name, tags={"verl.directory": str(run.directory.resolve())}
    ).info.run_id
    params = [Param(name, str(value)[:LONGEST_PARAM]) for name, value in _leaves(redact(run.config))]
    for first in range(0, len(params), PARAMS_AT_ONCE):
        client.log_batch(run_id, params=params[first : first + PARAMS_AT_ONCE])
    uri = str(client.tracking_uri)
    if uri.startswith(("http://", "https://")):
        return run_id, f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"
    return run_id, f'mlflow ui --backend-store-uri "{uri}"'


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each key of nested settings, such as `trainer.seed`, with its value."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield NOT_IN_NAMES.sub("_", f"{prefix}{name}"), value


@contextmanager
def _quiet() -> Iterator[None]:
    """In this context, MLflow does not tell how it creates the tables of a new database."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
