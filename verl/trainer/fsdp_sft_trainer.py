"""Supervised fine-tuning: from a file of questions and answers to a Hugging Face directory.

    python -m verl.trainer.fsdp_sft_trainer data.train_files=train.jsonl model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct

Start it with `torchrun` to use several processes. To read the code, start at `train` and `verl.trainer.loop.train_loop`.
"""

import sys

from verl import dist
from verl.config.load import load_config
from verl.config.sft import DataConfig, SFTConfig
from verl.data.documents import Documents
from verl.data.loader import Loader, epoch_lengths
from verl.data.tables import Columns
from verl.engine.build import build
from verl.engine.decisions import Workload, choose_spread, decide, packing_of
from verl.engine.hardware import ASSUMED, Hardware, measure
from verl.engine.outline import Outline
from verl.errors import exit_on_user_error
from verl.models.prompt_format import system_prompts
from verl.run import Run, TrainResult
from verl.session import session
from verl.trainer.inputs import load_data, load_rows, read_tokenizer
from verl.trainer.loop import train_loop
from verl.trainer.resume import begin, find_checkpoint


@session()
def train(config: SFTConfig) -> TrainResult:
    """Train with a config.

    Raises:
        UserError: the config, the data, the model or the checkpoint is invalid.
        Stopped: a signal or the time limit ended the run.
    """
    device = dist.start(large_pages=config.model.fsdp_config.cpu_offload, timeout_seconds=config.dist.timeout_seconds)
    dist.share_micro_batches(config.model.context_parallel_size)
    with Run(config) as run:
        run.checkpoint = find_checkpoint(config.trainer, run)
        outline, hardware = Outline(config.model), measure(device)
        tokenizer = read_tokenizer(outline, config.data)
        from verl.trainer.oddities import say_oddities  # once in a run, as what follows
        from verl.trainer.samples import read_samples
        from verl.trainer.teaching import find_algorithm, heads_of_teacher

        other_heads = heads_of_teacher(config.teacher, tokenizer)
        spread = choose_spread(outline, hardware)  # raises before the data is read
        documents, validation = load_data(config.data, Columns.of(config.data), tokenizer, run)
        loader = build_loader(config.data, documents, config.trainer.seed, hardware)
        total_steps = loader.total_steps(config.trainer)
        start = begin(config.trainer, run, documents, loader.rows_per_step, total_steps)
        if start is None:
            return run.result()
        samples = read_samples(config, tokenizer, run)
        say_oddities(run, documents, validation, outline, loader.rows_per_step, total_steps)
        workload = Workload.of(epoch_lengths(documents, config.trainer.seed), total_steps, loader.steps_per_epoch, loader.packing)
        run.enter("loading the model")
        decisions = decide(outline, hardware, workload, spread, other_heads=other_heads)
        if decisions.hardware.has_gpu:
            from verl.plan.report import warn_of_memory

            warn_of_memory(config, documents, outline, decisions, run)
        built = build(
            config.model,
            config.optim,
            tokenizer,
            decisions,
            stop_ids=documents.stop_ids,
            system_prompts=system_prompts(config.data),
            seed=config.trainer.seed,
        )
        algorithm = find_algorithm(config.teacher, built, run)
        run.say(f"{built.describe()}\nplan: {loader.describe(total_steps)}; into {run.directory}")
        if run.checkpoint is not None:
            from verl.engine import restore  # a new run restores nothing

            run.enter("loading the checkpoint")
            restore.load(run.checkpoint, built.engine)
        from verl.trainer.saving import Saver
        from verl.trainer.validation import validating

        with (
            validating(validation, algorithm, loader, built, run, samples) as checks,
            run.stepping(built.engine.trained_weights),
            Saver(config.trainer, run, built, validation=validation) as saver,
        ):
            train_loop(config.trainer, algorithm, loader, checks, built, start, run, saver)
        return run.result()


@session()
def dry_run(config: SFTConfig, gpus: int | None = None) -> None:
    """Print the steps and the memory of a run. It reads no weights, and writes only the cache of tokenized rows.

    Args:
        gpus: number of GPUs to plan for, which need not exist here; None: the number of processes.
    Raises:
        UserError: as `train`.
    """
    from verl.plan.plan import plan_run  # not needed for training
    from verl.plan.report import describe
    from verl.trainer.teaching import heads_of_teacher

    device = dist.start()
    outline = Outline(config.model)
    tokenizer = read_tokenizer(outline, config.data)
    heads_of_teacher(config.teacher, tokenizer)
    documents = load_rows(config.data, Columns.of(config.data), "train", tokenizer)
    hardware = measure(device) if device.type == "cuda" else ASSUMED
    plan = plan_run(config, documents, outline, hardware.planned(gpus or dist.world_size()))
    if dist.is_main():
        print(f"data.train_files: {documents.report}\n{describe(plan, config, documents, outline)}", flush=True)


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


def main(argv: list[str]) -> None:
    config = load_config(SFTConfig, argv)
    dry_run(config) if config.trainer.dry_run else train(config)


if __name__ == "__main__":
    exit_on_user_error(main, sys.argv[1:])
