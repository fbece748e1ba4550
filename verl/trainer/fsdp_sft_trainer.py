"""Supervised fine-tuning: from a file of questions and answers to a Hugging Face directory.

    python -m verl.trainer.fsdp_sft_trainer data.train_files=train.jsonl model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct

The same command under `torchrun` uses several processes. `run` below is the whole way; read it first.
"""

import math
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from verl import config_load, dist
from verl.algorithms import sft
from verl.config import DataConfig, SFTConfig
from verl.data.batch import Batch
from verl.data.documents import Documents, load_documents
from verl.data.loader import Loader, Packing, Step, micro_batches
from verl.data.report import show_first_row
from verl.engine import checkpoint
from verl.engine.checkpoint import Position
from verl.engine.engine import Engine
from verl.engine.flops import peak_flops, training_flops
from verl.engine.logprobs import TokenScorer, check_scorer
from verl.errors import UserError, exit_on_user_error
from verl.models.attention import describe_attention
from verl.models.export import export_adapter, export_model, export_tokenizer
from verl.models.load import Loaded, check_vocabulary, load_for_training, load_tokenizer, recompute_activations
from verl.run import Run

VALIDATION_ROWS = 1024  # rows of validation that are in memory at a time


def run(config: SFTConfig) -> Path:
    """Train as the config says.

    Returns:
        the last checkpoint's directory.
    Raises:
        UserError: anything in the config, the data, the model or the checkpoint that is not right.
    """
    device = dist.start()
    with Run(config) as this:
        resume_from = find_checkpoint(config, this)
        tokenizer = load_tokenizer(
            config.model.partial_pretrain, trust_remote_code=config.model.trust_remote_code, chat_template=config.data.chat_template
        )
        train, validation = load_data(config, tokenizer, this)
        loader = build_loader(config.data, train, config.trainer.seed, pin=device.type == "cuda")
        total_steps = config.trainer.total_training_steps or loader.steps_per_epoch * config.trainer.total_epochs
        start = check_position(config, loader, train, resume_from)
        this.start_logging(start.step, total_steps)

        loaded, adapted, engine = build_engine(config, tokenizer, total_steps, device, this)
        if resume_from is not None:
            checkpoint.load(resume_from, engine)
        export = partial(export_checkpoint, loaded=loaded, adapted=adapted, tokenizer=tokenizer, stop_ids=train.stop_ids)
        say_plan(config, loader, loaded, engine, total_steps, this)
        return train_loop(config, loader, validation, engine, start, total_steps, export, this) or resume_from or this.directory


def train_loop(
    config: SFTConfig,
    loader: Loader,
    validation: Documents | None,
    engine: Engine,
    start: Position,
    total_steps: int,
    export: Any,
    this: Run,
) -> Path | None:
    """Every step: train, log; when due: validate, save. Returns the last checkpoint that it wrote, if any."""
    meter = Meter(engine, start.tokens, this)
    saved: Path | None = None
    for step in loader.steps(start.step, total_steps):
        metrics = meter.measure(step, engine.train_step(step.micro_batches, sft.loss, step.number))
        done = step.number + 1
        ends_epoch, last = done % loader.steps_per_epoch == 0, done == total_steps
        stop = this.should_stop()
        if validation is not None and due(config.trainer.test_freq, done, ends_epoch, last) and not stop:
            metrics |= validate(engine, validation, loader.packing)
        this.log(done, metrics)
        if ends_epoch:
            meter.say_epoch(step.epoch)
        if due(config.trainer.save_freq, done, ends_epoch, last or stop):
            saved = save(config, engine, position(start, done, meter.tokens), export, metrics, total_steps, this)
        if stop:
            this.say(f"stopped by {this.stopped_by or 'a signal'} after step {done}; the same command goes on from {saved}")
            raise SystemExit(143 if this.stopped_by == "SIGTERM" else 130)
        meter.start()
    return saved


def due(every: int | str, done: int, ends_epoch: bool, last: bool) -> bool:
    """Whether something that happens `every` so many steps, each "epoch", or (-1) only at the end, happens after step `done`."""
    return last or (ends_epoch if every == "epoch" else int(every) > 0 and done % int(every) == 0)


