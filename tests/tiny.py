"""Small real models and documents that several tests share."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from verl.data.loader import RowChoice
from verl.data.pack import Document
from verl.demo.problems import write_problems
from verl.models.tiny import tiny_model, tiny_tokenizer

VOCABULARY = 512


def qwen2_config(**changes: Any) -> Qwen2Config:
    shape: dict[str, Any] = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return Qwen2Config(**{**shape, "vocab_size": VOCABULARY, "max_position_embeddings": 512, "tie_word_embeddings": True, **changes})


def write_model(
    directory: Path,
    config: PretrainedConfig | None = None,
    *,
    kind: type[PreTrainedModel] = Qwen2ForCausalLM,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A model with random weights, far enough from zero that every part of it shows in the logits."""
    torch.manual_seed(0)
    model = kind(config or qwen2_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(directory)  # type: ignore[arg-type]
    return directory


def write_problems_and_model(folder: Path, train_rows: int = 80, test_rows: int = 20, *, narrow: bool = True) -> Path:
    """Problems of the demo in train.jsonl and test.jsonl, and a small model with its tokenizer.

    Args:
        narrow: whether it has a sixth of the demo's weights, which is enough for a few steps.
    """
    train, _ = write_problems(folder / "train.jsonl", folder / "test.jsonl", train_rows, test_rows, seed=5)
    tokenizer = tiny_tokenizer(f"{p.question}\n{p.answer}" for p in train)
    model = tiny_model(tokenizer)
    if narrow:
        changes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "layer_types": None, "initializer_range": 0.1}
        torch.manual_seed(1)
        demo, model = model, Qwen2ForCausalLM(Qwen2Config(**{**model.config.to_dict(), **changes}))
        model.generation_config = demo.generation_config
    tokenizer.save_pretrained(folder / "model")
    model.save_pretrained(folder / "model")
    return folder


def unequal_documents() -> list[Document]:
    """Eight documents of 3 to 300 tokens. Of the first one, a single token is trained."""
    random = np.random.default_rng(3)
    lengths = (3, 300, 17, 5, 120, 64, 200, 9)
    return [(random.integers(0, VOCABULARY, n).astype(np.int32), np.arange(n) >= (2 if n == 3 else random.integers(1, n))) for n in lengths]


class RandomDocuments:
    """Documents of random tokens, the last half of each trained."""

    documents_per_row = 1
    values: dict[str, list[np.ndarray]] = {}  # noqa: RUF012
    choice: RowChoice | None = None

    def __init__(self, number: int = 24, *, longest: int = 60, seed: int = 0, vocabulary: int = VOCABULARY):
        random = np.random.default_rng(seed)
        lengths = random.integers(3, longest, number)
        self._documents: list[Document] = [
            (random.integers(0, vocabulary, n).astype(np.int32), np.arange(n) >= random.integers(1, n)) for n in lengths
        ]
        self.lengths_N = lengths.astype(np.int32)
        self.trained_N = np.array([mask[1:].sum() for _, mask in self._documents], dtype=np.int32)

    def __len__(self) -> int:
        return len(self._documents)

    def document(self, index: int) -> Document:
        return self._documents[index]


def sharp(kind: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """Random weights far enough from zero that a token depends on everything before it."""
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    model.generation_config = GenerationConfig()
    return model
