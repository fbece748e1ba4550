"""The references: transformers' own model and a plain loop around it, one document at a time, with no code of the engine.

Dimensions: T tokens of a document, V vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from verl.data.pack import Document
from verl.models.load import language_class

SMALL = 1e-3  # a parameter's gradient counts relative to its own norm, or to this share of the whole one if that is larger


def whole_class(config: PretrainedConfig) -> Any:
    """Return transformers' own class of a model, with all its parts, of which the trainer may load the language part only.

    Raises:
        UserError: the model is none that verl trains, such as an encoder-decoder.
    """
    return AutoModelForCausalLM if language_class(config) is AutoModelForCausalLM else AutoModelForImageTextToText


def load(path: Path | str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a model directory with transformers alone, with the attention of its own (eager) where it has one."""
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    config = AutoConfig.from_pretrained(path)
    kind = whole_class(config)
    if getattr(config, "alibi", False):  # eager Falcon adds ALiBi's bias twice
        options["attn_implementation"] = "sdpa"
    try:
        model = kind.from_pretrained(path, **({"attn_implementation": "eager"} | options))
    except ValueError:  # it has one implementation only
        model = kind.from_pretrained(path, **options)
    if hasattr(model.config, "rescale_every"):  # RWKV: its weights in evaluation would be others, and so their gradients
        model.config.rescale_every = 0
    loaded: PreTrainedModel = model.eval()
    return experts_in(dtype, loaded)


def experts_in(dtype: torch.dtype, model: PreTrainedModel) -> PreTrainedModel:
    """Let a model compute its experts one by one in float64, which has no grouped product; in place."""
    if dtype == torch.float64:
        model.set_experts_implementation("eager")
    return model


def logits(model: torch.nn.Module, ids: Sequence[int]) -> Tensor:
    """Return logits_TV of one document, without a cache."""
    _forget_lengths(model)
    logits_TV: Tensor = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits_TV


def _forget_lengths(model: torch.nn.Module) -> None:
    """Set dynamic rotary embeddings back, which keep the longest length so far, so that each document is computed as by a new model."""
    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic" and isinstance(original := getattr(module, "original_inv_freq", None), Tensor):
            module.max_seq_len_cached = module.original_max_seq_len
            module.inv_freq = original.clone()


def logprobs(model: torch.nn.Module, ids: Sequence[int], temperature: float = 1.0) -> Tensor:
    """Return the log-probability of each token but the first, natural log."""
    logprob_TV = (logits(model, ids) / temperature).float().log_softmax(-1) if temperature != 1.0 else logits(model, ids).log_softmax(-1)
    return logprob_TV[:-1].gather(1, torch.tensor(list(ids))[1:, None]).squeeze(1)


def losses(model: torch.nn.Module, documents: Iterable[Document]) -> tuple[Tensor, int]:
    """Return the sum of -log p over the trained tokens of all documents, and their number."""
    sums, count = [], 0
    for ids, mask in documents:
        trained = torch.from_numpy(mask[1:].copy())
        sums.append(-logprobs(model, ids.tolist())[trained].sum())
        count += int(trained.sum())
    return torch.stack(sums).sum(), count


def mean_loss(model: torch.nn.Module, documents: Iterable[Document]) -> float:
    """Return the mean loss of a trained token."""
    with torch.no_grad():
        total, count = losses(model, documents)
    return float(total) / count


def gradients(model: torch.nn.Module, documents: Sequence[Document]) -> tuple[float, dict[str, Tensor]]:
    """Return the mean loss of a trained token and its gradient, by the parameters' names."""
    model.zero_grad(set_to_none=True)
    count = sum(int(mask[1:].sum()) for _, mask in documents)
    loss = 0.0
    for document in documents:  # one at a time: the graph of one document is enough
        total, _ = losses(model, [document])
        (total / count).backward()
        loss += float(total.detach()) / count
    found = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss, found


