"""vLLM in this process, on a CPU: `make test-vllm`. What needs no vLLM runs with all other tests."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from places import ROOT, TESTS
from runs import command
from served import PROMPTS, STOP_IDS, largest_difference, move, tokenizer_of, trained_model, write_served_model
from tiny import write_problems_and_model

from verl.errors import UserError
from verl.rollout import Options, Sampling, load_rollout, share
from verl.rollout import vllm as rollout_vllm
from verl.rollout._requests import answer_seed
from verl.rollout.vllm import VllmRollout

GREEDY = Sampling(12)
WARM = Sampling(12, temperature=0.7, n=2)
CLOSE = 1e-4  # measured: 4e-6

# vLLM and what it imports warn as they like.
real = [pytest.mark.vllm, pytest.mark.filterwarnings("default"), pytest.mark.timeout(400)]


def marked(test: Any) -> Any:
    for mark in real:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served_model(tmp_path_factory.mktemp("served") / "model")


@marked
def test_an_output_layer_of_its_own_is_updated_too(tmp_path: Path) -> None:
    path = write_served_model(tmp_path / "model", tied=False)
    model = trained_model(path)
    rollout = share("vllm", model, str(path), tokenizer_of(path), STOP_IDS, Options(max_positions=64))
    move(model)
    rollout.update_weights(model.named_parameters(), 1)
    assert largest_difference(model, PROMPTS, rollout.generate(PROMPTS, WARM), temperature=0.7) < CLOSE
    rollout.close()


@pytest.fixture(scope="module")
def engine(path: Path) -> Iterator[VllmRollout]:
    engine = load_rollout("vllm", str(path), tokenizer_of(path), STOP_IDS, Options(max_positions=512))
    assert isinstance(engine, VllmRollout)
    yield engine
    engine.close()


@pytest.fixture
def rollout(path: Path, engine: VllmRollout) -> VllmRollout:
    """With the weights of the checkpoint."""
    if engine.generate([[5]], Sampling(1))[0].version > 0:
        engine.update_weights(trained_model(path).named_parameters(), 0)
    return engine


@marked
def test_greedy_answers_are_those_of_transformers(path: Path, rollout: VllmRollout) -> None:
    oracle = load_rollout("hf", str(path), tokenizer_of(path), STOP_IDS)
    assert rollout.stop_ids == oracle.stop_ids and rollout.positions == 512
    expected, found = oracle.generate(PROMPTS, GREEDY), rollout.generate(PROMPTS, GREEDY)
    assert [(c.token_ids, c.finish_reason) for c in found] == [(c.token_ids, c.finish_reason) for c in expected]
    assert "vLLM" in rollout.describe() and "float32" in rollout.describe()


@marked
def test_logprobs_are_the_trainers_and_after_an_update_the_new_weights(path: Path, rollout: VllmRollout) -> None:
    model = trained_model(path)
    for sampling in (GREEDY, WARM):
        found = rollout.generate(PROMPTS, sampling)
        assert largest_difference(model, PROMPTS, found, temperature=sampling.temperature or 1.0) < CLOSE
        assert {c.version for c in found} == {0}
    assert largest_difference(model, PROMPTS, found, temperature=1.0) > 0.05  # the negative control of the temperature
    move(model)
    assert largest_difference(model, PROMPTS, rollout.generate(PROMPTS, WARM), temperature=0.7) > 0.5  # that of the update
    rollout.update_weights(model.named_parameters(), version=3)
    found = rollout.generate(PROMPTS, WARM)
    assert largest_difference(model, PROMPTS, found, temperature=0.7) < CLOSE
    assert {c.version for c in found} == {3}


@marked
def test_weights_may_come_in_any_pieces(path: Path, rollout: VllmRollout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_vllm, "BUCKET_BYTES", 200_000)
    model = trained_model(path)
    for version in (1, 2):
        move(model)
        rollout.update_weights(reversed(list(model.named_parameters())), version)
        assert largest_difference(model, PROMPTS, rollout.generate(PROMPTS, WARM), temperature=0.7) < CLOSE
    if "vLLM 0.26" in rollout.describe():
        return  # which was seen to keep no copy of the output layer
    # The negative control: the output layer is tied to the embedding, and is given no weights under its own name.
    monkeypatch.setattr(rollout_vllm, "with_tied", lambda named_tensors, tied: named_tensors)
    move(model)
    rollout.update_weights(model.named_parameters(), 3)
    assert largest_difference(model, PROMPTS, rollout.generate(PROMPTS, WARM), temperature=0.7) > 0.1


@marked
def test_it_tells_how_far_unfinished_answers_are_and_abandons_them(path: Path, rollout: VllmRollout) -> None:
    expected = [answer.token_ids for answer in rollout.generate(PROMPTS, WARM)]
    stream, most = rollout.stream(PROMPTS, replace(WARM, progress=True)), 0
    while most < 5:
        finished = dict(next(stream))
        assert all(expected[number] == answer.token_ids for number, answer in finished.items())
        told = rollout.unfinished_tokens()
        assert all(tokens <= len(expected[number]) for number, tokens in told.items())
        most = max(told.values())
    stream.close()  # type: ignore[attr-defined]
    rollout.update_weights(trained_model(path).named_parameters(), 0)  # which needs that no answer holds keys and values
    assert [answer.token_ids for answer in rollout.generate(PROMPTS, WARM)] == expected


@marked
def test_after_an_update_no_prompt_is_remembered(path: Path, rollout: VllmRollout, monkeypatch: pytest.MonkeyPatch) -> None:
    model, long_prompt = trained_model(path), [[7 + i % 90 for i in range(300)]]  # longer than a block of vLLM's cache
    rollout.generate(long_prompt, GREEDY)
    move(model)
    rollout.update_weights(model.named_parameters(), 1)
    assert largest_difference(model, long_prompt, rollout.generate(long_prompt, GREEDY), temperature=1.0) < CLOSE
    monkeypatch.setattr(rollout._llm, "reset_prefix_cache", lambda: True)  # the negative control
    move(model)
    rollout.update_weights(model.named_parameters(), 2)
    assert largest_difference(model, long_prompt, rollout.generate(long_prompt, GREEDY), temperature=1.0) > 0.01


@marked
def test_draws_depend_on_seeds_alone_and_change_no_other_random_numbers(rollout: VllmRollout) -> None:
    states: list[Any] = [torch.get_rng_state(), str(np.random.get_state()), random.getstate()]
    all_at_once = rollout.generate(PROMPTS, WARM, seeds=[7, 8, 9, 10])
    alone = rollout.generate([PROMPTS[2]], WARM, seeds=[9])
    assert [c.token_ids for c in all_at_once[4:6]] == [c.token_ids for c in alone]
    assert alone[0].token_ids != alone[1].token_ids
    assert rollout.generate([PROMPTS[2]], WARM, seeds=[10])[0].token_ids != alone[0].token_ids
    assert rollout.generate([PROMPTS[2]], Sampling(12, temperature=0.7, n=2, seed=2), seeds=[9])[0].token_ids != alone[0].token_ids
    assert torch.equal(states[0], torch.get_rng_state()) and states[1:] == [str(np.random.get_state()), random.getstate()]


@marked
def test_an_answer_ends_with_a_stop_token_or_is_cut(rollout: VllmRollout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "stop_ids", list(range(0, 280, 4)))
    found = rollout.generate(PROMPTS * 8, Sampling(6, temperature=1.0, n=2))
    for completion in found:
        stopped = completion.token_ids[-1] in rollout.stop_ids
        assert completion.finish_reason == ("stop" if stopped else "length")
        assert not set(completion.token_ids[:-1]) & set(rollout.stop_ids)
        assert len(completion.token_ids) == len(completion.logprobs or [])
    assert {completion.finish_reason for completion in found} == {"stop", "length"}


@marked
def test_cut_draws_are_among_the_likeliest_and_come_without_logprobs(rollout: VllmRollout) -> None:
    likeliest = {c.token_ids[0] for c in rollout.generate(PROMPTS[:1], Sampling(1, temperature=1.0, top_k=3, n=64))}
    assert rollout.generate(PROMPTS[:1], Sampling(1))[0].token_ids[0] in likeliest and 1 < len(likeliest) <= 3
    assert len({c.token_ids[0] for c in rollout.generate(PROMPTS[:1], Sampling(1, temperature=1.0, n=64))}) > 3
    assert all(c.logprobs is None for c in rollout.generate(PROMPTS, Sampling(2, temperature=1.0, top_p=0.5)))


@marked
def test_who_leaves_early_leaves_nothing_behind(rollout: VllmRollout) -> None:
    answers: Any = rollout.stream(PROMPTS * 4, GREEDY)
    next(answers)
    answers.close()
    assert not rollout._llm.llm_engine.has_unfinished_requests()
    assert len(rollout.generate(PROMPTS, GREEDY)) == len(PROMPTS)


@marked
def test_what_does_not_fit_is_said(path: Path, rollout: VllmRollout) -> None:
    with pytest.raises(UserError, match="512 positions"):
        rollout.generate([[5] * 505], GREEDY)
    with pytest.raises(UserError, match="vLLM cannot start"):
        VllmRollout(str(path), STOP_IDS, Options(max_positions=100_000))


@marked
def test_under_torchrun_each_process_has_an_engine_of_its_own(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "differences.json"
    env = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, TESTS)))}
    done = command(TESTS / "ranks" / "vllm_engine.py", path, file, processes=2, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for before, stale, after in json.loads(file.read_text()):
        assert before < CLOSE and after < CLOSE and stale > 0.1


@marked
def test_what_the_trainer_learns_reaches_vllm_adapters_too(tmp_path: Path) -> None:
    """I6 in a run: the log-probabilities of vLLM's answers are the trainer's, step after step, though each step moves the weights."""
    write_problems_and_model(tmp_path, narrow=False)  # narrow heads, of 16, are too narrow for vLLM on some processors
    (tmp_path / "reward.py").write_text("def score(prompt, response, row):\n    return float(len(response) % 7)\n")
    words = f"""data.train_files={tmp_path}/train.jsonl model.partial_pretrain={tmp_path}/model model.lora_rank=4
        reward.name={tmp_path}/reward.py data.prompts_per_step=4 rollout.samples_per_prompt=4 data.max_prompt_length=100
        rollout.name=vllm rollout.temperature=0.8 rollout.max_new_tokens=12 optim.lr=1e-2
        trainer.total_training_steps=4 trainer.save_freq=never trainer.default_local_dir={tmp_path}/run"""
    command = [sys.executable, "-m", "verl.trainer.ppo_trainer", *words.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "rl/weight_version" in step]
    assert [step["rl/weight_version"] for step in steps] == [0, 1, 2, 3]
    assert all(step["rl/largest_rollout_difference"] < CLOSE and step["train/grad_norm"] > 0.01 for step in steps)


class Recorder:
    """Stands in for vLLM where the order of calls is the question."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.model_config = SimpleNamespace(max_model_len=64)
        core = SimpleNamespace(shutdown=lambda: self.calls.append("shutdown"))
        self.llm_engine = SimpleNamespace(abort_request=lambda names: None, engine_core=core)
        self.apply_model = lambda function: self.calls.append(f"apply_model {function.__name__}")

    def __getattr__(self, name: str) -> Any:
        return lambda *words, **named: self.calls.append(" ".join([name, *map(str, named.values())])) or True


