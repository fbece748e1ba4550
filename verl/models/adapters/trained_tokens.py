"""Tokens whose embeddings an adapter run trains, and base models that never trained the token which has to end an answer.

Dimensions: V vocabulary, H hidden size, U rows of tokens that no text has, O rows of ordinary tokens.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from verl.errors import UserError

KEY = "model.trainable_tokens"
UNUSED_NAME = re.compile(r"reserved|unused|placeholder", re.IGNORECASE)
ENOUGH_ROWS = 8  # of unused tokens, to tell how rows look that were never trained
SAMPLE = 4096  # rows of ordinary tokens to compare with


def token_ids(tokens: object, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> list[int]:
    """Ids of the tokens that `model.trainable_tokens` names, each once.

    Args:
        tokens: None, "stop", one token or a list of them.
        stop_ids: what "stop" stands for.
    Raises:
        UserError: something that is not one token.
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
    raise UserError(f"{name!r} is {len(ids)} tokens of this tokenizer, not one", where=KEY, fix=f"its special tokens are {special}")


@torch.no_grad()
def untrained_stop_tokens(weight_VH: Tensor, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> list[str]:
    """Those of the stop tokens whose output embedding lies among rows that no text ever trained.

    Such rows, of ids without a token or of tokens named as reserved, lie close together and apart from all others in a trained
    model. Where they do not, as in a model with random weights, nothing can be said, and nothing is.

    Args:
        weight_VH: the model's output embeddings.
    """
    vocabulary = tokenizer.get_vocab()
    names = {number: name for name, number in vocabulary.items()}
    unused = [i for i in range(len(weight_VH)) if (i not in names or UNUSED_NAME.search(names[i])) and i not in stop_ids]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder, *unused, *stop_ids}
    ordinary = [i for i in sorted(names) if i not in special and i < len(weight_VH)]
    if len(unused) < ENOUGH_ROWS or len(ordinary) < ENOUGH_ROWS:
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
        f"the embedding of {' and '.join(names)}, which ends an answer, was never trained in this base model, and an adapter leaves it so: "
        f"answers may not end (set {KEY}=stop)"
    )


def _tensor(ids: list[int], like: Tensor) -> Tensor:
    return torch.tensor(ids, device=like.device)


def _distances(rows_OH: Tensor, centre_H: Tensor) -> Tensor:
    distance_O: Tensor = torch.linalg.vector_norm(rows_OH - centre_H, dim=-1)
    return distance_O
