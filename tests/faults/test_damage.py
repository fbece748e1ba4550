"""The catalogue of damaged checkpoints: each is named on one line and passed over, and none is loaded."""

import json
import os
import pickle
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sft_runs
import torch
from faults import checkpoints
from faults.checkpoints import change_json, change_manifest, copy_of, seal
from safetensors.torch import save_file

from verl.config.commands import ChatConfig, ExportConfig
from verl.engine.damage import find_damage, find_newest
from verl.engine.stored_metadata import read_metadata
from verl.errors import UserError
from verl.manifest import MANIFEST, entry_of, read_manifest
from verl.models.inference import load_for_inference
from verl.models.load import load_tokenizer
from verl.trainer import fsdp_sft_trainer

Damage = Callable[[Path], object]


pytestmark = pytest.mark.faults

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run's directory of each kind, with two checkpoints."""
    return {kind: checkpoints.write_run(tmp_path_factory.mktemp(kind), kind) for kind in checkpoints.KINDS}


# Files of a checkpoint: the kind of run that has it, and whether a model that is loaded from it needs it.
FILES = {
    "config.json": ("full", True),
    "model.safetensors": ("full", True),
    "tokenizer.json": ("full", True),
    "tokenizer_config.json": ("full", True),
    "adapter_model.safetensors": ("adapter", True),
    "adapter_config.json": ("adapter", True),
    "trainer/state.json": ("full", False),
    "trainer/.metadata": ("full", False),
    "trainer/__0_0.distcp": ("full", False),
    "trainer/rng_0.safetensors": ("full", False),
    "critic/model.safetensors": ("critic", False),
    "critic/config.json": ("critic", False),
    "trainer/critic/.metadata": ("critic", False),
    "trainer/critic/__0_0.distcp": ("critic", False),
}
WAYS = ["shorten", "lengthen", "flip", "flip_and_keep_the_time", "empty", "delete", "link", "loop", "directory_instead", "pipe_instead"]
OF_THE_OTHER = ["model.safetensors", "adapter_model.safetensors", "trainer/state.json", "trainer/__0_0.distcp", "critic/model.safetensors"]
ON_FILES = [
    *((name, way) for name in FILES for way in WAYS),
    *((name, "take_from_the_other") for name in OF_THE_OTHER),
]


def passed_over(directory: Path) -> str:
    """The one line about the newest checkpoint, which is passed over for the one before."""
    said: list[str] = []
    assert find_newest(directory.parent, said.append) == directory.with_name("global_step_1")
    assert len(said) == 1 and said[0].startswith(f"skipping {directory.name}: ") and "\n" not in said[0], said
    return said[0]


