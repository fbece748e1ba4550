"""Texts with labels, and a small model for them."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from runs import as_words
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

from verl.models.tiny import tiny_tokenizer

WORDS = {"negative": "bad poor awful dull", "neutral": "so okay average plain", "positive": "good great fine lovely"}
NOUNS = "film book meal song game room".split()
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.125,
}


def texts_with_labels(rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts of several lengths whose label is that of one word."""
    draw = random.Random(seed)
    found = []
    for _ in range(rows):
        label = draw.choice(list(WORDS))
        more = " ".join(f"and the {draw.choice(NOUNS)}" for _ in range(draw.randrange(3)))
        found.append({"text": f"the {draw.choice(NOUNS)} {more} was {draw.choice(WORDS[label].split())}", "label": label})
    return found


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_model(folder: Path, *, labels: int = 0, seed: int = 0, **keys: Any) -> Path:
    """A language model of two narrow layers; with labels, a classifier with a random head."""
    tokenizer = tiny_tokenizer([row["text"] for row in texts_with_labels(100)])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    ids: dict[str, Any] = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    more: dict[str, Any] = {"num_labels": labels} if labels else {}
    kind = Qwen2ForSequenceClassification if labels else Qwen2ForCausalLM
    kind(Qwen2Config(**SHAPE, **ids, **more, **keys, tie_word_embeddings=True)).save_pretrained(folder)
    return folder


def words(folder: Path, output: str, **changes: object) -> list[str]:
    """Words of `verl reward` for the rows and the model of a folder."""
    keys: dict[str, object] = {
        "algorithm.name": "classify",
        "data.train_files": folder / "train.jsonl",
        "data.max_length": 64,
        "data.train_batch_size": 8,
        "model.partial_pretrain": folder / "model",
        "model.enable_gradient_checkpointing": False,
        "trainer.total_training_steps": 6,
        "trainer.default_local_dir": folder / output,
        "trainer.save_freq": -1,
        "optim.lr": 1e-3,
    }
    return as_words(keys, changes)
