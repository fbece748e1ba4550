"""Answers that are drawn one step ahead: which weights drew them, what corrects for it, and that a run can be repeated exactly."""

import json
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from places import run_ranks
from rl_runs import SOMETIMES, Pair, words, write_folder
from runs import PPO, lines_of, metrics_of, timeless, wait_for
from safetensors.torch import load_file
from served import StandIn, server
from transformers import AutoModelForCausalLM

from verl.config.load import load_config
from verl.config.ppo import PPOConfig
from verl.data.prompts import load_prompts
from verl.engine import checkpoint
from verl.errors import UserError
from verl.models.load import load_tokenizer
from verl.rl.answers_file import read_answers
from verl.rollout.drawing import versions_of as versions_of_tokens
from verl.trainer import ppo_trainer

ROLES = ("actor", "critic", "reference", "reward")
SPLIT: dict[str, object] = {**dict.fromkeys((f"mapping__{role}" for role in ROLES), "[0]"), "mapping__rollout": "[1]"}
TRUNCATED: dict[str, object] = {"algorithm__importance_weights": "truncate"}
AHEAD: dict[str, object] = {**SPLIT, **TRUNCATED, "rollout__staleness": 1, "optim__lr": 1e-3}
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("staleness"))


def run(folder: Path, output: str, changes: Mapping[str, object], *, processes: int = 2) -> Path:
    """Run on so many processes; the run's directory."""
    run_ranks(*PPO, *words(folder, output, **changes), processes=processes)
    return folder / output


