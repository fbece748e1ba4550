"""Keys without effect are refused: those of a teacher, an environment or an agent that there is not, and of margins that are not read."""

from typing import Any

import pytest

from verl.config.load import load_config
from verl.config.pairs import RewardTrainerConfig
from verl.config.ppo import PPOConfig
from verl.config.sft import SFTConfig
from verl.errors import UserError
from verl.trainer.preference import load_preference

ROWS = ["data.train_files=rows.jsonl", "model.partial_pretrain=model"]
WITHOUT = {
    "teacher.weight=0.3": "teacher.partial_pretrain",
    "teacher.top_k=3": "teacher.partial_pretrain",
    "environment.max_turns=3": "environment.name",
    "environment.on_error=stop": "environment.name",
    "agent.seconds=5": "agent.program",
}


@pytest.mark.parametrize("word", WITHOUT)
def test_a_key_of_what_is_not_there_is_refused(word: str) -> None:
    with pytest.raises(UserError, match=f"{word.partition('=')[0]}: has no effect without {WITHOUT[word]}"):
        load_config(PPOConfig, [*ROWS, "reward.name=exact", word])


@pytest.mark.parametrize(("kind", "words"), [(SFTConfig, []), (PPOConfig, ["reward.name=exact"])])
def test_defaults_are_no_keys_without_effect(kind: Any, words: list[str]) -> None:
    load_config(kind, [*ROWS, *words, "teacher.weight=1.0"])


def test_the_share_of_the_mixture_is_for_mixtures() -> None:
    with pytest.raises(UserError, match=r"teacher.beta: has no effect with teacher.divergence=forward"):
        load_config(SFTConfig, [*ROWS, "teacher.partial_pretrain=large", "teacher.beta=0.3"])
    load_config(SFTConfig, [*ROWS, "teacher.partial_pretrain=large", "teacher.beta=0.3", "teacher.divergence=mix"])


def test_weights_of_margins_need_margins() -> None:
    words = [*ROWS, "algorithm.name=odpo", "algorithm.margin_weight=3"]
    with pytest.raises(UserError, match=r"algorithm.margin_weight: has no effect without data.margin_key"):
        load_preference(load_config(RewardTrainerConfig, words))
    load_preference(load_config(RewardTrainerConfig, [*words, "data.margin_key=margin"]))


def test_a_word_for_a_number_is_told_as_one() -> None:
    with pytest.raises(UserError, match=r"reward.gates.*: found 'yes', expected a number"):
        load_config(PPOConfig, [*ROWS, "reward.name=f1", "reward.gates={f1: yes}"])
