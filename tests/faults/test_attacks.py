"""The catalogue of attacks. Each has a canary: a file that would be written, a text that must not appear, or a limit of time and memory."""

import gzip
import http.server
import json
import os
import pickle
import signal
import stat
import subprocess
import sys
import threading
import time
import tracemalloc
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pytest
import torch
import yaml
from pyarrow import parquet as pq
from tiny import write_problems_and_model
from transformers import PreTrainedConfig

import verl
from verl import durable, safe_path
from verl.config.load import load_config, to_yaml
from verl.config.sft import SFTConfig
from verl.data import cache, globs, template_limits
from verl.data.documents import load_documents
from verl.data.formats import stream
from verl.data.source import read_rows, resolve_files
from verl.data.tables import Columns
from verl.data.template_limits import limit
from verl.directory import FILES, Claimed, begin_files, claim, is_continued, recorded_settings, settings_beside
from verl.errors import UserError, exit_on_user_error
from verl.lock import held
from verl.machine import machine_errors_named
from verl.manifest import steps_in
from verl.models.damage import check_model_files
from verl.models.foreign import newest_step
from verl.models.identity import content_of
from verl.models.kind import kind_of
from verl.models.load import load_language_model, load_tokenizer, outline, resolve
from verl.redaction import is_secret_name, redact, redact_text
from verl.rollout._http import RefusedError, Server
from verl.rollout._weights_folder import remove_abandoned, weights_folder

SECRET = "canary-5f1c"
GIVEN = ["data.train_files=train.jsonl", "model.partial_pretrain=model"]
SECONDS = 20.0  # of a thing that must not go on forever


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", SECRET)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_problems_and_model(tmp_path_factory.mktemp("attacks"), 40, 10)


# Secrets of the environment

RESOLVERS = [
    "trainer.experiment_name=${oc.env:CANARY}",
    "trainer.experiment_name=a-${oc.env:CANARY}",
    "trainer.experiment_name=${ oc.env : CANARY }",
    "trainer.experiment_name=${${trainer.project_name}:CANARY}",
    "trainer.experiment_name=${trainer.${oc.env:CANARY}}",
    "trainer.experiment_name=${oc.decode:${oc.env:CANARY}}",
    "trainer.experiment_name=${oc.create:{a: 1}}",
    r"trainer.experiment_name=\\${oc.env:CANARY}",
    "data.train_files=['${oc.env:CANARY}']",
    "data.train_files=[{path: '${oc.env:CANARY}', weight: 1}]",
    "data.train_files=[[['${oc.env:CANARY}']]]",
    "data.chat_template_kwargs={a: {b: ['${oc.env:CANARY}']}}",
    "data.chat_template_kwargs={'${oc.env:CANARY}': 1}",
    "data.chat_template_kwargs.a=${oc.env:CANARY}",
    "data.chat_template_kwargs.${oc.env:CANARY}=1",
    "trainer.logger=['${oc.env:CANARY}']",
]


