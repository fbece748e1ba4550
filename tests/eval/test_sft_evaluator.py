"""The evaluator from a file of questions to results.json, on checkpoints whose answers are known."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_forked
from learned import ROWS, write_rows
from peft import LoraConfig, get_peft_model
from places import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl.config.commands import EngineConfig, EvalConfig, GraderConfig
from verl.data.render import Renderer
from verl.errors import UserError, exit_on_user_error
from verl.eval import sft_evaluator
from verl.eval.intervals import wilson_interval
from verl.eval.sft_evaluator import evaluate, read_questions
from verl.rollout import Completion, Sampling
from verl.rollout._plain import Probe
from verl.rollout.native import NativeRollout

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"


@pytest.fixture
def checkpoint(learned_checkpoint: Path) -> Path:
    return learned_checkpoint


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test fails if a model is loaded."""

    def load_rollout(*_: object, **__: object) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(sft_evaluator, "load_rollout", load_rollout)


def config(tmp_path: Path, checkpoint: Path | str, rows: list[dict[str, Any]] | None = None, **options: Any) -> EvalConfig:
    test_file = write_rows(tmp_path / "test.jsonl", ROWS if rows is None else rows)
    settings = {"output_dir": str(tmp_path / "out"), "max_new_tokens": 40, **options}
    return EvalConfig(model_path=str(checkpoint), test_file=str(test_file), **settings)


