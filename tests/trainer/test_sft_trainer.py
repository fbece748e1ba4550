"""The trainer as a person runs it, and its losses against loops that others wrote."""

import gzip
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked, run_forked
from places import run_ranks
from runs import SFT, Metrics, command, losses, metrics_of, wait_for
from sft_runs import ROWS_PER_STEP, STEPS, train, words
from tiny import write_problems_and_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from verl import dist
from verl.algorithms import sft
from verl.config.load import load_config
from verl.config.sft import DataConfig, SFTConfig
from verl.data.batch import Batch
from verl.data.documents import Documents, load_documents
from verl.data.loader import row_order
from verl.data.tables import Columns
from verl.engine import restore
from verl.engine.contract import LossOut, TokenOut
from verl.errors import SAVED_EXIT_CODE, UserError, exit_on_user_error
from verl.models.inference import load_for_inference
from verl.models.load import load_tokenizer
from verl.trainer import fsdp_sft_trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_problems_and_model(tmp_path_factory.mktemp("sft"))


@pytest.fixture(scope="module")
def plain_run(folder: Path) -> Metrics:
    return train(folder, "plain")


@pytest.fixture(scope="module")
def documents(folder: Path) -> Documents:
    tokenizer = load_tokenizer(str(folder / "model"))
    config = DataConfig(max_length=256, cache_dir=str(folder / "cache"))
    return load_documents(config, Columns.of(config), str(folder / "train.jsonl"), tokenizer, key="data.train_files", max_samples=None)


