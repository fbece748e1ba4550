"""What a rollout process does with `rollout.partial=true`: it draws all the time, and listens for messages between decode steps.

When new weights come, unfinished answers stop, and go on under them: each is put in again as its prompt with the tokens so far. Answers of
the next step begin in the slots that those of this step leave free. The numbers of decode steps at which messages were taken are the only
thing that depends on time; `Replay` has them from another run.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from verl import signals
from verl.errors import AbandonedError, UserError
from verl.rl.bridge import Answers, Begin, Bridge, Cut, Finish, NewWeights, Replay, Request, share_of
from verl.rl.rollout_server import answer, or_raise_everywhere
from verl.rl.schedule import event_of
from verl.rollout import Rollout, Sampling
from verl.rollout.drawing import Continuous, Drawing, begin, can_continue


@dataclass
class _Batch:
    """Answers of this process that were begun by one message, by the rank that asked and the number of the prompt in its request."""

    drawings: dict[tuple[int, int], list[Drawing]]

    @property
    def all(self) -> Iterator[Drawing]:
        return (drawing for of_prompt in self.drawings.values() for drawing in of_prompt)

    @property
    def is_finished(self) -> bool:
        return all(drawing.so_far.is_finished for drawing in self.all)

    @property
    def answers(self) -> Answers:
        """What each answer has so far."""
        found: Answers = {}
        for (rank, number), of_prompt in self.drawings.items():
            found.setdefault(rank, {})[number] = [drawing.so_far for drawing in of_prompt]
        return found


@dataclass
class PartialServer:
    """Draws answers, and does what the training processes ask for.

    Args:
        positions: maximum tokens of a prompt with its answer.
    Raises:
        UserError: the engine cannot stop an answer and go on with it.
    """

    bridge: Bridge
    rollout: Rollout
    positions: int
    _batches: list[_Batch] = field(default_factory=list)  # that were begun and not fetched, oldest first
    _drawing: Continuous | None = None
    _sampling: Sampling | None = None
    _due: list[dict[str, Any]] | None = None  # events that this process is to repeat
    _steps: int = 0  # decode steps since the message before

    def __post_init__(self) -> None:
        or_raise_everywhere(self.bridge, lambda: _check(self.rollout))

    def next(self) -> list[Any]:
        """Draw until the training processes send a message, and return it."""
        self._steps = 0
        while self._drawing is not None and self._drawing.has_work and not self._is_called():
            or_raise_everywhere(self.bridge, self._step)
        return self.bridge.take(self._steps)

    def _is_called(self) -> bool:
        if self._due:
            return self._steps >= int(self._due[0]["decode_steps"])
        return self.bridge.is_called()

    def _step(self) -> None:
        assert self._drawing is not None
        before = self._drawing.steps
        self._drawing.step()
        self._steps += self._drawing.steps - before

    def handle(self, messages: list[Any]) -> None:
        """Take part in what a message begins.

        Args:
            messages: of each process, by rank; those of the training processes are of one kind.
        """
        bridge, ranks = self.bridge, self.bridge.layout.training
        message = messages[bridge.sender]
        or_raise_everywhere(bridge, lambda: self._repeat(message))
        match message:
            case Begin():
                self._begin({rank: messages[rank] for rank in ranks})
            case Finish():
                self._finish()
            case NewWeights(version):
                self._stop()
                self.rollout.update_weights(bridge.receive(), version)
                self._go_on()
            case Cut():
                self._stop()
                bridge.exchange([batch.answers for batch in self._batches])
                self._go_on()
            case Replay(events):
                self._due = [event for event in events if event["rank"] == dist.get_rank()]
            case Request():
                self._stop()
                requests = {rank: messages[rank] for rank in ranks}
                bridge.exchange(or_raise_everywhere(bridge, lambda: self._answer(requests)))
                self._go_on()

    def _repeat(self, message: object) -> None:
        """Check that a message is the next event of the run that is repeated, and came at its decode step."""
        event = event_of(message)
        if self._due is None or event is None:
            return
        due = self._due.pop(0) if self._due else None
        if due is not None and (due["event"], due["decode_steps"]) == (event, self._steps):
            return
        recorded = "ends here" if due is None else f"has {due['event']!r} after {due['decode_steps']} decode steps in step {due['step']}"
        raise UserError(
            f"the recorded run {recorded}, and this one has {event!r} after {self._steps}",
            where="rollout.replay",
            fix="give the command of the recorded run, with its trainer.save_freq and trainer.test_freq, on the same kind of machine",
        )

    def _answer(self, requests: dict[int, Request]) -> Answers | None:
        """Answer at once; None after a signal: this process is still asked for the answers that were begun."""
        try:
            return answer(self.bridge, self.rollout, requests, may_give_up=True)
        except AbandonedError:
            return None

    def _begin(self, messages: dict[int, Begin]) -> None:
        requests = {rank: message.request for rank, message in messages.items()}
        drawings: dict[tuple[int, int], list[Drawing]] = {}
        for rank, number in share_of(self.bridge.layout, requests, dist.get_rank()):
            request, so_far = requests[rank], messages[rank].so_far
            assert request.seeds is not None
            seed = request.seeds[number]
            fresh = [Drawing(request.prompts[number], seed, answer) for answer in range(request.sampling.n)]
            for drawing, begun in zip(fresh, so_far.get(seed, []), strict=False):
                drawing.so_far = begun
            drawings[rank, number] = fresh
        batch = _Batch(drawings)
        self._batches.append(batch)
        self._sampling = messages[self.bridge.sender].request.sampling
        if self._drawing is None:
            self._drawing = begin(self.rollout, self._sampling, 2 * len(list(batch.all)), self.positions)
        running = self._drawing
        or_raise_everywhere(self.bridge, lambda: running.add(list(batch.all)))

    def _finish(self) -> None:
        """Draw until the oldest answers are finished, and send them; None instead if a signal came before, and they go on."""
        batch = self._batches[0]
        while not batch.is_finished and signals.received() is None:
            or_raise_everywhere(self.bridge, self._step)
        values = self.bridge.exchange(batch.answers if batch.is_finished else None)
        if all(values[rank] is not None for rank in self.bridge.layout.rollout):
            self._batches.pop(0)

    def _stop(self) -> None:
        if self._drawing is not None:
            self._drawing.stop()
            self._drawing = None

    def _go_on(self) -> None:
        unfinished = [drawing for batch in self._batches for drawing in batch.all]
        if unfinished:
            assert self._sampling is not None
            new = self._drawing = begin(self.rollout, self._sampling, 2 * len(list(self._batches[0].all)), self.positions)
            or_raise_everywhere(self.bridge, lambda: new.add(unfinished))


def _check(rollout: Rollout) -> None:
    if not can_continue(rollout):
        raise UserError(
            "this engine cannot stop an answer and go on with it under new weights",
            where="rollout.partial=true",
            fix="set rollout.name=native, or rollout.partial=false: new weights then wait for the answers",
        )
