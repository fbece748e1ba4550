"""`verl export SRC DIR`: merge an adapter into its base model, cast the weights, split them into files, and share the result.

The exported model is loaded again, and its logits must equal those of the model in memory.

Dimensions: T tokens of a prompt, V vocabulary.
"""

import contextlib
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from verl.config.commands import ExportConfig, keyed
from verl.config.load import load_config
from verl.disk import check_room, disk_errors_named
from verl.errors import UserError, exit_on_user_error
from verl.manifest import check_new_directory
from verl.models.adapters import files
from verl.models.card import FILE as CARD
from verl.models.foreign import newest_step
from verl.models.format_check import read_format
from verl.models.kind import GENERATES, check_kind
from verl.models.load import Loaded, load_for_training, load_tokenizer, read_adapter_config, resolve
from verl.models.load import read_config as read_model_config
from verl.models.on_disk import OnDisk, weight_files, with_dtypes, without_dtypes
from verl.models.saved import export_model
from verl.models.sharing import Sharing, card_for, check_base, check_card, check_sharing, copy_adapter, put_card, share
from verl.progress import quiet_libraries

ADAPTER_WEIGHTS = "adapter_model.safetensors"
FIX = "make room, or choose a directory on another disk"
PROBE = [
    {"role": "user", "content": "Natalia sold 48 clips in April, and half as many in May. How many did she sell in all?"},
    {"role": "assistant", "content": "In May she sold 48 / 2 = 24 clips, so 48 + 24 = 72 in all."},
]
# Largest difference of logits that a different order of float32 sums may cause: absolute, and relative to the largest logit.
TOLERANCE, RELATIVE_TOLERANCE = 1e-4, 2e-5
# Largest norm of the change of the logits by casting, relative to the norm of the change by the adapter.
LARGEST_CAST_EFFECT = 0.7
# Largest difference of logits that casting may cause, relative to the largest logit.
CAST_TOLERANCE = {torch.float32: RELATIVE_TOLERANCE, torch.float16: 0.02, torch.bfloat16: 0.1}


def export(config: ExportConfig) -> Path:
    """Export a checkpoint. A failed export leaves no files behind.

    Returns:
        the written directory.
    Raises:
        UserError: the checkpoint or its base is missing, the directory is not empty, the adapter has no effect, or the result has
            wrong logits; or it cannot be shared as the config says.
        DiskError: the disk has no room, or fails.
    """
    sharing = check_sharing(config)
    if config.directory is None:
        return share_as_it_is(config, sharing)
    target = Path(config.directory).expanduser().absolute()
    check_new_directory(target)
    source = find_source(config.source)
    check_kind(source, GENERATES)
    with torch.no_grad(), scratch_beside(target) as folder:
        if config.merge:
            write_model(source, target, folder, config)
        else:
            copy_adapter(source, folder, config)
        if config.card or sharing.place is not None:
            put_card(card_for(config, Path(source), folder, say), folder)
        if sharing.place is not None:
            check_base(folder)
        commit(folder, target)
    say(f"wrote {target}: {describe(target)}")
    share(config, sharing, target, None, say)
    return target


def write_model(source: str, target: Path, folder: Path, config: ExportConfig) -> None:
    """Write a whole model into the scratch directory of its target, and load it again. Raises as `export`."""
    loaded, base = load(source, config)
    tokenizer = load_tokenizer(source, trust_remote_code=config.trust_remote_code)
    ids_T = probe(tokenizer, loaded.model)
    expected_TV, effect_TV = (logits(loaded.model, ids_T), None) if base is None else merge(loaded, source, ids_T)
    dtypes = cast(loaded, config.dtype)
    cast_TV = logits(loaded.model, ids_T)
    check_cast(cast_TV, expected_TV, effect_TV, set(dtypes.values()))
    needed = size_of(loaded, dtypes)
    check_room(target, needed, what="the exported model", fix=FIX)
    with disk_errors_named(target, needed=needed, fix=FIX):
        export_model(folder, loaded.model, dtypes, max_shard_size=config.max_shard_size)
        say_kept(dtypes)
        tokenizer.save_pretrained(folder)
        keep_format(source, folder)
    has_other_parts = hasattr(loaded.model, "absent")
    del loaded
    check_written(folder, cast_TV, ids_T, config, has_other_parts=has_other_parts)


