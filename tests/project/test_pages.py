"""README.md, README.zh-CN.md and docs/: their commands are read by the code, their links lead somewhere, and questions have their answer.

Commands are those of ```bash blocks. Of `verl`, `python -m verl…` and `torchrun … -m verl…`, every word is read by the real command
line: the keys by the command's config, the options by its --help. `make` needs its target.
"""

import ast
import itertools
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
from pages import FRONT, OTHERS, PAGES, Link, anchors, blocks, commands, links, script, tables, text_of, without_code
from places import ROOT
from typer.testing import CliRunner

import verl.commands
from verl import cli, early
from verl.commands import Command
from verl.config.load import ALIASES, load_config
from verl.errors import UserError

POSITIONAL = {"chat": ("model_path",), "export": ("source", "directory")}
COMMANDS = {command.usage.split()[1]: command for command in vars(verl.commands).values() if isinstance(command, Command)}
COMMANDS |= {"plan": verl.commands.SFT}
BY_MODULE = {command.module: name for name, command in COMMANDS.items() if name != "plan"}
# Pages whose commands are typed as they stand; elsewhere `…` and the model may stand for more.
COMPLETE = (*FRONT, "docs/start.md", "docs/zh/start.md")


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
make_site = script("make_site")


# Commands


@cache
def help_of(name: str) -> str:
    shown = CliRunner().invoke(cli.app, [name, "--help"])
    assert shown.exit_code == 0, f"verl {name}: no such command"
    return re.sub(r"\x1b\[[\d;]*m", "", shown.output)


def verl_words(words: list[str]) -> tuple[str, list[str]] | None:
    """The command and the words after it, of a line that starts verl; None of any other."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words[:1] == ["verl"] and len(words) > 1:
        return words[1], words[2:]
    if "-m" in words[:-1] and words[words.index("-m") + 1].startswith("verl"):
        name = words[words.index("-m") + 1]
        assert name in BY_MODULE, f"{name} is not the module of a command"
        return BY_MODULE[name], words[words.index("-m") + 2 :]
    return None


def without_options(name: str, words: list[str]) -> list[str]:
    """The words without options such as `--gpus 4`, each of which the command's --help has."""
    kept, left = [], list(words)
    while left:
        word = left.pop(0)
        option = word.partition("=")[0]
        if not word.startswith("--") or option == "--config":
            kept.append(word)
            continue
        assert re.search(rf"{option}\b", help_of(name)), f"verl {name} has no option {option}"
        if "=" not in word and left and "=" not in left[0] and not left[0].startswith("--"):
            left.pop(0)
    return kept


def read(name: str, rest: list[str], *, complete: bool) -> object | None:
    """The config that the words of a command stand for; None of a command without one.

    Args:
        complete: nothing may be left out of the command.
    """
    rest = [word for word in rest if word not in ("…", "&") and not word.startswith("$")]
    if rest[:1] in (["--help"], ["--version"]):
        help_of(name)
        return None
    if name in COMMANDS and COMMANDS[name].rewrite is not None:  # its options are keys
        return load_config(COMMANDS[name].schema(), early.named(COMMANDS[name], rest))
    rest = without_options(name, rest)
    if name not in COMMANDS:
        help_of(name)
        return None
    places = POSITIONAL.get(name, ())
    of_files = [after for word, after in itertools.pairwise(rest) if word == "--config"]
    alone = [word for word in rest if "=" not in word and not word.startswith("--") and word not in of_files]
    given = [word for word in rest if word not in alone] + [f"{key}={word}" for key, word in zip(places, alone, strict=False)]
    try:
        return load_config(COMMANDS[name].schema(), given)
    except UserError as error:
        missing = re.fullmatch(r"(.*) must be given", error.what)
        if missing is None or complete:
            raise
        return load_config(COMMANDS[name].schema(), [*given, *(f"{key}=x" for key in missing[1].split(" and "))])


def check(words: list[str], *, complete: bool) -> None:
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets, f"no target {words[1]}"
    elif found := verl_words(words):
        read(*found, complete=complete)
    else:
        assert not [word for word in words if re.search(r"(^|/)examples/", word) and not (ROOT / word.lstrip("./")).exists()]


