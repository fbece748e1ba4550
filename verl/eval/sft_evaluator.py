"""Evaluation of a checkpoint: answers to a file of questions, graded by a metric that fits the rows.

    verl eval model_path=checkpoints/verl-sft/run/global_step_100 test_file=test.jsonl output_dir=results
    verl eval results --against other-results

Read `evaluate` first.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from verl import cores, signals
from verl.config.commands import EvalConfig
from verl.config.load import load_config
from verl.data.render import Renderer
from verl.data.row import ReadProgress, Row, notes_of
from verl.data.shapes import read_question
from verl.data.source import describe_sources, resolve_entries, sources_of, valid_rows
from verl.errors import Stopped, UserError, exit_on_user_error
from verl.eval import against, few_shot, report
from verl.eval.grader import Answer, Grader, Prediction, Question
from verl.lock import held
from verl.models.format_check import check_format
from verl.models.kind import CLASSIFIER, GENERATES, check_kind, kind_of
from verl.models.load import load_tokenizer
from verl.models.prompt_format import system_of
from verl.pace import counted
from verl.progress import open_console
from verl.rewards._fitting import Chosen, choose
from verl.rewards._scoring import warning_of
from verl.rollout import Completion, Options, Rollout, Sampling, load_rollout
from verl.session import session

Batch = list[tuple[int, Completion]]  # numbered answers that are finished at the same time


class Waiting:
    """Prints a line if a user's own metric is waited for."""

    def __init__(self, console: Console):
        self._console = console

    def waiting(self, text: str | None, *, line_is_due: bool = False) -> None:
        if text is not None and line_is_due:
            self._console.print(text)

    def stopping(self) -> bool:
        """Return False: a signal ends an evaluation at once."""
        return False


