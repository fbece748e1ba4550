"""Pairs of a right and a wrong answer, and a small model, for the tests of `verl reward`."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from verl.demo.problems import Problem, make_problems
from verl.models.tiny import tiny_tokenizer


def write_pairs_and_model(folder: Path, rows: int = 4000) -> Path:
    """Write pairs to train.jsonl and test.jsonl, and a model of two narrow layers. Returns the folder."""
    train, test = make_problems(rows, 200, seed=1)
    write_pairs(folder / "train.jsonl", train)
    write_pairs(folder / "test.jsonl", test)
    tokenizer = tiny_tokenizer([f"{problem.question}\n{problem.answer}" for problem in train])
    tokenizer.save_pretrained(folder / "model")
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    ids: dict[str, Any] = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    config = Qwen2Config(**shape, **ids, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.125)
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    return folder


def write_pairs(path: Path, problems: list[Problem]) -> list[dict[str, str]]:
    """Each problem with its right answer, and with the right answer of another one."""
    draw = random.Random(0)
    rows = []
    for problem in problems:
        wrong = next(answer for answer in iter(lambda: draw.choice(problems).answer, "") if answer != problem.answer)
        rows.append({"prompt": problem.question, "chosen": problem.answer, "rejected": wrong})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows
