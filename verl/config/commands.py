"""Settings of the evaluator, chat, export and demo commands."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import MISSING

from verl.config.workers import WorkersConfig, check_workers
from verl.errors import UserError, at_least, one_of
from verl.plugin import Plugins


@dataclass
class EngineConfig:
    # Generation engine: "native", "hf" (transformers) or "vllm"; "auto" is native where its answers are those of the plain model, else hf.
    name: str = "auto"
    # Address of a vLLM server; null: generate in this process.
    url: str | None = None
    # vllm in this process: the fraction of GPU memory that it may use.
    gpu_memory_utilization: float = 0.5
    # Exact speculation in the native engine, with the answers that it gives without: "auto" tries several tokens in a step where that pays,
    # "never" does not. They come from the prompt and from other answers to it.
    speculate: str = "never"


def check_engine(rollout: EngineConfig) -> None:
    """Check the keys of a generation engine. Raises UserError that names the key."""
    if not 0.0 < rollout.gpu_memory_utilization <= 1.0:
        fix = "give a number above 0, up to 1, such as 0.5"
        raise UserError(f"found {rollout.gpu_memory_utilization}", where="rollout.gpu_memory_utilization", fix=fix)
    one_of("rollout.speculate", rollout.speculate, ("auto", "never"))


@dataclass
class GraderConfig(WorkersConfig):
    """Keys of the grader that `metric` names, spelled as in reinforcement learning."""

    plugins: ClassVar[Plugins] = Plugins("verl.rewards", "reward", ("score", "score_group"), named_by="metric", any_of=True)

    # If the metric fails on an answer or gives no finite number: "stop" ends the evaluation with an error that names the row, "zero" counts
    # the answer as 0 and writes the error into its line of predictions.jsonl.
    on_error: str = "stop"


@dataclass
class EvalConfig:
    """`verl eval`: grade the answers of a checkpoint to a file of questions. `verl eval DIR --against OTHER` compares two evaluations."""

    # A checkpoint: a Hugging Face model directory, a LoRA adapter directory, or a Hub name.
    model_path: str = MISSING
    # Rows to answer, in the forms of data.train_files without shares. Of a Hub data set, the split test, or else validation.
    test_file: Any = MISSING
    # Column of the question.
    prompt_key: str = "question"
    # Column of the reference answer.
    response_key: str = "answer"
    # Column of a chat to answer, a list of messages; if set, it replaces prompt_key. If the rows have no response_key column, the chat's
    # last answer is the reference.
    messages_key: str | None = None
    # Column of the tools that the chat may call, as JSON schemas; null: the column `tools` or `functions`, if it has schemas.
    tools_key: str | None = None
    # Values of the chat template's variables, such as {enable_thinking: false}. A checkpoint of verl has those of its training.
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    # Column of such values for single rows, an object.
    chat_template_kwargs_key: str | None = None
    # System prompt before each question; null: the chat template's default.
    system_prompt: str | None = None
    # Solved rows that the model sees before each question, as earlier turns of the chat: the first few_shot rows of few_shot_file.
    few_shot: int = 0
    # Rows of the examples, in the forms of test_file and with the same columns.
    few_shot_file: Any = None
    # Directory of results.json and predictions.jsonl. The results of another evaluation are not overwritten.
    output_dir: str = MISSING
    # Replace the results that are in output_dir.
    overwrite: bool = False
    # `--against OTHER`: compare with another evaluation's directory, or with a checkpoint, which is then evaluated too, by a paired test.
    against: str | None = None
    # Maximum length of an answer, in tokens.
    max_new_tokens: int = 512
    # Use only the first N rows; null or -1: all.
    max_samples: int | None = None
    # Answers per question; scores are averaged over them. With more than one there are pass@k and majority vote.
    n: int = 1
    # Sampling temperature; 0 takes the most likely token.
    temperature: float = 0.0
    # Sample from the k most likely tokens; 0: from all.
    top_k: int = 0
    # Sample from the smallest set of most likely tokens with at least this total probability; 1: from all.
    top_p: float = 1.0
    # Answers generated at a time; null: as many as fit into memory.
    batch_size: int | None = None
    rollout: EngineConfig = field(default_factory=EngineConfig)
    # The grader: a name in verl/rewards (gsm8k, math, exact, choice, regex, f1, rouge, judge, pairwise) or path/to/file.py; null: by what
    # the rows look like. Its own keys are `reward.KEY`, as in reinforcement learning.
    metric: str | None = None
    reward: GraderConfig = field(default_factory=GraderConfig)
    # Seed of sampling.
    seed: int = 1
    # Run Python code that comes with the model. Only for sources that you trust.
    trust_remote_code: bool = False

    def check(self) -> None:
        """Check values and combinations of keys. Raises UserError that names the key."""
        if self.system_prompt is not None and self.messages_key:
            what = "messages_key and system_prompt are both set"
            raise UserError(what, where="system_prompt", fix="remove it: each chat has its own system prompt")
        check_sampling(self.max_new_tokens, self.temperature, self.n, self.top_k, self.top_p)
        one_of("reward.on_error", self.reward.on_error, ("stop", "zero"))
        check_workers(self.reward)
        at_least("batch_size", self.batch_size, 1)
        at_least("seed", self.seed, 0)
        check_engine(self.rollout)
        at_least("few_shot", self.few_shot, 0)
        if self.few_shot > 0 and self.few_shot_file is None:
            fix = "set it to a file of solved rows, such as the training file"
            raise UserError(f"few_shot={self.few_shot} needs rows", where="few_shot_file", fix=fix)
        if self.few_shot == 0 and self.few_shot_file is not None:
            raise UserError(
                "few_shot_file is set, and few_shot=0 uses no row of it", where="few_shot", fix="set few_shot=5, or remove the file"
            )
        if self.max_samples is not None and self.max_samples != -1:
            at_least("max_samples", self.max_samples, 1)


def check_sampling(max_new_tokens: int, temperature: float, n: int, top_k: int, top_p: float) -> None:
    """Check how answers are to be sampled. Raises UserError that names the argument."""
    at_least("max_new_tokens", max_new_tokens, 1)
    at_least("temperature", temperature, 0.0)
    at_least("n", n, 1)
    at_least("top_k", top_k, 0)
    at_least("top_p", top_p, 0.0)
    if not 0.0 < top_p <= 1.0:
        raise UserError(f"found {top_p}", where="top_p", fix="give a number above 0, up to 1")
    if n > 1 and temperature == 0:
        raise UserError(f"n={n} answers at temperature=0 are all equal", where="n", fix="set temperature=1, or n=1")


@dataclass
class ChatConfig:
    """`verl chat DIR`: talk with a checkpoint in the terminal, or with two side by side: `verl chat DIR --compare DIR2`."""

    # A checkpoint: a model directory, a LoRA adapter directory, a run's directory, or a Hub name. `verl chat DIR` sets it too.
    model_path: str = MISSING
    # A second checkpoint that answers the same questions. `--compare DIR2` means compare=DIR2.
    compare: str | None = None
    # Sampling temperature; 0 takes the most likely token.
    temperature: float = 0.7
    # Sample from the k most likely tokens; 0: from all.
    top_k: int = 0
    # Sample from the smallest set of most likely tokens with at least this total probability; 1: from all.
    top_p: float = 1.0
    # Seed of sampling: the same chat gets the same answers; null: another one each time.
    seed: int | None = None
    # Maximum length of an answer, in tokens.
    max_new_tokens: int = 512
    # System prompt; null: the chat template's default.
    system: str | None = None
    # Keep the typed lines for the next chat, where the arrow keys find them, in a file that only you can read; not those with a secret.
    history: bool = True
    rollout: EngineConfig = field(default_factory=EngineConfig)
    # Run Python code that comes with the model. Only for sources that you trust.
    trust_remote_code: bool = False

    def check(self) -> None:
        """Check values and combinations of keys. Raises UserError that names the key."""
        check_sampling(self.max_new_tokens, self.temperature, 1, self.top_k, self.top_p)
        at_least("seed", self.seed, 0)
        check_engine(self.rollout)
        if self.compare is not None and self.rollout.url is not None:
            what = "a server at rollout.url has one model, and compare= asks for two"
            raise UserError(what, where="compare", fix="leave out rollout.url, or compare")


@dataclass
class ServeConfig:
    """`verl serve DIR`: answer requests in OpenAI's format over HTTP with a checkpoint, until Ctrl+C."""

    # A checkpoint: a model directory, a LoRA adapter directory, a run's directory, or a Hub name. `verl serve DIR` sets it too.
    model_path: str = MISSING
    # Server: "vllm", "transformers", or "auto": vllm where it is installed, also in another environment on PATH.
    engine: str = "auto"
    # Address to listen at. 127.0.0.1 is this machine alone; 0.0.0.0 is everybody on its network.
    host: str = "127.0.0.1"
    # Port to listen at; 0: a free one.
    port: int = 8000
    # Name of the model in requests; null: that of the directory.
    name: str | None = None
    # Further words for the server's command line, such as [--max-model-len,4096].
    arguments: list[str] = field(default_factory=list)
    # Run Python code that comes with the model. Only for sources that you trust.
    trust_remote_code: bool = False

    def check(self) -> None:
        """Check values and combinations of keys. Raises UserError that names the key."""
        one_of("engine", self.engine, ("auto", "vllm", "transformers"))
        if not 0 <= self.port <= 65535:
            raise UserError(f"found {self.port}", where="port", fix="give a number from 0 to 65535")
        if self.name is not None and re.fullmatch(r"[A-Za-z0-9][\w.\-]*", self.name) is None:
            raise UserError(f"found {self.name!r}", where="name", fix="use letters, digits, -, _ and .")


