"""Checks of the keys of fine-tuning's rows. Each raises a UserError that names the key."""

from typing import Any

from verl.errors import UserError, at_least, one_of


def check_rows(data: Any) -> None:
    """Check how rows are read, cut and put together: a `verl.config.sft.DataConfig`."""
    one_of("data.train_turns", data.train_turns, ("all", "last"))
    one_of("data.truncation", data.truncation, ("error", "left", "right"))
    at_least("data.max_length", data.max_length, 2)
    at_least("data.micro_batch_size_per_gpu", data.micro_batch_size_per_gpu, 1)
    at_least("data.train_batch_size", data.train_batch_size, 1)
    at_least("data.num_workers", data.num_workers, 1)
    budget = data.max_tokens_per_micro_batch
    if budget is not None and budget < data.max_length:
        raise UserError(
            f"{budget} tokens cannot hold a row of data.max_length={data.max_length}",
            where="data.max_tokens_per_micro_batch",
            fix=f"give at least {data.max_length}, or a smaller data.max_length",
        )
    if data.messages_key and data.text_key:
        raise UserError("messages_key and text_key are both set", where="data", fix="set only the one that the rows have")
    if data.tools_key and data.text_key:
        raise UserError("plain text has no tools", where="data.tools_key", fix="remove it, or give chats (data.messages_key)")
    if data.text_is_rendered and data.messages_key:
        what = "messages are not rendered yet"
        raise UserError(what, where="data.text_is_rendered", fix="remove it, or set data.text_key to the rendered text")
