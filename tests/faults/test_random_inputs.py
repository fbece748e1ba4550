"""Random rows, bytes, chats, settings, YAML and answers: each gives a value or a UserError, never another exception.

`make test` tries 300 examples, `make faults` more than 20,000, in shares that processes take one by one.
"""

import io
import json
import math
import pickle
import string
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from faults.table import TRIED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tiny import write_problems_and_model

from verl.config.commands import ChatConfig, DemoConfig, EvalConfig, ExportConfig
from verl.config.load import load_config, to_yaml
from verl.config.pairs import RewardTrainerConfig
from verl.config.plugin_settings import _walk
from verl.config.ppo import PPOConfig
from verl.config.sft import SFTConfig
from verl.data.chat import ChatInput
from verl.data.formats.files import file_rows
from verl.data.render import Rendered, Renderer
from verl.data.row import ReadProgress, Row, checked_row
from verl.data.shapes import read_question
from verl.data.source import resolve_entries
from verl.data.tables import Columns
from verl.errors import UserError
from verl.models.load import load_tokenizer
from verl.rewards import gsm8k
from verl.rewards import math as math_reward

Property = Callable[[Any], None]
Holds = Callable[[st.SearchStrategy[Any], Property, int], None]
SHARES, OF_SHARE = 4, 725
EXAMPLES = [
    pytest.param(43, id="some"),
    *(pytest.param(OF_SHARE, id=f"many-{share}", marks=[pytest.mark.faults, pytest.mark.timeout(600)]) for share in range(1, SHARES + 1)),
]


@pytest.fixture
def holds(record_property: Callable[[str, object], None]) -> Holds:
    """Try a property on so many values. A UserError is an answer; any other exception is the test's failure."""

    def try_all(values: st.SearchStrategy[Any], check: Property, examples: int) -> None:
        tried = [0]
        try_values(values, check, examples, tried)
        record_property(TRIED, tried[0])
        assert tried[0] >= examples or examples < 100

    return try_all


def try_values(values: st.SearchStrategy[Any], check: Property, examples: int, count: list[int]) -> None:
    @settings(max_examples=examples, deadline=None, database=None, derandomize=examples < 100, suppress_health_check=list(HealthCheck))
    @given(values)
    def tried(value: Any) -> None:
        count[0] += 1
        with suppress(UserError):
            check(value)

    tried()


# Values

TEXT = st.one_of(
    st.text(max_size=20),
    st.text('[]{}":,\\ntfu0123e+-. \x00\ud800\u2028', max_size=20).filter(bool),
    st.sampled_from(
        ["", " ", "null", "NaN", "1e999", "[", "{}", "<|im_end|>", "\0", "\ud800", "#### 4", "yes", "${a}", "${oc.env:HOME}", "~"]
    ),
)
NUMBERS = st.one_of(st.integers(), st.integers(-(2**80), 2**80), st.floats(), st.booleans(), st.none())
JSON = st.recursive(
    st.one_of(TEXT, NUMBERS), lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)), max_leaves=12
)
ROLES = st.one_of(st.sampled_from(["system", "user", "assistant", "tool", "human", "gpt", "function_call", "developer"]), JSON)
PARTS = st.lists(
    st.one_of(
        TEXT, st.fixed_dictionaries({"type": st.one_of(st.sampled_from(["text", "thinking", "image"]), JSON)}, optional={"text": JSON})
    ),
    max_size=3,
)
CALLS = st.one_of(
    JSON,
    st.lists(
        st.one_of(JSON, st.fixed_dictionaries({"name": JSON, "arguments": JSON}), st.fixed_dictionaries({"function": JSON})), max_size=3
    ),
)
MESSAGES = st.one_of(
    JSON,
    st.fixed_dictionaries(
        {},
        optional={
            "role": ROLES,
            "from": ROLES,
            "content": st.one_of(TEXT, PARTS, JSON),
            "value": st.one_of(TEXT, JSON),
            "tool_calls": CALLS,
            "function_call": CALLS,
            "weight": JSON,
            "reasoning_content": JSON,
        },
    ),
)
CHATS = st.one_of(st.lists(MESSAGES, max_size=5), JSON)
COLUMNS = (
    "question answer prompt response messages conversations text tools system chat_template_kwargs extra instruction input output history "
    "completion label chosen rejected reward_model"
).split()


def as_json(value: Any) -> str:
    return json.dumps(value)


ROWS = st.dictionaries(
    st.one_of(st.sampled_from(COLUMNS), TEXT), st.one_of(JSON, TEXT, CHATS, CHATS.map(as_json), JSON.map(as_json)), max_size=5
)


