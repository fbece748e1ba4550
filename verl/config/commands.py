"""Settings of the evaluator, the chat, the export and the demo."""

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import MISSING

from verl.config.values import at_least, one_of
from verl.errors import UserError
from verl.plugin import Plugins


@dataclass
class EngineConfig:
    # What generates: "native", "hf" (transformers), "vllm" or "sglang".
    name: str = "native"
    # A server's address (vllm, sglang); null: in this process.
    url: str | None = None
    # vllm in this process: the share of a GPU's memory that it may take.
    gpu_memory_utilization: float = 0.5


@dataclass
class GraderConfig:
    """Keys of the grader that `metric` names, spelled as in reinforcement learning."""

    plugins: ClassVar[Plugins] = Plugins("verl.rewards", "reward", ("score",), named_by="metric")


@dataclass
class EvalConfig:
    """`python -m verl.eval.sft_evaluator`: exact match of a checkpoint on a file of questions and answers."""

    # A checkpoint: a Hugging Face model directory, a LoRA adapter directory, or a Hub name.
    model_path: str = MISSING
    # Rows to answer, named as in data.train_files.
    test_file: Any = MISSING
    # Column of the question.
    prompt_key: str = "question"
    # Column of the reference answer.
    response_key: str = "answer"
    # Column of a chat to answer, in place of prompt_key: a list of messages, whose last answer is the reference where response_key is no
    # column.
    messages_key: str | None = None
    # With messages_key: column of the tools that the chat template shows.
    tools_key: str | None = None
    # What the model is told before each question; null: what its template says by itself.
    system_prompt: str | None = None
    # Where results.json and predictions.jsonl go.
    output_dir: str = MISSING
    # Longest answer, in tokens.
    max_new_tokens: int = 512
    # Use only the first rows; null or -1: all.
    max_samples: int | None = None
    # Answers per question; exact match is their mean.
    n: int = 1
    # 0: the most likely token each time; above: sample.
    temperature: float = 0.0
    # Keep only so many of the most likely tokens in the draws; 0: all.
    top_k: int = 0
    # Keep only the most likely tokens that have this share of the probability; 1: all.
    top_p: float = 1.0
    # Answers generated at a time; null: what memory allows.
    batch_size: int | None = None
    rollout: EngineConfig = field(default_factory=EngineConfig)
    # The grader: a name in verl/rewards or path/to/file.py. Its own keys are `reward.KEY`, as in reinforcement learning.
    metric: str = "gsm8k"
    reward: GraderConfig = field(default_factory=GraderConfig)
    # Seed of sampling.
    seed: int = 1
    # Run Python code that comes with the model. Only for sources that you trust.
    trust_remote_code: bool = False

    def check(self) -> None:
        """Cross-field checks. Raises UserError naming the key."""
        if self.tools_key and not self.messages_key:
            raise UserError("tools_key needs messages_key", where="tools_key", fix="set messages_key to the column of the chat")
        if self.system_prompt is not None and self.messages_key:
            what = "messages_key and system_prompt are both set"
            raise UserError(what, where="system_prompt", fix="leave it out: a chat begins with its own")
        at_least("max_new_tokens", self.max_new_tokens, 1)
        at_least("n", self.n, 1)
        at_least("batch_size", self.batch_size, 1)
        at_least("temperature", self.temperature, 0.0)
        at_least("top_k", self.top_k, 0)
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"{self.top_p} is not a share", where="top_p", fix="give a number above 0, up to 1")
        if self.max_samples is not None and self.max_samples != -1:
            at_least("max_samples", self.max_samples, 1)
        if self.n > 1 and self.temperature == 0:
            raise UserError(f"n={self.n} answers at temperature=0 are all the same", where="n", fix="set temperature=1, or n=1")


@dataclass
class ChatConfig:
    """`verl chat DIR`: talk with a checkpoint in the terminal."""

    # A checkpoint: a Hugging Face model directory, a LoRA adapter directory, or a Hub name. `verl chat DIR` says the same.
    model_path: str = MISSING
    # 0: the most likely token each time; above: sample.
    temperature: float = 0.7
    # Longest answer, in tokens.
    max_new_tokens: int = 512
    # What the model is told before the chat; null: what its template says by itself.
    system: str | None = None
    rollout: EngineConfig = field(default_factory=EngineConfig)
    # Run Python code that comes with the model. Only for sources that you trust.
    trust_remote_code: bool = False

    def check(self) -> None:
        """Cross-field checks. Raises UserError naming the key."""
        at_least("temperature", self.temperature, 0.0)
        at_least("max_new_tokens", self.max_new_tokens, 1)


@dataclass
class ExportConfig:
    """`verl export SRC DIR`: a checkpoint as one Hugging Face directory, an adapter merged into its base."""

    # What to export: a LoRA adapter directory, a model directory, or a run's directory, of which the newest checkpoint is taken.
    source: str = MISSING
    # Where to; must not exist yet, or be empty. `verl export SRC DIR` says the same as source=SRC directory=DIR.
    directory: str = MISSING
    # Numbers of the weights: "bfloat16", "float16" or "float32"; null: those of the base.
    dtype: str | None = None
    # Largest file of weights.
    max_shard_size: str = "5GB"
    # Run Python code that comes with the model. Only for sources that you trust.
    trust_remote_code: bool = False

    def check(self) -> None:
        """Cross-field checks. Raises UserError naming the key."""
        one_of("dtype", self.dtype, (None, "bfloat16", "float16", "float32"))
        if re.fullmatch(r"[1-9]\d*(\.\d+)? *(KB|MB|GB|TB)", self.max_shard_size, re.IGNORECASE) is None:
            raise UserError(f"found {self.max_shard_size!r}", where="max_shard_size", fix="give a size such as 5GB or 500MB")


@dataclass
class DemoConfig:
    """`verl demo`: from made-up word problems to a small model that answers them, offline. Its files are in ./demo-run."""

    # Problems to train on, each once.
    train_rows: int = 24000
    # Steps of reinforcement learning from an early checkpoint.
    rl_steps: int = 60
    # Problems to answer before and after, with numbers that were not trained.
    test_rows: int = 200
    # Seed of the problems, the weights and the order of rows.
    seed: int = 1

    def check(self) -> None:
        """Cross-field checks. Raises UserError naming the key."""
        at_least("train_rows", self.train_rows, 1)
        at_least("rl_steps", self.rl_steps, 1)
        at_least("test_rows", self.test_rows, 1)
        at_least("seed", self.seed, 0)
