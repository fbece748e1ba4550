"""What goes wrong in one step of reinforcement learning does not spoil the next ones, and is said."""

import json
import math
import pickle
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from forked import run_forked
from reward_models import PLAIN, scores_of_transformers, write_reward_model
from rl_runs import SOMETIMES, Pair, train, words, write_folder
from runs import PPO, lines_of, metrics_of, timeless
from tiny import write_model
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaForTokenClassification

from verl.engine import decisions
from verl.engine.decisions import Workload
from verl.engine.hardware import Hardware
from verl.errors import UserError, exit_on_user_error
from verl.models.attention.flash import Heads
from verl.models.attention.packed import AttentionChoice
from verl.models.load import load_tokenizer
from verl.models.per_layer import heads_of
from verl.rollout._http import RefusedError
from verl.trainer import ppo_trainer

# PPO whose log-probabilities are no numbers in the calls of the loss that are named.
PPO_WITH_NAN = """
from verl.algorithms import ppo

needs_groups, needs_critic, Settings, advantages, ValueLoss = False, True, ppo.Settings, ppo.advantages, ppo.ValueLoss


calls = []


class Loss(ppo.Loss):
    def loss(self, out, batch):
        calls.append(1)
        if len(calls) in {actor}:
            out.logprob_M = out.logprob_M * float("nan")
        return super().loss(out, batch)
"""
ONE_BATCH = 4000  # tokens, so that an update is one call of the loss


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("robust"))


def broken(folder: Path, *, actor: tuple[int, ...] = ()) -> Path:
    path = folder / f"nan_{'_'.join(map(str, actor))}.py"
    path.write_text(PPO_WITH_NAN.format(actor=actor))
    return path


def test_a_divergence_that_is_no_number_leaves_its_weight_alone(folder: Path) -> None:
    adaptive: dict[str, object] = {"algorithm__kl_coef": 0.1, "algorithm__kl_target": 0.001, "algorithm__kl_horizon": 20}
    method = broken(folder, actor=(2,))
    found = train(folder, "nan_kl", algorithm__name=method, data__max_tokens_per_micro_batch=ONE_BATCH, **adaptive)
    weights = [line["rl/kl_coef"] for line in found]
    assert math.isnan(found[1]["rl/kl_k3"]), "else the test shows nothing"
    assert weights[1] == weights[0] and all(map(math.isfinite, weights))
    assert [line["train/skipped"] for line in found] == [0, 1, 0, 0]


def test_a_critic_that_never_learns_stops_the_run_though_the_actor_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.algorithms.ppo import ValueLoss

    def no_number(self: ValueLoss, out: object, batch: object) -> object:
        result = whole(self, out, batch)  # type: ignore[arg-type]
        result.sum = result.sum * float("nan")
        return result

    whole = ValueLoss.loss
    monkeypatch.setattr(ValueLoss, "loss", no_number)
    with pytest.raises(UserError, match="3 times in a row") as caught:
        train(folder, "nan_critic", algorithm__name="ppo")
    assert caught.value.where == "step 3"


def other_critic(folder: Path, name: str, **changes: int) -> Path:
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    vocabulary = AutoConfig.from_pretrained(folder / "model").vocab_size
    return write_model(folder / name, LlamaConfig(**{"vocab_size": vocabulary, **shape, **changes}), kind=LlamaForCausalLM)


def heads_served(monkeypatch: pytest.MonkeyPatch) -> list[set[Heads]]:
    """The heads that attention is chosen for, each time that something is decided."""
    served: list[set[Heads]] = []
    choose = decisions.choose_attention

    def recorded(wanted: str, hardware: Hardware, dtype: torch.dtype, heads: Sequence[Heads], workload: Workload) -> AttentionChoice:
        served.append(set(heads))
        return choose(wanted, hardware, dtype, heads, workload)

    monkeypatch.setattr(decisions, "choose_attention", recorded)
    return served


def test_a_critic_of_another_architecture_is_looked_at_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.engine import build_heads

    looked_at = []
    check = build_heads.check_hidden
    monkeypatch.setattr(build_heads, "check_hidden", lambda scorer, **where: (looked_at.append(type(scorer.model)), check(scorer, **where)))
    served = heads_served(monkeypatch)
    path = other_critic(folder, "llama")
    train(folder, "other_critic", algorithm__name="ppo", critic__partial_pretrain=path, trainer__total_training_steps=1)
    assert looked_at == [LlamaForTokenClassification]
    both = {*heads_of(AutoConfig.from_pretrained(folder / "model")), Heads(query=2, key_value=1, size=32)}
    assert len(both) == 2 and served == [both, both]  # for the actor and for the critic
    assert metrics_of(folder / "other_critic")[0]["critic/grad_norm"] > 0

    served.clear()
    train(folder, "own_critic", algorithm__name="ppo", trainer__total_training_steps=1)
    assert [len(heads) for heads in served] == [1, 1], "a critic like its actor asks for nothing else"