@pytest.mark.parametrize("argument", RESOLVERS)
def test_no_resolver_is_run_at_any_depth(argument: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(SFTConfig, [*GIVEN, argument])
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("argument", RESOLVERS[:3])
def test_no_resolver_of_a_file_is_run(argument: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"trainer:\n  experiment_name: '{argument.partition('=')[2]}'\n")
    with pytest.raises(UserError):
        load_config(SFTConfig, [*GIVEN, "--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize("key", ["${", "a${b}", "\\${a", "\\\\${", "", "a"])
def test_a_key_with_the_beginning_of_an_interpolation_stays_as_it_is_in_config_yaml(key: str, tmp_path: Path) -> None:
    path, written = tmp_path / "given.yaml", tmp_path / "written.yaml"
    path.write_text(yaml.safe_dump({"data": {"train_files": "a", "val_files": [{key: "b"}]}, "model": {"partial_pretrain": "m"}}))
    config = load_config(SFTConfig, [f"--config={path}"])
    written.write_text(to_yaml(config))
    assert load_config(SFTConfig, [f"--config={written}"]).data.val_files == config.data.val_files == [{key: "b"}]


def test_an_escaped_resolver_is_text_and_stays_text_in_config_yaml(tmp_path: Path) -> None:
    config = load_config(SFTConfig, [*GIVEN, r"trainer.experiment_name=\${oc.env:CANARY}"])
    assert config.trainer.experiment_name == "${oc.env:CANARY}" and SECRET not in to_yaml(config)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(SFTConfig, ["--config", str(tmp_path / "config.yaml")]) == config


def test_an_interpolation_of_a_key_works_and_a_colon_behind_it_is_text() -> None:
    config = load_config(SFTConfig, [*GIVEN, "trainer.experiment_name=${trainer.project_name}: a"])
    assert config.trainer.experiment_name == f"{config.trainer.project_name}: a"


# Secrets in what is written

SECRETS = [
    "hf_abcdefghijklmnopqrstuvwxyz",
    "sk-proj-abcdefghijklmnop1234",
    "sk-ant-api03-abcdefghijklmnop",
    "xoxb-123456789012-abcdefghij",
    "xoxp-123456789012-abcdefghij",
    "glpat-abcdefghijklmnopqrst",
    "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "github_pat_11ABCDEFG0123456789",
    "AKIAIOSFODNN7EXAMPLE",
    "ASIAIOSFODNN7EXAMPLE",
    "AIzaSyA-abcdefghijklmnopqrstuvwxyz12345",
    "ya29.abcdefghijklmnopqrstuv",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.SflKxwRJSMeKKF2QT4",
    "sk_live_abcdefghijklmnop1234",
    "SG.abcdefghijklmnopqrst.abcdefghijklmnopqrst",
]
LINES = [  # a line, and what it must not show
    ("Authorization: Bearer abcdefgh12345678", "abcdefgh12345678"),
    ("http://user:pa55word@host:8000/v1", "pa55word"),
    ("postgres://admin:p%40ss@db/x", "p%40ss"),
    ("https://host/x?token=abc123&y=1", "abc123"),
    ("reward.settings.pwd=hunter2", "hunter2"),
    ("db_passw='hunter2 and more'", "hunter2"),
    ('{"client_secret": "hunter2"}', "hunter2"),
    ("api_key=hunter2", "hunter2"),
    ("HF_TOKEN=hunter2", "hunter2"),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIEabc\n-----END RSA PRIVATE KEY-----", "MIIEabc"),
    ("-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1", "b3BlbnNzaC1"),
]
NO_SECRETS = [
    *("data.max_tokens_per_micro_batch=4096", "pad_token='<pad>'", "num_tokens=512", "data.prompt_key=question", "stop_token=<|im_end|>"),
    *(
        "the tokenizer has no pad token: eos is used",
        "1,234 tokens/s",
        "reward.secrets=[MY_API_KEY]",
        "key: 'a' is missing",
        "optim.lr=1e-5",
    ),
    *("http://localhost:8000", "a basic understanding of it", "task-specific answers", "risk-averse-investors-and-others", "token=5"),
]
NAMES = [
    "password",
    "db_passwd",
    "pwd",
    "api_key",
    "apiKey",
    "HF_TOKEN",
    "wandb.token",
    "clientSecret",
    "private_key",
    "ssh_key",
    "credentials",
]
OTHER_NAMES = [
    "pad_token",
    "num_tokens",
    "max_new_tokens",
    "prompt_key",
    "messages_key",
    "data.tools_key",
    "eos_token_id",
    "stop_tokens",
    "keys",
]


@pytest.mark.parametrize("text", SECRETS)
def test_a_key_of_a_service_is_hidden_under_any_name(text: str) -> None:
    assert text not in redact_text(f"the server says: {text} is not valid")
    assert redact({"a": [{"b": text}]}) == {"a": [{"b": "[hidden]"}]}


@pytest.mark.parametrize(("line", "hidden"), LINES)
def test_a_secret_in_a_line_is_hidden(line: str, hidden: str) -> None:
    assert hidden not in redact_text(line) and "[hidden]" in redact_text(line)


@pytest.mark.parametrize("line", NO_SECRETS)
def test_what_is_no_secret_is_shown(line: str) -> None:
    assert redact_text(line) == line


REPEATED = ["a", "eyJ", "-eyJ", "a.", "a-", "1", "key=", ":", "-----BEGIN", "Bearer ", "sk-", "https://", "a:a@", "?", "?key", "a='", "SG."]


@pytest.mark.parametrize("part", REPEATED)
def test_a_text_that_repeats_is_redacted_in_time(part: str) -> None:
    since = time.process_time()
    redact_text((part * 10**6)[: 10**6])
    assert time.process_time() - since < 2


def test_a_secret_behind_what_only_starts_like_one_is_hidden() -> None:
    for text in (
        "-eyJaaaaaaaaaa-sk-hunter2hunter2",
        "--api_key=hunter2",
        "?a=1?token=hunter2",
        "eyJeyJeyJeyJ token=hunter2",
        "??&token=hunter2",
    ):
        assert "hunter2" not in redact_text(text)


def test_names_of_secrets_are_known_and_others_are_not() -> None:
    assert [name for name in NAMES if not is_secret_name(name)] == []
    assert [name for name in OTHER_NAMES if is_secret_name(name)] == []


def test_config_yaml_has_no_secret_and_says_so_when_it_is_read(tmp_path: Path) -> None:
    text = to_yaml(load_config(SFTConfig, [*GIVEN, f"data.chat_template_kwargs={{api_key: {SECRET}, system: 'key {SECRETS[0]}'}}"]))
    assert SECRET not in text and SECRETS[0] not in text
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="give it again"):
        load_config(SFTConfig, ["--config", str(tmp_path / "config.yaml")])


def test_an_error_hides_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    from verl.errors import print_error

    print_error(UserError("cannot be reached", where="http://me:hunter2@host"))
    assert "hunter2" not in capsys.readouterr().err


def test_wandb_sees_no_secret_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.loggers._fallback import arguments_redacted

    monkeypatch.setattr(sys, "argv", ["verl", "reward.settings.api_key=hunter2", SECRETS[0]])
    with arguments_redacted():
        assert sys.argv == ["verl", "reward.settings.api_key=[hidden]", "[hidden]"]
    assert sys.argv[1].endswith("hunter2")


def test_workers_get_no_secret_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.config.workers import WorkersConfig
    from verl.workers.pool import environment

    monkeypatch.setenv("MY_SETTING", SECRETS[3])
    monkeypatch.setenv("GITLAB_TOKEN", "x")
    kept, _ = environment(WorkersConfig())
    assert {"MY_SETTING", "GITLAB_TOKEN"}.isdisjoint(kept)


# Bombs in data


def _gz(path: Path, start: bytes, block: bytes, times: int) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(start)
        for _ in range(times):
            file.write(block)


SMALL = 2**17  # of blank lines; those of JSONL reach the limit that there is
BOMBS: dict[str, Callable[[Path], object]] = {
    "bomb.parquet": lambda path: pq.write_table(pa.table({"question": ["a" * 70_000_000], "answer": ["b"]}), path, compression="zstd"),
    "blank.jsonl.gz": lambda path: _gz(path, b"", b"\n" * 2**20, 3),
    "spaces.jsonl.gz": lambda path: _gz(path, b"", b" \t\n" * 2**18, 20),
    "blank.csv.gz": lambda path: _gz(path, b"question,answer\n", b"\n" * SMALL, 3),
    "blank.txt.gz": lambda path: _gz(path, b"a\n", b"\n" * SMALL, 3),
    "paragraph.txt.gz": lambda path: _gz(path, b"", (b"x" * 1023 + b"\n") * 1024, 70),
    "field.csv.gz": lambda path: _gz(path, b'question,answer\n"', (b"x" * 1023 + b"\n") * 1024, 70),
    "line.jsonl.gz": lambda path: _gz(path, b'{"question": "', b"x" * 2**20, 70),
    "deep.jsonl": lambda path: path.write_text('{"question": ' + "[" * 100_000 + "]" * 100_000 + "}"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_in_seconds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in ("blank.csv.gz", "blank.txt.gz"):
        monkeypatch.setattr(stream, "MAX_BLANK_BYTES", SMALL)
    BOMBS[name](tmp_path / name)
    begin = time.monotonic()
    with pytest.raises(UserError, match=name) as refused:
        list(read_rows(str(tmp_path / name)))
    assert time.monotonic() - begin < SECONDS
    assert "blank" not in name or "of blank lines" in str(refused.value)


def test_a_large_value_is_a_fault_of_its_row_alone(tmp_path: Path) -> None:
    text = os.urandom(5_000_000).hex() + "a" * 65_000_000
    pq.write_table(pa.table({"question": [text, "fine"], "answer": ["b", "c"]}), tmp_path / "a.parquet")
    first, second = read_rows(str(tmp_path / "a.parquet"))
    assert second.values["question"] == "fine"
    with pytest.raises(UserError, match="larger than 64 MiB"):
        first.text("question", "data.prompt_key")


def test_a_file_of_equal_rows_is_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"question": ["the same question " * 80] * 3000, "answer": ["b"] * 3000}), tmp_path / "a.parquet")
    assert len(list(read_rows(str(tmp_path / "a.parquet")))) == 3000


# Chat templates

DOUBLING = "{%% set ns = namespace(x=%s) %%}{%% for i in range(60) %%}%s{%% endfor %%}{{ ns.x }}"
TEMPLATES = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ ['a'] * 10**10 }}",
    "{{ 9**9**9 }}",
    "{{ 9**999999999 }}",
    "{{ 'a'|center(1000000000) }}",
    "{{ 'a'|indent(1000000000) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '{:>{}}'.format(1, 10000000000) }}",
    "{{ '{:>10000000000}'.format(1) }}",
    "{{ 'a'.ljust(10000000000) }}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    DOUBLING % ("'a'", "{% set ns.x = ns.x ~ ns.x %}"),
    DOUBLING % ("'a'", "{% set ns.x = ns.x + ns.x %}"),
    DOUBLING % ("'aa'", "{% set ns.x = ns.x.replace('a', ns.x) %}"),
    DOUBLING % ("'a'", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
    DOUBLING % ("'a'", "{% set ns.x = [ns.x, ns.x]|join %}"),
    DOUBLING % ("[1]", "{% set ns.x = [ns.x, ns.x] %}"),
    DOUBLING % ("{}", "{% set ns.x = {'a': ns.x, 'b': ns.x} %}"),
    DOUBLING % ("3", "{% set ns.x = ns.x * ns.x %}"),
]
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ messages.append(1) }}",
    "{{ lipsum.__globals__['os'].system('touch CANARY') }}",
    "{% include '/etc/passwd' %}",
    "{{ ''.format.__self__.__class__ }}",
]