def recorded(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[VllmRollout, Recorder]:
    """On a GPU, as it seems."""
    recorder = Recorder()
    monkeypatch.setattr(rollout_vllm, "_start", lambda path, options: recorder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: recorder.calls.append("empty_cache"))  # vLLM needs what PyTorch keeps
    rollout = VllmRollout(str(path), STOP_IDS, Options())
    recorder.calls.clear()
    return rollout, recorder


def test_asleep_it_wakes_for_weights_first_and_for_the_rest_when_it_generates(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer's weights, vLLM's and its keys and values are not all in the GPU's memory before it must be."""
    rollout, recorder = recorded(path, monkeypatch)
    rollout.sleep()
    rollout.sleep()
    rollout.update_weights([("a", torch.zeros(1))], 1)
    assert recorder.calls == [
        "sleep 1",
        "empty_cache",
        "wake_up ['weights']",
        "start_weight_update",
        "update_weights",
        "finish_weight_update",
        "reset_prefix_cache",
    ]
    recorder.calls.clear()
    assert rollout.generate([], GREEDY) == []
    rollout.wake()
    assert recorder.calls == ["empty_cache", "wake_up ['kv_cache']"]


def test_asleep_it_wakes_before_it_is_closed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's allocator cannot free what it has freed to sleep; the error that it prints keeps it from freeing the rest."""
    state = SimpleNamespace(destroy_model_parallel=lambda: None)
    for name, module in {"vllm": state, "vllm.distributed": state, "vllm.distributed.parallel_state": state}.items():
        monkeypatch.setitem(sys.modules, name, module)
    rollout, recorder = recorded(path, monkeypatch)
    rollout.sleep()
    rollout.update_weights([], 1)
    rollout.close()
    assert recorder.calls[-5:] == ["empty_cache", "wake_up ['kv_cache']", "apply_model _free", "shutdown", "empty_cache"]


class Attention(torch.nn.Module):
    """A layer of vLLM: keys and values beside the weights, views of one memory, and in some models a list of them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(64, 64))
        memory = torch.zeros(2, 512)
        self.kv_cache: Any = [memory.view(4, 256), [memory[1]]]
        self.frequencies: torch.Tensor
        self.register_buffer("frequencies", torch.ones(8))


def test_what_still_refers_to_a_closed_engines_model_keeps_no_memory() -> None:
    """vLLM's model outlives its engine. With it, the GPU kept 55 GiB of keys and values."""
    layer, hooks = Attention(), []
    model = torch.nn.Sequential(torch.nn.Sequential(layer), Attention())
    model._bytecode_hook_handle = SimpleNamespace(remove=lambda: hooks.append("removed"))  # type: ignore[assignment]
    model[1].kv_cache = torch.zeros(16)
    kept = [*model.parameters(), layer.kv_cache[0], layer.kv_cache[1][0], model[1].kv_cache]
    assert all(tensor.untyped_storage().nbytes() > 0 for tensor in kept)
    rollout_vllm._free(model)
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in kept) and hooks == ["removed"]
    assert torch.equal(layer.frequencies, torch.ones(8))  # other engines may share it


@marked
def test_a_closed_engine_gives_its_memory_back(path: Path) -> None:
    """What is left of its model after an update, in which vLLM ties the layers to the functions that load them, has no memory."""
    model, layers = trained_model(path), []
    rollout: Any = share("vllm", model, str(path), tokenizer_of(path), STOP_IDS, Options(max_positions=64))
    rollout.update_weights(model.named_parameters(), 1)
    rollout._llm.apply_model(lambda model: layers.extend(model.modules()))
    weights = [parameter for layer in layers for parameter in layer.parameters(recurse=False)]
    caches = [cache for layer in layers for cache in rollout_vllm._tensors(getattr(layer, "kv_cache", None))]
    assert sum(tensor.untyped_storage().nbytes() for tensor in caches) >= rollout_vllm.CPU_CACHE_BYTES // 2 and weights
    rollout.close()
    rollout.close()
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in [*weights, *caches])
    assert all(parameter.untyped_storage().nbytes() > 0 for parameter in model.parameters())  # the trainer's


