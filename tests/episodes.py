"""Environments for tests, who plays in them, and keys of runs."""

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rl_runs import words, write_folder
from transformers import PreTrainedTokenizerBase

from verl.config.load import load_config
from verl.config.ppo import PPOConfig
from verl.data.prompts import Prompt
from verl.data.render import Renderer
from verl.models.load import load_tokenizer
from verl.rl.episodes import Episodes
from verl.rl.samples import Sample
from verl.rollout import Completion, Sampling
from verl.workers.serve import _descendants

# An environment that goes on for `environment.turns` turns, in its own words. What it does besides depends on the row.
TALK = """
import asyncio, os, random, time
from dataclasses import dataclass

from verl.environments import Start, Step


@dataclass
class Settings:
    # talk: turns of a talk.
    turns: int = 3
    # talk: the longest nap before an answer, in seconds.
    nap: float = 0.0


class Environment:
    def __init__(self, settings):
        self.settings, self.turn, self.log = settings, 0, []

    def reset(self, row, seed):
        self.row, self.draw = row, random.Random(seed)
        self.begin(row.get("in", "step"), "reset")
        return Start([{"role": "user", "content": row.get("first", f"Talk to me, {self.draw.randint(1, 99)}.")}])

    async def step(self, message):
        await asyncio.sleep(self.settings.nap * random.SystemRandom().random())
        self.begin(self.row.get("in", "step"), "step")
        if self.row.get("does") == "await":
            await asyncio.Event().wait()
        self.turn += 1
        said = self.row.get("says", f"Go on, {self.draw.randint(1, 99)}.")
        done = self.turn == self.settings.turns
        words = {"words": len(message["content"].split())}
        return Step([{"role": "user", "content": said}], reward=0.5 * self.turn, done=done, metrics=words)

    def begin(self, where, here):
        does = self.row.get("does") if where == here else None
        if does == "raise":
            raise ValueError("no more words")
        if does == "sleep":
            time.sleep(1e6)
        if does == "spin":
            while True:
                pass
        if does == "leave":
            os._exit(7)

    def close(self):
        if "log" in self.row:
            with open(self.row["log"], "a") as file:
                file.write(f"{self.turn}\\n")
        if self.row.get("does") == "raise in close":
            raise OSError("not closed")
        if self.row.get("does") == "sleep in close":
            time.sleep(1e6)
"""
QUESTION = "How many?"


# The native engine, for which many tokens end a turn: those of a model that has learned nothing would go on.
STOPPING = """
from verl.rollout import native


def some(tokenizer):
    return list(range(0, len(tokenizer), 3))


def share(model, path, tokenizer, stop_ids, options):
    return native.share(model, path, tokenizer, some(tokenizer), options)


def load(path, tokenizer, stop_ids, options):
    return native.load(path, tokenizer, some(tokenizer), options)
"""


def write_talk(folder: Path) -> Path:
    write_folder(folder)
    (folder / "talk.py").write_text(TALK)
    (folder / "stopping.py").write_text(STOPPING)
    return folder


def processes_here() -> set[int]:
    """Processes that this one has started."""
    return set(_descendants(os.getpid(), ()))


class Chatter:
    """A rollout that says tokens of the seed, and ends each turn with the stop token."""

    positions = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, longest: int = 6):
        self.stop_ids = Renderer(tokenizer).stop_ids
        special = set(tokenizer.added_tokens_decoder)
        self._ordinary = [token for token in range(len(tokenizer)) if token not in special]
        self._longest = longest
        self.said: dict[int, list[int]] = {}  # by the seed

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None) -> list[Completion]:
        assert seeds is not None and sampling.n == 1
        return [self._answer(prompt, sampling, seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    def _answer(self, prompt: list[int], sampling: Sampling, seed: int) -> Completion:
        draw = random.Random(seed)
        ids = [*draw.choices(self._ordinary, k=draw.randint(1, self._longest)), self.stop_ids[0]]
        self.said[seed] = ids
        ended = len(ids) <= sampling.max_new_tokens
        ids = ids[: sampling.max_new_tokens]
        return Completion(ids, "stop" if ended else "length", [-0.5] * len(ids), 3)


class Table:
    """Whoever plays, and rows to play."""

    def __init__(self, folder: Path, name: str = "talk.py", tokenizer: PreTrainedTokenizerBase | None = None, **changes: object):
        own: dict[str, object] = {"environment__name": folder / name if name.endswith(".py") else name, "reward__name": "null"}
        changed = {"rollout__max_new_tokens": 400, "data__max_tokens_per_micro_batch": 2000, **own, **changes}
        self.config = load_config(PPOConfig, words(folder, "unused", **changed))
        self.tokenizer = tokenizer or load_tokenizer(str(folder / "model"))
        self.renderer = Renderer(self.tokenizer)
        self.chatter: Any = Chatter(self.tokenizer)
        self.sampling = Sampling(self.config.rollout.max_new_tokens, 1.0, n=1, seed=1)

    def prompts(self, rows: Sequence[dict[str, Any]]) -> list[tuple[int, Prompt]]:
        chat = [{"role": "user", "content": QUESTION}]
        return [(number, Prompt(f"row {number}", QUESTION, chat, self.renderer.prompt(chat), dict(row))) for number, row in enumerate(rows)]

    def play(self, *rows: dict[str, Any], n: int = 1) -> list[Sample]:
        before = processes_here()
        episodes = Episodes(self.config, self.tokenizer)
        try:
            return episodes.play(self.chatter, self.prompts(rows), Sampling(self.sampling.max_new_tokens, 1.0, n=n, seed=1))
        finally:
            episodes.close()
            assert processes_here() <= before, "a process is left"


def endings(samples: Sequence[Sample]) -> list[str]:
    return [sample.outcome.ending for sample in samples if sample.outcome is not None]


def errors(samples: Sequence[Sample]) -> list[str]:
    return [str(error) for sample in samples if sample.outcome is not None for error in (*sample.outcome.errors, *sample.outcome.unclosed)]


def keys_of_talk(folder: Path) -> dict[str, object]:
    return {
        "environment__name": folder / "talk.py",
        "reward__name": "null",
        "rollout__max_new_tokens": 60,
        "data__max_tokens_per_micro_batch": 800,
    }


def guesses(folder: Path) -> dict[str, object]:
    rows = [{"question": QUESTION, "answer": "1", "secret": number % 7 + 1} for number in range(20)]
    (folder / "secrets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        **keys_of_talk(folder),
        "environment__name": "guess",
        "rollout__name": str(folder / "stopping.py"),
        "data__train_files": folder / "secrets.jsonl",
        "rollout__max_new_tokens": 100,
    }
