"""Rewards: the weighted sum of the graders of `reward.name` and the models of `reward_model.path`, behind `reward.gates`.

Dimensions: A answers.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain, count, groupby
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from verl import signals
from verl.config.commands import GraderConfig
from verl.config.plugin_settings import settings_of
from verl.config.ppo import RewardConfig, RewardModelConfig, reward_names
from verl.config.reward_models import names_of, reward_models
from verl.config.workers import WorkersConfig
from verl.errors import UserError
from verl.rewards._combined import GATED, Combined
from verl.user_files import is_own
from verl.workers.calls import Failure, InProcess, check_function
from verl.workers.pool import Watch, Workers, load_code

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from verl.data.chat import Message
    from verl.rewards._model import RewardModel

ENVIRONMENT, AGENT = "environment", "agent"  # names of the environment's and the agent's own rewards
RESERVED = ("model", GATED, ENVIRONMENT, AGENT)  # names among the rewards that no grader has
GRADER = ("score", "score_group", "extract_answer", "reference_answer", "check_reference", "exact_match")  # functions of a user's grader
ERRORS_SHOWN = 3


@dataclass(frozen=True)
class Scored:
    """Rewards of answers.

    Attributes:
        reward_A: weighted sum of the rewards, float32, finite.
        each: unweighted rewards by name, float32 [A], before their thresholds; 0 where the reward failed. `gated` is the share of answers
            that miss one of `reward.gates`, if there are gates.
        errors: failures of rewards (`reward.on_error=zero`), each with the place of its row.
        tool_errors: failures of the tool (`rollout.on_error=reply`), each with the place of its row.
        environment_errors: failures of the environment (`environment.on_error=end`), each with the place of its row.
        unclosed: failures of the environment when it was closed, after its episode.
        agent_errors: runs of the agent that were ended (`agent.on_error=end`), each with the place of its row.
    """

    reward_A: np.ndarray
    each: dict[str, np.ndarray]
    errors: list[UserError]
    tool_errors: list[UserError] = field(default_factory=list)
    environment_errors: list[UserError] = field(default_factory=list)
    agent_errors: list[UserError] = field(default_factory=list)
    unclosed: list[UserError] = field(default_factory=list)

    def describe_errors(self) -> str | None:
        """Return warnings with the number of failures and the first of them; None if there are none."""
        found = [
            warning_of(self.errors, "rewards failed and count as 0 (reward.on_error=zero)"),
            warning_of(self.tool_errors, "calls of the tool failed; the model got the error as the reply (rollout.on_error=reply)"),
            warning_of(self.environment_errors, "episodes of the environment went wrong and ended there (environment.on_error=end)"),
            warning_of(self.unclosed, "environments could not be closed after their episodes, which count as they ended"),
            warning_of(self.agent_errors, "runs of the agent were ended; the model's answers until then are kept (agent.on_error=end)"),
        ]
        return "\n".join(text for text in found if text) or None


def warning_of(errors: Sequence[UserError], what: str) -> str | None:
    """Return a warning with the number of errors and the first of them; None if there are none."""
    if not errors:
        return None
    times = Counter(f"{error.where}: {error.what}" for error in errors)
    first = list(times.items())[:ERRORS_SHOWN]
    shown = "".join(f"\n  {said}{f' ({many:,} answers)' if many > 1 else ''}" for said, many in first)
    rest = len(errors) - sum(many for _, many in first)
    more = f"\n  and {rest:,} more" if rest else ""
    return f"warning: {len(errors):,} {what}:{shown}{more}"


class Rewards:
    """Computes rewards of answers.

    Args:
        reward: names and weights of the graders, their gates and thresholds, and what to do if one fails.
        model: the reward models, if there are any.
        tokenizer: the policy's; if the reward model's differs, the log says so.
        device: device of the reward model.
        say: prints a message.
        watch: is told if the processes of users' rewards are waited for.
    Attributes:
        exact: name of the first grader with `exact_match`; None if there is none.
        models: the reward models, by their names in the log.
    Raises:
        UserError: no such grader or model, or it cannot be used; or a gate or threshold is of a reward that is not there.
    """

    def __init__(
        self,
        reward: RewardConfig,
        model: RewardModelConfig,
        *,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        device: "torch.device | str" = "cpu",
        say: Callable[[str], None] = print,
        watch: Watch | None = None,
    ):
        self._graders = {name: Grader(loaded, f"reward {name}", reward, watch) for name, loaded in load_graders(reward).items()}
        self.exact = next((name for name, grader in self._graders.items() if grader.has("exact_match")), None)
        self._weights = dict(zip(self._graders, reward.weights or [1.0] * len(self._graders), strict=True))
        self._stops = reward.on_error == "stop"
        for grader in self._graders.values():
            if grader.dropped:
                say(f"{grader.what}: its process has no {', '.join(grader.dropped)}; reward.secrets passes on such variables")
        self.models: dict[str, RewardModel] = {}
        found = reward_models(model)
        for number, (name, one) in enumerate(zip(names_of(len(found)), found, strict=True)):
            from verl.rewards import _model  # torch and transformers are slow to import

            self.models[name] = _model.RewardModel(model, device=device, tokenizer=tokenizer, say=say, number=number)
            self._weights[name] = one.weight
        self._combined = Combined(self._weights, reward.thresholds, reward.gates, reward.gated)

    @property
    def model(self) -> "RewardModel | None":
        """Return the first reward model; None if there is none."""
        return next(iter(self.models.values()), None)

    @property
    def has_processes(self) -> bool:
        """Return whether all rewards are computed in processes of their own."""
        return not self.models and all(grader.has_processes for grader in self._graders.values())

    def close(self) -> None:
        """End the processes of users' rewards."""
        for grader in self._graders.values():
            grader.close()

    def check_references(self, rows: Sequence[dict[str, Any]], places: Sequence[str]) -> None:
        """Check that the graders can read all right answers.

        Args:
            rows: data rows, with `reference` if they have a right answer.
            places: the place of each row, for errors.
        Raises:
            UserError: a grader needs a right answer that a row does not have, or cannot read it.
        """
        for grader in self._graders.values():
            if grader.has("check_reference") or grader.has("reference_answer"):
                for row, place in zip(rows, places, strict=True):
                    if "reference" not in row:
                        raise UserError(f"{grader.what} {NO_REFERENCE}", where=place, fix=REFERENCE_FIX)
                grader.check_references([row["reference"] for row in rows], places)

    def score(
        self,
        questions: Sequence[str],
        responses: Sequence[str],
        rows: Sequence[dict[str, Any]],
        *,
        places: Sequence[str] | None = None,
        chats: "Sequence[Sequence[Message]] | None" = None,
        groups: Sequence[int] | None = None,
    ) -> Scored:
        """Score answers. Ranks may have different numbers of them. Call it in `dist.together`, so that all ranks learn of an error.

        Args:
            questions: the question of each answer, as text.
            responses: the answers, without their stop tokens.
            rows: the data row of each answer, with `reference` if it has a right answer.
            places: the place of each row, such as `train.jsonl:17`, for errors.
            chats: the messages before each answer, for the reward model; None: only the question.
            groups: a number for each answer; adjacent answers with the same number are the group of a prompt. None: each is a group.
        Raises:
            UserError: a reward failed or is not a number, and `reward.on_error=stop`.
            AbandonedError: a signal has asked the run to end.
        """
        where = list(places) if places is not None else [f"answer {number + 1}" for number in range(len(rows))]
        errors: list[UserError] = []
        each = {}
        numbers = groups if groups is not None else range(len(rows))
        for name, grader in self._graders.items():
            with nullcontext() if grader.has_processes else signals.abandoning():  # processes are waited for a moment
                results = grader.scores(questions, responses, rows, numbers, until_failure=self._stops)
            each[name] = self._kept(grader.what, results, where, errors)
        for name, model in self.models.items():
            before = chats if chats is not None else [[{"role": "user", "content": question}] for question in questions]
            with signals.abandoning():
                scores = model.score(before, responses)
            results = [InProcess.checked(float(score)) for score in scores]
            each[name] = self._kept(f"reward {name}", results, where, errors)
        total, shown = self._combined.of(each, len(rows))
        return Scored(total, shown, errors)

    def _kept(self, what: str, results: Sequence[Any], where: Sequence[str], errors: list[UserError]) -> np.ndarray:
        """Replace failures by 0 and add them to `errors`, with the place of their row. Raises the first one if `on_error=stop`."""
        failed = [error_of(what, result, at, FIX) for result, at in zip(results, where, strict=True) if isinstance(result, Failure)]
        if failed and self._stops:
            raise failed[0]
        errors += failed
        return np.array([0.0 if isinstance(result, Failure) else result for result in results], dtype=np.float32)


