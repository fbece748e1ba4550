"""The client of an SGLang server against a stand-in that speaks as SGLang 0.5.23 does, with a small model behind it."""

import time
from pathlib import Path
from typing import Any

import pytest
from served import PROMPTS, STOP_IDS, largest_difference, move, server, tokenizer_of, trained_model, write_served_model
from sglang_stand_in import StandIn

from verl.errors import UserError
from verl.rollout import Completion, Options, Rollout, Sampling, load_rollout
from verl.rollout.sglang import SglangServer

GREEDY = Sampling(8)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served_model(tmp_path_factory.mktemp("served") / "model")


def connect(path: Path, url: str | None, **options: Any) -> Rollout:
    return load_rollout("sglang", str(path), tokenizer_of(path), STOP_IDS, Options(url=url, **options))


def test_answers_and_logprobs_come_as_token_ids(path: Path) -> None:
    stand_in = StandIn(path, enable_deterministic_inference=True)
    with server(stand_in.answer) as url:
        rollout, oracle = connect(path, url), load_rollout("hf", str(path), tokenizer_of(path), STOP_IDS)
        expected, found = oracle.generate(PROMPTS, GREEDY), rollout.generate(PROMPTS, GREEDY)
        assert [(c.token_ids, c.finish_reason) for c in found] == [(c.token_ids, c.finish_reason) for c in expected]
        assert largest_difference(trained_model(path), PROMPTS, found, temperature=1.0) < 1e-5
        assert rollout.stop_ids == [1, 0] and rollout.positions == oracle.positions
        assert rollout.describe() == f"SGLang 0.5.23 at {url}, {path}"

        warm = Sampling(8, temperature=0.7, n=2)
        all_at_once = rollout.generate(PROMPTS, warm, seeds=[7, 8, 9, 10])
        assert all_at_once[4:6] == rollout.generate([PROMPTS[2]], warm, seeds=[9])
        assert largest_difference(trained_model(path), PROMPTS, all_at_once, temperature=0.7) < 1e-5
        rollout.generate(PROMPTS[:1], Sampling(1, temperature=1.0, top_k=5, top_p=0.9))
        assert (stand_in.requests[-1]["sampling_params"]["top_k"], stand_in.requests[-1]["sampling_params"]["top_p"]) == (5, 0.9)


def test_a_server_without_deterministic_inference_is_given_no_seeds(path: Path) -> None:
    """Its other samplers refuse them."""
    stand_in = StandIn(path)
    with server(stand_in.answer) as url:
        connect(path, url).generate(PROMPTS, Sampling(2, temperature=1.0))
    assert not any("sampling_seed" in request["sampling_params"] for request in stand_in.requests)


def test_after_an_update_it_answers_with_the_new_weights(path: Path) -> None:
    stand_in, model = StandIn(path, enable_deterministic_inference=True), trained_model(path)
    with server(stand_in.answer) as url:
        rollout, warm = connect(path, url), Sampling(8, temperature=0.7)
        move(model)
        assert largest_difference(model, PROMPTS, rollout.generate(PROMPTS, warm), temperature=0.7) > 0.1  # the negative control
        rollout.update_weights(model.named_parameters(), 3)
        found = rollout.generate(PROMPTS, warm)
        assert largest_difference(model, PROMPTS, found, temperature=0.7) < 1e-5
        assert {c.version for c in found} == {3} and stand_in.about["weight_version"] == "3"
        assert not Path(stand_in.about["model_path"]).exists()
        assert connect(path, url).generate(PROMPTS, GREEDY)  # though the server's model now has another name
        with pytest.raises(UserError, match="400: Failed to get weights iterator"):
            rollout.update_weights([], 4)


def test_memory_is_given_back_only_by_a_server_that_can(path: Path) -> None:
    memory = ["/release_memory_occupation", "/resume_memory_occupation"]
    for can, expected in ((True, memory), (False, [])):
        stand_in = StandIn(path, enable_memory_saver=can)
        with server(stand_in.answer) as url:
            rollout = connect(path, url)
            rollout.sleep()
            rollout.sleep()
            rollout.generate(PROMPTS[:1], GREEDY)  # who generates wakes it
            rollout.wake()
        assert [call for call in stand_in.calls if call in memory] == expected


def test_older_releases_describe_themselves_elsewhere(path: Path) -> None:
    stand_in = StandIn(path, context_length=99)

    def answer(place: str, body: Any) -> tuple[int, Any]:
        return stand_in.answer(place.replace("/get_", "/"), body) if place.startswith("/get_") else (404, {"detail": "Not Found"})

    with server(answer) as url:
        assert connect(path, url).positions == 99


def test_an_answer_without_a_token_is_an_answer(path: Path) -> None:
    stand_in = StandIn(path)
    meta = {"finish_reason": {"type": "stop"}, "output_token_logprobs": []}
    stand_in.generate = lambda body: (200, {"text": "", "meta_info": meta})
    with server(stand_in.answer) as url:
        assert connect(path, url).generate(PROMPTS[:1], GREEDY) == [Completion([], "stop", [])]


def test_what_is_wrong_with_a_server_is_said(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)server of its own.*launch_server"):
        connect(path, None)
    with server(StandIn(path).answer) as url, pytest.raises(UserError, match="wanted"):
        connect(write_served_model(tmp_path / "other"), url)
    with pytest.raises(UserError, match="cannot be reached"):
        connect(path, "http://127.0.0.1:9")
    stand_in = StandIn(path)
    for meta, message in (
        ({"finish_reason": {"type": "abort", "message": "out of memory"}}, "out of memory"),
        ({"finish_reason": {"type": "length"}}, "without token ids"),
    ):
        stand_in.generate = lambda body, meta=meta: (200, {"text": "?", "meta_info": meta})  # type: ignore[misc]
        with server(stand_in.answer) as url, pytest.raises(UserError, match=message):
            connect(path, url).generate(PROMPTS, GREEDY)


def test_a_server_that_hangs_is_not_waited_for_without_end(path: Path) -> None:
    stand_in = StandIn(path)

    def answer(place: str, body: Any) -> tuple[int, Any]:
        if place == "/generate":
            time.sleep(2)
        return stand_in.answer(place, body)

    with server(answer) as url, pytest.raises(UserError, match="no answer within"):
        SglangServer(str(path), STOP_IDS, Options(url=url), work_seconds=0.2).generate(PROMPTS, GREEDY)