def test_a_reward_model_of_another_architecture_is_looked_at_and_served_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=4)
    head: dict[str, Any] = dict(num_labels=1, pad_token_id=0)
    vocabulary = AutoConfig.from_pretrained(folder / "model").vocab_size
    config = LlamaConfig(**head, **shape, vocab_size=vocabulary)  # type: ignore[arg-type]
    path = write_model(folder / "judge", config, kind=LlamaForSequenceClassification)
    load_tokenizer(str(folder / "model")).save_pretrained(path)
    served = heads_served(monkeypatch)
    judged: dict[str, object] = {"reward__name": "null", "reward_model__path": path, "trainer__total_training_steps": 1}
    (line,) = train(folder, "judged", **judged)
    both = {*heads_of(AutoConfig.from_pretrained(folder / "model")), Heads(query=8, key_value=4, size=8)}
    assert len(both) == 2 and served == [both]
    assert line["rl/reward"] == pytest.approx(line["reward/model"]) and line["rl/reward"] != 0

    monkeypatch.setattr("verl.engine.trial.TOLERANCE", 0)
    with pytest.raises(
        UserError, match=r"reward_model.path=\S+: the hidden states of LlamaForSequenceClassification in packed batches differ"
    ):
        train(folder, "not_alike", **judged)


def test_a_critic_without_the_actors_tokens_is_refused(folder: Path) -> None:
    path = other_critic(folder, "few_tokens", vocab_size=20)
    with pytest.raises(UserError, match=f"{path}: the tokenizer's highest id is .* the model has 20 embeddings"):
        train(folder, "few", algorithm__name="ppo", critic__partial_pretrain=path)


def test_each_update_that_is_not_taken_has_a_file_of_its_own(folder: Path) -> None:
    method = broken(folder, actor=(1, 3))
    updates: dict[str, object] = {"algorithm__updates_per_step": 4, "trainer__total_training_steps": 1}
    train(folder, "nan_files", algorithm__name=method, data__max_tokens_per_micro_batch=ONE_BATCH, **updates)
    names = sorted(path.name for path in (folder / "nan_files/skipped").iterdir())
    assert names == [f"step_1_actor_{update}{kind}" for update in (1, 3) for kind in (".jsonl", "_rank_0.safetensors")]


def test_without_a_critic_nothing_waits_for_it(folder: Path) -> None:
    (line,) = train(folder, "no_critic", critic__warmup_steps=3, trainer__total_training_steps=1)
    assert line["train/grad_norm"] > 0


def test_what_dynamic_sampling_leaves_out_is_still_counted_and_on_disk(folder: Path) -> None:
    (folder / "sometimes.py").write_text(SOMETIMES)
    found = train(folder, "dapo", algorithm__name="dapo", reward__name=folder / "sometimes.py", algorithm__max_refills=8)
    left_out = 0
    for line in found:
        answers = lines_of(folder / "dapo/rollouts" / f"step_{int(line['step'])}.jsonl")
        assert line["rl/reward"] == pytest.approx(sum(answer["reward"] for answer in answers) / len(answers))
        assert line["rl/reward"] == pytest.approx(line["reward/sometimes"])
        left_out += sum(not answer["trained"] for answer in answers)
    assert left_out > 0, "else the test shows nothing"


def test_a_dry_run_says_what_would_be_done_and_does_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from verl.trainer import ppo_trainer

    ppo_trainer.main(words(folder, "dry", trainer__dry_run="true"))
    said = capsys.readouterr().out
    assert "plan: 4 steps of 4 prompts × 4 answers" in said and "data.train_files: 80 prompts" in said and "method: grpo" in said
    assert "\nepochs: 16 of 80 prompts are asked once, and 64 not at all (4 steps × 4 = 16)\n" in said
    assert not (folder / "dry").exists()


def test_a_step_is_profiled_where_it_is_asked_for(folder: Path) -> None:
    train(folder, "profile", trainer__profile_step=2, trainer__total_training_steps=2)
    assert (folder / "profile/profile/step_2_rank_0.txt").read_text().startswith("profile of steps 2-2")


