"""The load-balancing loss of the routers in a mixture of experts, as transformers computes it on the whole batch of a step.

Over the N pairs of a token and a layer of a step, let c_e be the number of times that expert e is among the k chosen ones, and p_e the
sum of its routing probabilities. The loss is E Σ_e c_e p_e / N² (arXiv:2101.03961, equations 4 to 6). It is a product of sums over all
tokens, so the mean over micro-batches would be another loss. But c_e has no gradient, and the loss is linear in p_e: once the counts of all
micro-batches and ranks are known, each micro-batch adds its own E Σ_e c_e p_e / N², and the gradients add up to that of one batch.

The counts are therefore collected first: by the forward pass of the first micro-batch itself, and by one more forward pass of the others,
without gradient and output layer. A step of one micro-batch costs nothing more, and one of n at most (n - 1) / n of a forward pass.

Dimensions: T tokens of a micro-batch; E experts.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from verl import dist as processes
from verl.data.batch import Batch
from verl.engine.scorers import Scorer
from verl.errors import UserError
from verl.models.load import decoder_of
from verl.models.randomness import is_random

KEY = "model.router_aux_loss_coef"
NAMES = ("router_aux_loss_coef", "aux_loss_coef")  # of the coefficient, in a model or its config
ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]  # of transformers' function


def find_router_loss(model: PreTrainedModel, coef: float | None) -> "tuple[RouterLoss | None, list[str]]":
    """Return the router loss that a model is trained with, or None; and lines for the log.

    Args:
        coef: `model.router_aux_loss_coef`; None: as the model's config says, which asks for the loss by `output_router_logits`.
    Raises:
        UserError: a coefficient is given, and the model has no such loss.
    """
    text = model.config.get_text_config()
    asks = bool(getattr(text, "output_router_logits", False))
    z_loss = getattr(text, "z_loss_coefficient", None)
    notes = [f"warning: config.json has z_loss_coefficient={z_loss:g}; that loss is not trained"] if z_loss else []
    if coef == 0 or (coef is None and not asks):
        return None, notes
    if why := _why_not(model):
        if coef is not None:
            raise UserError(why, where=f"{KEY}={coef:g}", fix="remove this key")
        return None, [*notes, f"warning: config.json asks for the routers' load-balancing loss (output_router_logits), but {why}"]
    stated = (getattr(place, name, None) for place in (model, text) for name in NAMES)
    weight = coef if coef is not None else next((value for value in stated if value is not None), 0.0)
    if not weight:
        return None, notes
    source = KEY if coef is not None else "config.json"
    said = f"routers: their load-balancing loss is trained with coefficient {weight:g} ({source}), and logged as router_aux_loss"
    return RouterLoss(model, float(weight)), [*notes, said]


def _why_not(model: PreTrainedModel) -> str | None:
    """Return why a model has no load-balancing loss, or one that is computed otherwise than here; None if it has this one."""
    name, theirs = type(model).__name__, _function_of(model)
    if theirs is None or _experts(model) is None:
        return f"transformers' {name} has no load-balancing loss"
    if list(inspect.signature(theirs).parameters) != ARGUMENTS or not _agrees(theirs):
        return f"the load-balancing loss of {name} is of another kind"
    return None


def _function_of(model: PreTrainedModel) -> Callable[..., Any] | None:
    return getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)


def _experts(model: PreTrainedModel) -> tuple[int, int] | None:
    """Return the number of experts and of those that are chosen, as the model's class passes them to the loss."""
    for place in (model, model.config.get_text_config()):
        found = getattr(place, "num_experts", None), getattr(place, "num_experts_per_tok", None)
        if isinstance(found[0], int) and isinstance(found[1], int):
            return found[0], found[1]
    return None


def _agrees(theirs: Callable[..., Any]) -> bool:
    """Return whether a function gives the loss that is computed here, for two layers of 24 tokens, some of them padding."""
    drawn = torch.Generator().manual_seed(0)
    logits = tuple(torch.randn(24, 6, generator=drawn) for _ in range(2))
    real_T = torch.arange(24) % 5 > 0
    sums = Sums.of(logits, 2, real_T)
    expected = theirs(logits, 6, 2, real_T.long()[None])
    return abs(float(sums.loss(sums.counts_E, sums.rows)) - float(expected)) < 1e-5