def train(model: torch.nn.Module, documents: Sequence[Document], *, steps: int, lr: float, weight_decay: float, clip: float) -> list[float]:
    """Take steps of torch's AdamW on all documents, and return the loss before each step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=(0.9, 0.95))
    found = []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        total, count = losses(model, documents)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        found.append(float(total.detach()) / count)
    return found


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: Sequence[int], *, tokens: int, stop_ids: Sequence[int]) -> tuple[list[int], list[float]]:
    """Decode greedily without a cache: each token from a forward pass over all before it.

    Returns:
        the tokens and their log-probabilities.
    """
    ids, found = list(prompt), []
    for _ in range(tokens):
        logprob_V = logits(model, ids)[-1].log_softmax(-1)
        ids.append(int(logprob_V.argmax()))
        found.append(float(logprob_V[ids[-1]]))
        if ids[-1] in stop_ids:
            break
    return ids[len(prompt) :], found


@torch.no_grad()
def decoding_difference(model: PreTrainedModel, prompt: Sequence[int], *, tokens: int) -> float:
    """Return how far log-probabilities of any token are in transformers' greedy decoding with a cache from those of one forward pass."""
    _forget_lengths(model)
    ids, generate = torch.tensor([list(prompt)]), cast(Any, model).generate
    out = generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    decoded_TV = torch.cat(out.logits).log_softmax(-1)
    whole_TV = logits(model, out.sequences[0].tolist()).log_softmax(-1)[len(prompt) - 1 : -1]
    return float((decoded_TV - whole_TV).abs().max())


def gradients_with_router_loss(
    model: torch.nn.Module, documents: Sequence[Document], coefficient: float
) -> tuple[float, dict[str, Tensor]]:
    """Return transformers' load-balancing loss of all documents as one padded batch, and the gradient of it and the mean loss of a token.

    Returns:
        the loss of the routers without its coefficient, NaN if transformers gives none; and the gradient by the parameters' names.
    """
    model.zero_grad(set_to_none=True)
    longest = max(len(ids) for ids, _ in documents)
    ids_SL, real_SL = torch.zeros(len(documents), longest, dtype=torch.int64), torch.zeros(len(documents), longest, dtype=torch.int64)
    trained_SL = torch.zeros(len(documents), longest, dtype=torch.bool)
    for row, (ids, mask) in enumerate(documents):
        ids_SL[row, : len(ids)], real_SL[row, : len(ids)] = torch.from_numpy(ids.astype("int64")), 1
        trained_SL[row, 1 : len(ids)] = torch.from_numpy(mask[1:].copy())
    out = model(input_ids=ids_SL, attention_mask=real_SL, use_cache=False, output_router_logits=True)
    router_loss = getattr(out, "aux_loss", None)
    if not isinstance(router_loss, Tensor):
        return float("nan"), {}
    logprob_SL = out.logits[:, :-1].log_softmax(-1).gather(2, ids_SL[:, 1:, None]).squeeze(2)
    (coefficient * router_loss - logprob_SL[trained_SL[:, 1:]].mean()).backward()
    found = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    return float(router_loss.detach()), found


@torch.no_grad()
def trained_logprobs(model: torch.nn.Module, documents: Iterable[Document]) -> Tensor:
    """Return the log-probabilities of the trained tokens of all documents, in their order, logprob_M."""
    return torch.cat([logprobs(model, ids.tolist())[torch.from_numpy(mask[1:].copy())] for ids, mask in documents])


def relative(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest difference of a parameter's gradient, relative to its norm; a missing gradient is zero."""
    whole = torch.stack([value.norm() for value in expected.values()]).norm()
    worst = 0.0
    for name in found.keys() | expected.keys():
        value = expected.get(name, torch.zeros(()))
        difference = (found.get(name, torch.zeros(())) - value).norm() / max(value.norm(), SMALL * whole)
        worst = max(worst, float(difference)) if difference == difference else float("nan")
    return worst
