"""What the documentation says is so: its commands are read by the code, its lists are complete."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from places import ROOT

from verl import plugin
from verl.config.commands import EvalConfig, ExportConfig
from verl.config.load import load_config
from verl.config.pairs import RewardTrainerConfig
from verl.config.ppo import PPOConfig
from verl.config.sft import SFTConfig
from verl.errors import UserError
from verl.models import export

SCHEMAS: dict[str, type] = {
    "verl.trainer.fsdp_sft_trainer": SFTConfig,
    "verl.eval.sft_evaluator": EvalConfig,
    "sft": SFTConfig,
    "plan": SFTConfig,
    "ppo": PPOConfig,
    "verl.trainer.ppo_trainer": PPOConfig,
    "reward": RewardTrainerConfig,
    "eval": EvalConfig,
    "export": ExportConfig,
}


def commands(text: str) -> list[list[str]]:
    """The words of each command in the ```bash blocks of a page."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def read(words: list[str], model: Path) -> object | None:
    """The config that a command's words stand for, with a local model in place of a name on the Hub; None for other commands."""
    if words[0] == "verl":
        name, rest = words[1], words[2:]
    elif "-m" in words:
        name, rest = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
    else:
        return None
    local = [re.sub(r"^(model\.partial_pretrain)=.*", rf"\1={model}", word) for word in rest]
    local = export.keyed(local) if name == "export" else local
    return load_config(SCHEMAS[name], local) if name in SCHEMAS else None


README = commands((ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("words", README, ids=" ".join)
def test_every_command_of_the_readme_is_read(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    loaded = read(words, tmp_path)
    if isinstance(loaded, (SFTConfig, PPOConfig, RewardTrainerConfig)):
        assert loaded.model.partial_pretrain == str(tmp_path) or "--config" in words
    else:
        others = (["verl", "chat"], ["make", "setup"], ["make", "demo"])
        assert isinstance(loaded, (EvalConfig, ExportConfig)) or words[:2] in others


DURING = commands((ROOT / "docs" / "during.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("words", DURING, ids=" ".join)
def test_every_command_of_the_page_on_watching_is_read(words: list[str], tmp_path: Path) -> None:
    assert isinstance(read(words, tmp_path), SFTConfig) or words[:2] == ["verl", "board"]


def test_a_command_with_a_wrong_key_would_be_noticed(tmp_path: Path) -> None:
    (words,) = commands("```bash\npython -m verl.trainer.fsdp_sft_trainer \\\n  data.train_file=a.jsonl\n```\n")
    with pytest.raises(UserError, match=r"unknown key 'data\.train_file'"):
        read(words, tmp_path)


@pytest.mark.parametrize("name", ["qwen25_05b_one_gpu.sh", "qwen25_05b_four_gpus.sh"])
def test_a_script_of_the_small_model_is_the_readmes_command(name: str) -> None:
    text = (ROOT / "examples" / "sft" / name).read_text(encoding="utf-8")
    (words,) = (words for words in commands(f"```bash\n{text}```") if "-m" in words)
    assert words[-1] == "$@"
    assert sorted(words[:-1]) in [sorted(command) for command in README]


def test_the_readme_names_every_example_script() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    scripts = [
        path.relative_to(ROOT).as_posix() for kind in ("sft/*.sh", "ppo/*.sh", "slurm/*.sbatch") for path in (ROOT / "examples").glob(kind)
    ]
    assert len(scripts) >= 11
    assert [script for script in scripts if f"({script})" not in readme] == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_an_example_config_is_read(path: Path) -> None:
    loaded = load_config(SFTConfig, ["--config", str(path), "data.train_files=train.jsonl"])
    assert loaded != load_config(SFTConfig, ["data.train_files=train.jsonl", "model.partial_pretrain=model"])


@pytest.mark.parametrize(("response", "score"), [("A red fox.", 1.0), ("the FOX, a red one", 0.75), ("a cat", 0.4), ("", 0.0)])
def test_the_example_metric_counts_shared_words(response: str, score: float) -> None:
    metric = plugin.load("verl.rewards", str(ROOT / "examples" / "metrics" / "word_overlap.py"), needs=("score",))
    assert metric.score("What is it?", response, {"reference": "a red fox"}) == score


PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_named_files_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    named = re.findall(r"`((?:verl|docs|examples|configs|tests)/[\w./-]+\.\w+)`", text)
    assert [
        name for name in [*((ROOT / page).parent / link for link in links), *(ROOT / name for name in named)] if not name.exists()
    ] == []


def test_the_list_of_keys_is_current() -> None:
    spec = importlib.util.spec_from_file_location("make_keys", ROOT / "docs" / "make_keys.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "keys.md").read_text(encoding="utf-8") == module.page(), "run: python docs/make_keys.py"


def tree(text: str) -> set[str]:
    """The files of the README's tree, as paths."""
    (block,) = re.findall(r"^```\n(verl/\n.*?)^```", text, re.MULTILINE | re.DOTALL)
    found, folders = set(), [""]
    for line in block.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth + 1 :] = [f"{folders[depth]}{name}"]
        if not name.endswith("/"):
            found.add(f"{folders[depth]}{name}")
    return found


def modules() -> set[str]:
    paths = (path.relative_to(ROOT).as_posix() for path in (ROOT / "verl").rglob("*.py"))
    return {path for path in paths if not path.endswith("/__init__.py")}


def test_the_readmes_tree_has_every_module() -> None:
    assert tree((ROOT / "README.md").read_text(encoding="utf-8")) == modules()


def test_a_module_that_the_tree_lacks_is_noticed() -> None:
    shown = tree("```\nverl/\n  cli.py  the command\n  data/\n    batch.py  the batch\n  run.py\n```\n")
    assert shown == {"verl/cli.py", "verl/data/batch.py", "verl/run.py"}


# docs/architecture.md

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def rows(page: str) -> list[list[str]]:
    """The cells of the tables whose second column is called file."""
    found: list[list[str]] = []
    inside = False
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        inside = bool(cells) and (inside or cells[1] == "file")
        if inside and cells[1] != "file" and set(cells[1]) != {"-"}:
            found.append(cells)
    return found


def defined(path: Path) -> set[str]:
    """The functions and classes of a module, and its methods as Class.method; none if there is no such file."""
    kinds = ast.FunctionDef | ast.ClassDef
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    top = [node for node in tree.body if isinstance(node, kinds)]
    methods = {f"{node.name}.{inner.name}" for node in top for inner in getattr(node, "body", ()) if isinstance(inner, kinds)}
    return methods | {node.name for node in top}


def not_found(page: str) -> list[str]:
    """What the tables name and the code has not, as file:name."""
    quoted = [(re.findall(r"`([^`]+)`", file), re.findall(r"`([^`]+)`", names)) for _, file, names, *_ in rows(page)]
    assert all(len(files) == 1 and names for files, names in quoted), "a row needs one file and at least one name"
    return [f"{file}:{name}" for (file,), names in quoted for name in names if name not in defined(ROOT / "verl" / file)]


def test_everything_that_the_architecture_page_places_is_there() -> None:
    assert len(rows(ARCHITECTURE)) > 50
    assert not_found(ARCHITECTURE) == []


def test_a_place_that_is_gone_is_noticed() -> None:
    table = "| where | file | name | how |\n|---|---|---|---|\n"
    page = f"{table}| a | `data/pack.py` | `pack`, `unpack` | |\n| b | `data/gone.py` | `pack` | |\n| c | `run.py` | `Run.gone` | |\n"
    assert not_found(page) == ["data/pack.py:unpack", "data/gone.py:pack", "run.py:Run.gone"]


def lost(page: str) -> list[str]:
    """Paths in a page's diagrams and between backticks that are neither a module nor a folder of verl/."""
    diagrams = "".join(re.findall(r"^```\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    paths = [*re.findall(r"\b[a-z]+/[a-z]\w+\b", diagrams), *re.findall(r"`([a-z_/]+(?:\.py|/))`", page)]
    places = [path.removeprefix("verl/") for path in paths if path != "path/to/file.py"]
    folders = (ROOT / "verl", ROOT / "verl" / "models")
    return [place for place in places if not any((folder / f"{place}{end}").exists() for folder in folders for end in ("", ".py"))]


def test_every_path_of_the_architecture_page_is_there() -> None:
    assert lost(ARCHITECTURE) == []


def test_a_path_that_is_gone_is_noticed() -> None:
    assert lost("```\nrows  data/source, data/pick\n```\n`trainer/`, `helpers/`, `verl/run.py`, `walk.py`\n") == [
        "data/pick",
        "helpers/",
        "walk.py",
    ]


# docs/reliability.md


def named_tests(page: str) -> list[tuple[str, str]]:
    """File and name of each `tests/…::test_name` of a page."""
    return re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)


def lost_tests(page: str) -> list[str]:
    return [f"{file}::{name}" for file, name in named_tests(page) if name not in defined(ROOT / file)]


def test_every_test_that_the_reliability_page_names_is_there() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert len(named_tests(page)) >= 24 and page.count("::") == len(named_tests(page))
    assert lost_tests(page) == []


def test_a_test_that_is_gone_is_noticed() -> None:
    here = "tests/project/test_docs.py"
    page = f"| `{here}::test_a_test_that_is_gone_is_noticed` | `{here}::test_gone` | `tests/gone.py::test_gone` |"
    assert lost_tests(page) == [f"{here}::test_gone", "tests/gone.py::test_gone"]
