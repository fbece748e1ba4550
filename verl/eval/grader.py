"""Grading of answers by a module in verl/rewards or a user's own file."""

import math
import traceback
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from verl.config.commands import EvalConfig
from verl.errors import UserError
from verl.rewards._scoring import functions_of
from verl.rollout import Completion


@dataclass(frozen=True)
class Question:
    """A data row to answer.

    Attributes:
        where: location of the row, such as `test.jsonl:17`.
        prompt: the question, as in the data; for a chat, its last message.
        reference: the correct answer, as in the data.
        row: all columns, and `reference`.
        messages: the chat to answer.
        tools: tools that the chat may call, or None.
        template_kwargs: variables of the chat template for this row, or None.
    """

    where: str
    prompt: str
    reference: str
    row: dict[str, Any]
    messages: list[dict[str, Any]]
    tools: object = None
    template_kwargs: object = None


@dataclass(frozen=True)
class Prediction:
    """One graded answer, a line of predictions.jsonl.

    Attributes:
        prompt: the question, as in the data.
        response: the model's answer, without its stop token.
        reference: the correct answer, as in the data.
        extracted: the answer that the grader extracts from the response, or None.
        expected: the answer that the grader extracts from the reference, or None.
        correct: whether the score is 1.
        correct_flexible: whether the last number of the response is correct, in any format; None if the grader has no such rule.
        score: the grader's score.
        finish_reason: "stop", or "length" for an answer cut at max_new_tokens.
        tokens: number of generated tokens, including the stop token.
    """

    prompt: str
    response: str
    reference: str
    extracted: str | None
    expected: str | None
    correct: bool
    correct_flexible: bool | None
    score: float
    finish_reason: str
    tokens: int


class Grader:
    """A grader with its optional functions (see verl/rewards).

    Args:
        config: names the grader, and holds its keys.
    Attributes:
        measure: display name of the mean score.
    Raises:
        UserError: no such grader, or it has no function `score`.
    """

    def __init__(self, config: EvalConfig):
        functions = functions_of(config.reward, config.metric)
        self.name = config.metric
        self._score = functions["score"]
        self._extract = functions.get("extract_answer")
        self._expect = functions.get("reference_answer", self._extract)
        self._matches = functions.get("exact_match")
        self.measure = "exact match" if self._matches else "mean score"

    def check(self, question: Question) -> None:
        """Raise UserError if the grader finds no answer in the reference, because no response could then be correct."""
        if self._expect is not None and self._call(self._expect, question.reference) is None:
            fix = "correct the row, or set metric to a grader for such answers"
            raise UserError(f"metric {self.name!r} finds no answer in {question.reference!r:.60}", where=question.where, fix=fix)

    def grade(self, question: Question, response: str, completion: Completion) -> Prediction:
        """Grade an answer.

        Args:
            response: the completion's text, without its stop token.
        Raises:
            UserError: the grader fails, or its score is not a number.
        """
        reference = question.reference
        score = self._call(self._score, question.prompt, response, question.row)
        if not isinstance(score, (Real, np.bool_)) or not math.isfinite(score):
            raise UserError(f"score() returned {score!r}", where=f"metric={self.name}", fix="return a finite number, such as 0.0 or 1.0")
        return Prediction(
            prompt=question.prompt,
            response=response,
            reference=reference,
            extracted=self._call(self._extract, response) if self._extract else None,
            expected=self._call(self._expect, reference) if self._expect else None,
            correct=bool(score == 1),
            correct_flexible=self._call(self._matches, response, reference, "flexible") if self._matches else None,
            score=float(score),
            finish_reason=completion.finish_reason,
            tokens=len(completion.token_ids),
        )

    def _call(self, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:  # a user's own code may raise anything
            frame = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{function.__name__}() raised {type(error).__name__}: {error}"
            raise UserError(what, where=f"{frame.filename}:{frame.lineno}", fix=f"correct the grader (metric={self.name})") from error
