"""Runs whose answers share their prompts learn what runs without learn, and say which they are."""

from pathlib import Path
from typing import Any

import pytest
from rl_runs import check_same, run_on, train, write_folder
from safetensors.torch import load_file

from verl.data.batch import Batch
from verl.data.groups import collate_groups
from verl.errors import UserError
from verl.rl import samples

SHARED = "prompts: shared; a micro-batch has a prompt once for all of its answers"
METHODS: dict[str, dict[str, object]] = {
    "grpo": {"algorithm__name": "grpo"},
    "gspo, two updates": {"algorithm__name": "gspo", "algorithm__updates_per_step": 2},
    "ppo with a critic": {"algorithm__name": "ppo", "algorithm__updates_per_step": 2, "algorithm__kl_coef": 0.05},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def ppo_without(folder: Path) -> Path:
    return run_on(1, folder, "ppo-without", data__share_prompts="never", **METHODS["ppo with a critic"])


def log_of(run: Path) -> str:
    return (run / "train.log").read_text()


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_what_it_learns_without_sharing(folder: Path, method: str) -> None:
    name = method.partition(",")[0].partition(" ")[0]
    shared = run_on(1, folder, f"{name}-with", **METHODS[method])
    alone = run_on(1, folder, f"{name}-alone", data__share_prompts="never", **METHODS[method])
    check_same(shared, alone, has_critic="critic" in method)
    assert SHARED in log_of(shared)
    assert "prompts: not shared, each answer has its own (data.share_prompts=never)" in log_of(alone)


def test_two_processes_share_prompts_and_learn_what_one_learns_without(folder: Path, ppo_without: Path) -> None:
    found = run_on(2, folder, "ppo-two", model__strategy="fsdp2", **METHODS["ppo with a critic"])
    check_same(found, ppo_without, has_critic=True)
    assert SHARED in log_of(found)


def test_fewer_tokens_are_packed_and_ratios_are_exactly_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[Batch] = []

    def noted(*arguments: Any, **options: Any) -> Batch:
        packed.append(collate_groups(*arguments, **options))
        return packed[-1]

    monkeypatch.setattr(samples, "collate_groups", noted)
    tokens = {}
    for setting in ("auto", "never"):
        packed.clear()
        (line,) = train(
            folder, f"tokens-{setting}", data__share_prompts=setting, trainer__total_training_steps=1, trainer__save_freq="never"
        )
        tokens[setting] = sum(len(batch.input_ids_T) for batch in packed)
        assert line["rl/largest_ratio"] == 1.0 and line["rl/largest_rollout_difference"] < 1e-5
        assert any(batch.prefixes is not None for batch in packed) == (setting == "auto")
    assert tokens["auto"] < 0.6 * tokens["never"]


def test_a_single_answer_has_its_prompt(folder: Path) -> None:
    words: dict[str, object] = {"algorithm__name": "reinforce", "rollout__samples_per_prompt": 1, "trainer__total_training_steps": 1}
    train(folder, "single", trainer__save_freq="never", **words)
    assert "prompts: not shared, each answer has its own (rollout.samples_per_prompt=1)" in log_of(folder / "single")


NOT_FINITE = '''"""GRPO with a loss that is not a number."""

from verl.algorithms import grpo

needs_groups, needs_critic, Settings, advantages = True, False, grpo.Settings, grpo.advantages


class Loss(grpo.Loss):
    def slope(self, batch):
        return None

    def loss(self, out, batch):
        result = super().loss(out, batch)
        result.sum = result.sum * float("nan")
        return result
'''


def test_a_skipped_batch_is_written_with_its_prefixes(folder: Path) -> None:
    (folder / "broken.py").write_text(NOT_FINITE)
    train(folder, "nan", algorithm__name=folder / "broken.py", trainer__total_training_steps=1, trainer__save_freq="never")
    written = load_file(folder / "nan/skipped/step_1_actor_1_rank_0.safetensors")
    assert {f"0.prefixes.{name}" for name in ("segment_bounds", "group_bounds", "prefix_bounds", "sizes")} <= written.keys()


def test_another_word_is_refused_with_those_that_there_are(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.share_prompts: (.|\n)*auto(.|\n)*never"):
        train(folder, "word", data__share_prompts="always")