@dataclass
class ExportConfig:
    """`verl export SRC DIR`: write a checkpoint as one Hugging Face directory, with an adapter merged into its base, and share it.

    `--hub NAME`, `--gguf FILE` and `--card` mean hub=NAME, gguf=FILE and card=true. With one of them, DIR may be left out: SRC is then
    shared as it is.
    """

    # What to export: a LoRA adapter directory, a model directory, or a run's directory, which means its newest checkpoint.
    source: str = MISSING
    # Output directory; it must be new or empty. `verl export SRC DIR` means source=SRC directory=DIR.
    directory: str | None = None
    # Merge an adapter into its base model; false: write the adapter itself, which needs the base model to run.
    merge: bool = True
    # Dtype of the weights: "bfloat16", "float16" or "float32"; null: that of the base.
    dtype: str | None = None
    # Maximum size of a weight file.
    max_shard_size: str = "5GB"
    # Write README.md, a model card: data, method, settings, scores, chat template, licence of the base.
    card: bool = False
    # The run's directory, of which the card tells; null: the run in whose directory the checkpoint is.
    run: str | None = None
    # Directories of evaluations (output_dir of verl eval) for the card; null: those in the run's directory.
    evaluations: list[str] | None = None
    # Name of the base model on the Hub, for the card; null: known from the run, if the base is a name or in the Hub's cache.
    base_model: str | None = None
    # Push the directory with a model card to the Hugging Face Hub as this repository, such as my-name/my-model.
    hub: str | None = None
    # Whether a new repository is private.
    hub_private: bool = True
    # Push into a repository that is there already; files of the same names are replaced, in a new commit.
    hub_replace: bool = False
    # Write this file, too: the model in the GGUF format of llama.cpp and Ollama, by llama.cpp's own converter.
    gguf: str | None = None
    # Type of the weights in the GGUF file: "auto" (as in the directory), "f32", "f16", "bf16" or "q8_0".
    gguf_type: str = "auto"
    # Run Python code that comes with the model. Only for sources that you trust.
    trust_remote_code: bool = False

    def check(self) -> None:
        """Check values and combinations of keys. Raises UserError that names the key."""
        one_of("dtype", self.dtype, (None, "bfloat16", "float16", "float32"))
        one_of("gguf_type", self.gguf_type, ("auto", "f32", "f16", "bf16", "q8_0"))
        if re.fullmatch(r"[1-9]\d*(\.\d+)? *(KB|MB|GB|TB)", self.max_shard_size, re.IGNORECASE) is None:
            raise UserError(f"found {self.max_shard_size!r}", where="max_shard_size", fix="give a size such as 5GB or 500MB")
        if self.directory is None and not (self.hub or self.card or self.gguf):
            raise UserError("a new directory must be given", where="verl export", fix=f"write verl export {self.source} NEW_DIR")
        if self.directory is None and not self.merge:
            raise UserError("merge=false without an output directory", where="merge", fix="leave it out: nothing is merged without one")
        if not self.merge and (self.dtype or self.gguf):
            key = "dtype" if self.dtype else "gguf"
            raise UserError("an adapter that is not merged is written as it is", where=key, fix=f"leave out {key}, or merge=false")


