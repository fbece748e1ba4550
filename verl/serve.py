"""`verl serve DIR`: answer requests in OpenAI's format with a checkpoint, by vLLM's server where it is installed, else by transformers'.

The server gets the files of the checkpoint, with an adapter merged, and a generation_config.json with the stop tokens of its training.
"""

import collections
import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from verl.config.commands import ExportConfig, ServeConfig
from verl.config.load import load_config
from verl.errors import UserError, exit_on_user_error

PACKAGES = ("fastapi", "uvicorn", "openai", "pydantic")  # that transformers' server needs
INSTALL = 'pip install -c constraints.txt -e ".[serve]" for transformers\' server, or vllm in an environment of its own (docs/rollout.md)'
# Starts a program that ends with this one, even if this one is killed.
STARTER = "import os, sys; from verl.parent import end_with; end_with(int(sys.argv[1]), None); os.execvp(sys.argv[2], sys.argv[2:])"
TOLD_LINES = 12  # of a server that fails
END_SECONDS = 20.0  # for a server to answer what it has begun
HEALTH_SECONDS = 0.3  # between two looks at whether it answers
# Settings of a generation_config.json that change even the likeliest answer.
CHANGE_ANSWERS = (
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "min_new_tokens",
    "num_beams",
    "bad_words_ids",
)
NOT_SERVED = {"trainer", "manifest.json", "generation_config.json", "README.md"}


@dataclass(frozen=True)
class Served:
    """A directory that a server can load.

    Attributes:
        system_prompt: of the training, if it had one and the same for all chats.
    """

    folder: Path
    system_prompt: str | None


def choose_engine(name: str) -> str:
    """Return "vllm" or "transformers". Raises UserError: what is wanted is not installed."""
    has_vllm = importlib.util.find_spec("vllm") is not None or shutil.which("vllm") is not None
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if name == "vllm" and not has_vllm:
        raise UserError("vllm is not installed", where="engine=vllm", fix="install it in an environment of its own, and add it to PATH")
    if name == "transformers" and missing:
        raise UserError(f"transformers' server needs {', '.join(missing)}", where="engine=transformers", fix=INSTALL)
    if name == "auto" and not has_vllm and missing:
        raise UserError(f"no server is installed: there is no vllm, and transformers' needs {', '.join(missing)}", fix=INSTALL)
    return name if name != "auto" else "vllm" if has_vllm else "transformers"


def command_of(engine: str, served: Served, config: ServeConfig, port: int) -> list[str]:
    """Return the command of a server; it is started in the folder above the model's, so that requests name it shortly."""
    name = served.folder.name
    place = ["--host", config.host, "--port", str(port)]
    trust = ["--trust-remote-code"] if config.trust_remote_code else []
    if engine == "transformers":
        return [sys.executable, "-m", "transformers.cli.transformers", "serve", name, *place, *trust, *config.arguments]
    installed = importlib.util.find_spec("vllm") is not None
    vllm = [sys.executable, "-m", "vllm.entrypoints.cli.main"] if installed else [str(shutil.which("vllm"))]
    return [*vllm, "serve", str(served.folder), "--served-model-name", name, *place, *trust, *config.arguments]


def prepare(config: ServeConfig, above: Path) -> Served:
    """Put the files of a checkpoint into a new folder: links, an adapter merged, and the stop tokens of its template.

    Raises:
        UserError: the checkpoint is invalid, or has no chat template that can be used.
    """
    from verl.data.render import Renderer
    from verl.models.export import export, find_source
    from verl.models.format_check import check_format, read_format
    from verl.models.kind import GENERATES, check_kind
    from verl.models.load import load_tokenizer

    source = find_source(config.model_path)
    check_kind(source, GENERATES)
    tokenizer = load_tokenizer(source, trust_remote_code=config.trust_remote_code)
    stop_ids = Renderer(tokenizer).stop_ids
    check_format(source, tokenizer, stop_ids, [], key="")
    folder = above / (config.name or name_of(config.model_path, source))
    if (Path(source) / "adapter_config.json").is_file() and not (Path(source) / "config.json").is_file():
        export(ExportConfig(source=source, directory=str(folder), trust_remote_code=config.trust_remote_code))
    else:
        link_files(local_files(source), folder)
    stop_at(stop_ids, folder, local_files(source))
    trained = read_format(source)
    prompts = None if trained is None else trained.system_prompts
    return Served(folder, prompts[0] if prompts is not None and len(prompts) == 1 else None)