def test_the_learning_rate_falls_from_update_to_update_and_that_of_a_steps_first_is_logged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from verl.engine import engine

    taken: list[float] = []
    set_rate = engine.set_learning_rate
    monkeypatch.setattr(engine, "set_learning_rate", lambda optimizer, rate: (taken.append(rate), set_rate(optimizer, rate))[1])
    schedule: dict[str, object] = {"optim__lr": 1e-4, "optim__lr_scheduler": "linear", "trainer__total_training_steps": 2}
    found = train(folder, "lr", algorithm__updates_per_step=2, **schedule)
    assert taken == pytest.approx([8e-5, 6e-5, 4e-5, 2e-5])
    assert [line["train/lr"] for line in found] == pytest.approx([8e-5, 4e-5])


def test_one_answer_to_a_prompt_is_not_said_to_be_like_all_others(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone: dict[str, object] = {"algorithm__name": "reinforce", "rollout__samples_per_prompt": 1, "trainer__total_training_steps": 1}
    train(folder, "alone", **alone)
    assert "equal rewards" not in capsys.readouterr().out
    (folder / "one.py").write_text("def score(prompt, response, row):\n    return 1.0\n")
    train(folder, "alone_same", reward__name=folder / "one.py", **alone)
    assert "all answers have equal rewards" in capsys.readouterr().out


def test_answers_that_all_earn_the_same_are_said_as_the_method_sees_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "half.py").write_text("def score(prompt, response, row):\n    return 0.5\n")
    said = {
        "grpo": "the answers to each prompt have equal rewards, so a group does not tell which is better",
        "reinforce": "all answers have equal rewards",
        "dapo": "the answers to each prompt have equal rewards, even after 3 refills; no update",
    }
    for method, warning in said.items():
        changes: dict[str, object] = {"algorithm__name": method, "trainer__total_training_steps": 1}
        (line,) = train(folder, f"half_{method}", reward__name=folder / "half.py", **changes)
        assert f"warning: step 1: {warning}\n" in capsys.readouterr().out
        assert line["rl/groups_without_spread"] == 1 and line.get("train/grad_norm", 0) == 0


def test_an_adapter_that_was_tuned_with_dropout_learns_without(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft.tuners.lora import Linear as LoraLinear

    from verl.engine.build import Built, build
    from verl.models.adapters.operators import AdaptedLinear
    from verl.rl import roles

    built: list[Built] = []
    adapter: dict[str, object] = {"model__lora_rank": 4, "trainer__total_training_steps": 1, "optim__lr": 1e-2}
    train(folder, "adapter", **adapter)
    path = folder / "adapter/global_step_1"
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "lora_dropout": 0.5}))
    (path / "manifest.json").unlink()  # the file was changed on purpose
    monkeypatch.setattr(roles, "build", lambda *words, **options: built.append(build(*words, **options)) or built[-1])
    updates: dict[str, object] = {"model__lora_adapter_path": path, "algorithm__updates_per_step": 2, "optim__lr": 0}
    (line,) = train(folder, "adapter_on", trainer__total_training_steps=1, **updates)
    assert line["rl/largest_ratio"] == 1.0
    assert "its dropout of 0.5 is off" in capsys.readouterr().out
    kinds = {type(module) for module in built[0].adapted.modules() if isinstance(module, LoraLinear)}
    assert kinds == {AdaptedLinear}, "peft's own forward pass is the slower one"

    (path / "adapter_config.json").write_text(json.dumps(config))
    (same,) = train(folder, "adapter_plain", trainer__total_training_steps=1, **updates)
    assert timeless([same]) == timeless([line]) and "dropout" not in capsys.readouterr().out


def test_a_right_answer_may_be_more_than_text(folder: Path) -> None:
    """A table's own types are for its grader; in the files of a step they stand as text."""
    table = {"question": ["How many?", "How few?"] * 4, "reference": [date(2024, 1, 2), date(2025, 3, 4)] * 4}
    pq.write_table(pa.table(table), folder / "dates.parquet")
    keys: dict[str, object] = {"data__train_files": folder / "dates.parquet", "data__response_key": "null"}
    train(folder, "dates", trainer__total_training_steps=1, **keys)
    assert "2024-01-02" in {answer["reference"] for answer in lines_of(folder / "dates/rollouts/step_1.jsonl")}


