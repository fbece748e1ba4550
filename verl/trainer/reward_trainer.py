"""Training on pairs of answers, the better one chosen: a reward model, or, by DPO, the answering model itself.

    python -m verl.trainer.reward_trainer data.train_files=pairs.jsonl model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct
    python -m verl.trainer.reward_trainer algorithm.name=dpo data.train_files=pairs.jsonl model.partial_pretrain=checkpoints/…/global_step_N

The same command under `torchrun` uses several processes. `run` is the whole way; its steps are those of fine-tuning.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from verl import dist
from verl.algorithms import bradley_terry, dpo
from verl.config.load import load_config
from verl.config.pairs import PairsConfig, RewardTrainerConfig
from verl.data.documents import Documents
from verl.data.loader import Loader
from verl.engine import checkpoint
from verl.engine.build import Built, build, build_reward_model
from verl.engine.checkpoint import Position
from verl.engine.contract import Algorithm
from verl.engine.decisions import Decisions, Workload, choose_spread, decide, packing_of_pairs
from verl.engine.engine import Engine
from verl.engine.hardware import Hardware, measure
from verl.engine.outline import Outline
from verl.errors import exit_on_user_error
from verl.run import Run, quiet_libraries
from verl.trainer.inputs import load_data, load_rows, read_tokenizer
from verl.trainer.loop import VALIDATION_ROWS, train_loop
from verl.trainer.resume import find_checkpoint, start_position


def run(config: RewardTrainerConfig) -> Path:
    """Train as the config says.

    Returns:
        the last checkpoint's directory.
    Raises:
        UserError: anything in the config, the data, the model or the checkpoint that is not right.
    """
    device = dist.start(large_pages=config.model.fsdp_config.cpu_offload)
    with Run(config) as this:
        resume_from = find_checkpoint(config.trainer, this)
        outline, hardware = Outline(config.model), measure(device)
        tokenizer = read_tokenizer(config, outline)
        spread = choose_spread(outline, hardware)  # raises before the data is read
        train, validation = load_data(config.data, tokenizer, this)
        loader = build_loader(config.data, train, config.trainer.seed, hardware)
        fresh = Position(0, 0, 0, len(train), loader.rows_per_step, loader.seed, train.fingerprint)
        start = start_position(fresh, resume_from)
        total_steps = config.trainer.total_training_steps or loader.steps_per_epoch * config.trainer.total_epochs
        if resume_from is not None and start.step >= total_steps:
            this.say(f"nothing left to do: {start.step} of {total_steps} steps are done (more with trainer.total_epochs)")
            return resume_from
        this.start_logging(start.step, total_steps)
        workload = Workload.of(train.lengths_N, total_steps, loader.steps_per_epoch, loader.packing)
        decisions = decide(outline, hardware, workload, spread, scalar_head=config.algorithm.name != "dpo")
        built = build_for(config, tokenizer, train, decisions)
        this.say(f"{built.describe()}\n{describe_plan(config, loader, total_steps)}; into {this.directory}")
        algorithm: Algorithm = bradley_terry
        if config.algorithm.name == "dpo":
            # The weights are still those that the run starts from, also where it goes on from a checkpoint: the reference's.
            this.say("reference: the model that this run starts from; computing what it says of all pairs")
            algorithm, engine = dpo.Loss(config.algorithm.beta, config.algorithm.label_smoothing), built.engine
            loader = replace(loader, documents=with_reference(engine, train, loader, steps=min(total_steps, loader.steps_per_epoch)))
            validation = None if validation is None else with_reference(engine, validation, replace(loader, documents=validation))
        if resume_from is not None:
            checkpoint.load(resume_from, built.engine)
        return train_loop(config, algorithm, loader, validation, built, start, total_steps, this) or resume_from or this.directory


def dry_run(config: RewardTrainerConfig) -> None:
    """Print what the run would do. Nothing is written but the cache of tokenized rows, and no weights are read.

    Raises:
        UserError: as `run`.
    """
    device = dist.start()
    quiet_libraries()
    train = load_rows(config.data, "train", config.data.train_max_samples, read_tokenizer(config, Outline(config.model)))
    loader = build_loader(config.data, train, config.trainer.seed, measure(device))
    total_steps = config.trainer.total_training_steps or loader.steps_per_epoch * config.trainer.total_epochs
    if dist.is_main():
        print(f"data.train_files: {train.report}\n{describe_plan(config, loader, total_steps)}", flush=True)


def build_loader(data: PairsConfig, train: Documents, seed: int, hardware: Hardware) -> Loader:
    return Loader(
        documents=train,
        packing=packing_of_pairs(data, hardware),
        rows_per_step=data.train_batch_size or data.micro_batch_size_per_gpu * dist.world_size(),
        seed=seed,
        rank=dist.rank(),
        world_size=dist.world_size(),
        pin=hardware.has_gpu,
    )


def build_for(config: RewardTrainerConfig, tokenizer: PreTrainedTokenizerBase, train: Documents, decisions: Decisions) -> Built:
    """The policy of DPO, or a reward model.

    Raises:
        UserError: no such model, or one that cannot be trained this way.
    """
    options: dict[str, Any] = {"stop_ids": train.stop_ids, "seed": config.trainer.seed}
    if config.algorithm.name == "dpo":
        return build(config.model, config.optim, tokenizer, decisions, **options)
    return build_reward_model(config.model, config.optim, tokenizer, decisions, padding=padding_of(tokenizer, train), **options)


def padding_of(tokenizer: PreTrainedTokenizerBase, train: Documents) -> int | None:
    """The token that may stand for padding beside a reward model: not one that ends documents, or their score would be read before it."""
    ids, _ = train.document(0)
    padding: int | None = tokenizer.pad_token_id
    return None if padding == ids[-1] else padding


def with_reference(engine: Engine, documents: Documents, loader: Loader, *, steps: int | None = None) -> Documents:
    """The documents with the log-probabilities of their trained tokens under the engine's weights of now. Every rank calls it.

    Args:
        loader: of these documents; its micro-batches are those of training, so that the first step's margin is exactly 0.
        steps: of the first epoch, whose rows are needed; None: all rows.
    """
    found: dict[int, np.ndarray] = {}
    if steps is None:
        chunks = (np.arange(first, min(first + VALIDATION_ROWS, len(documents))) for first in range(0, len(documents), VALIDATION_ROWS))
        many = (loader.micro_batches(documents, rows) for rows in chunks)
    else:
        many = (step.micro_batches for step in loader.steps(0, steps))
    for batches in many:
        for batch, out in zip(batches, engine.score(batches), strict=True):
            numbers = batch.sample_ids_S[: batch.documents].tolist()
            ends = np.cumsum(documents.trained_N[numbers])
            found |= dict(zip(numbers, np.split(out.logprob_M.float().cpu().numpy(), ends), strict=False))
    everywhere = {number: values for of_rank in dist.gathered(found) for number, values in of_rank.items()}
    missing = np.zeros(0, dtype=np.float32)  # of rows that no step takes
    return replace(documents, values={"ref_logprob_M": [everywhere.get(number, missing) for number in range(len(documents.lengths_N))]})


def describe_plan(config: RewardTrainerConfig, loader: Loader, total_steps: int) -> str:
    what = "a policy by DPO" if config.algorithm.name == "dpo" else "a reward model"
    many = f"{loader.world_size} processes" if loader.world_size > 1 else "1 process"
    return (
        f"plan: {what}, {total_steps:,} steps ({loader.steps_per_epoch:,} an epoch) of {loader.rows_per_step} pairs, "
        f"in micro-batches of up to {loader.packing.token_budget:,} packed tokens on each of {many}"
    )


def main(argv: list[str]) -> None:
    try:
        config = load_config(RewardTrainerConfig, argv)
        dry_run(config) if config.trainer.dry_run else run(config)
    finally:
        dist.stop()


if __name__ == "__main__":
    exit_on_user_error(main, sys.argv[1:])
