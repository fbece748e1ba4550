"""Evaluation of a checkpoint: exact match on a file of questions and answers.

    python -m verl.eval.sft_evaluator model_path=checkpoints/verl-sft/run/global_step_100 test_file=test.jsonl output_dir=results

Read `evaluate` first.
"""

import os
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from verl.config.commands import EvalConfig
from verl.config.load import load_config
from verl.data.render import Renderer
from verl.data.row import ReadProgress, Row, notes_of
from verl.data.shapes import read_question
from verl.data.source import describe_sources, resolve_entries, sources_of, valid_rows
from verl.errors import UserError, exit_on_user_error
from verl.eval import report
from verl.eval.grader import Grader, Prediction, Question
from verl.models.load import load_tokenizer
from verl.models.prompt_format import check_format, system_of
from verl.progress import open_console
from verl.rollout import Completion, Options, Rollout, Sampling, load_rollout
from verl.session import session


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
    grader = Grader(config)
    directory = report.open_directory(config.output_dir)
    questions = read_questions(config, grader, console)
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

    def grade(number: int, completion: Completion) -> Prediction:
        return grader.grade(questions[number // config.n], completion.text(tokenizer), completion)

    device = rollout.describe()
    console.print(f"{config.model_path} answers {len(questions):,} questions on {device}")
    report.clear_earlier(directory)
    since = time.perf_counter()
    predictions = answer(prompts, sampling, rollout, grade, grader.measure, directory, console)
    results = report.summarize(config, predictions, seconds=time.perf_counter() - since, device=device)
    report.write_results(directory, results)
    report.print_table(console, results, grader.measure, directory)
    return results


def answer(
    prompts: list[list[int]],
    sampling: Sampling,
    rollout: Rollout,
    grade: Callable[[int, Completion], Prediction],
    measure: str,
    directory: Path,
    console: Console,
) -> list[Prediction]:
    """Generate and grade all answers, and return them in the order of the prompts.

    If this is interrupted, predictions.jsonl has the answers that were finished.
    """
    total = len(prompts) * sampling.n
    done: dict[int, Prediction] = {}
    try:
        with report.AnswerProgress(total, measure, console) as progress:
            for batch in rollout.stream(prompts, sampling):
                graded = {number: grade(number, completion) for number, completion in batch}
                done |= graded
                progress.add(list(graded.values()))
    finally:
        report.write_predictions(directory, [done[number] for number in sorted(done)])
        if len(done) < total:
            console.print(f"stopped: {len(done):,} of {total:,} answers are in {directory / report.PREDICTIONS}")
    return [done[number] for number in sorted(done)]


def check_one_process() -> None:
    """Raise UserError under torchrun with several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("the evaluator runs in one process", fix="start it with python -m verl.eval.sft_evaluator, without torchrun")


def read_questions(config: EvalConfig, grader: Grader, console: Console | None = None) -> list[Question]:
    """Read and check the rows to answer, and print the notes about them. Raises UserError with the file and line of an invalid row."""
    samples = None if config.max_samples == -1 else config.max_samples
    entries = resolve_entries(config.test_file, "test_file")
    rows = list(islice(valid_rows(sources_of(entries), ReadProgress()), samples))
    questions = []
    for row in rows:
        question = question_of(row, config)
        grader.check(question)
        questions.append(question)
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
    try:
        evaluate(load_config(EvalConfig, argv))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    exit_on_user_error(main, sys.argv[1:])
