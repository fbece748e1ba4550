"""Supervised fine-tuning: from a file of questions and answers to a Hugging Face directory.

    python -m verl.trainer.fsdp_sft_trainer data.train_files=train.jsonl model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct

The same command under `torchrun` uses several processes. `train` and `train_loop` are the whole way; read them first.
"""

import sys
from pathlib import Path

import torch

from verl import dist
from verl.algorithms import sft
from verl.config.load import load_config
from verl.config.sft import DataConfig, SFTConfig
from verl.data.documents import Documents
from verl.data.loader import Loader, Packing
from verl.data.pack import TILE
from verl.engine import checkpoint
from verl.engine.build import build, choose_spread
from verl.engine.checkpoint import Position
from verl.errors import exit_on_user_error
from verl.models.attention import flash
from verl.models.prompt_format import system_prompts
from verl.plan.memory import GIB
from verl.plan.plan import make_plan
from verl.plan.report import check_room, describe
from verl.run import Run, quiet_libraries
from verl.trainer.inputs import load_data, load_rows, read_tokenizer
from verl.trainer.loop import train_loop
from verl.trainer.resume import find_checkpoint, start_position


def train(config: SFTConfig) -> Path:
    """Train as the config says.

    Returns:
        the last checkpoint's directory.
    Raises:
        UserError: anything in the config, the data, the model or the checkpoint that is not right.
    """
    device = dist.start(large_pages=config.model.fsdp_config.cpu_offload)
    dist.share_micro_batches(config.model.context_parallel_size)
    with Run(config) as run:
        resume_from = find_checkpoint(config.trainer, run)
        model = config.model
        tokenizer = read_tokenizer(config)
        choose_spread(model, device)  # here for its errors, before the data is read
        train, validation = load_data(config.data, tokenizer, run)
        loader = build_loader(config.data, train, config.trainer.seed, pin=device.type == "cuda")
        fresh = Position(0, 0, 0, len(train), loader.rows_per_step, loader.seed, train.fingerprint)
        start = start_position(fresh, resume_from)
        total_steps = config.trainer.total_training_steps or loader.steps_per_epoch * config.trainer.total_epochs
        if resume_from is not None and start.step >= total_steps:
            run.say(f"nothing left to do: {start.step} of {total_steps} steps are done (more with trainer.total_epochs)")
            return resume_from
        run.start_logging(start.step, total_steps)
        warn_of_memory(config, train, device, run)
        tokens = int(train.lengths_N.sum())
        built = build(
            model,
            config.optim,
            tokenizer,
            stop_ids=train.stop_ids,
            system_prompts=system_prompts(config.data),
            total_steps=total_steps,
            total_tokens=tokens * total_steps // loader.steps_per_epoch,
            documents=flash.Documents(float((train.lengths_N.astype(float) ** 2).sum() / tokens), loader.packing.token_budget or 0),
            device=device,
            seed=config.trainer.seed,
        )
        run.say(f"{built.describe()}\n{describe_plan(loader, total_steps)}; into {run.directory}")
        if resume_from is not None:
            checkpoint.load(resume_from, built.engine)
        return train_loop(config, sft, loader, validation, built, start, total_steps, run) or resume_from or run.directory


def dry_run(config: SFTConfig, gpus: int | None = None) -> None:
    """Print what the run would take. Nothing is written but the cache of tokenized rows, and no weights are read.

    Args:
        gpus: of the run, which need not be here; None: as many as there are processes.
    Raises:
        UserError: as `train`.
    """
    device = dist.start()
    quiet_libraries()
    train = load_rows(config.data, "train", config.data.train_max_samples, read_tokenizer(config))
    plan = make_plan(config, train, gpus=gpus or dist.world_size(), gpu_gib=memory_of(device))
    if dist.is_main():
        print(f"data.train_files: {train.report}\n{describe(plan, config, train)}", flush=True)


def warn_of_memory(config: SFTConfig, train: Documents, device: torch.device, run: Run) -> None:
    """Say it before anything is loaded if the GPU is likely to be too small.

    Raises:
        UserError: on all ranks: it is too small for certain.
    """
    gpu_gib = memory_of(device)
    if gpu_gib is not None:
        plan = make_plan(config, train, gpus=dist.world_size(), gpu_gib=gpu_gib)
        dist.together(lambda: say_if(check_room(plan, config, train), run))


def say_if(text: str | None, run: Run) -> None:
    if text is not None:
        run.say(text)


def memory_of(device: torch.device) -> float | None:
    """GiB of a GPU."""
    return torch.cuda.get_device_properties(device).total_memory / GIB if device.type == "cuda" else None


def build_loader(data: DataConfig, train: Documents, seed: int, *, pin: bool) -> Loader:
    rows = data.micro_batch_size_per_gpu
    token_budget = data.max_tokens_per_micro_batch or rows * data.max_length
    return Loader(
        documents=train,
        packing=Packing(rows, token_budget if data.packing else None, multiple_of_tokens=TILE if pin else 1),
        rows_per_step=data.train_batch_size or rows * dist.data_size(),
        seed=seed,
        rank=dist.data_rank(),
        world_size=dist.data_size(),
        part=dist.context_rank(),
        parts=dist.context_size(),
        pin=pin,
    )


def describe_plan(loader: Loader, total_steps: int) -> str:
    packing = loader.packing
    many = loader.world_size > 1
    owners = ("processes" if many else "process") if loader.parts == 1 else f"group{'s' if many else ''} of {loader.parts} processes"
    budget = f"up to {packing.token_budget:,} packed tokens" if packing.token_budget else f"{packing.rows} padded rows"
    return (
        f"plan: {total_steps:,} steps ({loader.steps_per_epoch:,} an epoch) of {loader.rows_per_step} rows, "
        f"in micro-batches of {budget} on each of {loader.world_size} {owners}"
    )


def main(argv: list[str]) -> None:
    try:
        config = load_config(SFTConfig, argv)
        dry_run(config) if config.trainer.dry_run else train(config)
    finally:
        dist.stop()


if __name__ == "__main__":
    exit_on_user_error(main, sys.argv[1:])
