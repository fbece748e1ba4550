"""Environments of Gymnasium as text: FrozenLake, Taxi, CliffWalking, Blackjack, and others with a countable number of actions or with text.

Each turn of the model is one action, by its number or its name: the last one that the turn says. The model reads what the environment draws
as text (render mode "ansi"), or else its observation. Rewards and the end are the environment's own. Needs pip install "verl[gymnasium]".
"""

import importlib.util
import re
from dataclasses import dataclass, field
from typing import Any

from verl.environments import Message, Start, Step
from verl.errors import UserError

COLORED = re.compile(r"\x1b\[([0-9;]*)m([^\x1b]*)\x1b\[0m")
INSIDE = "gymnasium.envs.toy_text."  # environments that only compute, and need no process of their own
ASK = "Answer with one action: {actions}."


@dataclass
class Settings:
    # gymnasium: id of the environment, such as FrozenLake-v1; mine:Game-v0 imports the module mine first, which registers it.
    game: str | None = None
    # gymnasium, verifiers: arguments of gymnasium.make, or of the package's load_environment, such as {is_slippery: false}.
    arguments: dict[str, Any] = field(default_factory=dict)
    # gymnasium: names of the actions from 0 on, such as [left, down, right, up]; empty: their numbers.
    actions: list[str] = field(default_factory=list)
    # gymnasium: what the first message says before the first observation; null: nothing.
    instruction: str | None = None
    # gymnasium: reward of a turn without an action. The environment does not see it.
    no_action_reward: float = 0.0

    def check(self) -> None:
        """Raises UserError naming the key."""
        if self.game is None:
            raise UserError("names no environment", where="game", fix="give its id: environment.game=FrozenLake-v1")


def check_installed() -> None:
    """Raises UserError: gymnasium is not installed."""
    if importlib.util.find_spec("gymnasium") is None:
        raise UserError("gymnasium is not installed", where="environment.name=gymnasium", fix='pip install "verl[gymnasium]"')


def needs_limit(settings: Settings) -> bool:
    """Return whether the environment gets processes of its own."""
    return not str(_spec(settings).entry_point).startswith(INSIDE)


def prepare(settings: Settings) -> None:
    """Make the environment once, so that what is wrong is told before the first episode."""
    Environment(settings).close()


class Environment:
    """See `verl.environments`."""

    def __init__(self, settings: Settings):
        self._settings, self._game = settings, _made(settings)
        self._actions = _actions_of(self._game.action_space, settings)

    def reset(self, row: dict[str, Any], seed: int) -> Start:
        """Begin with the world of the seed."""
        observation, _ = self._game.reset(seed=seed % 2**31)
        self._game.action_space.seed(seed % 2**31)
        parts = [self._settings.instruction, self._seen(observation), self._asked()]
        return Start([{"role": "user", "content": "\n\n".join(filter(None, parts))}])

    def step(self, message: Message) -> Step:
        """Act as the turn says."""
        action = self._read(message["content"])
        if action is None:
            return Step([_said(self._asked())], reward=self._settings.no_action_reward)
        observation, reward, terminated, truncated, _ = self._game.step(action)
        return Step([_said(self._seen(observation))], float(reward), bool(terminated or truncated))

    def close(self) -> None:
        """Close the environment."""
        self._game.close()

    def _read(self, text: str) -> Any:
        """Return the action that a turn says; None: none."""
        if self._actions is None:
            return text if self._game.action_space.contains(text) else None
        either = "|".join(re.escape(name) for name in sorted(self._actions, key=len, reverse=True))
        found = re.findall(rf"(?<!\w)({either})(?!\w)", text, re.IGNORECASE)
        return self._actions[found[-1].lower()] if found else None

    def _asked(self) -> str:
        return "" if self._actions is None else ASK.format(actions=", ".join(self._actions))

    def _seen(self, observation: Any) -> str:
        if self._game.render_mode == "ansi":
            return _without_colors(str(self._game.render())).strip("\n")
        return str(observation.tolist() if hasattr(observation, "tolist") else observation)


def _made(settings: Settings) -> Any:
    import gymnasium

    modes: dict[str, Any] = {} if "render_mode" in settings.arguments or not _draws_text(settings) else {"render_mode": "ansi"}
    try:
        return gymnasium.make(str(settings.game), **modes, **settings.arguments)
    except Exception as error:  # a game may raise anything at arguments that it does not know
        raise UserError(
            f"{type(error).__name__}: {error}", where="environment.arguments", fix=f"correct them for {settings.game}"
        ) from error


def _draws_text(settings: Settings) -> bool:
    import gymnasium

    kind: Any = gymnasium.envs.registration.load_env_creator(_spec(settings).entry_point) if _spec(settings).entry_point else None
    return "ansi" in getattr(kind, "metadata", {}).get("render_modes", [])


def _spec(settings: Settings) -> Any:
    import gymnasium

    try:
        return gymnasium.spec(str(settings.game))
    except (gymnasium.error.Error, ImportError) as error:
        fix = "give an id that `python -c 'import gymnasium; gymnasium.pprint_registry()'` lists, or module:id"
        raise UserError(str(error), where="environment.game", fix=fix) from error


def _actions_of(space: Any, settings: Settings) -> dict[str, int] | None:
    """Return the actions by name; None: an action is text. Raises UserError: the environment has other actions, or more than names."""
    import gymnasium

    if isinstance(space, gymnasium.spaces.Text):
        return None
    if not isinstance(space, gymnasium.spaces.Discrete):
        fix = "take an environment whose actions are numbers (Discrete) or text (Text)"
        raise UserError(f"its actions are {space}", where=f"environment.game={settings.game}", fix=fix)
    names = settings.actions or [str(number) for number in range(int(space.start), int(space.start + space.n))]
    if len({name.lower() for name in names}) != space.n:
        found = f"found {len(set(names))} names, and {settings.game} has {space.n} actions"
        raise UserError(found, where="environment.actions", fix="give each action a name of its own")
    return {name.lower(): int(space.start) + index for index, name in enumerate(names)}


def _without_colors(text: str) -> str:
    """Write what is colored without colors: a colored background as brackets, bold letters between stars, others between bars."""
    before = None
    while before != text:  # one color may be inside another
        before, text = text, COLORED.sub(_marked, text)
    return text


def _marked(colored: "re.Match[str]") -> str:
    codes, text = colored[1].split(";"), colored[2]
    if any(code.startswith("4") and len(code) == 2 for code in codes):
        return f"[{text}]"
    return f"*{text}*" if "1" in codes else f"|{text}|"


def _said(text: str) -> Message:
    return {"role": "user", "content": text}
