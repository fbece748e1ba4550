"""verl from Python: what its functions take and return, and that they leave the process as it was."""

import ast
import asyncio
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from forked import run_forked
from places import ROOT
from tiny import write_problems_and_model

import verl
from verl import dist
from verl.config.objects import config_of
from verl.models.attention import packed
from verl.models.attention.packed import AttentionChoice, use_attention
from verl.session import session

STEPS = 3
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_problems_and_model(tmp_path_factory.mktemp("api"))
    (folder / "stops.py").write_text(LOGGER.format(action="signal.raise_signal(signal.SIGTERM)"))
    (folder / "interrupts.py").write_text(LOGGER.format(action="signal.raise_signal(signal.SIGINT)"))
    (folder / "fails.py").write_text('def start(run):\n    raise RuntimeError("a logger of a user")\n')
    (folder / "runs_another.py").write_text("import verl\n\ndef start(run):\n    verl.sft(run.config)\n")
    return folder


# Acts after the second step.
LOGGER = """
import signal

class Logger:
    def log(self, step, metrics):
        if step == 2:
            run = self.run
            {action}

    def finish(self):
        pass

def start(run):
    logger = Logger()
    logger.run = run
    return logger
"""


def settings(folder: Path, output: str, **changes: object) -> dict[str, object]:
    """Of a run of three steps."""
    return {
        "data": {"train_files": folder / "train.jsonl", "cache_dir": folder / "cache", "train_batch_size": 6, "max_length": 256},
        "model": {"partial_pretrain": folder / "model"},
        "optim": {"lr": 1e-3},
        "trainer.default_local_dir": folder / output,
        "trainer.total_training_steps": STEPS,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }


@pytest.fixture(scope="module")
def plain(folder: Path) -> verl.TrainResult:
    return verl.sft(settings(folder, "plain"))


def losses(run: verl.TrainResult) -> list[float]:
    return [line["train/loss"] for line in run.metrics]


def process() -> dict[str, object]:
    """What a run could leave changed."""
    names = ("torch.distributed", "torch._higher_order_ops.wrap", "transformers")
    return {
        "process group": torch.distributed.is_initialized(),
        "signal handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "warnings": list(warnings.filters),
        "loggers": [logging.getLogger(name).level for name in names],
        "progress bars": transformers.utils.logging.is_progress_bar_enabled(),
        "verbosity": transformers.utils.logging.get_verbosity(),
        "random numbers": torch.get_rng_state().tolist(),
        "errors": sys.excepthook,
        "output": (sys.stdout, sys.stderr),
        "compiler": torch._dynamo.config.specialize_float,
        "attention": packed._kernel,
        "context": dist.context_size(),
    }


