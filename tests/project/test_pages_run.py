"""The commands of the README and of other pages run, as a reader types them, on generated problems and a small model."""

import json
import re
import shutil
from pathlib import Path

import pytest
from pages import commands, text_of
from places import ROOT
from tiny import write_problems_and_model
from typer.testing import CliRunner

from verl import cli
from verl.demo.problems import make_problems

# What brings a command down to the size of a test.
SMALLER = {
    "ppo": "data.prompts_per_step=2 rollout.samples_per_prompt=2 rollout.max_new_tokens=8 trainer.total_training_steps=1",
    "reward": "data.train_batch_size=4 data.max_length=256 trainer.total_training_steps=1",
    "eval": "max_samples=2 max_new_tokens=8",
    "chat": "max_new_tokens=8",
}
# Pages whose commands run after the README's, from its checkpoint.
AFTER = (
    "docs/lora.md",
    "docs/preferences.md",
    "docs/distillation.md",
    "docs/runs.md",
    "docs/export.md",
    "docs/zh/lora.md",
    "docs/zh/rl.md",
)
README = [words for words in commands(text_of("README.md")) if words[0] == "verl"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reader is: the three files of the README, and a model."""
    folder = write_problems_and_model(tmp_path_factory.mktemp("reader"), train_rows=12, test_rows=2)
    first, second = make_problems(2, 1, seed=5)[0]
    pairs = [
        {"prompt": first.question, "chosen": first.answer, "rejected": second.answer},
        {"prompt": second.question, "chosen": second.answer, "rejected": first.answer},
    ] * 2
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


def typed(words: list[str], folder: Path) -> list[str]:
    """The words with what the reader has in place of Qwen's models, of step 100 and of the demo's run."""
    saved = sorted((folder / "checkpoints" / "verl-sft" / "run").glob("global_step_*"))
    here = [re.sub(r"Qwen/[\w.-]+", str(folder / "model"), word) for word in words[1:]]
    here = [word.replace("demo-run/checkpoints", "checkpoints/verl-sft/run") for word in here]
    here = [word.replace("global_step_100", saved[-1].name) if saved else word for word in here]
    return here + SMALLER.get(words[1], "").split()


def run(commands: list[list[str]], folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for words in commands:
            done = CliRunner().invoke(cli.app, typed(words, folder), input="What is 1 + 1?\n")
            assert done.exit_code == 0, f"{' '.join(words)}\n{done.output[-3000:]}"


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """The same, after the README's commands; the report, which follows the demo there, is the last."""
    run(sorted(README, key=lambda words: words[1] == "report"), folder)
    return folder


def test_the_readmes_commands_run_in_their_order(trained: Path) -> None:
    results = json.loads((trained / "checkpoints" / "verl-sft" / "run" / "eval" / "results.json").read_text())
    assert results["n"] == 2 and (trained / "my-model" / "model.safetensors").is_file()
    assert (trained / "checkpoints" / "verl-sft" / "run" / "report.html").is_file()
    written = {path.parent.relative_to(trained / "checkpoints").as_posix() for path in (trained / "checkpoints").rglob("global_step_*")}
    assert written >= {"verl-sft/run", "verl-sft/run-2", "verl-rl/run", "verl-reward/run"}


@pytest.mark.parametrize("page", AFTER)
def test_the_commands_of_a_page_run(page: str, trained: Path) -> None:
    found = [words for words in commands(text_of(page)) if words[0] == "verl" and "model.load_in_4bit=true" not in words]
    found = [words for words in found if not any("examples/preferences/" in word for word in words)]  # test_preference_examples has them
    assert found
    for target in (trained / "my-model", trained / "eval-run"):
        shutil.rmtree(target, ignore_errors=True)
    run(found, trained)


def test_the_readme_in_chinese_has_the_same_commands() -> None:
    chinese = [words for words in commands(text_of("README.zh-CN.md")) if words[0] == "verl"]
    assert chinese == README and len(README) == 9
