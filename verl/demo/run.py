"""The demo: word problems, a small untrained model, fine-tuning, reinforcement learning and evaluation; offline, minutes on a CPU.

    python -m verl.demo.run

It prints and runs the same commands that users run on their own files. Read `demo` first.
"""

import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from verl import cores
from verl.config.commands import DemoConfig, EvalConfig
from verl.config.load import load_config
from verl.config.ppo import PPOConfig
from verl.config.sft import SFTConfig
from verl.demo.problems import Problem, write_problems
from verl.durable import replace_text
from verl.errors import exit_on_user_error
from verl.eval import sft_evaluator
from verl.lock import held
from verl.models.tiny import write_tiny_model
from verl.progress import quiet_libraries
from verl.trainer import fsdp_sft_trainer, ppo_trainer

FOLDER = Path("demo-run")
TRAIN, TEST, MODEL = FOLDER / "train.jsonl", FOLDER / "test.jsonl", FOLDER / "model"
CHECKPOINTS, BEFORE, AFTER = FOLDER / "checkpoints", FOLDER / "eval-before", FOLDER / "eval-after"
RL_CHECKPOINTS, RL_BEFORE, RL_AFTER = FOLDER / "rl-checkpoints", FOLDER / "eval-before-rl", FOLDER / "eval-after-rl"
# A small untrained model needs many small steps. A pretrained model needs a learning rate about a hundred times lower.
RECIPE = (
    "data.train_batch_size=16 data.max_length=128 data.max_tokens_per_micro_batch=2048 model.enable_gradient_checkpointing=false "
    "optim.lr=2e-3 optim.lr_scheduler=linear optim.warmup_steps_ratio=0.05 trainer.logger=verl.demo.milestones"
).split()
ROWS_PER_STEP, SFT_CHECKPOINTS = 16, 30
EARLY_EXACT_MATCH = 0.3  # reinforcement learning starts from the first checkpoint this good, which still has much to learn
RL_RECIPE = (
    "data.max_prompt_length=96 data.prompts_per_step=32 rollout.samples_per_prompt=8 rollout.max_new_tokens=64 rollout.max_sequences=256 "
    "algorithm.name=grpo algorithm.keep_reference=false reward.name=gsm8k model.enable_gradient_checkpointing=false "
    "optim.lr=2e-4 optim.betas=[0.9,0.99] trainer.save_freq=-1 trainer.logger=verl.demo.milestones"
).split()

console = Console(markup=False, highlight=False, soft_wrap=True)


def demo(config: DemoConfig) -> dict[str, Any]:
    """Run all steps, and return the content of summary.json. Raises UserError: another demo runs in this folder."""
    FOLDER.mkdir(exist_ok=True)
    cores.take(say)
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # the same for all steps, and for their processes
    with held(FOLDER, "demo"):  # it deletes the output of an earlier one
        return all_steps(config)


def all_steps(config: DemoConfig) -> dict[str, Any]:
    since = time.perf_counter()
    title("1. Word problems")
    train = make_problems(config)
    title("2. A small model with random weights")
    make_model(train, config.seed)
    title("3. Before: the model is untrained")
    before = evaluate(MODEL, BEFORE)
    title("4. Fine-tuning")
    checkpoint = fine_tune(config)
    title("5. After: problems that were not in the training data")
    after = evaluate(checkpoint, AFTER)
    title("6. Reinforcement learning, from an early checkpoint that solves some of them")
    early, before_rl = find_early(checkpoint)
    rl_checkpoint = reinforce(early, config)
    after_rl = evaluate(rl_checkpoint, RL_AFTER)
    summary = {
        "exact_match_before": before["exact_match"],
        "exact_match_after_sft": after["exact_match"],
        "exact_match_before_rl": before_rl["exact_match"],
        "exact_match_after_rl": after_rl["exact_match"],
        "seconds": round(time.perf_counter() - since, 1),
        "checkpoint": str(checkpoint),
        "early_checkpoint": str(early),
        "rl_checkpoint": str(rl_checkpoint),
        "rl_steps": config.rl_steps,
        "test_file": str(TEST),
        "train_file": str(TRAIN),
        "model": str(MODEL),
        "train_rows": config.train_rows,
        "test_rows": config.test_rows,
        "seed": config.seed,
        **training(),
    }
    replace_text(FOLDER / "summary.json", json.dumps(summary, indent=2) + "\n")
    title("What happened")
    show_outcome(summary)
    return summary


