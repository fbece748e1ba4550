"""Objects of verl's own classes, in this process, with the calls of those in processes of their own (see `verl.workers.hosts`)."""

import asyncio
from inspect import isawaitable
from types import ModuleType
from typing import Any

from verl.errors import UserError
from verl.workers.calls import failure_of
from verl.workers.host import late, prepare
from verl.workers.hosts import HostEndedError


class Inside:
    """Makes objects in this process.

    Args:
        kind: name of the class.
        settings: what the class is called with; None: nothing.
    Raises:
        UserError: the module's function `prepare` raised an error.
    """

    dropped: list[str] = []  # noqa: RUF012 - as of Hosts

    def __init__(self, module: ModuleType, kind: str, settings: object | None):
        self.module, self.kind, self.settings = module, kind, settings
        prepare(module, settings)

    async def begin(self) -> "InsideHost":
        """Return a place for a new object."""
        return InsideHost(self)

    async def close(self) -> None:
        """Do nothing: there is no process to end."""


class InsideHost:
    """See `verl.workers.hosts.Host`."""

    def __init__(self, maker: Inside):
        self._maker, self.has_ended = maker, False
        self._object: Any = None

    async def call(self, function: str, *arguments: Any, seconds: float, seed: int | None = None) -> Any:
        """See `verl.workers.hosts.Host.call`. The result is as the method gives it."""
        maker = self._maker
        try:
            if seed is not None:
                self._object = getattr(maker.module, maker.kind)(*(() if maker.settings is None else (maker.settings,)))
            value = getattr(self._object, function)(*arguments)
            return await self._awaited(asyncio.ensure_future(value), seconds) if isawaitable(value) else value
        except HostEndedError:
            raise
        except Exception as error:
            failure = failure_of(error, function, maker.module)
            if isinstance(failure, UserError):
                raise failure from error
            return failure

    async def _awaited(self, task: "asyncio.Future[Any]", seconds: float) -> Any:
        try:
            done, _ = await asyncio.wait({task}, timeout=seconds)
        finally:
            if not task.done():
                task.cancel()
                self.has_ended = True
        if not done:
            raise HostEndedError(late(seconds))
        return task.result()

    def release(self) -> None:
        """Forget the object."""
        self._object = None

    def close(self) -> None:
        """Use the object no more."""
        self.has_ended = True
