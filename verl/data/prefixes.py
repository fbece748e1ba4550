"""The beginnings that documents of a batch share, and who attends to them. `verl.data.groups` packs such batches.

Dimensions: S segments of the batch: documents, prefixes and filler; G groups of documents with a prefix.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Sizes(NamedTuple):
    """Numbers of tokens.

    Attributes:
        longest_segment, longest_group, longest_prefix: most tokens of a segment, of the documents of a group, and of a prefix.
        group_tokens: tokens of all groups' documents, which come first in the batch.
        first_token: index of the first token of the first prefix.
        prefix_tokens: tokens of all prefixes.
    """

    longest_segment: int
    longest_group: int
    longest_prefix: int
    group_tokens: int
    first_token: int
    prefix_tokens: int


class Prefixes(NamedTuple):
    """The prefixes of a batch, and who attends to them. Offsets are int32 and start at 0.

    Attributes:
        segment_bounds: S + 1 offsets of the segments, in each of which attention is causal.
        group_bounds: G + 1 offsets of the tokens of each group's documents.
        prefix_bounds: G + 1 offsets of the prefixes, counted from the first token of the first prefix.
        sizes: `Sizes`, int64, always in host memory. A tensor, because compiled code takes equal numbers for one and the same.
        longest_document: most tokens of a prefix with one of its documents.
    """

    segment_bounds: Tensor
    group_bounds: Tensor
    prefix_bounds: Tensor
    sizes: Tensor
    longest_document: int

    @property
    def numbers(self) -> Sizes:
        return Sizes(*self.sizes.tolist())

    def with_offsets(self, change: Callable[[Tensor], Tensor]) -> "Prefixes":
        """Return a copy with changed offsets, such as a copy on another device."""
        segments, groups, prefixes = map(change, (self.segment_bounds, self.group_bounds, self.prefix_bounds))
        return self._replace(segment_bounds=segments, group_bounds=groups, prefix_bounds=prefixes)

    def prefix_of_segment(self) -> dict[int, int]:
        """Return the segment of the prefix of each segment that has one."""
        starts, sizes = self.segment_bounds[:-1].tolist(), self.numbers
        group_S = (torch.searchsorted(self.group_bounds, self.segment_bounds[:-1], right=True) - 1).tolist()
        first = starts.index(sizes.first_token)
        return {s: first + group_S[s] for s, start in enumerate(starts) if start < sizes.group_tokens}
