"""The inputs of a trainer: the tokenizer and the tokenized rows, the same on every rank."""

from functools import partial
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from verl import dist
from verl.data.documents import Documents, DocumentsConfig, load_documents
from verl.data.report import show_first_row
from verl.data.tables import RowReader
from verl.engine.build import check_context
from verl.engine.outline import Outline
from verl.models.load import check_is_model, load_tokenizer
from verl.run import Run


class RowsConfig(DocumentsConfig, Protocol):
    """Settings of training and validation rows."""

    train_files: Any
    val_files: Any
    train_max_samples: int | None
    val_max_samples: int | None


class TemplateConfig(Protocol):
    """Settings of the chat template."""

    chat_template: str | None
    chat_template_kwargs: dict[str, Any]


def read_tokenizer(outline: Outline, data: TemplateConfig, *, may_have_head: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer, and check that the model supports the configured adapters and context parallelism.

    The tokenizer is the initial adapter's own, if it has one, with the chat template of its training; otherwise the model's.

    Args:
        data: names a template that replaces the tokenizer's, and values of its variables.
        may_have_head: whether the model may also be a reward model.
    Raises:
        UserError: there is no such model, or it does not support the adapters or context parallelism.
    """
    from verl.models.kind import ADAPTER, LANGUAGE_MODEL, REWARD_MODEL, check_kind  # once in a run

    model = outline.settings
    kinds = (LANGUAGE_MODEL, REWARD_MODEL) if may_have_head else (LANGUAGE_MODEL,)
    check_kind(model.partial_pretrain, kinds, where=f"model.partial_pretrain={model.partial_pretrain}")
    if model.lora_adapter_path is not None:
        check_kind(model.lora_adapter_path, (ADAPTER,), where=f"model.lora_adapter_path={model.lora_adapter_path}")
    check_is_model(model.partial_pretrain)
    adapter = model.lora_adapter_path
    own = adapter is not None and (Path(adapter).expanduser() / "tokenizer_config.json").is_file()
    path = adapter if adapter is not None and own else model.partial_pretrain
    tokenizer = load_tokenizer(
        path,
        trust_remote_code=model.trust_remote_code,
        chat_template=data.chat_template,
        chat_template_kwargs=data.chat_template_kwargs,
    )
    if outline.has_adapters:
        from verl.models.adapters.lora import check_adapters

        check_adapters(outline.model, model, tokenizer)
    check_context(outline)
    return tokenizer


def load_data(data: RowsConfig, columns: RowReader, tokenizer: PreTrainedTokenizerBase, run: Run) -> tuple[Documents, Documents | None]:
    """Load tokenized training and validation rows. The first process of each node writes the cache; the others read it."""

    def load(kind: str) -> Documents:
        run.enter("reading and tokenizing the rows")
        documents, key = load_rows(data, columns, kind, tokenizer), f"data.{kind}_files"
        dist.check_same(documents.fingerprint, what="the rows", where=key)  # each process packs every step by itself
        run.say(f"{key}: {documents.report}")
        return documents

    from verl.data.template_end import added_end  # few templates need it

    train, validation = load("train"), None if data.val_files is None else load("val")
    if end := added_end(tokenizer):
        run.say(f"the chat template writes no end after a chat's last answer; verl adds {end}, and the checkpoint's template has it too")
    for number, name in enumerate(("chosen", "rejected") if train.documents_per_row == 2 else ("trained",)):
        run.show(partial(show_first_row, tokenizer, *train.document(number), name=name))
    return train, validation


def load_rows(data: RowsConfig, columns: RowReader, kind: str, tokenizer: PreTrainedTokenizerBase) -> Documents:
    """Load tokenized rows of `data.train_files` or `data.val_files`; `kind` is "train" or "val"."""
    files, samples = getattr(data, f"{kind}_files"), getattr(data, f"{kind}_max_samples")
    return dist.main_first(lambda: load_documents(data, columns, files, tokenizer, key=f"data.{kind}_files", max_samples=samples))
