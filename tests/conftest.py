"""No test needs a network; tests marked `gpu` say why they were skipped."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not needs_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needs_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, none was found"))


@pytest.fixture(scope="session")
def learned_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that answers the rows of tests/learned.py."""
    from learned import write_learned_checkpoint

    return write_learned_checkpoint(tmp_path_factory.mktemp("learned") / "checkpoint")
