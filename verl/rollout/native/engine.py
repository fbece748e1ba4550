"""The native engine. A scheduler assigns requests to slots, slots hold KV caches and decode state, and a runner runs the model.

`NativeRollout.stream` is the main loop. Each request takes a slot. Prompts are prefilled, once for all responses to a prompt. Each decode
step adds one token to every slot. When a response has ended, the next request takes its slot (continuous batching). On a GPU, a decode step
is one CUDA graph that also samples. Only every STEPS steps, the host reads which responses have ended.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from verl.dist import has_compiler
from verl.errors import UserError
from verl.rollout import DEFAULTS, Completion, Options, Sampling
from verl.rollout._model import check_positions, copy_weights, describe_model, merge_stop_ids, out_of_memory, positions_of, rope_limit
from verl.rollout._plain import Probe
from verl.rollout._sampler import uniform_numbers
from verl.rollout.native.continuous import NativeContinuous
from verl.rollout.native.drafts import Drafter
from verl.rollout.native.runner import USE_HF, Runner
from verl.rollout.native.scheduler import Request, Scheduler
from verl.rollout.native.slots import Slots
from verl.rollout.native.speculation import DRAFTS, Always, Counts, Pace

STEPS = {"cuda": 8, "cpu": 1}  # decode steps between two checks of which responses have ended


class NativeRollout:
    """See `verl.rollout.Rollout`.

    Args:
        model: model on its device; its weights are not copied, and it may be trained between calls.
        stop_ids: tokens that end a response; those of the model's generation_config.json are added.
        is_shared: whether a trainer changes the model's weights; `update_weights` then copies nothing.
    Attributes:
        scheduler, slots, runner: parts of the engine; each call creates a new scheduler. While the weights stay as they were loaded, it
            knows the prompts whose keys and values are still in the slots.
        drafter, pace: parts of speculation: drafts, and when to use them, new for each call; None: it does not speculate.
    Raises:
        UserError: the architecture has other decode state than keys and values or that of a delta rule, its attention is not supported, or
            its answers are not those of the plain model.
    """

    def __init__(self, model: PreTrainedModel, stop_ids: Sequence[int], options: Options = DEFAULTS, *, is_shared: bool = False):
        self.stop_ids = merge_stop_ids(stop_ids, model.generation_config)
        self.positions, self._rope_limit = positions_of(model), rope_limit(model)
        self.version, self._options, self._is_shared = 0, options, is_shared
        # From call to call: not while a trainer changes the weights, maybe without notice, and resumed runs must give the same bits.
        self._keeps_prompts = not is_shared
        compiles = options.compile if options.compile is not None else is_shared and model.device.type == "cuda" and has_compiler()
        self.runner = Runner(model, compiles=compiles)
        self.slots = self._new_slots(self.stop_ids, options)
        self.scheduler = Scheduler([], 0, on_gpu=False)
        self.drafter: Drafter | None = None
        self.pace: Pace | None = None
        self._why_no_drafts: str | None = None
        self._speculates = False  # while its decode steps are checked
        self._check()

    def _new_slots(self, stop_ids: Sequence[int], options: Options) -> Slots:
        model = self.runner.model
        vocabulary = len(model.get_output_embeddings().weight)
        return Slots(self.runner.shapes, vocabulary, model.dtype, model.device, stop_ids, options)

    def _check(self) -> None:
        """Raise UserError if answers to a few probes are not those of the plain model. The probes have slots of their own.

        If those with drafts are not, it does not speculate.
        """
        probe, slots, model = Probe(self.runner.model), self.slots, self.runner.model
        self.slots = self._new_slots([-1], Options())  # no token ends an answer
        try:
            with self.runner.eager():
                is_exact = probe.is_exact(self._all)
                if is_exact and self._options.speculate == "auto":
                    self._why_no_drafts = "it has a recurrent state" if slots.are_recurrent else self._why_wrong(probe)
            if is_exact:
                self.runner.try_recording(self.slots)
            if self.drafter is not None and self._why_no_drafts is None:
                self._why_no_drafts = self.runner.why_not_recorded(self.slots, self.drafter)
        finally:
            self.slots.free()
            self.slots, self.drafter, self.pace = slots, None, None
        if not is_exact:
            what = f"{type(model).__name__} cannot be run by the native engine: {probe.failures[-1]}"
            raise UserError(what, where="rollout.name=native", fix=USE_HF)
        self._speculates = self._options.speculate == "auto" and self._why_no_drafts is None

    def _why_wrong(self, probe: Probe) -> str | None:
        """Return why verify steps are not exact, by the probes; None: they are."""
        if not probe.is_exact(self._recite):
            return probe.failures[-1]
        assert self.pace is not None
        return None if self.pace.total.kept > self.pace.total.active else "of drafts that are right, none is kept"

    def _recite(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[Completion]:
        """Generate by verify steps alone. The drafts are the answers that decode steps give, and the same with a wrong token."""
        answers = [answer.token_ids for answer in self._all(prompts, sampling)]
        self._speculates = True
        try:
            self._start(prompts, sampling, None)
        finally:
            self._speculates = False
        assert self.drafter is not None
        self.pace = Always(self._device.type)
        for place in (None, 2):  # the latter are taken first
            known = [[abs(token - 1) if i == place else token for i, token in enumerate(answer)] for answer in answers]
            self.drafter.add([(tuple(prompt), answer) for prompt, answer in zip(prompts, known, strict=True)])
        return self._done(sampling)

    def is_exact_for(self, prompts: Sequence[list[int]], sampling: Sampling) -> bool:
        """Return whether no response of a call reaches the length at which the model's rotary embeddings change."""
        return self._rope_limit is None or max(map(len, prompts), default=0) + sampling.max_new_tokens <= self._rope_limit.tokens

    # --- generation

    def stream(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> Iterator[list[tuple[int, Completion]]]:
        """See `Rollout.stream`."""
        self._start(prompts, sampling, seeds)
        yield from self._finished(sampling)

    def _finished(self, sampling: Sampling) -> Iterator[list[tuple[int, Completion]]]:
        while self.scheduler.has_work:
            if (ended := self.advance(sampling)) or sampling.progress:
                yield ended

    def advance(self, sampling: Sampling) -> list[tuple[int, Completion]]:
        """Start requests if there is room, take decode steps, and return the responses that have finished, with their numbers."""
        self._admit()
        ended = self._decode(sampling, STEPS[self._device.type])
        if not ended:
            return []
        finished = self._collect(ended, sampling)
        self._compact()
        return finished

    def unfinished_tokens(self) -> dict[int, int]:
        """See `Rollout`."""
        return self.scheduler.unfinished()

    def continuous(self, sampling: Sampling, responses: int, positions: int) -> NativeContinuous:
        """See `verl.rollout.drawing`. No other method that generates may be called before it has stopped."""
        return NativeContinuous(self, sampling, responses, positions)

    def so_far(self, sampling: Sampling) -> list[tuple[int, Completion]]:
        """Return the tokens of the responses that have started and not finished, with their numbers."""
        if not (running := self.scheduler.running()):
            return []
        read = self.slots.state.read([slot for slot, _ in running])
        return [
            (request.number, Completion(ids, "length", logprobs if sampling.logprobs else None, self.version, is_finished=False))
            for (_, request), (ids, logprobs) in zip(running, read, strict=True)
        ]

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None) -> list[Completion]:
        """See `Rollout.generate`."""
        return self._all(prompts, sampling, seeds)

    def _all(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None) -> list[Completion]:
        self._start(prompts, sampling, seeds)
        return self._done(sampling)

    def _done(self, sampling: Sampling) -> list[Completion]:
        done = dict(pair for batch in self._finished(sampling) for pair in batch)
        return [done[number] for number in sorted(done)]

    def stream_tokens(self, prompt: list[int], sampling: Sampling, on_token: Callable[[int], None]) -> Completion:
        """See `verl.rollout.stream_tokens`."""
        self._start([prompt], sampling, None)
        self._admit()
        state, count, has_ended = self.slots.state, 0, False
        while not has_ended:
            has_ended = bool(self._decode(sampling, 1))
            before, count = count, int(state.generated_S[0])
            for token in state.answer_SG[0, before:count].tolist():
                on_token(token)
        [(_, completion)] = self._collect([0], sampling)
        return completion

    def _start(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None) -> None:
        """Queue the requests of a call."""
        longest = self.check_lengths(prompts, sampling)
        self.prepare(sampling, len(prompts) * sampling.n, longest)
        self.scheduler.add(_requests(prompts, sampling, seeds))

    def check_lengths(self, prompts: Sequence[list[int]], sampling: Sampling) -> int:
        """Return the largest number of tokens of a prompt with its response. Raises UserError: it is too large for the model."""
        check_positions(prompts, sampling, self.positions)
        if not self.is_exact_for(prompts, sampling):
            assert self._rope_limit is not None
            what = f"beyond {self._rope_limit.tokens:,} tokens of a prompt with its response, the model's rotary embeddings are others"
            raise UserError(what, where="rollout.name=native", fix=USE_HF)
        return max(map(len, prompts), default=0) + sampling.max_new_tokens

    def prepare(self, sampling: Sampling, responses: int, positions: int, *, at_most: int = sys.maxsize) -> None:
        """Allocate slots if they are too few or too short, and begin with an empty queue.

        Args:
            responses: number of responses to generate at the same time.
            positions: maximum tokens of a prompt with its response.
            at_most: number of slots to use, even if earlier calls have left more.
        """
        size = self.slots.size_for(responses, positions, sampling.max_new_tokens)
        if size != self.slots.size:
            if self.slots.size is not None:
                self._free()
            self.slots.make(size)
            self.scheduler.forget_prompts()  # also those of the probes, which had slots of their own
        self.slots.reset()
        self.runner.refresh()
        self.runner.set_temperature(sampling.temperature)
        if not self._keeps_prompts:
            self.scheduler.forget_prompts()
        on_gpu, keeps, held = self._device.type == "cuda", not self.slots.are_recurrent, self.scheduler.prompts
        self.scheduler = Scheduler([], min(at_most, self.slots.number), on_gpu=on_gpu, keeps_prompts=keeps, prompts=held)
        if self._speculates:
            self._start_speculation()

    def _start_speculation(self) -> None:
        """Start without texts and counts of earlier calls, so that a call that is repeated takes the same steps."""
        assert self.slots.size is not None
        if self.drafter is None or self.drafter.size != self.slots.size:
            self.drafter = Drafter(self.slots.size, self._device)
        self.drafter.reset()
        self.pace = Pace(self._device.type)

    def _admit(self) -> None:
        """Start queued requests in free slots, if the scheduler decides so."""
        admission = self.scheduler.admit()
        if admission is None:
            return
        try:
            self.slots.clear_states([slot for slot, _ in admission.seated])
            self.slots.copy(admission.copies, admission.copied_positions)
            for batch in admission.prefills:
                self.runner.prefill(batch, self.slots)
            self.slots.state.begin(admission.seated)
            if self.drafter is not None:
                self.drafter.begin(admission.seated)
        except BaseException as error:
            self.scheduler.forget_prompts()  # a later call must not take for there what was not computed
            if isinstance(error, torch.OutOfMemoryError):
                raise out_of_memory(self.slots.number, self._options) from error
            raise

    def _decode(self, sampling: Sampling, at_most: int) -> list[int]:
        """Take at most `at_most` decode steps, and return the slots whose responses have ended."""
        rows = self.scheduler.rows
        drafts = 0 if self.pace is None else min(DRAFTS, self.slots.state.answer_SG.shape[1] - 1)
        verify_steps = self.pace.steps(at_most, rows) if self.pace is not None and drafts else 0
        steps = self.scheduler.advance(verify_steps or at_most)
        try:
            if verify_steps:
                self._verify(rows, steps, sampling, drafts)
            else:
                self.runner.decode(self.slots, rows, steps, sampling)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(self.slots.number, self._options) from error
        if self.pace is not None and not verify_steps:
            self.pace.decoded(steps)
        return self.scheduler.ended(self.slots.state.active_S[:rows].tolist())

    def _verify(self, rows: int, steps: int, sampling: Sampling, drafts: int) -> None:
        """Take verify steps, and count what they did."""
        assert self.drafter is not None and self.pace is not None
        state = self.slots.state
        before_B = state.generated_S[:rows].clone()
        self.runner.verify(self.slots, self.drafter, rows, steps, sampling, drafts)
        kept, active, computed = self.drafter.counts_3.tolist()
        self.drafter.counts_3.zero_()
        added = (state.generated_S[:rows] - before_B)[state.active_S[:rows] > 0].tolist() if self.scheduler.is_last_wave else []
        self.pace.verified(Counts(steps, kept, active, computed), rows, added)

    def _collect(self, ended: list[int], sampling: Sampling) -> list[tuple[int, Completion]]:
        """Return the finished responses with their indices, and free their slots."""
        done = []
        if self.drafter is not None:
            self.drafter.record(self.slots.state, self.scheduler.rows)
            self.drafter.end(ended)
        for slot, (token_ids, logprobs) in zip(ended, self.slots.state.read(ended), strict=True):
            reason: Literal["stop", "length"] = "stop" if token_ids[-1] in self.stop_ids else "length"
            completion = Completion(token_ids, reason, logprobs if sampling.logprobs else None, self.version)
            done.append((self.scheduler.finish(slot).number, completion))
        return done

    def _compact(self) -> None:
        """Make decode steps smaller if no requests are left for the free slots."""
        compaction = self.scheduler.compact()
        if compaction is not None:
            self.slots.compact(compaction)
            if self.drafter is not None:
                self.drafter.move(compaction)

    # --- weights and memory

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `Rollout.update_weights`."""
        self.version, self._keeps_prompts = version, False
        self.scheduler.forget_prompts()
        if not self._is_shared:
            copy_weights(self.runner.model, named_tensors)

    def sleep(self) -> None:
        """Free slots and CUDA graphs if the slots take a large share of the GPU's memory, because recording graphs again takes time."""
        if self.slots.worth_freeing:
            self._free()

    def wake(self) -> None:
        """Do nothing, because slots are allocated when they are needed."""

    def close(self) -> None:
        """See `Rollout.close`."""
        self._free()

    def describe(self) -> str:
        """See `Rollout.describe`."""
        why, parts = self.runner.why_eager, [describe_model(self.runner.model)]
        if why is not None:
            parts.append(f"decode steps without CUDA graphs ({why})")
        if self._options.speculate == "auto":
            parts.append("speculation where it pays" if self._speculates else f"no speculation ({self._why_no_drafts})")
        return ", ".join(parts)

    def _free(self) -> None:
        self.scheduler.forget_prompts()
        self.runner.drop_graphs()
        self.slots.free()
        self.drafter = None

    @property
    def _device(self) -> torch.device:
        return self.runner.device


def _requests(prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None) -> Iterator[Request]:
    """Yield one request for each response, in the order of their indices.

    Args:
        seeds: seed of each prompt; None: its index.
    """
    nothing = np.zeros(0, dtype=np.float32)
    for i, prompt in enumerate(map(tuple, prompts)):
        seed = i if seeds is None else seeds[i]
        for k in range(sampling.n):
            uniform_G = uniform_numbers(sampling, seed, k) if sampling.temperature > 0 else nothing
            yield Request(i * sampling.n + k, prompt, sampling.max_new_tokens, uniform_G)