@pytest.fixture
def left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything a run may change, set otherwise than it sets it, and looked at afterwards."""
    dist.stop()  # a group that another test may have left
    monkeypatch.setattr(packed, "_kernel", "sdpa")
    torch.manual_seed(7)
    transformers.utils.logging.set_verbosity_warning()
    transformers.utils.logging.enable_progress_bar()
    before = process()
    yield
    after = process()
    assert {name: value for name, value in after.items() if value != before[name]} == {}


# What is imported


def test_importing_verl_takes_under_a_tenth_of_a_second_and_loads_no_torch() -> None:
    seconds = []
    for _ in range(10):  # a busy machine is given time to be itself
        done = subprocess.run([sys.executable, "-X", "importtime", "-c", "import verl"], capture_output=True, text=True, env=ENVIRONMENT)
        seconds.append(int(done.stderr.splitlines()[-1].split("|")[1]) / 1e6)
        if seconds[-1] < 0.1:
            break
    assert min(seconds) < 0.1
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "verl" in loaded and not loaded & {"torch", "transformers", "omegaconf", "rich", "numpy"}


def test_a_wrong_config_is_answered_without_torch() -> None:
    code = "import sys, verl\ntry: verl.sft({'optim.lrr': 1})\nexcept verl.UserError as error: print(error)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert "did you mean optim.lr?" in done.stdout and done.stdout.endswith("False\n"), done.stderr


def test_every_public_name_is_there_for_dir_for_import_and_for_type_checkers() -> None:
    assert set(verl.__all__) <= set(dir(verl))
    assert all(getattr(verl, name) is not None for name in verl.__all__)
    tree = ast.parse((ROOT / "verl" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {name.asname for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names}
    assigned = {ast.unparse(target) for node in block.body if isinstance(node, ast.Assign) for target in node.targets}
    assert imported | assigned == set(verl.__all__)
    assert verl.RewardConfig is verl.RewardTrainerConfig
    with pytest.raises(AttributeError, match="no attribute 'stf'"):
        verl.stf  # noqa: B018


# What a config may be

NEEDED = {"data.train_files": "train.jsonl", "model.partial_pretrain": "model"}


def as_dataclass() -> verl.SFTConfig:
    config = verl.SFTConfig()
    config.data.train_files, config.model.partial_pretrain = "train.jsonl", "model"
    config.optim.lr, config.optim.betas, config.trainer.project_name = 1e-4, [0.8, 0.99], "mine"  # type: ignore[attr-defined]
    config.model.enable_gradient_checkpointing = False
    return config


FORMS: dict[str, tuple[Any, ...]] = {
    "words": (
        "data.train_files=train.jsonl",
        "model.partial_pretrain=model",
        "optim.lr=1e-4",
        "optim.betas=[0.8,0.99]",
        "trainer.project_name=mine",
        "model.enable_gradient_checkpointing=false",
    ),
    "a nested dict": (
        {
            "data": {"train_files": "train.jsonl"},
            "model": {"partial_pretrain": Path("model"), "enable_gradient_checkpointing": False},
            "optim": {"lr": 1e-4, "betas": (0.8, np.float64(0.99))},
            "trainer": {"project_name": "mine"},
        },
    ),
    "dotted keys": (
        {
            **NEEDED,
            "optim.lr": "1e-4",
            "optim.betas": [0.8, 0.99],
            "trainer.project_name": "mine",
            "model.enable_gradient_checkpointing": False,
        },
    ),
    "its dataclass": (as_dataclass(),),
    "several, later ones win": ("optim.lr=5", as_dataclass(), {"trainer.project_name": "other"}, "trainer.project_name=mine"),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_a_config_is_that_of_the_command_line(form: str) -> None:
    made = config_of(verl.SFTConfig, FORMS[form])
    assert made == config_of(verl.SFTConfig, FORMS["words"])
    assert made.trainer.default_local_dir == "checkpoints/mine/run", "an interpolation is resolved"
    assert made.optim.lr == 1e-4 and made.model.enable_gradient_checkpointing is False


def test_a_dataclass_is_not_changed() -> None:
    given, before = as_dataclass(), asdict(as_dataclass())
    made = config_of(verl.SFTConfig, (given, "optim.lr=1"))
    assert asdict(given) == before and made.optim.lr == 1 and made is not given


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "null",
        "true",
        "1e-5",
        "[a, b]",
        "{a: b}",
        "~",
        "~/data",
        "# no comment",
        "a: b",
        'it\'s "so"',
        "C:\\new",
        "é 日本 🙂",
        "a\nb\t\x7f\x85",
    ],
)
def test_any_text_is_taken_as_it_is(text: str) -> None:
    made = config_of(verl.SFTConfig, ({**NEEDED, "data": {"prompt_key": text}, "data.train_files": [text, text]},))
    assert made.data.prompt_key == text and made.data.train_files == [text, text]


@pytest.mark.parametrize("value", [7, True, None, 1e-300, float("inf"), -2.5, [1, [True, None]], np.int64(3), np.float32(0.5), []])
def test_numbers_lists_and_nothing_are_taken_as_they_are(value: object) -> None:
    made = config_of(verl.SFTConfig, ({**NEEDED, "model.trainable_tokens": None, "data.val_files": value},))
    assert made.data.val_files == value and type(made.data.val_files) is type(value.item() if isinstance(value, np.generic) else value)


def with_attribute(name: str, value: object) -> verl.SFTConfig:
    config = as_dataclass()
    setattr(config.optim, name, value)
    return config


WRONG: dict[str, tuple[object, str]] = {
    "a misspelt key": ({**NEEDED, "optim": {"lrr": 1e-5}}, "unknown key 'optim.lrr'\n  fix: did you mean optim.lr\\?"),
    "an attribute that no config has": (with_attribute("learning_rate", 1), "did you mean optim.lr\\?"),
    "a required key": ({"data.train_files": "train.jsonl"}, "model.partial_pretrain must be given"),
    "a type": ({**NEEDED, "optim.lr": "fast"}, "optim.lr: 'fast' is not a number"),
    "a type in a dataclass": (with_attribute("lr", "fast"), "optim.lr: 'fast' is not a number"),
    "a value": (with_attribute("lr_scheduler", "round"), "optim.lr_scheduler: found 'round'"),
    "a group": ({**NEEDED, "optim": 3}, "optim is a group of keys"),
    "an object": ({**NEEDED, "optim.lr": object()}, "optim.lr: found object"),
    "the class": (verl.SFTConfig, "found the class SFTConfig, expected SFTConfig"),
    "another's config": (verl.PPOConfig(), "found PPOConfig, expected SFTConfig"),
    "a list": (["optim.lr=1"], r"found list, expected SFTConfig, a dict or key=value\s+fix: .*verl\.sft\(\*words\)"),
    "a word": ("optim.lr", "write optim.lr=<value>"),
    "help": ("--help", "docs/keys.md"),
    "a missing file of settings": ("--config=nowhere.yaml", "no such config file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_a_users_error(name: str) -> None:
    given, said = WRONG[name]
    with pytest.raises(verl.UserError, match=said):
        verl.sft(given)  # type: ignore[arg-type]


# What comes back


@pytest.mark.usefixtures("left_as_it_was")
def test_fine_tuning_returns_its_checkpoint_and_the_lines_of_metrics_jsonl(folder: Path) -> None:
    run = verl.sft(settings(folder, "returned"))
    assert run.directory == folder / "returned" and run.checkpoint == folder / "returned" / f"global_step_{STEPS}"
    assert run.metrics == [json.loads(line) for line in (folder / "returned" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in run.metrics] == [1, 2, 3]
    again = verl.sft(settings(folder, "returned"))
    assert again == run, "there is nothing left to do"


def test_a_run_that_saves_nothing_has_no_checkpoint(folder: Path) -> None:
    run = verl.sft(settings(folder, "unsaved", trainer__save_freq="never"))
    assert run.checkpoint is None and len(run.metrics) == STEPS


def test_a_dry_run_prints_its_plan_and_returns_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for trainer, changes in ((verl.sft, {}), (verl.reward, {"data": {"train_files": pairs(folder), "train_batch_size": 2}})):
        run = trainer({**settings(folder, "dry", trainer__dry_run=True), **changes})
        assert run == verl.TrainResult(None, folder / "dry", []) and not (folder / "dry").exists()
        assert "3 steps" in capsys.readouterr().out or trainer is verl.sft


def pairs(folder: Path) -> Path:
    """Pairs of answers, made of the training rows: the right one, and that to another question."""
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()[:12]]
    answers = [row["answer"] for row in rows]
    made = [
        {"prompt": row["question"], "chosen": right, "rejected": wrong}
        for row, right, wrong in zip(rows, answers, answers[1:] + answers[:1], strict=True)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder / "pairs.jsonl"


@pytest.mark.usefixtures("left_as_it_was")
def test_one_after_another_in_one_process(folder: Path, plain: verl.TrainResult) -> None:
    """Evaluate, fine-tune again, reinforce, train a reward model, fine-tune again: each as if it were the first."""
    questions = {"test_file": folder / "test.jsonl", "max_new_tokens": 8, "max_samples": 6}
    found = verl.evaluate({"model_path": plain.checkpoint, "output_dir": folder / "eval", **questions})
    assert found.scores == json.loads((folder / "eval" / "results.json").read_text()) and found.scores["n"] == 6
    assert found.rows == [json.loads(line) for line in (folder / "eval" / "predictions.jsonl").read_text().splitlines()]
    assert len(found.rows) == 6 and {"prompt", "response", "score"} <= set(found.rows[0])
    reinforced = verl.ppo(
        {
            "data": {"train_files": folder / "train.jsonl", "prompts_per_step": 2, "max_prompt_length": 64},
            "model.partial_pretrain": plain.checkpoint,
            "rollout": {"samples_per_prompt": 2, "max_new_tokens": 6},
            "trainer": {"default_local_dir": folder / "ppo", "total_training_steps": 2},
        }
    )
    assert reinforced.checkpoint == folder / "ppo" / "global_step_2" and "rl/reward" in reinforced.metrics[-1]
    rewarded = verl.reward({**settings(folder, "reward"), "data": {"train_files": pairs(folder), "cache_dir": folder / "cache"}})
    assert rewarded.checkpoint is not None and len(rewarded.metrics) == STEPS
    assert losses(verl.sft(settings(folder, "second"))) == losses(plain)


@pytest.mark.usefixtures("left_as_it_was")
def test_export_returns_the_directory(folder: Path, plain: verl.TrainResult) -> None:
    directory = verl.export({"source": plain.checkpoint, "directory": folder / "exported", "dtype": "bfloat16"})
    assert directory == folder / "exported" and (directory / "model.safetensors").is_file()
    with pytest.raises(verl.UserError, match="the directory is not empty"):
        verl.export(plain.checkpoint, folder / "exported")  # type: ignore[arg-type]


# What ends a run


@pytest.mark.parametrize(("logger", "number"), [("interrupts.py", signal.SIGINT), ("stops.py", signal.SIGTERM)])
@pytest.mark.usefixtures("left_as_it_was")
def test_a_signal_ends_a_run_after_its_step_and_the_same_call_goes_on(
    logger: str, number: signal.Signals, folder: Path, plain: verl.TrainResult
) -> None:
    output = logger.partition(".")[0]
    with pytest.raises(verl.Stopped, match=f"stopped by {number.name}; the same call resumes from ") as stopped:
        verl.sft(settings(folder, output, trainer__logger=folder / logger))
    assert isinstance(stopped.value, KeyboardInterrupt) and stopped.value.signal == number
    step = int(str(stopped.value.checkpoint).rpartition("_")[2])
    assert step in (2, 3) and (folder / output / f"global_step_{step}") == stopped.value.checkpoint
    assert losses(verl.sft(settings(folder, output))) == losses(plain)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"model__partial_pretrain": "./nowhere"}, verl.UserError, "no such model directory"),
        ({"data__prompt_key": "questoin"}, verl.UserError, "questoin"),
        ({"trainer__logger": "fails.py"}, verl.UserError, "a logger of a user"),
        ({"trainer__logger": "runs_another.py"}, verl.UserError, "another run is active in this process"),
        ({"model__context_parallel_size": 2}, verl.UserError, "1 processes are not a multiple of 2"),
    ],
)
@pytest.mark.usefixtures("left_as_it_was")
def test_a_run_that_fails_leaves_nothing_behind(
    changes: dict[str, object], error: type[Exception], said: str, folder: Path, plain: verl.TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(error, match=said):
        verl.sft(settings(folder, "failed", **changes))
    shutil.rmtree(folder / "after-failed", ignore_errors=True)
    assert losses(verl.sft(settings(folder, "after-failed"))) == losses(plain)


def test_leaving_something_behind_would_be_noticed(left_as_it_was: None, request: pytest.FixtureRequest) -> None:
    before = process()
    dist.start()
    warnings.filterwarnings("ignore", "nothing")
    torch.rand(1)
    changed = {name for name, value in process().items() if value != before[name]}
    warnings.filters.pop(0)  # type: ignore[attr-defined]
    dist.stop()
    sys.excepthook = sys.__excepthook__ if before["errors"] is sys.__excepthook__ else before["errors"]  # type: ignore[assignment]
    torch.manual_seed(7)
    assert {"process group", "warnings", "random numbers"} <= changed


def test_a_session_restores_what_a_compiled_run_on_a_gpu_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on a CPU sets neither."""
    settings: Any = torch._dynamo.config
    monkeypatch.setattr(packed, "_kernel", "sdpa")
    with settings.patch(specialize_float=False):
        with session():
            use_attention(AttentionChoice("fa2"))
            settings.specialize_float = True
        assert (packed._kernel, settings.specialize_float) == ("sdpa", False)


