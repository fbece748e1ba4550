"""The environment of `environment.name`, ready to play: its objects, in processes of their own or in this one."""

from types import ModuleType
from typing import Any, Protocol

from verl.config.environment import EnvironmentConfig
from verl.config.plugin_settings import settings_of
from verl.environments import load_environment
from verl.user_files import is_own
from verl.workers.hosts import Hosts
from verl.workers.inside import Inside

KIND = "Environment"  # name of the class


class Host(Protocol):
    """Where an episode's object lives, see `verl.workers.hosts.Host`."""

    has_ended: bool

    async def call(self, function: str, *arguments: Any, seconds: float, seed: int | None = None) -> Any: ...

    def release(self) -> None: ...

    def close(self) -> None: ...


def check_environment(config: EnvironmentConfig) -> None:
    """Check that the environment exists. Raises UserError: it does not, or lacks a package."""
    if config.name is not None:
        load_environment(config.name)


def open_environment(config: EnvironmentConfig) -> Hosts | Inside:
    """Return what makes the objects of the environment that the config names."""
    assert config.name is not None
    module = load_environment(config.name)
    settings = settings_of(config, module) if hasattr(module, "Settings") else None
    if not _needs_processes(module, settings):
        return Inside(module, KIND, settings)
    what = f"environment {config.name}"
    return Hosts(module, KIND, settings, what, most=config.processes, secrets=config.secrets)


def _needs_processes(module: ModuleType, settings: object) -> bool:
    """Return whether objects of a module get processes of their own: if it is a user's, or says so itself."""
    return is_own(module) or bool(getattr(module, "needs_limit", lambda _: False)(settings))
