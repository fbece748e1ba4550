"""A step of preference training holds as much memory as one of fine-tuning on the same tokens: its reference is no second model.

On a CPU, by the tensors that PyTorch makes. `benchmarks/preference_memory.py` compares whole runs on a GPU.
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks.methods import METHODS, PREFERENCES, with_numbers
from tiny import qwen2_config, write_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from verl.config.shared import OptimConfig
from verl.data.pack import collate
from verl.engine.engine import Engine
from verl.engine.scorers import TokenScorer
from verl.models.load import load_for_training

pytestmark = pytest.mark.usefixtures("process_group")
VOCABULARY, TOKENS, ANSWERS = 6000, 96, 8


class Held(TorchDispatchMode):
    """The most bytes that tensors made in this context held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), qwen2_config(vocab_size=VOCABULARY))


def peak_of_step(model: Path, method: str, before: Callable[[Engine], None] = lambda engine: None) -> int:
    """Bytes at the peak of the second step, whose moments are there, on eight documents of which the last half is trained."""
    draw = np.random.default_rng(0)
    documents = [(draw.integers(0, VOCABULARY, TOKENS), np.arange(TOKENS) >= TOKENS // 2) for _ in range(ANSWERS)]
    batch = with_numbers(collate(documents, range(ANSWERS)))
    batch = replace(batch, ref_logprob_M=torch.full((len(batch.trained_M),), -8.0))
    cpu, scorer = torch.device("cpu"), TokenScorer(load_for_training(str(model)).model)
    engine = Engine(scorer, OptimConfig(clip_grad=1.0), total_steps=3, device=cpu, compute_dtype=torch.float32)
    engine.train_step([batch], METHODS[method], 0)
    with Held() as held:
        before(engine)
        engine.train_step([batch], METHODS[method], 1)
    return held.most


@pytest.mark.parametrize("method", PREFERENCES)
def test_a_step_holds_what_one_of_fine_tuning_holds(method: str, model: Path) -> None:
    assert peak_of_step(model, method) < 1.15 * peak_of_step(model, "sft")


def test_a_second_model_would_be_seen(model: Path) -> None:
    copies: list[Any] = []

    def add_reference(engine: Engine) -> None:
        copies.extend(parameter.detach().clone() for parameter in engine.trained)

    assert peak_of_step(model, "dpo", add_reference) > 1.15 * peak_of_step(model, "sft")
