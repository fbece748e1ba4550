"""A model learns to cross Gymnasium's frozen lake: fine-tuning on aimless walks, then GRPO. Offline, on a CPU.

    pip install "verl[gymnasium]"
    python examples/environments/frozen_lake.py

The lake has 4 × 4 fields, four of which are holes. The walks for fine-tuning go right and down more often than back, and most end in a
hole. Reinforcement learning in the environment `gymnasium` rewards who reaches the other side. The script prints the share of walks that
do, in the first step and in the last.
"""

import argparse
import json
import random
import shutil
from pathlib import Path

import verl
from verl.environments.gymnasium import Environment, Settings
from verl.models.tiny import write_tiny_model

ACTIONS = ["left", "down", "right", "up"]
OFTEN = [1, 3, 3, 1]  # how often a walk for fine-tuning takes each
LAKE = Settings(game="FrozenLake-v1", arguments={"is_slippery": False}, actions=ACTIONS)
TURNS = 12


def walked(draw: random.Random) -> list[dict[str, str]]:
    """The chat of an aimless walk, which ends with an action."""
    lake = Environment(LAKE)
    chat = list(lake.reset({}, 1).messages)
    for _ in range(TURNS):
        chat.append({"role": "assistant", "content": draw.choices(ACTIONS, OFTEN)[0]})
        step = lake.step(chat[-1])
        if step.done:
            break
        chat += step.messages
    return chat if chat[-1]["role"] == "assistant" else chat[:-1]


def write_walks(path: Path, walks: int, seed: int) -> list[str]:
    """Write rows with `messages` for fine-tuning. Return all texts."""
    draw = random.Random(seed)
    chats = [walked(draw) for _ in range(walks)]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    return [message["content"] for chat in chats for message in chat]


def write_rows(path: Path, rows: int) -> None:
    """Write rows for reinforcement learning: of each, only the number counts."""
    path.write_text("".join(json.dumps({"question": f"Walk {number}."}) + "\n" for number in range(rows)), encoding="utf-8")


def fine_tune(folder: Path, steps: int, seed: int) -> verl.TrainResult:
    words = (
        f"data.train_files={folder / 'walks.jsonl'} data.messages_key=messages data.cache_dir={folder / 'cache'} "
        f"model.partial_pretrain={folder / 'model'} trainer.default_local_dir={folder / 'sft'} trainer.total_training_steps={steps} "
        f"data.train_batch_size=32 data.max_length=600 data.max_tokens_per_micro_batch=8192 trainer.seed={seed} "
        "model.enable_gradient_checkpointing=false optim.lr=2e-3 optim.lr_scheduler=linear trainer.save_freq=-1"
    )
    return verl.sft(*words.split())


def reinforce(folder: Path, checkpoint: Path | None, steps: int, seed: int) -> verl.TrainResult:
    words = (
        f"data.train_files={folder / 'train.jsonl'} model.partial_pretrain={checkpoint} "
        f"environment.name=gymnasium environment.game={LAKE.game} environment.actions=[{','.join(ACTIONS)}] "
        f"environment.max_turns={TURNS} reward.name=null data.response_key=null "
        f"trainer.default_local_dir={folder / 'rl'} trainer.total_training_steps={steps} trainer.seed={seed} "
        "rollout.max_new_tokens=512 data.max_prompt_length=80 data.prompts_per_step=8 algorithm.name=grpo "
        "algorithm.keep_reference=false optim.lr=3e-4 optim.betas=[0.9,0.99] model.enable_gradient_checkpointing=false"
    )
    return verl.ppo(*words.split(), "environment.arguments={is_slippery: false}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("frozen-lake-run"))
    parser.add_argument("--walks", type=int, default=2000)
    parser.add_argument("--sft-steps", type=int, default=30)
    parser.add_argument("--rl-steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    shutil.rmtree(asked.folder, ignore_errors=True)
    asked.folder.mkdir(parents=True)
    texts = write_walks(asked.folder / "walks.jsonl", asked.walks, asked.seed)
    write_rows(asked.folder / "train.jsonl", 512)
    write_tiny_model(asked.folder / "model", texts, seed=asked.seed)
    fine_tuned = fine_tune(asked.folder, asked.sft_steps, asked.seed)
    reinforced = reinforce(asked.folder, fine_tuned.checkpoint, asked.rl_steps, asked.seed)
    found = [line["environment/reward_mean"] for line in reinforced.metrics]
    print(f"walks that reach the other side: {found[0]:.1%} in the first step of reinforcement learning, {found[-1]:.1%} in the last")


if __name__ == "__main__":
    main()