def weights_of(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(run / f"global_step_{step}" / "model.safetensors")


@pytest.fixture(scope="module")
def ahead(folder: Path) -> Path:
    return run(folder, "ahead", {**AHEAD, "trainer__save_freq": 2})


def versions_of(run: Path) -> list[set[int]]:
    return [{line["version"] for line in lines_of(run / "rollouts" / f"step_{step + 1}.jsonl")} for step in range(STEPS)]


def test_the_answers_of_a_step_are_drawn_by_the_weights_of_the_step_before(ahead: Path) -> None:
    assert versions_of(ahead) == [{0}, {0}, {1}, {2}]
    assert [line["rl/weight_lag"] for line in metrics_of(ahead)] == [0, 1, 1, 1]
    assert [line["rl/largest_weight_lag"] for line in metrics_of(ahead)] == [0, 1, 1, 1]


# It keeps what it generates with, and what for.
RECORDED = """
import json
from pathlib import Path

from verl.rollout import native

CALLS = Path(__file__).with_suffix(".jsonl")
share = native.share


def load(*arguments):
    rollout = native.load(*arguments)
    generate = rollout.generate

    def recorded(prompts, sampling, seeds=None):
        done = generate(prompts, sampling, seeds)
        answers = [[prompts[i // sampling.n], c.token_ids, c.logprobs, c.version] for i, c in enumerate(done)]
        with CALLS.open("a") as file:
            print(json.dumps(answers), file=file)
        return done

    rollout.generate = recorded
    return rollout
"""


def logprobs_of(model: Path, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Of each token of an answer, as transformers' model gives them."""
    loaded = MODELS.setdefault(model, AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval())
    with torch.no_grad():
        logits_TV = loaded(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits_TV.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


MODELS: dict[Path, Any] = {}


def test_each_token_has_the_probability_of_the_weights_that_drew_it_and_is_weighed_by_what_it_has_become(folder: Path) -> None:
    (folder / "recorded.py").write_text(RECORDED)
    cap = 1.05
    changes: dict[str, object] = {"rollout__name": folder / "recorded.py", "algorithm__importance_cap": cap, "trainer__save_freq": 1}
    found = run(folder, "weighed", {**AHEAD, **changes})
    calls: list[Any] = list(lines_of(folder / "recorded.jsonl"))
    models = [folder / "model", *(found / f"global_step_{step + 1}" for step in range(STEPS))]
    assert len(calls) == STEPS
    for step, (answers, line) in enumerate(zip(calls, metrics_of(found), strict=True)):
        drawn_by = max(0, step - 1)
        drawn = torch.cat([torch.tensor(logprobs) for _, _, logprobs, _ in answers])
        now, then, before = (
            torch.cat([logprobs_of(models[version], prompt, answer) for prompt, answer, *_ in answers])
            for version in (step, drawn_by, max(0, step - 2))
        )
        assert {version for *_, version in answers} == {drawn_by}
        torch.testing.assert_close(drawn, then, atol=1e-5, rtol=0)
        weights = (now - drawn).exp()
        assert line["rl/importance_weight"] == pytest.approx(float(weights.clamp(max=cap).mean()), abs=1e-5)
        assert line["rl/rollout_difference"] == pytest.approx(float((now - drawn).abs().mean()), abs=1e-5)
        if step > 1:  # else the test shows nothing
            assert (weights > cap).any() and float((before - drawn).abs().mean()) > 1e-3
            assert line["rl/importance_weight"] != pytest.approx(float(weights.mean()), abs=1e-5)


def test_without_staleness_answers_and_weights_are_those_of_one_process_bit_for_bit_over_fifty_steps(folder: Path) -> None:
    changes: dict[str, object] = {"trainer__total_training_steps": 50, "trainer__save_freq": 50, "rollout__max_new_tokens": 6}
    alone, split = run(folder, "alone", changes, processes=1), run(folder, "split", {**changes, **SPLIT, "rollout__staleness": 0})
    assert timeless(metrics_of(split)) == timeless(metrics_of(alone))
    found, expected = weights_of(split, 50), weights_of(alone, 50)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not (split / "schedule.jsonl").exists() and not (split / "global_step_50/trainer/answers.safetensors").exists()


def check_equal(found: Path, expected: Path, step: int = STEPS) -> None:
    """That a run has the metrics, answers, schedule and weights of another, bit for bit."""
    assert timeless(metrics_of(found)) == timeless(metrics_of(expected))
    assert (found / "schedule.jsonl").read_text() == (expected / "schedule.jsonl").read_text()
    for number in range(1, step + 1):
        name = f"rollouts/step_{number}.jsonl"
        assert (found / name).read_text() == (expected / name).read_text()
    weights = weights_of(expected, step)
    assert all(torch.equal(weights_of(found, step)[name], tensor) for name, tensor in weights.items())


def test_the_schedule_says_who_drew_what_with_which_weights(ahead: Path) -> None:
    events = lines_of(ahead / "schedule.jsonl")
    assert [(event["step"], event["event"], event["version"]) for event in events] == [
        (1, "answered", 0),
        (1, "drawn", 0),
        *((1, "finished", 0), (1, "weights", 1), (2, "drawn", 1)),
        *((2, "finished", 1), (2, "weights", 2), (3, "drawn", 2)),
        *((3, "finished", 2), (3, "weights", 3), (4, "weights", 4)),
    ]
    assert {event["rank"] for event in events} == {1}
    assert [event["prompts"] for event in events if "prompts" in event] == [list(range(n, n + 4)) for n in range(0, 16, 4)]


def gone_on(folder: Path, output: str, changes: Mapping[str, object]) -> Path:
    """A run of which another one does the last two steps again, from the checkpoint of the second."""
    run(folder, output, {**changes, "trainer__save_freq": 2})
    for name in ("global_step_4", "rollouts/step_3.jsonl", "rollouts/step_4.jsonl"):
        path = folder / output / name
        path.rename(path.with_name(f"first_{path.name}"))
    return run(folder, output, {**changes, "trainer__save_freq": 2})


@pytest.mark.parametrize("async_save", ["false", "true"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(folder: Path, ahead: Path, async_save: str) -> None:
    resumed = gone_on(folder, f"resumed_{async_save}", {**AHEAD, "trainer__async_save": async_save})
    check_equal(resumed, ahead)
    manifest = json.loads((resumed / "global_step_2/manifest.json").read_text())
    assert "trainer/answers.safetensors" in manifest["files"]
    assert checkpoint.find_damage(resumed / "global_step_2") is None


def test_without_the_answers_of_its_checkpoint_a_resumed_run_is_another_one(folder: Path, ahead: Path) -> None:
    """The negative control of the test above."""
    copied = shutil.copytree(ahead, folder / "without_answers")
    shutil.rmtree(copied / "global_step_4")
    path = copied / "global_step_2"
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"]["trainer/answers.safetensors"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "trainer/answers.safetensors").unlink()
    run(folder, "without_answers", {**AHEAD, "trainer__save_freq": 2})
    assert versions_of(copied) == [{0}, {0}, {2}, {2}]
    assert timeless(metrics_of(copied))[3] != timeless(metrics_of(ahead))[3]


def test_other_ranks_resume_with_the_answers_of_the_checkpoint(folder: Path, ahead: Path) -> None:
    more = {**dict.fromkeys((f"mapping__{role}" for role in ROLES), "[0,1]"), "mapping__rollout": "[2]"}
    copied = shutil.copytree(ahead, folder / "more_ranks")
    shutil.rmtree(copied / "global_step_4")
    run(folder, "more_ranks", {**AHEAD, **more, "model__strategy": "fsdp2", "trainer__save_freq": 2}, processes=3)
    assert (copied / "rollouts/step_3.jsonl").read_text() == (ahead / "rollouts/step_3.jsonl").read_text()
    assert versions_of(copied) == versions_of(ahead)
    for here, there in zip(metrics_of(copied), metrics_of(ahead), strict=True):
        assert here["train/loss"] == pytest.approx(there["train/loss"], rel=1e-3, abs=1e-4)


def test_adapters_learn_from_answers_of_the_step_before(folder: Path) -> None:
    found = run(folder, "adapters", {**AHEAD, "model__lora_rank": 4, "optim__lr": 1e-2})
    lines = metrics_of(found)
    assert [line["rl/largest_weight_lag"] for line in lines] == [0, 1, 1, 1]
    assert lines[0]["rl/rollout_difference"] < 1e-5 < 1e-3 < lines[3]["rl/rollout_difference"]


DYNAMIC: dict[str, object] = {"algorithm__name": "dapo", "algorithm__max_refills": 8}


def test_refills_are_drawn_at_once_by_the_weights_of_now(folder: Path) -> None:
    (folder / "sometimes.py").write_text(SOMETIMES)
    changes: dict[str, object] = {**AHEAD, **DYNAMIC, "reward__name": folder / "sometimes.py"}
    found = run(folder, "refills", {**changes, "trainer__save_freq": 2})
    for step, line in enumerate(metrics_of(found)):
        versions = {answer["number"]: answer["version"] for answer in lines_of(found / "rollouts" / f"step_{step + 1}.jsonl")}
        first = min(versions)
        assert {version for number, version in versions.items() if number < first + 4} == {max(0, step - 1)}
        assert {version for number, version in versions.items() if number >= first + 4} <= {step}
        assert 0 <= line["rl/weight_lag"] <= 1
    assert sum(line["rl/refills"] for line in metrics_of(found)) > 0, "else the test shows nothing"
    check_equal(gone_on(folder, "refills_again", changes), found)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollout__staleness": 2}, "rollout.staleness: found 2"),
        ({"rollout__staleness": 1}, "rollout.staleness=1: the ranks that train also generate"),
        (
            {"rollout__staleness": 1, "algorithm__importance_weights": "null"},
            "rollout.staleness=1: answers drawn by older weights would be taken for answers of the weights that learn",
        ),
        ({"rollout__partial": "true"}, "rollout.partial=true: unfinished answers would go on under newer weights"),
        (
            {"rollout__staleness": 1, "rollout__partial": "true", "rollout__name": "vllm"},
            "rollout.partial=true: vllm cannot stop an answer",
        ),
        ({"rollout__staleness": 1, "rollout__partial": "true", "algorithm__name": "dapo"}, "rollout.partial=true: which prompts are drawn"),
        ({"rollout__replay": "absent.jsonl"}, "rollout.replay: without rollout.partial, the schedule does not depend on time"),
        (
            {"rollout__staleness": 1, "rollout__partial": "true", "rollout__replay": "absent.jsonl"},
            "rollout.replay=absent.jsonl: no such file",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(folder: Path, changes: dict[str, object], said: str) -> None:
    for dry_run in ("false", "true"):
        given = words(folder, "refused", **{**TRUNCATED, **changes, "trainer__dry_run": dry_run, "data__train_files": "absent.jsonl"})
        with pytest.raises(UserError) as caught:
            ppo_trainer.main(given)
        assert str(caught.value).startswith(said) and "fix: " in str(caught.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"step": 1, "rank": 1, "event": "finished", "decode_steps": "x"}', "line 2 has decode_steps='x', which is no number of steps"),
        ('{"step": 1, "rank": 1, "event": "finished", "decode_steps": null}', "line 2 has decode_steps=None"),
        ('{"step": 1, "rank": true, "event": "finished", "decode_steps": 3}', "line 2 has rank=True, which is no number of a rank"),
        ('{"step": 1, "rank": 1, "event": "ended", "decode_steps": 3}', "line 2 has the unknown event 'ended'"),
        ('{"step": 1, "rank": 1, "event": "drawn", "decode_steps": 3, "prompts": "all"}', "line 2 has prompts='all'"),
        ('{"step": 1, "rank": 1, "eve', "line 2 is no event of a schedule"),
    ],
)
def test_a_damaged_schedule_is_told_with_its_line_before_anything_is_read(folder: Path, tmp_path: Path, line: str, said: str) -> None:
    good = '{"step": 1, "rank": 1, "event": "weights", "version": 0, "decode_steps": 0}'
    (tmp_path / "damaged.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    replay = {"rollout__staleness": 1, "rollout__partial": "true", "rollout__replay": tmp_path / "damaged.jsonl"}
    with pytest.raises(UserError, match=r"rollout\.replay=") as caught:
        ppo_trainer.main(words(folder, "refused", **{**TRUNCATED, **replay, "data__train_files": "absent.jsonl"}))
    assert said in str(caught.value)


def test_a_run_with_another_staleness_is_another_experiment(folder: Path, ahead: Path) -> None:
    with pytest.raises(AssertionError, match=r"rollout\.staleness: 1 -> 0"):
        run(folder, "ahead", {**AHEAD, "rollout__staleness": 0, "trainer__total_training_steps": 5})


def pair(folder: Path, output: str, **changes: object) -> Pair:
    return Pair(folder, output, **{name: value for name, value in {**AHEAD, **changes}.items() if not name.startswith("mapping__")})


def test_a_run_goes_on_after_a_signal_and_after_a_kill_bit_for_bit(folder: Path) -> None:
    steps: dict[str, object] = {"trainer__total_training_steps": 60, "trainer__save_freq": 7}
    stopped = pair(folder, "stopped", **steps)
    wait_for(lambda: (folder / "stopped/metrics.jsonl").exists() and len(metrics_of(folder / "stopped")) > 2)
    for process in stopped.processes:
        process.send_signal(signal.SIGTERM)
    trains, generates = stopped.ends()
    assert (trains[0], generates[0]) == (75, 0), trains[2] + generates[2]
    assert "the same command resumes from" in trains[1] and "Traceback" not in trains[2] + generates[2]
    assert len(metrics_of(folder / "stopped")) < 60, "else the test shows nothing"
    done, killed = len(metrics_of(folder / "stopped")), pair(folder, "stopped", **steps)
    wait_for(lambda: len(metrics_of(folder / "stopped")) > done + 10)
    for process in killed.processes:
        process.kill()
    assert [code for code, *_ in killed.ends()] == [-signal.SIGKILL] * 2
    assert len(metrics_of(folder / "stopped")) < 60, "else the test shows nothing"
    assert [code for code, *_ in pair(folder, "stopped", **steps).ends()] == [0, 0]
    whole = run(folder, "whole", {**AHEAD, **steps})
    check_equal(folder / "stopped", whole, 60)


@pytest.mark.parametrize("changes", [{"rollout__staleness": 0}, {}, {"rollout__partial": "true"}], ids=["0", "1", "partial"])
def test_a_run_that_is_done_ends_at_once_on_all_ranks(folder: Path, changes: dict[str, object]) -> None:
    output = f"done_{len(changes)}_{'rollout__partial' in changes}"
    for said in ("starting a new run", "nothing left to do"):
        trains, generates = pair(folder, output, trainer__total_training_steps=1, **changes).ends()
        assert (trains[0], generates[0]) == (0, 0) and said in trains[1]


FAILS_AHEAD = """
from verl.errors import UserError
from verl.rollout import native

share, calls = native.share, []


def failing(work, call):
    def do(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise UserError("cannot today", where="the rollout", fix="ask again tomorrow")
        return work(*arguments)

    return do


def load(*arguments):
    rollout = native.load(*arguments)
    rollout.generate = failing(rollout.generate, 3)
    if PARTIAL:
        rollout.advance = failing(rollout.advance, 60)
    return rollout
"""


@pytest.mark.parametrize("partial", ["false", "true"])
def test_an_error_while_answers_are_drawn_ahead_ends_all_with_its_reason(folder: Path, partial: str) -> None:
    (folder / f"fails_{partial}.py").write_text(f"PARTIAL = {partial == 'true'}\n{FAILS_AHEAD}")
    changes: dict[str, object] = {"rollout__name": folder / f"fails_{partial}.py", "rollout__partial": partial}
    trains, generates = pair(folder, f"fails_{partial}", **{**changes, "trainer__total_training_steps": 50}).ends()
    assert trains[0] == generates[0] == 2
    assert trains[2] == "error: the rollout: cannot today\n  fix: ask again tomorrow\n" and generates[2] == ""
    assert 1 <= len(metrics_of(folder / f"fails_{partial}")) < 50


@pytest.mark.parametrize("partial", ["false", "true"])
def test_a_reward_that_fails_while_answers_are_drawn_ends_all(folder: Path, partial: str) -> None:
    (folder / "raises.py").write_text("def score(prompt, response, row):\n    raise ValueError('never')\n")
    changes: dict[str, object] = {"reward__name": folder / "raises.py", "rollout__partial": partial}
    trains, generates = pair(folder, f"raises_{partial}", **changes).ends()
    assert trains[0] == generates[0] == 2 and "reward raises raised ValueError: never" in trains[2]


@pytest.mark.parametrize("partial", ["false", "true"])
def test_a_rollout_process_that_dies_is_named(folder: Path, partial: str) -> None:
    output = f"killed_{partial}"
    killed = pair(folder, output, trainer__total_training_steps=500, rollout__partial=partial)
    wait_for(lambda: (folder / output / "metrics.jsonl").exists() and len(metrics_of(folder / output)) > 1)
    killed.processes[1].kill()
    trains, _ = killed.ends()
    assert trains[0] == 3 and "rank 1 (" in trains[2]


PARTIAL: dict[str, object] = {**AHEAD, "rollout__partial": "true"}
# Answers of unequal length, more of them than there is room for, so that all that may happen does.
UNEQUAL: dict[str, object] = {"rollout__max_new_tokens": 40, "rollout__max_sequences": 10}


@pytest.fixture(scope="module")
def partial(folder: Path) -> Path:
    return run(folder, "partial", partial_words(folder))


def partial_words(folder: Path) -> dict[str, object]:
    saves: dict[str, object] = {"trainer__save_freq": 1, "trainer__test_freq": 3}
    return {**PARTIAL, **UNEQUAL, **saves, "data__val_files": folder / "test.jsonl", "data__val_max_samples": 2}


def of_two_versions(found: Path) -> list[dict[str, Any]]:
    """Answers that more than one version of the weights drew."""
    steps = [lines_of(found / "rollouts" / f"step_{step + 1}.jsonl") for step in range(STEPS)]
    return [line for step in steps for line in step if "versions" in line]


def test_no_token_is_drawn_by_weights_that_are_older_than_one_update(partial: Path) -> None:
    for step, line in enumerate(metrics_of(partial)[1:]):
        assert line["rl/largest_weight_lag"] == min(step, 1) >= line["rl/weight_lag"]
        answers = lines_of(partial / "rollouts" / f"step_{step + 1}.jsonl")
        assert sorted(answer["number"] for answer in answers) == sorted([*range(4 * step, 4 * step + 4)] * 4)
        for answer in answers:
            parts = answer.get("versions", [[answer["version"], answer["tokens"]]])
            assert [version for version, _ in parts] in ([step], [step - 1], [step - 1, step]) or step == 0
            assert sum(tokens for _, tokens in parts) == answer["tokens"]
    assert of_two_versions(partial), "else the tests of it show nothing"


def test_each_token_has_the_probability_of_the_version_that_it_names(folder: Path, partial: Path) -> None:
    config = load_config(PPOConfig, words(folder, "partial", **PARTIAL, **UNEQUAL))
    prompts = load_prompts(config.data, config.data.train_files, load_tokenizer(str(folder / "model")))
    models = {0: folder / "model", **{step: partial / f"global_step_{step}" for step in range(1, STEPS)}}
    differences, of_older = [], []
    for step in range(1, STEPS):
        for number, answers in read_answers(partial / f"global_step_{step}").items():
            prompt = prompts.drawn(number, config.trainer.seed).token_ids
            for answer in answers:
                if not answer.token_ids:
                    continue
                drawn = torch.tensor(answer.logprobs)
                each = {version: logprobs_of(models[version], prompt, answer.token_ids) for version in {*versions_of_tokens(answer)}}
                named = torch.stack([each[version][place] for place, version in enumerate(versions_of_tokens(answer))])
                differences.append((drawn - named).abs().max())
                if len(each) > 1:
                    of_older.append((drawn - each[min(each)]).abs().max())
    assert len(differences) > 20 and max(differences) < 1e-5
    assert max(of_older) > 1e-3, "else the test shows nothing"


def test_a_schedule_repeats_a_run_bit_for_bit(folder: Path, partial: Path) -> None:
    same = partial_words(folder)
    check_equal(run(folder, "repeated", {**same, "rollout__replay": partial / "schedule.jsonl"}), partial)
    # Weights that come one decode step earlier make another run.
    events = lines_of(partial / "schedule.jsonl")
    event = next(event for event in events if event["event"] == "weights" and event["step"] == STEPS - 1)
    event["decode_steps"] -= 1
    next(event for event in events if event["event"] == "finished" and event["step"] == STEPS)["decode_steps"] += 1
    (folder / "changed.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    changed = run(folder, "changed", {**same, "rollout__replay": folder / "changed.jsonl"})
    found, expected = timeless(metrics_of(changed)), timeless(metrics_of(partial))
    assert found[:-1] == expected[:-1] and found[-1] != expected[-1]
    # Nor is a command that asks other prompts that run, or one that saves at other steps.
    with pytest.raises(
        AssertionError, match=r"rollout\.replay: the recorded run has '\w+' after \d+ decode steps in step \d+, and this one has"
    ):
        run(folder, "others", {**same, "rollout__replay": partial / "schedule.jsonl", "data__prompts_per_step": 2})
    with pytest.raises(AssertionError, match=r"rollout\.replay: the recorded run has 'cut' after \d+ decode steps in step 1"):
        run(folder, "other", {**same, "rollout__replay": partial / "schedule.jsonl", "trainer__save_freq": 2})


@pytest.mark.parametrize(("kept", "async_save"), [(2, "false"), (3, "true")])
def test_a_resumed_run_goes_on_with_unfinished_answers_bit_for_bit_as_its_schedule_says(
    folder: Path, partial: Path, kept: int, async_save: str
) -> None:
    copied = shutil.copytree(partial, folder / f"partial_resumed_{kept}")
    for step in range(kept + 1, STEPS + 1):
        shutil.rmtree(copied / f"global_step_{step}")
        (copied / f"rollouts/step_{step}.jsonl").unlink()
    held = read_answers(copied / f"global_step_{kept}")
    assert any(not answer.is_finished and answer.token_ids for answers in held.values() for answer in answers), "else it shows nothing"
    more: dict[str, object] = {"rollout__replay": partial / "schedule.jsonl", "trainer__async_save": async_save}
    run(folder, f"partial_resumed_{kept}", {**partial_words(folder), **more})
    check_equal(copied, partial)


@pytest.mark.parametrize("ranks", ["[0,1]", "[0]"], ids=["two train", "two generate"])
def test_three_processes_draw_without_a_pause(folder: Path, ranks: str) -> None:
    more: dict[str, object] = {**dict.fromkeys((f"mapping__{role}" for role in ROLES), ranks), "model__strategy": "fsdp2"}
    more["mapping__rollout"] = "[2]" if ranks == "[0,1]" else "[1,2]"
    found = run(folder, f"three_{ranks}", {**PARTIAL, **UNEQUAL, **more}, processes=3)
    assert [line["rl/largest_weight_lag"] for line in metrics_of(found)] == [0, 1, 1, 1]
    assert all(len(lines_of(found / "rollouts" / f"step_{step + 1}.jsonl")) == 16 for step in range(STEPS))
    replay: dict[str, object] = {"rollout__replay": found / "schedule.jsonl"}
    check_equal(run(folder, f"three_{ranks}_again", {**PARTIAL, **UNEQUAL, **more, **replay}, processes=3), found)


def test_a_signal_cuts_answers_that_are_drawn_and_they_go_on(folder: Path) -> None:
    steps: dict[str, object] = {**UNEQUAL, "rollout__partial": "true", "trainer__total_training_steps": 40}
    stopped = pair(folder, "cut", **steps)
    wait_for(lambda: (folder / "cut/metrics.jsonl").exists() and len(metrics_of(folder / "cut")) > 2)
    for process in stopped.processes:
        process.send_signal(signal.SIGTERM)
    trains, generates = stopped.ends()
    assert (trains[0], generates[0]) == (75, 0), trains[2] + generates[2]
    step = len(metrics_of(folder / "cut"))
    assert step < 40, "else the test shows nothing"
    held = read_answers(folder / f"cut/global_step_{step}")
    assert [code for code, *_ in pair(folder, "cut", **steps).ends()] == [0, 0]
    lines = metrics_of(folder / "cut")
    assert [line["step"] for line in lines] == [*range(1, 41)] and max(line["rl/largest_weight_lag"] for line in lines) == 1
    drawn = lines_of(folder / f"cut/rollouts/step_{step + 1}.jsonl")
    tokenizer = load_tokenizer(str(folder / "model"))
    begun = [(number, k, answer) for number, answers in held.items() for k, answer in enumerate(answers) if answer.token_ids]
    assert begun, "else the test shows nothing"
    for number, k, answer in begun:
        if of_number := [line for line in drawn if line["number"] == number]:
            text = str(tokenizer.decode(answer.token_ids, skip_special_tokens=True)).rstrip("�")
            assert of_number[k]["response"].startswith(text) and of_number[k]["version"] == answer.version


GOES_ON = """
ROLE = "user"


def reply(response, prompt, row):
    return "Go on."
"""


@pytest.mark.parametrize("partial", ["false", "true"])
def test_turns_after_a_tools_reply_are_drawn_by_the_weights_of_now(folder: Path, partial: str) -> None:
    (folder / "goes_on.py").write_text(GOES_ON)
    more: dict[str, object] = {"rollout__tool": folder / "goes_on.py", "rollout__max_turns": 2, "rollout__max_new_tokens": 100}
    found = run(folder, f"tool_{partial}", {**AHEAD, **more, "rollout__partial": partial})
    several = of_two_versions(found)
    assert several and all(line["turns"] == 2 for line in several if partial == "false")
    for step, line in enumerate(metrics_of(found)):
        answers = lines_of(found / "rollouts" / f"step_{step + 1}.jsonl")
        assert {answer["versions"][-1][0] for answer in answers if "versions" in answer} <= {step}
        assert line["rl/largest_weight_lag"] <= 1
    assert max(line["rl/turns"] for line in metrics_of(found)) > 1


def test_a_server_draws_ahead_too(folder: Path) -> None:
    stand_in = StandIn(folder / "model")
    with server(stand_in.answer) as url:
        more: dict[str, object] = {"rollout__name": "vllm", "rollout__url": url, "trainer__total_training_steps": 3}
        found = run(folder, "served", {**AHEAD, **more})
    first, *others = metrics_of(found)
    assert first["rl/rollout_difference"] < 1e-5 < min(line["rl/rollout_difference"] for line in others)
    assert [line["rl/weight_lag"] for line in (first, *others)] == [0, 1, 1]
    assert stand_in.calls.count("/v1/completions") == 3 * 16
