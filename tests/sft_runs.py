"""Fine-tuning of the small model in `tiny.write_problems_and_model`."""

from pathlib import Path

from runs import as_words, metrics_of

from verl.trainer import fsdp_sft_trainer

STEPS, ROWS_PER_STEP = 20, 6


def words(folder: Path, output: str, **changes: object) -> list[str]:
    keys: dict[str, object] = {
        "data.train_files": folder / "train.jsonl",
        "data.cache_dir": folder / "cache",
        "data.train_batch_size": ROWS_PER_STEP,
        "data.max_length": 256,
        "model.partial_pretrain": folder / "model",
        "trainer.default_local_dir": folder / output,
        "trainer.total_training_steps": STEPS,
        "trainer.save_freq": -1,
        "optim.lr": 1e-3,
    }
    return as_words(keys, changes)


def train(folder: Path, output: str, **changes: object) -> list[dict[str, float]]:
    """Run in this process; the metrics of each step."""
    fsdp_sft_trainer.main(words(folder, output, **changes))
    return metrics_of(folder / output)
