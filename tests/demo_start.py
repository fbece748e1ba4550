"""The demo's problems and an early checkpoint of its model, from which reinforcement learning starts."""

import json
import shutil
import time
from pathlib import Path

from runs import metrics_of

from verl.config.commands import EvalConfig
from verl.demo.problems import write_problems
from verl.demo.run import RECIPE, RL_RECIPE
from verl.eval.sft_evaluator import evaluate
from verl.models.tiny import write_tiny_model
from verl.trainer import fsdp_sft_trainer, ppo_trainer

STEPS, EVERY, FIRST = 1200, 50, 300  # of fine-tuning: all, between two checkpoints, and the first that is tried
# The rate stays where it is: from where it had fallen, reinforcement learning gained less, the more so the later (benchmarks/README.md).
FINE_TUNING = [*RECIPE, "optim.lr_scheduler=constant", f"trainer.total_training_steps={STEPS}", f"trainer.save_freq={EVERY}"]
LOWEST, HIGHEST, BEYOND = 0.2, 0.45, 0.6  # of the start, and what ends the search
# As the demo's, half as fast again, and as long as four minutes allow: PPO trains on all answers, and has a critic.
FASTER = [*RL_RECIPE, "optim.lr=3e-4", "trainer.logger=[]"]
GRPO = [*FASTER, "trainer.total_training_steps=100"]
PPO = [*FASTER, "algorithm.name=ppo", "algorithm.lam=0.95", "critic.optim.lr=1e-3", "trainer.total_training_steps=60"]
FAR_TOO_HIGH = [*FASTER, "optim.lr=1e-2", "trainer.total_training_steps=10"]


class Start:
    """The demo's problems, and its model as it is early in fine-tuning.

    Attributes:
        exact_match: greedy, on the held-out problems.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        train, _ = write_problems(folder / "train.jsonl", folder / "test.jsonl", 24_000, 400, seed)
        write_tiny_model(folder / "model", (text for problem in train for text in (problem.question, problem.answer)), seed=seed)
        words = [f"data.train_files={folder}/train.jsonl", f"data.cache_dir={folder}/cache", f"model.partial_pretrain={folder}/model"]
        words += ["trainer.max_ckpt_to_keep=null", f"trainer.default_local_dir={folder}/sft", f"trainer.seed={seed}"]
        fsdp_sft_trainer.main([*words, *FINE_TUNING])
        self.checkpoint, self.exact_match = self._find()
        for other in {*(folder / "sft").glob("global_step_*")} - {self.checkpoint}:
            shutil.rmtree(other)
        print(f"seed {seed}: {self.checkpoint.name}, exact match {self.exact_match:.4f}")
        assert LOWEST <= self.exact_match <= HIGHEST

    def after(self, output: str, words: list[str]) -> float:
        """Exact match after reinforcement learning."""
        directory, wall, processor = self.folder / output, time.perf_counter(), time.process_time()
        files = [f"data.train_files={self.folder}/train.jsonl", f"model.partial_pretrain={self.checkpoint}"]
        ppo_trainer.main([*files, *words, f"trainer.default_local_dir={directory}", f"trainer.seed={self.seed}"])
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        steps = metrics_of(directory)[-1]["step"]
        found = self.measure(directory / f"global_step_{steps}")
        print(f"seed {self.seed}: {output} {self.exact_match:.4f} -> {found:.4f}, {steps} steps, {wall:.0f} s, {processor:.0f} CPU s")
        return found

    def _find(self) -> tuple[Path, float]:
        """The last checkpoint that answers at most HIGHEST, and what it answers; the search ends where one answers more than BEYOND."""
        start, exact_match = self.folder / "model", 0.0
        for step in range(FIRST, STEPS + 1, EVERY):
            checkpoint = self.folder / "sft" / f"global_step_{step}"
            found = self.measure(checkpoint)
            if found > BEYOND:
                break
            if found <= HIGHEST:
                start, exact_match = checkpoint, found
        return start, exact_match

    def measure(self, checkpoint: Path) -> float:
        """Greedy exact match of a checkpoint on the held-out problems."""
        output = self.folder / "evaluation"
        config = EvalConfig(
            model_path=str(checkpoint), test_file=str(self.folder / "test.jsonl"), output_dir=str(output), max_new_tokens=64, overwrite=True
        )
        evaluate(config)
        found: float = json.loads((output / "results.json").read_text())["exact_match"]
        return found