# Files

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".gz", ".jsonl.gz", ".xyz")
MAGIC = st.sampled_from(
    [b"", b"PAR1", b"ARROW1\0\0", b"\x1f\x8b\x08\0", b"\xef\xbb\xbf", b"\xff\xfe", b"[", b"{", b"question,answer\n", b"\0"]
)
BYTES = st.one_of(
    st.binary(max_size=200),
    st.lists(ROWS, max_size=4).map(lambda rows: "\n".join(map(as_json, rows)).encode()),
    st.lists(ROWS, max_size=4).map(lambda rows: as_json(rows).encode()),
    st.text('ab",;\n\r\t|', max_size=80).map(lambda text: text.encode()),
)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_bytes_are_rows_or_an_error(holds: Holds, tmp_path: Path, examples: int) -> None:
    def check(given: tuple[str, bytes, bytes, int]) -> None:
        suffix, magic, body, less = given
        path = tmp_path / f"rows{suffix}"
        path.write_bytes((magic + body)[: len(magic + body) - less or None])
        for row in file_rows(path, ReadProgress()):
            assert isinstance(row, Row | UserError)

    holds(st.tuples(st.sampled_from(SUFFIXES), MAGIC, BYTES, st.integers(0, 3)), check, examples)


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(load_tokenizer(str(write_problems_and_model(tmp_path_factory.mktemp("random")) / "model")))


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_row_is_tokenized_or_an_error(holds: Holds, renderer: Renderer, examples: int) -> None:
    plain = Columns("question", "answer", None, None, None)
    readers = [
        plain,
        Columns("prompt", "extra.answer", None, "tools", None),
        Columns("question", "answer", "messages", None, None, "extra"),
    ]
    readers.append(Columns("question", "answer", None, None, "text"))

    def check(given: tuple[dict[str, Any], Columns]) -> None:
        values, columns = given
        row = checked_row("rows.jsonl:1", values)
        inputs = columns.read(row)
        chats = [value for value in inputs if isinstance(value, ChatInput)]
        for result in [*renderer.chats(chats), *renderer.texts([value for value in inputs if isinstance(value, str)])]:
            assert isinstance(result, Rendered | UserError)
        asked = read_question(row, plain, None)
        assert renderer.prompt(asked.messages, asked.tools, asked.template_kwargs)

    holds(st.tuples(ROWS, st.sampled_from(readers)), check, examples)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_chat_is_tokenized_or_an_error(holds: Holds, renderer: Renderer, examples: int) -> None:
    def check(given: tuple[Any, Any, Any, str]) -> None:
        messages, tools, kwargs, turns = given
        row = checked_row("rows.jsonl:1", {"messages": messages, "tools": tools, "kwargs": kwargs})
        chat = ChatInput(row.values.get("messages"), row.values.get("tools"), 0, "", row.values.get("kwargs"), turns)
        for result in renderer.chats([chat]):
            assert isinstance(result, Rendered | UserError)

    values = st.one_of(CHATS, CHATS.map(as_json))
    holds(st.tuples(values, st.one_of(st.none(), JSON), st.one_of(st.none(), JSON), st.sampled_from(["all", "last"])), check, examples)


# Settings

NEEDED: dict[type, list[str]] = {
    SFTConfig: ["data.train_files=a.jsonl", "model.partial_pretrain=m"],
    RewardTrainerConfig: ["data.train_files=a.jsonl", "model.partial_pretrain=m"],
    PPOConfig: ["data.train_files=a.jsonl", "model.partial_pretrain=m"],
    EvalConfig: ["model_path=m", "test_file=a.jsonl", "output_dir=o"],
    ChatConfig: ["model_path=m"],
    ExportConfig: ["source=m", "directory=o"],
    DemoConfig: [],
}


def keys_of(config: Any, prefix: str = "") -> list[str]:
    found: list[str] = []
    for field in fields(config):
        value = getattr(config, field.name)
        found += keys_of(value, f"{prefix}{field.name}.") if is_dataclass(value) else [f"{prefix}{field.name}"]
    return found


KEYS = {schema: keys_of(schema()) for schema in NEEDED}
ITEMS = st.lists(st.one_of(st.integers(-2, 9), st.sampled_from(["a", "${trainer.seed}", "${", "yes"])), max_size=3)
ODD_WORDS = "${trainer.seed} [${trainer.seed}] [[a]] {a:{b:1}} !!binary=aGk= &a=[*a] 1_0 .inf [yes] ' \"".split()
WORDS = st.one_of(
    TEXT.filter(lambda text: "\n" not in text),
    NUMBERS.map(str),
    JSON.map(as_json),
    ITEMS.map(lambda items: f"[{','.join(map(str, items))}]"),
    st.sampled_from(ODD_WORDS),
)


@st.composite
def assignments(draw: st.DrawFn) -> tuple[type, list[str]]:
    schema = draw(st.sampled_from(list(NEEDED)))
    keys = st.one_of(
        st.sampled_from(KEYS[schema]),
        st.sampled_from(KEYS[schema]).map(lambda key: key[:-1]),
        st.text(string.ascii_lowercase + "._", max_size=12),
    )
    return schema, [f"{draw(keys)}={draw(WORDS)}" for _ in range(draw(st.integers(1, 3)))]