def make_problems(config: DemoConfig) -> list[Problem]:
    """Delete the output of an earlier demo, and write train.jsonl and test.jsonl. Return the training problems."""
    for folder in (MODEL, CHECKPOINTS, RL_CHECKPOINTS, BEFORE, AFTER, RL_BEFORE, RL_AFTER):
        shutil.rmtree(folder, ignore_errors=True)
    train, test = write_problems(TRAIN, TEST, config.train_rows, config.test_rows, config.seed)
    say(f"{len(train):,} in {TRAIN}, {len(test):,} in {TEST}; no pair of numbers is in both\n")
    say(f"{train[0].question}\n{train[0].answer}")
    return train


def make_model(train: list[Problem], seed: int) -> None:
    """Write a small model with random weights, and a tokenizer trained on the problems."""
    parameters = write_tiny_model(MODEL, (text for problem in train for text in (problem.question, problem.answer)), seed=seed)
    say(f"{parameters:,} parameters of the Qwen2 architecture, a tokenizer with Qwen's chat format: {MODEL}")


def fine_tune(config: DemoConfig) -> Path:
    """Run the SFT trainer, and return the last checkpoint."""
    words = [
        f"data.train_files={TRAIN}",
        f"data.cache_dir={FOLDER / 'cache'}",
        f"model.partial_pretrain={MODEL}",
        f"trainer.default_local_dir={CHECKPOINTS}",
        f"trainer.save_freq={max(1, config.train_rows // ROWS_PER_STEP // SFT_CHECKPOINTS)}",
        f"trainer.seed={config.seed}",
        *RECIPE,
    ]
    show_command("verl.trainer.fsdp_sft_trainer", words)
    last = fsdp_sft_trainer.train(load_config(SFTConfig, words)).checkpoint
    assert last is not None
    return last