def test_validating_has_its_seconds_and_calls_exact_match_what_is(folder: Path) -> None:
    graders: dict[str, object] = {"reward__name": f"[format,{folder / 'vowels.py'},gsm8k]", "trainer__total_training_steps": 1}
    train(folder, "seconds", data__val_files=folder / "test.jsonl", data__val_max_samples=2, **graders)
    line = metrics_of(folder / "seconds")[-1]
    assert line["perf/seconds_validate"] > 0
    answers = lines_of(folder / "seconds/rollouts/validation_1.jsonl")
    for name, shown in (("format", "format"), ("vowels", "vowels"), ("gsm8k", "exact_match")):
        assert line[f"val/{shown}"] == pytest.approx(sum(answer[f"reward/{name}"] for answer in answers) / 2)


def test_a_step_has_its_line_before_its_checkpoint_is_committed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.engine import checkpoint

    def killed(*arguments: object) -> Path:
        saved = save(*arguments)  # type: ignore[arg-type]
        assert metrics_of(folder / "saves")[-1]["step"] == int(saved.name.rpartition("_")[2])
        return saved

    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", killed)
    train(folder, "saves", trainer__save_freq=2, trainer__total_training_steps=3)


SOME_EMPTY = """
from dataclasses import replace

from verl.rollout import native

load = native.load


def share(*arguments):
    rollout = native.share(*arguments)
    generate = rollout.generate
    calls = []

    def emptied(*arguments):
        calls.append(1)
        done = generate(*arguments)
        step = len(calls)  # of three: some answers are empty, one prompt's are, all are
        empty = (lambda i: i % 3 == 0, lambda i: i < 4, lambda i: True)[step - 1]
        return [replace(c, token_ids=[], finish_reason="stop", logprobs=None) if empty(i) else c for i, c in enumerate(done)]

    rollout.generate = emptied
    return rollout
"""


@pytest.mark.parametrize("method", ["grpo", "ppo", "reinforce", "gspo"])
def test_empty_answers_have_rewards_and_are_learned_from_as_far_as_there_are_tokens(folder: Path, method: str) -> None:
    (folder / "emptied.py").write_text(SOME_EMPTY)
    changes = {"rollout__name": folder / "emptied.py", "algorithm__name": method, "trainer__total_training_steps": 3}
    some, one_prompt, all_of_them = train(folder, f"emptied_{method}", algorithm__updates_per_step=2, **changes)
    for line in (some, one_prompt):
        assert math.isfinite(line["train/loss"]) and line["train/grad_norm"] > 0 and line["train/skipped"] == 0
        assert line["rl/rollout_difference"] < 1e-5
    assert "train/loss" not in all_of_them and all_of_them["rl/response_tokens"] == all_of_them["rl/reward"] == 0
    lines = lines_of(folder / f"emptied_{method}/rollouts/step_1.jsonl")
    assert [line["tokens"] == 0 for line in lines] == [i % 3 == 0 for i in range(16)]
    assert all(line["response"] == "" and line["reward"] == 0 for line in lines if line["tokens"] == 0)


