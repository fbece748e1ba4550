"""What a trainer reads before it starts: the tokenizer and the tokenized rows, the same on every rank."""

import socket
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from verl import dist
from verl.config.pairs import PairsConfig, RewardTrainerConfig
from verl.config.ppo import PPOConfig
from verl.config.sft import DataConfig, SFTConfig
from verl.data.documents import Documents, load_documents
from verl.data.report import show_first_row
from verl.engine.build import check_context
from verl.errors import UserError
from verl.models.load import load_tokenizer
from verl.run import Run


def read_tokenizer(config: SFTConfig | PPOConfig | RewardTrainerConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model, or of the adapter that training goes on from, once it is seen that the model can be what is asked for.

    Raises:
        UserError: no such model, or adapters or parts of heads that it cannot have.
    """
    model = config.model
    adapter = model.lora_adapter_path
    own = (
        adapter is not None and (Path(adapter).expanduser() / "tokenizer_config.json").is_file()
    )  # with the template that it was trained with
    path = adapter if adapter is not None and own else model.partial_pretrain
    tokenizer = load_tokenizer(path, trust_remote_code=model.trust_remote_code, chat_template=config.data.chat_template)
    if model.lora_rank > 0 or model.lora_adapter_path is not None:
        from verl.models.adapters.lora import check_adapters

        check_adapters(model, tokenizer)
    check_context(model)
    return tokenizer


def load_data(data: DataConfig | PairsConfig, tokenizer: PreTrainedTokenizerBase, run: Run) -> tuple[Documents, Documents | None]:
    """Tokenized training and validation rows; each node's first process makes the cache, the others read it."""

    def load(kind: str, max_samples: int | None) -> Documents:
        documents, key = load_rows(data, kind, max_samples, tokenizer), f"data.{kind}_files"
        first = dist.from_main(documents.fingerprint)
        dist.together(lambda: check_same_rows(documents.fingerprint, first, key))
        run.say(f"{key}: {documents.report}")
        return documents

    train = load("train", data.train_max_samples)
    validation = None if data.val_files is None else load("val", data.val_max_samples)
    run.show(partial(show_first_row, tokenizer, *train.document(0)))
    return train, validation


def load_rows(data: DataConfig | PairsConfig, kind: str, max_samples: int | None, tokenizer: PreTrainedTokenizerBase) -> Documents:
    """Tokenized rows of `data.train_files` or `data.val_files`; `kind` is "train" or "val"."""
    files = getattr(data, f"{kind}_files")
    return dist.main_first(lambda: load_documents(data, files, tokenizer, key=f"data.{kind}_files", max_samples=max_samples))


def check_same_rows(fingerprint: str, of_first: str, key: str) -> None:
    """Each process plans every step by itself, so all must have the same rows."""
    if fingerprint != of_first:
        fix = "give all nodes the same files under the same names"
        raise UserError(f"the rows that {socket.gethostname()} finds are not those of the first node", where=key, fix=fix)
