"""Trained weights and optimizer state on disk, in the format of torch.distributed.checkpoint.

`dcp.save` plans, writes and finishes in one collective call. Here these are three steps, so that no process waits for another one's disk,
and a thread can write while training goes on: all ranks plan together, each rank writes alone, and rank 0 finishes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from verl import dist


class _Planner(DefaultSavePlanner):
    """Takes each tensor from `tensors`: this rank's shard, which may be a copy."""

    tensors: Mapping[str, Tensor]

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.tensors[index.fqn]


@dataclass(frozen=True)
class StoredState:
    """What each rank writes of a nested dict of tensors.

    Attributes:
        plan: what this rank writes.
        metadata: description of all tensors.
    """

    planner: _Planner
    plan: SavePlan
    metadata: Metadata

    @staticmethod
    def planned(state: dict[str, Any]) -> "StoredState":
        """Divide the tensors among the ranks. Every rank calls it. The plan serves all tensors of the same names, shapes and dtypes."""
        planner = _Planner()
        planner.set_up_planner(state_dict=state, is_coordinator=dist.is_main())
        plans, metadata = planner.create_global_plan(dist.gathered(planner.create_local_plan()))
        plans = FileSystemWriter(".").prepare_global_plan(plans)
        return StoredState(planner, planner.finish_plan(plans[dist.rank()]), metadata)

    @property
    def size_bytes(self) -> int:
        """The bytes of all tensors, of all ranks together."""
        tensors = [one for one in self.metadata.state_dict_metadata.values() if isinstance(one, TensorStorageMetadata)]
        return sum(math.prod(one.size) * one.properties.dtype.itemsize for one in tensors)

    def write(self, directory: Path, tensors: Mapping[str, Tensor]) -> list[WriteResult]:
        """Write this rank's part and wait until it is on disk. No other rank is waited for.

        Args:
            tensors: this rank's shards by `local_tensors`' names.
        """
        self.planner.tensors = tensors
        results: list[WriteResult] = FileSystemWriter(directory).write_data(self.plan, self.planner).wait()
        return results

    def finish(self, directory: Path, results: list[list[WriteResult]]) -> None:
        """Write `.metadata`, after all ranks have written; rank 0 calls it with the results of each rank."""
        FileSystemWriter(directory).finish(self.metadata, results)


def local_tensors(state: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Return this rank's shards of a nested dict of tensors by their names, such as `optimizer.model.norm.weight.exp_avg`."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            found |= local_tensors(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value.to_local() if isinstance(value, DTensor) else value
    return found
