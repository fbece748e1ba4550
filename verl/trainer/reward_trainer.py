"""Training on pairs of answers, the better one chosen: a reward model, or, by DPO, the answering model itself.

    python -m verl.trainer.reward_trainer data.train_files=pairs.jsonl model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct
    python -m verl.trainer.reward_trainer algorithm.name=dpo data.train_files=pairs.jsonl model.partial_pretrain=checkpoints/…/global_step_N

The same command under `torchrun` uses several processes. `train` is the whole way; its steps are those of fine-tuning.
"""

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from verl import dist
from verl.algorithms import bradley_terry, dpo
from verl.config.load import load_config
from verl.config.pairs import PairsConfig, RewardTrainerConfig
from verl.data.documents import Documents
from verl.data.loader import Loader, Packing
from verl.data.pack import TILE
from verl.data.pairs import PairColumns
from verl.engine import checkpoint
from verl.engine.build import Built, build, build_reward_model, choose_spread
from verl.engine.contract import Algorithm
from verl.engine.engine import Engine
from verl.errors import exit_on_user_error
from verl.models.attention import flash
from verl.run import Run, TrainResult
from verl.session import session
from verl.trainer.inputs import load_data, load_rows, read_tokenizer
from verl.trainer.loop import VALIDATION_ROWS, train_loop
from verl.trainer.resume import begin, find_checkpoint


@session()
def train(config: RewardTrainerConfig) -> TrainResult:
    """Train as the config says.

    Raises:
        UserError: anything in the config, the data, the model or the checkpoint that is not right.
        Stopped: a signal ended the run after a step.
    """
    device = dist.start(large_pages=config.model.fsdp_config.cpu_offload)
    with Run(config) as run:
        run.checkpoint = find_checkpoint(config.trainer, run)
        tokenizer = read_tokenizer(config.model, config.data.chat_template)
        choose_spread(config.model, device)  # here for its errors, before the data is read
        pairs, validation = load_data(config.data, PairColumns.of(config.data), tokenizer, run)
        loader = build_loader(config.data, pairs, config.trainer.seed, pin=device.type == "cuda")
        total_steps = loader.total_steps(config.trainer)
        start = begin(config.trainer, run, pairs, loader.rows_per_step, total_steps)
        if start is None:
            return run.result()
        built = build_for(config, tokenizer, pairs, loader, total_steps, device)
        run.say(f"{built.describe()}\nplan: {describe(config, loader, total_steps)}; into {run.directory}")
        algorithm: Algorithm = bradley_terry
        if config.algorithm.name == "dpo":
            # The weights are still those that the run starts from, also where it goes on from a checkpoint: the reference's.
            run.say("reference: the model that this run starts from; computing what it says of all pairs")
            algorithm, engine = dpo.Loss(config.algorithm.beta, config.algorithm.label_smoothing), built.engine
            loader = replace(loader, documents=with_reference(engine, pairs, loader, steps=min(total_steps, loader.steps_per_epoch)))
            validation = None if validation is None else with_reference(engine, validation, replace(loader, documents=validation))
        if run.checkpoint is not None:
            checkpoint.load(run.checkpoint, built.engine)
        train_loop(config.trainer, algorithm, loader, validation, built, start, run)
        return run.result()


@session()
def dry_run(config: RewardTrainerConfig) -> None:
    """Print what the run would do. Nothing is written but the cache of tokenized rows, and no weights are read.

    Raises:
        UserError: as `train`.
    """
    dist.start()
    pairs = load_rows(config.data, PairColumns.of(config.data), "train", read_tokenizer(config.model, config.data.chat_template))
    loader = build_loader(config.data, pairs, config.trainer.seed, pin=False)
    if dist.is_main():
        print(f"data.train_files: {pairs.report}\nplan: {describe(config, loader, loader.total_steps(config.trainer))}", flush=True)


def describe(config: RewardTrainerConfig, loader: Loader, total_steps: int) -> str:
    """What is trained, in which steps."""
    return f"{'a policy by DPO' if config.algorithm.name == 'dpo' else 'a reward model'}, {loader.describe(total_steps)}"


def build_loader(data: PairsConfig, train: Documents, seed: int, *, pin: bool) -> Loader:
    pairs = data.micro_batch_size_per_gpu
    budget = data.max_tokens_per_micro_batch or pairs * 2 * data.max_length
    return Loader(
        documents=train,
        packing=Packing(pairs, budget, multiple_of_tokens=TILE if pin else 1),
        rows_per_step=data.train_batch_size or pairs * dist.world_size(),
        seed=seed,
        rank=dist.rank(),
        world_size=dist.world_size(),
        pin=pin,
    )


def build_for(
    config: RewardTrainerConfig,
    tokenizer: PreTrainedTokenizerBase,
    train: Documents,
    loader: Loader,
    total_steps: int,
    device: torch.device,
) -> Built:
    """The policy of DPO, or a reward model.

    Raises:
        UserError: no such model, or one that cannot be trained this way.
    """
    tokens = int(train.lengths_N.sum())
    options: dict[str, Any] = {
        "stop_ids": train.stop_ids,
        "total_steps": total_steps,
        "total_tokens": tokens * total_steps // loader.steps_per_epoch,
        "documents": flash.Documents(float((train.lengths_N.astype(float) ** 2).sum() / tokens), loader.packing.token_budget or 0),
        "device": device,
        "seed": config.trainer.seed,
    }
    if config.algorithm.name == "dpo":
        return build(config.model, config.optim, tokenizer, **options)
    return build_reward_model(config.model, config.optim, tokenizer, padding=padding_of(tokenizer, train), **options)


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


def main(argv: list[str]) -> None:
    config = load_config(RewardTrainerConfig, argv)
    dry_run(config) if config.trainer.dry_run else train(config)


if __name__ == "__main__":
    exit_on_user_error(main, sys.argv[1:])
