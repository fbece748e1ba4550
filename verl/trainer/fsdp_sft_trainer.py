"""Supervised fine-tuning: from a file of questions and answers to a Hugging Face directory.

    python -m verl.trainer.fsdp_sft_trainer data.train_files=train.jsonl model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct

The same command under `torchrun` uses several processes. `run` and `train_loop` are the whole way; read them first.
"""

import sys
from pathlib import Path

from verl import dist
from verl.algorithms import sft
from verl.config.load import load_config
from verl.config.sft import DataConfig, SFTConfig
from verl.data.documents import Documents
from verl.data.loader import Loader
from verl.engine import checkpoint
from verl.engine.build import build
from verl.engine.checkpoint import Position
from verl.engine.decisions import Decisions, Workload, choose_spread, decide, packing_of
from verl.engine.hardware import ASSUMED, Hardware, measure
from verl.engine.outline import Outline
from verl.errors import exit_on_user_error
from verl.libraries import quiet_libraries
from verl.models.prompt_format import system_prompts
from verl.plan.plan import make_plan, plan_run
from verl.plan.report import check_room, describe
from verl.run import Run
from verl.trainer.inputs import load_data, load_rows, read_tokenizer
from verl.trainer.loop import train_loop
from verl.trainer.resume import find_checkpoint, start_position


def run(config: SFTConfig) -> Path:
    """Train as the config says.

    Returns:
        the last checkpoint's directory.
    Raises:
        UserError: anything in the config, the data, the model or the checkpoint that is not right.
    """
    device = dist.start(large_pages=config.model.fsdp_config.cpu_offload)
    dist.share_micro_batches(config.model.context_parallel_size)
    with Run(config) as this:
        resume_from = find_checkpoint(config.trainer, this)
        model = config.model
        outline, hardware = Outline(model), measure(device)
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
        decisions = decide(outline, hardware, workload, spread)
        warn_of_memory(config, train, outline, decisions, this)
        built = build(
            model,
            config.optim,
            tokenizer,
            decisions,
            stop_ids=train.stop_ids,
            system_prompts=system_prompts(config.data),
            seed=config.trainer.seed,
        )
        this.say(f"{built.describe()}\n{describe_plan(loader, total_steps)}; into {this.directory}")
        if resume_from is not None:
            checkpoint.load(resume_from, built.engine)
        return train_loop(config, sft, loader, validation, built, start, total_steps, this) or resume_from or this.directory


def dry_run(config: SFTConfig, gpus: int | None = None) -> None:
    """Print what the run would take. Nothing is written but the cache of tokenized rows, and no weights are read.

    Args:
        gpus: of the run, which need not be here; None: as many as there are processes.
    Raises:
        UserError: as `run`.
    """
    device = dist.start()
    quiet_libraries()
    outline = Outline(config.model)
    train = load_rows(config.data, "train", config.data.train_max_samples, read_tokenizer(config, outline))
    hardware = measure(device) if device.type == "cuda" else ASSUMED
    plan = plan_run(config, train, outline, hardware.planned(gpus or dist.world_size()))
    if dist.is_main():
        print(f"data.train_files: {train.report}\n{describe(plan, config, train, outline)}", flush=True)


def warn_of_memory(config: SFTConfig, train: Documents, outline: Outline, decisions: Decisions, this: Run) -> None:
    """Say it before anything is loaded if the GPU is likely to be too small.

    Raises:
        UserError: on all ranks: it is too small for certain.
    """
    if decisions.hardware.has_gpu:
        plan = make_plan(config, train, outline, decisions)
        dist.together(lambda: say_if(check_room(plan, config, train, outline), this))


def say_if(text: str | None, this: Run) -> None:
    if text is not None:
        this.say(text)


def build_loader(data: DataConfig, train: Documents, seed: int, hardware: Hardware) -> Loader:
    return Loader(
        documents=train,
        packing=packing_of(data, hardware),
        rows_per_step=data.train_batch_size or data.micro_batch_size_per_gpu * dist.data_size(),
        seed=seed,
        rank=dist.data_rank(),
        world_size=dist.data_size(),
        part=dist.context_rank(),
        parts=dist.context_size(),
        pin=hardware.has_gpu,
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
        dry_run(config) if config.trainer.dry_run else run(config)
    finally:
        dist.stop()


if __name__ == "__main__":
    exit_on_user_error(main, sys.argv[1:])
