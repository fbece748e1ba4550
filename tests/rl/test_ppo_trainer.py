"""The trainer of reinforcement learning as a person runs it."""

import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from decided import decided
from rl_runs import train, words, write_folder
from runs import Metrics, lines_of, metrics_of, timeless
from safetensors.torch import load_file

from verl import dist
from verl.config.load import load_config
from verl.config.ppo import PPOConfig
from verl.data.prompts import Prompt
from verl.data.render import Renderer
from verl.engine import checkpoint, restore
from verl.errors import UserError
from verl.models.load import load_tokenizer
from verl.rl.roles import check_checkpoint
from verl.rl.samples import Sample, pack_samples
from verl.rollout import Sampling

ALWAYS = (
    "rl/reward rl/reward_std rl/groups_without_spread rl/response_tokens rl/truncated rl/entropy rl/kl_k1 rl/kl_k3 rl/clip_fraction "
    "rl/largest_ratio rl/rollout_difference rl/largest_rollout_difference rl/weight_version train/loss train/grad_norm train/lr "
    "perf/seconds_generate perf/seconds_score perf/seconds_logprobs perf/seconds_update_actor perf/tokens_per_second perf/step_seconds"
).split()
OF_CRITIC = "rl/explained_variance critic/loss critic/grad_norm perf/seconds_values perf/seconds_update_critic".split()
# A run in which everything has a part: a critic, several updates of a step, and a divergence whose weight adapts.
ALL_PARTS: dict[str, object] = {
    "algorithm__name": "ppo",
    "algorithm__updates_per_step": 2,
    "algorithm__kl_coef": 0.1,
    "algorithm__kl_target": 0.001,
    "algorithm__kl_horizon": 20,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("rl"))


@pytest.fixture(scope="module")
def grpo(folder: Path) -> Metrics:
    return train(folder, "grpo", data__val_files=folder / "test.jsonl", data__val_max_samples=4, trainer__test_freq=2)


@pytest.fixture(scope="module")
def ppo(folder: Path) -> Metrics:
    return train(folder, "ppo", trainer__save_freq=2, **ALL_PARTS)


def test_every_step_logs_what_is_promised(grpo: Metrics, ppo: Metrics) -> None:
    assert [line["step"] for line in grpo] == [0, 1, 2, 3, 4]
    for line in [*grpo[1:], *ppo]:
        assert {name for name in ALWAYS if name not in line} == set()
    for line in ppo:
        assert {name for name in OF_CRITIC if name not in line} == set()


def test_on_policy_the_ratio_is_one_and_the_rollout_has_the_trainers_probabilities(grpo: Metrics) -> None:
    for line in grpo[1:]:
        assert line["rl/largest_ratio"] == 1.0
        assert line["rl/rollout_difference"] < 1e-5
        assert line["rl/weight_version"] == line["step"] - 1


def test_at_any_temperature_actor_rollout_and_reference_mean_the_same_probabilities(folder: Path) -> None:
    (line,) = train(folder, "warm", rollout__temperature=0.5, trainer__total_training_steps=1)
    assert line["rl/rollout_difference"] < 1e-5 and line["rl/largest_ratio"] == 1.0
    assert abs(line["rl/kl_k3"]) < 1e-9


def test_transformers_own_generation_serves_too(folder: Path) -> None:
    lines = train(folder, "hf", rollout__name="hf", trainer__total_training_steps=2)
    assert all(line["rl/rollout_difference"] < 1e-5 for line in lines), "also after an update"
    assert all(line["train/grad_norm"] > 0 for line in lines)


def test_a_critic_may_learn_alone_at_first(folder: Path) -> None:
    changes: dict[str, object] = {"algorithm__name": "ppo", "critic__warmup_steps": 2, "trainer__total_training_steps": 3}
    lines = train(folder, "warm_up", **changes)
    assert ["train/loss" in line for line in lines] == [False, False, True]
    assert ["critic/loss" in line for line in lines] == [True, True, True]


def test_later_updates_of_a_step_are_off_policy(ppo: Metrics) -> None:
    assert all(line["rl/largest_ratio"] > 1.0 for line in ppo)


def test_validation_is_greedy_and_before_and_after(folder: Path, grpo: Metrics) -> None:
    assert [line["step"] for line in grpo if "val/vowels" in line] == [0, 2, 4]
    answers = lines_of(folder / "grpo" / "rollouts" / "validation_4.jsonl")
    assert len(answers) == 4
    assert sum(answer["reward"] for answer in answers) / 4 == pytest.approx(grpo[-1]["val/vowels"])


