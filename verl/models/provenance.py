"""What a checkpoint and the run around it tell of how the model was made: method, data, settings, base model and scores.

Everything is read from files that may have come from elsewhere: what is missing or malformed is unknown, and never an error.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from verl import regular_file
from verl.config.pairs import RewardTrainerConfig
from verl.config.plugin_settings import completed, groups_of
from verl.config.ppo import PPOConfig
from verl.config.sft import SFTConfig
from verl.config.trajectory import CONTENT, MODEL, kind_of, values_of
from verl.config.yaml_text import Loader
from verl.errors import UserError
from verl.manifest import MANIFEST, STEP
from verl.models.foreign import ADAPTER_CONFIG, newest_step
from verl.typed_json import DamageError, read_json

SCHEMAS: dict[str, type] = {"verl sft": SFTConfig, "verl ppo": PPOConfig, "verl reward": RewardTrainerConfig}
FILES, ADAPTER, BASE = "data.train_files", "model.lora_adapter_path", "model.partial_pretrain"
TOLD_ELSEWHERE = {FILES, ADAPTER, BASE, "command"}
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*(/[\w.\-]+)?")
SNAPSHOT = re.compile(r"models--([^/]+)--([^/]+)/snapshots/")  # of a model in the Hub's cache
MOST_STAGES, DEEPEST = 8, 3  # runs that follow each other; folders in which results.json is looked for


@dataclass(frozen=True)
class Stage:
    """One training run.

    Attributes:
        command: such as "verl sft"; empty if unknown.
        method: such as "sft", "grpo" or "dpo"; empty if unknown.
        files: training files, each a path or a Hub name, with its share if it has one, such as `{"path": …, "weight": 2.0}`.
        settings: the keys that change what is learned and differ from their defaults, with their values.
        base: model that it started from, as the run was given it; empty if unknown.
        step, total_steps, rows, rows_per_step, tokens: of the checkpoint; 0 if unknown.
        version: of verl; empty if unknown.
    """

    command: str = ""
    method: str = ""
    files: list[Any] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    base: str = ""
    step: int = 0
    total_steps: int = 0
    rows: int = 0
    rows_per_step: int = 0
    tokens: int = 0
    version: str = ""


@dataclass(frozen=True)
class Scores:
    """One evaluation: the contents of its results.json, and the model that was evaluated.

    Attributes:
        of: "this model", or "the base model".
    """

    directory: Path
    results: dict[str, Any]
    of: str


@dataclass(frozen=True)
class Provenance:
    """How a model was made.

    Attributes:
        stages: training runs, the last one first; empty if nothing is known.
        base: the model that the first of them began with: a Hub name or a directory; empty if unknown.
        hub_base: its name on the Hub, if that is known.
        scores: evaluations of the model and of what its last run began with.
        left_out: what was found and does not belong to the model, in words.
    """

    stages: list[Stage]
    base: str
    hub_base: str | None
    scores: list[Scores]
    left_out: list[str]


def provenance(
    model: Path, run: Path | None, evaluations: Sequence[str] | None, others: Sequence[Path] = (), *, base_model: str | None = None
) -> Provenance:
    """Find out how a model was made.

    Args:
        model: a checkpoint, or a directory that was exported from one.
        run: directory of its run; None: the one in which the checkpoint is.
        evaluations: directories of evaluations; None: those in the run's directory.
        others: other places of the same model, such as what was exported from it.
        base_model: name of the base model on the Hub, if the user gives it.
    Raises:
        UserError: `run` has no run, or a directory of `evaluations` has no results.json.
    """
    checkpoint = model
    if run is not None:
        checkpoint = _checkpoint_in(run)
    elif STEP.fullmatch(model.name):
        run = model.resolve().parent
    stages = list(_stages(checkpoint))
    base = stages[-1].base if stages else _base_of_adapter(model)
    places = {_place(path) for path in (model, checkpoint, *others)}
    if run is not None and newest_step(run) == checkpoint:
        places.add(_place(run))
    found = _evaluations(run, evaluations)
    scores, left_out = _belonging(found, places, stages[0].base if stages else base)
    return Provenance(stages, base, base_model or hub_name(base), scores, left_out)


def _checkpoint_in(run: Path) -> Path:
    step = run if STEP.fullmatch(run.name) else newest_step(run)
    if step is None or not step.is_dir():
        raise UserError("is no directory of a run: it has no checkpoint", where=f"run={run}", fix="give the run's default_local_dir")
    return step


def _place(path: Path | str) -> str:
    return str(Path(path).expanduser().resolve())


def _stages(checkpoint: Path) -> Iterator[Stage]:
    """Yield the run of a checkpoint, and those of the checkpoints that it and they have started from."""
    for _ in range(MOST_STAGES):
        stage = read_stage(checkpoint)
        if stage is None:
            return
        yield stage
        checkpoint = Path(stage.base).expanduser()
        if not stage.base or not checkpoint.is_dir():
            return


def read_stage(checkpoint: Path) -> Stage | None:
    """Return what a checkpoint tells of its run; None if verl did not write it."""
    state = _read_object(checkpoint / "trainer" / "state.json")
    settings = {str(key): _value(text) for key, text in _object(state.get("settings")).items()}
    if not settings:
        settings = {key: _value(text) for key, text in _settings_in_yaml(checkpoint.resolve().parent / "config.yaml").items()}
    if not state and not settings:
        return None
    command = settings.get("command")
    command = command if isinstance(command, str) and command in SCHEMAS else ""
    numbers = {name: state[name] for name in ("step", "total_steps", "rows", "rows_per_step", "tokens") if type(state.get(name)) is int}
    stage = Stage(command, _method(command, settings), _files(settings.get(FILES)), _differing(command, settings), **numbers)
    version = _read_object(checkpoint / MANIFEST).get("verl")
    base = settings.get(BASE)
    return replace(stage, base=base if isinstance(base, str) else "", version=version if isinstance(version, str) else "")


def _method(command: str, settings: Mapping[str, Any]) -> str:
    return "sft" if command == "verl sft" else str(settings.get("algorithm.name") or "")


def _files(given: Any) -> list[Any]:
    if isinstance(given, list):
        return [one for entry in given for one in _files(entry)]
    return [given] if isinstance(given, str) or (isinstance(given, dict) and isinstance(given.get("path"), str)) else []


def _differing(command: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that differ from the defaults of their command; all of them if the command is unknown."""
    usual = {key: _value(text) for key, text in _defaults(command, settings).items()}
    told = {key: value for key, value in settings.items() if key not in TOLD_ELSEWHERE and not key.startswith(CONTENT)}
    return {key: value for key, value in told.items() if key not in usual or usual[key] != value or (kind_of(key) == MODEL and value)}