@session()
def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Answer every question, grade the answers, and write results.json and predictions.jsonl.

    Returns:
        the content of results.json.
    Raises:
        UserError: the config, a row, the checkpoint or the grader is invalid.
    """
    console = open_console(markup=False, highlight=False, soft_wrap=True)
    check_one_process()
    if kind_of(config.model_path) == CLASSIFIER:
        from verl.eval import classified  # it generates no answers

        return classified.evaluate(config, console)
    check_kind(config.model_path, GENERATES, where=f"model_path={config.model_path}")
    if config.against is None or against.is_evaluation(config.against):
        return evaluate_one(config, console)
    check_kind(config.against, GENERATES, where=f"against={config.against}")
    report.open_directory(config)  # before the other checkpoint answers
    other = replace(config, model_path=config.against, output_dir=str(Path(config.output_dir) / "against"), against=None)
    console.print(f"against={config.against} is a checkpoint: it is evaluated first, into {other.output_dir}")
    evaluate_one(other, console)
    return evaluate_one(replace(config, against=other.output_dir), console)


def evaluate_one(config: EvalConfig, console: Console) -> dict[str, Any]:
    """Evaluate one checkpoint, as `evaluate` says. `config.against` is a finished evaluation."""
    directory = report.open_directory(config)
    other = None if config.against is None else against.read(config.against, f"against={config.against}")
    with held(directory, "evaluation"):  # a second one would mix its answers with these
        cores.take(console.print)
        signals.enter("reading questions and loading the model")
        questions = read_questions(config, console)
        chosen = None if config.metric else choose(questions)
        grader = open_grader(config, chosen, questions, console)
        if other is not None:
            against.check(other, questions, grader.metric)
        questions = with_examples(config, questions, console)
        predictions, seconds, device = answer_and_grade(config, grader, questions, directory, console)
        results = report.summarize(config, predictions, grader, chosen.why if chosen else None, seconds=seconds, device=device)
        show(results, grader, console)  # before the files: a full disk does not hide the result
        if other is not None:
            scores = against.scores_of([(q.prompt, q.reference) for q in questions], [p.score for p in predictions], config.n)
            this = against.Evaluation(config.output_dir, results, scores)
            results["against"] = against.described(against.compared(this, other), this, other)
            against.show(results["against"], this, other, console)
        report.write_files(directory, predictions, results, console)
        return results


def open_grader(config: EvalConfig, chosen: Chosen | None, questions: list[Question], console: Console) -> Grader:
    """Load the metric, say which it is, and check that it can read every right answer."""
    grader = Grader(config, config.metric or (chosen.name if chosen else ""), Waiting(console))
    console.print(chosen.describe() if chosen else f"metric: {config.metric}")
    if grader.dropped:
        console.print(f"{grader.what}: its process has no {', '.join(grader.dropped)}; reward.secrets passes on such variables")
    grader.check(questions)
    return grader


def with_examples(config: EvalConfig, questions: list[Question], console: Console) -> list[Question]:
    """Return the questions with the examples of `few_shot_file` before them, and say which these are."""
    if config.few_shot == 0:
        return questions
    questions, replaced = few_shot.with_examples(questions, few_shot.read_examples(config), config.few_shot)
    console.print(few_shot.describe(config, replaced))
    return questions


def show(results: dict[str, Any], grader: Grader, console: Console) -> None:
    """Print the results, after a warning of answers on which the metric failed."""
    if (warning := warning_of(grader.errors, "answers failed and count as 0 (reward.on_error=zero)")) is not None:
        console.print(warning)
    report.print_table(console, results)


def answer_and_grade(
    config: EvalConfig, grader: Grader, questions: list[Question], directory: Path, console: Console
) -> tuple[list[Prediction], float, str]:
    """Answer and grade every question. Return the predictions, the seconds that it took, and the device."""
    variables = config.chat_template_kwargs
    tokenizer = load_tokenizer(config.model_path, trust_remote_code=config.trust_remote_code, chat_template_kwargs=variables)
    renderer = Renderer(tokenizer)
    stop_ids = renderer.stop_ids  # raises if the template is unusable
    systems = [system_of(question.messages) for question in questions]
    check_format(config.model_path, tokenizer, stop_ids, systems, key="system_prompt")
    prompts = [render(renderer, question) for question in questions]
    rollout = load_rollout(config.rollout.name, config.model_path, tokenizer, stop_ids, rollout_options(config))
    max_new_tokens = longest_answer(config, rollout, questions, prompts, console)
    sampling = Sampling(max_new_tokens, config.temperature, config.n, config.seed, config.top_k, config.top_p, logprobs=False)

    def grade(batch: Batch) -> list[Prediction]:
        return grader.grade(questions, [Answer(number // config.n, done.text(tokenizer), done) for number, done in batch])

    device = rollout.describe()
    console.print(f"{config.model_path} answers {counted(len(questions), 'question')} on {device}")
    characters = config.n * sum(len(question.prompt) + len(question.reference) for question in questions)
    report.check_room(directory, len(questions) * config.n, characters, max_new_tokens, console)
    report.clear_earlier(directory, console)
    since = time.perf_counter()
    stream = rollout.stream(prompts, sampling)
    stream = whole_groups(stream, config.n) if grader.in_groups else stream
    predictions = answer(stream, len(prompts) * config.n, grade, directory, console)
    grader.close()
    rollout.close()
    return predictions, time.perf_counter() - since, device


def whole_groups(stream: Iterable[Batch], n: int) -> Iterator[Batch]:
    """Hold back answers until all n answers to their question are there."""
    groups: dict[int, Batch] = {}
    for batch in stream:
        for number, completion in batch:
            groups.setdefault(number // n, []).append((number, completion))
        complete = [question for question, group in groups.items() if len(group) == n]
        if complete:
            yield [pair for question in complete for pair in sorted(groups.pop(question), key=lambda pair: pair[0])]


def answer(
    stream: Iterable[Batch],
    total: int,
    grade: Callable[[Batch], list[Prediction]],
    directory: Path,
    console: Console,
) -> list[Prediction]:
    """Generate and grade all answers, and return them in the order of the prompts.

    Only if this is interrupted, it writes predictions.jsonl, with the answers that were finished.
    """
    done: dict[int, Prediction] = {}
    signals.enter("answering questions")
    try:
        with report.AnswerProgress(total, console) as progress:
            for batch in stream:
                graded = grade(batch)
                done |= dict(zip([number for number, _ in batch], graded, strict=True))
                progress.add(graded)
    except BaseException as error:
        report.write_predictions(directory, [done[number] for number in sorted(done)])
        by = f" by {error.signal.name}" if isinstance(error, Stopped) and error.signal is not None else ""
        if isinstance(error, Stopped):
            error.is_told = True
        console.print(f"stopped{by}: {len(done):,} of {total:,} answers are in {directory / report.PREDICTIONS}")
        raise
    return [done[number] for number in sorted(done)]


def check_one_process() -> None:
    """Raise UserError under torchrun with several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("the evaluator runs in one process", fix="start it with python -m verl.eval.sft_evaluator, without torchrun")