def test_every_answer_of_a_step_is_on_disk(folder: Path, grpo: Metrics) -> None:
    answers = lines_of(folder / "grpo" / "rollouts" / "step_3.jsonl")
    assert len(answers) == 4 * 4
    rewards = torch.tensor([answer["reward"] for answer in answers], dtype=torch.float64)
    assert float(rewards.mean()) == pytest.approx(grpo[3]["rl/reward"])
    assert float(rewards.std(correction=0)) == pytest.approx(grpo[3]["rl/reward_std"]) != 0
    assert [answer["number"] for answer in answers] == sorted([8, 9, 10, 11] * 4)
    assert all(answer["where"].startswith(str(folder / "train.jsonl")) and answer["version"] == 2 for answer in answers)


def test_the_checkpoint_loads_with_transformers_and_so_does_its_critic(folder: Path, ppo: Metrics) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    step = folder / "ppo" / "global_step_4"
    assert checkpoint.find_damage(step) is None
    assert AutoModelForCausalLM.from_pretrained(step).config.model_type == "qwen2"
    assert AutoModelForTokenClassification.from_pretrained(step / "critic").num_labels == 1


def gone_on(folder: Path, output: str) -> Metrics:
    """A run of four steps, of which another run of the trainer does the last two again."""
    for name in ("global_step_4", "rollouts/step_3.jsonl", "rollouts/step_4.jsonl"):
        path = folder / output / name
        path.rename(path.with_name(f"first_{path.name}"))
    return train(folder, output, trainer__save_freq=2, **ALL_PARTS)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {
        **load_file(directory / "model.safetensors"),
        **{f"c.{k}": v for k, v in load_file(directory / "critic" / "model.safetensors").items()},
    }


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(folder: Path, ppo: Metrics) -> None:
    train(folder, "resumed", trainer__save_freq=2, **ALL_PARTS)
    again = gone_on(folder, "resumed")
    assert timeless(again) == timeless(ppo)
    for name in ("step_3", "step_4"):
        assert (folder / "resumed/rollouts" / f"{name}.jsonl").read_text() == (folder / "ppo/rollouts" / f"{name}.jsonl").read_text()
    found, expected = weights(folder / "resumed/global_step_4"), weights(folder / "ppo/global_step_4")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("lost", [{"drawn": 0}, {"kl_coef": None}])
