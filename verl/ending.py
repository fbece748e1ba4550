"""The last lines of a run: what came of it, and the commands that go on from there."""

import json
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from verl.config.best import mode_of
from verl.directory import COMMANDS
from verl.models.kind import CLASSIFIER, kind_of
from verl.pace import clock, counted
from verl.run_view import Shown

Metrics = Sequence[Mapping[str, float]]


def ending(run: Shown, metrics: Metrics, seconds: float) -> str:
    """Return the last lines of a run that has done all steps, or has stopped early.

    Args:
        metrics: of all steps, as in metrics.jsonl.
        seconds: that this command took.
    """
    steps = [line for line in metrics if line.get("step", 0) > 0]
    here = f", {run.step - run.start_step:,} of them" if run.start_step else ""
    many = counted(len(steps), "step") if run.step == run.total_steps else f"{run.step:,} of {counted(run.total_steps, 'step')}"
    done = [f"done: {many}{here} in {clock(seconds)}", *_changes(steps)]
    tokens = next((line["train/tokens"] for line in reversed(steps) if "train/tokens" in line), None)
    done += [f"{tokens:,.0f} tokens"] if tokens is not None else []
    lines = [" · ".join(done), *_best(metrics)]
    if run.checkpoint is None:
        return "\n".join([*lines, f"no checkpoint was saved (trainer.save_freq=never); metrics: {run.directory / 'metrics.jsonl'}"])
    return "\n".join([*lines, commands(run)])


def commands(run: Shown, *, is_stopped: bool = False) -> str:
    """Return where the model of a run is, and the commands that come next. The run has a checkpoint.

    Args:
        is_stopped: whether a signal or the time limit has stopped it, so that the same command goes on.
    """
    assert run.checkpoint is not None
    best = run.directory / "best"
    model = run.directory / best.readlink() if best.is_symlink() else run.checkpoint
    what = "the best model" if best.is_symlink() else "the model"
    return "\n".join([f"{what} is in {model}; next:", *(f"  {line}" for line in _next(run, model, is_stopped=is_stopped))])


def _changes(steps: Metrics) -> list[str]:
    """Return how the loss, and in reinforcement learning the reward, have changed from the first step to the last."""
    found = []
    for name, digits in (("rl/reward", 3), ("train/loss", 4)):
        values = [f"{line[name]:.{digits}f}" for line in steps if name in line]
        if values:
            found.append(f"{name} {values[0]} → {values[-1]}" if len(values) > 1 else f"{name} {values[0]}")
    return found


def _best(metrics: Metrics) -> list[str]:
    """Return the step at which the first metric of the validation whose best value is known was best."""
    names = dict.fromkeys(name for line in metrics for name in line if name.startswith("val/"))
    for name in sorted(names, key=lambda name: name == "val/loss"):  # what is wanted, such as exact match, before what is trained
        mode = mode_of(name)
        known = [(line[name], int(line["step"])) for line in metrics if name in line and math.isfinite(line[name])]
        if mode is not None and len(known) > 1:
            value, step = min(known) if mode == "min" else max(known, key=lambda pair: (pair[0], -pair[1]))
            return [f"best {name}: {value:.4g} at step {step:,} of {counted(len(known), 'validation')}"]
    return []


def _next(run: Shown, model: Path, *, is_stopped: bool) -> list[str]:
    """Return commands for the shell: to evaluate, chat, export, and go on."""
    command, directory = COMMANDS.get(type(run.settings).__name__, "verl sft"), run.directory
    name, merged = _word(model), _word(directory.with_name(f"{directory.name}-model"))
    again = _longer(command, run, is_stopped=is_stopped)
    if kind_of(str(model)) == CLASSIFIER:
        tests = _word(run.config["data"].get("val_files") or "<file>")
        return [f"verl eval model_path={name} test_file={tests} output_dir={_word(directory / 'eval')}", again]
    if _is_reward_model(model):
        return [f"verl ppo reward_model.path={name} model.partial_pretrain=<model> data.train_files=<questions>", again]
    tests = run.config["data"].get("val_files")
    tests = _word(tests) if isinstance(tests, str) else "<file>"
    lines = [
        f"verl eval model_path={name} test_file={tests} output_dir={_word(directory / 'eval')}",
        f"verl chat {name}",
        f"verl export {name} {merged}",
    ]
    if command == "verl sft":
        further = merged if (model / "adapter_config.json").is_file() else name  # reinforcement learning starts from a whole model
        lines.append(f"verl ppo model.partial_pretrain={further} data.train_files=<questions>")
    return [*lines, again]


def _longer(command: str, run: Shown, *, is_stopped: bool) -> str:
    """Return the command that trains further, with the same keys."""
    processes = os.environ.get("WORLD_SIZE", "1")
    gpus = f" --gpus {processes}" if processes == os.environ.get("LOCAL_WORLD_SIZE") != "1" else ""
    trainer, again = run.settings.trainer, f"{command}{gpus} --config {_word(run.directory / 'config.yaml')}"
    if is_stopped:
        return again
    again += " rollout.replay=null" * (run.config.get("rollout", {}).get("replay") is not None)
    if run.step < run.total_steps and trainer.patience is not None:
        return f"{again} trainer.patience={2 * trainer.patience}"
    steps = trainer.total_training_steps
    longer = f"trainer.total_epochs={trainer.total_epochs + 1}" if steps is None else f"trainer.total_training_steps={2 * steps}"
    return f"{again} {longer}"


def _word(value: object) -> str:
    return shlex.quote(str(value))


def _is_reward_model(checkpoint: Path) -> bool:
    for name, key, ends in (("config.json", "architectures", "SequenceClassification"), ("adapter_config.json", "task_type", "SEQ_CLS")):
        try:
            found = json.loads((checkpoint / name).read_text(encoding="utf-8")).get(key)
        except (OSError, ValueError, AttributeError):
            continue
        if any(str(one).endswith(ends) for one in (found if isinstance(found, list) else [found])):
            return True
    return False
