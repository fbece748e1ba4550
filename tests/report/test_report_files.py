"""What verl report reads: metrics of runs that are writing, resumed or damaged, and the statistics of evaluations."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import verl
from verl.errors import UserError
from verl.eval import against
from verl.eval.intervals import WILSON, interval_of, wilson_interval
from verl.report import command
from verl.report.charts import charts_of
from verl.report.comparisons import comparisons_of
from verl.report.evaluations import Answer, Evaluation, read_evaluation
from verl.report.metrics import MOST_POINTS, Metrics, parse_metrics, smoothed, thinned
from verl.report.page import visible
from verl.report.runs import RunFiles, name_apart, read_run
from verl.report.summary import state_of


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


def test_a_run_that_trainer_patience_ended_is_not_said_to_be_running(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("trainer: {total_training_steps: 4}\n")
    (tmp_path / "metrics.jsonl").write_text(line(1, train__loss=1.0) + line(2, train__loss=0.5))
    log = "stopped early after step 2 of 4: val/loss has not become better in 1 validation\n"
    (tmp_path / "train.log").write_text(log)
    run = read_run(tmp_path)
    assert run.is_finished and state_of(run) == "stopped early by trainer.patience, after 2 of 4 steps"
    (tmp_path / "metrics.jsonl").write_text("".join(line(step, train__loss=1.0) for step in (1, 2, 3)))  # it goes on
    assert not read_run(tmp_path).is_finished


def test_the_folders_of_a_page_are_made(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=2, minute=0)
    verl.write_report(run.directory, out=tmp_path / "new" / "deep" / "page.html")
    assert (tmp_path / "new" / "deep" / "page.html").is_file()


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
    config = {"model_path": str(folder), "test_file": "t.jsonl", "metric": "exact", "n": n}
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
    assert found.scores == [0.5, 0.0] and found.interval == (wilson_interval(0.25, 2), WILSON)


def test_evaluations_of_other_files_are_not_compared() -> None:
    answers = [Answer("q", "1", "r", None, 1.0)] * 3
    found = [Evaluation(Path(name), {"test_file": name}, answers=answers) for name in ("x", "y")]
    assert comparisons_of(found) == []


def test_an_evaluation_is_compared_with_the_model_that_its_run_began_with(tmp_path: Path) -> None:
    """Of a chain of two runs: the second began with a checkpoint of the first. The third has the data of the first."""
    runs, answers = [], [Answer("q", "1", "r", None, 1.0)] * 3
    for name, base, data in (("sft", "model", "a"), ("rl", str(tmp_path / "sft/global_step_9"), "b"), ("other", "model", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"model: {{partial_pretrain: {base}}}\ndata: {{train_files: {data}}}\n")
        runs.append(read_run(tmp_path / name))
    models = ("model", tmp_path / "sft/global_step_9", tmp_path / "rl/global_step_2", tmp_path / "other/global_step_4")
    owners = ((0, 0), (0, 9), (1, 2), (2, 4))
    found = [
        Evaluation(Path(f"e{number}"), {"test_file": "t", "model_path": str(model)}, answers=answers, run=run, step=step)
        for number, (model, (run, step)) in enumerate(zip(models, owners, strict=True))
    ]
    pairs = [(str(one.before.path), str(one.after.path)) for one in comparisons_of(found, runs)]
    assert pairs == [("e0", "e1"), ("e1", "e2"), ("e0", "e3"), ("e1", "e3")]


# Which run with which


def write_run(folder: Path, *, steps: int, minute: int, data: str = "train.jsonl") -> RunFiles:
    """A run of ten steps, of which some are done, the last one at a minute."""
    folder.mkdir()
    (folder / "config.yaml").write_text(f"data: {{train_files: {data}}}\ntrainer: {{total_training_steps: 10}}\n")
    (folder / "metrics.jsonl").write_text("".join(line(step, a=1.0) for step in range(1, steps + 1)))
    os.utime(folder / "metrics.jsonl", (60 * minute, 60 * minute))
    return read_run(folder)


def of_runs(runs: list[RunFiles]) -> list[Evaluation]:
    """One evaluation of the last checkpoint of each run."""
    answers = [Answer("q", "1", "r", None, 1.0)] * 3
    return [
        Evaluation(Path(run.name), {"test_file": "t", "model_path": str(run.directory)}, answers=answers, run=number, step=10)
        for number, run in enumerate(runs)
    ]


def test_a_run_is_compared_with_the_latest_run_before_it_that_finished_on_its_data(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "run", steps=10, minute=1),
        write_run(tmp_path / "run-10", steps=10, minute=9),
        write_run(tmp_path / "run-2", steps=10, minute=2),
        write_run(tmp_path / "run-3", steps=4, minute=3),
        write_run(tmp_path / "run-4", steps=10, minute=4, data="other.jsonl"),
    ]
    found = comparisons_of(of_runs(runs), runs)
    assert [(one.before.path.name, one.after.path.name) for one in found] == [
        ("run", "run-2"),
        ("run-2", "run-3"),  # not `run`, which the folder begins with
        ("run-2", "run-4"),  # run-3 was killed
        ("run-2", "run-10"),  # run-4 has other data
    ]
    finished = "the latest run before it that finished, on"
    assert [one.why for one in found] == [
        f"run-2 is compared with run: {finished} the same training data (last step 1970-01-01 00:01 UTC)",
        f"run-3 is compared with run-2: {finished} the same training data (last step 1970-01-01 00:02 UTC)",
        f"run-4 is compared with run-2: {finished} other training data (last step 1970-01-01 00:02 UTC)",
        f"run-10 is compared with run-2: {finished} the same training data (last step 1970-01-01 00:02 UTC)",
    ]


def test_page_and_command_say_which_run_another_one_is_compared_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [tmp_path / "run", tmp_path / "run-2"]
    for minute, folder in enumerate(folders):
        write_run(folder, steps=10, minute=minute)
        results = write_evaluation(folder / "eval", [1.0, 0.0, 1.0]) / "results.json"
        results.write_text(results.read_text().replace(str(folder / "eval"), str(folder / "global_step_10")))
    command.main(folders, [], tmp_path / "page.html", None)
    why = "run-2 is compared with run: the latest run before it that finished, on the same training data (last step 1970-01-01 00:00 UTC)"
    assert capsys.readouterr().out.count(f"\n{why}\n") == 1
    assert f'<p class="quiet">{why}.</p>' in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_if_no_run_finished_the_latest_one_is_compared_and_this_is_said(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run-{number}", steps=number, minute=number) for number in (3, 2, 4)]
    found = comparisons_of(of_runs(runs), runs)
    assert [(one.before.path.name, one.after.path.name) for one in found] == [("run-2", "run-3"), ("run-3", "run-4")]
    assert all("of which none is known to have finished, on the same training data" in one.why for one in found)
    for run in runs:
        run.config = {}
    assert "; its training data may be other (last" in comparisons_of(of_runs(runs), runs)[0].why


def test_a_model_of_no_run_is_compared_with_the_first_evaluation(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "run", steps=10, minute=1)]
    other = Evaluation(Path("other"), {"test_file": "t", "model_path": "other"}, answers=[Answer("q", "1", "r", None, 0.0)] * 3)
    (one,) = comparisons_of([*of_runs(runs), other], runs)
    assert (one.before.path.name, one.after.path.name, one.why) == ("run", "other", "")


# The same figures as those of verl eval


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("levels", [2, 5])
def test_intervals_and_comparisons_are_those_of_the_evaluator(tmp_path: Path, n: int, levels: int) -> None:
    random, read = np.random.default_rng(levels), []
    for name in ("a", "b"):
        scores = (random.integers(levels, size=60) / (levels - 1)).tolist()
        read.append(read_evaluation(write_evaluation(tmp_path / name, scores, n=n)))
        assert read[-1].interval == interval_of([scores[start : start + n] for start in range(0, 60, n)])
    (one,) = comparisons_of(read)
    assert one.test == against.compared(*(against.read(str(tmp_path / name), "here") for name in ("b", "a")))
    assert one.test is not None and one.test.interval_method == ("paired bootstrap" if n * levels > 2 else "Newcombe 1998, method 10")


def test_one_question_is_too_few(tmp_path: Path) -> None:
    before, after = (read_evaluation(write_evaluation(tmp_path / name, [score])) for name, score in (("a", 0.0), ("b", 1.0)))
    assert comparisons_of([before, after])[0].test is None
    assert before.interval is not None and read_evaluation(write_evaluation(tmp_path / "c", [0.5])).interval is None


def test_marks_that_reorder_a_text_are_made_visible() -> None:
    assert visible("a\u202eb\0c\r\nd\ud800 é 漢 👩‍💻") == "a\\u202eb\\u0000c\nd\\ud800 é 漢 👩‍💻"