def find_checkpoint(config: SFTConfig, this: Run) -> Path | None:
    """The checkpoint to go on from, and the run's first line, which says so."""
    mode, root = config.trainer.resume_mode, this.directory
    checkpoint.remove_unfinished(root)
    if mode == "disable":
        this.say("starting anew (trainer.resume_mode=disable)")
        return None
    if mode == "auto":
        found = checkpoint.newest(root, this.say)
        this.say(f"going on from {found}" if found else f"starting anew: no checkpoint in {root} (trainer.resume_mode=auto)")
        return found
    named = Path(str(config.trainer.resume_from_path)).expanduser()
    damage = dist.from_main(checkpoint.find_damage(named) if dist.is_main() else None)
    if damage is not None:
        raise UserError(damage, where=f"trainer.resume_from_path={named}", fix="give a whole global_step_N directory")
    this.say(f"going on from {named} (trainer.resume_mode=resume_path)")
    return named


def load_data(config: SFTConfig, tokenizer: PreTrainedTokenizerBase, this: Run) -> tuple[Documents, Documents | None]:
    """Tokenized training and validation rows; each node's first process makes the cache, the others read it."""
    data = config.data
    train = dist.main_first(
        lambda: load_documents(data, data.train_files, tokenizer, key="data.train_files", max_samples=_samples(data.train_max_samples))
    )
    this.say(f"training data: {train.report}")
    validation = None
    if data.val_files is not None:
        validation = dist.main_first(
            lambda: load_documents(data, data.val_files, tokenizer, key="data.val_files", max_samples=_samples(data.val_max_samples))
        )
        this.say(f"validation data: {validation.report}")
    ids, mask = train.document(0)
    this.say(show_first_row(tokenizer, ids, mask))
    return train, validation


def _samples(number: int | None) -> int | None:
    return None if number == -1 else number


def build_loader(data: DataConfig, train: Documents, seed: int, *, pin: bool) -> Loader:
    rows, world = data.micro_batch_size_per_gpu, dist.world_size()
    budget = data.max_tokens_per_micro_batch or rows * data.max_length
    return Loader(
        documents=train,
        packing=Packing(rows, budget if data.packing else None),
        rows_per_step=data.train_batch_size or rows * world,
        seed=seed,
        rank=dist.rank(),
        world_size=world,
        pin=pin,
    )


def check_position(config: SFTConfig, loader: Loader, train: Documents, resume_from: Path | None) -> Position:
    """Where to start. Raises UserError if the rows or their order are not those of the checkpoint."""
    fresh = Position(0, 0, len(train), loader.rows_per_step, loader.seed, train.fingerprint)
    if resume_from is None:
        return fresh
    then = checkpoint.read_position(resume_from)
    changed = [
        (what, before, now)
        for what, before, now in (
            ("the training rows", then.data_fingerprint, fresh.data_fingerprint),
            ("rows per step (data.train_batch_size)", then.rows_per_step, fresh.rows_per_step),
            ("trainer.seed", then.seed, fresh.seed),
        )
        if before != now
    ]
    if changed:
        what, before, now = changed[0]
        raise UserError(
            f"{what} changed from {before} to {now} since this checkpoint",
            where=str(resume_from),
            fix="set it back, or start anew with trainer.resume_mode=disable or another trainer.default_local_dir",
        )
    return then


def build_engine(
    config: SFTConfig, tokenizer: PreTrainedTokenizerBase, total_steps: int, device: torch.device, this: Run
) -> tuple[Loaded, PeftModel | None, Engine]:
    """The model, loaded, checked, with adapters where asked for, sharded and with its optimizer."""
    settings = config.model
    torch.manual_seed(config.trainer.seed)
    loaded = load_for_training(settings.partial_pretrain, trust_remote_code=settings.trust_remote_code)
    model = loaded.model
    check_vocabulary(model, tokenizer, settings.partial_pretrain)
    scorer = TokenScorer(model)
    if not settings.fsdp_config.cpu_offload:
        scorer.to(device)
    check_scorer(scorer)
    compute_dtype = _compute_dtype(settings.compute_dtype, device)
    adapted = None
    if settings.lora_rank > 0:
        from verl.models.lora import add_adapters

        adapted = add_adapters(model, settings, compute_dtype=compute_dtype, seed=config.trainer.seed)
    if settings.use_liger:
        from verl.models.liger import use_liger

        use_liger(model, device)
    if settings.enable_gradient_checkpointing:
        recompute_activations(model)
    this.say(f"device: {_describe_device(device)} × {dist.world_size()}; attention: {describe_attention(device.type, compute_dtype)}")
    return loaded, adapted, Engine(
        scorer,
        config.optim,
        total_steps=total_steps,
        device=device,
        compute_dtype=compute_dtype,
        cpu_offload=settings.fsdp_config.cpu_offload,
    )


def _compute_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _describe_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"


