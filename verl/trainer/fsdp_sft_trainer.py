"""Supervised fine-tuning: from a file of questions and answers to a Hugging Face directory.

    python -m verl.trainer.fsdp_sft_trainer data.train_files=train.jsonl model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct

The same command under `torchrun` uses several processes. `run` and `train_loop` are the whole way; read them first.
"""

import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from verl import config_load, dist
from verl.algorithms import sft
from verl.config import DataConfig, PairsConfig, PPOConfig, RewardTrainerConfig, SFTConfig
from verl.data.batch import Batch
from verl.data.documents import Documents, load_documents
from verl.data.loader import Loader, Packing
from verl.data.prompt_format import system_prompts
from verl.data.report import show_first_row
from verl.engine import checkpoint
from verl.engine.build import Built, build, check_context, choose_spread
from verl.engine.checkpoint import Position
from verl.engine.engine import Algorithm, Engine
from verl.engine.memory import GIB
from verl.errors import UserError, exit_on_user_error
from verl.models import flash
from verl.models.load import load_tokenizer
from verl.run import Run, quiet_libraries
from verl.trainer.meter import Meter
from verl.trainer.plan import TILE, check_room, describe, make_plan
from verl.trainer.profile import profiled
from verl.trainer.resume import find_checkpoint, start_position

VALIDATION_ROWS = 1024  # rows of validation that are in memory at a time


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
        tokenizer = read_tokenizer(config)
        choose_spread(model, device)  # here for its errors, before the data is read
        train, validation = load_data(config.data, tokenizer, this)
        loader = build_loader(config.data, train, config.trainer.seed, pin=device.type == "cuda")
        fresh = Position(0, 0, 0, len(train), loader.rows_per_step, loader.seed, train.fingerprint)
        start = start_position(fresh, resume_from)
        total_steps = config.trainer.total_training_steps or loader.steps_per_epoch * config.trainer.total_epochs
        if resume_from is not None and start.step >= total_steps:
            this.say(f"nothing left to do: {start.step} of {total_steps} steps are done (more with trainer.total_epochs)")
            return resume_from
        this.start_logging(start.step, total_steps)
        warn_of_memory(config, train, device, this)
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
    train = load_rows(config.data, "train", config.data.train_max_samples, read_tokenizer(config))
    plan = make_plan(config, train, gpus=gpus or dist.world_size(), gpu_gib=memory_of(device))
    if dist.is_main():
        print(f"data.train_files: {train.report}\n{describe(plan, config, train)}", flush=True)


