"""Documents that begin alike, packed with their common beginning once: the answers to a prompt, or the two answers of a pair.

A group's prefix is what its documents have in common before their trained tokens: the prompt without its last token. In the batch, each
document begins after the prefix, with the prompt's last token, which has another target in each document. Its positions go on where the
prefix ends, and it attends to the prefix and to itself (verl.models.attention.shared). The order of tokens is

    documents of group 0 | documents of group 1 | … | documents alone | prefix 0 | prefix 1 | … | filler

So for everything but attention, documents are what they are in any batch, and the prefixes are a part of the filler behind them.

Dimensions: T tokens of the batch; G groups with a prefix; A tokens of their documents, which come first.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from verl.data.batch import Batch
from verl.data.pack import Document, collate, pack
from verl.data.prefixes import Prefixes, Sizes

# A prefix costs a second call of attention, so a group shares one only if it has this many tokens and saves this share of the group's.
SHORTEST, SMALLEST_SHARE = 16, 1 / 8
NOTHING = np.zeros(0, dtype=np.float32)


@dataclass(frozen=True)
class Group:
    """Documents that stay in one micro-batch.

    Attributes:
        numbers: numbers of the documents.
        shared: number of tokens of their prefix; 0: they share none.
        tokens: number of their tokens in a batch, with the prefix.
    """

    numbers: tuple[int, ...]
    shared: int
    tokens: int


def shared_tokens(documents: Sequence[Document]) -> int:
    """Return the number of tokens that documents can share; 0 if it is not worth it.

    They are equal in all documents. Neither they nor the first token after them is trained, and each document keeps a token.
    """
    if len(documents) == 1:
        return 0
    first, _ = documents[0]
    most = min(_before_trained(document) for document in documents)
    for ids, _ in documents[1:]:
        differs = np.flatnonzero(ids[:most] != first[:most])
        most = int(differs[0]) if len(differs) else most
    saved, tokens = (len(documents) - 1) * most, sum(len(ids) for ids, _ in documents)
    return most if most >= SHORTEST and saved >= SMALLEST_SHARE * tokens else 0


def _before_trained(document: Document) -> int:
    ids, mask = document
    trained = np.flatnonzero(mask[1:])
    return int(trained[0]) if len(trained) else len(ids) - 1


def grouped(numbers: Sequence[int], document: Callable[[int], Document]) -> Group:
    """Return documents as one group, which shares a prefix if that is worth it."""
    documents = [document(number) for number in numbers]
    return _group(numbers, shared_tokens(documents), documents)


def pieces_of(numbers: Sequence[int], document: Callable[[int], Document], token_budget: int) -> list[Group]:
    """Return documents as few groups within a token budget, each with the prefix. Documents that share none are groups of their own.

    Args:
        token_budget: as in `pack`.
    """
    documents = [document(number) for number in numbers]
    shared = shared_tokens(documents)
    own = [len(ids) - shared for ids, _ in documents]
    bins = pack(own, token_budget=token_budget - shared, multiple_of=1) if shared else [[i] for i in range(len(numbers))]
    pieces = [sorted(one) for one in bins if one]
    return [_group([numbers[i] for i in one], shared if len(one) > 1 else 0, [documents[i] for i in one]) for one in pieces]


def _group(numbers: Sequence[int], shared: int, documents: Sequence[Document]) -> Group:
    return Group(tuple(numbers), shared, shared + sum(len(ids) - shared for ids, _ in documents))


def pack_groups(groups: Sequence[Group], *, token_budget: int, multiple_of: int) -> list[list[Group]]:
    """Distribute groups over micro-batches as `pack` does documents. In each, the groups with a prefix come first."""
    bins = pack([group.tokens for group in groups], token_budget=token_budget, multiple_of=multiple_of)
    return [sorted((groups[i] for i in one), key=lambda group: group.shared == 0) for one in bins]


def numbers_of(groups: Iterable[Group]) -> list[int]:
    """Return the numbers of the groups' documents, in their order in the batch."""
    return [number for group in groups for number in group.numbers]