@dataclass
class DemoConfig:
    """`verl demo`: train a small model on generated word problems, offline. Its files are in ./demo-run."""

    # Number of problems to train on, each once.
    train_rows: int = 24000
    # Number of reinforcement learning steps, from an early checkpoint.
    rl_steps: int = 60
    # Number of test problems, with numbers that do not occur in training.
    test_rows: int = 200
    # Seed of the problems, the weights and the row order.
    seed: int = 1

    def check(self) -> None:
        """Check values and combinations of keys. Raises UserError that names the key."""
        at_least("train_rows", self.train_rows, 1)
        at_least("rl_steps", self.rl_steps, 1)
        at_least("test_rows", self.test_rows, 1)
        at_least("seed", self.seed, 0)


# Options of `verl export` that stand for keys.
EXPORT_OPTIONS, EXPORT_FLAGS = {"--hub": "hub", "--gguf": "gguf"}, {"--card": "card=true"}


def keyed(given: Sequence[Any]) -> list[Any]:
    """Rewrite the arguments of an export as `key=value`: SRC and DIR, texts or paths, and the options `--hub`, `--gguf` and `--card`.

    Raises:
        UserError: an option has no value.
    """
    words = optioned(given, EXPORT_OPTIONS, EXPORT_FLAGS)
    for number, name in enumerate(("source", "directory")):
        word = words[number] if len(words) > number else None
        if isinstance(word, os.PathLike) or (isinstance(word, str) and "=" not in word and not word.startswith("-")):
            words[number] = f"{name}={os.fspath(word)}"
    return words


def optioned(given: Sequence[Any], options: Mapping[str, str], flags: Mapping[str, str] | None = None) -> list[Any]:
    """Rewrite `--option VALUE` and `--option=VALUE` as `key=VALUE`, and flags as what they stand for, after all other arguments.

    Args:
        options: key of each option with a value.
        flags: what each option without a value stands for.
    Raises:
        UserError: an option has no value.
    """
    rest: list[Any] = []
    found: list[Any] = []
    words = iter(given)
    for word in words:
        name, sign, value = word.partition("=") if isinstance(word, str) else ("", "", "")
        if flags and name in flags and not sign:
            found.append(flags[name])
        elif name in options:
            of_option: Any = value if sign else next(words, "")
            if isinstance(of_option, str) and (not of_option or of_option.startswith("--")):
                raise UserError(f"{name} needs a value", fix=f"{name} VALUE, or {options[name]}=VALUE")
            found.append(f"{options[name]}={os.fspath(of_option)}")
        else:
            rest.append(word)
    return [*rest, *found]
