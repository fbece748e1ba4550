"""The demo: its problems are right and kept apart, its model is what it says, and the whole way runs and leaves its files."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from places import SHARED
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from verl.demo import milestones, run
from verl.demo.problems import LARGEST, SMALLEST, TEMPLATES, Problem, make_problems, write_problems
from verl.errors import UserError
from verl.models.tiny import write_tiny_model
from verl.rewards.gsm8k import exact_match

QWEN = SHARED / "models" / "qwen2.5"
EQUATION = re.compile(r"(\d+) ?([+-]) ?(\d+) ?= ?(\d+)")


@pytest.fixture(scope="module")
def problems() -> tuple[list[Problem], list[Problem]]:
    return make_problems(3000, 200, seed=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, problems: tuple[list[Problem], list[Problem]]) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder, (text for problem in problems[0] for text in (problem.question, problem.answer)))
    return folder


def worked_pairs(problem: Problem) -> set[tuple[int, ...]]:
    """The pairs of numbers of each step, of which the text works the tens and the ones of the second one after the other."""
    equations = EQUATION.findall(problem.answer)
    pairs = zip(equations[::2], equations[1::2], strict=True)
    return {tuple(sorted((int(left), int(tens) + int(ones)))) for (left, _, tens, _), (_, _, ones, _) in pairs}


def is_right(problem: Problem) -> bool:
    """Whether the worked answer, read from its text alone, holds: each line's sum, each line from the one before, and the last."""
    results: list[int] = []
    for left, operator, right, result in EQUATION.findall(problem.answer):
        numbers = [int(left), int(right)]
        goes_on = not results or numbers[0] == results[-1]
        if not goes_on or int(result) != (sum(numbers) if operator == "+" else numbers[0] - numbers[1]):
            return False
        results.append(int(result))
    return bool(results) and exact_match(problem.answer, f"#### {results[-1]}")


def shared(train: list[Problem], test: list[Problem]) -> set[object]:
    """What stands in both: questions, and pairs of numbers that are worked with."""
    questions = {problem.question for problem in train} & {problem.question for problem in test}
    pairs = set().union(*map(worked_pairs, train)) & set().union(*map(worked_pairs, test))
    return {*questions, *pairs}


def test_the_same_seed_writes_the_same_files(tmp_path: Path) -> None:
    names = ("a-train", "a-test", "b-train", "b-test", "c-train", "c-test")
    files = [tmp_path / f"{name}.jsonl" for name in names]
    for (train, test), seed in zip((files[:2], files[2:4], files[4:]), (1, 1, 2), strict=True):
        write_problems(train, test, 50, 20, seed)
    contents = [file.read_bytes() for file in files]
    assert contents[:2] == contents[2:4]
    assert contents[0] != contents[4] and contents[1] != contents[5]


def test_a_file_has_a_question_and_an_answer_a_line(tmp_path: Path) -> None:
    train, test = write_problems(tmp_path / "train.jsonl", tmp_path / "test.jsonl", 50, 20)
    for path, written in ((tmp_path / "train.jsonl", train), (tmp_path / "test.jsonl", test)):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert rows == [{"question": problem.question, "answer": problem.answer} for problem in written]


def test_every_worked_answer_is_right(problems: tuple[list[Problem], list[Problem]]) -> None:
    assert all(is_right(problem) for part in problems for problem in part)


def test_a_wrong_answer_would_be_noticed(problems: tuple[list[Problem], list[Problem]]) -> None:
    problem = problems[1][0]
    wrong = str(problem.result + 1)
    assert not is_right(Problem(problem.question, re.sub(r"\d+$", wrong, problem.answer), problem.steps))
    assert not is_right(Problem(problem.question, re.sub(r"= ?\d+", f"={wrong}", problem.answer), problem.steps))


def test_the_numbers_of_a_question_are_those_that_are_worked_with(problems: tuple[list[Problem], list[Problem]]) -> None:
    for problem in problems[0]:
        equations = EQUATION.findall(problem.answer)
        rights = [int(right) for _, _, right, _ in equations]
        worked = [int(equations[0][0]), *(tens + ones for tens, ones in zip(rights[::2], rights[1::2], strict=True))]
        assert list(map(int, re.findall(r"\d+", problem.question))) == worked
        assert all(SMALLEST <= int(number) <= LARGEST for number in [*worked, *(result for *_, result in equations)])


def test_no_question_and_no_worked_pair_of_numbers_is_in_both_files(problems: tuple[list[Problem], list[Problem]]) -> None:
    train, test = problems
    assert len({problem.question for part in problems for problem in part}) == len(train) + len(test)
    assert not shared(train, test)


def test_a_split_by_chance_would_be_noticed(problems: tuple[list[Problem], list[Problem]]) -> None:
    train, _ = problems
    assert shared(train[200:], train[:200])


