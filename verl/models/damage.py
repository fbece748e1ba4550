"""What is wrong with a model's files: found in the files themselves before anything is loaded, or from the error of a library."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from verl.disk import OF_DISKS, disk_error
from verl.errors import UserError
from verl.models.implementations import stated_ones_ignored
from verl.out_of_memory import memory_error
from verl.regular_file import check_regular, open_file, read

LFS_POINTER = b"version https://git-lfs"
SAVE_AGAIN = "download or save the model again"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json", "tokenizer_config.json")
LONGEST_HEADER = 100 * 2**20  # bytes; safetensors itself reads no longer one
# Sizes that are positive in every model that has them.
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "n_embd", "n_head", "n_layer")
LARGEST = {"num_hidden_layers": 10**4, "n_layer": 10**4, "num_labels": 10**5}  # transformers makes lists of this length
LARGEST_SIZE = 10**7  # of all other sizes, and of token ids
LARGE_NUMBER = re.compile(rb"[1-9]\d{7}")
OWN_HEAD_SIZE = ("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "attention_head_size", "d_kv", "kv_channels", "v_head_dim")


def check_model_files(path: str) -> None:
    """Check a local model directory: config.json, the index, and the length of each weight file. Only the beginnings of files are read.

    Raises:
        UserError: a file is damaged, missing, or the text that Git LFS keeps in its place.
    """
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        _check_config(read_object(folder / "config.json"), str(folder / "config.json"))
    names = {file.name for file in folder.glob("*.safetensors")}
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file() and "model.safetensors" not in names:
        missing = sorted(files_in_index(index) - names)
        if missing:
            what = f"{len(missing)} of its weight files {'is' if len(missing) == 1 else 'are'} missing: {', '.join(missing[:3])}"
            raise UserError(what, where=path, fix="download the model again; its index names these files")
    for name in sorted(names):
        file = folder / name
        stat = file.stat()
        _check_weights(file, stat.st_size, stat.st_mtime_ns)


def check_tokenizer_files(path: str) -> None:
    """Raise UserError if a local directory has no tokenizer, or a damaged one. Only the beginnings of its files are read."""
    folder = Path(path).expanduser()
    found = [folder / name for name in TOKENIZERS if (folder / name).is_file()]
    if not any(file.name != "tokenizer_config.json" for file in found):
        fix = "copy the tokenizer of the model that it was made from (tokenizer.json, tokenizer_config.json) into the directory"
        raise UserError("has no tokenizer", where=path, fix=fix)
    for file in found:
        check_regular(file, SAVE_AGAIN, follow=True)
        with file.open("rb") as opened:
            head = opened.read(64)
        if head.startswith(LFS_POINTER):
            raise _pointer(file)
        if file.suffix == ".json" and head.lstrip()[:1] != b"{":
            what = "is empty" if not head else "is not a JSON object"
            raise UserError(what, where=str(file), fix="copy the tokenizer's files again")
        if file.suffix == ".json":
            _check_token_ids(file)


def _check_token_ids(file: Path) -> None:
    """Raise UserError if a tokenizer's file has a token id that would make its vocabulary too large for memory."""
    content = file.read_bytes()
    if LARGE_NUMBER.search(content) is None:  # as in nearly all; the file is not read as JSON, which takes a second
        return
    with suppress(ValueError, RecursionError):  # loading says what is wrong with it
        highest = max(_token_ids(file.name, json.loads(content)), default=0)
        if highest > LARGEST_SIZE:
            what = f"has the token id {highest}, expected at most {LARGEST_SIZE:,}"
            raise UserError(what, where=str(file), fix="copy the tokenizer's files again")


