"""A vLLM server: the real one on a CPU (`make test-vllm`), and what a stand-in is enough for, with all other tests."""

import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from served import PROMPTS, STOP_IDS, largest_difference, move, server, tokenizer_of, trained_model, vllm_server, write_served_model

from verl.errors import UserError
from verl.rollout import Completion, Options, Rollout, Sampling, load_rollout
from verl.rollout import _http as http
from verl.rollout import vllm as rollout_vllm
from verl.rollout.vllm import VllmServer

GREEDY = Sampling(12)
WARM = Sampling(12, temperature=0.7, n=2)
CLOSE = 1e-4  # measured: 4e-6


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served_model(tmp_path_factory.mktemp("served") / "model")


def connect(path: Path, url: str, **options: Any) -> Rollout:
    return load_rollout("vllm", str(path), tokenizer_of(path), STOP_IDS, Options(url=url, **options))


@pytest.mark.vllm
@pytest.mark.timeout(500)
def test_a_server_answers_as_transformers_do_and_takes_new_weights(path: Path, tmp_path: Path) -> None:
    words = ["--logprobs-mode", "processed_logprobs"]
    with vllm_server(path, tmp_path / "log", *words, VLLM_SERVER_DEV_MODE="1") as url:
        rollout, oracle = connect(path, url), load_rollout("hf", str(path), tokenizer_of(path), STOP_IDS)
        expected, found = oracle.generate(PROMPTS, GREEDY), rollout.generate(PROMPTS, GREEDY)
        assert [(c.token_ids, c.finish_reason) for c in found] == [(c.token_ids, c.finish_reason) for c in expected]
        assert rollout.positions == 512 and rollout.describe().startswith("vLLM ")

        all_at_once = rollout.generate(PROMPTS, WARM, seeds=[7, 8, 9, 10])
        alone = rollout.generate([PROMPTS[2]], WARM, seeds=[9])
        assert [c.token_ids for c in all_at_once[4:6]] == [c.token_ids for c in alone]
        assert alone[0].token_ids != alone[1].token_ids

        model = trained_model(path)
        assert largest_difference(model, PROMPTS, rollout.generate(PROMPTS, GREEDY), temperature=1.0) < CLOSE
        assert largest_difference(model, PROMPTS, rollout.generate(PROMPTS, WARM), temperature=0.7) < CLOSE
        assert all(c.logprobs is None for c in rollout.generate(PROMPTS, Sampling(2, temperature=1.0, top_k=2)))
        long_prompt = [[7 + i % 90 for i in range(300)]]  # longer than a block of vLLM's cache
        rollout.generate(long_prompt, GREEDY)
        for version in (1, 2):
            move(model)
            assert largest_difference(model, PROMPTS, rollout.generate(PROMPTS, WARM), temperature=0.7) > 0.1  # the negative control
            rollout.update_weights(model.named_parameters(), version)
            found = rollout.generate(PROMPTS, WARM)
            assert largest_difference(model, PROMPTS, found, temperature=0.7) < CLOSE
            assert largest_difference(model, long_prompt, rollout.generate(long_prompt, GREEDY), temperature=1.0) < CLOSE
            assert {c.version for c in found} == {version}
        assert not list(http.SHARED_MEMORY.glob("verl-weights-*"))
        rollout.sleep()  # it was not started with sleep mode
        assert rollout.generate(PROMPTS, WARM) == found

        with pytest.raises(UserError, match=f"serves {path}, expected {tmp_path}"):
            connect(write_served_model(tmp_path / "other"), url)


@pytest.mark.vllm
@pytest.mark.timeout(500)
def test_a_server_that_was_started_plainly_says_what_it_lacks(path: Path, tmp_path: Path) -> None:
    with vllm_server(path, tmp_path / "log") as url:
        rollout, model = connect(path, url), trained_model(path)
        assert largest_difference(model, PROMPTS, rollout.generate(PROMPTS, GREEDY), temperature=1.0) < CLOSE
        with pytest.raises(UserError, match="--logprobs-mode processed_logprobs"):
            rollout.generate(PROMPTS, WARM)
        with pytest.raises(UserError, match="VLLM_SERVER_DEV_MODE=1"):
            rollout.update_weights(model.named_parameters(), 1)


def served(path: Path) -> dict[str, Any]:
    return {"data": [{"id": str(path), "root": str(path), "max_model_len": 512}]}


def test_a_server_that_is_not_there_or_something_else_is_said(path: Path) -> None:
    with pytest.raises(UserError, match="not an address"):
        connect(path, "localhost:8000")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match=r"cannot be reached.*refused") as raised:
            connect(path, f"http://127.0.0.1:{closed.getsockname()[1]}")
    assert "vllm serve" in str(raised.value)
    with server(lambda place, body: (200, "<html>")) as url, pytest.raises(UserError, match="did not answer in JSON"):
        connect(path, url)
    with server(lambda place, body: (404, {"detail": "Not Found"})) as url, pytest.raises(UserError, match="404: Not Found"):
        connect(path, url)
    with server(lambda place, body: (200, {"data": []})) as url, pytest.raises(UserError, match="lists no model"):
        connect(path, url)


def test_a_server_of_another_model_is_refused(path: Path, tmp_path: Path) -> None:
    with server(lambda place, body: (200, served(tmp_path))) as url, pytest.raises(UserError, match=r"(?s)expected .*served-model-name"):
        connect(path, url)
    renamed = {"data": [{"id": str(path), "root": "/elsewhere"}]}
    with server(lambda place, body: (200, renamed)) as url:
        assert connect(path, url).positions is None


