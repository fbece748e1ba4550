"""A checkpoint says how it was asked in training, and is not asked otherwise."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rl_runs import REWARD
from rl_runs import words as rl_words
from runs import lines_of
from tiny import write_problems_and_model

from verl.config.commands import EvalConfig
from verl.config.load import load_config
from verl.config.sft import SFTConfig
from verl.data.render import Renderer
from verl.errors import UserError
from verl.eval import sft_evaluator
from verl.models.format_check import read_format
from verl.models.prompt_format import FILE
from verl.trainer import fsdp_sft_trainer, ppo_trainer

SYSTEM = "You count well."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_problems_and_model(tmp_path_factory.mktemp("format"))
    (folder / "vowels.py").write_text(REWARD)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    chats = [
        [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]
        for row in rows
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat, "answer": chat[-1]["content"]}) + "\n" for chat in chats))
    return folder


def fine_tuned(folder: Path, output: str, *more: str) -> Path:
    words = [
        f"data.cache_dir={folder / 'cache'}",
        f"model.partial_pretrain={folder / 'model'}",
        f"trainer.default_local_dir={folder / output}",
        "data.train_batch_size=8",
        "data.max_length=256",
        "trainer.total_training_steps=1",
        *more,
    ]
    fsdp_sft_trainer.main(
        [*words] if any("train_files" in word for word in more) else [*words, f"data.train_files={folder / 'train.jsonl'}"]
    )
    return folder / output / "global_step_1"


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    return fine_tuned(folder, "plain")


@pytest.fixture(scope="module")
def with_system(folder: Path) -> Path:
    return fine_tuned(folder, "system", f"data.train_files={folder / 'chats.jsonl'}", "data.messages_key=messages")


def evaluate(checkpoint: Path, folder: Path, *more: str) -> list[str]:
    """The answers."""
    words = [
        f"model_path={checkpoint}",
        f"test_file={folder / 'test.jsonl'}",
        f"output_dir={folder / 'eval'}",
        "overwrite=true",
        "max_new_tokens=2",
        "max_samples=2",
    ]
    sft_evaluator.evaluate(load_config(EvalConfig, [*words, *more]))
    return [line["response"] for line in lines_of(folder / "eval/predictions.jsonl")]


def reinforce(checkpoint: Path, folder: Path, *more: str) -> list[str]:
    """The answers of its one step."""
    output, validation = f"rl_{checkpoint.parent.name}", {"data__val_files": folder / "test.jsonl", "data__val_max_samples": 2}
    changes: dict[str, object] = {"model__partial_pretrain": checkpoint, "trainer__total_training_steps": 1, "trainer__save_freq": -1}
    shutil.rmtree(folder / output, ignore_errors=True)
    ppo_trainer.main([*rl_words(folder, output, **changes, **validation), *more])
    return [line["response"] for line in lines_of(folder / output / "rollouts/validation_0.jsonl")]


ASKERS = pytest.mark.parametrize(("ask", "key"), [(evaluate, "system_prompt"), (reinforce, "data.system_prompt")])


def test_the_checkpoint_records_template_stop_tokens_and_system_prompt(plain: Path, with_system: Path) -> None:
    found, other = read_format(str(plain)), read_format(str(with_system))
    assert found is not None
    assert other is not None
    assert (found.system_prompts, other.system_prompts) == ([None], [SYSTEM])
    assert found.stop_ids == other.stop_ids == json.loads((plain / "generation_config.json").read_text())["eos_token_id"][:1]
    assert json.loads((plain / "manifest.json").read_text())["files"].get(FILE)
    assert load_config(SFTConfig, ["--config", str(plain.parent / "config.yaml")])


@ASKERS
def test_asked_as_it_was_trained_it_answers(
    ask: Callable[..., list[str]], key: str, folder: Path, plain: Path, with_system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    encode = Renderer.prompt
    monkeypatch.setattr(Renderer, "prompt", lambda self, messages, *rest: (asked.append(messages), encode(self, messages, *rest))[1])
    for checkpoint, words, system in ((plain, (), []), (with_system, (f"{key}={SYSTEM}",), [{"role": "system", "content": SYSTEM}])):
        asked.clear()
        assert len(ask(checkpoint, folder, *words)) == 2
        assert asked and all([message for message in messages if message["role"] == "system"] == system for messages in asked)


@ASKERS
def test_without_its_system_prompt_it_is_not_asked(ask: Callable[..., list[str]], key: str, folder: Path, with_system: Path) -> None:
    with pytest.raises(UserError, match=f"trained with the system prompt '{SYSTEM}'") as caught:
        ask(with_system, folder)
    assert f"set {key}" in str(caught.value.fix)


@ASKERS
def test_with_a_system_prompt_that_it_has_not_seen_it_is_not_asked(
    ask: Callable[..., list[str]], key: str, folder: Path, plain: Path
) -> None:
    with pytest.raises(UserError, match="would be prompted with the system prompt 'Hi'"):
        ask(plain, folder, f"{key}=Hi")


@ASKERS
@pytest.mark.parametrize(
    ("field", "value", "reason"), [("chat_template_sha256", "0" * 64, "another chat template"), ("stop_ids", [3], "to end answers with")]
)
def test_what_has_changed_is_named(
    ask: Callable[..., list[str]], key: str, field: str, value: object, reason: str, folder: Path, plain: Path
) -> None:
    before, manifest = (plain / FILE).read_text(), plain / "manifest.json"
    (plain / FILE).write_text(json.dumps({**json.loads(before), field: value}))
    manifest.rename(folder / "aside")  # whoever changes a file on purpose deletes it
    try:
        with pytest.raises(UserError, match=reason):
            ask(plain, folder)
    finally:
        (plain / FILE).write_text(before)
        (folder / "aside").rename(manifest)


def test_an_adapter_goes_on_as_it_was_trained(folder: Path) -> None:
    """The base beside it knows neither its template nor its system prompt."""
    turn = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    template, other = folder / "trained.jinja", folder / "other.jinja"
    template.write_text(turn + "{% if add_generation_prompt %}assistant: {% endif %}")
    other.write_text(turn.replace(": ", "= ") + "{% if add_generation_prompt %}assistant= {% endif %}")
    chats = [f"data.train_files={folder / 'chats.jsonl'}", "data.messages_key=messages"]
    adapter = fine_tuned(folder, "adapter", *chats, f"data.chat_template={template}", "model.lora_rank=2")
    words = [f"model.lora_adapter_path={adapter}", f"data.system_prompt={SYSTEM}"]
    assert len(reinforce(folder / "model", folder, *words)) == 2
    with pytest.raises(UserError, match="trained with the system prompt"):
        reinforce(folder / "model", folder, words[0])
    with pytest.raises(UserError, match="another chat template"):
        reinforce(folder / "model", folder, *words, f"data.chat_template={other}")


def test_reinforcement_learning_hands_it_on(folder: Path, with_system: Path) -> None:
    reinforce(with_system, folder, f"data.system_prompt={SYSTEM}")
    assert read_format(str(folder / "rl_system" / "global_step_1")) == read_format(str(with_system))


def test_a_model_from_elsewhere_is_asked_as_one_likes(folder: Path) -> None:
    assert read_format(str(folder / "model")) is None
    assert len(evaluate(folder / "model", folder, "system_prompt=Hi")) == 2


def test_a_damaged_record_is_an_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / FILE).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_format(str(tmp_path))