def share_as_it_is(config: ExportConfig, sharing: Sharing) -> Path:
    """Write the card of a directory, convert it or push it, without another directory of the model.

    Raises:
        UserError: it is no model directory; or as `check_card`, `check_base` and `share`.
    """
    folder = Path(find_source(config.source))
    if not folder.is_dir():
        raise UserError("is no directory here", where=config.source, fix=f"for a model of the Hub: verl export {config.source} NEW_DIR …")
    check_kind(str(folder), GENERATES)
    if config.card:
        check_card(folder)
    if sharing.place is not None:
        check_base(folder)
    card = None
    if config.card or (sharing.place is not None and not (folder / CARD).is_file()):
        card = card_for(config, folder, folder, say)
    if config.card and card is not None:
        put_card(card, folder)
        say(f"wrote {folder / CARD}")
    if sharing.file is not None and (folder / files.CONFIG).is_file() and not (folder / "config.json").is_file():
        with scratch_beside(sharing.file) as scratch:
            merged = replace(config, directory=str(scratch / folder.name), card=False, hub=None, gguf=None)
            share(config, sharing, export(merged), card, say)
    else:
        share(config, sharing, folder, card, say)
    return folder


def size_of(loaded: Loaded, dtypes: OnDisk) -> int:
    """Return the bytes of the weights in their dtypes on disk; a tied weight is written once."""
    tensors = {id(tensor): (name, tensor) for name, tensor in loaded.model.state_dict(keep_vars=True).items()}
    return dtypes.extra_bytes + sum(int(tensor.numel()) * dtypes[name].itemsize for name, tensor in tensors.values())


def say_kept(dtypes: OnDisk) -> None:
    if kept := dtypes.describe():
        say(kept)


def keep_format(source: str, folder: Path) -> None:
    """Copy the checkpoint's prompt format to the exported model."""
    found = read_format(source)
    if found is not None:
        found.write(folder)


def say(line: str) -> None:
    print(line, flush=True)


def find_source(path: str) -> str:
    """Return the checkpoint at a path. For a run's directory, this is the newest checkpoint."""
    local = Path(path).expanduser()
    steps = local.is_dir() and not any((local / name).is_file() for name in ("config.json", files.CONFIG)) and newest_step(local)
    if steps:
        say(f"{path} is a run's directory; its newest checkpoint is {steps.name}")
        return str(steps)
    return resolve(path)


def load(source: str, config: ExportConfig) -> tuple[Loaded, str | None]:
    """Load the model in float32, without its adapter.

    Returns:
        the model, and the name of the base model if the checkpoint is an adapter.
    """
    adapter = read_adapter_config(source)
    base = None if adapter is None else files.read_config(source).base_model_name_or_path
    if adapter is not None and not base:
        fix = "write the directory or Hub name of the base model there"
        raise UserError("base_model_name_or_path is missing", where=f"{source}/{files.CONFIG}", fix=fix)
    say(f"loading {base or source}")
    try:
        # Each model has "eager"; `use_plain_attention` changes it where there is a faster one. Eager Falcon adds ALiBi's bias twice.
        has_alibi = getattr(read_model_config(base or source, trust_remote_code=config.trust_remote_code), "alibi", False)
        attention = "sdpa" if has_alibi else "eager"
        loaded = load_for_training(base or source, trust_remote_code=config.trust_remote_code, attention=attention)
    except UserError as error:
        if base is None:
            raise
        what = f"the adapter's base model cannot be loaded: {error.what}"
        fix = f"restore it at {base}, or correct base_model_name_or_path in {files.CONFIG}"
        raise UserError(what, where=source, fix=fix) from error
    use_plain_attention(loaded.model)
    loaded.model.eval()
    if base is not None and (Path(source) / "generation_config.json").is_file():  # it has the stop tokens of the adapter's training
        loaded.model.generation_config = GenerationConfig.from_pretrained(source)
    return loaded, base


