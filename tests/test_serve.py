"""`verl serve`: transformers' own server answers as the checkpoint does, and everything ends with the command.

vLLM is not installed where these tests run: a stand-in of that name on PATH shows how it would be started, and no more.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from learned import ROWS
from models.test_export import write_adapter, write_base
from served import port_in, started

from verl import serve
from verl.config.commands import ServeConfig
from verl.config.load import load_config
from verl.errors import UserError
from verl.models.load import load_tokenizer
from verl.rewards import judge
from verl.rewards._service import NoGradeError

STAND_IN = """#!{python}
# A stand-in for vLLM's command line: it writes down how it was started, and answers on /health.
import http.server, json, pathlib, signal, sys
pathlib.Path({record!r}).write_text(json.dumps(sys.argv[1:]))
{first}
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def write_stand_in(folder: Path, first: str = "") -> Path:
    """Write a program `vllm` into a folder. Returns the file in which it writes its arguments down."""
    folder.mkdir()
    record = folder / "arguments.json"
    (folder / "vllm").write_text(STAND_IN.format(python=sys.executable, record=str(record), first=first))
    (folder / "vllm").chmod(0o755)
    return record


def asked(line: str, question: str) -> str:
    """Run the curl line that was printed, with another question."""
    line = line.replace("What is 17 + 25?", question)
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    return str(json.loads(done.stdout)["choices"][0]["message"]["content"])


def check_judge(port: int, folder: Path) -> None:
    """The grader `judge` asks a real server of the API, and reads what the checkpoint answers, which is no grade."""
    (folder / "prompt.txt").write_text("{answer}")
    keys: dict[str, Any] = {"judge_max_tokens": 60, "judge_prompt": str(folder / "prompt.txt"), "judge_cache": None}
    own = judge.Settings(f"http://127.0.0.1:{port}/v1", "a-model", **keys)
    own.check()
    with pytest.raises(NoGradeError) as caught:
        judge.score("", ROWS[0]["question"], {"reference": ""}, own)
    assert repr(ROWS[0]["answer"].strip()) in str(caught.value)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_transformers_server_answers_as_the_checkpoint_does(learned_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(learned_checkpoint, tmp_path / "a model")
    # Other stop tokens than the template's: without them, the answer would go on to its longest.
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "do_sample": True}))
    for process, said in started([checkpoint, "port=0", "engine=transformers"], tmp_path):
        line = said.splitlines()[-1]
        assert said.startswith("a-model answers at http://127.0.0.1:")
        assert [asked(line, row["question"]) for row in ROWS[:2]] == [row["answer"] for row in ROWS[:2]]
        port = port_in(said)
        check_judge(port, tmp_path)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            pass


def test_vllm_is_started_where_it_is_on_the_path(learned_checkpoint: Path, tmp_path: Path) -> None:
    record = write_stand_in(tmp_path / "bin")
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    words = [learned_checkpoint, "port=0", "name=mine", "arguments=[--max-model-len,128]"]
    for process, said in started(words, tmp_path, PATH=path):
        assert "(vllm)" in said and '"model": "mine"' in said
        (verb, folder, *rest) = json.loads(record.read_text())
        assert verb == "serve" and Path(folder).name == "mine" and (Path(folder) / "model.safetensors").is_file()
        assert rest[:4] == ["--served-model-name", "mine", "--host", "127.0.0.1"] and rest[-2:] == ["--max-model-len", "128"]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0 and not Path(folder).parent.exists()


