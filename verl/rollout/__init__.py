"""Generation: one module per engine, each with a class that satisfies the `Rollout` protocol below.

An engine's module has two functions, with the same arguments in every engine:

    load(path, tokenizer, stop_ids, options) -> Rollout          generate with a checkpoint, for evaluation and chat
    share(model, path, tokenizer, stop_ids, options) -> Rollout  generate with a model in training; an engine with its own copy of the
                                                                 weights loads `path`, and gets new weights by `update_weights`
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
    """Sampling parameters.

    Attributes:
        max_new_tokens: maximum tokens of a response, including its stop token.
        temperature: divisor of the logits; 0: greedy decoding.
        n: responses per prompt.
        seed: seed of the random numbers; the same call on the same machine gives the same responses.
        top_k: number of most likely tokens to sample from; 0: all. For evaluation only, because training needs the whole distribution.
        top_p: total probability of the most likely tokens to sample from; 1: all. For evaluation only.
        logprobs: whether to return log-probabilities; an engine may be faster without them.
        progress: whether `stream` also yields empty lists after every few tokens, so that the caller may look at `unfinished_tokens`, and
            stop. An engine without this method ignores it.
    """

    max_new_tokens: int
    temperature: float = 0.0
    n: int = 1
    seed: int = 1
    top_k: int = 0
    top_p: float = 1.0
    logprobs: bool = True
    progress: bool = False

    @property
    def is_filtered(self) -> bool:
        """Return whether top_k or top_p exclude tokens."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1.0)


@dataclass(frozen=True)
class Completion:
    """One response.

    Attributes:
        token_ids: generated tokens, including the stop token if there is one; a server's response may be empty.
        finish_reason: "stop", or "length" if the response reached max_new_tokens.
        logprobs: log-probability of each token, natural log, at the sampling temperature (greedy: 1), before top_k and top_p; None if
            they were not requested, or the engine does not return them.
        version: version of the weights that generated the response; of its first token, if `versions` are several.
        versions: version of the weights that generated each token; None: `version` generated all.
        is_finished: False only within a run that draws a response under several weights: more tokens follow.
    """

    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    logprobs: list[float] | None = None
    version: int = 0
    versions: list[int] | None = None
    is_finished: bool = True

    def text(self, tokenizer: "PreTrainedTokenizerBase") -> str:
        """Return the text of the response, without its stop token."""
        ids = self.token_ids[:-1] if self.finish_reason == "stop" else self.token_ids
        return str(tokenizer.decode(ids, skip_special_tokens=True))


class Rollout(Protocol):
    """A generation engine.

    It may have a method `unfinished_tokens() -> Mapping[int, int]`, for use between two results of `stream`: the indices of the responses
    that have not finished, and how many tokens each has at least.

    Attributes:
        stop_ids: tokens that end a response.
        positions: maximum tokens of a prompt with its response; None if the model has no limit.
    """

    stop_ids: list[int]
    positions: int | None

    def stream(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> Iterator[list[tuple[int, Completion]]]:
        """Generate responses, and yield them as they finish, in any order.

        Args:
            prompts: token ids of each prompt, at least one token.
            seeds: seed of each prompt; None: its index. Response k depends only on `sampling.seed`, the prompt's seed and k.
        Yields:
            pairs of a response's index and the response; the `n` responses to prompt i have the indices `i * n` to `i * n + n - 1`.
        Raises:
            UserError: a prompt with its response exceeds the model's positions, or does not fit into memory.
        """
        ...

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None) -> list[Completion]:
        """Generate all responses, and return them in the order of their indices: `sampling.n` for each prompt."""
        ...

    def update_weights(self, named_tensors: "Iterable[tuple[str, Tensor]]", version: int) -> None:
        """Replace the weights that the engine generates with.

        Args:
            named_tensors: names and values of the model's parameters; an engine that shares the trainer's model ignores them.
            version: version of these weights, for `Completion.version`.
        """
        ...

    def sleep(self) -> None:
        """Free the memory that only generation needs, if it is large enough to be worth freeing and allocating again."""
        ...

    def wake(self) -> None:
        """End `sleep`. Calling `stream` or `generate` wakes an engine too."""
        ...

    def close(self) -> None:
        """Free all memory of the engine."""
        ...

    def describe(self) -> str:
        """Return device and dtype for the log, such as "NVIDIA H100, bfloat16"."""
        ...


@dataclass(frozen=True)
class Options:
    """Settings of the engines. An engine ignores those that do not apply to it.

    Attributes:
        max_sequences: maximum responses generated at the same time; None: as many as fit into memory.
        max_positions: maximum tokens of a prompt with its response in any call; None: unknown.
        compile: whether to compile decode steps; None: the engine decides.
        url: address of a server.
        weights_folder: folder for files with new weights, which a server reads; None: a folder in this machine's memory, for a server on
            this machine.
        gpu_memory_utilization: share of a GPU's memory for an engine in this process with its own copy of the weights.
        trust_remote_code: whether to run Python code of the model's repository.
        speculate: "auto": the native engine speculates where it pays; "never".
        key: config key of `max_sequences`, for error messages.
    """

    max_sequences: int | None = None
    max_positions: int | None = None
    compile: bool | None = None
    url: str | None = None
    weights_folder: str | None = None
    gpu_memory_utilization: float = 0.5
    trust_remote_code: bool = False
    speculate: str = "never"
    key: str = "rollout.max_sequences"


DEFAULTS = Options()


def load_rollout(
    name: str, path: str, tokenizer: "PreTrainedTokenizerBase", stop_ids: Sequence[int], options: Options = DEFAULTS
) -> Rollout:
    """Load a checkpoint for generation.

    Args:
        name: auto, native, hf, vllm, or path/to/file.py.
        path: model directory, LoRA adapter directory, or Hub name.
        tokenizer: tokenizer of the same checkpoint.
        stop_ids: stop tokens of its chat template; those of its generation_config.json are added.
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
        model: the trainer's model, with all weights on this process; native and hf use its weights without a copy.
        path: checkpoint that training started from, for engines with their own copy of the weights.
    Raises:
        UserError: see `load_rollout`.
    """
    rollout: Rollout = plugin.load("verl.rollout", name, needs=("share",)).share(model, path, tokenizer, stop_ids, options)
    return rollout


def stream_tokens(rollout: Rollout, prompt: list[int], sampling: Sampling, on_token: Callable[[int], None]) -> Completion:
    """Generate one response, and call `on_token` with each token.

    If the engine has a method `stream_tokens`, the calls are made during generation, else at its end. An exception in `on_token` ends
    generation.
    """
    method: Callable[..., Completion] | None = getattr(rollout, "stream_tokens", None)
    if method is not None:
        return method(prompt, sampling, on_token)
    [completion] = rollout.generate([prompt], sampling)
    for token in completion.token_ids:
        on_token(token)
    return completion
