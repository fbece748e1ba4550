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
from verl.data.chat import unanswered
from verl.data.formats import Row
from verl.data.render import Renderer
from verl.data.source import read_rows
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
    questions = read_questions(config, grader)
    tokenizer = load_tokenizer(config.model_path, trust_remote_code=config.trust_remote_code)
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


def read_questions(config: EvalConfig, grader: Grader) -> list[Question]:
    """Read and check the rows to answer. Raises UserError with the file and line of an invalid row."""
    samples = None if config.max_samples == -1 else config.max_samples
    questions = []
    for row in islice(read_rows(config.test_file, "test_file"), samples):
        if row.is_text:
            raise UserError("plain text has no questions and answers", where=row.where, fix="write them as JSONL, CSV or Parquet")
        question = read_question(row, config) if config.messages_key is None else read_chat(row, config, config.messages_key)
        grader.check(question)
        questions.append(question)
    return questions


def read_question(row: Row, config: EvalConfig) -> Question:
    prompt, reference = row.text(config.prompt_key, "prompt_key"), row.text(config.response_key, "response_key")
    before = [] if config.system_prompt is None else [{"role": "system", "content": config.system_prompt}]
    return Question(row.where, prompt, reference, {**row.values, "reference": reference}, [*before, {"role": "user", "content": prompt}])


def read_chat(row: Row, config: EvalConfig, key: str) -> Question:
    """Read a chat up to its last answer, which is the reference if the row has no response column."""
    messages, answer = unanswered(row.value(key, "messages_key"), row.where)
    if config.response_key in row.values or not isinstance(answer, str):
        answer = row.text(config.response_key, "response_key")
    tools = None if config.tools_key is None else row.value(config.tools_key, "tools_key", may_be_null=True)
    return Question(row.where, messages[-1]["content"], answer, {**row.values, "reference": answer}, messages, tools)


def render(renderer: Renderer, question: Question) -> list[int]:
    """Return the tokens of the question, in the same format as in training."""
    try:
        return renderer.prompt(question.messages, question.tools)
    except UserError as error:
        where = f"{question.where}: {error.where}" if error.where and question.tools is not None else question.where
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