def test_what_an_error_keeps_alive_holds_no_model() -> None:
    """A notebook keeps the last error for its debugger."""

    @session()
    def fails() -> None:
        model = torch.nn.Linear(2, 2)
        raise verl.UserError(f"wrong: {model}")

    with pytest.raises(verl.UserError) as caught:
        fails()
    (frame,) = [frame for frame, _ in traceback.walk_tb(caught.value.__traceback__) if frame.f_code.co_name == "fails"]
    assert frame.f_locals == {}


# Where it runs


@pytest.mark.usefixtures("left_as_it_was")
def test_in_a_thread_and_inside_a_running_event_loop(folder: Path, plain: verl.TrainResult) -> None:
    found = {}

    def work() -> None:
        found["thread"] = verl.sft(settings(folder, "thread"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    async def cell() -> verl.TrainResult:
        return verl.sft(settings(folder, "loop"))

    async def server() -> verl.TrainResult:
        return await asyncio.to_thread(verl.sft, settings(folder, "loop-thread"))

    found["loop"], found["a thread of a loop"] = asyncio.run(cell()), asyncio.run(server())
    assert {name: losses(run) for name, run in found.items()} == dict.fromkeys(found, losses(plain))


def test_a_second_run_at_the_same_time_is_refused(folder: Path) -> None:
    with session(), pytest.raises(verl.UserError, match="another run is active in this process\n  fix: wait until it has ended"):
        verl.sft(settings(folder, "at-once"))
    assert not (folder / "at-once").exists()


def test_a_process_group_that_the_program_made_stays(folder: Path, plain: verl.TrainResult) -> None:
    dist.start()
    group = torch.distributed.group.WORLD
    try:
        assert losses(verl.sft(settings(folder, "in-a-group"))) == losses(plain)
        assert torch.distributed.group.WORLD is group
    finally:
        dist.stop()


SCRIPT = """
import sys
import verl
from verl.data import tables

tables.BYTES_FOR_PROCESSES = 0
run = verl.sft({settings!r}, "data.num_workers=2", "data.cache_dir=" + sys.argv[1])
print(len(run.metrics), "steps")
"""


def test_a_script_that_guards_nothing_may_tokenize_in_many_processes(folder: Path, tmp_path: Path) -> None:
    """Each new interpreter would otherwise run the script again from its top."""
    plain_settings = {key: str(value) for key, value in settings(folder, "script").items() if not isinstance(value, dict)}
    plain_settings |= {"data.train_files": str(folder / "train.jsonl"), "data.train_batch_size": "6"}
    plain_settings |= {"model.partial_pretrain": str(folder / "model")}
    (tmp_path / "script.py").write_text(SCRIPT.format(settings=plain_settings))
    done = run_forked(tmp_path / "script.py", tmp_path / "cache", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("3 steps\n") and done.stdout.count("starting a new run") == 1


def test_the_examples_of_the_page_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.DOTALL)
    for name, rows in (("train.jsonl", 8), ("test.jsonl", 2)):
        (tmp_path / name).write_text("".join((folder / name).read_text().splitlines(keepends=True)[:rows]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    program = "\n".join(blocks).replace("Qwen/Qwen2.5-0.5B-Instruct", str(folder / "model"))
    assert "verl.evaluate" in program and "verl.load_rollout" in program
    exec(program, {})
    assert json.loads((tmp_path / "eval-run" / "results.json").read_text())["n"] == 2
    assert list((tmp_path / "checkpoints" / "larger-rate").glob("global_step_*"))


# Questions and answers


@pytest.fixture(scope="module")
def model(folder: Path, plain: verl.TrainResult) -> Iterator[verl.TextRollout]:
    assert plain.checkpoint is not None
    with verl.load_rollout(plain.checkpoint) as model:
        yield model


@pytest.mark.usefixtures("left_as_it_was")
def test_a_checkpoint_answers_as_its_evaluation_has_it(folder: Path, plain: verl.TrainResult, model: verl.TextRollout) -> None:
    found = verl.evaluate(
        {"model_path": plain.checkpoint, "test_file": folder / "test.jsonl", "output_dir": folder / "eval-answers", "max_new_tokens": 8}
    )
    answers = model.generate([row["prompt"] for row in found.rows], max_new_tokens=8)
    assert [str(answer) for answer in answers] == [row["response"] for row in found.rows]
    assert [answer.finish_reason for answer in answers] == [row["finish_reason"] for row in found.rows]


def test_a_question_may_be_a_text_a_chat_or_several_of_either(model: verl.TextRollout) -> None:
    question: Any = "How many?"
    chat: Any = [{"role": "user", "content": "How many?"}]
    (alone,) = model.generate(question, max_new_tokens=4)
    assert model.generate(chat, max_new_tokens=4) == [alone]
    assert model.generate([question, chat], max_new_tokens=4) == [alone, alone]
    assert model.generate([], max_new_tokens=4) == []
    drawn = model.generate([question, question], max_new_tokens=4, temperature=1.0, n=3, seed=5)
    assert len(drawn) == 6 and len({answer.text for answer in drawn}) > 1
    assert drawn == model.generate([question, question], max_new_tokens=4, temperature=1.0, n=3, seed=5)


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (7, "found int, expected a question or a list of questions"),
        ([7], "prompts: found 7"),
        ([[{"content": "Where?"}]], "role"),
        ("word " * 3000, "do not fit into the model's 2,048 positions"),
        (
            [{"role": "system", "content": "Be rude."}, {"role": "user", "content": "Hi"}],
            "trained with the template's default system prompt",
        ),
    ],
)
def test_a_question_that_cannot_be_asked_is_a_users_error(prompts: Any, said: str, model: verl.TextRollout) -> None:
    with pytest.raises(verl.UserError, match=said):
        model.generate(prompts, max_new_tokens=4)


@pytest.mark.parametrize(
    ("wrong", "where"),
    [({"max_new_tokens": -1}, "max_new_tokens"), ({"temperature": "hot"}, "temperature"), ({"n": 2}, "n"), ({"top_p": 0.0}, "top_p")],
)
def test_a_wrong_argument_of_generate_is_named(wrong: dict[str, Any], where: str, model: verl.TextRollout) -> None:
    with pytest.raises(verl.UserError) as caught:
        model.generate("How many?", **wrong)
    assert caught.value.where == where and caught.value.fix


def test_an_answer_ends_at_the_models_positions(model: verl.TextRollout) -> None:
    question = "word " * 670
    rendered: Any = model.tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    prompt = len(rendered["input_ids"])
    (answer,) = model.generate(question, max_new_tokens=4000)
    assert 2000 < prompt < 2048 and len(answer.token_ids) == 2048 - prompt and answer.finish_reason == "length"


def test_no_such_checkpoint_or_engine_is_a_users_error(folder: Path) -> None:
    with pytest.raises(verl.UserError, match="no such model directory"):
        verl.load_rollout("./nowhere")
    with pytest.raises(verl.UserError, match="did you mean 'native'"):
        verl.load_rollout(folder / "model", "natve")