def local_files(source: str) -> Path:
    """Return the directory of a model, downloaded if it is one of the Hub."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    from verl.models.publish import hub_errors_named

    with hub_errors_named(os.environ.get("HF_ENDPOINT", "the Hub"), source):
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
        return Path(snapshot_download(source, allow_patterns=patterns, ignore_patterns=["*/*"]))


def name_of(given: str, source: str) -> str:
    """Return the name of a model in requests: `RUN-global_step_N` for a checkpoint, else that of the directory."""
    path = Path(source)
    name = f"{path.parent.name}-{path.name}" if path.is_dir() and path.name.startswith("global_step_") else Path(given).name or path.name
    return re.sub(r"[^\w.\-]+", "-", name).strip("-.") or "model"


def link_files(source: Path, folder: Path) -> None:
    folder.mkdir()
    for path in source.iterdir():
        if path.name not in NOT_SERVED:
            (folder / path.name).symlink_to(path.resolve())


def stop_at(stop_ids: list[int], folder: Path, source: Path) -> None:
    """Write a generation config that ends an answer at the template's stop tokens, besides those of the model."""
    from transformers import GenerationConfig

    file = next((one / "generation_config.json" for one in (folder, source) if (one / "generation_config.json").is_file()), None)
    config = GenerationConfig() if file is None else GenerationConfig.from_pretrained(file.parent)
    known = config.eos_token_id
    ids = [] if known is None else [known] if isinstance(known, int) else list(known)
    config.eos_token_id = list(dict.fromkeys([*stop_ids, *ids]))
    if config.pad_token_id is None:
        config.pad_token_id = config.eos_token_id[0]
    config.save_pretrained(folder)
    if applied := [f"{name}={value}" for name in CHANGE_ANSWERS if (value := getattr(config, name, None)) not in (None, 0, 1, 1.0)]:
        say(f"generation_config.json has {', '.join(applied)}: the server applies it also at temperature 0, verl eval and verl chat do not")


def free_port(host: str, port: int) -> int:
    """Return the port, or a free one for 0. Raises UserError: it is in use, or the host is none of this machine's."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
            return int(tried.getsockname()[1])
    except OSError as error:
        fix = f"port={port + 1}, or port=0 for a free one; host=127.0.0.1 for this machine alone"
        raise UserError(f"cannot be used: {error.strerror}", where=f"{host}:{port}", fix=fix) from error


@dataclass
class Server:
    """A server's process, whose output goes to standard error.

    Attributes:
        told: the last lines of its output.
    """

    process: subprocess.Popen[str]
    told: collections.deque[str] = field(default_factory=lambda: collections.deque(maxlen=TOLD_LINES))

    def read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.told.append(line.rstrip())
            print(line, end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """End it and all that it has started: it may finish what it answers, for END_SECONDS."""
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        try:
            self.process.wait(END_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextlib.contextmanager
def started(command: list[str], folder: Path) -> Iterator[Server]:
    """Start a server in a session of its own, so that Ctrl-C reaches it through this process alone."""
    words = [sys.executable, "-c", STARTER, str(os.getpid()), *command]
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(  # noqa: S603, a server that is installed here
        words,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_DISABLE_UPDATE_CHECK": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    server = Server(process)
    reader = threading.Thread(target=server.read, daemon=True)
    reader.start()
    try:
        yield server
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.end()
        reader.join(1.0)
        if not reader.is_alive() and process.stdout is not None:
            process.stdout.close()


def wait_until_it_answers(server: Server, address: str) -> None:
    """Wait until the model is loaded. Raises UserError: the server has ended, with its last lines."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not know this machine
    while True:
        if server.process.poll() is not None:
            time.sleep(HEALTH_SECONDS)  # for its last lines
            told = "\n".join(f"    {line}" for line in server.told if line.strip())
            what = f"the server ended with exit code {server.process.returncode}; its last lines:\n{told}"
            raise UserError(what, fix="correct what it says; engine= chooses another server, arguments=[…] are words for it")
        with contextlib.suppress(OSError), opener.open(f"{address}/health", timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(HEALTH_SECONDS)


def address_of(host: str, port: int) -> str:
    """Return the address at which this machine reaches a server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def curl_line(address: str, served: Served) -> str:
    """Return a command that asks the server a question, greedily."""
    system = [] if served.system_prompt is None else [{"role": "system", "content": served.system_prompt}]
    chat = [*system, {"role": "user", "content": "What is 17 + 25?"}]
    body: dict[str, Any] = {"model": served.folder.name, "messages": chat, "temperature": 0, "max_tokens": 256}
    data = shlex.quote(json.dumps(body, ensure_ascii=False))
    return f"curl --noproxy '*' {address}/v1/chat/completions -H 'Content-Type: application/json' -d {data}"


def say(line: str) -> None:
    print(line, flush=True)


def serve(config: ServeConfig) -> None:
    """Serve a checkpoint until Ctrl-C or SIGTERM.

    Raises:
        UserError: the checkpoint is invalid, no server is installed, the port is in use, or the server fails.
    """
    engine = choose_engine(config.engine)
    port = free_port(config.host, config.port)
    with tempfile.TemporaryDirectory(prefix="verl-serve-") as above:
        served = prepare(config, Path(above))
        address = address_of(config.host, port)
        with started(command_of(engine, served, config, port), Path(above)) as server:
            wait_until_it_answers(server, address)
            say(f"{served.folder.name} answers at {address}/v1 ({engine}); Ctrl+C ends it. Try:")
            say(curl_line(address, served))
            if config.host not in ("127.0.0.1", "localhost", "::1"):
                say(f"warning: host={config.host} lets everybody on this network ask it")
            try:
                code = server.process.wait()
            except KeyboardInterrupt:
                say("ending the server")
                return
    raise UserError(f"the server ended with exit code {code}", fix="see its last lines above")


def interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: list[str]) -> None:
    """Run the command: `DIR key=value …`, or `model_path=DIR key=value …`."""
    if argv and not argv[0].startswith("-") and "=" not in argv[0]:
        argv = [f"model_path={argv[0]}", *argv[1:]]
    config = load_config(ServeConfig, argv)
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        from verl.progress import quiet_libraries

        with quiet_libraries():
            serve(config)
    except KeyboardInterrupt:  # before it answers
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    exit_on_user_error(main, sys.argv[1:])