def predictions(settings: EvalConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(settings.output_dir) / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_results_are_not_replaced_unless_the_user_says_so(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(config(tmp_path, checkpoint, ROWS[:1], max_new_tokens=2))
    before = (tmp_path / "out" / "predictions.jsonl").read_bytes()
    with pytest.raises(UserError) as caught:
        evaluate(config(tmp_path, checkpoint, ROWS[:2]))
    assert str(caught.value.where) == f"output_dir={tmp_path / 'out'}" and "has the results of an evaluation" in caught.value.what
    assert "overwrite=true" in caught.value.fix and (tmp_path / "out" / "predictions.jsonl").read_bytes() == before
    capsys.readouterr()
    evaluate(config(tmp_path, checkpoint, ROWS[:2], overwrite=True))
    assert "replaces the results of an evaluation (" in capsys.readouterr().out


def test_a_model_that_learned_the_rows_answers_them_all(tmp_path: Path, checkpoint: Path) -> None:
    settings = config(tmp_path, checkpoint)
    results = evaluate(settings)
    assert results == json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["exact_match"] == results["exact_match_flexible"] == 1.0
    assert results["n"] == len(ROWS) and results["truncated"] == 0.0 and results["seconds"] > 0
    assert results["confidence_interval_95"] == list(wilson_interval(1.0, len(ROWS)))
    assert results["config"] == asdict(settings) and results["versions"]["torch"] == torch.__version__
    lines = predictions(settings)
    assert [(line["prompt"], line["response"], line["reference"]) for line in lines] == [
        (r["question"], r["answer"], r["answer"]) for r in ROWS
    ]
    assert [(line["extracted"], line["expected"]) for line in lines] == [("3", "3"), ("45", "45"), ("650", "650"), ("1207", "1207")]
    assert all(line["correct"] is True and line["finish_reason"] == "stop" for line in lines)
    assert results["tokens"] == sum(line["tokens"] for line in lines)


def test_answers_that_differ_from_the_references_are_wrong(tmp_path: Path, checkpoint: Path) -> None:
    others = [
        {**row, "answer": answer} for row, answer in zip(ROWS, ("#### 4", "so #### 46", "#### 650", "the answer is -1,207"), strict=True)
    ]
    settings = config(tmp_path, checkpoint, others)
    assert evaluate(settings)["exact_match"] == 0.25
    assert [(line["extracted"], line["expected"], line["correct"]) for line in predictions(settings)] == [
        ("3", "4", False),
        ("45", "46", False),
        ("650", "650", True),
        ("1207", "-1207", False),
    ]


def test_answers_that_are_cut_say_so(tmp_path: Path, checkpoint: Path) -> None:
    settings = config(tmp_path, checkpoint, max_new_tokens=3)
    results = evaluate(settings)
    assert results["truncated"] == 1.0 and results["exact_match"] == 0.0 and results["tokens"] == 3 * len(ROWS)
    assert {(line["finish_reason"], line["extracted"]) for line in predictions(settings)} == {("length", None)}


def test_columns_can_have_other_names_and_only_the_first_rows_be_used(tmp_path: Path, checkpoint: Path) -> None:
    rows = [{"q": row["question"], "a": row["answer"]} for row in ROWS] + [{"q": "no answer"}]
    results = evaluate(config(tmp_path, checkpoint, rows, prompt_key="q", response_key="a", max_samples=3, batch_size=2))
    assert results["exact_match"] == 1.0 and results["n"] == 3


def chat_of(row: dict[str, Any], **more: object) -> dict[str, Any]:
    messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
    return {"messages": messages, **more}


def test_chats_are_answered_as_questions_are(tmp_path: Path, checkpoint: Path) -> None:
    waiting = {"messages": json.dumps(chat_of(ROWS[2])["messages"][:1]), "answer": "#### -1"}
    rows = [chat_of(ROWS[0]), chat_of(ROWS[1], answer="#### -1"), waiting]
    settings = config(tmp_path, checkpoint, rows, messages_key="messages")
    assert evaluate(settings)["exact_match"] == pytest.approx(1 / 3)  # the others' answers are not those of their chats
    found = predictions(settings)
    assert [line["prompt"] for line in found] == [row["question"] for row in ROWS[:3]]
    assert [line["reference"] for line in found] == [ROWS[0]["answer"], "#### -1", "#### -1"]
    assert [line["response"] for line in found] == [row["answer"] for row in ROWS[:3]]


def test_a_chat_is_asked_with_its_tools(tmp_path: Path, checkpoint: Path) -> None:
    tools = [{"type": "function", "function": {"name": "calculator", "description": "Adds.", "parameters": {}}}]
    settings = config(tmp_path, checkpoint, [chat_of(ROWS[0], tools=tools)], messages_key="messages", tools_key="tools")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = "{%- for tool in tools %}{{ tool.function.name }} {% endfor %}" + tokenizer.chat_template
    (question,) = read_questions(settings)
    text = str(tokenizer.decode(sft_evaluator.render(Renderer(tokenizer), question)))
    assert text.startswith("calculator ") and text.count(ROWS[0]["question"]) == 1


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("row", "options", "said"),
    [
        ({"messages": []}, {}, "an empty list"),
        ({"messages": "[{"}, {}, "not JSON"),
        ({"messages": [{"role": "user", "content": "1 + 1?"}]}, {}, "answer"),
        ({"question": "1 + 1?"}, {}, "messages"),
        (chat_of(ROWS[0]), {"system_prompt": "Be brief."}, "both set"),
        (chat_of(ROWS[0]), {"messages_key": None, "tools_key": "tools"}, "column 'tools' is missing"),
    ],
)
def test_a_chat_that_cannot_be_asked_is_named(
    row: dict[str, Any], options: dict[str, Any], said: str, tmp_path: Path, checkpoint: Path
) -> None:
    settings = config(tmp_path, checkpoint, [row], **{"messages_key": "messages", **options})

    def ask() -> None:
        settings.check()
        evaluate(settings)

    with pytest.raises(UserError) as caught:
        ask()
    assert said in str(caught.value)


def test_several_answers_to_a_question_stand_side_by_side(tmp_path: Path, checkpoint: Path) -> None:
    settings = config(tmp_path, checkpoint, n=3, temperature=1.0, batch_size=5)
    results, lines = evaluate(settings), predictions(settings)
    assert [line["prompt"] for line in lines] == [row["question"] for row in ROWS for _ in range(3)]
    assert results["n"] == 4 and results["answers"] == 12
    assert results["exact_match"] == pytest.approx(sum(line["correct"] for line in lines) / 12)


def test_an_adapter_answers_as_the_model_it_is_merged_into(tmp_path: Path, checkpoint: Path) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(checkpoint), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(str(tmp_path / "bare_adapter"))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    merged_model: Any = adapted.merge_and_unload()
    merged_model.save_pretrained(tmp_path / "merged")
    for name in ("adapter", "merged"):
        tokenizer.save_pretrained(str(tmp_path / name))

    responses = {}
    for path in (checkpoint, tmp_path / "adapter", tmp_path / "bare_adapter", tmp_path / "merged"):
        evaluate(settings := config(tmp_path, path, overwrite=True))
        responses[path] = [line["response"] for line in predictions(settings)]
    base, adapter, bare_adapter, merged = responses.values()
    assert adapter == bare_adapter == merged
    assert adapter != base


# A grader of one's own


def test_a_metric_of_ones_own_writes_the_same_files(tmp_path: Path, checkpoint: Path) -> None:
    metric = tmp_path / "mine.py"
    metric.write_text("def score(prompt, response, row):\n    return 0.25 * (row['reference'] == response) + 0.5 * (row['id'] in prompt)\n")
    rows = [{**row, "id": "1 + 2"} for row in ROWS]
    settings = config(tmp_path, checkpoint, rows, metric=str(metric))
    results, lines = evaluate(settings), predictions(settings)
    assert [line["score"] for line in lines] == [0.75, 0.25, 0.25, 0.25] and not any(line["correct"] for line in lines)
    assert results["exact_match"] == 0.375 and results["exact_match_flexible"] is None
    assert {(line["extracted"], line["expected"], line["correct_flexible"]) for line in lines} == {(None, None, None)}


@pytest.mark.parametrize(("said", "expected"), [("np.float32(0.5)", 0.5), ("np.bool_(True)", 1.0), ("np.int64(2)", 2.0)])
def test_a_metric_may_score_in_any_kind_of_number(tmp_path: Path, checkpoint: Path, said: str, expected: float) -> None:
    metric = tmp_path / "mine.py"
    metric.write_text(f"import numpy as np\n\n\ndef score(prompt, response, row):\n    return {said}\n")
    settings = config(tmp_path, checkpoint, metric=str(metric))
    assert evaluate(settings)["exact_match"] == expected
    assert all(line["correct"] == (expected == 1) for line in predictions(settings))


def test_the_example_metric_runs(tmp_path: Path, checkpoint: Path) -> None:
    settings = config(tmp_path, checkpoint, metric=str(ROOT / "examples" / "metrics" / "word_overlap.py"))
    assert evaluate(settings)["exact_match"] == 1.0


def test_a_metric_with_an_extractor_shows_what_it_compared(tmp_path: Path, checkpoint: Path) -> None:
    metric = tmp_path / "mine.py"
    metric.write_text("def extract_answer(text):\n    return text.split()[-1]\n\n\ndef score(prompt, response, row):\n    return 2.5\n")
    settings = config(tmp_path, checkpoint, metric=str(metric))
    results, lines = evaluate(settings), predictions(settings)
    assert (lines[3]["extracted"], lines[3]["expected"]) == ("1,207", "1,207")
    assert results["exact_match"] == 2.5 and results["confidence_interval_95"] == [2.5, 2.5]


def test_a_metric_may_score_the_answers_to_a_question_together(tmp_path: Path, checkpoint: Path) -> None:
    metric = tmp_path / "mine.py"
    metric.write_text(
        "async def score_group(prompt, responses, row):\n    return [len(responses) + i / 10 for i in range(len(responses))]\n"
    )
    settings = config(tmp_path, checkpoint, metric=str(metric), n=3, temperature=1.0, batch_size=5)
    evaluate(settings)
    assert [line["score"] for line in predictions(settings)] == [3.0, 3.1, 3.2] * 4


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("return row['no']", "raised KeyError: 'no' (.*mine.py:3)"),
        ("return 'good'", "returned 'good' of type str, expected a finite number"),
        ("return float('nan')", "returned nan of type float"),
        ("return None", "returned None of type NoneType"),
        ("exit()", "raised SystemExit: None (.*mine.py:3)"),
    ],
)
def test_a_metric_that_fails_is_named_with_its_row(tmp_path: Path, checkpoint: Path, body: str, what: str) -> None:
    metric = tmp_path / "mine.py"
    metric.write_text(f"def score(prompt, response, row):\n    # fails\n    {body}\n")
    with pytest.raises(UserError) as caught:
        evaluate(config(tmp_path, checkpoint, metric=str(metric)))
    assert str(caught.value.where).endswith("test.jsonl:1")
    assert re.match("metric mine " + what.replace("(", r"\(").replace(")", r"\)"), caught.value.what)


