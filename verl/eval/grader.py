"""Grading of answers by a module in verl/rewards or a user's own file."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from verl.config.commands import EvalConfig
from verl.errors import UserError
from verl.rewards import _scoring
from verl.rewards._scoring import error_of, load_grader, short_names
from verl.rollout import Completion
from verl.workers.calls import Failure
from verl.workers.pool import Watch


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
        correct_flexible: whether the response is correct if it is read less strictly, such as by its last number; None if the grader has
            no such
            rule.
        score: the grader's score.
        finish_reason: "stop", or "length" for an answer cut at max_new_tokens.
        tokens: number of generated tokens, including the stop token.
        error: why the grader failed on this answer (`reward.on_error=zero`), or None. Such an answer has score 0 and is not correct.
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
    error: str | None = None


@dataclass(frozen=True)
class Answer:
    """An answer to grade.

    Attributes:
        question: number of its question.
        response: the completion's text, without its stop token.
    """

    question: int
    response: str
    completion: Completion


class Grader:
    """A grader with its optional functions (see verl/rewards).

    Args:
        config: holds the grader's keys.
        metric: names the grader.
        watch: is told if the processes of a user's own grader are waited for.
    Attributes:
        metric: the name, as given.
        what: name of the grader in messages.
        measure: display name of the mean score.
        flexible_measure: display name of the share of answers that are right if they are read less strictly.
        in_groups: whether it scores all answers to a question together.
        dropped: names of the environment variables that a user's own grader does not get.
        errors: failures so far (`reward.on_error=zero`), one for each answer, with the place of its row.
    Raises:
        UserError: no such grader, or it has no function `score`.
    """

    def __init__(self, config: EvalConfig, metric: str, watch: Watch | None = None):
        self.metric = metric
        loaded = load_grader(config.reward, metric)
        self._grader = _scoring.Grader(loaded, f"metric {short_names([metric])[0]}", config.reward, watch)
        self._extract = "extract_answer" if self._grader.has("extract_answer") else None
        self._expect = "reference_answer" if self._grader.has("reference_answer") else self._extract
        self._matches = "exact_match" if self._grader.has("exact_match") else None
        self._fix = f"correct the grader (metric={metric}) or the row, or set reward.on_error=zero, which counts it as 0"
        self._stops = config.reward.on_error == "stop"
        self.errors: list[UserError] = []
        self.measure: str = getattr(loaded.module, "MEASURE", "exact match" if self._matches else "mean score")
        self.flexible_measure: str = getattr(loaded.module, "FLEXIBLE", "exact match of the last number")
        self.what = self._grader.what
        self.in_groups, self.dropped = self._grader.in_groups, self._grader.dropped

    def check(self, questions: Sequence[Question]) -> None:
        """Raise UserError if the grader cannot read the reference of a question, because no response could then be correct."""
        references, places = [question.reference for question in questions], [question.where for question in questions]
        for function in ("check_reference" if self._grader.has("check_reference") else None, self._expect):
            if function is not None:
                self._grader.check_references(references, places, function)

    def grade(self, questions: Sequence[Question], answers: Sequence[Answer]) -> list[Prediction]:
        """Grade answers. If the grader scores in groups, all answers to a question are adjacent.

        Raises:
            UserError: the grader fails or its score is not a number, and `reward.on_error=stop`.
        """
        asked, responses = [questions[answer.question] for answer in answers], [answer.response for answer in answers]
        references, groups = [question.reference for question in asked], [answer.question for answer in answers]
        prompts, rows = [question.prompt for question in asked], [question.row for question in asked]
        pairs = [(response, reference, "flexible") for response, reference in zip(responses, references, strict=True)]
        errors: list[UserError | None] = [None] * len(answers)
        scores = self._kept(asked, self._grader.scores(prompts, responses, rows, groups, until_failure=self._stops), errors, instead=0.0)
        extracted = self._called(self._extract, asked, [(response,) for response in responses], errors)
        expected = self._called(self._expect, asked, [(reference,) for reference in references], errors)
        flexible = self._called(self._matches, asked, pairs, errors, instead=False)
        self.errors += [error for error in errors if error is not None]
        return [
            Prediction(
                prompt=question.prompt,
                response=answer.response,
                reference=question.reference,
                extracted=extracted[number],
                expected=expected[number],
                correct=scores[number] == 1,
                correct_flexible=flexible[number],
                score=scores[number],
                finish_reason=answer.completion.finish_reason,
                tokens=len(answer.completion.token_ids),
                error=None if (error := errors[number]) is None else error.what,
            )
            for number, (question, answer) in enumerate(zip(asked, answers, strict=True))
        ]

    def close(self) -> None:
        """End the processes of a user's own grader."""
        self._grader.close()

    def _called(
        self,
        function: str | None,
        asked: Sequence[Question],
        arguments: Sequence[tuple[Any, ...]],
        errors: list[UserError | None],
        *,
        instead: object = None,
    ) -> list[Any]:
        """Return the results of an optional function; None for each answer if the grader does not have it. See `_kept`."""
        if function is None:
            return [None] * len(arguments)
        return self._kept(asked, self._grader.run(function, arguments, until_failure=self._stops), errors, instead, f": {function}()")

    def _kept(
        self, asked: Sequence[Question], results: Sequence[Any], errors: list[UserError | None], instead: object, function: str = ""
    ) -> list[Any]:
        """Replace failures by `instead`, and set the errors of their answers. Raises the first one if `on_error=stop`."""
        for number, (question, result) in enumerate(zip(asked, results, strict=True)):
            if isinstance(result, Failure):
                error = error_of(f"{self._grader.what}{function}", result, question.where, self._fix)
                if self._stops:
                    raise error
                errors[number] = errors[number] or error
        return [instead if isinstance(result, Failure) else result for result in results]