def _token_ids(name: str, found: dict[str, Any]) -> Iterator[int]:
    """Yield the token ids in a tokenizer's file.

    Other numbers are no ids: the `model_max_length` that transformers writes for a tokenizer without a limit has 31 digits.
    """
    if name == "tokenizer.json":
        model, added = found.get("model"), found.get("added_tokens")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        tokens = [token for token in (added if isinstance(added, list) else ()) if isinstance(token, dict)]
        ids = [*(vocabulary.values() if isinstance(vocabulary, dict) else ()), *(token.get("id") for token in tokens)]
    elif name == "tokenizer_config.json":
        decoder = found.get("added_tokens_decoder")
        ids = [int(key) for key in (decoder if isinstance(decoder, dict) else ()) if key.isdecimal()]
    else:  # vocab.json: tokens and their ids
        ids = list(found.values())
    yield from (each for each in ids if isinstance(each, int))


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError if the file is something else."""
    try:
        text = read(file, follow=True)
        if text.startswith(LFS_POINTER):
            raise _pointer(file)
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not JSON: {error}" if text.strip() else "is empty", where=str(file), fix=SAVE_AGAIN) from error
    except OSError as error:
        raise _unreadable(file, error) from error
    if not isinstance(found, dict):
        kind = {list: "a list", str: "a text", type(None): "null"}.get(type(found), f"a {type(found).__name__}")
        raise UserError(f"is {kind}, expected an object", where=str(file), fix=SAVE_AGAIN)
    return found


def files_in_index(index: Path) -> set[str]:
    """Return the names of the weight files in an index. Raises UserError if the index is damaged, or names a file of another folder."""
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError("has no weight_map from tensors to files", where=str(index), fix=SAVE_AGAIN)
    outside = sorted(name for name in set(names.values()) if Path(name).name != name)
    if outside:
        raise UserError(f"names a file of another folder: {outside[0]!r}", where=str(index), fix="give a directory with all of its files")
    return set(names.values())


def _unreadable(file: Path, error: OSError) -> UserError:
    if error.errno is None:  # see verl.regular_file
        return UserError(str(error), where=str(file), fix=SAVE_AGAIN)
    return UserError(f"cannot be read: {error.strerror}", where=str(file), fix="check its permissions and its disk")


def _pointer(file: Path) -> UserError:
    return UserError("is a Git LFS pointer in place of the file", where=str(file), fix="run `git lfs pull` in its repository")


def _check_config(config: dict[str, Any], where: str) -> None:
    """Raise UserError if the sizes in a config cannot be those of a model."""
    inner = config.get("text_config")
    for sizes in (config, *([inner] if isinstance(inner, dict) else [])):
        for name in SIZES:
            value = sizes.get(name)
            if isinstance(value, str | bool) or (isinstance(value, int | float) and not (isinstance(value, int) and value > 0)):
                raise UserError(f"{name} is {value!r}, expected a positive number", where=where, fix=SAVE_AGAIN)
        for name in (*SIZES, "num_labels"):
            value, most = sizes.get(name), LARGEST.get(name, LARGEST_SIZE)
            if value is not None and not (isinstance(value, int) and value <= most):
                raise UserError(f"{name} is {value!r}, expected a number up to {most:,}", where=where, fix=SAVE_AGAIN)
        hidden, heads, shared = (sizes.get(name) for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
        if isinstance(hidden, int) and isinstance(heads, int) and hidden % heads and not any(sizes.get(name) for name in OWN_HEAD_SIZE):
            raise UserError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}", where=where, fix=SAVE_AGAIN)
        if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
            raise UserError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {shared}", where=where, fix=SAVE_AGAIN)


@lru_cache(maxsize=1024)
def _check_weights(file: Path, size: int, changed_ns: int) -> None:
    """Raise UserError if a weight file is not a whole safetensors file.

    Args:
        size, changed_ns: of the file; another value checks it anew.
    """
    header, start = _header(file, size)
    try:
        end = max((part["data_offsets"][1] for name, part in header.items() if name != "__metadata__"), default=0)
    except (TypeError, KeyError, IndexError) as error:
        raise UserError("is not a safetensors file: its header is damaged", where=str(file), fix=SAVE_AGAIN) from error
    if start + end != size:
        found = f"is cut short: {size:,} bytes, expected {start + end:,}" if size < start + end else "has more bytes than its header says"
        raise UserError(found, where=str(file), fix=SAVE_AGAIN)


def _header(file: Path, size: int) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file, and where the tensors begin."""
    try:
        with os.fdopen(open_file(file, follow=True), "rb") as opened:
            head = opened.read(8)
            if (head + opened.peek(64)).startswith(LFS_POINTER):
                raise _pointer(file)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or 8 + length > size or length > LONGEST_HEADER:
                what = "is empty" if not head else "is not a safetensors file, or is cut short"
                raise UserError(what, where=str(file), fix=SAVE_AGAIN)
            header = json.loads(opened.read(length))
    except OSError as error:
        raise _unreadable(file, error) from error
    except (ValueError, RecursionError) as error:
        raise UserError("is not a safetensors file: its header is not JSON", where=str(file), fix=SAVE_AGAIN) from error
    if not isinstance(header, dict):
        raise UserError("is not a safetensors file: its header is not an object", where=str(file), fix=SAVE_AGAIN)
    return header, 8 + length