@pytest.mark.parametrize("function", ["score", "score_group", "exact_match"])
def test_answers_on_which_a_metric_fails_count_as_zero_and_are_marked(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], function: str
) -> None:
    fails = "    if '45' in str(a) or '45' in str(b):\n        raise ValueError('no 45')\n"
    metric = tmp_path / "mine.py"
    metric.write_text(
        "".join(
            f"def {name}({arguments}):\n{fails if name == function else ''}    return {value}\n\n\n"
            for name, arguments, value in (
                ("score", "a, b, row", "1"),
                ("extract_answer", "a, b=''", "'x'"),
                ("exact_match", "a, b, method", "True"),
                *((("score_group", "a, b, row", "[1] * len(b)"),) if function == "score_group" else ()),
            )
        )
    )
    given: dict[str, Any] = {"metric": str(metric), "reward": GraderConfig(on_error="zero")}
    settings = config(tmp_path, checkpoint, **given)
    results, lines = evaluate(settings), predictions(settings)
    (marked,) = [line for line in lines if line["error"] is not None]
    assert "ValueError: no 45" in marked["error"] and "45" in marked["reference"] and results["errors"] == 1
    in_score = function.startswith("score")
    assert (marked["score"], marked["correct"]) == ((0, False) if in_score else (1, True))
    assert results["exact_match"] == (0.75 if in_score else 1)
    assert results["exact_match_flexible"] == (0.75 if function == "exact_match" else 1)
    assert "warning: 1 answers failed and count as 0 (reward.on_error=zero):" in capsys.readouterr().out


