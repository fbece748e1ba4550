"""Trainable token embeddings of adapter runs, and detection of stop tokens that were never trained in the base model.

Dimensions: V vocabulary, H hidden size, U rows of unused tokens, O rows of ordinary tokens.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from verl.errors import UserError

KEY = "model.trainable_tokens"
UNUSED_NAME = re.compile(r"reserved|unused|placeholder", re.IGNORECASE)
MIN_ROWS = 8  # unused tokens needed to recognize untrained rows
SAMPLE = 4096  # ordinary rows to compare with


def token_ids(tokens: object, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> list[int]:
    """Return the distinct ids of the tokens in `model.trainable_tokens`.

    Args:
        tokens: None, "stop", one token or a list of tokens.
        stop_ids: the tokens that "stop" means.
    Raises:
        UserError: a name is not a single token.
    """
    if tokens is None:
        return []
    if tokens == "stop":
        return sorted(set(stop_ids))
    names = [tokens] if isinstance(tokens, str) else tokens
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise UserError(f"found {tokens!r}", where=KEY, fix='give "stop", or a list of tokens such as [<|im_end|>]')
    return sorted({_token_id(name, tokenizer) for name in names})


def _token_id(name: str, tokenizer: PreTrainedTokenizerBase) -> int:
    vocabulary = tokenizer.get_vocab()
    if name in vocabulary:
        return int(vocabulary[name])
    ids = tokenizer.encode(name, add_special_tokens=False)
    if len(ids) == 1:
        return int(ids[0])
    special = ", ".join(tokenizer.all_special_tokens)
    raise UserError(f"{name!r} is {len(ids)} tokens in this tokenizer, not one", where=KEY, fix=f"its special tokens are {special}")


@torch.no_grad()
def untrained_stop_tokens(weight_VH: Tensor, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> list[str]:
    """Return the stop tokens whose output embeddings look untrained.

    In a trained model, the rows of unused tokens (ids without a token, or with a name such as "reserved") form a cluster apart from all
    other rows. A stop token in that cluster was never trained. Without such a cluster, as with random weights, the result is empty.

    Args:
        weight_VH: output embeddings of the model.
    """
    vocabulary = tokenizer.get_vocab()
    names = {number: name for name, number in vocabulary.items()}
    unused = [i for i in range(len(weight_VH)) if (i not in names or UNUSED_NAME.search(names[i])) and i not in stop_ids]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder, *unused, *stop_ids}
    ordinary = [i for i in sorted(names) if i not in special and i < len(weight_VH)]
    if len(unused) < MIN_ROWS or len(ordinary) < MIN_ROWS:
        return []
    unused_UH = weight_VH[_tensor(unused, weight_VH)].float()
    centre_H = unused_UH.median(0).values
    ordinary_OH = weight_VH[_tensor(ordinary[:: max(1, len(ordinary) // SAMPLE)], weight_VH)].float()
    radius = 1.5 * _distances(unused_UH, centre_H).quantile(0.9) + 1e-3 * _distances(ordinary_OH, centre_H).median()
    if (_distances(ordinary_OH, centre_H) <= radius).float().mean() > 0.01:
        return []
    return [names.get(i, str(i)) for i in stop_ids if _distances(weight_VH[i].float()[None], centre_H)[0] <= radius]


def stop_token_warning(names: list[str]) -> str:
    return (
        f"the embedding of the stop token {' and '.join(names)} was never trained in this base model, and an adapter does not train it: "
        f"answers may not end (set {KEY}=stop)"
    )


def _tensor(ids: list[int], like: Tensor) -> Tensor:
    return torch.tensor(ids, device=like.device)


def _distances(rows_OH: Tensor, centre_H: Tensor) -> Tensor:
    distance_O: Tensor = torch.linalg.vector_norm(rows_OH - centre_H, dim=-1)
    return distance_O
