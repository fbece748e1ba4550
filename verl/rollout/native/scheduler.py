"""Which request is generated in which slot: continuous batching with prefix sharing.

This file runs on the host alone: it knows no tensors and no model. A scheduler decides, and the engine carries it out.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

PREFILL_TOKENS = 32_768  # prompt tokens in one forward pass
ADMISSION_SHARE = 8  # on a GPU, requests wait until one slot in eight is free: each prefill interrupts decoding
FEWEST_ROWS = 4  # of a CUDA graph

Prompt = tuple[int, ...]


@dataclass
class Request:
    """One answer to generate.

    Attributes:
        number: its index among all answers of the call.
        prompt: token ids, at least one.
        max_new_tokens: longest answer, its stop token included.
        uniform_G: random numbers in [0, 1), one for each token; empty for greedy decoding.
        steps: decode steps that it has taken part in.
    """

    number: int
    prompt: Prompt
    max_new_tokens: int
    uniform_G: np.ndarray
    steps: int = 0


@dataclass(frozen=True)
class Prefill:
    """A prompt to put through the model once, and the slots that get its keys and values."""

    prompt: Prompt
    slots: list[int]


@dataclass(frozen=True)
class Admission:
    """Requests that start now. First the copies are made, then the prefill batches are run, then the requests begin.

    Attributes:
        seated: each request with its slot.
        copies: (source slot, target slot) for prompts whose keys and values another slot holds already.
        copied_positions: length of the longest copied prompt.
        prefills: batches of prompts that the model has to see.
    """

    seated: list[tuple[int, Request]]
    copies: list[tuple[int, int]]
    copied_positions: int
    prefills: list[list[Prefill]]


@dataclass(frozen=True)
class Compaction:
    """Answers that move to lower slots, so that a decode step computes fewer rows.

    Attributes:
        sources, targets: slots, pair by pair.
        positions: the most positions that any of the answers can reach.
        used: number of slots in use afterwards.
    """

    sources: list[int]
    targets: list[int]
    positions: int
    used: int


class Scheduler:
    """The requests of one call: a queue, and the slots in which requests run.

    Args:
        requests: in the order in which they are to start.
        slots: how many there are.
        on_gpu: admit requests in groups, and round the rows of a step up to a power of two, so that a few CUDA graphs serve.
    """

    def __init__(self, requests: Iterable[Request], slots: int, *, on_gpu: bool):
        self._queue, self._slots, self._on_gpu = deque(requests), slots, on_gpu
        self._running: list[Request | None] = []  # by slot, up to the last one in use
        self._prompts: dict[int, Prompt] = {}  # by slot: the prompt whose keys and values it holds, during its answer and after

    @property
    def has_work(self) -> bool:
        return bool(self._queue) or any(self._running)

    @property
    def rows(self) -> int:
        """Slots that a decode step computes, from the first one on."""
        return self._rows(len(self._running))

    def _rows(self, used: int) -> int:
        return min(self._slots, max(FEWEST_ROWS, 1 << (used - 1).bit_length())) if self._on_gpu else used

    # --- starting requests

    def admit(self) -> Admission | None:
        """Seat queued requests in the free slots; None if the queue is empty, or too few slots are free to be worth a prefill."""
        if not self._queue:
            return None
        free = [slot for slot in range(self._slots) if slot >= len(self._running) or self._running[slot] is None]
        if len(free) < self._enough():
            return None
        seated = self._seat(free, [self._queue.popleft() for _ in range(min(len(free), len(self._queue)))])
        self._running += [None] * (max(slot for slot, _ in seated) + 1 - len(self._running))
        for slot, request in seated:
            self._running[slot] = request
        return self._plan(seated)

    def _enough(self) -> int:
        """Free slots that are worth a prefill; all slots are always enough."""
        return max(1, min(self._slots // ADMISSION_SHARE, len(self._queue))) if self._on_gpu else 1

    def _seat(self, free: list[int], requests: list[Request]) -> list[tuple[int, Request]]:
        """A free slot for each request: first for those whose prompt a free slot still holds, then for the others."""
        holders: dict[Prompt, list[int]] = {}
        for slot in free:
            holders.setdefault(self._prompts.get(slot, ()), []).append(slot)
        seated = [(found.pop(0), request) for request in requests if (found := holders.get(request.prompt))]
        taken, served = {slot for slot, _ in seated}, {request.number for _, request in seated}
        others = (slot for slot in free if slot not in taken)
        return seated + [(next(others), request) for request in requests if request.number not in served]

    def _plan(self, seated: list[tuple[int, Request]]) -> Admission:
        """How the prompts' keys and values get into the slots: they are there, another slot has them, or the model computes them."""
        missing = [(slot, request.prompt) for slot, request in seated if self._prompts.get(slot) != request.prompt]
        for slot, _ in missing:
            self._prompts.pop(slot, None)  # it is overwritten
        holder = {prompt: slot for slot, prompt in self._prompts.items()}
        copies: list[tuple[int, int]] = []
        targets: dict[Prompt, list[int]] = {}
        for slot, prompt in missing:
            if prompt in holder:
                copies.append((holder[prompt], slot))
            elif len(prompt) > 1:  # the last token of a prompt is the first decode step's
                targets.setdefault(prompt, []).append(slot)
            self._prompts[slot] = prompt
        copied_positions = max((len(self._prompts[slot]) for _, slot in copies), default=0)
        return Admission(seated, copies, copied_positions, _batches([Prefill(*target) for target in targets.items()]))

    def forget_prompts(self) -> None:
        """Share no keys and values from before: the weights have changed."""
        self._prompts.clear()

    # --- running and ending them

    def advance(self, at_most: int) -> int:
        """Decode steps to take now: at most this many, and none after every request must have ended. They count as taken."""
        running = [request for request in self._running if request is not None]
        steps = min(at_most, max(request.max_new_tokens - request.steps for request in running))
        for request in running:
            request.steps += steps
        return steps

    def ended(self, active: Sequence[int]) -> list[int]:
        """Slots whose requests have ended.

        Args:
            active: one value for each row, 0 where generation has ended.
        """
        return [slot for slot, request in enumerate(self._running) if request is not None and not active[slot]]

    def finish(self, slot: int) -> Request:
        """Free a slot. Its prompt stays in it for later requests, until another one is put there."""
        request, self._running[slot] = self._running[slot], None
        assert request is not None
        return request

    def compact(self) -> Compaction | None:
        """Once the queue is empty, move the last requests into free slots; None if a step would not get smaller."""
        while self._running and self._running[-1] is None:
            self._running.pop()
        free = [slot for slot, request in enumerate(self._running) if request is None]
        used = len(self._running) - len(free)
        if self._queue or self._rows(used) == self.rows:
            return None
        last = [(slot, request) for slot, request in enumerate(self._running) if slot >= used and request is not None]
        for target, (_, request) in zip(free, last, strict=False):  # free slots beyond `used` are cut off
            self._running[target] = request
        del self._running[used:]
        positions = max(len(request.prompt) + request.max_new_tokens for _, request in last)
        return Compaction([slot for slot, _ in last], free[: len(last)], positions, used)


def _batches(prefills: list[Prefill]) -> list[list[Prefill]]:
    """Prompts that go through the model together: up to PREFILL_TOKENS tokens, or one longer prompt."""
    batches: list[list[Prefill]] = []
    tokens = 0
    for prefill in prefills:
        tokens += len(prefill.prompt)
        if not batches or tokens > PREFILL_TOKENS:
            batches.append([])
            tokens = len(prefill.prompt)
        batches[-1].append(prefill)
    return batches