# What is not right


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"question": "1 + 1?"}, "column 'answer' is missing"),
        ({"question": None, "answer": "#### 2"}, "column 'question' is null"),
        ({"question": "1 + 1?", "answer": [1, 2]}, "column 'answer' is a list ([1, 2])"),
        ({"question": " ", "answer": "#### 2"}, "column 'question' is empty"),
        ({"question": "1 + 1?", "answer": "many"}, "metric gsm8k finds no answer in 'many'"),
    ],
)
def test_a_row_that_cannot_be_graded_is_named_before_a_model_is_loaded(
    tmp_path: Path, checkpoint: Path, row: dict[str, Any], what: str
) -> None:
    with pytest.raises(UserError) as caught:
        evaluate(config(tmp_path, checkpoint, [*ROWS, row]))
    assert str(caught.value.where).endswith("test.jsonl:5") and what in caught.value.what


@pytest.mark.usefixtures("no_model")
def test_wrong_settings_are_named_before_a_model_is_loaded(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"output_dir": str(tmp_path / "file")}, "output_dir="),
        ({"metric": "gsm9k"}, "no rewards named 'gsm9k'"),
        ({"prompt_key": "prompt"}, "test.jsonl:1"),
    )
    for options, where in wrong:
        with pytest.raises(UserError, match=where):
            evaluate(config(tmp_path, checkpoint, **options))
    text = tmp_path / "test.txt"
    text.write_text("A paragraph.\n")
    with pytest.raises(UserError, match=r"test.txt:1: plain text"):
        evaluate(EvalConfig(model_path=str(checkpoint), test_file=str(text), output_dir=str(tmp_path / "out")))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        evaluate(config(tmp_path, checkpoint))


@pytest.mark.usefixtures("no_model")
def test_a_question_that_the_template_refuses_is_named(tmp_path: Path, checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    refusal = "{%- if '600' in messages[0].content %}{{ raise_exception('no hundreds') }}{% endif %}"
    for template, error in (
        (refusal + tokenizer.chat_template, r"^test.jsonl:3: the chat template rejects the chat: no hundreds"),
        (None, r"^chat template: the tokenizer has no chat template"),
    ):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "model")
        (tmp_path / "model" / "config.json").write_text("{}")
        if template is None:
            (tmp_path / "model" / "chat_template.jinja").unlink()
        with pytest.raises(UserError) as caught:
            evaluate(config(tmp_path, tmp_path / "model"))
        assert re.search(error, str(caught.value).replace(f"{tmp_path}/", ""))


def test_what_the_model_has_no_positions_for_is_not_asked(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.config.max_position_embeddings = 64
    for part in (model, AutoTokenizer.from_pretrained(checkpoint)):
        part.save_pretrained(tmp_path / "short")
    assert evaluate(config(tmp_path, tmp_path / "short", max_new_tokens=1000))["exact_match"] == 1.0
    assert "the model has 64 positions" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"test.jsonl:2: .* tokens do not fit into the model"):
        evaluate(config(tmp_path, tmp_path / "short", overwrite=True, rows=[ROWS[0], {"question": "1 + " * 60, "answer": "#### 60"}]))