def rows_of_steps(documents: Documents, seed: int = 1) -> list[list[int]]:
    per_epoch = -(-len(documents) // ROWS_PER_STEP)
    steps = []
    for number in range(STEPS):
        epoch, within = divmod(number, per_epoch)
        steps.append(row_order(len(documents), seed, epoch)[within * ROWS_PER_STEP :][:ROWS_PER_STEP].tolist())
    return steps


def labelled(documents: Documents, row: int) -> tuple[Tensor, Tensor]:
    ids, mask = (torch.from_numpy(array.copy()) for array in documents.document(row))
    return ids.long(), torch.where(mask, ids.long(), -100)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # on purpose: the first point is left out
def test_twenty_steps_have_the_losses_of_a_plain_transformers_loop(folder: Path, plain_run: Metrics, documents: Documents) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="eager")
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=STEPS + 1)
    trained_before = 0
    for step, rows in zip(plain_run, rows_of_steps(documents), strict=True):
        schedule.step()
        pairs = [labelled(documents, row) for row in rows]
        tokens = sum(int((labels[1:] != -100).sum()) for _, labels in pairs)
        total: Any = sum(
            torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], labels[1:], reduction="sum", ignore_index=-100)
            for ids, labels in pairs
        )
        loss = total / tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert step["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert step["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        trained_before += tokens
        assert step["train/supervised_tokens"] == trained_before


@pytest.mark.filterwarnings("ignore")
def test_twenty_steps_have_the_losses_of_trl(folder: Path, documents: Documents, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is in the dev extra for Python 3.11 and newer")
    from datasets import Dataset
    from torch.utils.data import SequentialSampler

    mine = losses(train(folder, "beside-trl", optim__lr_scheduler="constant", optim__warmup_steps_ratio=0.0))
    # TRL would also train the line end behind the stop token, so that it gets our labels.
    rows = [
        {"input_ids": ids.tolist(), "completion_mask": (labels != -100).int().tolist()}
        for step in rows_of_steps(documents)
        for ids, labels in (labelled(documents, row) for row in step)
    ]
    # An epoch's last step takes the rows that are left; TRL's batches are all full, so that only those before it are compared.
    full_steps = len(documents) // ROWS_PER_STEP
    theirs: list[float] = []

    class InOrder(trl.SFTTrainer):  # type: ignore[name-defined]
        def _get_train_sampler(self, dataset: object = None) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            theirs.append(loss.item())
            return loss

    settings = trl.SFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=ROWS_PER_STEP,
        max_steps=full_steps,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.01,
        max_grad_norm=1.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        max_length=None,
        completion_only_loss=True,
        disable_tqdm=True,
    )
    InOrder(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    ).train()
    assert theirs == pytest.approx(mine[:full_steps], rel=1e-5)


def test_padding_in_place_of_packing_gives_the_same_losses(folder: Path, plain_run: Metrics) -> None:
    padded = train(folder, "padded", data__packing="false", data__micro_batch_size_per_gpu=2)
    assert losses(padded) == pytest.approx(losses(plain_run), rel=1e-5)


def test_small_micro_batches_give_the_same_losses(folder: Path, plain_run: Metrics) -> None:
    small = train(folder, "small", data__micro_batch_size_per_gpu=1, model__enable_gradient_checkpointing="false")
    assert losses(small) == pytest.approx(losses(plain_run), rel=1e-5)


def test_two_processes_give_the_losses_of_one(folder: Path, plain_run: Metrics) -> None:
    said = run_ranks(*SFT, *words(folder, "two"))
    assert losses(metrics_of(folder / "two")) == pytest.approx(losses(plain_run), rel=1e-5)
    assert [line["train/grad_norm"] for line in metrics_of(folder / "two")] == pytest.approx(
        [m["train/grad_norm"] for m in plain_run], rel=1e-4
    )
    assert said.count("starting a new run") == 1, "only rank 0 speaks"


def test_what_a_run_leaves_on_disk(folder: Path, plain_run: Metrics) -> None:
    directory = folder / "plain"
    assert {path.name for path in directory.iterdir()} == {
        "config.yaml", "environment.json", "trainer_state.json", "metrics.jsonl", "train.log", "latest_checkpointed_iteration.txt",
        f"global_step_{STEPS}"
    }  # fmt: skip
    assert json.loads((directory / "environment.json").read_text())["torch"] == torch.__version__
    checkpoint = directory / f"global_step_{STEPS}"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop in model.generation_config.eos_token_id
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(folder / "model").chat_template
    state = json.loads((directory / "trainer_state.json").read_text())
    assert state["step"] == state["total_steps"] == STEPS and state["metrics"]["train/loss"] == plain_run[-1]["train/loss"]
    expected = {"step", "epoch", "train/loss", "train/grad_norm", "train/lr", "train/tokens", "train/supervised_tokens"}
    expected |= {"perf/tokens_per_second", "perf/tokens_per_second_per_gpu", "perf/step_seconds"}
    assert all(expected <= set(line) for line in plain_run)
    assert [line["step"] for line in plain_run] == list(range(1, STEPS + 1))
    assert "rows 80 read, 80 used, 0 cut, 0 dropped" in (directory / "train.log").read_text()


def test_the_written_config_runs_again(folder: Path, plain_run: Metrics) -> None:
    written = str(folder / "plain" / "config.yaml")
    again = load_config(SFTConfig, ["--config", written])
    assert again == load_config(SFTConfig, words(folder, "plain"))


def test_a_checkpoint_at_each_epochs_end_is_the_default(folder: Path) -> None:
    train(
        folder,
        "epochs",
        trainer__save_freq="epoch",
        trainer__total_training_steps="null",
        trainer__total_epochs=2,
        data__train_batch_size=40,
    )
    names = {path.name for path in (folder / "epochs").glob("global_step_*")}
    assert names == {"global_step_2", "global_step_4"}


def test_only_the_newest_checkpoints_are_kept(folder: Path) -> None:
    train(folder, "kept", trainer__save_freq=1, trainer__total_training_steps=5, trainer__max_ckpt_to_keep=2)
    assert {path.name for path in (folder / "kept").glob("global_step_*")} == {"global_step_4", "global_step_5"}


def test_validation_loss_is_that_of_every_trained_token(folder: Path) -> None:
    metrics = train(
        folder, "validated", data__val_files=folder / "test.jsonl", trainer__test_freq=2, trainer__total_training_steps=5, optim__lr=0
    )
    assert [line["step"] for line in metrics if "val/loss" in line] == [2, 4, 5]
    tokenizer = load_tokenizer(str(folder / "model"))
    config = DataConfig(max_length=256, cache_dir=str(folder / "cache"))
    rows = load_documents(config, Columns.of(config), str(folder / "test.jsonl"), tokenizer, key="data.val_files", max_samples=None)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in range(len(rows)):
            ids, labels = labelled(rows, row)
            logits = model(ids[None]).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100))
            tokens += int((labels[1:] != -100).sum())
    assert metrics[-1]["val/loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_a_run_that_was_resumed_is_the_uninterrupted_one(folder: Path, plain_run: Metrics, capsys: pytest.CaptureFixture[str]) -> None:
    """Stopped by an error at a step without a checkpoint; the newest one is in the second epoch."""
    original, calls = sft.loss, [0]

    def failing(out: TokenOut, batch: Batch) -> LossOut:
        calls[0] += 1
        if calls[0] > 17:
            raise KeyboardInterrupt
        return original(out, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "loss", failing)
        with pytest.raises(KeyboardInterrupt):
            train(folder, "resumed", trainer__save_freq=5)
    dist.stop()
    capsys.readouterr()
    resumed = train(folder, "resumed", trainer__save_freq=5)
    said = capsys.readouterr().out
    assert said.startswith("resuming from") and "global_step_15" in said.splitlines()[0]
    assert losses(resumed) == losses(plain_run)
    final = [Path(folder / name / f"global_step_{STEPS}" / "model.safetensors").read_bytes() for name in ("plain", "resumed")]
    assert final[0] == final[1]


def test_a_checkpoint_of_two_processes_is_resumed_by_one(folder: Path, plain_run: Metrics) -> None:
    run_ranks(*SFT, *words(folder, "moved", trainer__save_freq=10))
    config = words(folder, "moved-on", trainer__resume_mode="resume_path", trainer__resume_from_path=folder / "moved" / "global_step_10")
    fsdp_sft_trainer.main(config)
    assert losses(metrics_of(folder / "moved-on")) == pytest.approx(losses(plain_run)[10:], rel=1e-5)


def test_sigterm_ends_with_a_checkpoint_from_which_the_same_command_goes_on(folder: Path, plain_run: Metrics) -> None:
    process = Forked([*SFT, *words(folder, "term")], folder, os.environ)
    wait_for(lambda: (folder / "term" / "metrics.jsonl").exists() and len(metrics_of(folder / "term")) >= 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == SAVED_EXIT_CODE and "the same command resumes from" in output
    done = run_forked(*SFT, *words(folder, "term"), folder=folder)
    assert done.returncode == 0 and done.stdout.startswith("resuming from")
    assert losses(metrics_of(folder / "term")) == losses(plain_run)


def test_a_finished_run_has_nothing_left_to_do(folder: Path, plain_run: Metrics, capsys: pytest.CaptureFixture[str]) -> None:
    fsdp_sft_trainer.main(words(folder, "plain"))
    said = capsys.readouterr().out
    assert "nothing left to do" in said and f"and name the directory too: trainer.default_local_dir={folder / 'plain'}" in said
    assert metrics_of(folder / "plain") == plain_run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data__train_batch_size": 7}, r"data\.train_batch_size: 6 -> 7"),
        ({"trainer__seed": 2}, r"trainer\.seed: 1 -> 2"),
        ({"data__train_max_samples": 30}, r"the training rows changed \(80 rows then, 30 now\) since this checkpoint"),
        ({"data__max_length": 30, "data__truncation": "left"}, r"data\.max_length: 256 -> 30"),
    ],
)
def test_resuming_with_other_rows_is_refused(change: dict[str, Any], message: str, folder: Path, plain_run: Metrics) -> None:
    with pytest.raises(UserError, match=message):
        train(folder, "plain", **change)