def test_a_server_that_hangs_is_not_waited_for_without_end(path: Path) -> None:
    released = threading.Event()

    def answer(place: str, body: Any) -> tuple[int, Any]:
        if body is not None:
            released.wait(20)
        return 200, served(path)

    with server(answer) as url:
        rollout = VllmServer(str(path), STOP_IDS, Options(url=url), timeout=0.2)
        begin = time.monotonic()
        with pytest.raises(UserError, match="no answer within"):
            rollout.generate(PROMPTS, GREEDY)
        assert time.monotonic() - begin < 5
        released.set()


def test_without_token_ids_or_with_an_error_an_answer_is_no_answer(path: Path) -> None:
    choice = {"text": "?", "finish_reason": "length", "logprobs": {"token_logprobs": [-1.0]}}

    def answer(place: str, body: Any) -> tuple[int, Any]:
        if place == "/v1/models":
            return 200, served(path)
        return (400, {"error": {"message": "too hot"}}) if body["temperature"] > 0 else (200, {"choices": [choice]})

    with server(answer) as url:
        rollout = connect(path, url)
        with pytest.raises(UserError, match="does not return token ids"):
            rollout.generate(PROMPTS, GREEDY)
        with pytest.raises(UserError, match="400: too hot"):
            rollout.generate(PROMPTS, Sampling(2, temperature=1.0))


@pytest.mark.parametrize("logprobs", [None, {"token_logprobs": [], "top_logprobs": []}])
def test_an_answer_without_a_token_is_an_answer(path: Path, logprobs: Any) -> None:
    empty = {"token_ids": [], "finish_reason": "stop", "logprobs": logprobs}

    def answer(place: str, body: Any) -> tuple[int, Any]:
        return 200, served(path) if place == "/v1/models" else {"choices": [empty]}

    with server(answer) as url:
        assert connect(path, url).generate(PROMPTS[:1], WARM) == [Completion([], "stop", [])] * 2


def test_an_aborted_answer_is_an_error(path: Path) -> None:
    aborted = {"token_ids": [5], "finish_reason": "abort", "logprobs": {"token_logprobs": [-0.5]}}

    def answer(place: str, body: Any) -> tuple[int, Any]:
        return 200, served(path) if place == "/v1/models" else {"choices": [aborted]}

    with server(answer) as url, pytest.raises(UserError, match="aborted a response: abort"):
        connect(path, url).generate(PROMPTS, GREEDY)


def test_a_prefix_cache_that_is_not_reset_is_waited_for_and_then_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM resets nothing while it answers, and says so in its answer alone."""
    monkeypatch.setattr(rollout_vllm, "RESET_SECONDS", 0.0)
    resets: list[bool] = []

    def answer(place: str, body: Any) -> tuple[int, Any]:
        if place == "/reset_prefix_cache":
            resets.append(len(resets) == after)
            return 200, {"success": resets[-1]}
        known = {
            "/v1/models": served(path),
            "/server_info?config_format=json": {"vllm_config": {"model_config": {}}},
            "/collective_rpc": {},
        }
        return (200, known[place]) if place in known else (404, {"detail": "Not Found"})  # 0.26 has no /update_weight_version

    for after in (0, 3):
        resets.clear()
        with server(answer) as url:
            connect(path, url).update_weights([("a", torch.zeros(1))], 1)
        assert resets == [False] * after + [True]
    after = -1
    with server(answer) as url, pytest.raises(UserError, match=r"old weights, because it answers others.*(?s:.)*server of its own"):
        connect(path, url).update_weights([("a", torch.zeros(1))], 1)


def test_requests_go_side_by_side_up_to_a_limit(path: Path) -> None:
    running, most, lock = 0, 0, threading.Lock()

    def answer(place: str, body: Any) -> tuple[int, Any]:
        nonlocal running, most
        if place == "/v1/models":
            return 200, served(path)
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        tokens = [len(body["prompt"])]
        return 200, {"choices": [{"token_ids": tokens, "finish_reason": "stop", "logprobs": {"token_logprobs": [-0.5]}}]}

    with server(answer) as url:
        prompts = [[5] * (i + 1) for i in range(12)]
        found = connect(path, url, max_sequences=3).generate(prompts, Sampling(4, n=2))
        assert [c.token_ids[0] for c in found] == [1 + i // 2 for i in range(24)] and most == 3


def test_new_weights_of_a_server_elsewhere_need_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, elsewhere = http.Server("http://localhost:1", start=""), http.Server("http://192.0.2.7:1", start="")
    assert here.is_local() and not elsewhere.is_local()
    with pytest.raises(UserError, match=r"rollout\.weights_folder"):
        http.find_weights_folder(elsewhere, None)
    assert http.find_weights_folder(elsewhere, str(tmp_path / "new")).is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be created"):
        http.find_weights_folder(here, str(tmp_path / "file"))


def test_weights_lie_in_files_while_they_are_loaded_and_no_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    monkeypatch.setattr(http, "SHARD_BYTES", 100)
    weight = torch.arange(20.0).reshape(4, 5).t()  # not contiguous
    found: dict[str, torch.Tensor] = {}

    def load(folder: Path) -> None:
        files = sorted(folder.glob("*.safetensors"))
        assert len(files) == 2
        for file in files:
            found.update(load_file(file))

    http.send_weights([("a", weight), ("b", weight), ("c", weight[:1].bfloat16())], tmp_path, load)
    assert torch.equal(found["a"], weight) and torch.equal(found["b"], weight) and found["c"].dtype == torch.bfloat16
    assert not list(tmp_path.iterdir())

    def refuse(folder: Path) -> None:
        raise UserError("no")

    with pytest.raises(UserError):
        http.send_weights([("a", weight)], tmp_path, refuse)
    assert not list(tmp_path.iterdir())
