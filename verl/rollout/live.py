"""Live generation: requests join while an engine generates, each when it comes, and none waits for the others to end.

    async with Live(rollout, max_new_tokens=512, positions=4096) as live:
        completion = await live.submit(prompt_ids, sampling, seed)

The engine works in the thread of the event loop, a decode step at a time, and between two steps the loop does everything else. An engine
that cannot take requests while it generates (see `verl.rollout.drawing`) generates in waves: all that wait, together.

A response depends on `sampling`, the seed and the weights, but not on when it was asked for, as far as the rounding of a batch of another
size lets it.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TypeVar

from verl import dist, signals
from verl.errors import AbandonedError, UserError
from verl.rollout import Completion, Rollout, Sampling
from verl.rollout.drawing import Continuous, Drawing, begin, can_continue
from verl.rollout.waves import Waves

AT_ONCE = 1024  # responses that an engine generates at the same time, if it has room for them
WAVE_SECONDS = 0.02  # for others to come, before a wave begins
LOOK_SECONDS = 0.2  # between two looks at signals and other ranks, while nothing is generated

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Request:
    drawing: Drawing
    sampling: Sampling
    done: "asyncio.Future[Completion]"


@dataclass(frozen=True)
class _State:
    """What a rank tells the others before a wave.

    Attributes:
        waiting: number of its requests.
        is_closed: whether no more will come.
        error: what ends it.
    """

    waiting: int
    is_closed: bool
    error: UserError | None


class Live:
    """Generates for many callers of one event loop. No other method of the engine that generates may be called in its context.

    If all ranks take part in each call of the engine (its `is_collective`), every rank enters the context, and leaves it when all do.

    Args:
        max_new_tokens: the longest response of any request.
        positions: maximum tokens of a prompt with its response.
        at_once: number of responses at the same time.
    Raises:
        UserError: at the end of the context on all ranks that share the engine's calls, if one left with this error.
    """

    def __init__(self, rollout: Rollout, *, max_new_tokens: int, positions: int, at_once: int = AT_ONCE):
        self._rollout, self._longest, self._positions, self._at_once = rollout, max_new_tokens, positions, at_once
        self._is_collective = bool(getattr(rollout, "is_collective", False))
        self._queue: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._drawing: Continuous | None = None
        self._sampling: Sampling | None = None  # of the drawing
        self._is_closed, self._came = False, asyncio.Event()
        self._error: UserError | None = None
        self._task: asyncio.Task[None] | None = None

    async def submit(self, prompt_ids: list[int], sampling: Sampling, seed: int) -> Completion:
        """Generate one response. It may be cancelled.

        Args:
            sampling: requests with the same one but for `max_new_tokens` are generated together, others one kind after the other, in the
                order in which they came. `n` is 1.
            seed: decides on the random numbers, together with `sampling.seed`.
        Raises:
            UserError: the prompt with its response is too long for the model, or the engine has failed.
            AbandonedError: a signal has asked the run to end.
        """
        if self._task is None or self._task.done():
            raise self._error or RuntimeError("nothing is generated outside of the context")
        if sampling.max_new_tokens > self._longest:
            raise ValueError(f"{sampling.max_new_tokens} tokens are more than the {self._longest} of this context")
        drawing = Drawing(list(prompt_ids), seed, 0, max_new_tokens=sampling.max_new_tokens)
        done: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._queue.append(_Request(drawing, replace(sampling, n=1, max_new_tokens=self._longest), done))
        self._came.set()
        return await done

    async def alongside(self, work: Awaitable[Result]) -> Result:
        """Wait for work that submits requests. If generation fails meanwhile, cancel the work, and raise the error."""
        assert self._task is not None
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task, self._task}, return_when=asyncio.FIRST_COMPLETED)
            has_failed = not task.done()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
        if has_failed:  # not `task.cancelled()`: what gathers others holds their cancellation as an error
            self._task.result()
        return task.result()

    async def __aenter__(self) -> "Live":
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._task is not None
        if error is not None and not (self._is_collective and isinstance(error, UserError)):
            self._task.cancel()
        self._error = self._error or (error if isinstance(error, UserError) else None)
        self._is_closed = True
        self._came.set()
        await asyncio.wait({self._task})
        if not self._task.cancelled() and (found := self._task.exception()) is not None and error is None:
            raise found

    async def _run(self) -> None:
        """Generate until the context is left."""
        try:
            while await self._has_requests():
                self._take()
                self._step()
                self._deliver()
                await asyncio.sleep(0)  # all others have a turn, and what has arrived is read
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            if self._drawing is not None:
                self._drawing.stop()

    async def _has_requests(self) -> bool:
        """Wait for requests. Return whether the engine has something to do: on any rank, if all take part in its calls.

        Raises:
            UserError: another rank has failed.
        """
        while True:
            _check_others()
            is_idle = self._drawing is None or not self._drawing.has_work
            if not is_idle or self._queue or self._is_closed:
                break
            self._came.clear()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._came.wait(), LOOK_SECONDS)
        if self._queue and not can_continue(self._rollout):
            await asyncio.sleep(WAVE_SECONDS)
        if not self._is_collective:
            return not (self._is_closed and is_idle and not self._queue)
        states = dist.gathered(_State(len(self._queue), self._is_closed, self._error))
        for state in states:
            if state.error is not None:
                raise state.error
        return any(state.waiting > 0 or not state.is_closed for state in states)

    def _take(self) -> None:
        """Start requests, in their order, that can be generated together with those that run."""
        if self._queue and self._queue[0].sampling != self._sampling and not self._running:
            self._begin(self._queue[0].sampling)
        if self._drawing is None and self._is_collective:
            self._begin(Sampling(self._longest))
        while self._queue and self._queue[0].sampling == self._sampling:
            request = self._queue.popleft()
            if request.done.done():  # given up by its caller
                continue
            assert self._drawing is not None
            try:
                self._drawing.add([request.drawing])
            except UserError as error:  # it is too long
                request.done.set_exception(error)
            else:
                self._running.append(request)

    def _begin(self, sampling: Sampling) -> None:
        if self._drawing is not None:
            self._drawing.stop()
        if can_continue(self._rollout):
            self._drawing = begin(self._rollout, sampling, self._at_once, self._positions)
        else:
            self._drawing = Waves(self._rollout, sampling, is_collective=self._is_collective)
        self._sampling = sampling

    def _step(self) -> None:
        if self._drawing is not None and (self._drawing.has_work or self._is_collective):
            self._drawing.step()

    def _deliver(self) -> None:
        """Give callers the responses that are finished."""
        going = []
        for request in self._running:
            if not request.drawing.so_far.is_finished:
                going.append(request)
            elif not request.done.done():
                found = request.drawing.so_far
                request.done.set_result(found if request.sampling.logprobs else replace(found, logprobs=None))
        self._running = going

    def _fail(self, error: BaseException) -> None:
        """Let all callers have the error."""
        if isinstance(error, UserError):
            self._error = error
        for request in (*self._running, *self._queue):
            if not request.done.done():
                request.done.set_exception(error) if isinstance(error, Exception) else request.done.cancel()


def _check_others() -> None:
    """Raise AbandonedError after a signal, and RankError if another rank is lost."""
    if signals.received() is not None:
        raise AbandonedError("given up, because the run stops")
    dist.check_others()