def mistake(words: list[str], *, complete: bool) -> str | None:
    """What is wrong with a command; None if nothing is."""
    try:
        check(words, complete=complete)
    except (UserError, AssertionError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_read(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    failed = {" ".join(words): said for words in commands(text_of(page)) if (said := mistake(words, complete=page in COMPLETE))}
    assert failed == {}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("python -m verl.trainer.fsdp_sft_trainer \\\n  data.train_file=a.jsonl", r"unknown key 'data\.train_file'"),
        ("verl sft --gpu 4 data.train_files=a.jsonl", "no option --gpu"),
        ("verl sfft data.train_files=a.jsonl", "no such command"),
        ("HF_HOME=x verl sft optim.lr=fast", "is not a number"),
        ("torchrun --nproc_per_node=2 -m verl.trainer.sft_trainer a=1", "is not the module of a command"),
        ("verl chat", "model_path must be given"),
        ("make everything", "no target everything"),
        ("examples/sft/gone.sh optim.lr=1", "gone.sh"),
    ],
)
def test_a_command_with_a_mistake_would_be_noticed(line: str, said: str) -> None:
    (words,) = commands(f"```bash\n{line}\n```\n")
    assert re.search(said, mistake(words, complete=True) or "nothing")


def test_the_pages_have_commands() -> None:
    assert sum(len(commands(text_of(page))) for page in PAGES) > 100
    assert all(commands(text_of(page)) for page in COMPLETE)


def test_some_page_names_every_example_script() -> None:
    scripts = {path for kind in ("sft/*.sh", "ppo/*.sh", "slurm/*.sbatch") for path in (ROOT / "examples").glob(kind)}
    assert len(scripts) >= 11
    assert scripts - {link.path.resolve() for page in PAGES for link in links(page)} == set()


@pytest.mark.parametrize("name", ["qwen25_05b_one_gpu.sh", "qwen25_05b_four_gpus.sh"])
def test_a_script_of_the_small_model_is_the_command_of_the_page(name: str) -> None:
    script = (ROOT / "examples" / "sft" / name).read_text(encoding="utf-8")
    (words,) = (words for words in commands(f"```bash\n{script}```") if "-m" in words)
    assert words[-1] == "$@"
    assert sorted(words[:-1]) in [sorted(command) for command in commands(text_of("docs/start.md"))]


# Links


def broken(found: list[Link]) -> list[str]:
    """The targets that are no file, or no heading of their page; pages that are awaited may be missing."""
    awaited = {ROOT / name for name in make_site.AWAITED}
    lost = []
    for link in found:
        if not link.path.exists():
            lost += [] if link.path.resolve() in awaited else [link.target]
        elif link.anchor and link.anchor not in anchors(link.path.read_text(encoding="utf-8")):
            lost.append(link.target)
    return lost


@pytest.mark.parametrize("page", [*PAGES, *OTHERS])
def test_links_anchors_and_named_files_exist(page: str) -> None:
    named = re.findall(r"`((?:verl|docs|examples|configs|tests)/[\w./-]+\.\w+)`", text_of(page))
    assert broken(links(page)) == []
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_a_dead_link_and_a_dead_anchor_are_noticed() -> None:
    targets = ["gone.md", "data.md#files", "data.md#gone", "#three-steps"]
    assert broken([Link("docs/start.md", target) for target in targets]) == ["gone.md", "data.md#gone"]


def test_an_anchor_is_the_heading_in_lower_case_without_punctuation() -> None:
    assert anchors("# `verl sft`, and more: 1.5B\n\n```\n# no heading\n```\n\n## 三步开始\n") == {"verl-sft-and-more-15b", "三步开始"}


def test_every_page_is_in_the_navigation() -> None:
    places = re.findall(r": ([\w./-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(places) == len(set(places))
    assert set(places) - set(make_site.AWAITED) == {*PAGES, *OTHERS} - set(make_site.AWAITED)


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    pytest.importorskip("zensical", reason="needs the extra docs")
    folder = tmp_path_factory.mktemp("site") / "build"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_site, "BUILD", folder)
        with pytest.raises(SystemExit) as ended:
            make_site.main()
    assert ended.value.code == 0, "a link or an anchor is dead, or something else was warned of"
    return folder / "html"


