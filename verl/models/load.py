"""Models and tokenizers from a directory or the Hub, with errors a user can mend."""

import gc
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from verl.errors import UserError
from verl.models.attention.packed import PACKED

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # by their names in safetensors


@dataclass(frozen=True)
class Loaded:
    """A model for training.

    Attributes:
        model: a causal language model, its attention set to packed batches.
        saved_dtypes: the dtype that each parameter and buffer had on disk, and will have again.
        fill: of a model without values (`verl.models.shards`), reads them once it is sharded, onto a device.
        read: of a model without values, a whole tensor by its name.
    """

    model: PreTrainedModel
    saved_dtypes: dict[str, torch.dtype]
    fill: Callable[[nn.Module, torch.device], None] | None = None
    read: Callable[[str], Tensor] | None = None

    def output_embeddings(self) -> Tensor:
        """Of the vocabulary, in the dtype on disk where the model has no values."""
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
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Args:
        path: a model directory or Hub name, or an adapter directory, which may leave the tokenizer to its base.
        chat_template: a Jinja file that takes the place of the tokenizer's own template.
        chat_template_kwargs: default values of the template's variables, which become part of the template.
    Raises:
        UserError: no such model, no tokenizer in it, no such template, or the template has no such variable.
    """
    source, adapter = resolve(path), read_adapter_config(path)
    if adapter is not None and not (Path(source) / "tokenizer_config.json").is_file():
        source = resolve(adapter["base_model_name_or_path"])
    try:
        with _garbage_left_alone():
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise cannot_load("tokenizer", path, error) from error
    if not getattr(tokenizer, "is_fast", False):
        fix = "convert it with transformers' convert_slow_tokenizer"
        raise UserError("its tokenizer has no fast version (tokenizer.json)", where=path, fix=fix)
    if chat_template is not None:
        file = Path(chat_template).expanduser()
        if not file.is_file():
            raise UserError("no such file", where=f"data.chat_template={chat_template}", fix="give the path of a Jinja template")
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    if chat_template_kwargs:
        from verl.data.template_defaults import set_defaults  # rarely given

        set_defaults(tokenizer, chat_template_kwargs)
    return tokenizer


def load_for_training(
    path: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    quantization: BitsAndBytesConfig | None = None,
) -> Loaded:
    """A causal language model, ready for packed batches.

    Its weights go tensor by tensor from the file to the device; host memory holds no copy of them.

    Args:
        device: where the weights are to live.
        dtype: what they are to be there.
        quantization: of the linear layers, one by one as they are read.
    Raises:
        UserError: no such model, or not one that PyTorch and safetensors can load.
    """
    options = {} if quantization is None else {"quantization_config": quantization}
    model = _from_pretrained(path, device=device, dtype=dtype, trust_remote_code=trust_remote_code, attn_implementation=PACKED, **options)
    saved_dtypes = find_saved_dtypes(model, resolve(path))
    restore_stated_dtype(model, path, saved_dtypes, trust_remote_code=trust_remote_code)
    return Loaded(model, saved_dtypes)


def read_config(path: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """A model's config.

    Raises:
        UserError: no such model.
    """
    source = resolve(path)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise cannot_load("model", path, error) from error
    return config


def outline(path: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build a causal language model on the meta device, from its config alone.

    Raises:
        UserError: no such model.
    """
    config = read_config(path, trust_remote_code=trust_remote_code)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise cannot_load("model", path, error) from error
    return model


