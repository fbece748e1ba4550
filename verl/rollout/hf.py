"""Generation with transformers' own `generate`: works with every model, and says what faster engines have to equal.

Dimensions: B sequences generated side by side, P padded length of their prompts, G generated tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from verl.models.load import check_vocabulary, load_for_inference
from verl.rollout import Completion, Sampling


class HfRollout:
    """Batched generation. The model's own defaults, such as a repetition penalty, are put aside: only `Sampling` counts.

    Args:
        model: on its device, in evaluation mode.
        stop_ids: tokens that end an answer, at least one, besides those of the model's generation_config.json.
        batch_size: sequences generated side by side.
    Attributes:
        positions: longest prompt and answer together, in tokens; None if the model sets no limit.
    """

    def __init__(self, model: PreTrainedModel, stop_ids: Sequence[int], *, batch_size: int):
        self.model, self.batch_size = model, batch_size
        self.stop_ids = _all_stop_ids(stop_ids, model.generation_config)
        self.positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._model_generate = cast(Callable[..., Tensor], model.generate)
        model.generation_config = GenerationConfig(eos_token_id=self.stop_ids)  # what a call leaves open is taken from here

    def stream(self, prompts: Sequence[list[int]], sampling: Sampling) -> Iterator[list[tuple[int, Completion]]]:
        """See `Rollout.stream`. Long prompts come first, so that too little memory shows at once."""
        numbers = sorted(range(len(prompts) * sampling.n), key=lambda number: -len(prompts[number // sampling.n]))
        for start in range(0, len(numbers), self.batch_size):
            batch = numbers[start : start + self.batch_size]
            completions = self._generate_batch([prompts[number // sampling.n] for number in batch], sampling, seed=sampling.seed + start)
            yield list(zip(batch, completions, strict=True))

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[Completion]:
        """See `Rollout.generate`."""
        done = dict(pair for batch in self.stream(prompts, sampling) for pair in batch)
        return [done[number] for number in sorted(done)]

    def generate_aloud(self, prompt: list[int], sampling: Sampling, on_token: Callable[[int], None]) -> Completion:
        """One answer, each token of it handed to `on_token` as soon as it is there. What `on_token` raises ends it."""
        return self._generate_batch([prompt], sampling, seed=sampling.seed, streamer=_TokenStreamer(on_token))[0]

    @torch.inference_mode()
    def _generate_batch(
        self, prompts: list[list[int]], sampling: Sampling, *, seed: int, streamer: BaseStreamer | None = None
    ) -> list[Completion]:
        device = self.model.device
        input_ids_BP, attention_mask_BP = pad_left(prompts, filler=self.stop_ids[0])
        # A generator of its own: the draws do not depend on the random numbers of whoever asks, nor change them.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            output = self._model_generate(
                input_ids_BP.to(device),
                attention_mask=attention_mask_BP.to(device),
                generation_config=generation_config(sampling, self.stop_ids),
                streamer=streamer,
            )
        return [self._cut(generated_G) for generated_G in output[:, input_ids_BP.shape[1] :].tolist()]

    def _cut(self, generated_G: list[int]) -> Completion:
        """What stands before the filler that follows the first stop token."""
        end = next((i for i, token in enumerate(generated_G) if token in self.stop_ids), None)
        return Completion(generated_G, "length") if end is None else Completion(generated_G[: end + 1], "stop")


class _TokenStreamer(BaseStreamer):
    """Hands on what `generate` puts, but for the prompt, which comes first."""

    def __init__(self, on_token: Callable[[int], None]):
        self._on_token, self._prompt_is_due = on_token, True

    def put(self, value: Tensor) -> None:
        if not self._prompt_is_due:
            self._on_token(int(value))
        self._prompt_is_due = False

    def end(self) -> None: ...


def load_rollout(
    path: str, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], *, batch_size: int, trust_remote_code: bool = False
) -> HfRollout:
    """A checkpoint that generates: on CUDA with its own dtype, else on the CPU in float32.

    Args:
        path: a model directory, a LoRA adapter directory, or a Hub name.
        tokenizer: of the same checkpoint.
        stop_ids: of its chat template.
    Raises:
        UserError: it cannot be loaded, or the tokenizer is not its own.
    """
    device, dtype = ("cuda", None) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = load_for_inference(path, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    check_vocabulary(model, tokenizer, path)
    return HfRollout(model, stop_ids, batch_size=batch_size)


def pad_left(prompts: list[list[int]], *, filler: int) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths so that all end in the last column.

    Returns:
        input_ids_BP and attention_mask_BP, 0 at the filler, both int64.
    """
    longest = max(map(len, prompts))
    input_ids_BP = torch.tensor([[filler] * (longest - len(prompt)) + prompt for prompt in prompts])
    attention_mask_BP = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return input_ids_BP, attention_mask_BP


def generation_config(sampling: Sampling, stop_ids: Sequence[int]) -> GenerationConfig:
    """For `generate`: nothing but the temperature changes or cuts the model's distribution."""
    draws = sampling.temperature > 0
    how = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0} if draws else {"do_sample": False}
    return GenerationConfig(max_new_tokens=sampling.max_new_tokens, eos_token_id=list(stop_ids), pad_token_id=stop_ids[0], **how)


def _all_stop_ids(stop_ids: Sequence[int], generation: GenerationConfig | None) -> list[int]:
    own = generation.eos_token_id if generation is not None else None
    own_ids = [] if own is None else [own] if isinstance(own, int) else list(own)
    return list(dict.fromkeys([*stop_ids, *own_ids]))