def _defaults(command: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the defaults of a command's keys as JSON, with those of the plugins that the settings name."""
    if command not in SCHEMAS:
        return {}
    config = SCHEMAS[command]()
    for group in groups_of(config):
        *path, name = group.named_by.split(".")
        holder = config
        for part in path:
            holder = getattr(holder, part)
        setattr(holder, name, settings.get(group.named_by, getattr(holder, name)))
    try:
        return values_of(completed(config))
    except (UserError, TypeError):  # a plugin in a file that is not here any more
        return values_of(SCHEMAS[command]())


def _settings_in_yaml(path: Path) -> dict[str, str]:
    try:
        found = Loader.read(regular_file.read(path, 2**20).decode("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values_of(found) if isinstance(found, dict) else {}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return _object(read_json(path))
    except DamageError:
        return {}


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _value(text: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError):
        return None


def _base_of_adapter(model: Path) -> str:
    base = _read_object(model / ADAPTER_CONFIG).get("base_model_name_or_path")
    return base if isinstance(base, str) else ""


def hub_name(model: str) -> str | None:
    """Return the name of a model on the Hub: the name itself, or that of a directory in the Hub's cache; None if it is unknown."""
    if cached := SNAPSHOT.search(f"{model}/"):
        return f"{cached[1]}/{cached[2]}"
    return model if HUB_NAME.fullmatch(model) and not Path(model).expanduser().exists() else None


def card_file_of(model: str) -> Path | None:
    """Return the model card of a model that is here, in a directory or in the Hub's cache; None if there is none."""
    path = Path(model).expanduser() / "README.md"
    if model and path.is_file():
        return path
    try:
        found = try_to_load_from_cache(model, "README.md") if model else None
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _evaluations(run: Path | None, named: Sequence[str] | None) -> list[Path]:
    """Return the results.json of the named directories, or of those in a run's directory but not in its checkpoints."""
    if named is None:
        found = [] if run is None else _results_below(run, DEEPEST)
        return sorted(found)
    files = [Path(name).expanduser() / "results.json" for name in named]
    for file in files:
        if not file.is_file():
            raise UserError("has no results.json", where=f"evaluations={file.parent}", fix="give an output_dir of verl eval")
    return files


def _results_below(folder: Path, depth: int) -> list[Path]:
    found = [folder / "results.json"] if (folder / "results.json").is_file() else []
    below = [one for one in folder.iterdir() if one.is_dir() and not one.is_symlink() and not STEP.fullmatch(one.name)] if depth else []
    return [*found, *(file for one in below for file in _results_below(one, depth - 1))]


def _is_at(model: str, places: set[str]) -> bool:
    """Return whether a path is one of some places; a relative one may have been given in another folder."""
    path = Path(model).expanduser()
    return _place(path) in places or (not path.is_absolute() and any(Path(place).match(str(path)) for place in places))


def _belonging(found: Sequence[Path], places: set[str], base: str) -> tuple[list[Scores], list[str]]:
    """Divide evaluations into those of the model or its base, and others, which are told in words."""
    scores: list[Scores] = []
    left_out: list[str] = []
    for file in found:
        results = _read_object(file)
        model = _object(results.get("config")).get("model_path")
        if not isinstance(model, str) or not isinstance(results.get("exact_match"), int | float):
            left_out.append(f"{file} cannot be read as the result of verl eval")
        elif _is_at(model, places):
            scores.append(Scores(file.parent, results, "this model"))
        elif base and (model == base or _place(model) == _place(base)):
            scores.append(Scores(file.parent, results, "the base model"))
        else:
            # A path that begins as the file's own does is not written twice.
            is_beside = Path(model).expanduser().resolve().parent in file.resolve().parents
            left_out.append(f"{file} is of another model: {Path(model).name if is_beside else model}")
    return scores, left_out