def load_for_inference(
    path: str, *, device: torch.device | str, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal language model for generation; an adapter directory is merged into its base.

    Args:
        path: a model directory, a LoRA adapter directory, or a Hub name.
        dtype: of the weights; None: as on disk.
    Raises:
        UserError: no such model, or an adapter whose base cannot be found.
    """
    adapter = read_adapter_config(path)
    base = path if adapter is None else adapter["base_model_name_or_path"]
    try:
        model = _from_pretrained(
            base, device=device, dtype=dtype or "auto", trust_remote_code=trust_remote_code, attn_implementation="sdpa"
        )
    except UserError as error:
        if adapter is None:
            raise
        raise UserError(f"the adapter's base model cannot be loaded: {error.what}", where=path, fix=f"put it back at {base}") from error
    if adapter is not None:
        from verl.models.adapters.files import put_on

        directory = resolve(path)
        put_on(model, directory).merge_and_unload()
        if (Path(directory) / "generation_config.json").is_file():  # it stops at what the adapter was trained to end with
            model.generation_config = GenerationConfig.from_pretrained(directory)
    evaluated: PreTrainedModel = model.eval()
    return evaluated


def read_adapter_config(path: str) -> dict[str, Any] | None:
    """The adapter_config.json of a LoRA adapter directory; None for anything else."""
    file = Path(path).expanduser() / "adapter_config.json"
    if not file.is_file():
        return None
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return config


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Raises UserError if the tokenizer has ids that the model has no embedding for."""
    embeddings = len(next(model.get_input_embeddings().parameters()))
    highest = max(tokenizer.get_vocab().values())
    if highest >= embeddings:
        raise UserError(
            f"the tokenizer's highest id is {highest}, the model has {embeddings} embeddings",
            where=path,
            fix="use the tokenizer that belongs to the model, or resize the model's embeddings before training",
        )


def resolve(path: str) -> str:
    """A local directory as an absolute path; anything else is taken for a Hub name.

    Raises:
        UserError: what is spelled like a path does not exist, or holds no model.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        if not any((local / name).is_file() for name in ("config.json", "adapter_config.json")):
            newest = newest_step(local)
            hint = f"did you mean {newest}?" if newest else "give the directory that holds config.json"
            raise UserError("holds no config.json", where=path, fix=hint)
        return str(local.resolve())
    if local.exists():
        raise UserError("is a file", where=path, fix="give the directory that holds it")
    if path.startswith(("~", "/", ".")) or path.count("/") > 1:
        raise UserError("no such model directory", where=path, fix=f"the current folder is {Path.cwd()}")
    return path


def newest_step(folder: Path) -> Path | None:
    """The newest checkpoint in a run's directory."""
    steps = [path for path in folder.glob("global_step_*") if path.name.removeprefix("global_step_").isdecimal()]
    return max(steps, key=lambda path: int(path.name.removeprefix("global_step_")), default=None)


def check_language_model(config: PretrainedConfig, path: str) -> None:
    """Raises UserError if the config is that of a reward model or a critic, whose head a language model would lose."""
    if any(name.endswith("Classification") for name in config.architectures or []):
        what = f"is a reward model or a critic ({', '.join(config.architectures or [])}), not a language model"
        raise UserError(
            what, where=path, fix="give a language model; reward_model.path and critic.partial_pretrain take models with a head"
        )


def _from_pretrained(
    path: str, *, device: torch.device | str, dtype: torch.dtype | str, trust_remote_code: bool, attn_implementation: str, **options: Any
) -> PreTrainedModel:
    source = resolve(path)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        check_language_model(config, path)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            device_map=str(device),  # as text, "cuda" is this process's own GPU also in the threads that read the file
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError) as error:
        raise cannot_load("model", path, error) from error
    except SafetensorError as error:
        raise UserError(f"damaged weights: {error}", where=path, fix="download or save the model again") from error
    model: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):  # transformers has drawn them at random
        what = f"lacks {len(missing)} of the weights of a {type(model).__name__}, such as {missing[0]}"
        raise UserError(what, where=path, fix="give a complete language model; a reward model or a critic is none")
    return model


@contextmanager
def _garbage_left_alone() -> Iterator[None]:
    """No garbage collection meanwhile: for the half million objects of a vocabulary it runs so often that it doubles the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def find_saved_dtypes(model: PreTrainedModel, source: str) -> dict[str, torch.dtype]:
    """The dtype on disk of each of the model's tensors, by its name in the model.

    A tensor that is tied to another has that one's. One that is not on disk under its name, because the file has it in parts
    or under an older name, has the dtype of most of the file.
    """
    on_disk: dict[str, torch.dtype] = {}
    elements: Counter[torch.dtype] = Counter()
    for name, dtype, count in _weights_on_disk(source):
        on_disk[name] = dtype
        elements[dtype] += count
    tensors = model.state_dict(keep_vars=True)
    found = {id(tensor): on_disk[name] for name, tensor in tensors.items() if name in on_disk}
    usual = max(elements, key=elements.__getitem__, default=None)
    return {
        name: found.get(id(tensor), usual or tensor.dtype) if tensor.is_floating_point() else tensor.dtype
        for name, tensor in tensors.items()
    }


def _weights_on_disk(source: str) -> Iterator[tuple[str, torch.dtype, int]]:
    """Name, dtype and number of elements of each floating-point tensor of a model whose files are here; reads their headers alone."""
    for path in weight_files(source):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118, it is no dictionary
                part = file.get_slice(key)
                if part.get_dtype() in DTYPES:
                    yield key, DTYPES[part.get_dtype()], math.prod(part.get_shape())


def weight_files(source: str) -> list[Path]:
    """The safetensors files of a model that has been loaded from a directory or the Hub."""
    config = cached_file(source, "config.json")
    assert config is not None  # the model was loaded with it
    folder = Path(config).parent
    whole, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if whole.is_file():
        return [whole]
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]
    return sorted(folder.glob("*.safetensors"))  # a config may name its file otherwise


def restore_stated_dtype(model: PreTrainedModel, path: str, saved_dtypes: dict[str, torch.dtype], *, trust_remote_code: bool) -> None:
    """Let the config name the dtype of the file again, in place of the one that was loaded."""
    stated = AutoConfig.from_pretrained(resolve(path), trust_remote_code=trust_remote_code).dtype
    dtype = stated if stated is not None else next(iter(saved_dtypes.values()))
    for part in (model.config, *(getattr(model.config, name, None) for name in model.config.sub_configs)):
        if part is not None:
            part.dtype = dtype


def cannot_load(what: str, path: str, error: Exception) -> UserError:
    """What to raise where transformers or the Hub raised."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "trust_remote_code" in str(error):
        return UserError(f"the {what} brings Python code of its own", where=path, fix="if you trust it, set trust_remote_code=true")
    return UserError(
        f"cannot load the {what}: {reason}",
        where=path,
        fix="give a local model directory, or a Hub name with the network and, where needed, a login",
    )


def is_quantized(parameter: Tensor | None) -> bool:
    """Return whether a parameter holds quantized codes, which must not be cast."""
    return getattr(parameter, "quant_state", None) is not None


def numel(parameter: Tensor) -> int:
    """Return the number of weights of a parameter, also if it is quantized."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())
