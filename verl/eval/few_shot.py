"""Few-shot evaluation: solved rows of a file as earlier turns of the chat, before the question."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from verl.config.commands import EvalConfig
from verl.data.row import ReadProgress
from verl.data.shapes import read_question
from verl.data.source import resolve_entries, sources_of, valid_rows
from verl.errors import UserError
from verl.eval.grader import Question

SPARE = 1  # rows beyond few_shot, for a question that is among the examples itself


@dataclass(frozen=True)
class Example:
    """A solved row.

    Attributes:
        prompt: its question, as in the data.
        turns: its messages without a system prompt, and the answer.
    """

    prompt: str
    turns: list[dict[str, Any]]


def read_examples(config: EvalConfig) -> list[Example]:
    """Return the first rows of `few_shot_file` with different questions: `few_shot` of them, and a spare one if there is one.

    Raises:
        UserError: a row is invalid, has no answer, or there are too few.
    """
    examples: dict[str, Example] = {}
    for row in valid_rows(sources_of(resolve_entries(config.few_shot_file, "few_shot_file")), ReadProgress()):
        asked = read_question(row, config, None)
        assert asked.reference is not None  # the evaluator has a response_key
        before = [message for message in asked.messages if message.get("role") != "system"]
        examples.setdefault(asked.text, Example(asked.text, [*before, {"role": "assistant", "content": asked.reference}]))
        if len(examples) == config.few_shot + SPARE:
            break
    if len(examples) < config.few_shot:
        what = f"has {len(examples)} different rows, and few_shot={config.few_shot} asks for {config.few_shot}"
        raise UserError(what, where=f"few_shot_file={config.few_shot_file}", fix=f"set few_shot={len(examples)}, or add rows")
    return list(examples.values())


def with_examples(questions: Sequence[Question], examples: Sequence[Example], count: int) -> tuple[list[Question], int]:
    """Return the questions with `count` examples before each, and how many got another example because they are one themselves.

    Raises:
        UserError: a question is among the examples, and there is no spare one.
    """
    found, replaced = [], 0
    for question in questions:
        others = [example for example in examples if example.prompt != question.prompt]
        if len(others) < count:
            fix = "add rows to few_shot_file, or set few_shot lower"
            raise UserError(
                "the question is one of the examples of few_shot_file, and there is no other one", where=question.where, fix=fix
            )
        replaced += any(example.prompt == question.prompt for example in examples[:count])
        system = [message for message in question.messages[:1] if message.get("role") == "system"]
        turns = [turn for example in others[:count] for turn in example.turns]
        found.append(replace(question, messages=[*system, *turns, *question.messages[len(system) :]]))
    return found, replaced


def describe(config: EvalConfig, replaced: int) -> str:
    """Return the line that says which examples the model sees."""
    rows = "row" if config.few_shot == 1 else f"{config.few_shot} rows"
    text = f"few_shot: the first {rows} of {config.few_shot_file} before each question, as earlier turns of the chat"
    asked = "one question is among them and sees" if replaced == 1 else f"{replaced:,} questions are among them and see"
    return f"{text}; {asked} the next row instead" if replaced else text
