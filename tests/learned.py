"""A small checkpoint that has learned a few rows by heart."""

import json
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from verl.data.render import Renderer
from verl.models.load import load_tokenizer
from verl.models.tiny import write_tiny_model

SUMS = ((1, 2), (40, 5), (600, 50), (7, 1200))
ROWS = [{"question": f"What is {a} + {b}?", "answer": f"{a} + {b} = {a + b}\n#### {a + b:,}"} for a, b in SUMS]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_learned_checkpoint(folder: Path) -> Path:
    """A model that answers each question of ROWS with its answer."""
    write_tiny_model(folder, [row["question"] + row["answer"] for row in ROWS])
    renderer = Renderer(load_tokenizer(str(folder)))
    chats = [[{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}] for row in ROWS]
    documents = [renderer.chat(chat) for chat in chats]
    input_ids = pad_sequence([torch.tensor(document.input_ids) for document in documents], batch_first=True)
    trained = pad_sequence([torch.tensor(document.loss_mask) for document in documents], batch_first=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(500):
        loss = model(input_ids=input_ids, labels=input_ids.where(trained, -100)).loss
        if loss < 0.01:  # over some 70 tokens: the right one is the likeliest everywhere
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.01
    model.save_pretrained(folder)
    return folder
