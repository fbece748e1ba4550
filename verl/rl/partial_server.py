"""What a rollout process does with `rollout.partial=true`: it draws all the time, and listens for messages between decode steps.

When new weights come, unfinished answers stop, and go on under them: each is put in again as its prompt with the tokens so far. Answers of
the next step begin in the slots that those of this step leave free. The numbers of decode steps at which messages were taken are the only
thing that depends on time; `Replay` has them from another run.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from verl.errors import AbandonedError, UserError
from verl.rl.bridge import Answers, Begin, Bridge, Cut, Finish, NewWeights, Replay, Request, prompts_of, share_of
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


class PartialServer:
    """Draws answers, and does what the training processes ask for.

    Args:
        positions: maximum tokens of a prompt with its answer.
    Raises:
        UserError: the engine cannot stop an answer and go on with it.
    """

    def __init__(self, bridge: Bridge, rollout: Rollout, positions: int):
        self.bridge, self.rollout, self._positions = bridge, rollout, positions
        self._batches: list[_Batch] = []  # that were begun and not sent, oldest first
        self._sent = self._reported = 0  # number of batches that were sent, and of those that were reported to be finished
        self._drawing: Continuous | None = None
        self._sampling: Sampling | None = None
        self._due: list[dict[str, Any]] | None = None  # events that this process is to repeat
        self._steps = 0  # decode steps since the message before
        or_raise_everywhere(bridge, lambda: _check(rollout))

    def next(self) -> list[Any]:
        """Draw until the training processes send a message, and return it."""
        self._steps = 0
        self._report()
        while self._drawing is not None and self._drawing.has_work and not self._is_called():
            self._try(self._step)
            self._report()
        self._try(self._check_due)
        return self.bridge.take(self._steps)

    def _is_called(self) -> bool:
        if self._due:
            return bool(self._steps >= self._due[0]["decode_steps"])
        return self.bridge.is_called()

    def _step(self) -> None:
        assert self._drawing is not None
        before = self._drawing.steps
        self._drawing.step()
        self._steps += self._drawing.steps - before

    def _report(self) -> None:
        """Tell which answers are finished."""
        while self._reported < self._sent + len(self._batches) and self._batches[self._reported - self._sent].is_finished:
            self.bridge.report(self._reported)
            self._reported += 1

    def _try(self, work: Callable[[], Any]) -> Any:
        """Return the result of `work`. If it raises UserError, all processes get the error with the next message."""
        try:
            return work()
        except UserError as error:
            self.bridge.report(None)
            self.bridge.exchange(error)
            raise

    def handle(self, messages: list[Any]) -> None:
        """Take part in what a message begins.

        Args:
            messages: of each process, by rank; those of the training processes are of one kind.
        """
        bridge, ranks = self.bridge, self.bridge.layout.training
        message = messages[bridge.sender]
        if isinstance(message, NewWeights):
            self._repeat(messages)  # the next message has weights, and cannot be an error
        else:
            self._try(lambda: self._repeat(messages))
        match message:
            case Begin():
                self._begin({rank: messages[rank] for rank in ranks})
            case Finish():
                bridge.exchange(self._batches.pop(0).answers)
                self._sent += 1
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
                bridge.exchange(self._try(lambda: self._answer(requests)))
                self._go_on()

    def _repeat(self, messages: list[Any]) -> None:
        """Check that a message is the next event of the run that is repeated, for the same prompts, and came at its decode step."""
        event = event_of(messages[self.bridge.sender])
        if self._due is None or event is None:
            return
        due, prompts = self._due.pop(0) if self._due else None, prompts_of(self.bridge.layout, messages, dist.get_rank())
        if due is None or (due["event"], due["decode_steps"]) != (event, self._steps):
            raise _differs(due, f"{event!r} after {self._steps}")
        if due.get("prompts") != prompts:
            raise _differs(due, f"prompts {prompts} in place of {due.get('prompts')}")

    def _check_due(self) -> None:
        """Check that answers are finished which the run that is repeated took now: they would be waited for."""
        if self._due and self._due[0]["event"] == "finished" and self._batches and not self._batches[0].is_finished:
            raise _differs(self._due[0], f"unfinished answers after {self._steps}")

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
        self._batches.append(batch := _Batch(drawings))
        self._sampling = messages[self.bridge.sender].request.sampling
        self._draw(list(batch.all))

    def _draw(self, drawings: list[Drawing]) -> None:
        """Draw these answers too."""

        def add() -> None:
            assert self._sampling is not None
            if self._drawing is None:
                of_two_steps = max(1, 2 * len(list(self._batches[0].all)))
                self._drawing = begin(self.rollout, self._sampling, of_two_steps, self._positions)
            self._drawing.add(drawings)

        self._try(add)

    def _stop(self) -> None:
        """Give each unfinished answer its tokens so far, and leave the engine to others; `_go_on` goes on with them."""
        if self._drawing is not None:
            self._drawing.stop()
            self._drawing = None

    def _go_on(self) -> None:
        if self._batches:
            self._draw([drawing for batch in self._batches for drawing in batch.all])


def _check(rollout: Rollout) -> None:
    if not can_continue(rollout):
        raise UserError(
            "this engine cannot stop an answer and go on with it under new weights",
            where="rollout.partial=true",
            fix="set rollout.name=native, or rollout.partial=false: new weights then wait for the answers",
        )


def _differs(due: dict[str, Any] | None, found: str) -> UserError:
    recorded = "ends here" if due is None else f"has {due['event']!r} after {due['decode_steps']} decode steps in step {due['step']}"
    return UserError(
        f"the recorded run {recorded}, and this one has {found}",
        where="rollout.replay",
        fix="give the command of the recorded run, with its trainer.save_freq and trainer.test_freq, on the same kind of machine",
    )
