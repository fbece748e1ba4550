"""Supervised fine-tuning: from a file of questions and answers to a Hugging Face directory.

    python -m verl.trainer.fsdp_sft_trainer data.train_files=train.jsonl model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct

The same command under `torchrun` uses several processes. `train` and `train_loop` are the whole way; read them first.
"""

import sys

import torch

from verl import dist
from verl.algorithms import sft
from verl.config.load import load_config
from verl.config.sft import DataConfig, SFTConfig
from verl.data.documents import Documents
from verl.data.loader import Loader, Packing
from verl.data.pack import TILE
from verl.data.tables import Columns
from verl.engine import checkpoint
from verl.engine.build import build, choose_spread
from verl.errors import exit_on_user_error
from verl.models.attention import flash
from verl.models.prompt_format import system_prompts
from verl.run import Run, TrainResult
from verl.session import session
from verl.trainer.inputs import load_data, load_rows, read_tokenizer
from verl.trainer.loop import train_loop
from verl.trainer.resume import begin, find_checkpoint


@session()
def train(config: SFTConfig) -> TrainResult:
    """Train as the config says.

    Raises:
        UserError: anything in the config, the data, the model or the checkpoint that is not right.
        Stopped: a signal ended the run after a step.
    """
    device = dist.start(large_pages=config.model.fsdp_config.cpu_offload)
    dist.share_micro_batches(config.model.context_parallel_size)
    with Run(config) as run:
        run.checkpoint = find_checkpoint(config.trainer, run)
        tokenizer = read_tokenizer(config.model, config.data.chat_template)
        choose_spread(config.model, device)  # here for its errors, before the data is read
        documents, validation = load_data(config.data, Columns.of(config.data), tokenizer, run)
        loader = build_loader(config.data, documents, config.trainer.seed, pin=device.type == "cuda")
        total_steps = loader.total_steps(config.trainer)
        start = begin(config.trainer, run, documents, loader.rows_per_step, total_steps)
        if start is None:
            return run.result()
        warn_of_memory(config, documents, device, run)
        tokens = int(documents.lengths_N.sum())
        built = build(
            config.model,
            config.optim,
            tokenizer,
            stop_ids=documents.stop_ids,
            system_prompts=system_prompts(config.data),
            total_steps=total_steps,
            total_tokens=tokens * total_steps // loader.steps_per_epoch,
            documents=flash.Documents(float((documents.lengths_N.astype(float) ** 2).sum() / tokens), loader.packing.token_budget or 0),
            device=device,
            seed=config.trainer.seed,
        )
        run.say(f"{built.describe()}\nplan: {loader.describe(total_steps)}; into {run.directory}")
        if run.checkpoint is not None:
            checkpoint.load(run.checkpoint, built.engine)
        train_loop(config.trainer, sft, loader, validation, built, start, run)
        return run.result()


@session()
def dry_run(config: SFTConfig, gpus: int | None = None) -> None:
    """Print what the run would take. Nothing is written but the cache of tokenized rows, and no weights are read.

    Args:
        gpus: of the run, which need not be here; None: as many as there are processes.
    Raises:
        UserError: as `train`.
    """
    from verl.plan.plan import make_plan  # verl.plan is another command's, and a GPU's below
    from verl.plan.report import describe

    device = dist.start()
    documents = load_rows(config.data, Columns.of(config.data), "train", read_tokenizer(config.model, config.data.chat_template))
    plan = make_plan(config, documents, gpus=gpus or dist.world_size(), gpu_gib=memory_of(device))
    if dist.is_main():
        print(f"data.train_files: {documents.report}\n{describe(plan, config, documents)}", flush=True)


def warn_of_memory(config: SFTConfig, train: Documents, device: torch.device, run: Run) -> None:
    """Say it before anything is loaded if the GPU is likely to be too small.

    Raises:
        UserError: on all ranks: it is too small for certain.
    """
    gpu_gib = memory_of(device)
    if gpu_gib is not None:
        from verl.plan.plan import make_plan
        from verl.plan.report import check_room

        plan = make_plan(config, train, gpus=dist.world_size(), gpu_gib=gpu_gib)
        dist.together(lambda: say_if(check_room(plan, config, train), run))


def say_if(text: str | None, run: Run) -> None:
    if text is not None:
        run.say(text)


def memory_of(device: torch.device) -> float | None:
    """GiB of a GPU."""
    return torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else None


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


def main(argv: list[str]) -> None:
    config = load_config(SFTConfig, argv)
    dry_run(config) if config.trainer.dry_run else train(config)


if __name__ == "__main__":
    exit_on_user_error(main, sys.argv[1:])
