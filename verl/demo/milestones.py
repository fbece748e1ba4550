"""The demo's logger: a line each hundred steps, so that a terminal and a log both show the loss falling."""

from verl.run import Run

EVERY_STEPS = 100


class Milestones:
    def __init__(self, run: Run):
        self._run = run

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if step == 1 or step % EVERY_STEPS == 0 or step == self._run.total_steps:
            loss, speed = metrics["train/loss"], metrics["perf/tokens_per_second"]
            self._run.say(f"step {step}/{self._run.total_steps} · loss {loss:.4f} · {speed:,.0f} tokens/s")

    def finish(self) -> None:
        """Nothing is open."""


def start(run: Run) -> Milestones:
    return Milestones(run)