@dataclass(frozen=True)
class Loaded:
    """A grader's module and settings.

    Attributes:
        settings: an instance of the module's `Settings`; None if it has none.
    """

    module: ModuleType
    settings: Any


class Grader:
    """A grader that is ready to run: one of verl in this process, a user's own in processes of its own.

    Args:
        what: name of the grader in messages, such as "reward mine".
    Attributes:
        dropped: names of the environment variables that a user's own grader does not get.
        in_groups: whether it scores all answers to a prompt together.
    """

    def __init__(self, loaded: Loaded, what: str, config: WorkersConfig, watch: Watch | None = None):
        self._module, self.what = loaded.module, what
        self.in_groups = self.has("score_group")
        self._code = load_code(loaded.module, loaded.settings, "score_group" if self.in_groups else "score", what, config, watch)
        self.dropped = self._code.dropped if isinstance(self._code, Workers) else []

    @property
    def has_processes(self) -> bool:
        """Return whether it runs in processes of its own."""
        return isinstance(self._code, Workers)

    def has(self, function: str) -> bool:
        return hasattr(self._module, function)

    def scores(
        self,
        questions: Sequence[str],
        responses: Sequence[str],
        rows: Sequence[dict[str, Any]],
        groups: Sequence[int],
        *,
        until_failure: bool = False,
    ) -> list[Any]:
        """Return the score of each answer, or the Failure of an answer on which the grader fails.

        Args:
            groups: a number for each answer; adjacent answers with the same number are the group of a prompt.
            until_failure: stop at the first failure; answers that have not been scored then have None.
        Raises:
            UserError: the grader cannot be used for any answer.
        """
        if self.in_groups:
            return self._group_scores(questions, responses, rows, groups, until_failure)
        if self.has("score_batch") and isinstance(self._code, InProcess):
            return self._code.run_batch("score_batch", "score", [questions, responses, rows])
        return self.run("score", list(zip(questions, responses, rows, strict=True)), until_failure=until_failure)

    def _group_scores(
        self, questions: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]], groups: Sequence[int], until_failure: bool
    ) -> list[Any]:
        members = [list(numbers) for _, numbers in groupby(range(len(rows)), key=lambda number: groups[number])]
        calls = [(questions[of[0]], [responses[number] for number in of], rows[of[0]]) for of in members]
        if self.has("score_groups") and isinstance(self._code, InProcess):
            found = self._code.run_groups("score_groups", "score_group", calls)
        else:
            found = self.run("score_group", calls, until_failure=until_failure)
        each = [result if isinstance(result, list) else [result] * len(of) for of, result in zip(members, found, strict=True)]
        return [score for of_group in each for score in of_group]

    def run(self, function: str, arguments: Sequence[tuple[Any, ...]], *, until_failure: bool = False) -> list[Any]:
        """Call a function of the grader once for each tuple of arguments. Return the results; a Failure in place of each that failed."""
        return self._code.run(function, arguments, until_failure=until_failure)

    def check_references(self, references: Sequence[str], places: Sequence[str], function: str | None = None) -> None:
        """Raise UserError with the place of the first right answer that the grader cannot read.

        Args:
            function: reads a right answer, and returns None if it cannot; None: the grader's own `check_reference` or `reference_answer`.
        """
        function = function or ("check_reference" if self.has("check_reference") else "reference_answer")
        found = self.run(function, [(reference,) for reference in references], until_failure=True)
        for reference, place, result in zip(references, places, found, strict=True):
            if isinstance(result, Failure):
                fix = result.fix or "correct the row, or choose a grader for such answers"
                raise UserError(f"{self.what} cannot read the right answer {reference!r:.60}: {result}", where=place, fix=fix)
            if result is None and function != "check_reference" and not any(isinstance(result, Failure) for result in found):
                fix = "correct the row, or choose a grader for such answers"
                raise UserError(f"{self.what} finds no answer in {reference!r:.60}", where=place, fix=fix)

    def close(self) -> None:
        self._code.close()