def read_questions(config: EvalConfig, console: Console | None = None) -> list[Question]:
    """Read the rows to answer, and print the notes about them. Raises UserError with the file and line of an invalid row."""
    samples = None if config.max_samples == -1 else config.max_samples
    entries = resolve_entries(config.test_file, "test_file")
    rows = list(islice(valid_rows(sources_of(entries), ReadProgress()), samples))
    questions = [question_of(row, config) for row in rows]
    if console is not None:
        for line in [*describe_sources(entries), *notes_of(rows)]:
            console.print(f"test_file: {line}")
    return questions


def question_of(row: Row, config: EvalConfig) -> Question:
    """Return a row as a question. The reference of a chat is its last answer, if the row has no response column."""
    asked = read_question(row, config, config.system_prompt)
    assert asked.reference is not None  # the evaluator has a response_key
    values = {**row.values, "reference": asked.reference}
    return Question(row.where, asked.text, asked.reference, values, asked.messages, asked.tools, asked.template_kwargs)


def render(renderer: Renderer, question: Question) -> list[int]:
    """Return the tokens of the question, in the same format as in training."""
    try:
        return renderer.prompt(question.messages, question.tools, question.template_kwargs)
    except UserError as error:
        where = question.where if error.where in (None, "messages") else f"{question.where}: {error.where}"
        raise UserError(error.what, where=where, fix=error.fix) from None


def rollout_options(config: EvalConfig) -> Options:
    return Options(
        max_sequences=config.batch_size,
        url=config.rollout.url,
        gpu_memory_utilization=config.rollout.gpu_memory_utilization,
        trust_remote_code=config.trust_remote_code,
        speculate=config.rollout.speculate,
        key="batch_size",
    )


def longest_answer(config: EvalConfig, rollout: Rollout, questions: list[Question], prompts: list[list[int]], console: Console) -> int:
    """Return max_new_tokens, or fewer if the longest prompt leaves fewer of the model's positions.

    Raises:
        UserError: a prompt leaves no position.
    """
    positions = rollout.positions
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    tokens = len(prompts[longest])
    if positions is None or tokens + config.max_new_tokens <= positions:
        return config.max_new_tokens
    if tokens >= positions:
        what = f"the prompt's {tokens:,} tokens do not fit into the model's {positions:,} positions"
        raise UserError(what, where=questions[longest].where, fix="shorten the question, or remove the row")
    console.print(
        f"answers are cut at {positions - tokens:,} tokens: the model has {positions:,} positions, and the longest prompt has {tokens:,}"
    )
    return positions - tokens


def main(argv: list[str]) -> None:
    words = with_keys(argv)
    try:
        if words and "=" not in words[0] and not words[0].startswith("-"):
            compare_finished(words)
        else:
            evaluate(load_config(EvalConfig, words))
    except Stopped:
        raise  # `exit_on_user_error` prints it, unless `answer` has said what is kept
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def with_keys(argv: list[str]) -> list[str]:
    """Return the arguments with `against=OTHER` in place of `--against OTHER`. Raises UserError: OTHER is missing."""
    words = list(argv)
    while "--against" in words:
        at = words.index("--against")
        if at + 1 == len(words):
            raise UserError("names no other evaluation", where="--against", fix=against.FIX)
        words[at : at + 2] = [f"against={words[at + 1]}"]
    return [word.removeprefix("--") if word.startswith("--against=") else word for word in words]


def compare_finished(words: list[str]) -> None:
    """Run `verl eval DIR --against OTHER`. Raises UserError: there are other arguments, or the evaluations cannot be compared."""
    directory, *rest = words
    if len(rest) != 1 or not rest[0].startswith("against="):
        fix = f"verl eval model_path={directory} … evaluates a checkpoint; verl eval DIR --against OTHER compares two finished evaluations"
        raise UserError(f"found {directory!r} without a key", where="verl eval", fix=fix)
    console = open_console(markup=False, highlight=False, soft_wrap=True)
    against.compare_directories(directory, rest[0].removeprefix("against="), console)


if __name__ == "__main__":
    exit_on_user_error(main, sys.argv[1:])
