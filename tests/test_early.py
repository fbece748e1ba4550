"""A wrong command line ends before torch is imported, in half a second."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from verl import early, plugin
from verl.commands import CHAT, EXPORT, PPO, REWARD, SFT
from verl.config.load import describe, load_config
from verl.config.pairs import RewardTrainerConfig
from verl.config.ppo import PPOConfig
from verl.errors import UserError
from verl.plugin_outline import outlined

NEEDED = "data.train_files=train.jsonl model.partial_pretrain=Qwen/Qwen2.5-0.5B"
ATTEXIT = (
    "import atexit, runpy, sys; atexit.register(lambda: print('torch' in sys.modules)); "
    "sys.argv = ['verl', *sys.argv[1:]]; from verl.cli import main; main()"
)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize(
    "words",
    [
        "train data.train_files=train.jsonl",
        f"sft {NEEDED} leraning_rate=1",
        f"sft {NEEDED} optim.lr=abc",
        "sft data.train_files=trian.jsonl model.partial_pretrain=Qwen/Qwen2.5-0.5B",
        "sft data.train_files=train.jsonl model.partial_pretrain=./nothing",
        f"ppo {NEEDED} algorithm.kl_coeff=1",
        f"ppo {NEEDED} algorithm.loss_aggregation=sum",
        f"reward {NEEDED} algorithm.name=dpo algorithm.beta=x",
        "eval model_path=m test_file=nothing.jsonl output_dir=o",
        "chat ./nothing",
        "sft --gpus 2 optim.lrr=1",
        "ppo --help",
        f"sft {NEEDED} samples.metric=gsm8kk",
        f"sft {NEEDED} trainer.save_freq=1.5",
        "sft data.train_files= model.partial_pretrain=Qwen/Qwen2.5-0.5B",
        "eval model_path=m test_file=train.jsonl output_dir=done",
        "eval done --against train.jsonl",
        "export model done",
        "export model new --hub bad//name",
        "inspect data.train_files=train.jsonl model.partial_pretrain=model --row two",
        "inspect data.train_files=train.jsonl model.partial_pretrain=model --html done",
        "inspect data.train_files=train.jsonl,other.jsonl model.partial_pretrain=model",
        "prove model --json done",
    ],
)
def test_torch_is_not_imported_for_it(words: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "results.json").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}')
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", ATTEXIT, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == (0 if "--help" in words else 2), done.stderr
    assert done.stdout.splitlines()[-1] == "False", done.stderr
    # Of the processor's time: on a busy machine, more passes on the clock.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.8


def test_a_module_is_checked_as_the_command_is(tmp_path: Path) -> None:
    words = [sys.executable, "-X", "importtime", "-m", "verl.trainer.ppo_trainer", "optim.lrr=1"]
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path, timeout=60)
    assert done.returncode == 2 and "unknown key 'optim.lrr'" in done.stderr
    assert " omegaconf" in done.stderr and " torch\n" not in done.stderr


@pytest.mark.parametrize(("schema", "words"), [(PPOConfig, [f"algorithm.name={name}"]) for name in ("ppo", "grpo", "dapo", "gspo")])
def test_an_outline_has_the_keys_of_the_whole_plugin(schema: type, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = describe(schema, words)
    for name in [name for name in sys.modules if name.startswith("verl.algorithms.") and "_settings" not in name]:
        monkeypatch.delitem(sys.modules, name)
    with outlined():
        assert describe(schema, words) == whole
        outlines = [name for name in sys.modules if name.endswith("(outline)")]
    assert f"verl.algorithms.{words[0].partition('=')[2]} (outline)" in outlines


def test_outlines_are_for_checks_alone() -> None:
    with outlined():
        load_config(RewardTrainerConfig, [*NEEDED.split(), "algorithm.name=dpo"])
    assert callable(plugin.load("verl.algorithms", "dpo", needs=("Loss",)).Loss)


def test_words_that_stand_alone_get_the_names_of_their_keys() -> None:
    assert early.named(CHAT, ["DIR", "temperature=0"]) == ["model_path=DIR", "temperature=0"]
    assert early.named(CHAT, ["--best", "DIR"]) == ["--best", "model_path=DIR"]
    assert early.named(CHAT, ["temperature=0", "model_path=DIR"]) == ["temperature=0", "model_path=DIR"]
    assert early.named(CHAT, ["--config", "chat.yaml"]) == ["--config", "chat.yaml"]
    assert early.named(EXPORT, ["A", "B", "dtype=float32"]) == ["source=A", "directory=B", "dtype=float32"]
    assert early.named(CHAT, ["DIR", "--temperature", "0", "--max-new-tokens=9", "--trust-remote-code"]) == [
        "model_path=DIR",
        "temperature=0",
        "max_new_tokens=9",
        "trust_remote_code=true",
    ]
    with pytest.raises(UserError, match="--system needs a value"):
        early.named(CHAT, ["DIR", "--system"])
    for command in (SFT, PPO, REWARD):
        assert early.named(command, ["a=b", "word"]) == ["a=b", "word"], "which the config refuses"
    assert early.named(EXPORT, ["A"]) == ["source=A"], "which may go to the Hub"
    with pytest.raises(UserError, match="a checkpoint must be given"):
        early.named(CHAT, [])


def test_a_hub_that_cannot_be_reached_is_said_at_once_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    words = ["-m", "verl", "sft", "data.train_files=train.jsonl", "model.partial_pretrain=nobody/no-such-model-here"]
    away = {"HF_HUB_OFFLINE": "", "HF_ENDPOINT": "http://127.0.0.1:9", **dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "")}
    away |= {name.upper(): "" for name in away if name.endswith("_proxy")}
    for variables, what in ((away, "http://127.0.0.1:9 cannot be reached"), ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set")):
        done = subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, env={**ENVIRONMENT, **variables}, cwd=tmp_path, timeout=60
        )
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 2, done.stderr
        assert what in done.stderr and "set HF_ENDPOINT to a mirror" in done.stderr