def say_plan(config: SFTConfig, loader: Loader, loaded: Loaded, engine: Engine, total_steps: int, this: Run) -> None:
    trained = sum(p.numel() for p in engine.trained)
    everything = sum(p.numel() for p in engine.scorer.parameters())
    budget = f"up to {loader.packing.token_budget:,} tokens" if loader.packing.token_budget else f"{loader.packing.rows} padded rows"
    this.say(
        f"model: {type(loaded.model).__name__}, {everything:,} parameters, {trained:,} trained\n"
        f"plan: {total_steps:,} steps of {loader.rows_per_step} rows in micro-batches of {budget} a process, "
        f"{loader.steps_per_epoch:,} steps an epoch; into {this.directory}"
    )


def validate(engine: Engine, validation: Documents, packing: Packing) -> dict[str, float]:
    """Mean loss over every trained token of the validation rows."""

    def batches() -> Iterator[Batch]:
        for first in range(0, len(validation), VALIDATION_ROWS):
            rows = np.arange(first, min(first + VALIDATION_ROWS, len(validation)))
            yield from micro_batches(validation, rows, packing, rank=dist.rank(), world_size=dist.world_size())

    return {"val/loss": float(engine.evaluate(batches(), sft.loss)["loss"])}


def position(start: Position, done: int, tokens: int) -> Position:
    return Position(done, tokens, start.rows, start.rows_per_step, start.seed, start.data_fingerprint)


def save(
    config: SFTConfig, engine: Engine, where: Position, export: Any, metrics: dict[str, float], total_steps: int, this: Run
) -> Path:
    """A checkpoint, what older ones leave, and trainer_state.json beside them."""
    directory = checkpoint.save(this.directory, engine, where, export)
    checkpoint.prune(this.directory, config.trainer.max_ckpt_to_keep)
    if dist.is_main():
        checkpoint.write_trainer_state(this.directory, where, metrics, total_steps)
    this.say(f"saved {directory}")
    return directory


def export_checkpoint(
    directory: Path, *, loaded: Loaded, adapted: PeftModel | None, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int]
) -> None:
    """The Hugging Face files of a checkpoint."""
    if adapted is None:
        export_model(directory, loaded.model, loaded.saved_dtypes)
    else:
        export_adapter(directory, adapted)
    export_tokenizer(directory, tokenizer, loaded.model.generation_config, stop_ids)


class Meter:
    """Turns what a step returns into the numbers that are logged.

    Args:
        tokens: real tokens trained before, by the run that this one goes on from.
    """

    def __init__(self, engine: Engine, tokens: int, this: Run):
        self.tokens, self._engine, self._this = tokens, engine, this
        self._flops = training_flops(engine.scorer.model)
        self._peak = peak_flops(engine.device)
        self._epoch_tokens, self._epoch_seconds = 0, 0.0
        self.start()

    def start(self) -> None:
        """A step begins here: what came before, such as saving, is not its time."""
        self._since = time.perf_counter()

    def measure(self, step: Step, out: dict[str, torch.Tensor]) -> dict[str, float]:
        """Metrics of a step under the names of metrics.jsonl. Raises UserError if the loss or the gradient is not finite."""
        loss, norm = float(out["loss"]), float(out["grad_norm"])
        seconds = time.perf_counter() - self._since
        self.tokens += step.tokens
        self._epoch_tokens += step.tokens
        self._epoch_seconds += seconds
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserError(
                f"loss {loss}, gradient norm {norm}",
                where=f"step {step.number + 1}",
                fix="lower optim.lr, or look at the rows of this step; the last checkpoint is whole",
            )
        metrics = {
            "epoch": step.epoch,
            "train/loss": loss,
            "train/grad_norm": norm,
            "train/lr": self._engine.learning_rate(step.number),
            "train/tokens": self.tokens,
            "train/supervised_tokens": step.trained_tokens,
            "perf/step_seconds": seconds,
            "perf/tokens_per_second": step.tokens / seconds,
            "perf/tokens_per_second_per_gpu": step.tokens / seconds / dist.world_size(),
        }
        if self._peak is not None:
            metrics["perf/mfu"] = self._flops(step.tokens, step.trained_tokens) / seconds / (self._peak * dist.world_size())
        if self._engine.device.type == "cuda":
            metrics["perf/peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return metrics

    def say_epoch(self, epoch: int) -> None:
        rate = self._epoch_tokens / self._epoch_seconds
        self._this.say(f"epoch {epoch + 1}: {self._epoch_tokens:,} tokens, {rate:,.0f} tokens/s")
        self._epoch_tokens, self._epoch_seconds = 0, 0.0


def main(argv: list[str]) -> None:
    try:
        run(config_load.load(SFTConfig, argv))
    finally:
        dist.stop()


if __name__ == "__main__":
    exit_on_user_error(main, sys.argv[1:])