def test_a_run_goes_on_after_its_file_has_moved(
    folder: Path, plain_run: Metrics, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zipped = tmp_path / "elsewhere.jsonl.gz"
    zipped.write_bytes(gzip.compress((folder / "train.jsonl").read_bytes()))
    train(folder, "plain", data__train_files=str(zipped))
    assert "nothing left to do" in capsys.readouterr().out


def test_a_checkpoint_that_does_not_record_its_rows_is_resumed_with_a_warning(
    folder: Path, plain_run: Metrics, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = restore.read_position
    monkeypatch.setattr(restore, "read_position", lambda directory: replace(whole(directory), data_fingerprint="0" * 64))
    train(folder, "plain")
    said = capsys.readouterr().out
    assert "does not record the tokens of its rows, because an older version wrote it" in said and "nothing left to do" in said
    with pytest.raises(UserError, match=r"the training rows changed \(80 then, 30 now\)"):
        train(folder, "plain", data__train_max_samples=30)


def test_an_adapter_run_leaves_an_adapter_that_loads(folder: Path) -> None:
    metrics = train(folder, "lora", model__lora_rank=8, optim__lr=1e-2, trainer__total_epochs=2, trainer__total_training_steps="null")
    assert metrics[-1]["train/loss"] < metrics[0]["train/loss"] - 0.5
    checkpoint = sorted((folder / "lora").glob("global_step_*"))[-1]
    assert (checkpoint / "adapter_model.safetensors").exists() and not (checkpoint / "model.safetensors").exists()
    AutoModelForCausalLM.from_pretrained(checkpoint)
    stop = AutoTokenizer.from_pretrained(checkpoint).convert_tokens_to_ids("<|im_end|>")
    assert stop in load_for_inference(str(checkpoint), device="cpu").generation_config.eos_token_id


def test_the_first_command_of_the_readme_runs_as_it_stands(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "data" / "gsm8k").mkdir(parents=True)
    (home / "data" / "gsm8k" / "train.jsonl").write_text((folder / "train.jsonl").read_text())
    done = command(
        *SFT, "data.train_files=~/data/gsm8k/train.jsonl", "data.prompt_key=question", "data.response_key=answer",
        f"model.partial_pretrain={folder / 'model'}", "data.micro_batch_size_per_gpu=2", "model.enable_gradient_checkpointing=true",
        "optim.lr=2e-5", "trainer.total_epochs=1", "trainer.project_name=qwen25-05b-sft-demo", "trainer.default_local_dir=./checkpoints",
        "trainer.logger=console", cwd=tmp_path, env={"HOME": str(home), "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "checkpoints" / "global_step_40" / "config.json").exists()
    log = (tmp_path / "checkpoints" / "train.log").read_text()
    assert log.count("\nstep ") == 40 and "epoch 1:" in done.stdout
    assert "\nstep 1/40 · train/loss " in done.stdout and "\nstep 40/40 · train/loss " in done.stdout


def test_the_second_command_of_the_readme_runs_as_it_stands(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "data" / "gsm8k").mkdir(parents=True)
    (home / "data" / "gsm8k" / "train.jsonl").write_text((folder / "train.jsonl").read_text())
    done = run_forked(
        *SFT, "data.train_files=~/data/gsm8k/train.jsonl", "data.prompt_key=question", "data.response_key=answer",
        "data.micro_batch_size_per_gpu=4", "data.max_length=2048", f"model.partial_pretrain={folder / 'model'}", "model.strategy=fsdp2",
        "model.enable_gradient_checkpointing=true", "model.use_liger=false", "optim.lr=1e-4", "optim.warmup_steps_ratio=0.1",
        "optim.clip_grad=1.0", "trainer.total_epochs=3", "trainer.project_name=qwen25-05b-gsm8k",
        "trainer.default_local_dir=./checkpoints/qwen25-05b-gsm8k", "trainer.experiment_name=qwen25-05b-gsm8k-sft", "trainer.logger=wandb",
        processes=4, folder=tmp_path, env={"HOME": str(home), "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "checkpoints" / "qwen25-05b-gsm8k" / "global_step_15" / "config.json").exists()
    said = [line for line in (done.stdout + done.stderr).splitlines() if "wandb" in line and "console" in line]
    assert len(said) == 1, "without a login it says so in one line and goes on with the console"


BAD_INPUTS = {
    "no such file": (["data.train_files=missing.jsonl"], "missing.jsonl"),
    "no such column": (["data.prompt_key=questoin"], "train.jsonl:1: "),
    "no such model": (["model.partial_pretrain=./nowhere"], "./nowhere"),
    "an unknown key": (["optim.learning_rate=1"], "optim.lr"),
    "an unknown logger": (["trainer.logger=wandbb"], "did you mean 'wandb'"),
    "a row over max_length": (["data.max_length=8"], "data.max_length"),
    "no checkpoint to resume": (["trainer.resume_mode=resume_path", "trainer.resume_from_path=nowhere"], "nowhere"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_a_wrong_input_is_answered_with_place_and_fix_before_a_model_is_loaded(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    changes, expected = BAD_INPUTS[name]
    keys = [word for word in words(folder, "bad") if not any(word.startswith(c.partition("=")[0] + "=") for c in changes)]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        exit_on_user_error(fsdp_sft_trainer.main, [*keys, *changes])
    said = capfd.readouterr()
    assert end.value.code == 2
    assert "error: " in said.err and "fix: " in said.err and expected in said.err
    assert "Traceback" not in said.err and "model: " not in said.out


def test_under_torchrun_a_wrong_input_is_said_once_and_ends_every_process(folder: Path) -> None:
    done = run_forked(*SFT, *words(folder, "bad", data__prompt_key="questoin"), folder=folder, processes=2)
    assert done.returncode != 0 and done.stderr.count("error: ") == 1 and "train.jsonl:1: " in done.stderr
    assert "exitcode  : 2" in done.stderr