def test_a_prefix_cache_that_keeps_old_keys_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout, recorder = recorded(path, monkeypatch)
    monkeypatch.setattr(recorder, "reset_prefix_cache", lambda: False, raising=False)
    with pytest.raises(RuntimeError, match="old weights"):
        rollout.update_weights([], 1)


def test_seeds_are_all_different() -> None:
    asked = product(range(4), (0, 1, -1, 2**40), range(4))
    seeds = {answer_seed(Sampling(1, seed=seed), prompt_seed, answer) for seed, prompt_seed, answer in asked}
    assert len(seeds) == 64 and min(seeds) >= 0 and max(seeds) < 2**63


def test_the_release_that_keeps_old_weights_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen with 0.28.0 on a CPU: after an update, log-probabilities were 0.5 from the trainer's."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=None, __version__="0.28.0"))
    monkeypatch.setitem(sys.modules, "verl.rollout._vllm_weights", SimpleNamespace(BACKEND="none"))
    monkeypatch.setattr(rollout_vllm.dist, "start", lambda: None)
    with pytest.raises(UserError, match=r"tied to the embedding(?s:.)*another one"):
        load_rollout("vllm", str(path), tokenizer_of(path), STOP_IDS)


def test_an_adapter_or_a_missing_vllm_is_said_with_the_way_out(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="verl export"):
        load_rollout("vllm", str(tmp_path), tokenizer_of(path), STOP_IDS)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"verl\[vllm\]"):
        load_rollout("vllm", str(path), tokenizer_of(path), STOP_IDS)
