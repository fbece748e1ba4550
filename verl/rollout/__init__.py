"""Generation: one module per engine, each with the `Rollout` contract below.

An engine's module has two functions, with the same arguments in every engine:

    load(path, tokenizer, stop_ids, options) -> Rollout          generate with a checkpoint, for the evaluator and the chat
    share(model, path, tokenizer, stop_ids, options) -> Rollout  generate with a model in training; an engine that holds its own copy
                                                                 of the weights loads `path`, and `update_weights` sends it new ones
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from verl import plugin

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled.

    Attributes:
        max_new_tokens: longest answer, its stop token included.
        temperature: logits are divided by it; 0: greedy decoding.
        n: answers to each prompt.
        seed: of the random numbers; the same call on the same machine gives the same answers.
        top_k: sample from this many most likely tokens; 0: from all. For evaluation only: training needs the whole distribution.
        top_p: sample from the most likely tokens that together have this probability; 1: from all. For evaluation only.
        logprobs: whether answers need log-probabilities; an engine may be faster without them.
    """

    max_new_tokens: int
    temperature: float = 0.0
    n: int = 1
    seed: int = 1
    top_k: int = 0
    top_p: float = 1.0
    logprobs: bool = True

    @property
    def is_filtered(self) -> bool:
        """Whether top_k or top_p exclude tokens."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1.0)


@dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
        token_ids: the generated tokens, including the stop token that ended them; a server's answer may be empty.
        finish_reason: "stop", or "length" if the answer reached max_new_tokens.
        logprobs: log-probability of each token (natural) at the sampling temperature (greedy: 1), before top_k and top_p; None if
            they were not asked for, or the engine does not give them.
        version: of the weights that generated it.
    """

    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    logprobs: list[float] | None = None
    version: int = 0

    def text(self, tokenizer: "PreTrainedTokenizerBase") -> str:
        """The answer as text, without its stop token."""
        ids = self.token_ids[:-1] if self.finish_reason == "stop" else self.token_ids
        return str(tokenizer.decode(ids, skip_special_tokens=True))


class Rollout(Protocol):
    """A generation engine.

    Attributes:
        stop_ids: tokens that end an answer.
        positions: longest prompt and answer together, in tokens; None if the model sets no limit.
    """

    stop_ids: list[int]
    positions: int | None

    def stream(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> Iterator[list[tuple[int, Completion]]]:
        """Generate answers, and yield them as they finish, in any order.

        Args:
            prompts: token ids, at least one each.
            seeds: one per prompt; None: its index. Answer k depends on `sampling.seed`, the prompt's seed and k alone.
        Yields:
            numbered answers; the `sampling.n` answers to prompt i have the numbers `i * n` to `i * n + n - 1`.
        Raises:
            UserError: a prompt and its answer exceed the model's positions, or do not fit into memory.
        """
        ...

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None) -> list[Completion]:
        """Generate all answers, in the order of their numbers: prompt by prompt, `sampling.n` answers each."""
        ...

    def update_weights(self, named_tensors: "Iterable[tuple[str, Tensor]]", version: int) -> None:
        """Generate with these weights from now on.

        Args:
            named_tensors: under the names of the model's parameters; ignored by an engine that shares the trainer's model.
            version: for `Completion.version`.
        """
        ...

    def sleep(self) -> None:
        """Free the memory that only generation needs, if there is enough of it to be worth allocating again."""
        ...

    def wake(self) -> None:
        """End `sleep`. Generating wakes an engine too."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...

    def describe(self) -> str:
        """Device and dtype, such as "NVIDIA H100, bfloat16", for the log."""
        ...


@dataclass(frozen=True)
class Options:
    """Settings of the engines; each reads those that apply to it.

    Attributes:
        max_sequences: answers generated at the same time; None: as many as fit into memory.
        max_positions: longest prompt and answer together that will be asked for; None: unknown.
        compile: whether decode steps are compiled; None: if the engine finds it worth while.
        url: address of a server.
        weights_folder: where new weights are written for a server to read; None: this machine's memory, for a server on this machine.
        gpu_memory_utilization: share of a GPU's memory for an engine in this process that holds its own copy of the weights.
        trust_remote_code: run code that comes with the model.
        key: name of max_sequences in the config, for error messages.
    """

    max_sequences: int | None = None
    max_positions: int | None = None
    compile: bool | None = None
    url: str | None = None
    weights_folder: str | None = None
    gpu_memory_utilization: float = 0.5
    trust_remote_code: bool = False
    key: str = "rollout.max_sequences"


DEFAULTS = Options()


def load_rollout(
    name: str, path: str, tokenizer: "PreTrainedTokenizerBase", stop_ids: Sequence[int], options: Options = DEFAULTS
) -> Rollout:
    """Load a checkpoint for generation.

    Args:
        name: native, hf, vllm, or path/to/file.py.
        path: a model directory, a LoRA adapter directory, or a Hub name.
        tokenizer: of the same checkpoint.
        stop_ids: of its chat template; those of its generation_config.json are added.
    Raises:
        UserError: no such engine, or it cannot load the checkpoint.
    """
    rollout: Rollout = plugin.load("verl.rollout", name, needs=("load",)).load(path, tokenizer, stop_ids, options)
    return rollout


def share(
    name: str,
    model: "PreTrainedModel",
    path: str,
    tokenizer: "PreTrainedTokenizerBase",
    stop_ids: Sequence[int],
    options: Options = DEFAULTS,
) -> Rollout:
    """Generate with a model that is being trained.

    Args:
        model: the trainer's, unsharded on this process; native and hf compute with its weights in place.
        path: the checkpoint that training started from, for engines that hold their own copy of the weights.
    Raises:
        UserError: see `load_rollout`.
    """
    rollout: Rollout = plugin.load("verl.rollout", name, needs=("share",)).share(model, path, tokenizer, stop_ids, options)
    return rollout


def stream_tokens(rollout: Rollout, prompt: list[int], sampling: Sampling, on_token: Callable[[int], None]) -> Completion:
    """Generate one answer, and call `on_token` with each token: as it is generated if the engine has a method of this name, otherwise
    at the end. An exception from `on_token` ends generation.
    """
    method: Callable[..., Completion] | None = getattr(rollout, "stream_tokens", None)
    if method is not None:
        return method(prompt, sampling, on_token)
    [completion] = rollout.generate([prompt], sampling)
    for token in completion.token_ids:
        on_token(token)
    return completion
