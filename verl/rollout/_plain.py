"""Compares generation with the plain model: its own forward function with its own attention, on one text alone, without a cache.

An engine generates answers to a few probes, and their log-probabilities are compared with those that the plain model gives the same
tokens. During this, every window and chunk of the model is shorter than the probes, so that a mask that does not reach attention shows. A
state that is lost between prefill and decoding shows too, as does padding that changes the tokens beside it.

Dimensions: T tokens of a text, G tokens of an answer, V vocabulary.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from verl.rollout import Completion, Sampling
from verl.rollout._model import generation_mode, positions_of, restart_rope, rope_limit

SHORT, LONG = 3, 40  # tokens of probes
DRAWN = Sampling(max_new_tokens=6, temperature=1.0)
WINDOW = 16  # tokens; shorter than the long probes
WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "attention_window_size",
    "window_size",
    "local_attention",
    "attention_chunk_size",
    "index_topk",
)
BLOCKS, LONGEST_BLOCK = ("block_size", "chunk_size"), 512
# Mean differences of log-probabilities that rounding explains: always, at most, and as a multiple of what rounding does in this model.
LEAST, MOST, TIMES_NOISE = {True: 5e-5, False: 0.05}, {True: 1e-3, False: 0.3}, 8.0


class Probe:
    """Texts that an engine answers, to be compared with the plain model.

    Attributes:
        prompts: token ids of each probe; they hold no token with a meaning of its own, such as padding.
        failures: what was wrong with each engine or way of generating that was tried, in words.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = model
        limit = rope_limit(model)
        positions = min(positions_of(model) or sys.maxsize, sys.maxsize if limit is None else limit.tokens)
        most, long = max(1, positions - DRAWN.max_new_tokens), max(LONG, _block(model) + WINDOW)
        generator, usable = torch.Generator().manual_seed(1), torch.tensor(_usable_tokens(model))
        # Two are equal, because equal ones may share a batch where others may not. One token may be taken for a text that goes on.
        self.prompts: list[list[int]] = [
            usable[torch.randint(len(usable), (min(length, most),), generator=generator)].tolist() for length in (long, long, SHORT, 1)
        ]
        self.failures: list[str] = []

    def is_exact(self, answer: Callable[[list[list[int]], Sampling], list[Completion]], *, is_plain: bool = False) -> bool:
        """Return whether the answers to the probes have the log-probabilities that the plain model gives them.

        Args:
            answer: generates one answer to each prompt. What it raises counts as a failure, except for a lack of memory.
            is_plain: whether it is the plain model itself, so that nothing is compared.
        """
        try:
            with small_windows(self._model):
                completions = answer(self.prompts, DRAWN)
                return is_plain or self._agrees(completions)
        except Exception as error:  # a model's code may raise anything where it is run in a way that it does not expect
            if isinstance(error, torch.OutOfMemoryError) or isinstance(error.__cause__, torch.OutOfMemoryError):
                raise
            self.failures.append(f"{type(error).__name__}: {error}".partition("\n")[0])
            return False

    @torch.no_grad()
    def _agrees(self, completions: Sequence[Completion]) -> bool:
        """Return whether the mean difference of log-probabilities is, in the worst answer, one that rounding explains."""
        texts = [[*prompt, *answer.token_ids] for prompt, answer in zip(self.prompts, completions, strict=True)]
        found = [torch.tensor(answer.logprobs) for answer in completions]
        with generation_mode(self._model, "eager"):
            plain = [plain_logprobs(self._model, text, len(prompt)) for text, prompt in zip(texts, self.prompts, strict=True)]
            full = self._model.dtype in (torch.float32, torch.float64)
            if (worst := _worst(found, plain)) <= LEAST[full]:
                return True
            # What the same model gives the same tokens in a shorter text, for which its kernels sum in another order.
            shorter = [plain_logprobs(self._model, text[:-2], len(prompt)) for text, prompt in zip(texts, self.prompts, strict=True)]
        if worst <= min(TIMES_NOISE * _worst(shorter, [each[:-2] for each in plain]), MOST[full]):
            return True
        self.failures.append(f"log-probabilities differ by {worst:.2g} from those of the plain model")
        return False


def _worst(found: Sequence[Tensor], plain: Sequence[Tensor]) -> float:
    """Return the mean difference of the worst answer; infinity if it is not a number."""
    means = [float((one_G - other_G).abs().mean()) for one_G, other_G in zip(found, plain, strict=True)]
    return max(mean if mean == mean else math.inf for mean in means)


def plain_logits(model: PreTrainedModel, text: Sequence[int]) -> Tensor:
    """Return logits_TV of a text from the plain model, in its dtype. The model is in generation mode, with eager attention."""
    restart_rope(model)
    logits: Tensor = model(input_ids=torch.tensor([list(text)], device=model.device), use_cache=False).logits
    return logits[0]


def plain_logprobs(model: PreTrainedModel, text: Sequence[int], start: int) -> Tensor:
    """Return logprob_G, in float32 on the host: of the tokens of a text from number `start` on, as `plain_logits` gives them."""
    logits_GV = plain_logits(model, text)[start - 1 : -1].float()
    target_G1 = torch.tensor(list(text[start:]), device=logits_GV.device)[:, None]
    return (logits_GV.gather(1, target_G1).squeeze(1) - logits_GV.logsumexp(1)).cpu()


@contextmanager
def small_windows(model: PreTrainedModel) -> Iterator[None]:
    """Make every window and chunk of the model's attention WINDOW tokens long in this context, if it is longer."""
    owners: dict[int, Any] = {}
    for module in model.modules():
        for owner in (module, getattr(module, "config", None)):
            owners[id(owner)] = owner
    for part in (model.config, *(getattr(model.config, name, None) for name in model.config.sub_configs)):
        owners[id(part)] = part
    before = [
        (owner, name, value)
        for owner in owners.values()
        for name in WINDOWS
        if type(value := getattr(owner, "__dict__", {}).get(name)) is int and value > WINDOW
    ]
    try:
        for owner, name, _ in before:
            owner.__dict__[name] = WINDOW
        yield
    finally:
        for owner, name, value in before:
            owner.__dict__[name] = value


def _block(model: PreTrainedModel) -> int:
    """Return the length of the blocks in which recurrent layers read a text, or 0. It cannot be made smaller: weights depend on it."""
    sizes = (getattr(module, name, None) for module in model.modules() for name in BLOCKS)
    return max((size for size in sizes if type(size) is int and size <= LONGEST_BLOCK), default=0)


def _usable_tokens(model: PreTrainedModel) -> list[int]:
    """Return token ids without a meaning of their own: all but those that the config names, such as padding or the place of a picture."""
    text, vocabulary = model.config.get_text_config(), len(next(model.get_input_embeddings().parameters()))
    named = {
        token
        for config in (model.config, text, model.generation_config)
        for name, value in vars(config).items()
        if "token" in name and name.endswith(("_id", "_index", "_ids"))
        for token in (value if isinstance(value, list) else [value])
    }
    return [token for token in range(min(vocabulary, getattr(text, "vocab_size", vocabulary))) if token not in named]
