"""The rubric of a judge: what it looks for, as a text or as criteria with weights, and its grades in a reply."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from verl.errors import UserError
from verl.rewards._service import LONGEST_SHOWN, NoGradeError

EXAMPLE = "write a text, the path of a file, or [{name: helpful, text: answers what was asked, weight: 2}, …]"
GRADE = re.compile(r"(?:grade|rating|score|评分|分数|得分)\W{0,6}?(-?\d+(?:\.\d+)?)", re.IGNORECASE)
ONE = """\
Say in two sentences at most what is right and what is wrong. Then write one last line, "Grade: N", where N is a number from 0 to {best}."""
EACH = """\
Say in one sentence for each criterion what is right and what is wrong. Then write one last line of JSON with the grade of each criterion, a
number from 0 to {best}: {form}"""


@dataclass(frozen=True)
class Criterion:
    """One thing that a judge looks for.

    Attributes:
        name: its name in the reply.
        text: what it is, in words.
        weight: its weight in the mean of the grades.
    """

    name: str
    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class Rubric:
    """What a judge looks for: a text, or several criteria."""

    text: str
    criteria: tuple[Criterion, ...] = ()

    def shown(self, best: float) -> str:
        """Return the rubric with the form of the reply, for the prompt."""
        if not self.criteria:
            return f"{self.text.strip()}\n\n{ONE.replace('{best}', f'{best:g}')}"
        lines = "\n".join(f"- {one.name}: {one.text}" for one in self.criteria)
        form = json.dumps({one.name: "N" for one in self.criteria}, ensure_ascii=False).replace('"N"', "N")
        return f"{lines}\n\n{EACH.replace('{best}', f'{best:g}').replace('{form}', form)}"

    def grade_of(self, reply: str, best: float) -> float:
        """Return the grade in a reply, from 0 to `best`: of several criteria, their weighted mean.

        Raises:
            NoGradeError: a grade is missing, no number, or out of range.
        """
        if not self.criteria:
            return grade_of(reply, best)
        found = last_object(reply)
        if found is None:
            raise NoGradeError(f"the judge wrote no JSON with its grades: {_shown(reply)}")
        grades = [_grade_in(found, one.name, best, reply) for one in self.criteria]
        weights = [one.weight for one in self.criteria]
        return sum(weight * grade for weight, grade in zip(weights, grades, strict=True)) / sum(weights)


def grade_of(reply: str, best: float) -> float:
    """Return the last grade in a reply. Raises NoGradeError: there is none from 0 to `best`."""
    found = GRADE.findall(reply)
    if not found:
        raise NoGradeError(f"the judge wrote no line `Grade: N`: {_shown(reply)}")
    return _in_range(float(found[-1]), found[-1], best, reply)


def _grade_in(found: dict[str, Any], name: str, best: float, reply: str) -> float:
    value = found.get(name)
    if isinstance(value, dict):  # with its reason
        value = next((value[key] for key in ("grade", "score", "rating") if key in value), None)
    try:
        grade = math.nan if isinstance(value, bool) or not isinstance(value, (int, float, str)) else float(value)
    except ValueError:
        grade = math.nan
    if math.isnan(grade):
        raise NoGradeError(f"the judge's JSON has no grade of {name!r}: {_shown(reply)}")
    return _in_range(grade, f"{grade:g} of {name!r}", best, reply)


def _in_range(grade: float, called: str, best: float, reply: str) -> float:
    if grade > best:
        raise NoGradeError(f"the judge's grade {called} is above {best:g} (reward.judge_best): {_shown(reply)}")
    if grade < 0:
        raise NoGradeError(f"the judge's grade {called} is below 0: {_shown(reply)}")
    return grade


def _shown(reply: str) -> str:
    return f"{reply.strip()[:LONGEST_SHOWN]!r}"


def last_object(reply: str) -> dict[str, Any] | None:
    """Return the last JSON object in a reply that no other one contains; None if there is none."""
    found, at, decoder = None, 0, json.JSONDecoder()
    while (start := reply.find("{", at)) >= 0:
        try:
            value, at = decoder.raw_decode(reply, start)
        except (ValueError, RecursionError):
            at = start + 1
            continue
        found = value if isinstance(value, dict) else found
    return found


def read_rubric(given: Any) -> Rubric | None:
    """Return the rubric of `reward.judge_rubric`: a text, the path of a file with one, or criteria, also as YAML or JSON in a file.

    Raises:
        UserError: it is none of that.
    """
    if given is None:
        return None
    if isinstance(given, str) and "\n" not in given and given.endswith((".txt", ".md", ".yaml", ".yml", ".json")):
        given = _in_file(given)
    if isinstance(given, str) and given.strip():
        return Rubric(given)
    if not isinstance(given, Sequence) or not given:
        raise UserError(f"found {given!r:.60}", where="judge_rubric", fix=EXAMPLE)
    criteria = tuple(_criterion(one) for one in given)
    if len({one.name for one in criteria}) < len(criteria):
        raise UserError("two criteria have the same name", where="judge_rubric", fix="rename one of them")
    if sum(one.weight for one in criteria) <= 0:
        raise UserError("all weights are 0", where="judge_rubric", fix="give one of them a weight above 0")
    return Rubric("", criteria)


def _in_file(name: str) -> Any:
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8")
        return text if name.endswith((".txt", ".md")) else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{name} cannot be read: {reason}", where="judge_rubric", fix=EXAMPLE) from error


def _criterion(given: Any) -> Criterion:
    keys = {"name", "text", "weight"}
    if not isinstance(given, dict) or not {"name", "text"} <= given.keys() <= keys:
        raise UserError(f"found {given!r:.80} in place of a criterion", where="judge_rubric", fix=EXAMPLE)
    weight = given.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
        raise UserError(f"the weight of {given['name']!r} is {weight!r}", where="judge_rubric", fix="give a number from 0, such as 2")
    return Criterion(str(given["name"]), " ".join(str(given["text"]).split()), float(weight))
