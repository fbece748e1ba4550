"""Keys of `algorithm` from the config to the numbers of a training: whose old log-probabilities, and what is made of them and of length."""

from collections.abc import Callable
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import pytest
from rl_runs import train, write_folder
from runs import lines_of, timeless
from transformers import LlamaConfig, LlamaForCausalLM

from verl.config.load import load_config
from verl.config.ppo import PPOConfig
from verl.errors import UserError
from verl.rl.roles import check_rope
from verl.rollout import Completion
from verl.rollout.native import NativeRollout

# Ratios far from 1 count in full.
WIDE: dict[str, object] = {"algorithm__clip_ratio_low": 0.9, "algorithm__clip_ratio_high": 9.0}
FROM_ROLLOUT: dict[str, object] = {"algorithm__old_logprobs": "rollout"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("settings"))


def change_answers(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, Completion], Completion]) -> None:
    """From now on the rollout gives its numbered answers changed."""
    whole = NativeRollout.generate

    def generate(self: NativeRollout, *words: Any) -> list[Completion]:
        return [change(number, completion) for number, completion in enumerate(whole(self, *words))]

    monkeypatch.setattr(NativeRollout, "generate", generate)


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rollout gives each token half of the probability that the trainer does."""

    def halved(_: int, done: Completion) -> Completion:
        assert done.logprobs is not None
        return replace(done, logprobs=[logprob - log(2) for logprob in done.logprobs])

    change_answers(monkeypatch, halved)


def step(folder: Path, output: str, **changes: object) -> dict[str, float]:
    (line,) = train(folder, output, trainer__total_training_steps=1, **changes)
    return line


def test_the_rollouts_log_probabilities_serve_as_well_as_the_trainers(folder: Path) -> None:
    changes: dict[str, object] = {"algorithm__updates_per_step": 2, "trainer__total_training_steps": 2, "optim__lr": 1e-3}
    runs = (timeless(train(folder, name, algorithm__old_logprobs=name, **changes)) for name in ("rollout", "trainer"))
    for found, expected in zip(*runs, strict=True):
        for name in ("rl/rollout_difference", "rl/largest_rollout_difference"):  # of an update's own probabilities, or of the step's
            found.pop(name)
            expected.pop(name)
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert found["rl/largest_ratio"] > 1.01, "else both would be the policy that is trained"


@pytest.mark.usefixtures("half")
def test_ratios_are_to_the_log_probabilities_that_are_asked_for(folder: Path) -> None:
    of_trainer, of_rollout = step(folder, "ratio_1", **WIDE), step(folder, "ratio_2", **WIDE, **FROM_ROLLOUT)
    assert of_trainer["rl/largest_ratio"] == 1.0
    assert of_rollout["rl/largest_ratio"] == pytest.approx(2.0, rel=1e-4)
    assert of_rollout["train/grad_norm"] == pytest.approx(2 * of_trainer["train/grad_norm"], rel=1e-3)
    assert of_trainer["rl/rollout_difference"] == pytest.approx(of_rollout["rl/rollout_difference"], rel=1e-4) == pytest.approx(log(2))


@pytest.mark.usefixtures("half")
@pytest.mark.parametrize(
    ("kind", "cap", "weight"), [("truncate", 3.0, 2.0), ("truncate", 1.5, 1.5), ("mask", 3.0, 2.0), ("mask", 1.5, 0.0)]
)
def test_importance_weights_scale_what_is_learned(kind: str, cap: float, weight: float, folder: Path) -> None:
    plain, key = step(folder, f"plain_{kind}_{cap}"), "algorithm__importance"
    found = step(folder, f"{kind}_{cap}", **{f"{key}_weights": kind, f"{key}_cap": cap})
    assert "rl/importance_weight" not in plain and plain["train/grad_norm"] > 0
    assert found["rl/importance_weight"] == pytest.approx(weight, rel=1e-4)
    assert found["train/grad_norm"] == pytest.approx(weight * plain["train/grad_norm"], rel=1e-3)


@pytest.mark.usefixtures("half")
def test_dual_clip_leaves_out_bad_answers_of_large_ratios(folder: Path) -> None:
    assert step(folder, "all", **WIDE, **FROM_ROLLOUT)["rl/clip_fraction"] == 0
    found = step(folder, "dual", **WIDE, **FROM_ROLLOUT, algorithm__dual_clip=1.5)
    rewards: dict[int, list[float]] = {}
    for answer in lines_of(folder / "dual/rollouts/step_1.jsonl"):
        rewards.setdefault(answer["number"], []).append(answer["reward"])
    bad = [reward < sum(group) / len(group) for group in rewards.values() for reward in group]
    assert 0 < sum(bad) < len(bad)
    assert found["rl/clip_fraction"] == pytest.approx(sum(bad) / len(bad))  # all answers are equally long


def test_a_rollout_that_tells_no_log_probabilities_cannot_be_the_old_policy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_answers(monkeypatch, lambda _, done: replace(done, logprobs=None))
    with pytest.raises(UserError, match="does not return log-probabilities") as caught:
        step(folder, "silent", **FROM_ROLLOUT)
    assert caught.value.where == "algorithm.old_logprobs=rollout"
    found = step(folder, "of_trainer")
    assert found["rl/largest_ratio"] == 1.0 and "rl/rollout_difference" not in found


@pytest.mark.parametrize("method", ["grpo", "ppo"])  # rewards of answers, and of tokens
def test_overlong_answers_lose_reward_and_that_is_learned(method: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of 6, 8, 10 and 12 tokens to each prompt, which are all as good."""

    def cut(number: int, done: Completion) -> Completion:
        assert done.logprobs is not None
        tokens = 6 + 2 * (number % 4)
        return replace(done, token_ids=done.token_ids[:tokens], logprobs=done.logprobs[:tokens], finish_reason="stop")

    change_answers(monkeypatch, cut)
    (folder / "one.py").write_text("def score(prompt, response, row):\n    return 1.0\n")
    keys: dict[str, object] = {"algorithm__name": method, "reward__name": folder / "one.py"}
    plain = step(folder, f"{method}_any_length", **keys)
    assert "rl/overlong_deduction" not in plain
    found = step(folder, f"{method}_overlong", **keys, algorithm__overlong_buffer_tokens=6, algorithm__overlong_penalty=2.0)
    assert found["rl/overlong_deduction"] == pytest.approx(2.0 * (0 + 2 + 4 + 6) / 6 / 4)
    assert found["train/grad_norm"] != pytest.approx(plain["train/grad_norm"], rel=0.05)
    assert found["rl/reward"] == 1.0


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_an_answer_must_not_cross_the_length_where_rotary_embeddings_change(kind: str) -> None:
    """Its first tokens would be drawn with other probabilities than they are scored with."""
    factors = {"long_factor": [2.0] * 4, "short_factor": [1.0] * 4} if kind == "longrope" else {}
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64, **factors}
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=64,
        rope_parameters=rope,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    keys = ["data.train_files=x", "model.partial_pretrain=x", "algorithm.name=grpo", "data.max_prompt_length=40"]
    check_rope(load_config(PPOConfig, [*keys, "rollout.max_new_tokens=24"]), model)
    with pytest.raises(UserError, match="longer than 64 tokens"):
        check_rope(load_config(PPOConfig, [*keys, "rollout.max_new_tokens=25"]), model)
