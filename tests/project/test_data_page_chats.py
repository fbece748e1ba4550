"""docs/data.md: its examples of rows and chats are read as the page says."""

import io
import re
import shlex
from pathlib import Path

import families
import pytest
from places import ROOT
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from verl.config.load import load_config
from verl.config.sft import SFTConfig
from verl.data.documents import load_documents
from verl.data.report import show_first_row
from verl.data.tables import Columns
from verl.data.template_defaults import set_defaults
from verl.errors import UserError

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLE = re.compile(r"^```jsonl\n(.*?)^```\n(.*?)(?=^```jsonl|^## |\Z)", re.MULTILINE | re.DOTALL)


def examples(section: str) -> list[tuple[str, str, list[str]]]:
    """The rows, the command, and the lines that the run says, of each example of a section."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    found = []
    for rows, after in EXAMPLE.findall(text):
        commands, said = (re.findall(rf"^```{name}\n(.*?)^```", after, re.MULTILINE | re.DOTALL) for name in ("bash", ""))
        found.append((rows, commands[0] if commands else "verl sft data.train_files=train.jsonl", said[0].splitlines()))
    return found


def tokenizer() -> PreTrainedTokenizerFast:
    """A small tokenizer with a template in the manner of Qwen3's."""
    made = families.qwen3()
    tools = "{%- if tools %}{{- '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{%- endif %}"
    is_quiet = "add_generation_prompt and enable_thinking is defined and not enable_thinking"
    quiet = f"{{%- if {is_quiet} %}}{{{{- '<think>\\n\\n</think>\\n\\n' }}}}{{%- endif %}}"
    made.chat_template = f"{tools}{made.chat_template}{quiet}"
    return made


def said_by(command: str) -> str:
    config = load_config(SFTConfig, [*shlex.split(command)[2:], "model.partial_pretrain=x", "data.cache_dir=cache"])
    made = tokenizer()
    if config.data.chat_template_kwargs:
        set_defaults(made, config.data.chat_template_kwargs)
    try:
        documents = load_documents(config.data, Columns.of(config.data), config.data.train_files, made)
    except UserError as error:
        return f"error: {error}"
    console = Console(file=io.StringIO(), width=1000)
    show_first_row(made, *documents.document(0), console)
    return f"{documents.report}\n{console.file.getvalue()}"  # type: ignore[attr-defined]


SECTIONS = ("Shapes of rows", "Chats: what is trained", "What is counted, and when a run stops")


@pytest.mark.parametrize(("rows", "command", "expected"), [example for section in SECTIONS for example in examples(section)])
def test_an_example_of_the_page_is_read_as_it_says(
    rows: str, command: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text(rows, encoding="utf-8")
    said = said_by(command)
    assert expected
    for line in expected:
        assert line in said, f"{line}\n\nnot in\n\n{said}"


def test_the_page_has_examples() -> None:
    assert len(examples("Shapes of rows")) >= 5 and len(examples("Chats: what is trained")) >= 5
