"""The model card: it tells what the run was, is YAML that the Hub reads, and holds nothing secret."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from sft_runs import train
from tiny import write_problems_and_model

from verl.config.commands import ExportConfig, keyed
from verl.config.load import load_config
from verl.errors import UserError
from verl.models import export as exporting
from verl.models.card import FILE, code, facts_of, metadata_of, row, shortened, write_card
from verl.models.provenance import hub_name, provenance

KEY = "hf_" + "a1b2c3d4e5f6g7h8i9"
BASE_CARD = "---\nlicense: other\nlicense_name: qwen-research\nlicense_link: https://example.org/LICENSE\nlanguage: [en, zh]\n---\n# Base\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory with an adapter, after two steps on problems whose base model has a card, and two evaluations."""
    folder = write_problems_and_model(tmp_path_factory.mktemp("card"), 12, 4)
    (folder / "model" / "README.md").write_text(BASE_CARD)
    train(folder, "run", **{"model.lora_rank": 4, "trainer.total_training_steps": 2, "optim.lr": 0.05})
    write_scores(folder / "run" / "eval", folder / "run" / "global_step_2", 0.5, [0.15, 0.85])
    write_scores(folder / "run" / "before", folder / "model", 0.25, [0.05, 0.7])
    write_scores(folder / "run" / "other", folder / "elsewhere", 0.75, [0.3, 0.95])
    return folder / "run"


def write_scores(folder: Path, model: Path, score: float, interval: list[float]) -> None:
    folder.mkdir()
    config = {
        "model_path": str(model),
        "test_file": str(Path.home() / "private" / "test.jsonl"),
        "metric": "gsm8k",
        "n": 1,
        "temperature": 0.0,
    }
    results = {"exact_match": score, "confidence_interval_95": interval, "n": 4, "config": config}
    (folder / "results.json").write_text(json.dumps(results))


def card_of(*words: object) -> str:
    folder = exporting.export(load_config(ExportConfig, keyed([str(word) for word in words])))
    return (folder / FILE).read_text(encoding="utf-8")


def data_of(text: str) -> dict[str, Any]:
    return ModelCard(text).data.to_dict()


