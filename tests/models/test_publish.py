"""Pushing to the Hub, with a stand-in for its HTTP interface on this machine (tests/hub_stand_in.py): it is not the Hub itself."""

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_stand_in import TOKEN, Hub, hub
from runs import command
from tiny import qwen2_config, write_model

from verl.config.commands import ExportConfig, keyed
from verl.config.load import load_config
from verl.errors import UserError
from verl.models import export as exporting
from verl.models.tiny import tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's uploads of large files


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hub() as found:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", found.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_ENDPOINT", found.address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("publish") / "model", qwen2_config())
    tiny_tokenizer(["to be or not to be"], vocab_size=400).save_pretrained(folder)
    return folder


def export(*words: object) -> Path:
    return exporting.export(load_config(ExportConfig, keyed([str(word) for word in words])))


def test_the_command_pushes_what_it_has_written_with_a_card(model: Path, tmp_path: Path) -> None:
    with hub() as stand_in:
        env = {"HF_ENDPOINT": stand_in.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        done = command("verl", "export", model, tmp_path / "out", "--hub", "my-model", env=env)
    assert done.returncode == 0, done.stderr
    repository = stand_in.repositories["someone/my-model"]
    assert repository["private"] is True and repository["commits"] == ["Upload by verl export"]
    assert repository["files"] == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert b"# my-model" in repository["files"]["README.md"]
    assert f"pushed: {stand_in.address}/someone/my-model" in done.stdout and TOKEN not in done.stdout + done.stderr


def test_a_directory_is_pushed_as_it_is_without_the_state_of_a_trainer(model: Path, stand_in: Hub, tmp_path: Path) -> None:
    folder = exporting.export(load_config(ExportConfig, keyed([model, tmp_path / "out"])))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# My own words\n")
    for name in ("trainer/state.json", ".cache/x"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("{}")
    export(folder, "--hub=someone/my-model", "hub_private=false")
    repository = stand_in.repositories["someone/my-model"]
    assert repository["private"] is False and repository["files"]["README.md"].endswith(b"# My own words\n")
    assert not [name for name in repository["files"] if name.startswith(("trainer", "."))]
    assert repository["files"]["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_repository_that_exists_gets_a_new_commit_only_if_asked(model: Path, stand_in: Hub, tmp_path: Path) -> None:
    export(model, "--hub", "my-model")
    with pytest.raises(UserError, match=r"the repository exists: http.*\n  fix: .*hub_replace=true"):
        export(model, tmp_path / "out", "--hub", "my-model")
    assert not (tmp_path / "out").exists() and len(stand_in.repositories["someone/my-model"]["commits"]) == 1
    export(model, "--hub", "my-model", "hub_replace=true")
    assert len(stand_in.repositories["someone/my-model"]["commits"]) == 2


def test_a_card_whose_metadata_the_hub_refuses_is_no_commit(model: Path, stand_in: Hub, tmp_path: Path) -> None:
    folder = export(model, tmp_path / "out")
    (folder / "README.md").write_text("---\nlicense: [1, 2]\n---\n# Mine\n")
    with pytest.raises(UserError, match='"license" must be a string'):
        export(folder, "--hub", "my-model")
    assert stand_in.repositories["someone/my-model"]["commits"] == []


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("my-model", "", "there is no token for the Hub\n  fix: .*hf auth login"),
        ("my-model", "hf_" + "q" * 30, "does not accept HF_TOKEN\n  fix: make a token"),
        ("another/my-model", TOKEN, "may not write under another\n  fix: give a name of someone"),
        ("my model", TOKEN, "no name of a repository"),
    ],
)
def test_what_the_hub_refuses_is_said_before_anything_is_computed(
    name: str, token: str, message: str, model: Path, stand_in: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=message) as raised:
        export(model, tmp_path / "out", f"hub={name}")
    assert not (tmp_path / "out").exists() and stand_in.repositories == {}
    assert not token or token not in str(raised.value)


@pytest.mark.parametrize("part", ["/preupload/", "/large/", "/commit/"])
def test_a_hub_that_fails_in_between_leaves_the_directory_and_says_how_to_go_on(
    part: str, model: Path, stand_in: Hub, tmp_path: Path
) -> None:
    stand_in.broken = (part, 403)
    with pytest.raises(UserError, match=r"the token may not write there") as raised:
        export(model, tmp_path / "out", "--hub", "my-model")
    assert f"verl export {tmp_path / 'out'} --hub my-model pushes it" in str(raised.value)
    assert (tmp_path / "out" / "model.safetensors").is_file() and stand_in.repositories["someone/my-model"]["commits"] == []
    stand_in.broken = None
    export(tmp_path / "out", "--hub", "my-model", "hub_replace=true")
    assert len(stand_in.repositories["someone/my-model"]["commits"]) == 1


def test_a_hub_that_cannot_be_reached_or_may_not_be_asked_is_said(
    model: Path, stand_in: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9 cannot be reached: .*\n  fix: check the network"):
        export(model, "--hub", "my-model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        export(model, "--hub", "my-model")


def test_an_adapter_whose_base_only_this_machine_has_is_not_pushed(model: Path, stand_in: Hub, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "base_model_name_or_path": str(model)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="which others do not have"):
        export(adapter, "--hub", "my-adapter")
    assert stand_in.repositories == {}
    written = export(adapter, tmp_path / "out", "merge=false", "base_model=Qwen/Qwen2.5-0.5B", "--hub", "my-adapter")
    pushed = json.loads(stand_in.repositories["someone/my-adapter"]["files"]["adapter_config.json"])
    assert pushed["base_model_name_or_path"] == "Qwen/Qwen2.5-0.5B" and written == tmp_path / "out"


def test_options_are_read_as_keys() -> None:
    assert keyed(["--hub", "a/b", "SRC", "DIR", "dtype=float16", "--card", "--gguf=x.gguf"]) == [
        "source=SRC",
        "directory=DIR",
        "dtype=float16",
        "hub=a/b",
        "card=true",
        "gguf=x.gguf",
    ]
    with pytest.raises(UserError, match="--hub needs a value"):
        keyed(["SRC", "--hub"])
    with pytest.raises(UserError, match="--hub needs a value"):
        keyed(["SRC", "--hub", "--card"])