@pytest.mark.parametrize(("name", "way"), ON_FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(name: str, way: str, runs: dict[str, Path], tmp_path: Path) -> None:
    kind, _ = FILES[name]
    directory = copy_of(runs[kind], tmp_path / "run")
    getattr(checkpoints, way)(directory / name)
    assert name in passed_over(directory)


@pytest.mark.parametrize(("name", "way"), [(name, way) for name, way in ON_FILES if FILES[name][1]])
def test_a_model_with_a_damaged_file_is_not_loaded(name: str, way: str, runs: dict[str, Path], tmp_path: Path) -> None:
    directory = copy_of(runs[FILES[name][0]], tmp_path / "run")
    getattr(checkpoints, way)(directory / name)
    for load in (load_tokenizer, lambda path: load_for_inference(path, device="cpu")):
        with pytest.raises(UserError, match=name.replace(".", r"\.")) as caught:
            load(str(directory))
        assert str(directory) in str(caught.value)


def test_what_is_not_damaged_is_found_and_loaded(runs: dict[str, Path]) -> None:
    """Negative control of the catalogue."""
    for run in runs.values():
        assert find_newest(run, print) == run / "global_step_2"
        load_tokenizer(str(run / "global_step_2"))
        load_for_inference(str(run / "global_step_2"), device="cpu")


def raw(text: str | bytes) -> Damage:
    content = text if isinstance(text, bytes) else text.encode()
    return lambda d: (d / MANIFEST).write_bytes(content)


def of_files(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the list of files in a manifest."""

    def damage(directory: Path) -> None:
        found = json.loads((directory / MANIFEST).read_text())
        change(found["files"])
        (directory / MANIFEST).write_text(json.dumps(found))

    return damage


def named_instead(name: str) -> Damage:
    """List the weights under another name, with their true size and hash."""
    return of_files(lambda files: files.__setitem__(name, files.pop("model.safetensors")))


ENTRY = {"size": 0, "sha256": "0" * 64}
MANIFESTS: dict[str, Damage] = {
    "no file": lambda d: (d / MANIFEST).unlink(),
    "empty": raw(""),
    "cut": lambda d: checkpoints.shorten(d / MANIFEST) or (d / MANIFEST).write_bytes((d / MANIFEST).read_bytes()[:-9]),
    "a list": raw("[]"),
    "a number": raw("7"),
    "null": raw("null"),
    "not UTF-8": raw(b"\xff\xfe{}"),
    "deep": raw("[" * 100_000),
    "NaN": lambda d: (d / MANIFEST).write_text((d / MANIFEST).read_text().replace('"step": 2', '"step": NaN')),
    "a key twice": lambda d: (d / MANIFEST).write_text((d / MANIFEST).read_text().replace('"step": 2', '"step": 2, "step": 2')),
    "no files": lambda d: change_manifest(d, files=None),
    "files is empty": lambda d: change_manifest(d, files={}),
    "files is a list": lambda d: change_manifest(d, files=["config.json"]),
    "files is text": lambda d: change_manifest(d, files="config.json"),
    "a file is null": of_files(lambda files: files.update({"config.json": None})),
    "a file is text": of_files(lambda files: files.update({"config.json": "ok"})),
    "size is text": of_files(lambda files: files["config.json"].update(size="7")),
    "size is true": of_files(lambda files: files["config.json"].update(size=True)),
    "size is negative": of_files(lambda files: files["config.json"].update(size=-1)),
    "no hash": of_files(lambda files: files["config.json"].pop("sha256")),
    "the hash is null": of_files(lambda files: files["config.json"].update(sha256=None)),
    "the hash is short": of_files(lambda files: files["config.json"].update(sha256="ab")),
    "only config.json": of_files(lambda files: [files.pop(name) for name in list(files) if name != "config.json"]),
    "all but one file": of_files(lambda files: files.pop("trainer/rng_0.safetensors")),
    "a file that is not there": of_files(lambda files: files.update({"more.json": ENTRY})),
    "step is text": lambda d: change_manifest(d, step="2"),
    "step is negative": lambda d: change_manifest(d, step=-2),
    "another step": lambda d: change_manifest(d, step=3),
    "no processes": lambda d: change_manifest(d, world_size=0),
    "more processes than files of random states": lambda d: change_manifest(d, world_size=2),
    "an unknown field": lambda d: change_manifest(d, more=1),
    "a path upwards": named_instead("../run/global_step_2/model.safetensors"),
    "an absolute path": named_instead("/etc/passwd"),
    "a backslash": named_instead("..\\model.safetensors"),
    "a path with a dot": named_instead("./model.safetensors"),
    "an empty name": named_instead(""),
    "a NUL": named_instead("model\0.safetensors"),
    "a link": lambda d: checkpoints.link(d / MANIFEST),
    "a loop": lambda d: checkpoints.loop(d / MANIFEST),
    "a pipe": lambda d: checkpoints.pipe_instead(d / MANIFEST),
    "a directory": lambda d: checkpoints.directory_instead(d / MANIFEST),
    "of the checkpoint before": lambda d: shutil.copy2(d.with_name("global_step_1") / MANIFEST, d / MANIFEST),
}


@pytest.mark.parametrize("damage", MANIFESTS)
def test_a_damaged_manifest_is_named_and_the_checkpoint_before_is_taken(damage: str, runs: dict[str, Path], tmp_path: Path) -> None:
    directory = copy_of(runs["full"], tmp_path / "run")
    MANIFESTS[damage](directory)
    passed_over(directory)


def sealed(damage: Damage, **changes: object) -> Damage:
    """Damage a checkpoint, and write a manifest that fits it."""
    return lambda d: (damage(d), seal(d, **changes))


def state(**changes: object) -> Damage:
    return sealed(lambda d: change_json(d / "trainer/state.json", **changes))


RANDOM, PART = "trainer/rng_0.safetensors", "trainer/__0_0.distcp"


def random_states(**states: torch.Tensor) -> Damage:
    return sealed(lambda d: save_file(states, d / RANDOM))


def of_pickle(content: object) -> Damage:
    return sealed(lambda d: (d / "trainer/.metadata").write_bytes(pickle.dumps(content)))


def in_metadata(before: bytes, after: bytes) -> Damage:
    path = "trainer/.metadata"
    return sealed(lambda d: (d / path).write_bytes((d / path).read_bytes().replace(before, after)))


# Checkpoints whose files are as their manifest says: what is wrong is what the files say, or what is not there.
SEALED: dict[str, Damage] = {
    "state.json: not JSON": sealed(lambda d: (d / "trainer/state.json").write_text("{")),
    "state.json: a list": sealed(lambda d: (d / "trainer/state.json").write_text("[]")),
    "state.json: no step": state(step=None),
    "state.json: step is text": state(step="2"),
    "state.json: step is a fraction": state(step=2.5),
    "state.json: step is true": state(step=True),
    "state.json: another step": state(step=1),
    "state.json: rows are text": state(rows="80"),
    "state.json: the fingerprint is a number": state(data_fingerprint=7),
    "state.json: the fingerprint lacks a field": state(data_fingerprint={"rows": 80}),
    "state.json: kl_coef is text": state(kl_coef="0.1"),
    "state.json: an unknown field": state(more=1),
    "state.json: more skipped updates than steps": state(skipped=10**9),
    "state.json: fewer than no tokens": state(tokens=-5),
    "state.json: no rows": state(rows=0),
    "state.json: no rows in a step": state(rows_per_step=0),
    "state.json: no steps in all": state(total_steps=0),
    "state.json: fewer steps in all than are done": state(total_steps=1),
    "state.json: more steps in all than were asked for": state(total_steps=10**18),
    "state.json: kl_coef is below 0": state(kl_coef=-1.0),
    "random states: noise": sealed(lambda d: (d / RANDOM).write_bytes(bytes(range(256)) * 20)),
    "random states: too short": random_states(cpu=torch.get_rng_state()[:100]),
    "random states: of another key": random_states(other=torch.get_rng_state()),
    "random states: of one key more": random_states(cpu=torch.get_rng_state(), other=torch.get_rng_state()),
    "random states: zeros": random_states(cpu=torch.zeros_like(torch.get_rng_state())),
    "random states: of a GPU, too short": random_states(cpu=torch.get_rng_state(), cuda=torch.zeros(3, dtype=torch.uint8)),
    "a part that is noise": sealed(lambda d: (d / PART).write_bytes(bytes((d / PART).stat().st_size))),
    "no state.json": sealed(lambda d: (d / "trainer/state.json").unlink()),
    "no random states": sealed(lambda d: (d / "trainer/rng_0.safetensors").unlink()),
    "no metadata": sealed(lambda d: (d / "trainer/.metadata").unlink()),
    "no part": sealed(lambda d: (d / "trainer/__0_0.distcp").unlink()),
    "a part that is cut": sealed(lambda d: checkpoints.shorten(d / "trainer/__0_0.distcp")),
    "no trainer": sealed(lambda d: shutil.rmtree(d / "trainer")),
    "no config": sealed(lambda d: (d / "config.json").unlink()),
    "no weights": sealed(lambda d: (d / "model.safetensors").unlink()),
    "an index without its files": sealed(lambda d: (d / INDEX).write_text('{"weight_map": {"a": "b.safetensors"}}')),
    "an index that names a file outside": sealed(lambda d: (d / INDEX).write_text('{"weight_map": {"a": "../x"}}')),
    "an index that is a list": sealed(lambda d: (d / INDEX).write_text("[]")),
    "metadata: empty": sealed(lambda d: (d / "trainer/.metadata").write_bytes(b"")),
    "metadata: noise": sealed(lambda d: (d / "trainer/.metadata").write_bytes(zlib.compress(bytes(999)))),
    "metadata: cut": sealed(lambda d: checkpoints.shorten(d / "trainer/.metadata")),
    "metadata: a list": of_pickle([1, 2]),
    "metadata: of another class": of_pickle(Path("x")),
    "metadata: no tensors": of_pickle({"state_dict_metadata": 5}),
    "metadata: a part upwards": in_metadata(b"__0_0.distcp", b"../_0.distcp"),
    "metadata: another part": in_metadata(b"__0_0.distcp", b"__0_9.distcp"),
}


@pytest.mark.parametrize("damage", SEALED)
def test_a_checkpoint_that_lacks_something_is_passed_over(damage: str, runs: dict[str, Path], tmp_path: Path) -> None:
    directory = copy_of(runs["full"], tmp_path / "run")
    SEALED[damage](directory)
    passed_over(directory)


def test_a_tensor_that_only_the_restore_finds_unreadable_is_one_line_with_the_step(runs: dict[str, Path], tmp_path: Path) -> None:
    directory = copy_of(runs["full"], tmp_path / "run")
    content = bytearray((directory / PART).read_bytes())
    info = max(read_metadata(directory / "trainer").storage_data.values(), key=lambda info: info.length)
    content[info.offset + 30 : info.offset + info.length - 22] = bytes(info.length - 52)
    (directory / PART).write_bytes(content)
    seal(directory)
    assert find_damage(directory) is None, "its ends are right"
    words = sft_runs.words(runs["full"].parent, "", trainer__total_training_steps=3, trainer__default_local_dir=directory.parent)
    with pytest.raises(UserError) as caught:
        fsdp_sft_trainer.main(words)
    first, *rest = str(caught.value).splitlines()
    assert first.startswith(f"{directory}/trainer: the checkpoint is damaged: a tensor in its .distcp files cannot be read (")
    assert len(rest) == 1 and "resume from another checkpoint" in rest[0]


CRITICS: dict[str, Damage] = {
    "no optimizer of the critic": sealed(lambda d: shutil.rmtree(d / "trainer/critic")),
    "no files of the critic": sealed(lambda d: shutil.rmtree(d / "critic")),
    "no config of the critic": sealed(lambda d: (d / "critic/config.json").unlink()),
    "no weights of the critic": sealed(lambda d: (d / "critic/model.safetensors").unlink()),
    "no metadata of the critic": sealed(lambda d: (d / "trainer/critic/.metadata").unlink()),
    "no part of the critic": sealed(lambda d: (d / "trainer/critic/__0_0.distcp").unlink()),
}


@pytest.mark.parametrize("damage", CRITICS)
def test_a_critic_that_is_not_whole_is_passed_over(damage: str, runs: dict[str, Path], tmp_path: Path) -> None:
    directory = copy_of(runs["critic"], tmp_path / "run")
    CRITICS[damage](directory)
    passed_over(directory)


ADDED = ["trainer/rng_1.safetensors", "model-00002.safetensors", "trainer/__1_0.distcp", "extra.bin", "more/x.json", "modeling.py"]


@pytest.mark.parametrize("name", ADDED)
def test_a_file_that_was_added_is_named(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    directory = copy_of(runs["full"], tmp_path / "run")
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_bytes(b"x")
    assert f"{name} is not in manifest.json" in passed_over(directory)


def test_files_of_another_run_are_noticed(runs: dict[str, Path], tmp_path: Path) -> None:
    directory = copy_of(runs["full"], tmp_path / "run")
    shutil.rmtree(directory / "trainer")
    shutil.copytree(runs["adapter"] / "global_step_2/trainer", directory / "trainer")
    assert "trainer/" in passed_over(directory)


ODD: dict[str, Damage] = {
    "a file": lambda d: (d.with_name("global_step_9")).write_text("x"),
    "a link to a checkpoint": lambda d: (d.with_name("global_step_9")).symlink_to(d.name),
    "a loop": lambda d: (d.with_name("global_step_9")).symlink_to("global_step_9"),
    "a link to nothing": lambda d: (d.with_name("global_step_9")).symlink_to("nowhere"),
    "an empty directory": lambda d: (d.with_name("global_step_9")).mkdir(),
    "a copy under another number": lambda d: shutil.copytree(d, d.with_name("global_step_12")),
    "a pipe": lambda d: os.mkfifo(d.with_name("global_step_9")),
}


@pytest.mark.parametrize("damage", ODD)
def test_what_only_has_the_name_of_a_checkpoint_is_named_and_passed_over(damage: str, runs: dict[str, Path], tmp_path: Path) -> None:
    directory = copy_of(runs["full"], tmp_path / "run")
    ODD[damage](directory)
    said: list[str] = []
    assert find_newest(directory.parent, said.append) == directory
    assert len(said) == 1 and "skipping global_step_" in said[0]


@pytest.mark.parametrize("name", ["", MANIFEST, "trainer", "trainer/state.json", "model.safetensors", "trainer/__0_0.distcp"])
@pytest.mark.parametrize("number", [13, 5])
def test_what_cannot_be_read_is_passed_over(
    name: str, number: int, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with mode 000, which root may read anyway, and with a disk that fails."""
    directory = copy_of(runs["full"], tmp_path / "run")
    refused = str(directory / name)

    def fails(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            if str(path) == refused or (name == "" and str(path).startswith(refused)):
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *arguments, **options)

        return call

    monkeypatch.setattr(os, "open", fails(os.open))
    monkeypatch.setattr(os, "scandir", fails(os.scandir))
    assert os.strerror(number) in passed_over(directory)


def test_all_are_damaged_is_an_error_and_not_a_new_run(runs: dict[str, Path], tmp_path: Path) -> None:
    directory = copy_of(runs["full"], tmp_path / "run")
    for step in (1, 2):
        checkpoints.flip(directory.with_name(f"global_step_{step}") / "model.safetensors")
    found = find_newest(directory.parent, lambda _: None)
    assert isinstance(found, UserError) and "every checkpoint is damaged" in str(found)


# Loading a checkpoint


def test_a_changed_model_is_refused_by_every_command(runs: dict[str, Path], tmp_path: Path) -> None:
    from verl.chat import open_chat
    from verl.config.commands import EvalConfig
    from verl.eval.sft_evaluator import evaluate
    from verl.models.export import export

    directory = copy_of(runs["full"], tmp_path / "run")
    checkpoints.flip_and_keep_the_time(directory / "model.safetensors")
    test = runs["full"].parent / "test.jsonl"
    commands: list[Callable[[], object]] = [
        lambda: open_chat(ChatConfig(model_path=str(directory))),
        lambda: export(ExportConfig(source=str(directory), directory=str(tmp_path / "out"))),
        lambda: evaluate(EvalConfig(model_path=str(directory), test_file=str(test), output_dir=str(tmp_path / "eval"))),
    ]
    for command in commands:
        with pytest.raises(UserError, match=r"model\.safetensors does not match its checksum"):
            command()
    assert not (tmp_path / "out").exists()


def test_what_a_user_may_edit_does_not_make_a_model_unusable(runs: dict[str, Path], tmp_path: Path) -> None:
    directory = copy_of(runs["full"], tmp_path / "run")
    change_json(directory / "generation_config.json", temperature=0.5, do_sample=True)
    (directory / "README.md").write_text("my model")
    checkpoints.delete(directory / "trainer/__0_0.distcp")
    load_tokenizer(str(directory))
    load_for_inference(str(directory), device="cpu")
    assert find_damage(directory) is not None, "it cannot be resumed from"


def test_who_changes_a_file_knowingly_deletes_the_manifest(runs: dict[str, Path], tmp_path: Path) -> None:
    directory = copy_of(runs["full"], tmp_path / "run")
    change_json(directory / "tokenizer_config.json", model_max_length=99)
    with pytest.raises(UserError, match=r"if you changed it knowingly, delete .*manifest\.json"):
        load_tokenizer(str(directory))
    (directory / MANIFEST).unlink()
    assert load_tokenizer(str(directory)).model_max_length == 99


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "adapter_config.json", "modeling.py"])
def test_a_file_that_would_be_loaded_may_not_be_added(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    directory = copy_of(runs["full"], tmp_path / "run")
    (directory / name).write_text("{}")
    with pytest.raises(UserError, match=r"is not in manifest\.json"):
        load_for_inference(str(directory), device="cpu")


def test_a_critic_is_verified_by_the_manifest_beside_it(runs: dict[str, Path], tmp_path: Path) -> None:
    from verl.models.heads import load_critic

    directory = copy_of(runs["critic"], tmp_path / "run")
    load_critic(str(directory / "critic"))
    checkpoints.flip(directory / "critic/model.safetensors")
    with pytest.raises(UserError, match=r"critic/model\.safetensors does not match"):
        load_critic(str(directory / "critic"))


def test_hashes_are_computed_once_until_a_file_changes(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl import manifest
    from verl.models import verified

    directory, read = copy_of(runs["full"], tmp_path / "run"), list[str]()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(manifest, "entry_of", lambda path: (read.append(path.name), entry_of(path))[1])
    verified.verify(str(directory))
    assert "model.safetensors" in read
    read.clear()
    verified._verified.clear()  # as in another process
    verified.verify(str(directory))
    assert read == []
    os.utime(directory / "model.safetensors")
    verified.verify(str(directory))
    assert "model.safetensors" in read


def test_a_manifest_of_another_program_is_not_read(tmp_path: Path) -> None:
    from verl.models.verified import verify

    (tmp_path / MANIFEST).write_text('{"short_name": "app"}')
    verify(str(tmp_path))


def test_the_manifest_lists_every_file(runs: dict[str, Path]) -> None:
    for run in runs.values():
        directory = run / "global_step_2"
        files = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
        assert read_manifest(directory).files.keys() == files - {MANIFEST}
