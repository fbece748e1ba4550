"""Generation with transformers' own code. It is slow but works with every model, and is the reference for the faster engines.

How a model generates is decided when it is loaded (`Way`): the fastest way whose log-probabilities are those of the plain model.

Dimensions: B sequences of a batch, P padded length of their prompts, G generated tokens, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from verl.errors import UserError
from verl.rollout import DEFAULTS, Completion, Options, Sampling
from verl.rollout._model import (
    check_positions,
    copy_weights,
    describe_model,
    generation_mode,
    load_model,
    merge_stop_ids,
    out_of_memory,
    positions_of,
    restart_rope,
    rope_limit,
)
from verl.rollout._plain import Probe, plain_logits
from verl.rollout._sampler import BLOCK, sample, uniform_numbers

BATCH_SIZE = 64  # default of `max_sequences`


@dataclass(frozen=True)
class Way:
    """How a model generates.

    Attributes:
        attention: attention implementation in transformers.
        together: prompts of a batch: of any length, padded on the left; of equal length; or one prompt alone.
        caches: whether a token reuses what the model computed for the tokens before it.
    """

    attention: str
    together: Literal["padded", "equal", "alone"]
    caches: bool = True

    def describe(self) -> str:
        """Return what makes it slow, for the log; "" for the fastest ways."""
        slow = {"padded": "", "equal": "prompts of equal length together", "alone": "one prompt at a time"}[self.together]
        return slow if self.caches else f"{slow}, without a cache"


# From the fastest to the plain model itself.
WAYS = (
    Way("sdpa", "padded"),
    Way("eager", "padded"),
    Way("sdpa", "equal"),
    Way("eager", "equal"),
    Way("eager", "alone"),
    Way("eager", "alone", caches=False),
)


class HfRollout:
    """Batched generation. Defaults of the model's generation config, such as a repetition penalty, are ignored.

    Args:
        model: model on its device; its weights are not copied, and it may be trained between calls.
        stop_ids: tokens that end a response, at least one; those of the model's generation_config.json are added.
        is_shared: whether a trainer changes the model's weights; `update_weights` then copies nothing.
        why: why no faster engine generates, for the log.
    Attributes:
        positions: maximum tokens of a prompt with its response; None if the model has no limit.
        batch_size: sequences per batch.
        way: how the model generates.
    Raises:
        UserError: the plain model cannot read a text.
    """

    def __init__(
        self, model: PreTrainedModel, stop_ids: Sequence[int], options: Options = DEFAULTS, *, is_shared: bool = False, why: str = ""
    ):
        self.model, self.batch_size, self.version = model, options.max_sequences or BATCH_SIZE, 0
        self._options, self._is_shared, self._why = options, is_shared, why
        self.stop_ids = merge_stop_ids(stop_ids, model.generation_config)
        self.positions, self._rope_limit = positions_of(model), rope_limit(model)
        self._model_generate = cast(Callable[..., Tensor], model.generate)
        self.way = self._find_way()

    def _find_way(self) -> Way:
        """Return the first of WAYS that is exact."""
        probe = Probe(self.model)
        # Some releases of transformers leave out the caps in other attention than eager, for which weights may be too small to tell.
        has_caps = getattr(self.model.config.get_text_config(), "attn_logit_softcapping", None)
        try:
            for way in (way for way in WAYS if way.attention == "eager" or not has_caps):
                if probe.is_exact(partial(self._answer_probe, way), is_plain=not way.caches):
                    return way
        except torch.OutOfMemoryError as error:
            raise out_of_memory(self.batch_size, self._options) from error
        fix = "choose another model; transformers itself cannot run this one here"
        raise UserError(f"{type(self.model).__name__} cannot generate: {probe.failures[-1]}", where="rollout.name", fix=fix)

    def _answer_probe(self, way: Way, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        done: dict[int, Completion] = {}
        for batch in self._batches(prompts, sampling, way):
            uniform_BG = np.stack([uniform_numbers(sampling, number, 0) for number in batch])
            texts = [prompts[number] for number in batch]
            done |= dict(zip(batch, self._answer(texts, sampling, torch.from_numpy(uniform_BG), way, stop_ids=[]), strict=True))
        return [done[number] for number in range(len(prompts))]

    def stream(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> Iterator[list[tuple[int, Completion]]]:
        """See `Rollout.stream`. Long prompts come first, so that a lack of memory shows early."""
        check_positions(prompts, sampling, self.positions)
        seed_of = range(len(prompts)) if seeds is None else seeds
        for numbers in self._batches(prompts, sampling, self.way):
            batch = [divmod(number, sampling.n) for number in numbers]
            uniform_BG = np.stack([uniform_numbers(sampling, seed_of[prompt], k) for prompt, k in batch])
            try:
                completions = self._answer([prompts[prompt] for prompt, _ in batch], sampling, torch.from_numpy(uniform_BG), self.way)
            except torch.OutOfMemoryError as error:
                raise out_of_memory(len(batch), self._options) from error
            yield list(zip(numbers, completions, strict=True))

    def _batches(self, prompts: Sequence[list[int]], sampling: Sampling, way: Way) -> Iterator[list[int]]:
        """Yield the numbers of the responses that are generated together."""
        numbers = sorted(range(len(prompts) * sampling.n), key=lambda number: -len(prompts[number // sampling.n]))
        lengths = {number: len(prompts[number // sampling.n]) for number in numbers}
        # Rotary embeddings that depend on the length of the text take that of the longest one in a batch.
        equal = way.together == "equal" or self._rope_limit is not None
        for _, group in groupby(numbers, key=lambda number: lengths[number] if equal else None):
            together, size = list(group), 1 if way.together == "alone" else self.batch_size
            yield from (together[start : start + size] for start in range(0, len(together), size))

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None) -> list[Completion]:
        """See `Rollout.generate`."""
        done = dict(pair for batch in self.stream(prompts, sampling, seeds) for pair in batch)
        return [done[number] for number in sorted(done)]

    def stream_tokens(self, prompt: list[int], sampling: Sampling, on_token: Callable[[int], None]) -> Completion:
        """See `verl.rollout.stream_tokens`."""
        uniform_BG = torch.from_numpy(uniform_numbers(sampling, 0, 0)[None])
        return self._answer([prompt], sampling, uniform_BG, self.way, on_token=on_token)[0]

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `Rollout.update_weights`."""
        self.version = version
        if not self._is_shared:
            copy_weights(self.model, named_tensors)

    def sleep(self) -> None:
        """Do nothing, because KV caches are freed at the end of each batch."""

    def wake(self) -> None: ...

    def close(self) -> None: ...

    def describe(self) -> str:
        """See `Rollout.describe`."""
        parts = [describe_model(self.model), self.way.describe()]
        if self._why:
            parts.append(f"with transformers' own code ({self._why}; rollout.name=vllm may be faster)")
        return ", ".join(part for part in parts if part)

    @torch.no_grad()
    def _answer(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        uniform_BG: Tensor,
        way: Way,
        *,
        stop_ids: list[int] | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """Generate one response to each prompt.

        Args:
            stop_ids: tokens that end a response; None: those of the rollout.
            on_token: called with each token of the response to a single prompt.
        """
        stop_ids = self.stop_ids if stop_ids is None else stop_ids
        uniform_BG = uniform_BG.to(self.model.device)
        restart_rope(self.model)
        caches = way.caches and not self._outgrows_rope(len(prompts[0]), sampling)
        with generation_mode(self.model, way.attention):
            if caches:
                return self._generate_batch(prompts, sampling, uniform_BG, way, stop_ids, on_token)
            each = zip(prompts, uniform_BG, strict=True)
            return [self._generate_without_cache(prompt, sampling, uniform_G, stop_ids, on_token) for prompt, uniform_G in each]

    def _outgrows_rope(self, prompt: int, sampling: Sampling) -> bool:
        """Return whether the rotary embeddings of a text change while its response is generated, so that cached keys become wrong."""
        limit = self._rope_limit
        return limit is not None and prompt + sampling.max_new_tokens > limit.tokens and (limit.grows or prompt <= limit.tokens)

    def _generate_batch(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        uniform_BG: Tensor,
        way: Way,
        stop_ids: list[int],
        on_token: Callable[[int], None] | None,
    ) -> list[Completion]:
        """Generate with transformers' `generate`."""
        input_ids_BP, attention_mask_BP = pad_left(prompts, pad_token=stop_ids[0] if stop_ids else prompts[0][0])
        sampler = _Sampler(sampling, uniform_BG, input_ids_BP.shape[1])
        own_config, self.model.generation_config = self.model.generation_config, GenerationConfig(eos_token_id=stop_ids or None)
        try:
            output = self._model_generate(
                input_ids_BP.to(self.model.device),
                attention_mask=attention_mask_BP.to(self.model.device),
                generation_config=generation_config(sampling, stop_ids),
                logits_processor=LogitsProcessorList([sampler]),
                streamer=None if on_token is None else _TokenStreamer(on_token),
            )
        finally:
            self.model.generation_config = own_config
        answers = output[:, input_ids_BP.shape[1] :].tolist()
        logprobs = torch.stack(sampler.logprobs, 1).tolist() if sampler.logprobs else [None] * len(answers)
        return [self._completion(*answer, stop_ids) for answer in zip(answers, logprobs, strict=True)]

    def _generate_without_cache(
        self, prompt: list[int], sampling: Sampling, uniform_G: Tensor, stop_ids: list[int], on_token: Callable[[int], None] | None
    ) -> Completion:
        """Generate by the plain model: the whole text again for each token."""
        answer: list[int] = []
        logprobs: list[float] = []
        while len(answer) < sampling.max_new_tokens and not (answer and answer[-1] in stop_ids):
            logits_1V = plain_logits(self.model, [*prompt, *answer])[-1:].float()
            token_B, logprob_B = sample(logits_1V.clone().split(BLOCK, 1), sampling, uniform_G[None, len(answer)])
            answer.append(int(token_B))
            logprobs.extend([] if logprob_B is None else logprob_B.tolist())
            if on_token is not None:
                on_token(answer[-1])
        return self._completion(answer, logprobs or None, stop_ids)

    def _completion(self, generated_G: list[int], logprob_G: list[float] | None, stop_ids: list[int]) -> Completion:
        """Return the tokens up to the first stop token as a response, without the padding after it."""
        end = next((i for i, token in enumerate(generated_G) if token in stop_ids), None)
        length = len(generated_G) if end is None else end + 1
        logprobs = None if logprob_G is None else logprob_G[:length]
        return Completion(generated_G[:length], "length" if end is None else "stop", logprobs, self.version)


class _Sampler(LogitsProcessor):
    """Sample the next token, and set the logits of all others to minus infinity, so that greedy `generate` takes it."""

    def __init__(self, sampling: Sampling, uniform_BG: Tensor, prompt_length: int):
        self._sampling, self._uniform_BG, self._prompt_length = sampling, uniform_BG, prompt_length
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        number = input_ids.shape[1] - self._prompt_length
        token_B, logprob_B = sample(scores.float().clone().split(BLOCK, 1), self._sampling, self._uniform_BG[:, number])
        if logprob_B is not None:
            self.logprobs.append(logprob_B)
        return torch.full_like(scores, float("-inf")).scatter_(1, token_B[:, None], 0.0)


class _TokenStreamer(BaseStreamer):
    """Call `on_token` with each token from `generate`, except for the prompt, which comes first."""

    def __init__(self, on_token: Callable[[int], None]):
        self._on_token, self._expects_prompt = on_token, True

    def put(self, value: Tensor) -> None:
        if not self._expects_prompt:
            self._on_token(int(value))
        self._expects_prompt = False

    def end(self) -> None: ...


def load(path: str, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], options: Options) -> HfRollout:
    """See `verl.rollout.load_rollout`."""
    return HfRollout(load_model(path, tokenizer, options), stop_ids, options)


def share(model: PreTrainedModel, path: str, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], options: Options) -> HfRollout:
    """See `verl.rollout.share`. The engine computes with the trainer's weights."""
    return HfRollout(model, stop_ids, options, is_shared=True)


def pad_left(prompts: list[list[int]], *, pad_token: int) -> tuple[Tensor, Tensor]:
    """Pad prompts on the left to the length of the longest one.

    Returns:
        input_ids_BP, and attention_mask_BP with 1 at tokens and 0 at padding; both int64.
    """
    longest = max(map(len, prompts))
    input_ids_BP = torch.tensor([[pad_token] * (longest - len(prompt)) + prompt for prompt in prompts])
    attention_mask_BP = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return input_ids_BP, attention_mask_BP


def generation_config(sampling: Sampling, stop_ids: Sequence[int]) -> GenerationConfig:
    """Return a config for greedy `generate`; `_Sampler` does the sampling."""
    ends = {"eos_token_id": list(stop_ids), "pad_token_id": stop_ids[0]} if stop_ids else {}
    return GenerationConfig(max_new_tokens=sampling.max_new_tokens, do_sample=False, **ends)
