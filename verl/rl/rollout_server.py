"""What a rollout process does, one thing after the other: it answers prompts, and takes new weights (see `verl.rl.remote_rollout`)."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import groupby
from typing import Any

import torch.distributed as dist

from verl import signals
from verl.errors import UserError
from verl.rl.bridge import Answers, Begin, Bridge, Finish, NewWeights, Request, share_of
from verl.rollout import Rollout


class Server:
    """Does what the training processes ask for, one thing after the other."""

    def __init__(self, bridge: Bridge, rollout: Rollout):
        self._bridge, self._rollout = bridge, rollout
        self._begun: Answers = {}

    def next(self) -> list[Any]:
        """Wait for a message of the training processes, and return it."""
        return self._bridge.exchange(0)

    def handle(self, messages: list[Any]) -> None:
        """Take part in what a message begins.

        Args:
            messages: of each process, by rank; those of the training processes are of one kind.
        """
        bridge = self._bridge
        match messages[bridge.sender]:
            case NewWeights(version):
                self._rollout.update_weights(bridge.receive(), version)
            case Begin():  # it is not given up after a signal: the checkpoint holds these answers
                requests = {rank: messages[rank].request for rank in bridge.layout.training}
                self._begun = or_raise_everywhere(bridge, partial(answer, bridge, self._rollout, requests, may_give_up=False))
            case Finish():
                bridge.exchange(self._begun)
            case Request():
                requests = {rank: messages[rank] for rank in bridge.layout.training}
                bridge.exchange(or_raise_everywhere(bridge, partial(answer, bridge, self._rollout, requests, may_give_up=True)))


def answer(bridge: Bridge, rollout: Rollout, requests: dict[int, Request], *, may_give_up: bool) -> Answers:
    """Answer this process's share of all prompts.

    Args:
        requests: request of each training rank.
        may_give_up: whether a signal raises AbandonedError.
    """
    found: Answers = {}
    for rank, entries in groupby(share_of(bridge.layout, requests, dist.get_rank()), key=lambda entry: entry[0]):
        numbers, request = [number for _, number in entries], requests[rank]
        seeds = numbers if request.seeds is None else [request.seeds[number] for number in numbers]
        with signals.abandoning() if may_give_up else nullcontext():
            done = rollout.generate([request.prompts[number] for number in numbers], request.sampling, seeds)
        n = request.sampling.n
        found[rank] = {number: done[i * n : (i + 1) * n] for i, number in enumerate(numbers)}
    return found


def or_raise_everywhere(bridge: Bridge, work: Callable[[], Any]) -> Any:
    """Return the result of `work`. If it raises UserError, all processes get the error in place of the message they wait for."""
    try:
        return work()
    except UserError as error:
        bridge.exchange(error)
        raise