@dataclass
class Sums:
    """Sums over the tokens and layers of a micro-batch, in float64.

    Attributes:
        counts_E: how often each expert is chosen, without a gradient.
        probability_E: sum of each expert's probability, with a gradient.
        rows: number of pairs of a token and a layer, a scalar.
    """

    counts_E: Tensor
    probability_E: Tensor
    rows: Tensor

    @classmethod
    def of(cls, logits: Sequence[Tensor], top_k: int, real_T: Tensor | None) -> "Sums":
        """Compute the sums.

        Args:
            logits: router logits of each layer, [T, E] or [1, T, E].
            real_T: which tokens are no filler; None: all.
        """
        counts, probabilities, rows = [], [], 0
        for layer in map(_rows, logits):
            probability_TE = layer.float().softmax(-1)
            chosen_TE = torch.zeros_like(probability_TE).scatter_(1, probability_TE.detach().topk(top_k, -1).indices, 1.0)
            if real_T is not None:
                probability_TE, chosen_TE = probability_TE * real_T[:, None], chosen_TE * real_T[:, None]
            counts.append(chosen_TE.sum(0, dtype=torch.float64))
            probabilities.append(probability_TE.sum(0, dtype=torch.float64))
            rows += len(probability_TE)
        number = torch.tensor(float(rows), dtype=torch.float64, device=counts[0].device)
        if real_T is not None:
            number = real_T.sum(dtype=torch.float64) * len(logits)
        return cls(torch.stack(counts).sum(0), torch.stack(probabilities).sum(0), number)

    def loss(self, counts_E: Tensor, rows: Tensor) -> Tensor:
        """Return the contribution of these tokens to the loss of all tokens, given the counts and rows of all."""
        return len(counts_E) * (counts_E * self.probability_E).sum() / rows.clamp(min=1) ** 2


class RouterLoss:
    """Adds the router loss to the loss of an algorithm, in the engine's backward pass.

    Args:
        model: language model whose decoder returns router logits.
        coef: weight of the loss.
    """

    def __init__(self, model: PreTrainedModel, coef: float):
        found = _experts(model)
        assert found is not None
        self.coef, self._top_k, self._is_random = coef, found[1], is_random(model, model.config)
        self._watches, self._packed = False, True
        self._calls: list[Sequence[Tensor]] = []  # router logits of each layer, for each call of the decoder on a micro-batch
        self._ahead: list[Sums] = []  # of the micro-batches after the first, without gradients
        self._states: list[list[Tensor]] = []  # of the random generators: before the forward pass of each of them, and after the first
        self._counts_E: Tensor | None = None
        self._rows = self._value = torch.zeros(())
        decoder = decoder_of(model)
        decoder.register_forward_pre_hook(self._ask, with_kwargs=True)
        decoder.register_forward_hook(self._take)

    def _ask(self, decoder: Any, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**options, "output_router_logits": self._watches}

    def _take(self, decoder: Any, args: Any, output: Any) -> None:
        if self._watches:
            self._calls.append(output.router_logits)

    @torch.no_grad()
    def begin(self, scorer: Scorer, micro_batches: Sequence[Batch], device: torch.device) -> None:
        """Prepare for the micro-batches of a step: run the model on all but the first, to count how often each expert is chosen."""
        self._watches, self._packed, self._counts_E = True, scorer.path.packed, None
        self._calls, self._ahead, self._states = [], [], []
        for batch in micro_batches[1:]:
            processes.moved()
            batch = batch.to(device)
            if self._is_random:
                self._states.append(_random_states(device))
            scorer(replace(batch, trained_M=batch.trained_M[:0]))  # so the output layer has nothing to do
            self._ahead.append(self._sums(batch))

    def of(self, batch: Batch) -> Tensor:
        """Return the share of a micro-batch in the loss, times the coefficient, right after the model ran on it.

        As gradients are averaged over ranks, it is multiplied by the number of ranks. The same random numbers are then drawn for the next
        micro-batch as when it was counted, so that the same experts are chosen.
        """
        sums = self._sums(batch)
        if self._counts_E is None:
            every = [sums, *self._ahead]
            *counts, rows = _summed(torch.stack([torch.cat([each.counts_E, each.rows[None]]) for each in every]).sum(0))
            self._counts_E, self._rows, self._value = torch.stack(counts), rows, torch.zeros_like(rows)
            if self._is_random:
                self._states.append(_random_states(sums.counts_E.device))
        if self._states:
            _set_random_states(self._states.pop(0))
        mine = sums.loss(self._counts_E, self._rows)
        self._value = self._value + mine.detach()
        return self.coef * processes.world_size() * mine

    def finish(self) -> dict[str, Tensor]:
        """Return the loss over all micro-batches and ranks as a metric, without the coefficient."""
        self._watches = False
        return {"router_aux_loss": _summed(self._value).float()}

    def _sums(self, batch: Batch) -> Sums:
        calls, self._calls, real_T = self._calls, [], batch.real_T
        if not self._packed:  # one call a document, without filler, after those that only keep in step with other ranks
            calls, real_T = calls[-batch.documents :], None
        layers = [torch.cat([_rows(layer) for layer in of_layer]) for of_layer in zip(*calls, strict=True)]
        if not self._packed and batch.documents == 0:
            real_T = torch.zeros(len(layers[0]), dtype=torch.bool, device=layers[0].device)
        return Sums.of(layers, self._top_k, real_T)


def _rows(logits: Tensor) -> Tensor:
    """Return router logits as [T, E]; some models give [1, T, E]."""
    return logits.reshape(-1, logits.shape[-1])


def _summed(values: Tensor) -> Tensor:
    """Sum over all ranks, in place."""
    if processes.world_size() > 1:
        dist.all_reduce(values, group=processes.group())
    return values


def _random_states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_states(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)