def explained(what: str, path: str, error: Exception) -> UserError:
    """Return the UserError for an exception that transformers or the Hub raised.

    Args:
        what: "model" or "tokenizer", for the message.
    """
    of_machine = disk_error(error, where=path, doing="read") if _is_of_disk(error) else None
    if (found := of_machine or memory_error(error, where=path)) is not None:
        return found
    from verl.models.wrong_config import explain, one_line  # of errors alone

    reason = one_line(error)
    if "trust_remote_code" in str(error):
        return UserError(f"the {what} needs Python code from its repository", where=path, fix="if you trust it, set trust_remote_code=true")
    if "Unrecognized configuration class" in str(error):
        return no_language_model(model_type(path), path)
    if isinstance(error, SafetensorError):
        return UserError(f"damaged weights: {reason}", where=path, fix=SAVE_AGAIN)
    if "size mismatch" in str(error) or "mismatched" in str(error):
        fix = "restore the config.json that belongs to these weights, or save the model again"
        return UserError(f"its weights have other shapes than config.json says{_other_shape(path)}", where=path, fix=fix)
    if not isinstance(error, OSError) and (found := explain(path, error)) is not None:
        return found
    fix = "give a local model directory, or a Hub name; the Hub needs a network connection, and a login for gated models"
    if "gguf" in path.lower():
        fix = f"GGUF is for inference: give the model that it was made from, usually the name without GGUF; otherwise {fix}"
    elif "safetensors" in reason:
        fix = f"only weights in safetensors are read; {fix}"
    elif isinstance(error, ImportError):
        fix = "install the package that it names"
    elif Path(path).expanduser().exists():
        fix = f"check the files of the directory: {SAVE_AGAIN}, or copy them from the original"
    return UserError(f"cannot load the {what}: {reason}", where=path, fix=fix)


def no_language_model(kind: str, path: str) -> UserError:
    """Return the error for a model of this model_type, of which transformers has no causal language model."""
    fix = "give a causal language model, such as Qwen2, Qwen3, Llama or Mistral; encoders, encoder-decoders and vision are not trained"
    return UserError(f"transformers has no causal language model of type {kind}", where=path, fix=fix)


def model_type(path: str) -> str:
    """Return the model_type in config.json; empty if it cannot be read."""
    try:
        return str(json.loads((Path(path).expanduser() / "config.json").read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def _other_shape(path: str) -> str:
    """Name the first weight in a local directory whose shape is not that of the model in its config.json; empty if there is none."""
    folder = Path(path).expanduser()
    try:
        with stated_ones_ignored(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    except Exception:  # the description of an error must not be one
        return ""
    for file in sorted(folder.glob("*.safetensors")):
        for name, part in _header(file, file.stat().st_size)[0].items():
            if name in shapes and part["shape"] != shapes[name]:
                return f": {name} is {part['shape']} in {file.name}, and {shapes[name]} by config.json"
    return ""


def _is_of_disk(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in OF_DISKS


def check_finite(model: nn.Module, path: str) -> None:
    """Raise UserError that names a weight with NaN or infinity."""
    name = next(names_not_finite(model), None)
    if name is not None:
        raise UserError(f"weight {name} has values that are not finite (NaN or infinity)", where=path, fix=SAVE_AGAIN)


def names_not_finite(model: nn.Module) -> Iterator[str]:
    """Yield the name of each weight with NaN or infinity."""
    return (name for name, p in model.named_parameters() if p.is_floating_point() and not bool(torch.isfinite(p.detach()).all()))