def collate_groups(
    groups: Sequence[Group],
    document: Callable[[int], Document],
    *,
    multiple_of_tokens: int = 1,
    values: Mapping[str, Sequence[np.ndarray]] | None = None,
) -> Batch:
    """Build the batch of a micro-batch of `pack_groups`.

    Args:
        document: returns a document by its number.
        multiple_of_tokens: as in `collate`.
        values: as in `collate`, one array per document, by its number.
    """
    numbers, sharing = numbers_of(groups), [group for group in groups if group.shared]
    assert all(group.shared for group in groups[: len(sharing)]), "groups with a prefix come first"
    documents = [_after(document(number), group.shared) for group in groups for number in group.numbers]
    prefixes = [_prefix(document(group.numbers[0]), group.shared) for group in sharing]
    of_trained = {name: [*(arrays[n] for n in numbers), *[NOTHING] * len(prefixes)] for name, arrays in (values or {}).items()}
    ids = [*numbers, *[-1] * len(prefixes)]
    batch = collate([*documents, *prefixes], ids, multiple_of_tokens=multiple_of_tokens, values=of_trained)
    return _with_prefixes(batch, sharing, len(documents)) if sharing else batch


def _after(document: Document, shared: int) -> Document:
    ids, mask = document
    return ids[shared:], mask[shared:]


def _prefix(document: Document, shared: int) -> Document:
    ids, _ = document
    return ids[:shared], np.zeros(shared, dtype=bool)


def _with_prefixes(batch: Batch, sharing: Sequence[Group], documents: int) -> Batch:
    """Return the batch of documents and prefixes with the prefixes as such: behind the documents, as a part of the filler."""
    segments = batch.cu_seqlens.numpy()
    many, shared = [len(group.numbers) for group in sharing], [group.shared for group in sharing]
    group_bounds, prefix_bounds = segments[np.cumsum([0, *many])], np.cumsum([0, *shared])
    lengths = np.diff(segments)[: sum(many)]
    shared_of_document = np.repeat(shared, many)
    positions = batch.position_ids_T.clone()
    positions[: group_bounds[-1]] += torch.from_numpy(np.repeat(shared_of_document, lengths))
    bounds = np.append(segments[: documents + 1], segments[-1])
    sizes = Sizes(
        longest_segment=batch.max_seqlen,
        longest_group=int(np.diff(group_bounds).max()),
        longest_prefix=max(shared),
        group_tokens=int(group_bounds[-1]),
        first_token=int(segments[documents]),
        prefix_tokens=sum(shared),
    )
    return replace(
        batch,
        position_ids_T=positions,
        cu_seqlens=torch.from_numpy(bounds),
        max_seqlen=int(np.diff(bounds).max()),
        sample_ids_S=torch.cat([batch.sample_ids_S[:documents], torch.tensor([-1])]),
        has_filler=True,
        prefixes=Prefixes(
            segment_bounds=batch.cu_seqlens,
            group_bounds=torch.from_numpy(group_bounds),
            prefix_bounds=torch.from_numpy(prefix_bounds.astype(np.int32)),
            sizes=torch.tensor(sizes),
            longest_document=int((lengths + shared_of_document).max()),
        ),
    )


def micro_batches_of_rows(
    rows: Iterable[Sequence[int]],
    document: Callable[[int], Document],
    values: Mapping[str, Sequence[np.ndarray]],
    *,
    token_budget: int,
    multiple_of_tokens: int,
    rank: int,
    world_size: int,
) -> list[Batch]:
    """Return one rank's micro-batches of rows whose documents share their beginning. Every rank computes the same plan.

    Args:
        rows: numbers of the documents of each row, which stay together.
        document, values: as in `collate_groups`.
    """
    groups = [grouped(row, document) for row in rows]
    mine = pack_groups(groups, token_budget=token_budget, multiple_of=world_size)[rank::world_size]
    return [collate_groups(one, document, multiple_of_tokens=multiple_of_tokens, values=values) for one in mine]
