"""What a directory has in place of a model in safetensors, and how to get a model from it."""

import difflib
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from verl.errors import UserError
from verl.manifest import steps_in
from verl.run_directory import folder_of_runs

ADAPTER_CONFIG = "adapter_config.json"
FROM_GGUF = "AutoModelForCausalLM.from_pretrained(DIR, gguf_file=FILE).save_pretrained(NEW_DIR), and the same for AutoTokenizer"
TO_SAFETENSORS = "AutoModelForCausalLM.from_pretrained({folder!r}, dtype='auto').save_pretrained({folder!r})"
# Weights in other formats, by the names of their files: what they are, and what to do. The first that is there is named.
FORMATS = (
    (
        "*.gguf",
        "has its weights in the GGUF format, which is for inference",
        f"give the model that the file was made from; or convert it with transformers: {FROM_GGUF}",
    ),
    (
        "pytorch_model*.bin",
        "has its weights only as pytorch_model.bin, a format that can run code when it is read",
        f"if you trust it, convert it once with transformers: {TO_SAFETENSORS}",
    ),
    (
        "model_world_size_*_rank_*.pt",
        "has the shards of a checkpoint of upstream verl",
        "merge them with upstream's `python -m verl.model_merger merge --backend fsdp --local_dir {folder} --target_dir NEW_DIR`",
    ),
    (
        "consolidated*.pth",
        "has its weights in Meta's own format",
        "convert them with transformers' convert_llama_weights_to_hf.py, or give the repository with safetensors",
    ),
)


def refuse_adapter(path: str) -> None:
    """Raise UserError if a local directory has a LoRA adapter and no whole model."""
    folder = Path(path).expanduser()
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        from verl.models.adapter_settings import read_settings  # of adapters alone

        base = read_settings(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "its base model"
        further = f"model.partial_pretrain={base} model.lora_adapter_path={path}"
        fix = f"merge it first with `verl export {path} NEW_DIR`; or train it further with {further}"
        raise UserError("is a LoRA adapter, not a whole model", where=path, fix=fix)


def refuse_formats(path: str) -> None:
    """Raise UserError if a local directory or file has weights in another format than safetensors, and none in safetensors."""
    place = Path(path).expanduser()
    folder = place if place.is_dir() else place.parent
    if not place.exists() or (place.is_dir() and any(place.glob("*.safetensors"))):
        return
    for pattern, what, fix in FORMATS:
        if place.match(pattern) or (place.is_dir() and any(place.glob(pattern))):
            raise UserError(what, where=path, fix=fix.format(folder=str(folder)))


def refuse_path(path: str) -> None:
    """Raise UserError if a name without a model is that of a local directory or file, or looks like one; otherwise it is a Hub name."""
    local = Path(path).expanduser()
    if not path.strip():
        raise UserError("the name of the model is empty", fix="give a local model directory, or a Hub name")
    if local.is_dir():
        refuse_formats(path)
        if (found := folder_of_runs(path, str)) is not None:
            raise found
        newest = newest_step(local)
        hint = f"did you mean {newest}?" if newest else "give the directory that has config.json"
        raise UserError("has no config.json" if any(local.iterdir()) else "is an empty directory", where=path, fix=hint)
    if local.exists():
        refuse_formats(path)
        raise UserError("is a file, not a directory", where=path, fix="give the directory that has the file")
    if path.startswith(("~", "/", ".")) or path.endswith("/") or path.count("/") > 1 or "\\" in path or _is_in_folder(local):
        beside = sorted(other.name for other in local.parent.iterdir() if other.is_dir()) if local.parent.is_dir() else []
        near = difflib.get_close_matches(local.name, beside, n=1)
        hint = f"did you mean {local.parent / near[0]}? The" if near else "the"
        raise UserError("no such model directory", where=path, fix=f"{hint} current folder is {Path.cwd()}")


def _is_in_folder(local: Path) -> bool:
    """Return whether a missing path is in a folder that exists, as no Hub name is that has not been downloaded."""
    if len(local.parts) != 2 or not local.parent.is_dir():
        return False
    return not isinstance(try_to_load_from_cache(str(local), "config.json"), str)


def newest_step(folder: Path) -> Path | None:
    """Return the newest checkpoint in a run's directory; None if there is none."""
    return next(reversed(steps_in(folder)), None)


def check_repository(name: str) -> None:
    """Raise UserError if a text cannot be the name of a repository on the Hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # few commands push a model

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        what = f"is no name of a repository: {str(error).splitlines()[0]}"
        raise UserError(what, where=f"hub={name}", fix="give owner/name, of letters, digits, -, _ and .") from error
