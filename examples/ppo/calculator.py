"""A model learns to use a calculator: fine-tuning on chats with the tool, then multi-turn reinforcement learning. Offline, on a CPU.

    python examples/ppo/calculator.py

The chats are the demo's word problems. Most two-step chats end in a format that the grader does not read, as in data from several
sources. Reinforcement learning has to teach the format and the calculations. The calculator's replies are appended to the sampled tokens
and are not trained. The script prints exact match on problems with other numbers, before and after reinforcement learning.
"""

import argparse
import json
import random
import shutil
from pathlib import Path

import verl
from verl.demo.problems import Problem, make_problems, tool_chat
from verl.models.tiny import write_tiny_model

UNREAD = 0.7  # fraction of two-step chats that end in a format that the grader does not read


def write_rows(path: Path, problems: list[Problem]) -> None:
    """Write rows with `messages` for fine-tuning, and `question` and `answer` for reinforcement learning."""
    chats, draw = [tool_chat(problem) for problem in problems], random.Random(1)
    for problem, chat in zip(problems, chats, strict=True):
        if len(problem.steps) == 2 and draw.random() < UNREAD:
            chat[-1]["content"] = f"The answer is {problem.result}."
    rows = [{**problem.row(), "messages": chat} for problem, chat in zip(problems, chats, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def fine_tune(folder: Path, steps: int) -> verl.TrainResult:
    words = (
        f"data.train_files={folder / 'train.jsonl'} data.messages_key=messages data.cache_dir={folder / 'cache'} "
        f"model.partial_pretrain={folder / 'model'} trainer.default_local_dir={folder / 'sft'} trainer.total_training_steps={steps} "
        "data.train_batch_size=16 data.max_length=256 data.max_tokens_per_micro_batch=4096 model.enable_gradient_checkpointing=false "
        "optim.lr=2e-3 optim.lr_scheduler=linear trainer.save_freq=-1"
    )
    return verl.sft(*words.split())


def reinforce(folder: Path, checkpoint: Path | None, steps: int) -> verl.TrainResult:
    words = (
        f"data.train_files={folder / 'train.jsonl'} data.val_files={folder / 'test.jsonl'} model.partial_pretrain={checkpoint} "
        f"trainer.default_local_dir={folder / 'rl'} trainer.total_training_steps={steps} "
        "rollout.tool=calculator rollout.max_turns=4 rollout.max_new_tokens=96 data.max_prompt_length=64 data.prompts_per_step=16 "
        "rollout.temperature=0.7 algorithm.name=grpo algorithm.keep_reference=false optim.lr=1e-4 optim.betas=[0.9,0.99] "
        "model.enable_gradient_checkpointing=false"
    )
    return verl.ppo(*words.split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("calculator-run"))
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--sft-steps", type=int, default=220)
    parser.add_argument("--rl-steps", type=int, default=20)
    asked = parser.parse_args()
    shutil.rmtree(asked.folder, ignore_errors=True)
    asked.folder.mkdir(parents=True)
    train, test = make_problems(asked.rows, 200)
    write_rows(asked.folder / "train.jsonl", train)
    write_rows(asked.folder / "test.jsonl", test)
    texts = [message["content"] for problem in train for message in tool_chat(problem)] + ["The answer is 0."]
    write_tiny_model(asked.folder / "model", texts)
    fine_tuned = fine_tune(asked.folder, asked.sft_steps)
    reinforced = reinforce(asked.folder, fine_tuned.checkpoint, asked.rl_steps)
    found = [line["val/exact_match"] for line in reinforced.metrics if "val/exact_match" in line]
    print(f"exact match with the calculator: {found[0]:.1%} before reinforcement learning, {found[-1]:.1%} after")


if __name__ == "__main__":
    main()
