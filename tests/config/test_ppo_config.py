"""Wrong settings of reinforcement learning are refused before anything starts, with the key and what to do."""

import pytest

from verl.config.load import load_config
from verl.config.ppo import MappingConfig, PPOConfig, longest_sample
from verl.errors import UserError
from verl.rl.mapping import choose_layout
from verl.rl.method import load_method

NEEDED = ("data.train_files=train.jsonl", "model.partial_pretrain=model")


def load(*words: str) -> PPOConfig:
    return load_config(PPOConfig, [*NEEDED, *words])


def error_of(*words: str) -> UserError:
    with pytest.raises(UserError) as caught:
        load_method(load(*words))
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize(
    ("words", "where", "found"),
    [
        (["algorithm.kl_coef=-0.1"], "algorithm.kl_coef", "found -0.1"),
        (["rollout.samples_per_prompt=1"], "rollout.samples_per_prompt=1", "grpo compares the answers to one prompt"),
        (["algorithm.name=rloo", "rollout.samples_per_prompt=1"], "rollout.samples_per_prompt=1", "rloo compares"),
        (
            ["algorithm.name=reinforce", "algorithm.dynamic_sampling=true", "rollout.samples_per_prompt=1"],
            "algorithm.dynamic_sampling=true with rollout.samples_per_prompt=1",
            "every prompt would be excluded",
        ),
        (["rollout.samples_per_prompt=0"], "rollout.samples_per_prompt", "found 0"),
        (["data.prompts_per_step=64", "algorithm.updates_per_step=3"], "algorithm.updates_per_step", "64 prompts cannot be split into 3"),
        (["data.max_tokens_per_micro_batch=100"], "data.max_tokens_per_micro_batch", "100 tokens cannot hold a prompt of 512"),
        (["rollout.temperature=0"], "rollout.temperature", "0.0 is not positive"),
        (["algorithm.name=ppo", "algorithm.gamma=1.5"], "algorithm.gamma", "1.5 is not a share"),
        (["algorithm.kl_estimator=k4"], "algorithm.kl_estimator", "found 'k4'"),
        (
            ["algorithm.kl_coef=0.1", "algorithm.kl_estimator=k1"],
            "algorithm.kl_estimator=k1 with algorithm.kl_in=loss",
            "the gradient of k1 in the loss is zero",
        ),
        (["algorithm.kl_coef=0.1", "algorithm.kl_target=0"], "algorithm.kl_target", "cannot be held at 0"),
        (["algorithm.kl_target=0.1"], "algorithm.kl_target with algorithm.kl_coef=0", "cannot start from 0"),
        (["algorithm.kl_coef=0.1", "algorithm.keep_reference=false"], "algorithm.kl_coef with algorithm.keep_reference=false", "reference"),
        (["algorithm.name=gppo"], "algorithm.name", "no algorithms named 'gppo'"),
        (["algorithm.name=sft"], "algorithm.name=sft", "is no method of reinforcement learning"),
        (["reward.on_error=skip"], "reward.on_error", "found 'skip'"),
        (["reward.weights=[.nan]"], "reward.weights", "found nan"),
        (["reward_model.weight=.inf"], "reward_model.weight", "found inf"),
        (["reward.weights=[1,2]"], "reward.weights", "2 weights for 1 rewards"),
        (["reward.name=null"], "reward.name", "neither a reward nor a reward model"),
        (["mapping.rollout=first"], "mapping.rollout", "found 'first'"),
        (["rollout.name=vllm", "mapping.rollout=[1]"], "mapping.rollout", "on all ranks that train"),
        (["mapping.rollout=[]"], "mapping.rollout", "found []"),
        (["model.lora_rank=4", "model.lora_dropout=0.1"], "model.lora_dropout", "dropout is off in reinforcement learning"),
        (["model.context_parallel_size=2"], "model.context_parallel_size", "context parallelism is not supported"),
        (["critic.optim.lr=-1"], "critic.optim.lr", "found -1"),
        (["data.overlong_prompts=cut"], "data.overlong_prompts", "found 'cut'"),
        (["optim.lrr=1"], None, "unknown key 'optim.lrr'"),
    ],
)
def test_a_wrong_setting_is_named_with_what_to_do(words: list[str], where: str | None, found: str) -> None:
    error = error_of(*words)
    assert error.where == where
    assert found in error.what


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("data.train_batch_size=64", "data.prompts_per_step"),
        ("data.max_response_length=64", "rollout.max_new_tokens"),
        ("algorithm.adv_estimator=grpo", "algorithm.name"),
        ("num_generations=8", "rollout.samples_per_prompt"),
    ],
)
def test_what_other_trainers_call_a_key_is_answered_with_its_name_here(written: str, meant: str) -> None:
    assert error_of(written).fix == f"did you mean {meant}?"