def test_a_card_tells_how_the_model_was_made(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = card_of(run, tmp_path / "out", "--card")
    for told in (
        "# out\n",
        "| sft (`verl sft`) | `train.jsonl` | 12 |",
        "2 of 2 steps of 6 rows, by verl",
        "| `model.lora_rank` | `4` |",
        "| `optim.lr` | `0.05` |",
        "| this model | `test.jsonl` | exact match (gsm8k) 50.00% | 15.00% to 85.00% | 4 | 1 at temperature 0.0 |",
        "| the base model | `test.jsonl` | exact match (gsm8k) 25.00% | 5.00% to 70.00% | 4 |",
        "The tokenizer has the chat template of the training. An answer ends with `<|im_end|>`.",
        "The base model's card names the licence `other` (qwen-research)",
        "these languages: en, zh",
    ):
        assert told in text, told
    assert "optim.weight_decay" not in text and "elsewhere" not in text
    said = capsys.readouterr().out
    assert f"left out of the card: {run / 'other' / 'results.json'} is of another model: elsewhere\n" in said
    assert "GB of weights" not in said, "a size of a few kilobytes is no 0.00 GB"


def test_the_folder_of_an_evaluation_of_another_checkpoint_is_named_once(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scores(run / "early", run / "global_step_1", 0.5, [0.15, 0.85])
    card_of(run, tmp_path / "out", "--card")
    shutil.rmtree(run / "early")
    assert f"left out of the card: {run / 'early' / 'results.json'} is of another model: global_step_1\n" in capsys.readouterr().out


def test_the_metadata_is_what_the_hub_reads(run: Path, tmp_path: Path) -> None:
    text = card_of(run, tmp_path / "out", "--card", "base_model=Qwen/Qwen2.5-0.5B")
    data = data_of(text)
    assert data == yaml.safe_load(text.split("---\n")[1])
    assert (data["library_name"], data["pipeline_tag"], data["base_model"]) == ("transformers", "text-generation", "Qwen/Qwen2.5-0.5B")
    assert (data["license"], data["license_name"], data["language"]) == ("other", "qwen-research", ["en", "zh"])
    assert data["tags"] == ["verl", "sft", "lora"]
    (result,) = data["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "exact_match", "value": 0.5, "name": "exact match (gsm8k)"}]
    assert result["dataset"]["name"] == "test.jsonl"


def test_an_adapter_that_is_not_merged_has_a_card_of_an_adapter(run: Path, tmp_path: Path) -> None:
    text = card_of(run, tmp_path / "out", "merge=false", "--card", "base_model=Qwen/Qwen2.5-0.5B")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", FILE} <= files and not files & {
        "trainer",
        "manifest.json",
    }
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "Qwen/Qwen2.5-0.5B"
    assert data_of(text)["library_name"] == "peft" and "This is a LoRA adapter of [Qwen/Qwen2.5-0.5B]" in text


def test_no_path_and_no_secret_is_in_a_card(run: Path, tmp_path: Path) -> None:
    state = run / "global_step_2" / "trainer" / "state.json"
    copied = tmp_path / "copied" / "global_step_2"
    copied.mkdir(parents=True)
    for file in (run / "global_step_2").rglob("*"):
        if file.is_file():
            place = copied / file.relative_to(run / "global_step_2")
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(file.read_bytes())
    found = json.loads(state.read_text())
    found["settings"] |= {
        "data.system_prompt": json.dumps(f"Use {KEY}"),
        "reward.api_key": json.dumps("0123456789"),
        "data.chat_template": json.dumps(str(Path.home() / "secret-project" / "template.jinja")),
    }
    (copied / "trainer" / "state.json").write_text(json.dumps(found))
    made = provenance(copied, None, [str(run / "eval")])
    text = write_card(made, facts_of(copied, "x", {}))
    assert "reward.api_key" in text and "data.system_prompt" in text and "…/template.jinja" in text
    assert all(secret not in text for secret in (KEY, "0123456789", "secret-project", str(Path.home()), str(tmp_path), str(run.parent)))


def test_what_is_not_known_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = run.parent / "model"
    exported = exporting.export(load_config(ExportConfig, keyed([model, tmp_path / "plain"])))
    text = card_of(exported, "--card")
    data = data_of(text)
    assert data["license"] == "unknown" and "language" not in data and "base_model" not in data
    assert "What it was trained on is not known." in text and "None were found." in text
    assert "Which languages it speaks is not known." in text
    assert "no run was found; run=DIR names its directory" in capsys.readouterr().out


def test_a_card_of_an_exported_directory_is_made_from_the_run_that_is_named(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    first = card_of(run, target, "--card")
    with pytest.raises(UserError, match="a new card would say less than this one"):
        card_of(target, "--card")
    assert (target / FILE).read_text(encoding="utf-8") == first
    assert card_of(target, "--card", f"run={run}") == first


def test_a_card_replaces_no_other_text_and_adds_nothing_to_a_checkpoint(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"may not be changed\n  fix: .* NEW_DIR merge=false --card"):
        card_of(run / "global_step_2", "--card")
    exported = exporting.export(load_config(ExportConfig, keyed([run, tmp_path / "out"])))
    (exported / FILE).write_text("# My own words\n")
    with pytest.raises(UserError, match="verl did not write it"):
        card_of(exported, "--card", f"run={run}")
    assert (exported / FILE).read_text() == "# My own words\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run={tmp}"], "is no directory of a run"),
        (["evaluations=[{tmp}]"], "has no results.json"),
    ],
)
def test_a_wrong_run_or_evaluation_is_named(words: list[str], message: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        card_of(run, tmp_path / "new" / "out", "--card", *(word.format(tmp=tmp_path) for word in words))
    assert not (tmp_path / "new").exists()


def test_a_run_that_began_with_a_run_tells_of_both(run: Path, tmp_path: Path) -> None:
    merged = exporting.export(load_config(ExportConfig, keyed([run, tmp_path / "merged"])))
    later = tmp_path / "later" / "global_step_9" / "trainer"
    later.mkdir(parents=True)
    settings = {"command": '"verl ppo"', "algorithm.name": '"grpo"', "model.partial_pretrain": json.dumps(str(run / "global_step_2"))}
    (later / "state.json").write_text(json.dumps({"step": 9, "rows": 7, "settings": settings}))
    made = provenance(later.parent, None, None)
    assert [stage.method for stage in made.stages] == ["grpo", "sft"] and made.base == str(run.parent / "model")
    text = write_card(made, facts_of(merged, "x", metadata_of(made.base)))
    assert text.index("### sft") < text.index("### grpo") and "by supervised fine-tuning, then grpo" in text
    assert data_of(text)["license"] == "other"


def test_names_of_models_are_told_from_directories(tmp_path: Path) -> None:
    assert hub_name("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    assert hub_name("/cache/hub/models--Qwen--Qwen2.5-0.5B/snapshots/0123") == "Qwen/Qwen2.5-0.5B"
    assert hub_name(str(tmp_path)) is None and hub_name("") is None and hub_name("../model") is None


def test_values_are_one_line_of_a_table() -> None:
    assert row(code("a|b\nc"), code("`x`")) == "| `a\\|b c` | `` `x` `` |"
    assert len(code("x" * 1000)) < 220
    assert shortened({"a": ["/data/x/train.jsonl", "plain", 3]}) == {"a": ["…/train.jsonl", "plain", 3]}