def test_a_resumed_run_that_has_lost_its_place_is_noticed(
    folder: Path, ppo: Metrics, lost: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = restore.read_position
    monkeypatch.setattr(restore, "read_position", lambda directory: replace(whole(directory), **lost))
    run = f"lost_{next(iter(lost))}"
    shutil.copytree(folder / "ppo", folder / run)
    assert timeless(gone_on(folder, run))[2:] != timeless(ppo)[2:]


def test_another_seed_of_the_prompts_is_refused_on_resuming(folder: Path, ppo: Metrics) -> None:
    with pytest.raises(UserError, match=r"trainer\.seed: 1 -> 2"):
        train(folder, "ppo", trainer__seed=2, trainer__total_training_steps=6, **ALL_PARTS)


NOT_FINITE = '''"""GRPO, but with a loss that is not a number in the updates that {steps} names."""

from verl.algorithms import grpo

needs_groups, needs_critic, Settings, advantages = True, False, grpo.Settings, grpo.advantages
calls = []


class Loss(grpo.Loss):
    def slope(self, batch):
        return None

    def loss(self, out, batch):
        result = super().loss(out, batch)
        calls.append(1)
        if len(calls) in {steps}:
            result.sum = result.sum * float("nan")
        return result
'''


def broken(folder: Path, steps: tuple[int, ...]) -> Path:
    path = folder / f"broken_{'_'.join(map(str, steps))}.py"
    path.write_text(NOT_FINITE.format(steps=steps))
    return path


def test_an_update_that_is_not_finite_is_not_taken_and_its_batch_is_written_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = train(folder, "nan", algorithm__name=broken(folder, (2, 3)), trainer__save_freq=1, data__max_tokens_per_micro_batch=4000)
    assert [line["train/skipped"] for line in found] == [0, 1, 1, 0]
    assert math.isnan(found[1]["train/loss"])
    states = [load_file(folder / f"nan/global_step_{n}" / "model.safetensors") for n in (1, 2, 3, 4)]
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(states[0][name], states[1][name]) and torch.equal(states[1][name], states[2][name])
    assert not torch.equal(states[2][name], states[3][name])
    assert "the actor was not updated" in capsys.readouterr().out
    batch = load_file(folder / "nan/skipped/step_2_actor_1_rank_0.safetensors")
    assert len(batch["0.trained_M"]) == len(batch["0.advantage_M"]) > 0


def test_three_in_a_row_stop_the_run(folder: Path) -> None:
    with pytest.raises(UserError, match="3 times in a row") as caught:
        train(folder, "nan3", algorithm__name=broken(folder, (2, 3, 4)), data__max_tokens_per_micro_batch=4000)
    assert caught.value.where == "step 4"


ODD_FAILS = """
def score(prompt, response, row):
    if int(row["reference"][-1]) % 2:
        raise ValueError("odd")
    return float(len(response))
"""


@pytest.fixture
def failing(folder: Path) -> Path:
    path = folder / "failing.py"
    path.write_text(ODD_FAILS)
    return path


def test_a_reward_that_fails_stops_the_run_with_the_row(folder: Path, failing: Path) -> None:
    with pytest.raises(UserError, match="ValueError: odd") as caught:
        train(folder, "stops", reward__name=failing)
    assert str(caught.value.where).startswith(f"{folder / 'train.jsonl'}:")


def test_or_counts_as_zero_and_is_reported(folder: Path, failing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = train(folder, "zero", reward__name=failing, reward__on_error="zero", trainer__total_training_steps=2)
    assert sum(line["reward/errors"] for line in found) > 0
    said = capsys.readouterr().out
    assert "rewards failed and count as 0" in said
    assert f"{folder / 'train.jsonl'}:" in said


def test_rewards_that_fail_in_validation_are_reported_too(folder: Path, failing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {"reward__name": failing, "reward__on_error": "zero", "data__val_files": folder / "test.jsonl"}
    train(folder, "zero_val", trainer__total_training_steps=1, **keys)
    said = capsys.readouterr().out
    for step in (0, 1):
        (part,) = re.findall(rf"validation after step {step}: warning: (\d+) rewards failed and count as 0 .*:\n  (.*?):\d+: ", said)
        rows = lines_of(folder / "test.jsonl")
        assert part == (str(sum(int(row["answer"][-1]) % 2 for row in rows)), str(folder / "test.jsonl"))


def test_rewards_that_are_all_equal_are_said_and_nothing_is_learned_of_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "one.py").write_text("def score(prompt, response, row):\n    return 1.0\n")
    (line,) = train(folder, "one", reward__name=folder / "one.py", trainer__total_training_steps=1)
    assert (line["rl/groups_without_spread"], line["train/grad_norm"]) == (1.0, 0.0)
    assert "the answers to each prompt have equal rewards" in capsys.readouterr().out


SOMETIMES = (
    "def score(prompt, response, row):\n    return float(int(row['reference'][-1]) % 2) * sum(c in 'aeiou' for c in response) / 99\n"
)


def test_dynamic_sampling_draws_further_prompts_for_groups_without_spread(folder: Path) -> None:
    (folder / "sometimes.py").write_text(SOMETIMES)
    found = train(
        folder,
        "dapo",
        algorithm__name="dapo",
        reward__name=folder / "sometimes.py",
        algorithm__max_refills=8,
        trainer__total_training_steps=2,
    )
    for line in found:
        answers = lines_of(folder / "dapo/rollouts" / f"step_{int(line['step'])}.jsonl")
        rewards: dict[int, set[float]] = {}
        for answer in answers:
            if answer["trained"]:
                rewards.setdefault(answer["number"], set()).add(answer["reward"])
        assert len(rewards) == 4
        assert all(len(found) > 1 for found in rewards.values())
    assert sum(line["rl/refills"] for line in found) > 0


def test_a_step_without_any_spread_takes_no_update(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "one.py").write_text("def score(prompt, response, row):\n    return 1.0\n")
    (line,) = train(folder, "dapo1", algorithm__name="dapo", reward__name=folder / "one.py", trainer__total_training_steps=1)
    assert "train/loss" not in line
    assert line["rl/refills"] == 3
    assert "no update" in capsys.readouterr().out


def test_prompts_that_are_too_long_are_an_error_or_dropped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"prompts are longer than data\.max_prompt_length=33") as caught:
        train(folder, "long", data__max_prompt_length=33)
    assert caught.value.where == "data.train_files"
    train(folder, "drop", data__max_prompt_length=33, data__overlong_prompts="drop", trainer__total_training_steps=1)
    assert "dropped as longer than data.max_prompt_length" in capsys.readouterr().out


def test_prompts_and_answers_beyond_the_models_positions_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="do not fit into the model's 2,048 positions"):
        train(folder, "positions", rollout__max_new_tokens=2000, data__max_tokens_per_micro_batch=4000)


