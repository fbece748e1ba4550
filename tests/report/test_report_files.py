"""What verl report reads: metrics of runs that are writing, resumed or damaged, and the statistics of evaluations."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import verl
from verl.errors import UserError
from verl.eval.report import wilson_interval
from verl.report.charts import charts_of
from verl.report.evaluations import Answer, Evaluation, comparisons_of, read_evaluation
from verl.report.metrics import MOST_POINTS, Metrics, parse_metrics, smoothed, thinned
from verl.report.page import visible
from verl.report.runs import name_apart, read_run
from verl.report.statistics import BOOTSTRAP, MCNEMAR, SIGN_FLIPS, compare, interval_of


def line(step: int, **values: float | None) -> str:
    return json.dumps({"step": step, **{name.replace("__", "/"): value for name, value in values.items()}}) + "\n"


# metrics.jsonl


def test_the_line_that_a_run_is_writing_is_left_out_and_said() -> None:
    found = parse_metrics(line(1, train__loss=2.0) + line(2, train__loss=1.5) + '{"step": 3, "train/lo')
    assert found.curve("train/loss") == [(1, 2.0), (2, 1.5)]
    assert found.notes == ["The last line of metrics.jsonl is incomplete: the run is writing it, or was killed there. It is left out."]


def test_a_whole_last_line_without_its_end_counts() -> None:
    found = parse_metrics(line(1, a=1.0) + line(2, a=2.0).rstrip())
    assert found.curve("a") == [(1, 1.0), (2, 2.0)] and found.notes == []


def test_of_a_step_that_comes_twice_the_later_line_counts() -> None:
    found = parse_metrics(line(1, a=1.0) + line(2, a=2.0) + line(2, a=5.0) + line(3, a=3.0))
    assert found.curve("a") == [(1, 1.0), (2, 5.0), (3, 3.0)]
    assert found.notes == ["metrics.jsonl has 1 step twice, as after a resumption; the later line of each is shown."]


@pytest.mark.parametrize(
    "damaged", ["nonsense", "[1]", '{"a": 1}', '{"step": "x"}', '{"step": null}', "\0\0\0", '{"step": 1e999}', "[" * 9999]
)
def test_a_damaged_line_is_counted_with_its_place(damaged: str) -> None:
    found = parse_metrics(f"{line(1, a=1.0)}{damaged}\n{line(2, a=2.0)}")
    assert found.curve("a") == [(1, 1.0), (2, 2.0)]
    assert found.notes == ["metrics.jsonl has 1 damaged line, left out here (line 2)."]


def test_values_that_are_not_finite_are_no_points() -> None:
    assert parse_metrics(line(1, a=None) + line(2, a=3.0)).curve("a") == [(2, 3.0)]


def test_smoothing_keeps_lines_and_their_ends_and_calms_noise() -> None:
    line_ = [(float(step), 3.0 - 0.01 * step) for step in range(700)]
    assert [value for _, value in smoothed(line_)] == pytest.approx([value for _, value in line_], abs=1e-3), "a straight line has no lag"
    noise = np.random.default_rng(0).normal(1, 1, 3000)
    found = [value for _, value in smoothed([(float(step), value) for step, value in enumerate(noise)])]
    assert (found[0], found[-1]) == (noise[0], noise[-1])
    assert np.std(found[300:-300]) < 0.2 and abs(np.mean(found) - 1) < 0.1
    assert smoothed([(1.0, 2.0)]) == [(1.0, 2.0)] and smoothed([]) == []


def test_thinning_a_long_curve_keeps_its_peaks() -> None:
    points = [(float(step), 0.0) for step in range(50_000)]
    points[31_234], points[777] = (31_234.0, 9.0), (777.0, -9.0)
    found = thinned(points)
    assert len(found) <= MOST_POINTS and (31_234.0, 9.0) in found and (777.0, -9.0) in found
    assert found == sorted(found)
    assert thinned(points[:10]) == points[:10]


def test_a_metric_that_no_table_knows_has_a_chart_too() -> None:
    found = charts_of([parse_metrics(line(1, train__loss=1.0, my__own=2.0, epoch=0.0)), Metrics()])
    assert {heading: [chart.metric for chart in group] for heading, group in found.items()} == {
        "Learning": ["train/loss"],
        "Other metrics": ["my/own"],
    }


# Damaged directories


def test_a_run_with_damaged_files_has_a_page_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("optim: {lr: 1\n")
    (tmp_path / "metrics.jsonl").write_text(line(1, train__loss=1.0) + "broken\n" + line(3, train__loss=0.5))
    (tmp_path / "trainer_state.json").write_text("{")
    (tmp_path / "global_step_3").mkdir()
    notes = read_run(tmp_path).notes
    for part in ("config.yaml cannot be read", "1 damaged line", "trainer_state.json cannot be read", "train.log is missing"):
        assert sum(part in note for note in notes) == 1
    text = verl.write_report(tmp_path).read_text(encoding="utf-8")
    assert "config.yaml cannot be read" in text and "settings are not known" in text


def test_a_run_that_has_not_finished_a_step_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "train.log").write_text("starting a new run: no checkpoint\n")
    assert "metrics.jsonl is missing" in verl.write_report(tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("make", "what"), [(lambda p: None, "is missing"), (Path.touch, "is a file"), (Path.mkdir, "is no run's directory")]
)
def test_a_directory_that_is_no_run_is_refused_with_the_fix(tmp_path: Path, make: Any, what: str) -> None:
    make(tmp_path / "x")
    with pytest.raises(UserError, match=what) as error:
        read_run(tmp_path / "x")
    assert error.value.fix == "name the run's trainer.default_local_dir"


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = []
    for parent in ("a", "b"):
        (tmp_path / parent / "run").mkdir(parents=True)
        (tmp_path / parent / "run" / "metrics.jsonl").write_text(line(1, a=1.0))
        runs.append(read_run(tmp_path / parent / "run"))
    name_apart(runs)
    assert [run.name for run in runs] == ["a/run", "b/run"]


def test_what_a_resumed_run_says_about_its_data_is_what_it_said_last(tmp_path: Path) -> None:
    start = "data.train_files: rows {} read\nfirst row, 3 tokens:\n  trained | x\ndevice: CPU\nplan: 9 steps\nstep 1/9 · loss 1\n"
    (tmp_path / "train.log").write_text(start.format(1) + "warning: odd\nwarning: odd\n" + start.format(2))
    run = read_run(tmp_path)
    assert run.data_lines == ["data.train_files: rows 2 read", "first row, 3 tokens:", "  trained | x"]
    assert (run.total_steps, run.said("device: "), run.warnings) == (9, "CPU", ["warning: odd"])


# Evaluations


def write_evaluation(folder: Path, scores: list[float], *, n: int = 1, cut: str = "") -> Path:
    folder.mkdir()
    rows = [{"prompt": f"q{i // n}", "reference": "1", "response": f"r{i}", "extracted": None, "score": s} for i, s in enumerate(scores)]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + cut)
    config = {"model_path": str(folder), "test_file": "t.jsonl", "n": n}
    (folder / "results.json").write_text(json.dumps({"answers": len(rows), "config": config}))
    return folder


def test_an_evaluation_that_is_damaged_or_unfinished_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    found = read_evaluation(write_evaluation(tmp_path / "a", [1.0, 0.0], cut='{"prompt": "cut'))
    assert found.mean == 0.5 and ["1 damaged line" in note for note in found.notes] == [True]
    (tmp_path / "a" / "results.json").unlink()
    assert ["results.json is missing" in note for note in read_evaluation(tmp_path / "a").notes] == [True, False]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="so it is no evaluation"):
        read_evaluation(tmp_path / "empty")


def test_questions_are_paired_by_their_texts_and_the_others_counted(tmp_path: Path) -> None:
    before = read_evaluation(write_evaluation(tmp_path / "a", [0.0, 1.0, 0.0, 1.0, 0.0]))
    after = read_evaluation(write_evaluation(tmp_path / "b", [1.0, 0.0, 0.0, 1.0]))
    before.answers.reverse()  # the order of the rows does not count
    (one,) = comparisons_of([before, after])
    kinds = (one.right, one.wrong, one.same_wrong, one.same_right)
    assert [[turned.after.prompt for turned in kind] for kind in kinds] == [["q0"], ["q1"], ["q2"], ["q3"]]
    assert one.unpaired == 1


def test_equal_questions_are_paired_one_by_one() -> None:
    def evaluation(*scores: float) -> Evaluation:
        return Evaluation(Path("e"), {"test_file": "t"}, answers=[Answer("same", "1", "r", None, score) for score in scores])

    (one,) = comparisons_of([evaluation(0.0, 1.0), evaluation(1.0, 1.0)])
    assert (len(one.right), len(one.same_right), one.unpaired) == (1, 1, 0)


def test_several_answers_to_a_question_count_as_one_by_their_mean(tmp_path: Path) -> None:
    found = read_evaluation(write_evaluation(tmp_path / "a", [1.0, 0.0, 0.0, 0.0], n=2))
    assert found.scores == [0.5, 0.0] and found.interval is not None and found.interval.method == BOOTSTRAP


def test_evaluations_of_other_files_are_not_compared() -> None:
    answers = [Answer("q", "1", "r", None, 1.0)] * 3
    found = [Evaluation(Path(name), {"test_file": name}, answers=answers) for name in ("x", "y")]
    assert comparisons_of(found) == []


def test_an_evaluation_is_compared_with_the_model_that_its_run_began_with(tmp_path: Path) -> None:
    """Of a chain of two runs: the second began with a checkpoint of the first."""
    runs, answers = [], [Answer("q", "1", "r", None, 1.0)] * 3
    for name, base in (("sft", "model"), ("rl", str(tmp_path / "sft/global_step_9")), ("other", "model")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"model: {{partial_pretrain: {base}}}\n")
        runs.append(read_run(tmp_path / name))
    models = ("model", tmp_path / "sft/global_step_9", tmp_path / "rl/global_step_2", tmp_path / "other/global_step_4")
    owners = ((0, 0), (0, 9), (1, 2), (2, 4))
    found = [
        Evaluation(Path(f"e{number}"), {"test_file": "t", "model_path": str(model)}, answers=answers, run=run, step=step)
        for number, (model, (run, step)) in enumerate(zip(models, owners, strict=True))
    ]
    pairs = [(str(one.before.path), str(one.after.path)) for one in comparisons_of(found, runs)]
    assert pairs == [("e0", "e1"), ("e1", "e2"), ("e0", "e3"), ("e1", "e3")]


# Statistics


@pytest.mark.parametrize(("right", "n"), [(0, 20), (7, 20), (20, 20), (431, 1319)])
def test_the_interval_is_the_evaluators(right: int, n: int) -> None:
    found, expected = interval_of([1.0] * right + [0.0] * (n - right)), wilson_interval(right / n, n)
    assert found is not None and expected is not None
    assert (found.low, found.high) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("right", "wrong"), [(1, 0), (5, 1), (3, 12), (40, 22), (6, 6)])
def test_mcnemars_test_is_the_binomial_sum(right: int, wrong: int) -> None:
    turned = right + wrong
    tail = sum(math.comb(turned, k) for k in range(min(right, wrong) + 1)) / 2**turned
    before, after = [0.0] * right + [1.0] * wrong + [1.0] * 9, [1.0] * right + [0.0] * wrong + [1.0] * 9
    found = compare(before, after)
    assert found is not None and found.method == MCNEMAR
    assert found.p_value == pytest.approx(min(1.0, 2 * tail))
    assert found.difference == pytest.approx((right - wrong) / (turned + 9))
    assert found.interval.low < found.difference < found.interval.high


def test_the_interval_of_a_difference_holds_it_in_95_of_100_samples() -> None:
    random, truth, held = np.random.default_rng(2), 0.2, 0
    for _ in range(400):
        before = random.random(100) < 0.4
        after = np.where(before, random.random(100) < 0.85, random.random(100) < 0.4333333)
        found = compare(before.astype(float).tolist(), after.astype(float).tolist())
        assert found is not None
        held += found.interval.low <= truth <= found.interval.high
    assert 0.92 <= held / 400 <= 0.99


def test_scores_between_right_and_wrong_are_compared_by_flipping_signs() -> None:
    random = np.random.default_rng(0)
    before = random.random(60)
    better, same = compare(before.tolist(), (before + 0.2).tolist()), compare(before.tolist(), random.permutation(before).tolist())
    assert better is not None and same is not None and better.method == SIGN_FLIPS
    assert better.p_value < 0.001 and same.p_value > 0.05
    assert compare(before.tolist(), before.tolist()) is not None
    assert compare([1.0], [0.0]) is None


def test_marks_that_reorder_a_text_are_made_visible() -> None:
    assert visible("a\u202eb\0c\r\nd\ud800 é 漢 👩‍💻") == "a\\u202eb\\u0000c\nd\\ud800 é 漢 👩‍💻"