def test_the_site_has_all_pages_and_asks_no_other_host(site: Path) -> None:
    fetched = re.compile(r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?https?:|<link\b[^>]*\bhref=["']?https?:""")
    written = list(site.rglob("*.html"))
    assert len(written) > len(PAGES) + len(OTHERS)
    assert [str(path) for path in written if fetched.search(path.read_text(encoding="utf-8"))] == []
    assert (site / "docs" / "pictures" / "run.svg").is_file()
    found = (site / "search.js").read_text(encoding="utf-8")
    assert "data.truncation" in found and "显存" in found and "def score_group" not in found


def test_a_page_from_a_folder_is_searched_in_english_and_chinese(site: Path) -> None:
    """Without a server and a network, in a browser, at the width of a phone, too."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    noted: list[str] = []
    with sync_api.sync_playwright() as started, started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser:
        for width, words in ((1280, "lora_alpha"), (390, "显存不足")):
            tab = browser.new_page(viewport={"width": width, "height": 800})
            tab.on("console", lambda message: noted.append(message.text))
            tab.on("pageerror", lambda error: noted.append(str(error)))
            tab.on("request", lambda request: noted.append(request.url) if request.url.startswith("http") else None)
            tab.goto((site / "index.html").as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            tab.keyboard.press("Control+k")
            tab.get_by_placeholder("Search").last.fill(words)
            tab.get_by_text(re.compile(r"^[1-9]\d* results?$")).wait_for(timeout=20_000)
    assert noted == []


# What a page says of the code


GROUPS = "data|model|optim|trainer|algorithm|rollout|reward|reward_model|critic|mapping|dist"
KEY = re.compile(rf"\b((?:{GROUPS})(?:\.\w+)+)(?![\w/]|\.\w)")


def keys_in(cell: str) -> list[str]:
    """The keys that the backticks of a table's cell name, without their values."""
    return KEY.findall(" ".join(re.findall(r"`([^`]+)`", cell)))


@cache
def known_keys() -> frozenset[str]:
    page = text_of("docs/keys.md")
    return frozenset(re.findall(r"^\| `([\w.]+)` \|", page.partition("## Other spellings")[0], re.MULTILINE)) | set(ALIASES)


MIGRATIONS = tables(text_of("docs/migrating.md"))


@pytest.mark.parametrize("table", MIGRATIONS, ids=lambda table: table[0][0])
def test_every_key_that_takes_another_ones_place_exists(table: list[list[str]]) -> None:
    assert table[0][1].startswith("here") and all(len(row) == 2 for row in table)
    assert [key for _, ours in table[1:] for key in keys_in(ours) if key not in known_keys()] == []


def test_every_value_that_takes_another_ones_place_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`key=value` in the last columns: some command reads it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "file.py").write_text("def score(prompt: str, response: str, row: dict) -> float:\n    return 1.0\n")
    given = [quoted for table in MIGRATIONS for _, ours in table[1:] for quoted in re.findall(r"`([^`]+)`", ours)]
    pairs = [re.split(r" (?=\w+\.\w+[\w.]*=)", words) for words in given if re.match(r"\w+\.[\w.]+=", words)]
    assert len(pairs) > 20
    assert [words for words in pairs if not any(is_taken(name, words) for name in ("sft", "ppo", "reward"))] == []


# What a value needs beside it.
BESIDE = {
    "trainer.best_metric": "data.val_files=x",
    "model.load_in_4bit": "model.lora_rank=8",
    "algorithm.kl_target": "algorithm.kl_coef=1",
}


def is_taken(name: str, words: list[str]) -> bool:
    beside = [other for key, other in BESIDE.items() if words[0].startswith(key)]
    try:
        load_config(COMMANDS[name].schema(), ["data.train_files=x", "model.partial_pretrain=x", *beside, *words])
    except UserError:
        return False
    return True


def test_a_key_that_is_gone_is_noticed() -> None:
    assert keys_in("`optim.lr`, `data.train_files=org/name:config`, or `reward.name=path/to/file.py` and data.prompt_key") == [
        "optim.lr",
        "data.train_files",
        "reward.name",
    ]
    assert "optim.learning_rate" not in known_keys() and "algorithm.lam" in known_keys()
    assert not is_taken("sft", ["optim.lr=fast"])


HOLE = "\0"


