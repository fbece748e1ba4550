"""Load models and tokenizers from a directory or the Hub. Failures are raised as UserError."""

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from verl.errors import UserError
from verl.models.attention.packed import PACKED


@dataclass(frozen=True)
class Loaded:
    """A model for training.

    Attributes:
        model: causal language model, or model with a scalar head.
        saved_dtypes: dtype on disk of each parameter and buffer, by name; saving casts back to it.
        fill: for a model on the meta device (`verl.models.shards`): reads its weights onto a device once it is sharded. None if the model
            has its weights.
        read: for a model on the meta device: reads one full tensor by its name. None if the model has its weights.
    """

    model: PreTrainedModel
    saved_dtypes: dict[str, torch.dtype]
    fill: Callable[[nn.Module, torch.device], None] | None = None
    read: Callable[[str], Tensor] | None = None

    def output_embeddings(self) -> Tensor:
        """Return the output embeddings, weight_VH. For a model on the meta device they are read from disk, in their dtype there."""
        weight_VH: Tensor = self.model.get_output_embeddings().weight
        if self.read is None:
            return weight_VH
        names = [name for name, tensor in self.model.state_dict(keep_vars=True).items() if tensor is weight_VH]
        return self.read(names[0])


def load_tokenizer(
    path: str,
    *,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    completes_template: bool = True,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        path: model directory, Hub name, or adapter directory. If an adapter directory has no tokenizer, that of its base model is loaded.
        chat_template: path of a Jinja file that replaces the tokenizer's own chat template.
        chat_template_kwargs: default values of the template's variables. They become part of the template.
        completes_template: whether a template that does not end a chat's last answer gets an end (`verl.data.template_end`).
    Raises:
        UserError: no such model, it has no fast tokenizer, no such template, or the template has no such variable.
    """
    from verl.data.template_limits import limit

    limit()
    source, adapter = resolve(path), read_adapter_config(path)
    check_format(path)
    if adapter is not None and not (Path(source) / "tokenizer_config.json").is_file():
        source = resolve(adapter["base_model_name_or_path"])
    if Path(source).is_dir():
        from verl.models.damage import check_tokenizer_files

        check_tokenizer_files(source)
    with loading("tokenizer", path), _without_garbage_collection():
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    if not getattr(tokenizer, "is_fast", False):
        fix = "convert it with transformers' convert_slow_tokenizer"
        raise UserError("its tokenizer has no fast version (tokenizer.json)", where=path, fix=fix)
    if chat_template is not None:
        file = Path(chat_template).expanduser()
        if not file.is_file():
            raise UserError("no such file", where=f"data.chat_template={chat_template}", fix="give the path of a Jinja template")
        try:
            tokenizer.chat_template = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            where, fix = f"data.chat_template={chat_template}", "give a text file in UTF-8"
            raise UserError(f"cannot be read: {error}", where=where, fix=fix) from error
    if chat_template_kwargs:
        from verl.data.template_defaults import set_defaults  # rarely given

        set_defaults(tokenizer, chat_template_kwargs)
    if completes_template:
        from verl.data.template_end import add_end

        add_end(tokenizer)
    return tokenizer


def load_for_training(
    path: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    quantization: BitsAndBytesConfig | None = None,
    attention: str = PACKED,
) -> Loaded:
    """Load a causal language model.

    Weights are copied from the file to the device one tensor at a time, so host memory never holds a full copy.

    Args:
        path: model directory or Hub name.
        device: device of the weights.
        dtype: dtype of the weights in memory.
        quantization: quantization config for bitsandbytes; each linear layer is quantized when it is read. None: no quantization.
        attention: name of the attention implementation in transformers (`ForwardPath.attention`).
    Raises:
        UserError: no such model, or its weights cannot be loaded from safetensors.
    """
    options = {} if quantization is None else {"quantization_config": quantization}
    model = load_language_model(
        path, device=device, dtype=dtype, trust_remote_code=trust_remote_code, attn_implementation=attention, **options
    )
    saved_dtypes = find_saved_dtypes(model, resolve(path))
    restore_stated_dtype(model, path, saved_dtypes, trust_remote_code=trust_remote_code)
    return Loaded(model, saved_dtypes)


def check_is_model(path: str) -> None:
    """Check that a local directory has a whole model in safetensors, or only a config; a Hub name is not checked.

    Raises:
        UserError: it is a LoRA adapter, its weights have another format, or a file is damaged or missing.
    """
    if not _has_model(path):
        from verl.models.foreign import refuse_adapter, refuse_formats  # what the directory has instead is rarely asked

        refuse_adapter(path)
        refuse_formats(path)
    if Path(path).expanduser().is_dir():
        from verl.models.damage import check_model_files

        check_model_files(path)


def check_format(path: str) -> None:
    """Raise UserError if a local directory or file has weights in another format than safetensors, and none in safetensors."""
    if not _has_model(path):
        from verl.models.foreign import refuse_formats  # as in check_is_model

        refuse_formats(path)


def check_unchanged(path: str) -> None:
    """Raise UserError if a directory is a checkpoint of verl and its model is not as it was written."""
    folder = Path(path).expanduser()
    if os.path.lexists(folder / "manifest.json") or folder.name == "critic":
        from verl.models.verified import verify  # only checkpoints are verified

        verify(path)


def _has_model(path: str) -> bool:
    """Return whether a local directory has a model in safetensors. A name that is no local path counts as one that has."""
    place = Path(path).expanduser()
    return not place.exists() or ((place / "config.json").is_file() and any(place.glob("*.safetensors")))


def read_config(path: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read the config of a model.

    Raises:
        UserError: no such model.
    """
    source = resolve(path)
    check_is_model(path)
    with loading("model", path):
        config: PretrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    return config


def outline(path: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build a causal language model on the meta device, from its config alone.

    Raises:
        UserError: no such model.
    """
    config = read_config(path, trust_remote_code=trust_remote_code)
    with loading("model", path), torch.device("meta"):
        model: PreTrainedModel = language_class(config).from_config(config, trust_remote_code=trust_remote_code)
    return model


def read_adapter_config(path: str) -> dict[str, Any] | None:
    """Read adapter_config.json of an adapter directory. Return None if `path` is anything else. Raises UserError if it is damaged."""
    file = Path(path).expanduser() / "adapter_config.json"
    check_unchanged(path)
    if not file.is_file():
        return None
    from verl.models.adapter_settings import read_settings

    return read_settings(file)


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Raise UserError if the model has no embedding for some token ids of the tokenizer."""
    embeddings = len(next(model.get_input_embeddings().parameters()))
    highest = max(tokenizer.get_vocab().values())
    if highest >= embeddings:
        raise UserError(
            f"the tokenizer's highest id is {highest}, the model has {embeddings} embeddings",
            where=path,
            fix="use the tokenizer that belongs to the model, or resize the model's embeddings before training",
        )


def resolve(path: str) -> str:
    """Return the absolute path of a local model or adapter directory. Any other name is returned unchanged, as a Hub name.

    Raises:
        UserError: the path does not exist, is a file, or has no model; or it is a checkpoint of verl that is not as it was written.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        check_unchanged(path)
    if any((local / name).is_file() for name in ("config.json", "adapter_config.json")):
        from verl.models.inside import check_inside  # once for each model

        check_inside(local)
        return str(local.resolve())
    from verl.models.foreign import refuse_path  # what else it may be is rarely asked

    refuse_path(path)
    return path


def language_class(config: PretrainedConfig) -> Any:
    """Return the class that loads the language model of a config; like an Auto class, it has `from_pretrained` and `from_config`."""
    if not config.sub_configs:
        return AutoModelForCausalLM
    from verl.models.multimodal import language_part  # few checkpoints have other parts

    return language_part(config) or AutoModelForCausalLM


def check_language_model(config: PretrainedConfig, path: str) -> None:
    """Raise UserError if the config is that of a reward model or a critic, because loading it as a language model would drop its head."""
    if any(name.endswith("Classification") for name in config.architectures or []):
        what = f"is a reward model or a critic ({', '.join(config.architectures or [])}), not a language model"
        raise UserError(what, where=path, fix="give a language model; reward_model.path and critic.partial_pretrain take others")


def load_language_model(
    path: str, *, device: torch.device | str, dtype: torch.dtype | str, trust_remote_code: bool, **options: Any
) -> PreTrainedModel:
    """Load a causal language model with all of its weights.

    Args:
        dtype: dtype of the weights in memory; "auto": the dtype on disk.
        options: further arguments of transformers' `from_pretrained`, such as `attn_implementation`.
    Raises:
        UserError: no such model, it is a reward model or a critic, or its weights cannot be loaded from safetensors.
    """
    source = resolve(path)
    check_is_model(path)
    with loading("model", path):
        config: PretrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        check_language_model(config, path)
        loaded: Any = language_class(config).from_pretrained(
            source,
            dtype=dtype,
            device_map=str(device),  # as a string, "cuda" means this process's GPU also in the threads that read the file
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    model: PreTrainedModel = loaded[0]
    vars(model)["unexpected_keys"] = sorted(loaded[1]["unexpected_keys"])  # for `verl.models.on_disk`
    if missing := sorted(loaded[1]["missing_keys"]):  # transformers has initialized them randomly
        what = f"{len(missing)} weights of {type(model).__name__} are missing, such as {missing[0]}"
        raise UserError(what, where=path, fix="give a complete language model, not a reward model or a critic")
    from verl.models.attention.delta_rule import keep_documents_apart

    keep_documents_apart(model)
    if hasattr(model.base_model, "_rescale_layers"):  # RWKV's weights in evaluation would be others than in training and in the file
        vars(model.base_model)["_rescale_layers"] = lambda: None
    return model


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Disable garbage collection in this context. A vocabulary has half a million objects, and collection would double the loading time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def find_saved_dtypes(model: PreTrainedModel, source: str, *, keeps: bool = True) -> dict[str, torch.dtype]:
    """Return the dtype on disk of each of the model's tensors, by its name in the model (`verl.models.on_disk.look`)."""
    from verl.models.on_disk import look  # reads the files' headers, once for each model

    return look(model, source, keeps=keeps)


def restore_stated_dtype(model: PreTrainedModel, path: str, saved_dtypes: dict[str, torch.dtype], *, trust_remote_code: bool) -> None:
    """Set the dtype in the model's config to the dtype on disk again, because loading has replaced it by the dtype in memory."""
    stated = AutoConfig.from_pretrained(resolve(path), trust_remote_code=trust_remote_code).dtype
    dtype = stated if stated is not None else next(iter(saved_dtypes.values()))
    for part in (model.config, *(getattr(model.config, name, None) for name in model.config.sub_configs)):
        if part is not None:
            part.dtype = dtype


@contextmanager
def loading(what: str, path: str) -> Iterator[None]:
    """Load with transformers: what a config.json says of implementations is ignored, and any exception becomes a UserError.

    Args:
        what: "model" or "tokenizer", for the message.
    """
    from verl.models.implementations import stated_ones_ignored

    try:
        with stated_ones_ignored():
            yield
    except UserError:
        raise
    except Exception as error:  # a wrong config or file may make a library raise anything
        from verl.models.damage import explained

        raise explained(what, path, error) from error


def decoder_of(model: PreTrainedModel) -> Any:
    """Return the part of a causal language model that computes the last hidden states."""
    decoder = model.get_decoder()
    if decoder is not model:
        return decoder
    return next((part for part in model.children() if isinstance(part, PreTrainedModel)), model)  # a class that names another part


def is_quantized(parameter: Tensor | None) -> bool:
    """Return whether a parameter holds quantized codes, which must not be cast."""
    return getattr(parameter, "quant_state", None) is not None


def numel(parameter: Tensor) -> int:
    """Return the number of weights of a parameter, which may be quantized."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())