def listens(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def test_a_server_ends_with_the_command_even_if_that_is_killed(learned_checkpoint: Path, tmp_path: Path) -> None:
    write_stand_in(tmp_path / "bin")
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    for process, said in started([learned_checkpoint, "port=0"], tmp_path, PATH=path):
        port = port_in(said)
        process.kill()
        process.wait(10)
        deadline = time.monotonic() + 10
        while (answers := listens(port)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not answers, "the server is still there"
        return
    pytest.fail("no server was started")


def test_a_server_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "END_SECONDS", 0.2)
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    with serve.started([sys.executable, "-c", stubborn], tmp_path) as server:
        while "up" not in server.told:
            time.sleep(0.01)
    assert server.process.returncode == -signal.SIGKILL


def test_a_server_that_ends_by_itself_is_told_with_its_last_lines(
    learned_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_stand_in(tmp_path / "bin", "print('out of memory: buy more'); sys.exit(7)")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(UserError, match=r"exit code 7; its last lines:\n    out of memory: buy more\n  fix: "):
        serve.serve(load_config(ServeConfig, [f"model_path={learned_checkpoint}", "port=0"]))


def test_an_adapter_is_merged_and_stops_where_its_template_does(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", write_base(tmp_path / "base"))
    load_tokenizer(str(tmp_path / "base")).save_pretrained(adapter)
    (above := tmp_path / "above").mkdir()
    served = serve.prepare(ServeConfig(str(adapter)), above)
    assert (served.folder / "model.safetensors").is_file() and not (served.folder / "adapter_config.json").exists()
    stop = json.loads((served.folder / "generation_config.json").read_text())["eos_token_id"]
    (trained,) = {load_tokenizer(str(adapter)).convert_tokens_to_ids("<|im_end|>")}
    assert stop[0] == trained and served.system_prompt is None


def test_answers_end_where_the_template_does_whatever_the_generation_config_says(
    learned_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = shutil.copytree(learned_checkpoint, tmp_path / "model")
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "repetition_penalty": 1.5}))
    (above := tmp_path / "above").mkdir()
    served = serve.prepare(ServeConfig(str(checkpoint)), above)
    stop = load_tokenizer(str(checkpoint)).convert_tokens_to_ids("<|im_end|>")
    written = json.loads((served.folder / "generation_config.json").read_text())
    assert written["eos_token_id"] == [stop, 0] and written["repetition_penalty"] == 1.5
    assert json.loads((checkpoint / "generation_config.json").read_text())["eos_token_id"] == 0
    assert "repetition_penalty=1.5: the server applies it" in capsys.readouterr().out


def test_the_system_prompt_of_the_training_is_in_the_curl_line(learned_checkpoint: Path, tmp_path: Path) -> None:
    served = serve.Served(tmp_path / "m", "It's brief: 短")
    line = serve.curl_line("http://127.0.0.1:8000", served)
    done = subprocess.run(["bash", "-c", line.replace("curl", "printf '%s\\n'", 1)], capture_output=True, text=True, check=True)
    body = json.loads(done.stdout.splitlines()[-1])
    assert body["messages"][0] == {"role": "system", "content": "It's brief: 短"} and body["model"] == "m"


def test_names_in_requests_are_plain(tmp_path: Path) -> None:
    (tmp_path / "my run" / "global_step_7").mkdir(parents=True)
    step = str(tmp_path / "my run" / "global_step_7")
    assert serve.name_of(str(tmp_path / "my run"), step) == serve.name_of(step, step) == "my-run-global_step_7"
    assert serve.name_of("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B") == "Qwen2.5-0.5B"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["engine=other"], "engine: found 'other'\n  fix: write one of auto, vllm or transformers"),
        (["engine=vllm"], "vllm is not installed\n  fix: "),
        (["port=70000"], "port: found 70000"),
        (["name=a b"], "name: found 'a b'"),
        (["host=203.0.113.7", "port=0"], r"203\.0\.113\.7:0: cannot be used"),
        (["model_path=nowhere/at/all", "port=0"], "no such model directory"),
    ],
)
def test_what_cannot_be_served_is_said(words: list[str], message: str, learned_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=message):
        serve.serve(load_config(ServeConfig, [f"model_path={learned_checkpoint}", *words]))


def test_a_port_in_use_is_said_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"127\.0\.0\.1:{port}: cannot be used: .*\n  fix: port={port + 1}"):
            serve.free_port("127.0.0.1", port)


def test_a_server_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"no server is installed.*\n  fix: .*\[serve\]"):
        serve.choose_engine("auto")