@cache
def messages() -> frozenset[str]:
    """The texts of the code, with a hole in the place of each value: what it may say in an error."""
    texts = set()
    for path in (ROOT / "verl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts.add("".join(part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else HOLE for part in parts))
    return frozenset(text for text in texts if len(text.replace(HOLE, "")) >= 8 and " " in text)  # the name of a key is no message


def reach(text: str, line: str) -> int:
    """How much of the line's beginning is the text, with anything in its holes; 0 if it begins otherwise."""
    first, *others = text.split(HOLE)
    if not line.startswith(first):
        return 0
    place = len(first)
    for part in others:
        found = line.find(part, place)
        if found < 0:
            return 0
        place = found + len(part) if part else len(line)
    return place


def said(line: str) -> bool:
    """Whether the line, or what follows a colon in it, begins with one of the code's texts that is most of it."""
    ends = [line[match.end() :] for match in re.finditer(r"^|: ", line)]
    return any(reach(text, end) > 0.5 * len(end) for end in ends for text in messages())


ERRORS = [line for block in blocks(text_of("docs/errors.md"), "") for line in block.splitlines() if line.startswith(("error: ", "  fix: "))]


@pytest.mark.parametrize("line", ERRORS)
def test_every_error_of_the_page_is_one_that_the_code_raises(line: str) -> None:
    assert said(line.partition(": ")[2])


def test_an_error_that_the_code_does_not_raise_is_noticed() -> None:
    assert len(ERRORS) > 50
    assert said("optim.lr: 'abc' is not a number")
    assert not said("model.partial_pretrain should be given")
    assert not said("optim.lr: this value is far too large") and not said("the learning rate explodes")


def test_every_figure_of_the_readme_is_a_measured_one() -> None:
    measured = text_of("benchmarks/README.md")
    for page in FRONT:
        (table,) = (table for table in tables(text_of(page)) if table[0][1:3] == ["verl", "TRL"])
        figures = [figure for row in table[1:] for cell in row[1:3] for figure in re.findall(r"\d[\d,.]*", cell)]
        assert len(figures) >= 15
        assert [figure for figure in figures if figure not in measured] == []


# Questions that users of other trainers ask, in their words: a section of the page has all of the words.

ANSWERS = {
    "the model never stops; EOS; endless generation": ("docs/faq.md", "never stops|endless generation|eos|stop token|trained"),
    "Qwen2.5 Base never stops; <|im_end|> with LoRA; generation_config": (
        "docs/lora.md",
        "base model|<|im_end|>|generation_config.json|eos_token_id",
    ),
    "the merged LoRA directory equals the base; lora_alpha 0": ("docs/faq.md", "merged|same as the base|byte-identical|lora_alpha"),
    "is the loss mask right": ("docs/faq.md", "which tokens are trained|mask|first row"),
    "gradient accumulation, normalised by tokens": ("docs/faq.md", "gradient accumulation|trained tokens|divided once"),
    "resume: learning rate, step, data": ("docs/faq.md", "resume|learning rate|step|rows"),
    "resume on a different number of GPUs": ("docs/larger.md", "resumes on another number of gpus"),
    "hang or NCCL timeout while saving at the end": ("docs/faq.md", "nccl|timeout|hangs while saving|watchdog"),
    "multi-turn Qwen3, thinking, tokenised per turn": ("docs/faq.md", "qwen3|template|turn"),
    "the template lacks {% generation %}": ("docs/faq.md", "{% generation %}|assistant"),
    "packing contaminates across samples": ("docs/faq.md", "packed rows|contaminate|attention|each other"),
    "why only Parquet": ("docs/faq.md", "parquet only|jsonl|csv"),
    "KeyError of a column": ("docs/errors.md", "keyerror|column|data.prompt_key"),
    "a row is too long: drop and count": ("docs/errors.md", "longer than data.max_length|dropped|counted"),
    "validation drops the tail, or is NaN": ("docs/faq.md", "validation|nan|every row"),
    "best checkpoint on validation": ("docs/faq.md", "best checkpoint|trainer.best_metric"),
    "accuracy while fine-tuning": ("docs/faq.md", "accuracy|exact match|generated"),
    "logits of a vocabulary of 152k run out of memory": ("docs/larger.md", "logits|152k|vocabulary|memory|liger"),
    "merging with tied embeddings": ("docs/faq.md", "merging|tied embeddings|tie_word_embeddings"),
    "vLLM gives another quality; template mismatch": ("docs/faq.md", "lower in vllm|template|system prompt|stop token"),
    "flash-attn is hard to install; T4 and V100": ("docs/larger.md", "flashattention|v100|t4|installed"),
    "prompt_key as list or text": ("docs/faq.md", "data.prompt_key|not a list"),
    "resume skips training when the data or epochs changed": ("docs/faq.md", "resume|epochs|does nothing|skipping|rows"),
    "what does a key mean": ("docs/faq.md", "what does a key mean|--help|default"),
    "a corrupt sample aborts the run": ("docs/faq.md", "broken|row|stops|file and line"),
}


def sections(text: str) -> list[str]:
    return re.split(r"^(?=#{1,3} )", text, flags=re.MULTILINE)


@pytest.mark.parametrize("question", ANSWERS)
def test_a_complaint_has_its_answer_in_one_section(question: str) -> None:
    page, words = ANSWERS[question]
    parts = [re.sub(r"\s+", " ", part.lower()) for part in sections(text_of(page))]
    assert any(all(word in part for word in words.split("|")) for part in parts)
    assert len(ANSWERS) == 25


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/zh/") or page.endswith("zh-CN.md")])
def test_a_page_in_chinese_is_in_chinese(page: str) -> None:
    prose = without_code(text_of(page))
    chinese = len(re.findall(r"[\u4e00-\u9fff]", prose))
    assert chinese > 300 and chinese > len(re.findall(r"[A-Za-z]", re.sub(r"\]\([^)]*\)", "", prose))) * 0.8