def read_tokenizer(config: SFTConfig | PPOConfig | RewardTrainerConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model, or of the adapter that training goes on from, once it is seen that the model can be what is asked for.

    Raises:
        UserError: no such model, or adapters or parts of heads that it cannot have.
    """
    model = config.model
    adapter = model.lora_adapter_path
    own = (
        adapter is not None and (Path(adapter).expanduser() / "tokenizer_config.json").is_file()
    )  # with the template that it was trained with
    path = adapter if adapter is not None and own else model.partial_pretrain
    tokenizer = load_tokenizer(path, trust_remote_code=model.trust_remote_code, chat_template=config.data.chat_template)
    if model.lora_rank > 0 or model.lora_adapter_path is not None:
        from verl.models.lora import check_adapters  # peft takes its time

        check_adapters(model, tokenizer)
    check_context(model)
    return tokenizer


def warn_of_memory(config: SFTConfig, train: Documents, device: torch.device, this: Run) -> None:
    """Say it before anything is loaded if the GPU is likely to be too small.

    Raises:
        UserError: on all ranks: it is too small for certain.
    """
    gpu_gib = memory_of(device)
    if gpu_gib is not None:
        plan = make_plan(config, train, gpus=dist.world_size(), gpu_gib=gpu_gib)
        dist.together(lambda: say_if(check_room(plan, config, train), this))


def say_if(text: str | None, this: Run) -> None:
    if text is not None:
        this.say(text)


def memory_of(device: torch.device) -> float | None:
    """GiB of a GPU."""
    return torch.cuda.get_device_properties(device).total_memory / GIB if device.type == "cuda" else None


def train_loop(
    config: SFTConfig | RewardTrainerConfig,
    algorithm: Algorithm,
    loader: Loader,
    validation: Documents | None,
    built: Built,
    start: Position,
    total_steps: int,
    this: Run,
) -> Path | None:
    """Every step: train and log; when due: validate and save. Returns the last checkpoint that it wrote, if any."""
    engine, meter, saved = built.engine, Meter(built.engine, start), None
    for step in profiled(loader.steps(start.step, total_steps), config.trainer.profile_step, engine.device, this):
        meter.add(step, engine.train_step(step.micro_batches, algorithm, step.number))
        done = step.number + 1
        ends_epoch, last, stop = done % loader.steps_per_epoch == 0, done == total_steps, this.should_stop()
        validates = not stop and due(config.trainer.test_freq, done, ends_epoch, last)
        saves = due(config.trainer.save_freq, done, ends_epoch, last or stop)
        if note := built.compiler.note():
            this.say(f"step {done}: {note}")
        # Between pauses a step's metrics are read while the next one runs, so that the GPU never waits for the host.
        pause = ends_epoch or last or stop or validates or saves
        for number, metrics in meter.finished(wait=pause):
            if validates and number == done and validation is not None:
                metrics |= validate(engine, algorithm, validation, loader)
            this.log(number, metrics)
        if ends_epoch:
            this.say(meter.end_epoch(step.epoch))
        if saves:
            here = replace(start, step=done, tokens=meter.tokens, supervised_tokens=meter.supervised_tokens)
            saved = checkpoint.save(this.directory, engine, here, built.export)
            checkpoint.prune(this.directory, config.trainer.max_ckpt_to_keep)
            this.keep_state({"step": done, "total_steps": total_steps, "checkpoint": saved.name, "metrics": metrics})
            this.say(f"saved {saved}")
        if stop:
            this.leave(f"after step {done}; {f'the same command goes on from {saved}' if saved else 'nothing was saved'}")
        if pause:
            meter.start()
    return saved


def due(every: int | str, done: int, ends_epoch: bool, last: bool) -> bool:
    """Whether what happens `every` so many steps, each "epoch", (-1) only at the end, or "never", happens after step `done`."""
    if every == "never":
        return False
    return last or (ends_epoch if every == "epoch" else int(every) > 0 and done % int(every) == 0)


def load_data(data: DataConfig | PairsConfig, tokenizer: PreTrainedTokenizerBase, this: Run) -> tuple[Documents, Documents | None]:
    """Tokenized training and validation rows; each node's first process makes the cache, the others read it."""

    def load(kind: str, max_samples: int | None) -> Documents:
        documents, key = load_rows(data, kind, max_samples, tokenizer), f"data.{kind}_files"
        first = dist.from_main(documents.fingerprint)
        dist.together(lambda: check_same_rows(documents.fingerprint, first, key))
        this.say(f"{key}: {documents.report}")
        return documents

    train = load("train", data.train_max_samples)
    validation = None if data.val_files is None else load("val", data.val_max_samples)
    this.show(partial(show_first_row, tokenizer, *train.document(0)))
    return train, validation


def load_rows(data: DataConfig | PairsConfig, kind: str, max_samples: int | None, tokenizer: PreTrainedTokenizerBase) -> Documents:
    """Tokenized rows of `data.train_files` or `data.val_files`; `kind` is "train" or "val"."""
    files = getattr(data, f"{kind}_files")
    return dist.main_first(lambda: load_documents(data, files, tokenizer, key=f"data.{kind}_files", max_samples=max_samples))


def check_same_rows(fingerprint: str, of_first: str, key: str) -> None:
    """Each process plans every step by itself, so all must have the same rows."""
    if fingerprint != of_first:
        fix = "give all nodes the same files under the same names"
        raise UserError(f"the rows that {socket.gethostname()} finds are not those of the first node", where=key, fix=fix)


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


def validate(engine: Engine, algorithm: Algorithm, validation: Documents, loader: Loader) -> dict[str, float]:
    """Mean loss and metrics over all of the validation rows, cut up as the loader does with its own."""

    def batches() -> Iterator[Batch]:
        for first in range(0, len(validation), VALIDATION_ROWS):
            rows = np.arange(first, min(first + VALIDATION_ROWS, len(validation)))
            yield from loader.micro_batches(validation, rows)

    return {f"val/{name}": float(value) for name, value in engine.evaluate(batches(), algorithm).items()}


def main(argv: list[str]) -> None:
    try:
        config = config_load.load(SFTConfig, argv)
        dry_run(config) if config.trainer.dry_run else run(config)
    finally:
        dist.stop()


if __name__ == "__main__":
    exit_on_user_error(main, sys.argv[1:])
