"""A model learns a game of several turns, to find a hidden number: fine-tuning on weak players' games, then GRPO. Offline, on a CPU.

    python examples/environments/guess.py

The numbers are from 1 to 7, and there are four turns. The players of the games for fine-tuning guess at random, and three times out of four
they forget what they were told. Reinforcement learning in the environment `guess` rewards games that are won. The script prints the share
of new games that the model wins, before and after reinforcement learning.
"""

import argparse
import json
import random
import shutil
from pathlib import Path

import verl
from verl.environments.guess import HIGHER, LOWER, QUESTION, write_rows
from verl.models.tiny import write_tiny_model

LARGEST, TURNS = 7, 4
FORGETS = 0.75  # probability that a player's guess ignores what it was told


def played(draw: random.Random) -> list[dict[str, str]]:
    """The chat of a weak player's game, which ends with a guess."""
    secret, low, high = draw.randint(1, LARGEST), 1, LARGEST
    chat = [{"role": "user", "content": QUESTION.format(largest=LARGEST)}]
    for _ in range(TURNS):
        guess = draw.randint(1, LARGEST) if draw.random() < FORGETS else draw.randint(low, high)
        chat.append({"role": "assistant", "content": str(guess)})
        if guess == secret:
            break
        chat.append({"role": "user", "content": HIGHER if guess < secret else LOWER})
        low, high = (max(low, guess + 1), high) if guess < secret else (low, min(high, guess - 1))
    return chat if chat[-1]["role"] == "assistant" else chat[:-1]


def write_games(path: Path, games: int, seed: int) -> list[str]:
    """Write rows with `messages` for fine-tuning. Return all texts."""
    draw = random.Random(seed)
    chats = [played(draw) for _ in range(games)]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    return [message["content"] for chat in chats for message in chat]


def fine_tune(folder: Path, steps: int, seed: int) -> verl.TrainResult:
    words = (
        f"data.train_files={folder / 'games.jsonl'} data.messages_key=messages data.cache_dir={folder / 'cache'} "
        f"model.partial_pretrain={folder / 'model'} trainer.default_local_dir={folder / 'sft'} trainer.total_training_steps={steps} "
        f"data.train_batch_size=32 data.max_length=128 data.max_tokens_per_micro_batch=4096 trainer.seed={seed} "
        "model.enable_gradient_checkpointing=false optim.lr=2e-3 optim.lr_scheduler=linear trainer.save_freq=-1"
    )
    return verl.sft(*words.split())


def reinforce(folder: Path, checkpoint: Path | None, steps: int, seed: int) -> verl.TrainResult:
    words = (
        f"data.train_files={folder / 'train.jsonl'} data.val_files={folder / 'test.jsonl'} model.partial_pretrain={checkpoint} "
        f"environment.name=guess environment.largest={LARGEST} environment.max_turns={TURNS} reward.name=null data.response_key=null "
        f"trainer.default_local_dir={folder / 'rl'} trainer.total_training_steps={steps} trainer.seed={seed} "
        "rollout.max_new_tokens=80 data.max_prompt_length=40 data.prompts_per_step=64 algorithm.name=grpo "
        "algorithm.keep_reference=false optim.lr=1e-3 optim.lr_scheduler=linear optim.betas=[0.9,0.99] "
        "model.enable_gradient_checkpointing=false"
    )
    return verl.ppo(*words.split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("guess-run"))
    parser.add_argument("--games", type=int, default=4000)
    parser.add_argument("--sft-steps", type=int, default=80)
    parser.add_argument("--rl-steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    shutil.rmtree(asked.folder, ignore_errors=True)
    asked.folder.mkdir(parents=True)
    texts = write_games(asked.folder / "games.jsonl", asked.games, asked.seed)
    write_rows(asked.folder / "train.jsonl", 2048, asked.seed, LARGEST)
    write_rows(asked.folder / "test.jsonl", 100, asked.seed + 1000, LARGEST)
    write_tiny_model(asked.folder / "model", texts, seed=asked.seed)
    fine_tuned = fine_tune(asked.folder, asked.sft_steps, asked.seed)
    reinforced = reinforce(asked.folder, fine_tuned.checkpoint, asked.rl_steps, asked.seed)
    found = [line["val/solved"] for line in reinforced.metrics if "val/solved" in line]
    print(f"games won: {found[0]:.1%} before reinforcement learning, {found[-1]:.1%} after")


if __name__ == "__main__":
    main()
