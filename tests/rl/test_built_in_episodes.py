"""Episodes of the built-in environments by the trainer's own loop: a scripted model calls tools, in its template's format and in text."""

import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from forked import run_forked
from places import ROOT
from rl_runs import words, write_folder
from transformers import PreTrainedTokenizerBase

from verl.config.load import load_config
from verl.config.ppo import PPOConfig
from verl.data.prompts import Prompt
from verl.data.render import Renderer
from verl.errors import UserError
from verl.models.load import load_tokenizer
from verl.rl.episodes import Episodes
from verl.rl.outcome import DONE
from verl.rl.samples import Sample
from verl.rollout import Completion, Sampling
from verl.workers.serve import _descendants

# As Qwen's: tools are listed in the first message, and calls stand between tags.
WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\nTools: {% for tool in tools %}{{ tool | tojson }}{% endfor %}\n"
    'Call one with <tool_call>{"name": …, "arguments": …}</tool_call>.<|im_end|>\n{% endif %}'
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Speaker:
    """A rollout that says texts: those of a row, turn by turn."""

    positions = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[str]]):
        self._tokenizer, self._texts = tokenizer, texts
        self.stop_ids = Renderer(tokenizer).stop_ids

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None) -> list[Completion]:
        assert seeds is not None
        return [self._said(seed // 2**16, seed % 2**16) for seed in seeds]

    def _said(self, row: int, turn: int) -> Completion:
        ids = [*self._tokenizer(self._texts[row][turn]).input_ids, self.stop_ids[0]]
        return Completion(ids, "stop", None, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("built-in"))


def played(folder: Path, name: str, *texts: Sequence[str], template: str | None = None, rows: Any = None, **keys: Any) -> list[Sample]:
    """Play an episode for each list of turns."""
    own: dict[str, object] = {f"environment__{key}": value for key, value in keys.items()}
    lengths = {"rollout__max_new_tokens": 3000, "data__max_prompt_length": 3000, "data__max_tokens_per_micro_batch": 6000}
    config = load_config(PPOConfig, words(folder, "unused", environment__name=name, reward__name="null", **lengths, **own))
    tokenizer = load_tokenizer(str(folder / "model"))
    tokenizer.chat_template = template or tokenizer.chat_template
    chat = [{"role": "user", "content": "What is it?"}]
    ids = Renderer(tokenizer).prompt(chat)
    prompts = [
        (number, Prompt(f"row {number}", "What is it?", chat, ids, (rows or [{}] * len(texts))[number])) for number in range(len(texts))
    ]
    before = set(_descendants(os.getpid(), ()))
    episodes = Episodes(config, tokenizer)
    try:
        return episodes.play(Speaker(tokenizer, texts), prompts, Sampling(3000, 1.0, n=1, seed=1))  # type: ignore[arg-type]
    finally:
        episodes.close()
        left = set(_descendants(os.getpid(), ())) - before
        assert name == "python" or not left, "a process is left"


def checked(samples: Sequence[Sample]) -> list[Sample]:
    """Samples whose episodes have ended by themselves."""
    for sample in samples:
        assert sample.outcome is not None and not sample.outcome.errors, sample.outcome
        assert sample.outcome.ending == DONE
    return list(samples)


def call(name: str, **arguments: object) -> str:
    return f"I call.<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
def test_python_is_called_in_the_templates_format_and_in_text(folder: Path) -> None:
    turns = (call("python", code="x = 6"), call("python", code="x * 7"), "It is 42.")
    [tools] = checked(played(folder, "python", turns, template=WITH_TOOLS))
    assert tools.earlier == [turns[0], "(it printed nothing)", turns[1], "42"] and tools.text == "It is 42."
    assert '"name": "python"' in load_tokenizer(str(folder / "model")).decode(tools.prompt_ids)
    [text] = checked(played(folder, "python", ("So:\n```python\n6 * 7\n```", "It is 42."), tool_calls="false"))
    assert text.earlier[1] == "42"


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
def test_256_episodes_of_python_of_which_some_hang_and_some_crash_end_in_time(folder: Path) -> None:
    """A tenth hangs, a twentieth ends its process: the program is ended, the model reads why, and the episode goes on."""
    codes = ["while True: pass" if row % 10 == 0 else "import os; os._exit(1)" if row % 20 == 1 else f"{row}" for row in range(256)]
    began = time.monotonic()
    turns = [(f"```python\n{code}\n```", "Done.") for code in codes]
    samples = checked(played(folder, "python", *turns, code_seconds=1.0, tool_calls="false"))
    assert time.monotonic() - began < 1.0 + 10
    said = [sample.earlier[1] for sample in samples]
    assert sum(text == "(the program ran longer than 1 s; its variables are lost)" for text in said) == 26
    assert sum("exit code 1" in text for text in said) == 13
    assert [text for text, code in zip(said, codes, strict=True) if code.isdigit()] == [code for code in codes if code.isdigit()]


def test_search_finds_the_users_documents(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bm25s", reason="needs bm25s: pip install 'verl[search]'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "facts.jsonl").write_text('{"text": "Bees make honey."}\n{"text": "Cows give milk."}\n')
    turns = ("I look it up.\nsearch who makes honey", "Bees.")
    [sample] = checked(played(folder, "search", turns, documents=tmp_path / "facts.jsonl", tool_calls="false"))
    assert sample.earlier[1] == f"[1] {tmp_path}/facts.jsonl:1\nBees make honey."
    assert sample.outcome is not None and sample.outcome.metrics == {"searches": 1.0, "searches_without_hit": 0.0}


def test_a_game_of_gymnasium_is_won(folder: Path) -> None:
    pytest.importorskip("gymnasium", reason="needs gymnasium: pip install 'verl[gymnasium]'")
    keys = {"game": "FrozenLake-v1", "arguments": "{is_slippery: false}", "actions": "[left, down, right, up]"}
    won, lost = checked(played(folder, "gymnasium", ("down", "down", "right", "right", "down", "right"), ("right", "down"), **keys))
    assert [won.outcome.reward, lost.outcome.reward] == [1.0, 0.0]
    assert won.prompt.text.startswith("[S]FFF")


@pytest.mark.skipif(importlib.util.find_spec("verifiers") is None, reason="needs verifiers: make test-verifiers")
@pytest.mark.filterwarnings("ignore")
def test_the_example_of_verifiers_plays_its_own_rows_in_processes_of_their_own(folder: Path, tmp_path: Path) -> None:
    from verl.environments.verifiers import write_rows

    package = ROOT / "examples/environments/sums_verifiers.py"
    write_rows(tmp_path / "rows.jsonl", str(package), most=2)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    numbers = [list(map(int, re.findall(r"\d+", row["question"]))) for row in rows]
    turns = [(call("add", a=a, b=b), f"It is {a + b}.") for a, b in numbers]
    wrong = [(call("add", a=1, b=1), "It is 2000.")]
    samples = checked(played(folder, "verifiers", *turns, *wrong, template=WITH_TOOLS, rows=[*rows, rows[0]], package=package))
    assert [sample.earlier[1] for sample in samples] == [*(row["answer"] for row in rows), "2"]
    assert [sample.outcome.reward for sample in samples if sample.outcome] == [1.0, 1.0, 0.0]
    assert [sample.outcome.metrics["add_calls"] for sample in samples if sample.outcome] == [1.0, 1.0, 1.0]


def test_the_example_of_the_frozen_lake_runs(tmp_path: Path) -> None:
    pytest.importorskip("gymnasium", reason="needs gymnasium: pip install 'verl[gymnasium]'")
    words = f"--folder {tmp_path / 'run'} --walks 40 --sft-steps 1 --rl-steps 1".split()
    done = run_forked(ROOT / "examples/environments/frozen_lake.py", *words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r"walks that reach the other side: [0-9.]+% in the first step .*, [0-9.]+% in the last", done.stdout.splitlines()[-1]
    )


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("search", {"documents": "nowhere.jsonl"}, "environment.documents"),
        ("gymnasium", {"game": "FrozenLeak-v1"}, "environment.game"),
        ("python", {"memory_mib": 1}, "environment.memory_mib"),
        ("python", {"modules": "[no_such_module]"}, "no_such_module"),
    ],
)
def test_what_cannot_be_played_is_an_error_before_the_first_episode(folder: Path, name: str, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        played(folder, name, ("x",), **keys)