def test_problems_are_of_all_kinds_with_one_and_two_steps(problems: tuple[list[Problem], list[Problem]]) -> None:
    train, _ = problems
    openings = {re.sub(r"\d+", "N", problem.answer).split("\n")[0].split()[-1] for problem in train}
    assert len(TEMPLATES) >= 20 and len(openings) > 40
    two_steps = sum(len(problem.steps) == 2 for problem in train) / len(train)
    assert 0.4 < two_steps < 0.6


def test_the_tokenizer_gives_any_text_back_and_splits_numbers_into_digits(
    model: Path, problems: tuple[list[Problem], list[Problem]]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    for text in ("Zoë paid 1,234.50 € for 🥕\n\n\tand\x00 日本\r\n", problems[1][0].question, problems[1][0].answer):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("4827").input_ids) == ["4", "8", "2", "7"]


def test_words_of_unseen_problems_are_one_token_each(model: Path, problems: tuple[list[Problem], list[Problem]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    words = [word for problem in problems[1] for word in re.findall(r"^[a-zA-Z]+| [a-zA-Z]+", problem.question)]
    assert all(len(ids) == 1 for ids in tokenizer(words).input_ids)


def test_a_tokenizer_from_disk_is_the_one_that_was_trained(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        assert len(tokenizer(token).input_ids) == 1
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


@pytest.mark.skipif(not QWEN.is_dir(), reason=f"Qwen's tokenizer is not at {QWEN}")
def test_a_chat_is_written_as_qwen_writes_it(model: Path) -> None:
    own, qwen = AutoTokenizer.from_pretrained(model), AutoTokenizer.from_pretrained(QWEN)
    chat = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "How many?\nSay it."},
        {"role": "assistant", "content": "12"},
        {"role": "user", "content": "Sure?"},
    ]
    for ask in (True, False):
        texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=ask) for tokenizer in (own, qwen)]
        assert texts[0] == texts[1]


def test_the_model_is_a_qwen2_of_one_to_two_million_parameters_that_stops_at_the_end_of_a_turn(model: Path) -> None:
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    assert AutoConfig.from_pretrained(model).architectures == ["Qwen2ForCausalLM"]
    assert 1_000_000 < loaded.num_parameters() < 2_000_000
    assert loaded.config.vocab_size == len(tokenizer)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in loaded.generation_config.eos_token_id


def test_the_seed_decides_the_weights(model: Path, tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_tiny_model(tmp_path / name, ["some words"], seed=seed)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


WORDS = ["train_rows=128", "test_rows=4", "rl_steps=1"]


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_short_demo_goes_the_whole_way_and_leaves_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as first:
        first.setattr(run, "EARLY_EXACT_MATCH", 0.0)
        first.setattr(run, "reinforce", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.main(WORDS)
    assert {path.name for path in Path("demo-run/checkpoints").glob("global_step_*")} == {"global_step_3", "global_step_8"}
    monkeypatch.setattr(run, "EARLY_EXACT_MATCH", 2.0)
    run.main(WORDS)  # begins anew
    summary = json.loads(Path("demo-run/summary.json").read_text(encoding="utf-8"))
    assert summary["early_checkpoint"].endswith("global_step_7")
    assert {path.name for path in Path("demo-run/checkpoints").glob("global_step_*")} == {"global_step_7", "global_step_8"}
    assert summary["exact_match_before"] == 0.0
    assert 0.0 <= summary["exact_match_after_sft"] <= 1.0
    assert summary["seconds"] > 0 and summary["loss_last_step"] < summary["loss_first_step"]
    assert summary["steps"] == 8
    assert 0.0 <= summary["exact_match_before_rl"] <= 1.0 and 0.0 <= summary["exact_match_after_rl"] <= 1.0
    assert summary["rl_checkpoint"].endswith("global_step_1")
    AutoModelForCausalLM.from_pretrained(summary["checkpoint"])
    AutoModelForCausalLM.from_pretrained(summary["rl_checkpoint"])
    assert len(Path(summary["test_file"]).read_text(encoding="utf-8").splitlines()) == 4
    for folder in ("eval-before", "eval-after", "eval-before-rl", "eval-after-rl"):
        assert json.loads(Path("demo-run", folder, "results.json").read_text(encoding="utf-8"))["n"] == 4
    printed = capsys.readouterr().out
    assert "Before:" in printed and "After:" in printed and "verl sft data.train_files=" in printed
    assert not [path for path in tmp_path.iterdir() if path.name != "demo-run"]


def test_a_wrong_word_is_answered() -> None:
    with pytest.raises(UserError, match=r"did you mean test_rows"):
        run.main(["test_row=4"])


def test_before_the_first_step_the_demos_logger_says_nothing() -> None:
    said: list[str] = []
    training: Any = SimpleNamespace(total_steps=60, say=said.append)
    logger = milestones.start(training)
    logger.log(0, {"val/exact_match": 0.25})
    assert said == []
    logger.log(1, {"rl/reward": 0.5, "perf/tokens_per_second": 1000.0})
    assert said == ["step 1/60 · rl/reward 0.500 · 1,000 tokens/s"]
