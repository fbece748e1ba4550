"""A logger of your own: a CSV file with one line per step and metric.

    verl sft … trainer.logger=examples/loggers/csv_logger.py

A logger is a module with `start(run)`; `run` has config, project_name, experiment_name, directory, total_steps and say(text).
`start` returns an object with `log(step, metrics)` and `finish()`. Only rank 0 has loggers.
"""

import csv
from typing import TextIO

from verl.run import Run


class CsvLogger:
    def __init__(self, file: TextIO):
        self._file = file
        self._writer = csv.writer(file)
        self._writer.writerow(["step", "metric", "value"])

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._writer.writerows([step, name, value] for name, value in metrics.items())
        self._file.flush()  # so that the file is current during the run

    def finish(self) -> None:
        self._file.close()


def start(run: Run) -> CsvLogger:
    path = run.directory / "metrics.csv"
    run.say(f"csv: {path}")
    return CsvLogger(path.open("w", newline="", encoding="utf-8"))