def find_early(last: Path) -> tuple[Path, dict[str, Any]]:
    """Find the first checkpoint that reaches EARLY_EXACT_MATCH, or else the last but one. Delete all others except `last`.

    Returns:
        the checkpoint and its results.
    """
    saved = sorted(CHECKPOINTS.glob("global_step_*"), key=lambda path: int(path.name.rpartition("_")[2]))
    earlier = [path for path in saved if path != last] or [last]
    early, results = earlier[0], {}
    for early in earlier[len(earlier) // 3 :]:  # the first third solves almost nothing
        results = evaluate(early, RL_BEFORE)
        if results["exact_match"] >= EARLY_EXACT_MATCH:
            break
    for path in {*saved} - {early, last}:
        shutil.rmtree(path)
    return early, results


def reinforce(checkpoint: Path, config: DemoConfig) -> Path:
    """Continue from a checkpoint with GRPO, which makes correct answers more likely. Return the last checkpoint."""
    words = [
        f"data.train_files={TRAIN}",
        f"model.partial_pretrain={checkpoint}",
        f"trainer.default_local_dir={RL_CHECKPOINTS}",
        f"trainer.total_training_steps={config.rl_steps}",
        f"trainer.seed={config.seed}",
        *RL_RECIPE,
    ]
    show_command("verl.trainer.ppo_trainer", words)
    last = ppo_trainer.train(load_config(PPOConfig, words)).checkpoint
    assert last is not None
    return last


def evaluate(model: Path, output_dir: Path) -> dict[str, Any]:
    """Run the evaluator on the test problems, and return the content of results.json."""
    words = [
        f"model_path={model}",
        f"test_file={TEST}",
        f"output_dir={output_dir}",
        "max_new_tokens=64",
        "batch_size=100",
        "overwrite=true",
    ]
    show_command("verl.eval.sft_evaluator", words)
    return sft_evaluator.evaluate(load_config(EvalConfig, words))


def training() -> dict[str, float]:
    """Return the number of steps, and the losses of the first and the last step."""
    lines = (CHECKPOINTS / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    return {"steps": last["step"], "loss_first_step": first["train/loss"], "loss_last_step": last["train/loss"]}


def show_outcome(summary: dict[str, Any]) -> None:
    """Print one problem before and after, the results, the files, and the commands for the user's own data."""
    before, after = (predictions(folder) for folder in (BEFORE, AFTER))
    shown = next((number for number, prediction in enumerate(after) if prediction["correct"]), 0)
    say(f"Question: {after[shown]['prompt']}")
    say(f"Before:   {printable(before[shown]['response'])[:100]} …")
    say(f"After:    {after[shown]['response']}".replace("\n", "\n          "))
    say(
        f"\nexact match {summary['exact_match_before']:.1%} before, {summary['exact_match_after_sft']:.1%} after; "
        f"loss {summary['loss_first_step']:.2f} to {summary['loss_last_step']:.2f}\n"
        f"from the early checkpoint: {summary['exact_match_before_rl']:.1%} before, {summary['exact_match_after_rl']:.1%} after "
        f"{summary['rl_steps']} steps of GRPO; {summary['seconds']:.0f} seconds in all\n"
    )
    for path, content in (
        (TRAIN, "problems to train on"),
        (TEST, "problems to answer"),
        (MODEL, "the model with random weights"),
        (CHECKPOINTS, "metrics.jsonl, train.log, config.yaml and the checkpoint"),
        (summary["checkpoint"], "the fine-tuned model: a plain Hugging Face directory"),
        (BEFORE, "results.json and predictions.jsonl before"),
        (AFTER, "results.json and predictions.jsonl after"),
        (summary["rl_checkpoint"], "the early checkpoint after GRPO"),
        (RL_CHECKPOINTS / "rollouts", "the answers of each step and their rewards"),
        (FOLDER / "summary.json", "these numbers"),
    ):
        say(f"{path!s:<44} {content}")
    title("The same on your data")
    say(OWN_DATA.format(checkpoint=summary["checkpoint"]))


OWN_DATA = """\
Chat with the model that you have just trained:
  verl chat {checkpoint}

Fine-tune a pretrained model on your questions and answers, one per line ({{"question": …, "answer": …}}), on the GPU if there is one:
  verl sft data.train_files=train.jsonl model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct trainer.default_local_dir=checkpoints/mine
  verl eval model_path=checkpoints/mine/global_step_N test_file=test.jsonl output_dir=checkpoints/mine/eval

Continue from your checkpoint with reinforcement learning:
  verl ppo data.train_files=train.jsonl model.partial_pretrain=checkpoints/mine/global_step_N reward.name=gsm8k optim.lr=1e-6 \\
    trainer.default_local_dir=checkpoints/mine-grpo

Use all four GPUs of a machine:
  verl sft --gpus 4 data.train_files=train.jsonl model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct \\
    trainer.default_local_dir=checkpoints/mine"""


def predictions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def printable(text: str) -> str:
    """Return the text in one line, without characters that a terminal cannot show."""
    return "".join(c if c.isprintable() and c != "\N{REPLACEMENT CHARACTER}" else "·" for c in text)


def show_command(module: str, words: list[str]) -> None:
    say(f"$ python -m {module} {shlex.join(words)}")


def title(text: str) -> None:
    console.print()
    console.rule(text, align="left")


def say(text: str) -> None:
    console.print(text)


def main(argv: list[str]) -> None:
    config = load_config(DemoConfig, argv)
    with quiet_libraries():
        demo(config)


if __name__ == "__main__":
    exit_on_user_error(main, sys.argv[1:])
