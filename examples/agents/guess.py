"""A model learns a game of several turns from an agent that asks a chat endpoint. Offline, on a CPU.

    python examples/agents/guess.py

The agent is guess_agent.py, which knows only the `openai` package. The game, the players of the games for fine-tuning and the rows are
those of examples/environments/guess.py, where the same game is an environment. The script prints the mean reward of new games, before and
after reinforcement learning; a game that is won is worth 1.
"""

import argparse
import runpy
import shutil
from pathlib import Path

import verl
from verl.environments.guess import write_rows
from verl.models.tiny import write_tiny_model

HERE = Path(__file__).parent
GAME = runpy.run_path(str(HERE.parent / "environments" / "guess.py"))


def reinforce(folder: Path, checkpoint: Path | None, steps: int, seed: int) -> verl.TrainResult:
    words = (
        f"data.train_files={folder / 'train.jsonl'} data.val_files={folder / 'test.jsonl'} model.partial_pretrain={checkpoint} "
        f"rollout.serve=true agent.program={HERE / 'guess_agent.py'} reward.name=null data.response_key=null "
        f"trainer.default_local_dir={folder / 'rl'} trainer.total_training_steps={steps} trainer.seed={seed} "
        "rollout.max_new_tokens=80 data.max_prompt_length=40 data.prompts_per_step=16 algorithm.name=grpo "
        "algorithm.keep_reference=false optim.lr=1e-3 optim.lr_scheduler=linear optim.betas=[0.9,0.99] "
        "model.enable_gradient_checkpointing=false"
    )
    return verl.ppo(*words.split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("guess-agent-run"))
    parser.add_argument("--games", type=int, default=4000)
    parser.add_argument("--sft-steps", type=int, default=60)
    parser.add_argument("--rl-steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    shutil.rmtree(asked.folder, ignore_errors=True)
    asked.folder.mkdir(parents=True)
    texts = GAME["write_games"](asked.folder / "games.jsonl", asked.games, asked.seed)
    write_rows(asked.folder / "train.jsonl", 512, asked.seed, GAME["LARGEST"])
    write_rows(asked.folder / "test.jsonl", 100, asked.seed + 1000, GAME["LARGEST"])
    write_tiny_model(asked.folder / "model", texts, seed=asked.seed)
    fine_tuned = GAME["fine_tune"](asked.folder, asked.sft_steps, asked.seed)
    reinforced = reinforce(asked.folder, fine_tuned.checkpoint, asked.rl_steps, asked.seed)
    found = [line["val/reward"] for line in reinforced.metrics if "val/reward" in line]
    print(f"mean reward of a game: {found[0]:.2f} before reinforcement learning, {found[-1]:.2f} after")


if __name__ == "__main__":
    main()