@pytest.fixture
def schemas_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A schema is made a config once, and copied from then on: it is most of the time of reading some words, and the same for all."""
    made: dict[object, tuple[bytes, list[type]]] = {}
    make = OmegaConf.structured

    def structured(config: Any) -> Any:
        key = (type(config), *(type(keys) for _, keys in _walk(config)), repr(config))
        if key not in made and len(made) < 1000:
            made[key] = pickled(make(config))
        return unpickled(*made[key]) if key in made else make(config)

    monkeypatch.setattr("verl.config.load.OmegaConf.structured", structured)


def pickled(value: object) -> tuple[bytes, list[type]]:
    """A value's bytes, with the classes beside them: a plugin's are made while the program runs, and have no name to find them by."""
    kinds: list[type] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> int | None:
            if not isinstance(value, type):
                return None
            kinds.append(value)
            return len(kinds) - 1

    buffer = io.BytesIO()
    Pickler(buffer).dump(value)
    return buffer.getvalue(), kinds


def unpickled(content: bytes, kinds: list[type]) -> Any:
    class Unpickler(pickle.Unpickler):
        def persistent_load(self, number: int) -> type:
            return kinds[number]

    return Unpickler(io.BytesIO(content)).load()


def read_back(schema: type, config: Any, tmp_path: Path) -> None:
    """What a run writes of its settings reads back as itself."""
    path = tmp_path / "written.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert repr(load_config(schema, [f"--config={path}"])) == repr(config)


@pytest.mark.usefixtures("schemas_once")
@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_words_are_settings_or_an_error(holds: Holds, tmp_path: Path, examples: int) -> None:
    def check(given: tuple[type, list[str]]) -> None:
        schema, words = given
        words = [word for word in words if not word.startswith(("--", "-h"))]
        read_back(schema, load_config(schema, [*NEEDED[schema], *words]), tmp_path)

    holds(assignments(), check, examples)


TREES = st.recursive(
    st.one_of(TEXT, NUMBERS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.one_of(TEXT, NUMBERS), inner, max_size=3)),
    max_leaves=8,
)


@st.composite
def config_files(draw: st.DrawFn) -> str:
    kind = draw(st.integers(0, 2))
    if kind == 0:
        return draw(st.text("abk:-[]{}&*!?|>#%@`'\" \n\t<~0", max_size=60))
    tree = draw(TREES)
    if kind == 1:
        group, key = draw(st.sampled_from(KEYS[SFTConfig])).rsplit(".", 1)
        tree = {group.split(".")[0]: {key: tree}}
    try:
        return str(yaml.safe_dump(tree, allow_unicode=True, default_flow_style=draw(st.booleans())))
    except (UnicodeError, yaml.YAMLError):
        return "a"


@pytest.mark.usefixtures("schemas_once")
@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_yaml_is_settings_or_an_error(holds: Holds, tmp_path: Path, examples: int) -> None:
    path = tmp_path / "config.yaml"

    def check(text: str) -> None:
        path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
        read_back(SFTConfig, load_config(SFTConfig, [*NEEDED[SFTConfig], f"--config={path}"]), tmp_path)

    holds(config_files(), check, examples)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_name_of_a_file_is_a_file_or_an_error(holds: Holds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examples: int) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"question": "x", "answer": "y"}\n')
    names = st.one_of(JSON, st.text("a./*?[]~\0:,", max_size=8), st.lists(st.one_of(JSON, st.just("a.jsonl")), max_size=3))
    # A name such as `org/data` is asked of the Hub, where the network would decide.
    holds(
        names.filter(lambda name: not (isinstance(name, str) and name.count("/") == 1)),
        lambda name: (resolve_entries(name), None)[1],
        examples,
    )


# Graders

PIECES = "#### |\\boxed{|}|1/0|1e999|0x|٣|½|10^|99999|-|$|%|(|[|\\frac{|∞|12:60".split("|")
ANSWERS = st.one_of(
    TEXT,
    st.text("0123456789.,-+/%$\\ {}boxed frac#()[]=^_", max_size=40),
    st.lists(st.sampled_from(PIECES), max_size=6).map("".join),
)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_any_answer_is_graded_or_an_error(holds: Holds, examples: int) -> None:
    def check(given: tuple[str, str]) -> None:
        response, reference = given
        for method in ("strict", "flexible"):
            assert isinstance(gsm8k.exact_match(response, reference, method), bool)
            assert isinstance(gsm8k.extract_answer(response, method), str | None)
        assert math.isfinite(gsm8k.score("q", response, {"reference": reference}))
        assert isinstance(gsm8k.reference_answer(reference), str | None)
        assert isinstance(math_reward.extract_answer(response), str | None)

    holds(st.tuples(ANSWERS, ANSWERS), check, examples)
