"""Settings of supervised fine-tuning."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from verl.config.checks import check_dist, check_model, check_offload, check_optim, check_samples, check_trainer
from verl.config.shared import DistConfig, ModelConfig, OptimConfig, TeacherConfig, TrainerConfig
from verl.errors import at_least


@dataclass
class DataConfig:
    # Training data: a path, a glob, a Hub data set (org/name, org/name:config or org/name:config:split), or a list of these. JSONL, JSON,
    # CSV, text, Parquet or Arrow, optionally gzipped. An entry of a list may have a share: {path: a.jsonl, weight: 2.0} is its relative
    # number of rows in an epoch, {path: a.jsonl, rows: 5000} the number itself.
    train_files: Any = MISSING
    # Validation data, in the same forms without shares; null: none. Of a Hub data set, the split test, or else validation.
    val_files: Any = None
    # Column of the question, a text or messages. If no column is named and the rows have neither question nor answer, their columns are
    # recognised by their names (docs/data.md). A column inside an object is named by a path, such as extra_info.question; so with all
    # columns.
    prompt_key: str = "question"
    # Column of the answer, a text or messages.
    response_key: str = "answer"
    # Column of a chat, a list of {role, content}; if set, it replaces prompt_key and response_key.
    messages_key: str | None = None
    # Column of the tools that a chat may call, as JSON schemas; null: the column `tools` or `functions`, if it has schemas.
    tools_key: str | None = None
    # Which turns of the assistant are trained: "all", or "last" for only the last one of each chat.
    train_turns: str = "all"
    # Column of plain text that is trained whole; if set, it replaces prompt_key and response_key.
    text_key: str | None = None
    # The plain text has a chat template applied already: its control tokens are tokens, and all of it is trained.
    text_is_rendered: bool = False
    # A Jinja file that replaces the tokenizer's chat template.
    chat_template: str | None = None
    # Values of the chat template's variables, such as {enable_thinking: false}. The checkpoint's template has them as its defaults.
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    # Column of such values for single rows, an object; a row's own values come before chat_template_kwargs.
    chat_template_kwargs_key: str | None = None
    # Rows per optimizer step over all GPUs; null: micro_batch_size_per_gpu × the number of data-parallel ranks.
    train_batch_size: int | None = None
    # Rows per micro-batch of one GPU, or of the GPUs that share it (model.context_parallel_size). With packing, a micro-batch has at
    # most micro_batch_size_per_gpu × max_length tokens.
    micro_batch_size_per_gpu: int = 4
    # Maximum tokens of a packed micro-batch; null: micro_batch_size_per_gpu × max_length.
    max_tokens_per_micro_batch: int | None = None
    # Maximum length of a row, in tokens.
    max_length: int = 1024
    # Rows longer than max_length: "error" stops before training, "left" cuts the beginning, "right" cuts the end.
    truncation: str = "error"
    # Concatenate whole documents up to the token limit; false: pad each row to the longest of its micro-batch.
    packing: bool = True
    # Use only the first N rows; null or -1: all.
    train_max_samples: int | None = None
    val_max_samples: int | None = None
    # Number of tokenizing processes; null: one per CPU core.
    num_workers: int | None = None
    # Cache directory of tokenized rows; null: ~/.cache/verl (or $XDG_CACHE_HOME/verl).
    cache_dir: str | None = None


@dataclass
class SamplesConfig:
    # Number of validation rows, from the first on, that the model in training answers at each validation, greedily. The answers are in
    # default_local_dir/samples, and val/exact_match is the share of right ones. 0: none.
    rows: int = 0
    # Longest answer, in tokens.
    max_new_tokens: int = 256
    # What counts as right: a name in verl/rewards or path/to/file.py; null: the metric that verl eval chooses for these rows, and for texts
    # the same text.
    metric: str | None = None


@dataclass
class SFTConfig:
    """`python -m verl.trainer.fsdp_sft_trainer`: supervised fine-tuning."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    teacher: TeacherConfig = field(default_factory=lambda: TeacherConfig(divergence="forward"))
    dist: DistConfig = field(default_factory=DistConfig)

    def check(self) -> None:
        """Check values and combinations of keys. Raises UserError that names the key."""
        data = self.data
        check_model(self.model)
        check_optim(self.optim)
        check_offload(self.model, self.optim)
        check_trainer(self.trainer)
        from verl.config.best import ANSWERS, TAUGHT, check_best, check_sampled  # once in a run, as what follows
        from verl.config.distillation import check_teacher
        from verl.config.rows import check_rows

        check_teacher(self.teacher, TeacherConfig(divergence="forward"))
        check_best(self.trainer, data.val_files, ANSWERS if self.teacher.partial_pretrain is None else TAUGHT)
        check_sampled(self.samples, self.trainer, data.val_files, data.text_key)
        check_dist(self.dist)
        at_least("model.context_parallel_size", self.model.context_parallel_size, 1)
        check_samples(data)
        check_rows(data)