def use_plain_attention(model: PreTrainedModel) -> None:
    """Use PyTorch's attention, or the model's own where it has none for that, as with sinks."""
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:
        model.set_attn_implementation("eager")
    if model.config._attn_implementation not in ("sdpa", "eager"):  # transformers changes nothing in models with code of their own
        model.config._attn_implementation = "eager"


def probe(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Tensor:
    """Tokenize a question and its answer in the tokenizer's chat format, or as plain text if it has none."""
    text = "\n".join(message["content"] for message in PROBE)
    if tokenizer.chat_template:
        text = str(tokenizer.apply_chat_template(PROBE, tokenize=False))
    ids = tokenizer.encode(text, add_special_tokens=not tokenizer.chat_template)
    return torch.tensor(ids[: getattr(model.config.get_text_config(), "max_position_embeddings", None) or len(ids)])


def logits(model: torch.nn.Module, ids_T: Tensor) -> Tensor:
    logits_TV: Tensor = model(input_ids=ids_T[None], use_cache=False).logits[0].float()
    return logits_TV


def merge(loaded: Loaded, source: str, ids_T: Tensor) -> tuple[Tensor, Tensor]:
    """Merge an adapter into the model in place, and compare the logits before and after.

    Returns:
        the logits with the unmerged adapter, and their difference from the base model's logits.
    Raises:
        UserError: the adapter has no effect, or merging changes the logits.
    """
    say(f"merging {source}")
    files.fit_vocabulary(loaded.model, source)  # before the prompt, which may have new tokens
    base_TV = logits(loaded.model, ids_T)
    adapted = files.attach(loaded.model, source).eval()
    adapted_TV = logits(adapted, ids_T)
    effect_TV = adapted_TV - base_TV
    limit, effect = tolerance(adapted_TV), largest(effect_TV)
    if not effect > limit:
        why = "all lora_B are zero, so it was never trained" if is_untrained(adapted) else "that is within rounding"
        what = f"the adapter changes the logits of a prompt by at most {effect:.1g}: {why}"
        raise UserError(what, where=source, fix="export a checkpoint that was trained further, or with a larger optim.lr")
    adapted.merge_and_unload()
    difference = largest(logits(loaded.model, ids_T) - adapted_TV)
    if not difference <= limit:
        what = f"the merged model's logits differ by {difference:.2g} from those with the unmerged adapter, which is more than rounding"
        raise UserError(what, where=source, fix="use the unmerged adapter with peft")
    say(f"the adapter changes the logits of a prompt by up to {effect:.2g}; merging, by {difference:.1g} (allowed: {limit:.1g})")
    return adapted_TV, effect_TV


def is_untrained(adapted: PeftModel) -> bool:
    """Return whether all `lora_B` are zero, as in a new adapter."""
    parts = [p for name, p in adapted.named_parameters() if "lora_B" in name or "lora_embedding_A" in name]
    return not any(bool(p.any()) for p in parts)


def largest(values: Tensor) -> float:
    """Return the largest absolute value; infinity if any value is NaN."""
    value = values.abs().max().item()
    return math.inf if math.isnan(value) else value


def tolerance(logits_TV: Tensor) -> float:
    """Return the largest difference at which float32 logits count as equal."""
    return max(TOLERANCE, RELATIVE_TOLERANCE * largest(logits_TV))


def cast(loaded: Loaded, name: str | None) -> OnDisk:
    """Round the weights in place to their dtypes on disk, and set the dtype in the config.

    Returns:
        dtype on disk of each weight, by name, and what is written beside them.
    """
    model, state = loaded.model, loaded.model.state_dict(keep_vars=True)
    usual = loaded.saved_dtypes.get("model.embed_tokens.weight", next(iter(loaded.saved_dtypes.values())))
    dtypes = with_dtypes(loaded.saved_dtypes, {key: loaded.saved_dtypes.get(key, usual) for key in state})
    if name is not None:
        dtype: torch.dtype = getattr(torch, name)
        dtypes = without_dtypes(dtypes, {key: dtype if one.is_floating_point() else one.dtype for key, one in state.items()})
        for part in (model.config, *(getattr(model.config, sub, None) for sub in model.config.sub_configs)):
            if part is not None:
                part.dtype = dtype
    for key, tensor in state.items():
        tensor.data = tensor.data.to(dtypes[key]).to(tensor.dtype)
    return dtypes


def check_cast(cast_TV: Tensor, expected_TV: Tensor, effect_TV: Tensor | None, dtypes: set[torch.dtype]) -> None:
    """Check that casting changes the logits only by rounding, and by less than the adapter does.

    Raises:
        UserError: casting changes them more.
    """
    share = max(CAST_TOLERANCE.get(dtype, RELATIVE_TOLERANCE) for dtype in dtypes)
    limit, difference = max(TOLERANCE, share * largest(expected_TV)), largest(cast_TV - expected_TV)
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    if not difference <= limit:
        what = f"casting to {names} changes the logits by {difference:.2g}, more than rounding explains ({limit:.2g})"
        raise UserError(what, where="dtype", fix="set dtype=bfloat16 or dtype=float32")
    lost = 0.0 if effect_TV is None else float((cast_TV - expected_TV).norm() / effect_TV.norm())
    if lost > LARGEST_CAST_EFFECT:
        what = f"casting to {names} loses the adapter: rounding changes the logits {lost:.2g} times as much as the adapter does"
        raise UserError(what, where="dtype", fix="set dtype=float32, or export a checkpoint that was trained further")
    say(f"casting to {names} changes the logits of a prompt by {f'up to {difference:.1g}' if difference else 'nothing'}")


def check_written(folder: Path, cast_TV: Tensor, ids_T: Tensor, config: ExportConfig, *, has_other_parts: bool) -> None:
    """Load the written files with transformers, and check that the logits are those of the model in memory.

    Args:
        has_other_parts: whether the files have parts that text does not reach (`verl.models.multimodal`).
    Raises:
        UserError: the logits differ.
    """
    kind: Any = AutoModelForImageTextToText if has_other_parts else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32, trust_remote_code=config.trust_remote_code)
    difference = largest(logits(model.eval(), ids_T) - cast_TV)
    if not difference <= tolerance(cast_TV):
        what = f"the written model's logits differ by {difference:.2g} from those of the model in memory"
        raise UserError(what, where=str(config.directory), fix="report this with the name of the model and the version of transformers")
    say("loaded again: the written model gives the same logits")


@contextlib.contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """Create a temporary directory on the target's disk; at the end, remove it if it still exists."""
    made = [parent for parent in target.parents if not parent.exists()]
    folder = target.with_name(f".{target.name}.export")
    shutil.rmtree(folder, ignore_errors=True)  # left by an export that was killed
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot be created: {error.strerror}", where=str(target), fix="choose a writable directory") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()  # only if it is empty


def commit(folder: Path, target: Path) -> None:
    """Move the finished files to their place."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.iterdir():
        path.chmod(mode)  # safetensors makes files that only the owner can read
    folder.rename(target)


def describe(target: Path) -> str:
    if not (target / "config.json").is_file():
        return f"an adapter of {(target / ADAPTER_WEIGHTS).stat().st_size / 1e6:,.1f} MB"
    files = weight_files(str(target))
    size = sum(path.stat().st_size for path in files)
    written = f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
    return f"{written} of weights in {len(files)} file{'s' if len(files) > 1 else ''}"


def main(argv: list[str]) -> None:
    """Run the command: `SRC DIR key=value …`, or `source=SRC directory=DIR key=value …`."""
    try:
        with quiet_libraries():
            export(load_config(ExportConfig, keyed(argv)))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    exit_on_user_error(main, sys.argv[1:])