def _rendered(template: str) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    limit()
    texts: Any = render_jinja_template([[{"role": "user", "content": "hi"}]], chat_template=template)[0]
    return str(texts[0])


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_without_end_is_an_error(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if template != TEMPLATES[1]:  # which reaches the limit of steps that there is
        for name in ("MOST_STEPS", "MOST_CHARACTERS", "MOST_ITEMS"):
            monkeypatch.setattr(template_limits, name, getattr(template_limits, name) // 10)
    begin = time.monotonic()
    with pytest.raises((Exception, RecursionError)):
        _rendered(template)
    assert time.monotonic() - begin < SECONDS


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_cannot_leave_its_sandbox(template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        text = _rendered(template)
    except Exception:
        text = ""
    assert "root:" not in text and "subclass" not in text and not list(tmp_path.iterdir())


def test_an_ordinary_template_renders_as_before() -> None:
    template = (
        "{% for m in messages %}{{ loop.index0 % 2 }}{{ '<' ~ m.role + '>' }}{{ m['content']|trim * 2 }}{% endfor %}{{ [1, 2]|join(',') }}"
    )
    assert _rendered(template) == "0<user>hihi1,2"


# A user's regular expressions


@pytest.mark.faults
def test_a_regular_expression_without_end_is_a_failed_answer() -> None:
    from verl.config.workers import WorkersConfig
    from verl.rewards import format as reward
    from verl.workers.calls import Failure
    from verl.workers.pool import load_code

    settings = reward.Settings(format=["(a+)+$"])
    code = load_code(reward, settings, "score", "reward format", WorkersConfig(timeout_seconds=2.0, workers=1))
    found = code.run("score", [("", "a" * 60 + "!", {}), ("", "aaa", {})])
    code.close()
    assert isinstance(found[0], Failure) and found[1] == 1.0


# Paths


def _copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in (folder / "model").iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/tmp/outside.safetensors", "a/../../outside.safetensors", "sub/model.safetensors"]
)
def test_an_index_of_weights_cannot_name_a_file_outside(name: str, folder: Path, tmp_path: Path) -> None:
    model = _copied(folder, tmp_path / "model")
    (model / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
    with pytest.raises(UserError, match="outside the directory"):
        resolve(str(model))


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "config.json", "chat_template.jinja"])
def test_a_file_of_a_model_cannot_be_a_link_to_outside(name: str, folder: Path, tmp_path: Path) -> None:
    model = _copied(folder, tmp_path / "model")
    (model / name).unlink(missing_ok=True)
    outside = tmp_path / "outside"
    outside.write_text("{}")
    (model / name).symlink_to(outside)
    with pytest.raises(UserError, match="a link to"):
        resolve(str(model))


def test_links_of_the_hubs_cache_into_its_own_blobs_work(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for number, file in enumerate((folder / "model").iterdir()):
        (repository / "blobs" / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert load_tokenizer(str(snapshot)).is_fast


def test_a_link_in_the_place_of_a_temporary_file_or_a_log_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    for name in ("state.json.tmp", "state.json"):
        (tmp_path / name).symlink_to(target)
    durable.replace_text(tmp_path / "state.json", "new")
    assert target.read_text() == "mine" and not (tmp_path / "state.json").is_symlink()
    (tmp_path / "train.log").symlink_to(target)
    with pytest.raises(OSError, match="symbolic links"):
        open(tmp_path / "train.log", "a", opener=durable.owner_only).close()


def test_files_with_settings_can_be_read_by_their_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        durable.replace_text(tmp_path / "config.yaml", "a", private=True)
        durable.replace_text(tmp_path / "state.json", "a")
        open(tmp_path / "train.log", "a", opener=durable.owner_only).close()
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"config.yaml": 0o600, "state.json": 0o644, "train.log": 0o600}


# The cache of tokens


class _Config:
    max_length, truncation = 512, "error"

    def __init__(self, folder: Path):
        self.cache_dir: str | None = str(folder)
        self.num_workers: int | None = 1


def _documents(folder: Path, cached: Path) -> Any:
    columns = Columns("question", "answer", None, None, None)
    return load_documents(_Config(cached), columns, str(folder / "train.jsonl"), load_tokenizer(str(folder / "model")))


def _poison(path: Path, token: int) -> None:
    tables = cache.read(path)
    assert tables is not None
    ids = tables[0].column("input_ids")
    changed = pa.ListArray.from_arrays(ids.offsets, pa.array([token] * len(ids.values), pa.int32()))
    columns = [changed if name == "input_ids" else tables[0].column(name) for name in tables[0].schema.names]
    cache.written(path, [pa.RecordBatch.from_arrays(columns, schema=tables[0].schema)])


@pytest.mark.parametrize("how", ["group can write", "all can write", "link"])
def test_a_poisoned_cache_of_another_user_is_left_aside(how: str, folder: Path, tmp_path: Path) -> None:
    good = _documents(folder, tmp_path)
    path = next(tmp_path.rglob("*.arrow"))
    _poison(path, 3)
    if how == "link":
        path.rename(tmp_path / "theirs")
        path.symlink_to(tmp_path / "theirs")
    else:
        path.chmod(0o660 if how == "group can write" else 0o606)
    again = _documents(folder, tmp_path)
    assert again.document(0)[0].tolist() == good.document(0)[0].tolist()
    assert any("left aside" in note for note in again.report.notes)


def test_a_cache_that_another_user_owns_is_left_aside(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _documents(folder, tmp_path)
    path = next(tmp_path.rglob("*.arrow"))
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    assert cache.read(path) is None and cache.is_of_another(path)


@pytest.mark.parametrize("token", [10**6, -1])
def test_a_token_beyond_the_vocabulary_is_an_error_before_training(token: int, folder: Path, tmp_path: Path) -> None:
    _documents(folder, tmp_path)
    _poison(next(tmp_path.rglob("*.arrow")), token)
    with pytest.raises(UserError, match="does not have"):
        _documents(folder, tmp_path)


# Servers


class _Handler(http.server.BaseHTTPRequestHandler):
    seen: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.seen.append(self.path)
        with_length = {"/drip": "1000", "/large": str(2**40)}
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.2:{self.server.server_port}/stolen")  # type: ignore[attr-defined]
            self.end_headers()
            return
        self.send_response(200)
        if self.path == "/headers":
            self._drip(b"X: " + b"a" * 1000)
        self.send_header("Content-Length", with_length.get(self.path, "2"))
        self.end_headers()
        if self.path == "/drip":
            self._drip(b" " * 1000)
        if self.path == "/large":
            self._drip(b" " * 2**20, size=2**20, pause=0.0, again=True)
        self.wfile.write(b"{}")

    def _drip(self, text: bytes, *, size: int = 1, pause: float = 0.1, again: bool = False) -> None:
        try:
            for start in range(0, len(text), size):
                self.wfile.write(text[start : start + size])
                self.wfile.flush()
                time.sleep(pause)
            while again:
                self.wfile.write(text)
        except OSError:
            pass

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[str]:
    _Handler.seen.clear()
    running = http.server.ThreadingHTTPServer(("0.0.0.0", 0), _Handler)
    running.daemon_threads = True
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


@pytest.mark.parametrize("path", ["/drip", "/headers"])
def test_a_server_that_drips_is_left_in_time(path: str, server: str) -> None:
    begin = time.monotonic()
    with pytest.raises(UserError, match="no answer within 1 s"):
        Server(server, start="vllm", timeout=1.0)._call(urllib.request.Request(server + path), 1.0)
    assert time.monotonic() - begin < 3.0


def test_an_answer_has_a_largest_size(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verl.rollout._http.LARGEST_ANSWER", 2**22)
    with pytest.raises(UserError, match="sends more than"):
        Server(server, start="vllm").get("/large")


def test_a_redirect_is_not_followed(server: str) -> None:
    with pytest.raises(RefusedError, match=r"it sends to 127\.0\.0\.2"):
        Server(server, start="vllm").get("/moved")
    assert _Handler.seen == ["/moved"]


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(UserError, match="VLLM_API_KEY") as refused:
        Server("http://me:hunter2@localhost:8000", start="vllm")
    assert "hunter2" not in str(refused.value)


def test_an_ordinary_answer_is_read(server: str) -> None:
    assert Server(server, start="vllm").get("/") == {}


def test_weights_of_a_killed_run_are_removed_by_the_next(tmp_path: Path) -> None:
    code = (
        "import os, signal; from pathlib import Path; from verl.rollout._weights_folder import weights_folder\n"
        f"with weights_folder(Path({str(tmp_path)!r})) as f: (f / 'model').write_text('w'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    with weights_folder(tmp_path) as living:
        remove_abandoned(tmp_path)
        assert list(tmp_path.iterdir()) == [living]
    assert list(tmp_path.iterdir()) == []


# Code of others


def _evil(folder: Path, *names: str) -> None:
    for name in names:
        (folder / f"{name}.py").write_text(f"open({str(folder / 'CANARY')!r}, 'w'); raise SystemExit(9)")


COMMANDS = {
    "a trainer": ["-m", "verl.trainer.fsdp_sft_trainer", "--version"],
    "the command": ["-m", "verl", "--version"],
    "the evaluator": ["-m", "verl.eval.sft_evaluator", "--version"],
}


@pytest.mark.faults
@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_of_the_current_folder_is_not_taken_for_a_library(name: str, tmp_path: Path) -> None:
    _evil(tmp_path, "transformers", "torch", "numpy", "omegaconf", "yaml", "logging", "typer")
    done = subprocess.run([sys.executable, *COMMANDS[name]], cwd=tmp_path, capture_output=True, text=True, env=_environment(), check=False)
    assert (done.returncode, done.stdout.strip()) == (0, verl.__version__), done.stderr
    assert not (tmp_path / "CANARY").exists()


@pytest.mark.faults
def test_processes_of_a_run_do_not_import_from_the_current_folder(folder: Path, tmp_path: Path) -> None:
    _evil(tmp_path, "transformers", "torch", "multiprocessing", "math_verify", "pickle")
    words = [f"data.train_files={folder / 'train.jsonl'}", f"model.partial_pretrain={folder / 'model'}", "trainer.total_training_steps=1"]
    words += ["data.train_batch_size=4", "trainer.save_freq=never", "trainer.logger=[]"]
    command = [sys.executable, "-P", "-m", "verl", "sft", "--gpus", "2", *words] if sys.version_info >= (3, 11) else []
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=_environment(), timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (tmp_path / "CANARY").exists()


@pytest.mark.faults
def test_the_judge_of_mathematics_does_not_import_from_the_current_folder(tmp_path: Path) -> None:
    _evil(tmp_path, "math_verify", "sympy", "json")
    code = (
        "import sys; sys.path.remove(''); from verl.rewards import math; "
        r"print(math.score('', r'\boxed{1+x}', {'reference': r'\boxed{x+1}'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=_environment(), check=False)
    assert done.stdout.strip() == "1.0", done.stderr
    assert not (tmp_path / "CANARY").exists()


@pytest.mark.faults
def test_an_empty_entry_of_pythonpath_is_not_the_current_folder_for_the_command(tmp_path: Path) -> None:
    _evil(tmp_path, "typer", "rich")
    script = tmp_path / "bin" / "verl"
    script.parent.mkdir()
    script.write_text("from verl.cli import main\nmain()\n")
    variables = {**_environment(), "PYTHONPATH": f"{os.pathsep}{Path(verl.__file__).parent.parent}"}
    done = subprocess.run(
        [sys.executable, str(script), "--version"], cwd=tmp_path, capture_output=True, text=True, env=variables, check=False
    )
    assert done.stdout.strip() == verl.__version__, done.stderr
    assert not (tmp_path / "CANARY").exists()


def test_a_module_that_the_user_names_is_found_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl import user_files

    (tmp_path / "mine_for_attacks").mkdir()
    (tmp_path / "mine_for_attacks" / "reward.py").write_text("def score(prompt, response, row): return 1.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", safe_path.without_current_folder(sys.path))
    assert user_files.from_name("mine_for_attacks.reward", "reward").score("", "", {}) == 1.0


def test_the_guard_of_new_processes_is_taken_away_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    with safe_path.guarded():
        assert os.environ["PYTHONSAFEPATH"] == "1"
    assert "PYTHONSAFEPATH" not in os.environ


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(verl.__file__).parent.parent), "HF_HUB_OFFLINE": "1"}


class _Touch:
    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self._path}",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.pth", "model.ckpt"])
def test_pickled_weights_are_refused_unread(name: str, folder: Path, tmp_path: Path) -> None:
    model = _copied(folder, tmp_path / "model")
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(_Touch(tmp_path / "CANARY")))
    with pytest.raises(UserError):
        load_language_model(str(model), device="cpu", dtype=torch.float32, trust_remote_code=False, attn_implementation="eager")
    assert not (tmp_path / "CANARY").exists()