def error_of(what: str, failure: Failure, where: str, fix: str) -> UserError:
    """Return the error of a row on which a grader or a tool fails.

    Args:
        what: name of the code, such as "reward mine".
        fix: what to do, unless the failure knows.
    """
    if failure.what == "raised KeyError: 'reference'":
        return UserError(f"{what} {NO_REFERENCE}", where=where, fix=REFERENCE_FIX)
    return UserError(f"{what} {failure}", where=where, fix=failure.fix or fix)


def load_graders(reward: RewardConfig) -> dict[str, Loaded]:
    """Load the graders of `reward.name`, by their names in the log.

    Raises:
        UserError: no such grader, or it lacks a function or a package.
    """
    names = reward_names(reward)
    return dict(zip(short_names(names), [load_grader(reward, name) for name in names], strict=True))


def check_combination(reward: RewardConfig, model: RewardModelConfig) -> None:
    """Check the graders, and that their gates and thresholds are of rewards that are there. Raises UserError."""
    names = [*load_graders(reward), *names_of(len(reward_models(model)))]
    Combined(dict.fromkeys(names, 1.0), reward.thresholds, reward.gates)


def load_grader(keys: RewardConfig | GraderConfig, name: str) -> Loaded:
    """Load a grader (see verl.rewards), and check its functions.

    Args:
        keys: the config group that has the grader's keys.
        name: the grader's name in the config.
    Raises:
        UserError: no such grader, or it lacks a function or a package.
    """
    named_by = keys.plugins.named_by or "reward.name"
    module = keys.plugins.load(named_by, name)
    getattr(module, "check_installed", lambda: None)()
    if is_own(module):
        for function in GRADER:
            if hasattr(module, function):
                check_function(module, function, f"{named_by}={name}")
    return Loaded(module, settings_of(keys, module) if hasattr(module, "Settings") else None)


def short_names(names: Sequence[str]) -> list[str]:
    """Return unique names for the log: `mine` for `a/mine.py`, and `mine_2` or the next free number for a second one."""
    short = [name.removesuffix(".py").replace("\\", "/").rpartition("/")[2].rpartition(".")[2] for name in names]
    found: list[str] = []
    for name in short:
        others = (f"{name}_{number}" for number in count(2))
        found.append(next(one for one in chain([name], others) if one not in found and one not in RESERVED))
    return found


FIX = "correct the reward or the row, or set reward.on_error=zero, which counts it as 0"
NO_REFERENCE = "needs a right answer, and the row has none"
REFERENCE_FIX = "set data.response_key to its column; or reward.name=null, if only an environment gives rewards"
