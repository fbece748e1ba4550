"""The default engine: native where it is exact, else transformers' own code."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from verl.errors import UserError
from verl.rollout import Completion, Options, Rollout, Sampling
from verl.rollout._model import load_model, rope_limit
from verl.rollout.hf import HfRollout
from verl.rollout.native import NativeRollout

if TYPE_CHECKING:
    from torch import Tensor


def load(path: str, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], options: Options) -> Rollout:
    """See `verl.rollout.load_rollout`."""
    return choose(load_model(path, tokenizer, options), stop_ids, options, is_shared=False)


def share(model: PreTrainedModel, path: str, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], options: Options) -> Rollout:
    """See `verl.rollout.share`. The engine computes with the trainer's weights."""
    return choose(model, stop_ids, options, is_shared=True)


def choose(model: PreTrainedModel, stop_ids: Sequence[int], options: Options, *, is_shared: bool) -> Rollout:
    """Return the fastest exact engine for a model.

    Raises:
        UserError: no engine can run the model.
    """
    try:
        native = NativeRollout(model, stop_ids, options, is_shared=is_shared)
    except UserError as error:
        return HfRollout(model, stop_ids, options, is_shared=is_shared, why=error.what)
    if rope_limit(model) is None:
        return native
    return ByLength(native, HfRollout(model, stop_ids, options, is_shared=is_shared))


class ByLength:
    """See `Rollout`. The native engine up to the length at which a model's rotary embeddings change, transformers' own code beyond it."""

    def __init__(self, native: NativeRollout, hf: HfRollout):
        self._native, self._hf = native, hf
        self.stop_ids, self.positions = native.stop_ids, native.positions

    def _engine(self, prompts: Sequence[list[int]], sampling: Sampling) -> NativeRollout | HfRollout:
        return self._native if self._native.is_exact_for(prompts, sampling) else self._hf

    def stream(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> Iterator[list[tuple[int, Completion]]]:
        """See `Rollout.stream`."""
        return self._engine(prompts, sampling).stream(prompts, sampling, seeds)

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None) -> list[Completion]:
        """See `Rollout.generate`."""
        return self._engine(prompts, sampling).generate(prompts, sampling, seeds)

    def stream_tokens(self, prompt: list[int], sampling: Sampling, on_token: Callable[[int], None]) -> Completion:
        """See `verl.rollout.stream_tokens`."""
        return self._engine([prompt], sampling).stream_tokens(prompt, sampling, on_token)

    def update_weights(self, named_tensors: "Iterable[tuple[str, Tensor]]", version: int) -> None:
        """See `Rollout.update_weights`. The engines share the model, so the weights are copied once."""
        self._native.update_weights(named_tensors, version)
        self._hf.version = version

    def sleep(self) -> None:
        """See `Rollout.sleep`."""
        self._native.sleep()

    def wake(self) -> None:
        """See `Rollout.wake`."""

    def close(self) -> None:
        """See `Rollout.close`."""
        self._native.close()

    def describe(self) -> str:
        """See `Rollout.describe`."""
        return self._native.describe()