@pytest.mark.parametrize("field", ["auto_map", "custom_generate", "_attn_implementation_internal"])
def test_code_of_a_models_directory_is_not_run(field: str, folder: Path, tmp_path: Path) -> None:
    model = _copied(folder, tmp_path / "model")
    _evil(model, "modeling_x", "generate")
    (model / "custom_generate").mkdir()
    _evil(model / "custom_generate", "generate")
    config = json.loads((model / "config.json").read_text())
    value = {"AutoConfig": "modeling_x.C", "AutoModelForCausalLM": "modeling_x.M"} if field == "auto_map" else "modeling_x"
    (model / "config.json").write_text(json.dumps({**config, field: value}))
    with suppress(UserError):  # refused is as good
        load_language_model(str(model), device="cpu", dtype=torch.float32, trust_remote_code=False, attn_implementation="eager")
    assert not list(model.rglob("CANARY"))


@pytest.mark.parametrize(
    "field", ["_attn_implementation", "attn_implementation", "_attn_implementation_internal", "_experts_implementation"]
)
def test_a_kernel_that_a_config_names_is_not_loaded(field: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, named = _copied(folder, tmp_path / "model"), list[Any]()
    for loader in ("lazy_import_flash_attention", "load_and_register_attn_kernel"):
        monkeypatch.setattr(f"transformers.modeling_utils.{loader}", lambda *args, **kwargs: named.append(args), raising=False)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, field: "evil/kernel"}))
    read = PreTrainedConfig.__dict__["get_config_dict"]
    loaded = load_language_model(str(model), device="cpu", dtype=torch.float32, trust_remote_code=False, attn_implementation="sdpa")
    assert loaded.config._attn_implementation == "sdpa"
    outline(str(model))
    assert not named
    assert PreTrainedConfig.__dict__["get_config_dict"] is read, "other models of the process are read as before"


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/name:os.system", "!!python/module:os", "!include"])
def test_a_tag_of_yaml_runs_nothing(tag: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"trainer:\n  experiment_name: {tag} ['touch {tmp_path / 'CANARY'}']\n")
    with pytest.raises(UserError):
        load_config(SFTConfig, [*GIVEN, "--config", str(tmp_path / "run.yaml")])
    assert not (tmp_path / "CANARY").exists()