# What ends it early


def after_one_batch(error: BaseException) -> Any:
    stream = NativeRollout.stream

    def stream_once(self: NativeRollout, prompts: list[list[int]], sampling: Sampling) -> Iterator[list[tuple[int, Completion]]]:
        yield next(stream(self, prompts, sampling))
        raise error

    return stream_once


def test_ctrl_c_leaves_the_answers_that_are_done(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tmp_path, checkpoint, batch_size=3, overwrite=True)
    evaluate(settings)
    monkeypatch.setattr(NativeRollout, "stream", after_one_batch(KeyboardInterrupt()))
    with pytest.raises(SystemExit) as caught:
        sft_evaluator.main(
            [f"{key}={value}" for key, value in asdict(settings).items() if value is not None and key not in ("rollout", "reward")]
        )
    assert caught.value.code == 130
    assert "stopped: 1 of 4 answers are in" in capsys.readouterr().out
    assert len(predictions(settings)) == 1
    assert not (tmp_path / "out" / "results.json").exists()


def test_too_little_gpu_memory_is_answered_with_a_smaller_batch(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Probe, "is_exact", lambda *_, **__: True)
    for name, step in (("native", "verl.rollout.native.runner.Runner._step"), ("hf", "verl.rollout.hf.HfRollout._generate_batch")):
        monkeypatch.setattr(step, run_out)
        with pytest.raises(UserError, match=r"4 responses at a time do not fit .*\n.*set batch_size=2") as caught:
            evaluate(config(tmp_path, checkpoint, rollout=EngineConfig(name=name)))
        assert caught.value.where == "batch_size"


@pytest.mark.parametrize("name", ["native", "hf"])
def test_every_engine_gives_the_same_answers(tmp_path: Path, checkpoint: Path, name: str) -> None:
    """Drawn ones too: which token a random number falls on is one rule for all."""
    settings = config(tmp_path, checkpoint, rollout=EngineConfig(name=name), temperature=2.0, n=2, top_k=50, top_p=0.9, batch_size=3)
    evaluate(settings)
    other = config(tmp_path, checkpoint, temperature=2.0, n=2, top_k=50, top_p=0.9, output_dir=str(tmp_path / "other"))
    evaluate(other)
    assert predictions(settings) == predictions(other)


# Numbers and commands


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"no GSM8K in {GSM8K}")
def test_every_row_of_gsm8k_can_be_asked() -> None:
    settings = EvalConfig(model_path="m", test_file=str(GSM8K / "test.jsonl"), output_dir="o")
    questions = read_questions(settings)
    assert len(questions) == 1319 and questions[0].reference.endswith("#### 18")


def test_the_command_prints_its_results(tmp_path: Path, checkpoint: Path) -> None:
    words = [f"model_path={checkpoint}", f"test_file={write_rows(tmp_path / 'test.jsonl', ROWS)}", f"output_dir={tmp_path / 'out'}"]
    words += ["prompt_key=question", "response_key=answer", "max_new_tokens=32"]
    done = run_forked("-m", "verl.eval.sft_evaluator", *words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "exact match" in done.stdout and "100.00%" in done.stdout and done.stderr == ""
    assert not any(character in done.stdout for character in "\x1b\r╭")


def test_a_wrong_command_says_what_to_do(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, error in (
        (["test_file=nothing.jsonl"], "error: test_file: no file 'nothing.jsonl'"),
        (["test_file=t.jsonl", "temprature=1"], "error: unknown key 'temprature'\n  fix: did you mean temperature?"),
    ):
        with pytest.raises(SystemExit) as caught:
            exit_on_user_error(sft_evaluator.main, [f"model_path={checkpoint}", f"output_dir={tmp_path / 'out'}", *words])
        assert caught.value.code == 2 and error in capsys.readouterr().err


def test_a_path_from_home_is_a_path(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(checkpoint)
    write_rows(tmp_path / "test.jsonl", ROWS[:1])
    sft_evaluator.main(["model_path=~/model", "test_file=~/test.jsonl", "output_dir=~/out", "max_new_tokens=16"])
    assert (tmp_path / "out" / "results.json").is_file()
