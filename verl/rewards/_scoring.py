"""Rewards: the weighted sum of the graders of `reward.name` and the model of `reward_model.path`.

Dimensions: A answers.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import chain, count
from typing import TYPE_CHECKING, Any

import numpy as np

from verl.config.commands import GraderConfig
from verl.config.plugin_settings import settings_of
from verl.config.ppo import RewardConfig, RewardModelConfig, reward_names
from verl.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from verl.data.chat import Message
    from verl.rewards._model import RewardModel

MODEL = "model"  # the reward model's name among the rewards
Functions = dict[str, Callable[..., Any]]  # a grader's functions, by name
GRADER = ("score", "extract_answer", "reference_answer", "exact_match")
ERRORS_SHOWN = 3
LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Scored:
    """Rewards of answers.

    Attributes:
        reward_A: weighted sum of the rewards, float32, finite.
        each: unweighted rewards by name, float32 [A]; 0 where the reward failed.
        errors: failures of rewards (`reward.on_error=zero`), each with the place of its row.
    """

    reward_A: np.ndarray
    each: dict[str, np.ndarray]
    errors: list[UserError]

    def describe_errors(self) -> str | None:
        """Return a warning with the number of failures and the first of them; None if there are none."""
        if not self.errors:
            return None
        times = Counter(f"{error.where}: {error.what}" for error in self.errors)
        first = list(times.items())[:ERRORS_SHOWN]
        shown = "".join(f"\n  {said}{f' ({many:,} answers)' if many > 1 else ''}" for said, many in first)
        rest = len(self.errors) - sum(many for _, many in first)
        more = f"\n  and {rest:,} more" if rest else ""
        return f"warning: {len(self.errors):,} rewards failed and count as 0 (reward.on_error=zero):{shown}{more}"


class Rewards:
    """Computes rewards of answers.

    Args:
        reward: names and weights of the graders, and what to do if one fails.
        model: the reward model, if there is one.
        tokenizer: the policy's; if the reward model's differs, the log says so.
        device: device of the reward model.
        say: prints a message.
    Attributes:
        exact: name of the first grader with `exact_match`; None if there is none.
        model: the reward model, or None.
    Raises:
        UserError: no such grader or model, or it cannot be used.
    """

    def __init__(
        self,
        reward: RewardConfig,
        model: RewardModelConfig,
        *,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        device: "torch.device | str" = "cpu",
        say: Callable[[str], None] = print,
    ):
        self._graders = load_graders(reward)
        self.exact = next((name for name, grader in self._graders.items() if "exact_match" in grader), None)
        self._weights = dict(zip(self._graders, reward.weights or [1.0] * len(self._graders), strict=True))
        self._stops = reward.on_error == "stop"
        self.model: RewardModel | None = None
        if model.path is not None:
            from verl.rewards import _model  # torch and transformers are slow to import

            self.model = _model.RewardModel(model, device=device, tokenizer=tokenizer, say=say)
            self._weights[MODEL] = model.weight

    def score(
        self,
        questions: Sequence[str],
        responses: Sequence[str],
        rows: Sequence[dict[str, Any]],
        *,
        places: Sequence[str] | None = None,
        chats: "Sequence[Sequence[Message]] | None" = None,
    ) -> Scored:
        """Score answers. Ranks may have different numbers of them. Call it in `dist.together`, so that all ranks learn of an error.

        Args:
            questions: the question of each answer, as text.
            responses: the answers, without their stop tokens.
            rows: the data row of each answer, with `reference` if it has a right answer.
            places: the place of each row, such as `train.jsonl:17`, for errors.
            chats: the messages before each answer, for the reward model; None: only the question.
        Raises:
            UserError: a reward failed or is not a number, and `reward.on_error=stop`.
        """
        where = list(places) if places is not None else [f"answer {number + 1}" for number in range(len(rows))]
        errors: list[UserError] = []
        each = {}
        for name, grader in self._graders.items():
            inputs = zip(questions, responses, rows, strict=True)
            each[name] = self._kept([_graded(name, grader["score"], *values) for values in inputs], where, errors)
        if self.model is not None:
            before = chats if chats is not None else [[{"role": "user", "content": question}] for question in questions]
            scores = self.model.score(before, responses)
            each[MODEL] = self._kept([_checked(MODEL, float(score)) for score in scores], where, errors)
        total = sum((self._weights[name] * values for name, values in each.items()), np.zeros(len(rows)))
        return Scored(np.asarray(total, dtype=np.float32), each, errors)

    def _kept(self, results: Sequence[float | UserError], where: Sequence[str], errors: list[UserError]) -> np.ndarray:
        """Replace errors by 0 and add them to `errors`, with the place of their row. Raises the first one if `on_error=stop`."""
        failed = [UserError(r.what, where=at, fix=r.fix) for r, at in zip(results, where, strict=True) if isinstance(r, UserError)]
        if failed and self._stops:
            raise failed[0]
        errors += failed
        return np.array([0.0 if isinstance(result, UserError) else result for result in results], dtype=np.float32)


def load_graders(reward: RewardConfig) -> dict[str, Functions]:
    """Load the graders of `reward.name`, by their names in the log.

    Raises:
        UserError: no such grader, or it lacks a function or a package.
    """
    names = reward_names(reward)
    return dict(zip(_distinct(names), [functions_of(reward, name) for name in names], strict=True))


def functions_of(keys: RewardConfig | GraderConfig, name: str) -> Functions:
    """Load the functions of a grader (see verl.rewards), with its settings already bound.

    Args:
        keys: the config group that has the grader's keys.
        name: the grader's name in the config.
    Raises:
        UserError: no such grader, or it lacks a function or a package.
    """
    module = keys.plugins.load(keys.plugins.named_by or "reward.name", name)
    getattr(module, "check_installed", lambda: None)()
    found = {function: getattr(module, function) for function in GRADER if hasattr(module, function)}
    return {name: _with_settings(f, settings_of(keys, module)) for name, f in found.items()} if hasattr(module, "Settings") else found


def _with_settings(function: Callable[..., Any], settings: object) -> Callable[..., Any]:
    """Bind the settings as the last argument."""
    return wraps(function)(lambda *arguments: function(*arguments, settings))


def _distinct(names: Sequence[str]) -> list[str]:
    """Return unique names for the log: `mine` for `a/mine.py`, and `mine_2` or the next free number for a second one."""
    short = [name.removesuffix(".py").replace("\\", "/").rpartition("/")[2].rpartition(".")[2] for name in names]
    found: list[str] = []
    for name in short:
        others = (f"{name}_{number}" for number in count(2))
        found.append(next(one for one in chain([name], others) if one not in (MODEL, *found)))
    return found


def _graded(
    name: str, score: Callable[[str, str, dict[str, Any]], object], question: str, response: str, row: dict[str, Any]
) -> float | UserError:
    """Return the score of one answer, or the error of a row on which the grader fails."""
    try:
        return _checked(name, score(question, response, row))
    except UserError:  # the reward cannot be used for any row
        raise
    except Exception as error:  # a user's file may raise anything
        if isinstance(error, KeyError) and error.args == ("reference",):
            return UserError(f"reward {name} needs a right answer, and the row has none", fix="set data.response_key to its column")
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return UserError(f"reward {name} raised {type(error).__name__}: {error} ({frame.filename}:{frame.lineno})", fix=FIX)


def _checked(name: str, value: object) -> float | UserError:
    if isinstance(value, (int, float, np.number, np.bool_)) and abs(float(value)) <= LARGEST:  # NaN compares false
        return float(value)
    return UserError(f"reward {name} returned {value!r}, expected a finite number", fix=FIX)


FIX = "correct the reward or the row, or set reward.on_error=zero, which counts it as 0"
