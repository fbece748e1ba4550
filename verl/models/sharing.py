"""What `verl export` does besides writing a directory: a model card, a GGUF file, and a repository on the Hub.

What can fail early fails before anything is computed: a wrong token, a name that is taken, a converter that is missing.
"""

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from verl.config.commands import ExportConfig
from verl.disk import disk_errors_named
from verl.durable import replace_text
from verl.errors import UserError
from verl.manifest import STEP, refuse_inside
from verl.models import gguf
from verl.models.adapters.files import CONFIG as ADAPTER_CONFIG
from verl.models.card import FILE, facts_of, is_ours, metadata_of, notes, write_card
from verl.models.damage import read_object
from verl.models.provenance import hub_name, provenance

if TYPE_CHECKING:
    from verl.models.publish import Place

Say = Callable[[str], None]
FIX = "make room, or choose a directory on another disk"


@dataclass(frozen=True)
class Sharing:
    """Where a model is shared, checked.

    Attributes:
        place: repository on the Hub; None: none.
        file: GGUF file; None: none.
        converter: words that start llama.cpp's converter.
    """

    place: "Place | None"
    file: Path | None
    converter: list[str]


def check_sharing(config: ExportConfig) -> Sharing:
    """Check where a model is to be shared. Raises UserError: the Hub, the file or the converter is not as it has to be."""
    place, file, converter = None, None, list[str]()
    if config.gguf is not None:
        file, converter = gguf.check_file(config.gguf), gguf.find_converter()
    if config.hub is not None:
        from verl.models.publish import check_place

        place = check_place(config.hub, replace=config.hub_replace)
    return Sharing(place, file, converter)


def card_for(config: ExportConfig, source: Path, folder: Path, say: Say) -> str:
    """Return the text of the card of a model.

    Args:
        source: the checkpoint, or what was exported from it.
        folder: directory of the files that the card is about.
    Raises:
        UserError: config.run or config.evaluations is wrong; or a card is there that says more.
    """
    run = None if config.run is None else Path(config.run).expanduser()
    others = [] if config.directory is None else [Path(config.directory)]
    made = provenance(source, run, config.evaluations, others, base_model=config.base_model)
    if not made.stages and (folder / FILE).is_file():
        fix = f"name the run's directory: run=DIR; or remove {FILE} for a card without the training"
        raise UserError("no run was found, so a new card would say less than this one", where=str(folder / FILE), fix=fix)
    metadata = metadata_of(made.base) or metadata_of(made.hub_base or "")
    if not metadata and made.hub_base and config.hub is not None:
        from verl.models.publish import metadata_on_hub

        metadata = metadata_on_hub(made.hub_base)
    facts = facts_of(folder, _title(config, source), metadata)
    for note in notes(made, facts):
        say(note)
    return write_card(made, facts)


def _title(config: ExportConfig, source: Path) -> str:
    if config.hub is not None:
        return config.hub.rpartition("/")[2]
    if config.directory is not None:
        return Path(config.directory).absolute().name
    path = source.resolve()
    return f"{path.parent.name}, {path.name}" if STEP.fullmatch(path.name) else path.name


def check_card(folder: Path) -> None:
    """Check that a card can be written into a directory that is there.

    Raises:
        UserError: it is a checkpoint, to which nothing is added, or has a README.md that verl did not write.
    """
    adapter = " merge=false" if (folder / ADAPTER_CONFIG).is_file() else ""
    refuse_inside(folder, str(folder), f"write a copy with a card: verl export {shlex.quote(str(folder))} NEW_DIR{adapter} --card")
    if own_card(folder) is not None:
        fix = "move it away, or leave out --card: what is pushed has this README.md"
        raise UserError("is there, and verl did not write it", where=str(folder / FILE), fix=fix)


def own_card(folder: Path) -> str | None:
    """Return the README.md of a directory if verl did not write it; None if there is none, or verl did."""
    file = folder / FILE
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None
    return None if text is None or is_ours(text) else text


def put_card(text: str, folder: Path) -> None:
    """Write the card. Raises DiskError: the disk is full or fails."""
    with disk_errors_named(folder, needed=len(text.encode()), fix=FIX):
        replace_text(folder / FILE, text)


def copy_adapter(source: str, folder: Path, config: ExportConfig) -> None:
    """Copy an adapter with its tokenizer, without the state of its trainer.

    Raises:
        UserError: it is no adapter, or its base model has another name than its config can have.
        DiskError: the disk is full or fails.
    """
    from verl.models.publish import files_to_push

    if not (Path(source) / ADAPTER_CONFIG).is_file():
        raise UserError("is a whole model, not an adapter", where=source, fix="leave out merge=false")
    files = files_to_push(Path(source), with_card=False)
    with disk_errors_named(folder, needed=sum(file.stat().st_size for file in files), fix=FIX):
        for file in files:
            copied = folder / file.relative_to(source)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copied)
        name_base(folder, config)


def name_base(folder: Path, config: ExportConfig) -> None:
    """Write the Hub name of the base model, if it is known, into an adapter's config in place of a directory."""
    settings = read_object(folder / ADAPTER_CONFIG)
    base = str(settings.get("base_model_name_or_path") or "")
    if (name := config.base_model or hub_name(base)) and name != base:
        text = json.dumps({**settings, "base_model_name_or_path": name}, indent=2, ensure_ascii=False) + "\n"
        replace_text(folder / ADAPTER_CONFIG, text)


def check_base(folder: Path) -> None:
    """Raise UserError if an adapter that is pushed names a directory as its base model, which others do not have."""
    file = folder / ADAPTER_CONFIG
    if not file.is_file() or (folder / "config.json").is_file():
        return
    base = str(read_object(file).get("base_model_name_or_path") or "")
    if hub_name(base) != base:
        what = f"the adapter's base model is a directory of this machine, {Path(base).name or 'without a name'}, which others do not have"
        fix = f"verl export {folder} NEW_DIR merge=false base_model=OWNER/NAME --hub …; or leave out merge=false and push it merged"
        raise UserError(what, where=str(file), fix=fix)


def share(config: ExportConfig, sharing: Sharing, folder: Path, card: str | None, say: Say) -> None:
    """Convert a model directory, and push it, as config and `sharing` say.

    Args:
        card: README.md of the repository, if it is not in the directory.
    Raises:
        UserError: the converter or the Hub refuses.
    """
    if sharing.file is not None:
        say(f"converting to {sharing.file} with {sharing.converter[-1]}")
        gguf.convert(folder, sharing.file, sharing.converter, config.gguf_type)
        say(f"wrote {sharing.file}: {sharing.file.stat().st_size / 1e9:,.2f} GB")
    if sharing.place is not None:
        from verl.models.publish import push

        say(f"pushing to {sharing.place.address}")
        try:
            commit = push(folder, sharing.place, private=config.hub_private, replace=config.hub_replace, card=card)
        except UserError as error:
            again = "" if config.directory is None else f"; {folder} is written: verl export {folder} --hub {config.hub} pushes it"
            raise UserError(error.what, where=error.where, fix=f"{error.fix}{again}") from error
        say(f"pushed: {sharing.place.address} (commit {commit.rpartition('/')[2][:12]})")
