"""Generation with transformers' `generate`. It is slow but works with every model, and is the reference for the faster engines.

Dimensions: B sequences of a batch, P padded length of their prompts, G generated tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from verl.rollout import DEFAULTS, Completion, Options, Sampling
from verl.rollout._model import (
    check_positions,
    copy_weights,
    describe_model,
    generation_mode,
    load_model,
    merge_stop_ids,
    out_of_memory,
)
from verl.rollout._sampler import BLOCK, sample, uniform_numbers

BATCH_SIZE = 64  # default of `max_sequences`


class HfRollout:
    """Batched generation. Defaults of the model's generation config, such as a repetition penalty, are ignored.

    Args:
        model: model on its device; its weights are not copied, and it may be trained between calls.
        stop_ids: tokens that end a response, at least one; those of the model's generation_config.json are added.
        is_shared: whether a trainer changes the model's weights; `update_weights` then copies nothing.
    Attributes:
        positions: maximum tokens of a prompt with its response; None if the model has no limit.
        batch_size: sequences per batch.
    """

    def __init__(self, model: PreTrainedModel, stop_ids: Sequence[int], options: Options = DEFAULTS, *, is_shared: bool = False):
        self.model, self.batch_size, self.version = model, options.max_sequences or BATCH_SIZE, 0
        self._options, self._is_shared = options, is_shared
        self.stop_ids = merge_stop_ids(stop_ids, model.generation_config)
        self.positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._model_generate = cast(Callable[..., Tensor], model.generate)

    def stream(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> Iterator[list[tuple[int, Completion]]]:
        """See `Rollout.stream`. Long prompts come first, so that a lack of memory shows early."""
        check_positions(prompts, sampling, self.positions)
        seed_of = range(len(prompts)) if seeds is None else seeds
        numbers = sorted(range(len(prompts) * sampling.n), key=lambda number: -len(prompts[number // sampling.n]))
        for start in range(0, len(numbers), self.batch_size):
            batch = [divmod(number, sampling.n) for number in numbers[start : start + self.batch_size]]
            uniform_BG = np.stack([uniform_numbers(sampling, seed_of[prompt], k) for prompt, k in batch])
            try:
                completions = self._generate_batch([prompts[prompt] for prompt, _ in batch], sampling, torch.from_numpy(uniform_BG))
            except torch.OutOfMemoryError as error:
                raise out_of_memory(len(batch), self._options) from error
            yield list(zip(numbers[start : start + self.batch_size], completions, strict=True))

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None) -> list[Completion]:
        """See `Rollout.generate`."""
        done = dict(pair for batch in self.stream(prompts, sampling, seeds) for pair in batch)
        return [done[number] for number in sorted(done)]

    def stream_tokens(self, prompt: list[int], sampling: Sampling, on_token: Callable[[int], None]) -> Completion:
        """See `verl.rollout.stream_tokens`."""
        uniform_BG = torch.from_numpy(uniform_numbers(sampling, 0, 0)[None])
        return self._generate_batch([prompt], sampling, uniform_BG, streamer=_TokenStreamer(on_token))[0]

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
        return describe_model(self.model)

    @torch.inference_mode()
    def _generate_batch(
        self, prompts: list[list[int]], sampling: Sampling, uniform_BG: Tensor, *, streamer: BaseStreamer | None = None
    ) -> list[Completion]:
        input_ids_BP, attention_mask_BP = pad_left(prompts, pad_token=self.stop_ids[0])
        sampler = _Sampler(sampling, uniform_BG.to(self.model.device), input_ids_BP.shape[1])
        own_config, self.model.generation_config = self.model.generation_config, GenerationConfig(eos_token_id=self.stop_ids)
        try:
            with generation_mode(self.model, "sdpa"):
                output = self._model_generate(
                    input_ids_BP.to(self.model.device),
                    attention_mask=attention_mask_BP.to(self.model.device),
                    generation_config=generation_config(sampling, self.stop_ids),
                    logits_processor=LogitsProcessorList([sampler]),
                    streamer=streamer,
                )
        finally:
            self.model.generation_config = own_config
        answers = output[:, input_ids_BP.shape[1] :].tolist()
        logprobs = torch.stack(sampler.logprobs, 1).tolist() if sampler.logprobs else [None] * len(answers)
        return [self._completion(*answer) for answer in zip(answers, logprobs, strict=True)]

    def _completion(self, generated_G: list[int], logprob_G: list[float] | None) -> Completion:
        """Return the tokens up to the first stop token as a response, without the padding after it."""
        end = next((i for i, token in enumerate(generated_G) if token in self.stop_ids), None)
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
    return GenerationConfig(max_new_tokens=sampling.max_new_tokens, eos_token_id=list(stop_ids), pad_token_id=stop_ids[0], do_sample=False)
