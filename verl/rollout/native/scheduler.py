"""Scheduler of the native engine: continuous batching with prefix sharing.

It assigns requests to slots, and the engine carries out its decisions. It runs on the host only, without tensors or a model.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

PREFILL_TOKENS = 32_768  # prompt tokens in one forward pass
ADMISSION_SHARE = 8  # on a GPU, requests wait until one slot in eight is free, because each prefill interrupts decoding
MIN_ROWS = 4  # smallest decode step of a CUDA graph, in rows

Prompt = tuple[int, ...]


@dataclass
class Request:
    """A request for one response.

    Attributes:
        number: index of the response among all responses of the call.
        prompt: token ids, at least one.
        max_new_tokens: maximum tokens of the response, including its stop token.
        uniform_G: random numbers in [0, 1), one for each token; empty for greedy decoding.
        steps: decode steps of this request so far.
    """

    number: int
    prompt: Prompt
    max_new_tokens: int
    uniform_G: np.ndarray
    steps: int = 0


@dataclass(frozen=True)
class Prefill:
    """A prompt to run through the model once, and the slots that get its keys and values."""

    prompt: Prompt
    slots: list[int]


@dataclass(frozen=True)
class Admission:
    """Requests that start now. The engine first makes the copies, then runs the prefill batches, and then starts the requests.

    Attributes:
        seated: slot of each request, and the request.
        copies: (source slot, target slot) for prompts whose keys and values are already in another slot.
        copied_positions: length of the longest copied prompt.
        prefills: batches of prompts to prefill.
    """

    seated: list[tuple[int, Request]]
    copies: list[tuple[int, int]]
    copied_positions: int
    prefills: list[list[Prefill]]


@dataclass(frozen=True)
class Compaction:
    """Responses that move to lower slots, so that a decode step computes fewer rows.

    Attributes:
        sources, targets: old and new slot of each response.
        positions: maximum tokens of any of their prompts with its response.
        used: number of slots in use afterwards.
    """

    sources: list[int]
    targets: list[int]
    positions: int
    used: int


class Scheduler:
    """The requests of one call: those in the queue, and those that run in slots.

    Args:
        requests: requests in the order in which to start them.
        slots: number of slots.
        on_gpu: whether to admit requests in groups, and to round the rows of a decode step up to a power of two, so that a few CUDA graphs
            are enough.
        keeps_prompts: whether a slot still has what the model computed for its prompt after decode steps. A recurrent state does not last,
            so that a prompt is shared by requests that start together only.
        prompts: prompts whose keys and values are in the slots already, by slot.
    Attributes:
        prompts: the same at any time, also after the responses have ended.
        steps: decode steps so far.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        slots: int,
        *,
        on_gpu: bool,
        keeps_prompts: bool = True,
        prompts: Mapping[int, Prompt] | None = None,
    ):
        self._queue, self._slots, self._on_gpu, self._keeps_prompts = deque(requests), slots, on_gpu, keeps_prompts
        self._running: list[Request | None] = []  # by slot, up to the last one in use
        self.steps = 0
        self.prompts: dict[int, Prompt] = {slot: prompt for slot, prompt in (prompts or {}).items() if slot < slots}
        self._used: set[int] = set()  # slots that a request of this call has had

    def add(self, requests: Iterable[Request]) -> None:
        """Queue more requests."""
        self._queue += requests

    def running(self) -> list[tuple[int, Request]]:
        """Return the requests that run, each with its slot."""
        return [(slot, request) for slot, request in enumerate(self._running) if request is not None]

    @property
    def has_work(self) -> bool:
        """Return whether any request is queued or running."""
        return bool(self._queue) or any(self._running)

    @property
    def is_last_wave(self) -> bool:
        """Return whether no request is queued, so that what runs longest decides when the call ends."""
        return not self._queue

    @property
    def rows(self) -> int:
        """Number of slots that a decode step computes: the first `rows` slots."""
        return self._rows(len(self._running))

    def _rows(self, used: int) -> int:
        return min(self._slots, max(MIN_ROWS, 1 << (used - 1).bit_length())) if self._on_gpu else used

    # --- starting requests

    def admit(self) -> Admission | None:
        """Assign queued requests to free slots. Return None if the queue is empty, or too few slots are free to be worth a prefill."""
        if not self._queue:
            return None
        free = [slot for slot in range(self._slots) if slot >= len(self._running) or self._running[slot] is None]
        if len(free) < self._min_free():
            return None
        if not self._keeps_prompts:
            self.prompts.clear()
        seated = self._seat(free, [self._queue.popleft() for _ in range(min(len(free), len(self._queue)))])
        self._running += [None] * (max(slot for slot, _ in seated) + 1 - len(self._running))
        for slot, request in seated:
            self._running[slot] = request
            self._used.add(slot)
        return self._plan(seated)

    def _min_free(self) -> int:
        """Return the number of free slots that is worth a prefill. It is never more than the number of slots."""
        return max(1, min(self._slots // ADMISSION_SHARE, len(self._queue))) if self._on_gpu else 1

    def _seat(self, free: list[int], requests: list[Request]) -> list[tuple[int, Request]]:
        """Choose a free slot for each request: if possible one that still has its prompt, else any."""
        holders: dict[Prompt, list[int]] = {}
        for slot in free:
            holders.setdefault(self.prompts.get(slot, ()), []).append(slot)
        seated = [(found.pop(0), request) for request in requests if (found := holders.get(request.prompt))]
        taken, served = {slot for slot, _ in seated}, {request.number for _, request in seated}
        others = (slot for slot in free if slot not in taken)
        return seated + [(next(others), request) for request in requests if request.number not in served]

    def _plan(self, seated: list[tuple[int, Request]]) -> Admission:
        """Plan how each slot gets the keys and values of its prompt: it has them already, they are copied, or the model computes them."""
        missing = [(slot, request.prompt) for slot, request in seated if self.prompts.get(slot) != request.prompt]
        for slot, _ in missing:
            self.prompts.pop(slot, None)  # it will be overwritten
        holder = {prompt: slot for slot, prompt in self.prompts.items()}
        copies: list[tuple[int, int]] = []
        targets: dict[Prompt, list[int]] = {}
        for slot, prompt in missing:
            if prompt in holder:
                copies.append((holder[prompt], slot))
            elif len(prompt) > 1:  # the last token of a prompt is the input of the first decode step
                targets.setdefault(prompt, []).append(slot)
            self.prompts[slot] = prompt
        copied_positions = max((len(self.prompts[slot]) for _, slot in copies), default=0)
        return Admission(seated, copies, copied_positions, _batches([Prefill(*target) for target in targets.items()]))

    def forget_prompts(self) -> None:
        """Do not reuse keys and values that were computed before now, because the weights have changed."""
        self.prompts.clear()

    # --- running and ending requests

    def advance(self, at_most: int) -> int:
        """Return the number of decode steps to take now, and count them as taken.

        It is at most `at_most`, and no more than until all running requests reach their maximum length.
        """
        running = [request for request in self._running if request is not None]
        steps = min(at_most, max(request.max_new_tokens - request.steps for request in running))
        self.steps += steps
        # A decode step writes into all of its rows: at the end of a response, and in a slot that has had none, at the first position.
        self.prompts = {slot: prompt for slot, prompt in self.prompts.items() if slot in self._used or slot >= self.rows}
        for request in running:
            request.steps += steps
        return steps

    def unfinished(self) -> dict[int, int]:
        """Return the numbers of all requests that are queued or running, and how many decode steps each has taken."""
        running = (request for request in self._running if request is not None)
        return {request.number: request.steps for request in (*running, *self._queue)}

    def ended(self, active: Sequence[int]) -> list[int]:
        """Return the slots whose requests have ended.

        Args:
            active: one value for each row, 0 if generation has ended.
        """
        return [slot for slot, request in enumerate(self._running) if request is not None and not active[slot]]

    def finish(self, slot: int) -> Request:
        """Free a slot, and return its request. The keys and values of its prompt stay until another prompt overwrites them."""
        request, self._running[slot] = self._running[slot], None
        assert request is not None
        return request

    def compact(self) -> Compaction | None:
        """Move the last requests into free slots. Return None if the queue is not empty, or decode steps would not get smaller."""
        while self._running and self._running[-1] is None:
            self._running.pop()
        free = [slot for slot, request in enumerate(self._running) if request is None]
        used = len(self._running) - len(free)
        if self._queue or self._rows(used) == self.rows:
            return None
        last = [(slot, request) for slot, request in enumerate(self._running) if slot >= used and request is not None]
        for target, (source, request) in zip(free, last, strict=False):  # free slots from `used` on are removed
            self._running[target] = request
            self.prompts[target] = self.prompts.get(source, ())
        del self._running[used:]
        # What lies in the other slots is not kept: decode steps of more rows than are in use write into them.
        self.prompts = {slot: prompt for slot, prompt in self.prompts.items() if slot < used}
        self._used = {slot for slot in self._used if slot < used}
        positions = max(len(request.prompt) + request.max_new_tokens for _, request in last)
        return Compaction([slot for slot, _ in last], free[: len(last)], positions, used)


def _batches(prefills: list[Prefill]) -> list[list[Prefill]]:
    """Divide prompts into batches of at most PREFILL_TOKENS tokens; a longer prompt is a batch of its own."""
    batches: list[list[Prefill]] = []
    tokens = 0
    for prefill in prefills:
        tokens += len(prefill.prompt)
        if not batches or tokens > PREFILL_TOKENS:
            batches.append([])
            tokens = len(prefill.prompt)
        batches[-1].append(prefill)
    return batches
