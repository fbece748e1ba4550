"""The demo's logger: one line per 100 steps of fine-tuning, and per 5 steps of reinforcement learning, which take longer."""

from verl.run import Run

EVERY_STEPS, EVERY_RL_STEPS = 100, 5


class Milestones:
    def __init__(self, run: Run):
        self._run = run

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if step == 0:
            return  # validation before training
        reward, every = metrics.get("rl/reward"), EVERY_STEPS if "rl/reward" not in metrics else EVERY_RL_STEPS
        if step == 1 or step % every == 0 or step == self._run.total_steps:
            what = f"train/loss {metrics['train/loss']:.4f}" if reward is None else f"rl/reward {reward:.3f}"
            self._run.say(f"step {step}/{self._run.total_steps} · {what} · {metrics['perf/tokens_per_second']:,.0f} tokens/s")

    def finish(self) -> None:
        """Do nothing: no file is open."""


def start(run: Run) -> Milestones:
    return Milestones(run)
