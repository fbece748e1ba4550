"""Small reward models, and what transformers says of answers with them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import qwen2_config, write_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen2ForSequenceClassification,
)

from verl.demo.problems import make_problems
from verl.models.tiny import tiny_tokenizer

PROBLEMS, _ = make_problems(40, 1, seed=2)
PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"


def scores_of_transformers(path: Path, chats: list[list[dict[str, str]]], answers: list[str]) -> np.ndarray:
    """One padded batch through the class that everybody uses."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    whole = [[*chat, {"role": "assistant", "content": answer}] for chat, answer in zip(chats, answers, strict=True)]
    inputs: Any = tokenizer.apply_chat_template(whole, padding=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        return model(**inputs).logits[:, 0].numpy()


def write_reward_model(path: Path, *, template: str | None = None, llama: bool = False, labels: int = 1) -> Path:
    tokenizer = tiny_tokenizer([f"{problem.question}\n{problem.answer}" for problem in PROBLEMS[: 10 if template else 40]])
    tokenizer.chat_template = template or tokenizer.chat_template
    keys: dict[str, Any] = {"vocab_size": len(tokenizer), "num_labels": labels, "pad_token_id": tokenizer.pad_token_id}
    if llama:
        shape: dict[str, Any] = dict(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
        )
        write_model(path, LlamaConfig(**shape, **keys), kind=LlamaForSequenceClassification)
    else:
        write_model(path, qwen2_config(**keys), kind=Qwen2ForSequenceClassification)
    tokenizer.save_pretrained(path)
    return path