@pytest.mark.parametrize("dry_run", ["false", "true"])
@pytest.mark.parametrize(
    ("changes", "found", "fix"),
    [
        ({"algorithm__name": "gppo"}, "no algorithms named 'gppo'", "did you mean 'ppo'?"),
        ({"rollout__name": "nativ"}, "no rollout named 'nativ'", "did you mean 'native'?"),
        ({"rollout__name": "empty.py"}, "empty.py: has no function 'load'", "a plugin of rollout needs load, share"),
        ({"rollout__tool": "calculators"}, "no tools named 'calculators'", "did you mean 'calculator'?"),
        ({"rollout__tool": "empty.py"}, "empty.py: has no function 'reply'", "a plugin of tools needs reply"),
        ({"reward__name": "gsm9k"}, "no rewards named 'gsm9k'", "did you mean 'gsm8k'?"),
        ({"reward__name": "[format,forma]"}, "no rewards named 'forma'", "did you mean 'format'?"),
        ({"reward__name": "absent.py"}, "absent.py: no such file for a plugin of rewards", "the current folder is"),
        (
            {"reward__name": "empty.py"},
            "reward.name=empty.py: is no reward: it has no 'score'",
            "or path/to/file.py with score",
        ),
        ({"reward__name": "mine.no_such"}, "no module 'mine' for rewards 'mine.no_such'", "give the path of a .py file"),
        ({"reward__name": "format", "reward__format": "['(']"}, "reward.format: '(' is not a regular expression", "such as [<think>"),
        ({"reward_model__path": "./nowhere"}, "./nowhere: no such model directory", "the current folder is"),
        ({"reward_model__path": "model"}, "reward_model.path: model is a language model without a scoring head", "reward_trainer"),
        ({"algorithm__name": "ppo", "critic__partial_pretrain": "./nowhere"}, "./nowhere: no such model directory", "the current folder"),
        ({"model__partial_pretrain": "adapter"}, "model.partial_pretrain=adapter: is an adapter", "verl export adapter DIR"),
        ({"model__partial_pretrain": "model", "model__lora_rank": 4, "model__target_modules": "[q_prj]"}, "q_prj", "q_proj"),
    ],
)
def test_what_is_named_and_is_not_there_is_said_before_anything_is_read(
    folder: Path,
    changes: dict[str, object],
    found: str,
    fix: str,
    dry_run: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    (folder / "empty.py").write_text("")
    (folder / "adapter").mkdir(exist_ok=True)
    (folder / "adapter/adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    absent: dict[str, object] = {"data__train_files": "absent.jsonl", "model__partial_pretrain": "./absent"}
    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(ppo_trainer.main, words(folder, "misspelt", **{**absent, "trainer__dry_run": dry_run, **changes}))
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith("error: ") and found in said and fix in said.partition("\n  fix: ")[2]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"reward__name": "raises.py"},
            r"train\.jsonl:\d+: reward raises raised ValueError: never \(\S*raises\.py:2\)\n  fix: correct the reward or .*on_error=zero",
        ),
        (
            {"reward__name": "nan.py"},
            r"train\.jsonl:\d+: reward nan returned nan of type float, expected a finite number\n  fix: correct the reward or the row",
        ),
        (
            {"data__max_prompt_length": 33},
            r"data\.train_files: \d+ of 80 prompts are longer .* the longest has 39 tokens \(.*train\.jsonl:\d+\)\n"
            r"  fix: data\.max_prompt_length=39 keeps them all; data\.overlong_prompts=drop",
        ),
        ({"algorithm__kl_coef": -0.1}, r"algorithm\.kl_coef: found -0\.1\n  fix: give a number of at least 0"),
        (
            {"rollout__samples_per_prompt": 1},
            r"rollout\.samples_per_prompt=1: grpo compares the answers .*\n  fix: give at least 2, .* algorithm\.name=ppo or reinforce",
        ),
    ],
)
def test_a_wrong_input_ends_the_command_with_its_place_and_what_to_do(
    folder: Path, changes: dict[str, object], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    (folder / "raises.py").write_text("def score(prompt, response, row):\n    raise ValueError('never')\n")
    (folder / "nan.py").write_text("def score(prompt, response, row):\n    return float('nan')\n")
    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(ppo_trainer.main, words(folder, "wrong", **changes))
    assert ended.value.code == 2
    assert re.match(rf"error: (\S*/)?{said}", capsys.readouterr().err)


def test_answers_are_written_anew_for_a_reward_model_with_another_tokenizer_and_that_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_reward_model(folder / "plain", template=PLAIN)
    judged: dict[str, object] = {"reward__name": "null", "reward_model__path": path, "trainer__total_training_steps": 1}
    train(folder, "other_tokens", **judged)
    assert f"reward model {path} has another tokenizer or chat template than the policy" in capsys.readouterr().out
    answers = lines_of(folder / "other_tokens/rollouts/step_1.jsonl")
    chats = [[{"role": "user", "content": answer["prompt"]}] for answer in answers]
    expected = scores_of_transformers(path, chats, [answer["response"] for answer in answers])
    assert [answer["reward"] for answer in answers] == pytest.approx(expected.tolist(), abs=1e-4)
    assert expected.std() > 0.01, "else the test shows nothing"


def test_a_logger_that_is_none_is_said_before_anything_is_read(folder: Path) -> None:
    for name, found in (("consol", "no loggers named 'consol'"), ("null", "trainer.logger: found None")):
        with pytest.raises(UserError, match=found):
            train(folder, "no_logger", data__train_files="absent.jsonl", trainer__logger=name)
    assert not (folder / "no_logger").exists()


def test_an_error_reaches_other_processes_as_it_is() -> None:
    for error in (UserError("what", where="here", fix="that"), RefusedError(400, "what", where="here", fix="that")):
        assert str(pickle.loads(pickle.dumps(error))) == str(error) == "here: what\n  fix: that"


def on_two(folder: Path, output: str, **changes: object) -> subprocess.CompletedProcess[str]:
    argv = words(folder, output, trainer__total_training_steps=1, trainer__save_freq="never", **changes)
    return run_forked(*PPO, *argv, folder=folder, processes=2, timeout=120)


RECORDED = """
from pathlib import Path

from verl.rollout import native

CALLS = Path(__file__).with_suffix(".txt")
load = native.load


def share(*arguments):
    rollout = native.share(*arguments)
    for name in ("generate", "sleep", "update_weights"):
        setattr(rollout, name, recorded(name, getattr(rollout, name)))
    return rollout


def recorded(name, call):
    def wrapper(*arguments):
        with CALLS.open("a") as file:
            print(name, file=file)
        return call(*arguments)

    return wrapper
"""


@pytest.mark.parametrize("sleep", [True, False])
def test_while_the_model_trains_the_rollout_may_sleep(folder: Path, sleep: bool) -> None:
    (folder / f"recorded_{sleep}.py").write_text(RECORDED)
    changes: dict[str, object] = {} if sleep else {"rollout__sleep": "false"}
    train(folder, f"sleeps_{sleep}", rollout__name=folder / f"recorded_{sleep}.py", trainer__total_training_steps=2, **changes)
    step = ["generate", "sleep", "update_weights"] if sleep else ["generate", "update_weights"]
    assert (folder / f"recorded_{sleep}.txt").read_text().split() == ["update_weights", *step, *step]


FAILS_ON_THE_SECOND = """
import os


def score(prompt, response, row):
    if os.environ["RANK"] == "1":
        raise ValueError("only there")
    return float(len(response))
"""


def test_a_reward_that_fails_on_another_process_is_reported_with_its_row(folder: Path) -> None:
    (folder / "there.py").write_text(FAILS_ON_THE_SECOND)
    done = on_two(folder, "there", reward__name=folder / "there.py", reward__on_error="zero", model__strategy="ddp")
    assert done.returncode == 0, done.stderr[-2000:]
    assert metrics_of(folder / "there")[0]["reward/errors"] == 8
    assert "8 rewards failed and count as 0" in done.stdout
    assert f"{folder}/train.jsonl:" in done.stdout


CANNOT_ON_THE_SECOND = """
import os

from verl.errors import UserError
from verl.rollout import native

load = native.load


def share(*arguments):
    rollout = native.share(*arguments)
    if os.environ["RANK"] == "1":
        rollout.generate = cannot
    return rollout


def cannot(*arguments):
    raise UserError("cannot today", where="the second process", fix="ask again tomorrow")
"""


def test_what_one_process_cannot_generate_ends_all_with_its_reason(folder: Path) -> None:
    (folder / "cannot.py").write_text(CANNOT_ON_THE_SECOND)
    done = on_two(folder, "cannot", rollout__name=folder / "cannot.py", model__strategy="ddp")
    assert done.returncode != 0
    assert "error: the second process: cannot today\n  fix: ask again tomorrow" in done.stderr
    assert "Traceback" not in done.stderr.split("error: the second process")[0]


def test_an_error_of_those_that_train_ends_who_generates_for_them(folder: Path) -> None:
    trains, generates = Pair(folder, "split_data", data__train_files=folder / "absent.jsonl").ends()
    assert trains[0] == generates[0] == 2
    assert "absent.jsonl" in trains[2]
    assert generates[2] == "", "one process speaks for all"


def test_an_error_of_who_generates_is_said_by_those_that_train(folder: Path) -> None:
    text = (CANNOT_ON_THE_SECOND + "\n\nload = share\n").replace("native.share", "native.load")
    (folder / "cannot_load.py").write_text(text)
    trains, generates = Pair(folder, "split_cannot", rollout__name=folder / "cannot_load.py").ends()
    assert trains[0] == generates[0] == 2
    assert trains[2] == "error: the second process: cannot today\n  fix: ask again tomorrow\n"
    assert generates[2] == ""


def test_a_signal_to_all_ends_a_split_run_after_its_step_with_a_checkpoint(folder: Path) -> None:
    pair = Pair(folder, "split_stop", trainer__total_training_steps=500)
    metrics, since = folder / "split_stop/metrics.jsonl", time.monotonic()
    while time.monotonic() - since < 60 and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.1)
    for process in pair.processes:
        process.send_signal(signal.SIGTERM)
    trains, generates = pair.ends()
    assert (trains[0], generates[0]) == (75, 0), trains[2] + generates[2]
    assert "the same command resumes from" in trains[1]
    assert "Traceback" not in trains[2] + generates[2]