def test_one_answer_to_a_prompt_is_enough_where_none_are_compared() -> None:
    for name in ("ppo", "reinforce"):
        assert load_method(load(f"algorithm.name={name}", "rollout.samples_per_prompt=1")).settings.name == name


def test_a_method_has_defaults_of_its_own() -> None:
    grpo, dapo = load_method(load()).settings, load_method(load("algorithm.name=dapo", "algorithm.clip_ratio_high=0.4")).settings
    assert (grpo.loss_aggregation, grpo.clip_ratio_high, grpo.dynamic_sampling) == ("sequence-mean", 0.2, False)
    assert (dapo.loss_aggregation, dapo.clip_ratio_high, dapo.dynamic_sampling) == ("token-mean", 0.4, True)


def test_the_longest_answer_with_its_prompt_is_what_a_micro_batch_must_hold() -> None:
    config = load("data.max_prompt_length=100", "rollout.max_new_tokens=50", "data.max_tokens_per_micro_batch=150")
    assert longest_sample(config) == 150


def layout(processes: int, **roles: object) -> object:
    return choose_layout(MappingConfig(**roles), processes)


def test_all_roles_are_on_all_ranks_unless_said_otherwise() -> None:
    found = choose_layout(MappingConfig(), 4)
    assert (found.training, found.is_split) == ([0, 1, 2, 3], False)
    assert found.describe() == "mapping: actor, critic, reference, reward and rollout on ranks 0-3"


def test_the_rollout_may_have_ranks_of_its_own() -> None:
    training: dict[str, object] = {role: [0, 1] for role in ("actor", "critic", "reference", "reward")}
    found = choose_layout(MappingConfig(**training, rollout=[2, 3]), 4)
    assert found.is_split
    assert found.describe() == "mapping: actor, critic, reference, reward on ranks 0-1; rollout on ranks 2-3"


@pytest.mark.parametrize(
    ("processes", "roles", "where", "found"),
    [
        (2, {"actor": [0]}, "mapping.critic", "critic is on ranks 0-1, but actor on rank 0"),
        (2, {"rollout": [2]}, "mapping.rollout", "there is no rank 2"),
        (2, {"rollout": [1, 1]}, "mapping.rollout", "named twice"),
        (
            2,
            {"actor": [1], "critic": [1], "reference": [1], "reward": [1], "rollout": [0]},
            "mapping.rollout",
            "rank 0, which logs and saves, would only generate",
        ),
        (2, {"rollout": [1]}, "mapping.rollout", "rank 1 would both train and generate"),
        (
            3,
            {"actor": [0], "critic": [0], "reference": [0], "reward": [0], "rollout": [1]},
            "mapping",
            "rank 2 would have no role",
        ),
    ],
)
def test_a_mapping_that_cannot_be_is_refused(processes: int, roles: dict[str, object], where: str, found: str) -> None:
    with pytest.raises(UserError) as caught:
        layout(processes, **roles)
    assert caught.value.where == where
    assert found in caught.value.what
