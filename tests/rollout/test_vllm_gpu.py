"""vLLM on a GPU: `python -m pytest -m vllm tests/rollout/test_vllm_gpu.py`. It prints what it measured at the end."""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT, TESTS
from runs import command
from served import STOP_IDS, tokenizer_of, vllm_server
from transformers import Qwen2Config, Qwen2ForCausalLM

from verl.demo.problems import write_problems
from verl.models.load import load_for_training
from verl.models.tiny import tiny_model, tiny_tokenizer
from verl.rollout import Options, load_rollout

pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.filterwarnings("default"), pytest.mark.timeout(400)]

CLOSE = 5e-2  # mean difference of log-probabilities in bfloat16
GIVEN_BACK = 0.3  # of the GPU's memory, where an engine may use 0.4: all but graphs and kernels
KEPT_GIB = 4  # after close: kernels, and what libraries allocate once
# Qwen2.5-0.5B's, but for the number of tokens.
SHAPE = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
Seen = Callable[[str, object], None]


@pytest.fixture
def seen(record_property: Callable[[str, object], None], request: pytest.FixtureRequest) -> Seen:
    """Notes what was measured, for the table that conftest.py prints."""

    def note(name: str, value: object) -> None:
        record_property("seen", f"{name:<44} {value:.4g}" if isinstance(value, float) else f"{name:<44} {value}")

    note(f"# {request.node.name}", "")
    return note


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The problems of the demo, and a model of a real size with random weights. In bfloat16, its log-probabilities are known to 0.01."""
    folder = tmp_path_factory.mktemp("vllm")
    train, _ = write_problems(folder / "train.jsonl", folder / "test.jsonl", 80, 20, seed=5)
    tokenizer = tiny_tokenizer(f"{p.question}\n{p.answer}" for p in train)
    demo = tiny_model(tokenizer)
    torch.manual_seed(1)
    config = {**demo.config.to_dict(), **SHAPE, "layer_types": None, "initializer_range": 0.02, "dtype": "bfloat16"}
    model = Qwen2ForCausalLM(Qwen2Config(**config)).bfloat16()
    model.generation_config = demo.generation_config
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "reward.py").write_text("def score(prompt, response, row):\n    return float(len(response) % 7)\n")
    return folder


def memory_gib() -> float:
    return torch.cuda.get_device_properties(0).total_memory / 2**30


def gpus(number: int) -> None:
    if torch.cuda.device_count() < number:
        pytest.skip(f"needs {number} GPUs")


def environment() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS), *filter(None, sys.path)])}


@pytest.mark.parametrize("processes", [1, 2])
def test_beside_the_trainer_it_sleeps_wakes_and_takes_new_weights(processes: int, folder: Path, tmp_path: Path, seen: Seen) -> None:
    gpus(processes)
    file = tmp_path / "seen.json"
    launched = processes if processes > 1 else 0
    done = command(TESTS / "ranks" / "vllm_gpu.py", folder / "model", file, processes=launched, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    for rank, found in enumerate(json.loads(file.read_text())):
        for name, value in found.items():
            seen(f"{name}, rank {rank}" if processes > 1 else name, value)
        after = [value for name, value in found.items() if name.startswith("update ")]
        assert max(found["greedy"], found["at temperature 0.7"], found["greedy after waking"], *after) < CLOSE and len(after) == 3
        assert min(found["scored at another"], found["old weights"]) > 2 * CLOSE  # the negative controls
        assert found["GiB free asleep"] - found["GiB free awake"] > GIVEN_BACK * memory_gib()
        assert found["GiB kept after close"] < KEPT_GIB
    assert "CUDA Error" not in done.stderr + done.stdout


def test_a_server_takes_new_weights_and_gives_memory_back(folder: Path, tmp_path: Path, seen: Seen) -> None:
    from ranks.vllm_gpu import WARM, free_gib, mean_difference, move, prompts, timed

    path = folder / "model"
    words = ["--dtype", "bfloat16", "--logprobs-mode", "processed_logprobs", "--enable-sleep-mode"]
    words += ["--gpu-memory-utilization", "0.4", "--max-num-seqs", "64"]
    model = load_for_training(str(path), device="cuda", dtype=torch.bfloat16).model
    with vllm_server(path, tmp_path / "log", *words, VLLM_SERVER_DEV_MODE="1", **environment()) as url:
        rollout = load_rollout("vllm", str(path), tokenizer_of(path), STOP_IDS, Options(url=url))
        seen("engine", rollout.describe())
        differences = [mean_difference(model, rollout.generate(prompts(), WARM), 0.7)]
        for version in (1, 2):
            move(model, version)
            stale = mean_difference(model, rollout.generate(prompts(), WARM), 0.7)
            seconds, _ = timed(partial(rollout.update_weights, model.named_parameters(), version))
            differences.append(mean_difference(model, rollout.generate(prompts(), WARM), 0.7))
        awake = free_gib()
        rollout.sleep()
        asleep = free_gib()
        differences.append(mean_difference(model, rollout.generate(prompts(), WARM), 0.7))
        seen("before, after two updates, after waking", " ".join(f"{value:.4f}" for value in differences))
        seen("old weights", stale)
        seen("seconds to update", seconds)
        seen("GiB free awake, asleep", f"{awake:.1f} {asleep:.1f}")
        assert max(differences) < CLOSE < stale / 2
        assert asleep - awake > GIVEN_BACK * memory_gib()


@pytest.mark.parametrize("adapters", [False, True])
def test_what_grpo_learns_reaches_it(adapters: bool, folder: Path, tmp_path: Path, seen: Seen) -> None:
    processes = min(2, torch.cuda.device_count())
    settings = f"""data.train_files={folder}/train.jsonl model.partial_pretrain={folder}/model algorithm.name=grpo
        reward.name={folder}/reward.py data.prompts_per_step=8 rollout.samples_per_prompt=8 data.max_prompt_length=100
        rollout.name=vllm rollout.gpu_memory_utilization=0.4 rollout.temperature=0.8 rollout.max_new_tokens=64 rollout.max_sequences=64
        optim.lr={1e-3 if adapters else 1e-5} model.lora_rank={8 if adapters else 0}
        trainer.total_training_steps=4 trainer.save_freq=never trainer.default_local_dir={tmp_path}/run"""
    launched = processes if processes > 1 else 0
    done = command("-m", "verl.trainer.ppo_trainer", *settings.split(), processes=launched, env=environment(), timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    steps: list[dict[str, Any]] = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "rl/weight_version" in step]
    seen("processes", processes)
    for name in ("rl/rollout_difference", "rl/largest_rollout_difference", "train/grad_norm", "perf/step_seconds"):
        seen(name, " ".join(f"{step[name]:.4f}" for step in steps))
    assert [step["rl/weight_version"] for step in steps] == [0, 1, 2, 3]
    assert all(step["rl/rollout_difference"] < CLOSE and step["train/grad_norm"] > 0 for step in steps)
    assert "CUDA Error" not in done.stderr + done.stdout
