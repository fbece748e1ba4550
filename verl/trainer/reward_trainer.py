"""Training on answers that are compared, or good or bad: a reward model, or the answering model itself with DPO, KTO and others; and on
texts with labels: a classifier.

    python -m verl.trainer.reward_trainer data.train_files=pairs.jsonl model.partial_pretrain=Qwen/Qwen2.5-0.5B-Instruct
    python -m verl.trainer.reward_trainer algorithm.name=dpo data.train_files=pairs.jsonl model.partial_pretrain=checkpoints/…/global_step_N

Start it with `torchrun` to use several processes. To read the code, start at `train`; the loop is that of fine-tuning.
"""

import sys
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from verl import dist
from verl.config.load import load_config
from verl.config.pairs import PairsConfig, RewardTrainerConfig
from verl.data.documents import Documents
from verl.data.loader import Loader, epoch_lengths
from verl.data.preferences import columns_of, with_numbers
from verl.engine.build import Built, build
from verl.engine.build_heads import build_reward_model
from verl.engine.decisions import Decisions, Workload, choose_spread, decide, packing_of_pairs
from verl.engine.hardware import Hardware, measure
from verl.engine.outline import Outline
from verl.engine.shared_prompts import choose_sharing
from verl.errors import exit_on_user_error
from verl.run import Run, TrainResult
from verl.session import session
from verl.trainer.inputs import load_rows, read_tokenizer
from verl.trainer.loop import train_loop
from verl.trainer.oddities import say_oddities
from verl.trainer.preference import Preference, is_for_labels, load_preference
from verl.trainer.preference_rows import load_preferences, prepared
from verl.trainer.resume import begin, find_checkpoint
from verl.trainer.validation import validating


@session()
def train(config: RewardTrainerConfig) -> TrainResult:
    """Train with a config.

    Raises:
        UserError: the config, the data, the model or the checkpoint is invalid.
        Stopped: a signal or the time limit ended the run.
    """
    device = dist.start(large_pages=config.model.fsdp_config.cpu_offload, timeout_seconds=config.dist.timeout_seconds)
    if is_for_labels(config):
        from verl.trainer import classifier  # its rows are no pairs

        return classifier.train(config, device)
    method = load_preference(config)
    with Run(config) as run:
        run.checkpoint = find_checkpoint(config.trainer, run)
        outline, hardware = Outline(config.model), measure(device)
        tokenizer = read_tokenizer(outline, config.data, may_have_head=method.scorer == "score")
        spread = choose_spread(outline, hardware)  # raises before the data is read
        pairs, validation = load_preferences(config.data, method, tokenizer, run)
        loader = build_loader(config.data, pairs, config.trainer.seed, hardware)
        total_steps = loader.total_steps(config.trainer)
        start = begin(config.trainer, run, pairs, loader.rows_per_step, total_steps)
        if start is None:
            return run.result()
        say_oddities(run, pairs, validation, outline, loader.rows_per_step, total_steps)
        workload = Workload.of(epoch_lengths(pairs, config.trainer.seed), total_steps, loader.steps_per_epoch, loader.packing)
        run.enter("loading the model")
        decisions = decide(outline, hardware, workload, spread, scalar_head=method.scorer == "score")
        built = build_for(config, method, tokenizer, pairs, decisions)
        sharing = choose_sharing(
            config.data.share_prompts, [built.engine], decisions, config.data.max_length, trusted=config.model.trust_remote_code
        )
        loader = replace(loader, packing=replace(loader.packing, share_prompts=sharing.on))
        run.say(f"{built.describe()}\n{sharing.describe()}\nplan: {method.trains}, {loader.describe(total_steps)}; into {run.directory}")
        # The checkpoint is loaded afterwards, so the reference is the initial model even if the run resumes.
        loader, validation = prepared(config, method, loader, validation, built, run, total_steps)
        if run.checkpoint is not None:
            from verl.engine import restore  # a new run restores nothing

            run.enter("loading the checkpoint")
            restore.load(run.checkpoint, built.engine)
        from verl.trainer.saving import Saver

        with (
            validating(validation, method.loss, replace(loader, validates=True), built, run) as checks,
            run.stepping(built.engine.trained_weights),
            Saver(config.trainer, run, built, validation=validation) as saver,
        ):
            train_loop(config.trainer, method.loss, loader, checks, built, start, run, saver)
        return run.result()


@session()
def dry_run(config: RewardTrainerConfig) -> None:
    """Print the steps of a run. It reads no weights, and writes only the cache of tokenized rows.

    Raises:
        UserError: as `train`.
    """
    device = dist.start()
    if is_for_labels(config):
        from verl.trainer import classifier

        classifier.dry_run(config, device)
        return
    method = load_preference(config)
    tokenizer = read_tokenizer(Outline(config.model), config.data, may_have_head=method.scorer == "score")
    rows = load_rows(config.data, columns_of(config.data, method.reads), "train", tokenizer)
    pairs = with_numbers(rows, config.data, method.reads, "train")
    loader = build_loader(config.data, pairs, config.trainer.seed, measure(device))
    if dist.is_main():
        plan = f"{method.trains}, {loader.describe(loader.total_steps(config.trainer))}"
        print(f"data.train_files: {pairs.report}\nplan: {plan}", flush=True)


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


def build_for(
    config: RewardTrainerConfig, method: Preference, tokenizer: PreTrainedTokenizerBase, train: Documents, decisions: Decisions
) -> Built:
    """Build a language model or a reward model, as the method needs.

    Raises:
        UserError: there is no such model, or the method cannot train it.
    """
    options: dict[str, Any] = {"stop_ids": train.stop_ids, "seed": config.trainer.seed}
    if method.scorer == "token_logprobs":
        return build(config.model, config.optim, tokenizer, decisions, **options)
    return build_reward_model(config.model, config.optim, tokenizer, decisions, padding=padding_of(tokenizer, train), **options)


def padding_of(tokenizer: PreTrainedTokenizerBase, train: Documents) -> int | None:
    """Return the padding token to save with a reward model; None if it is also the last token of documents.

    transformers reads the score at the last token that is not padding, which would then be one token too early.
    """
    ids, _ = train.document(0)
    padding: int | None = tokenizer.pad_token_id
    return None if padding == ids[-1] else padding


def main(argv: list[str]) -> None:
    config = load_config(RewardTrainerConfig, argv)
    dry_run(config) if config.trainer.dry_run else train(config)


if __name__ == "__main__":
    exit_on_user_error(main, sys.argv[1:])