def test_the_run_prints_its_arithmetic(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(folder, "says", trainer__total_training_steps=1, algorithm__updates_per_step=2)
    said = capsys.readouterr().out
    assert "plan: 1 step of 4 prompts × 4 answers = 16 answers; 2 updates per step with 8 answers each" in said
    assert "mapping: actor, critic, reference, reward and rollout on rank 0" in said


@pytest.mark.parametrize("name", ["dr_grpo", "rloo", "reinforce", "gspo"])
def test_every_method_runs(folder: Path, name: str) -> None:
    found = train(folder, name, algorithm__name=name, trainer__total_training_steps=2)
    assert all(line["train/grad_norm"] > 0 for line in found)


def test_with_a_learning_rate_of_zero_nothing_moves(folder: Path) -> None:
    train(folder, "still", optim__lr=0, optim__weight_decay=0.1, trainer__total_training_steps=2)
    before, after = (load_file(path / "model.safetensors") for path in (folder / "model", folder / "still/global_step_2"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(line["rl/kl_k3"] == 0 for line in metrics_of(folder / "still"))


def test_the_config_of_a_run_is_read_back(folder: Path, grpo: Metrics) -> None:
    assert load_config(PPOConfig, ["--config", str(folder / "grpo/config.yaml")]).rollout.samples_per_prompt == 4
    assert dist.world_size() == 1


def test_an_adapter_directory_is_answered_with_what_to_do(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "base", "peft_type": "LORA"}')
    with pytest.raises(UserError) as caught:
        check_checkpoint(load_config(PPOConfig, words(folder, "a", model__partial_pretrain=tmp_path)))
    assert "model.lora_adapter_path" in str(caught.value.fix)


class Lora:
    """An actor with an adapter that has learned for two steps, and what generates with its weights."""

    def __init__(self, folder: Path):
        from verl.engine.build import build
        from verl.rl.roles import score_at
        from verl.rollout import Options, load_rollout

        config = load_config(PPOConfig, words(folder, "lora", model__lora_rank=4))
        self.tokenizer = load_tokenizer(str(folder / "model"))
        self.stop_ids = Renderer(self.tokenizer).stop_ids
        dist.start()
        self.actor = build(config.model, config.optim, self.tokenizer, decided(config.model), stop_ids=self.stop_ids, seed=1)
        score_at(self.actor.engine, 1.0)
        for name, parameter in self.actor.engine.weights.trained.items():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        self.rollout = load_rollout("native", str(folder / "model"), self.tokenizer, self.stop_ids, Options())

    def difference(self) -> float:
        """The largest distance of the rollout's log-probabilities from the actor's."""
        prompt = Prompt("", "", [], Renderer(self.tokenizer).prompt([{"role": "user", "content": "How many?"}]), {})
        (done,) = self.rollout.generate([prompt.token_ids], Sampling(20, 1.0))
        sample = Sample(prompt, 0, prompt.token_ids, done.token_ids, [True] * len(done.token_ids), done.logprobs, "", done.finish_reason, 0)
        packed = pack_samples([sample], [0], 1000)
        self.actor.engine.scorer.eval()
        (out,) = self.actor.engine.score(packed.batches)
        return float((out.logprob_M - torch.tensor(done.logprobs)).abs().max())


def test_merged_weights_of_an_adapter_are_those_that_generate(folder: Path) -> None:
    try:
        lora = Lora(folder)
        assert lora.difference() > 1e-2  # what would be seen of a rollout that never got them
        lora.rollout.update_weights(lora.actor.named_weights(), 1)
        assert lora.difference() < 1e-4
    finally:
        dist.stop()


def test_the_reference_of_an_adapter_is_its_actor_without_it(folder: Path) -> None:
    from verl.engine.references import AdapterOffReference, build_reference

    try:
        lora = Lora(folder)
        lora.actor.engine.scorer.entropy = True  # type: ignore[assignment]
        settings = load_config(PPOConfig, words(folder, "lora", model__lora_rank=4)).model
        base = build_reference(settings, lora.actor)
        assert isinstance(base, AdapterOffReference)
        prompt = Renderer(lora.tokenizer).prompt([{"role": "user", "content": "How many?"}])
        sample = Sample(Prompt("", "", [], prompt, {}), 0, prompt, prompt[:9], [True] * 9, [0.0] * 9, "", "stop", 0)
        batches = pack_samples([sample], [0], 1000).batches
        second = build_reference(replace(settings, lora_rank=0), replace(lora.actor, adapted=None))
        (found,), (expected,), (adapted,) = (engine.score(batches) for engine in (base, second, lora.actor.engine))
        torch.testing.assert_close(found.logprob_M, expected.logprob_M, atol=1e-6, rtol=0)
        assert (adapted.logprob_M - expected.logprob_M).abs().max() > 1e-2
        assert adapted.entropy_M is not None and found.entropy_M is None
    finally:
        dist.stop()
