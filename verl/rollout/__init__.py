"""Generation: one file an engine, each with the contract below.

An engine's module has two functions, with the same arguments in each:

    load(path, tokenizer, stop_ids, options) -> Rollout          a checkpoint that generates, for the evaluator and the chat
    share(model, path, tokenizer, stop_ids, options) -> Rollout  a model that is being trained; an engine with weights of its own
                                                                 loads `path` and is then given the trained ones by `update_weights`
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
    """How answers are drawn.

    Attributes:
        max_new_tokens: longest answer, its stop token included.
        temperature: 0 takes the most likely token each time; above it, the distribution is that of the logits divided by it, uncut.
        n: answers to each prompt.
        seed: of the draws; the same call on the same machine draws the same answers.
        top_k: draw among so many most likely tokens; 0: all. For evaluation: what is trained on must be drawn uncut.
        top_p: draw among the most likely tokens that have this share of the probability; 1: all.
        logprobs: whether the answers have to say them; where they need not, an engine may be faster.
    """

    max_new_tokens: int
    temperature: float = 0.0
    n: int = 1
    seed: int = 1
    top_k: int = 0
    top_p: float = 1.0
    logprobs: bool = True

    @property
    def is_cut(self) -> bool:
        """Whether tokens are left out of the draws."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1.0)


@dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
        token_ids: the generated tokens, with the stop token that ended them; a server may also answer with none.
        finish_reason: "stop", or "length" when it was cut at max_new_tokens.
        logprobs: natural logarithm of each token's probability in the uncut distribution at the temperature of the draws (greedy:
            1); None where nobody asked, or the engine does not say.
        version: of the weights that drew it.
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
    """An engine that generates.

    Attributes:
        stop_ids: tokens that end an answer.
        positions: longest prompt and answer together, in tokens; None if the model sets no limit.
    """

    stop_ids: list[int]
    positions: int | None

    def stream(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> Iterator[list[tuple[int, Completion]]]:
        """Answers as they are done, in any order.

        Args:
            prompts: token ids, at least one each.
            seeds: one a prompt; answer k of a prompt is drawn from `sampling.seed`, the prompt's seed and k alone. None: its number.
        Yields:
            numbered answers; `sampling.n` answers to prompt i have the numbers from `i * n` to `i * n + n - 1`.
        Raises:
            UserError: a prompt and its answer are longer than the model's positions, or do not fit into memory.
        """
        ...

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None) -> list[Completion]:
        """All answers, in the order of their numbers: those to one prompt side by side, prompts in the caller's order."""
        ...

    def update_weights(self, named_tensors: "Iterable[tuple[str, Tensor]]", version: int) -> None:
        """Generate with these weights from now on.

        Args:
            named_tensors: by the names of the model's parameters; not read by an engine that computes with the trainer's own.
            version: what completions carry.
        """
        ...

    def sleep(self) -> None:
        """Free the memory that is needed while generating only, where there is enough of it to be worth the time of taking it again."""
        ...

    def wake(self) -> None:
        """The end of `sleep`; whoever generates wakes an engine by that too."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...

    def describe(self) -> str:
        """What it runs on, such as "GPU of a name, bfloat16"."""
        ...


@dataclass(frozen=True)
class Options:
    """What the engines are told; each takes what it knows.

    Attributes:
        max_sequences: answers side by side; None: what memory allows.
        max_positions: longest prompt and answer together that will come; None: as they come.
        compile: whether what runs for each token is compiled; None: where the engine takes it to be worth it.
        url: a server's address.
        weights_folder: where new weights are put for a server to read; None: the memory of this machine, if it is on it.
        gpu_memory_utilization: share of a GPU's memory for an engine in this process with weights of its own.
        trust_remote_code: run code that comes with the model.
        key: the config's name of max_sequences, for errors.
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
    """A checkpoint that generates.

    Args:
        name: native, hf, vllm, sglang, or path/to/file.py.
        path: a model directory, a LoRA adapter directory, or a Hub name.
        tokenizer: of the same checkpoint.
        stop_ids: of its chat template; those of its generation_config.json are added.
    Raises:
        UserError: no such engine, or a checkpoint that it cannot load.
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
    """A model that is being trained, generating.

    Args:
        model: the trainer's, whole on this process; native and hf compute with its weights as they are.
        path: what the trainer started from, for engines with weights of their own.
    Raises:
        UserError: as `load_rollout`.
    """
    rollout: Rollout = plugin.load("verl.rollout", name, needs=("share",)).share(model, path, tokenizer, stop_ids, options)
    return rollout


def generate_aloud(rollout: Rollout, prompt: list[int], sampling: Sampling, on_token: Callable[[int], None]) -> Completion:
    """One answer, each token of it handed to `on_token`: as soon as it is there, by engines in this process that have a method of
    this name, else at the end. What `on_token` raises ends it.
    """
    method: Callable[..., Completion] | None = getattr(rollout, "generate_aloud", None)
    if method is not None:
        return method(prompt, sampling, on_token)
    [completion] = rollout.generate([prompt], sampling)
    for token in completion.token_ids:
        on_token(token)
    return completion
