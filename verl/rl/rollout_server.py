"""What a rollout process does: it answers prompts, and takes new weights by name, in buckets (see `verl.rl.remote_rollout`)."""

from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from itertools import groupby
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from verl import signals
from verl.config.ppo import PPOConfig
from verl.data.render import Renderer
from verl.errors import AbandonedError, UserError
from verl.rl.bridge import Begin, Bridge, Finish, NewWeights, Request, share_of
from verl.rl.remote_rollout import rollout_options
from verl.rollout import Completion, Rollout, load_rollout

Answers = dict[int, dict[int, list[Completion]]]  # by the rank that asked, and the number of the prompt in its request


def serve_rollout(config: PPOConfig, bridge: Bridge, tokenizer: PreTrainedTokenizerBase) -> None:
    """Load the rollout and serve it: all that a rollout process does.

    Raises:
        UserError: the model cannot be loaded, or another process raised an error.
    """
    path, stop_ids, options = config.model.partial_pretrain, Renderer(tokenizer).stop_ids, rollout_options(config)
    with signals.held(), suppress(AbandonedError):  # after a signal, training processes need this one to end together
        serve(bridge, lambda: load_rollout(config.rollout.name, path, tokenizer, stop_ids, options))


def serve(bridge: Bridge, load: Callable[[], Rollout]) -> None:
    """Answer requests and take new weights until the training processes are done."""
    rollout: Rollout = or_raise_everywhere(bridge, load)
    bridge.exchange((rollout.stop_ids, rollout.positions, rollout.describe()))
    server = Server(bridge, rollout)
    while (messages := bridge.exchange(None))[bridge.sender] is not None:
        server.handle(messages)
    rollout.close()


class Server:
    """Does what the training processes ask for."""

    def __init__(self, bridge: Bridge, rollout: Rollout):
        self._bridge, self._rollout = bridge, rollout
        self._begun: Answers = {}

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
                self._begun = or_raise_everywhere(bridge, partial(self._answer, requests, may_give_up=False))
            case Finish():
                bridge.exchange(self._begun)
            case Request():
                requests = {rank: messages[rank] for rank in bridge.layout.training}
                bridge.exchange(or_raise_everywhere(bridge, partial(self._answer, requests, may_give_up=True)))

    def _answer(self, requests: dict[int, Request], *, may_give_up: bool) -> Answers:
        """Answer this process's share of all prompts."""
        found: Answers = {}
        for rank, entries in groupby(share_of(self._bridge.layout, requests, dist.get_rank()), key=lambda entry: entry[0]):
            numbers, request = [number for _, number in entries], requests[rank]
            seeds = numbers if request.seeds is None else [request.seeds[number] for number in numbers]
            with signals.abandoning() if may_give_up else nullcontext():
                done = self._rollout.generate([request.prompts[number] for number in numbers], request.sampling, seeds)
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
