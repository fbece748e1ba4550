"""The updates of critic and actor in a step. An update with a non-finite loss or gradient is skipped and reported."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from verl import dist
from verl.algorithms._kl import AdaptiveKL
from verl.algorithms._settings import PolicySettings
from verl.config.ppo import PPOConfig
from verl.data.batch import Batch
from verl.durable import real_folder
from verl.engine.build_heads import Critic
from verl.engine.contract import Algorithm
from verl.engine.engine import Engine
from verl.engine.position import Position
from verl.engine.skipped import refuse_more, tell
from verl.engine.teachers import Teacher
from verl.rl.answering import Collected
from verl.rl.experience import Experience
from verl.rl.method import Method, make_loss
from verl.run import Run

Out = list[dict[str, Tensor]]  # results of `Engine.train_step`, one per update


class Updates:
    """Runs the updates of each step.

    Attributes:
        per_step: number of updates per step.
        settings: the method's settings; with `kl_target`, they hold the current KL coefficient.
        skips_zero_advantage: whether the actor's forward and backward passes leave out micro-batches without a non-zero advantage.
    """

    def __init__(self, config: PPOConfig, method: Method, start: Position, run: Run):
        self._module, self._run, self._teacher = method.module, run, method.teacher
        self.per_step = config.algorithm.updates_per_step
        self._max_new_tokens = config.rollout.max_new_tokens
        self._warmup = config.critic.warmup_steps if method.needs_critic else 0
        self.settings: Any = method.settings
        self.skips_zero_advantage = method.needs_groups and method.skips_zero_advantage
        self._kl: AdaptiveKL | None = None
        if isinstance(self.settings, PolicySettings) and self.settings.kl_target is not None:
            coef = self.settings.kl_coef if start.kl_coef is None else start.kl_coef
            self._kl = AdaptiveKL(coef, self.settings.kl_target, self.settings.kl_horizon)
            self.settings = replace(self.settings, kl_coef=coef)
        self._most_skipped = config.trainer.max_nonfinite_steps
        self._skipped = {"critic": 0, "actor": 0}  # number of skipped updates in a row

    @property
    def kl_coef(self) -> float | None:
        """The current KL coefficient; None if it is not adapted."""
        return None if self._kl is None else self._kl.coef

    def critic(self, critic: Critic | None, experience: Experience, step: int) -> Out:
        """Train the critic, if there is one. Every rank calls it."""
        if critic is None:
            return []
        return self._take(critic.engine, self._module.ValueLoss(self.settings), experience, step, "critic")

    def actor(self, engine: Engine, experience: Experience, step: int, teacher: Teacher | None = None) -> Out:
        """Train the actor, except in the first `critic.warmup_steps` steps. Every rank calls it."""
        if step < self._warmup:
            return []
        loss = make_loss(self._module, self.settings, self._max_new_tokens, self._teacher)
        with nullcontext() if teacher is None else teacher.teaching(engine):
            return self._take(engine, loss, experience, step, "actor")

    def adapt(self, outs: Out, collected: Collected) -> dict[str, float]:
        """Adapt the KL coefficient to the step's KL divergence, if `kl_target` is set.

        Args:
            outs: results of the actor's updates.
        Returns:
            the KL coefficient as a metric, if it is positive.
        """
        # A skipped update's divergence may be NaN.
        found = [float(out["kl_k3"]) for out in outs if "kl_k3" in out and not float(out["skipped"])]
        if self._kl is not None and found:
            self.settings = replace(self.settings, kl_coef=self._kl.update(sum(found) / len(found), collected.answers))
        weighs = isinstance(self.settings, PolicySettings) and self.settings.kl_coef > 0
        return {"rl/kl_coef": self.settings.kl_coef} if weighs else {}

    def _take(self, engine: Engine, loss: Algorithm, experience: Experience, step: int, role: str) -> Out:
        outs = []
        for number, packed in enumerate(experience.packed()):
            # A router's loss has a gradient where the advantage has none.
            skips = self.skips_zero_advantage and role == "actor" and engine.router_loss is None
            batches, left_out = packed.by_advantage() if skips else (packed.batches, [])
            if dist.most(sum(len(batch.trained_M) for batch in batches)) == 0:
                continue  # no answers: with dynamic sampling, every group of the step was excluded
            out = engine.train_step(batches, loss, step * self.per_step + number, left_out=left_out)
            self._report_skipped(out, batches, experience, step + 1, number, role)
            outs.append(out)
        return outs

    def _report_skipped(
        self, out: dict[str, Tensor], batches: Sequence[Batch], experience: Experience, step: int, number: int, role: str
    ) -> None:
        """If the update was skipped, save its batch and its rows, and log a warning.

        Args:
            number: number of the update in its step.
        Raises:
            UserError: on all ranks, if so many of the role's updates were skipped in a row.
        """
        if not float(out["skipped"]):
            self._skipped[role] = 0
            return
        self._skipped[role] += 1
        folder = self._run.directory / "skipped"
        name = f"step_{step}_{role}_{number + 1}"
        self._keep(batches, folder, f"{name}_rank_{dist.rank()}.safetensors")
        found = f"loss {float(out['loss'])}, gradient norm {float(out['grad_norm'])}"
        rows = [row for of_rank in dist.gathered(_rows(batches, experience)) for row in of_rank]
        self._run.say(tell(f"step {step}", found, f"the {role} was not updated", rows, folder / f"{name}.jsonl"))
        refuse_more(f"step {step}", found, rows, self._skipped[role], self._most_skipped)

    def _keep(self, batches: Sequence[Batch], folder: Path, name: str) -> None:
        """Save the batch of a skipped update. A file that cannot be written is told, because training does not need it."""
        unfinished = folder / f"{name}.{os.urandom(8).hex()}.tmp"  # a new name, so that no link is followed
        try:
            real_folder(folder)
            save_file(_tensors(batches), unfinished)
            os.replace(unfinished, folder / name)
        except (OSError, SafetensorError) as error:
            self._run.say(f"warning: {folder / name} could not be written: {error}")


def _rows(batches: Sequence[Batch], experience: Experience) -> list[dict[str, Any]]:
    """Return the row and the answer of each document of the micro-batches."""
    numbers = [int(number) for batch in batches for number in batch.sample_ids_S[: batch.documents]]
    samples = [experience.samples[number] for number in numbers]
    return [{"place": sample.prompt.where, "prompt": sample.prompt.text[:200], "text": sample.text[:200]} for sample in samples]


def _tensors(batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Return all tensors of the micro-batches by name, such as `0.input_ids_T`."""
    found = [(f"{n}.{f.name}", getattr(batch, f.name)) for n, batch in enumerate(batches) for f in fields(batch)]
    for n, batch in enumerate(batches):
        found += [(f"{n}.prefixes.{name}", value) for name, value in (batch.prefixes._asdict() if batch.prefixes else {}).items()]
    return {name: value.contiguous() for name, value in found if isinstance(value, torch.Tensor)}
