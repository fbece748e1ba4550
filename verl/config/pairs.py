"""Settings of training on pairs of answers."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import MISSING

from verl.config.best import check_best
from verl.config.checks import check_dist, check_model, check_offload, check_optim, check_samples, check_trainer
from verl.config.shared import DistConfig, ModelConfig, OptimConfig, TrainerConfig
from verl.errors import UserError, at_least, one_of
from verl.plugin import Plugins

REFERENCES = ("auto", "stored", "adapter_off")


@dataclass
class PairsConfig:
    # Pairs of answers, the better one chosen: a path, a glob, a Hub data set or a list, as in fine-tuning, also with shares.
    train_files: Any = MISSING
    # Pairs to validate with, named the same way without shares; null: none.
    val_files: Any = None
    # Column of the prompt, a text or a list of {role, content}. Rows whose answers are whole chats need no prompt; if they have one, the
    # chats must begin with it. null: there is no such column; answers that are texts are then read whole and without a chat template, and
    # the beginning that both share is the prompt.
    prompt_key: str | None = "prompt"
    # Columns of the better and the worse answer. Each is a text, a list of {role, content} that continues the prompt, or a whole chat.
    # Without a prompt column, a chat may also be text with "Human:" and "Assistant:" before its turns.
    chosen_key: str = "chosen"
    rejected_key: str = "rejected"
    # Columns of methods that read single answers, such as kto: an answer, in any of these forms, and whether it is good: true or false, 1
    # or 0, yes or no, good or bad. Pairs are read, too: as a good and a bad answer. With classify, the label of the text or chat in
    # prompt_key: see algorithm.problem.
    completion_key: str = "completion"
    label_key: str = "label"
    # Column of the number by which the chosen answer is better, for methods that read margins, such as odpo; null: none.
    margin_key: str | None = None
    # Column of the tools that the chats may call, as JSON schemas.
    tools_key: str | None = None
    # A Jinja file that replaces the tokenizer's chat template.
    chat_template: str | None = None
    # Values of the chat template's variables, such as {enable_thinking: false}. The checkpoint's template has them as its defaults.
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    # Pairs, or single answers, per optimizer step over all GPUs; null: micro_batch_size_per_gpu × the number of processes.
    train_batch_size: int | None = None
    # Pairs per micro-batch, or half of the single answers: the token budget is micro_batch_size_per_gpu × 2 × max_length.
    micro_batch_size_per_gpu: int = 4
    # Token budget of a micro-batch on one GPU; null: micro_batch_size_per_gpu × 2 × max_length.
    max_tokens_per_micro_batch: int | None = None
    # The prompt in a micro-batch: "auto" packs it once for both answers where that is exact, "never" packs it with each answer.
    share_prompts: str = "auto"
    # Longest prompt with an answer, in tokens.
    max_length: int = 1024
    # Answers with prompts over max_length: "error" stops before training, "left" cuts off the beginning, "right" the end.
    truncation: str = "error"
    # Use only the first rows; null or -1: all.
    train_max_samples: int | None = None
    val_max_samples: int | None = None
    # Processes that tokenize; null: one per CPU core.
    num_workers: int | None = None
    # Where tokenized rows are kept between runs; null: ~/.cache/verl (or $XDG_CACHE_HOME/verl).
    cache_dir: str | None = None


@dataclass
class PreferenceConfig:
    plugins: ClassVar[Plugins] = Plugins("verl.algorithms", "method of preferences", ("Loss", "scorer"))

    # The method: "bradley_terry" trains a reward model, which scores whole answers; "dpo", "dpo_norm", "ipo", "kto", "odpo", "orpo",
    # "robust_dpo" and "simpo" train a policy; "classify" trains a classifier on texts with labels; or path/to/file.py. Methods have more
    # keys.
    name: str = "bradley_terry"
    # Where the log-probabilities of the reference come from: "stored" computes those of each row once, before training, and keeps them in
    # the run's directory; "adapter_off" computes them in each step, by a new adapter's model with the adapter switched off; "auto" does so
    # where no row is trained twice.
    reference: str = "auto"

    @property
    def measured(self) -> tuple[str, ...] | None:
        """What the validation measures, without `val/`, if the method says it."""
        names = getattr(self.plugins.load("algorithm.name", self.name), "measures", None)
        return None if names is None else ("loss", *names.split())


@dataclass
class RewardTrainerConfig:
    """`python -m verl.trainer.reward_trainer`: a reward model, or by algorithm.name=dpo and others a policy, from compared answers."""

    data: PairsConfig = field(default_factory=PairsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    algorithm: PreferenceConfig = field(default_factory=PreferenceConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(project_name="verl-reward"))
    dist: DistConfig = field(default_factory=DistConfig)

    def check(self) -> None:
        """Cross-field checks. Raises UserError naming the key."""
        data, model = self.data, self.model
        check_model(model)
        check_optim(self.optim)
        check_offload(model, self.optim)
        check_trainer(self.trainer)
        check_best(self.trainer, self.data.val_files, self.algorithm.measured)
        check_dist(self.dist)
        one_of("algorithm.reference", self.algorithm.reference, REFERENCES)
        check_samples(data)
        one_of("data.truncation", data.truncation, ("error", "left", "right"))
        one_of("data.share_prompts", data.share_prompts, ("auto", "never"))
        if data.chosen_key == data.rejected_key:
            raise UserError("is the column of both answers", where=f"data.rejected_key={data.rejected_key}", fix="name two columns")
        at_least("data.max_length", data.max_length, 2)
        at_least("data.micro_batch_size_per_gpu", data.micro_batch_size_per_gpu, 1)
        at_least("data.train_batch_size", data.train_batch_size, 1)
        at_least("data.num_workers", data.num_workers, 1)
        if data.max_tokens_per_micro_batch is not None and data.max_tokens_per_micro_batch < 2 * data.max_length:
            raise UserError(
                f"{data.max_tokens_per_micro_batch} tokens cannot hold a pair of answers of data.max_length={data.max_length} each",
                where="data.max_tokens_per_micro_batch",
                fix=f"give at least {2 * data.max_length}, or a smaller data.max_length",
            )
        if self.model.context_parallel_size != 1:
            raise UserError("context parallelism is not supported for pairs", where="model.context_parallel_size", fix="set it to 1")