CODE = [
    "__import__('os').system('touch CANARY')",
    r"\boxed{__import__('os').system('touch CANARY')}",
    "calculate __import__('os').system('touch CANARY')",
]


@pytest.mark.parametrize("answer", CODE)
def test_code_in_an_answer_is_text(answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.rewards import gsm8k
    from verl.tools import calculator

    monkeypatch.chdir(tmp_path)
    assert gsm8k.score("", answer, {"reference": "#### 4"}) == 0.0
    calculator.reply(answer, "", {})
    assert not (tmp_path / "CANARY").exists()


# What is in the place of a file: links, named pipes, directories and devices, and files of any size in no space


@pytest.fixture
def ends_in_time() -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError("it would go on forever")  # no OSError, which readers pass over

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(int(SECONDS) * (10 if "coverage" in sys.modules else 1))  # deep recursion is slow where each line is counted
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


IN_PLACE: dict[str, Callable[[Path], None]] = {
    "a link": lambda path: path.symlink_to(path.parent.parent / "victim"),
    "a named pipe": os.mkfifo,
    "a directory": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


def _run_in(directory: Path, *words: str) -> Claimed:
    return claim(load_config(SFTConfig, [*GIVEN, f"trainer.default_local_dir={directory}", *words]))


@pytest.mark.usefixtures("ends_in_time")
@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_in_a_runs_directory_is_named_and_left_alone(name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    IN_PLACE[kind](tmp_path / "run" / name)
    with pytest.raises(UserError, match=f"run/{name}: is a .*, expected a file\\n  fix: remove it"):
        _run_in(tmp_path / "run")
    assert not (tmp_path / "victim").exists()


@pytest.mark.usefixtures("ends_in_time")
@pytest.mark.parametrize("kind", IN_PLACE)
def test_what_an_earlier_run_left_is_read_only_from_files(kind: str, tmp_path: Path) -> None:
    step = tmp_path / "global_step_4"
    (step / "trainer").mkdir(parents=True)
    IN_PLACE[kind](step / "trainer" / "state.json")
    IN_PLACE[kind](tmp_path / "config.yaml")
    assert recorded_settings(tmp_path) == {} == settings_beside(step)


@pytest.mark.parametrize("kind", IN_PLACE)
def test_what_is_no_file_in_the_place_of_a_lock_is_named_and_left_alone(kind: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "victim").write_text("mine")
    IN_PLACE[kind](tmp_path / "model" / "lock")
    with pytest.raises(UserError, match=r"model/lock: is a .*, expected a file"), held(tmp_path / "model", "export"):
        pass
    assert (tmp_path / "victim").read_text() == "mine"


@pytest.mark.usefixtures("ends_in_time")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "other.safetensors", "generation_config.json", "tokenizer.json"])
def test_a_pipe_in_a_model_is_refused_unopened(name: str, folder: Path, tmp_path: Path) -> None:
    model = _copied(folder, tmp_path / "model")
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    content_of(str(model))
    assert kind_of(str(model)) in (None, "a language model")
    with pytest.raises(UserError):
        resolve(str(model))
    if name != "tokenizer.json":
        with pytest.raises(UserError):
            load_language_model(str(model), device="cpu", dtype="float32", trust_remote_code=False, attn_implementation="eager")
    if name.endswith(".safetensors"):
        with pytest.raises(UserError, match=f"{name}: is not a regular file"):
            check_model_files(str(model))


def _with_hole(path: Path, size: int = 2**28) -> Path:
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(size)
    return path


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json", "special_tokens_map.json"])
def test_a_giant_file_of_a_model_is_refused_unread(name: str, folder: Path, tmp_path: Path) -> None:
    model = _copied(folder, tmp_path / "model")
    _with_hole(model / name)
    with pytest.raises(UserError, match="no such file of a model"):
        resolve(str(model))
    assert _memory(lambda: content_of(str(model))) < 2**26
    assert _memory(lambda: kind_of(str(model))) < 2**27


def test_giant_files_of_an_earlier_run_are_not_read_whole(tmp_path: Path) -> None:
    step = tmp_path / "global_step_4"
    (step / "trainer").mkdir(parents=True)
    _with_hole(step / "trainer" / "state.json")
    _with_hole(tmp_path / "config.yaml")
    assert _memory(lambda: recorded_settings(tmp_path)) < 2**27
    _with_hole(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="a line of more than"):
        begin_files(tmp_path, "{}", 4, print)


def _memory(call: Callable[[], object]) -> int:
    """The most memory of Python's objects in a call, in bytes."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


ALIASES = "\n".join(["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10))])
YAML_BOMBS = [ALIASES, ALIASES.replace("[", "{a: [").replace("]", "]}"), "&a [*a]", "trainer: {resume_from_path: " + "[" * 5000]


@pytest.mark.usefixtures("ends_in_time")
@pytest.mark.parametrize("text", YAML_BOMBS, ids=range(len(YAML_BOMBS)))
def test_a_bomb_in_the_config_yaml_of_a_run_is_no_config(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    trainer = load_config(SFTConfig, [*GIVEN, "trainer.resume_mode=resume_path", "trainer.resume_from_path=x/global_step_1"]).trainer
    assert recorded_settings(tmp_path) == {} and not is_continued(tmp_path, trainer)
    begin_files(tmp_path, "optim: {lr: 1e-3}", 0, print)


# Names


@pytest.mark.parametrize("word", ["", "''", "' '"])
def test_an_empty_directory_is_not_the_current_folder(word: str) -> None:
    with pytest.raises(UserError, match="default_local_dir: is empty"):
        load_config(SFTConfig, [*GIVEN, f"trainer.default_local_dir={word}"])


@pytest.mark.parametrize("word", ["null", "None", "~", "!!null null"])
def test_null_for_the_directory_is_the_default_place(word: str) -> None:
    config = load_config(SFTConfig, [*GIVEN, "trainer.default_local_dir=a", f"trainer.default_local_dir={word}"])
    assert config.trainer.default_local_dir == "checkpoints/verl-sft/run"


@pytest.mark.parametrize("call", [lambda name: resolve(name), lambda name: Path(name).is_dir(), lambda name: Path(f"/{name}").read_bytes()])
def test_a_name_that_is_too_long_is_no_error_of_a_disk(call: Callable[[str], object]) -> None:
    with pytest.raises(UserError, match="File name too long") as error, machine_errors_named():
        call("x" * 6000)
    assert error.value.exit_code == 2 and len(str(error.value)) < 500


def test_a_directory_in_the_place_of_a_file_is_no_error_of_a_disk(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="remove what is in its place") as error, machine_errors_named():
        tmp_path.read_bytes()
    assert error.value.exit_code == 2


def test_only_names_that_verl_writes_are_checkpoints(tmp_path: Path) -> None:
    for name in ("4", "04", "\u0664", "+5", "5_0", "10", "7.tmp"):
        (tmp_path / f"global_step_{name}").mkdir()
    assert [path.name for path in steps_in(tmp_path)] == ["global_step_4", "global_step_10"]
    assert newest_step(tmp_path) == tmp_path / "global_step_10"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the limit may come while Python opens a folder
@pytest.mark.usefixtures("ends_in_time")
@pytest.mark.parametrize("pattern", ["**/x.jsonl", "**/**/no*", "*/**/a/**/[x]"])
def test_a_glob_that_goes_round_in_circles_ends_in_time(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(globs, "SECONDS", 0.5)
    for name in "abcd":
        (tmp_path / name).mkdir()
        for other in "efgh":
            (tmp_path / name / other).symlink_to(tmp_path)
    with pytest.raises(UserError, match="is not expanded in"):
        resolve_files(f"{tmp_path}/{pattern}")
    deadline = time.monotonic() + 5
    while any(thread.name == "glob" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the thread has not ended"
        time.sleep(0.05)


def test_the_catalogue_has_all_the_attacks() -> None:
    parametrised: list[Any] = [RESOLVERS, SECRETS, LINES, list(BOMBS), TEMPLATES, ESCAPES, list(COMMANDS), CODE]
    assert sum(map(len, parametrised)) >= 75, "with the single tests of this file, at least 91"


def test_an_unexpected_error_is_printed_without_the_secrets_in_its_text() -> None:
    def fail() -> None:
        raise RuntimeError(f"the hub refused {SECRETS[0]}", 7)

    with pytest.raises(RuntimeError, match=r"the hub refused .*hidden.*7") as raised:
        exit_on_user_error(fail)
    assert SECRETS[0] not in str(raised.value)
