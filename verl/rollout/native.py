"""Generation of our own: any model that transformers' attention interface serves, with its weights where they are.

Sequences lie in slots and get one token each at a time; one that has ended makes room for the next in the queue (continuous
batching). A prompt's tokens but the last go through the model packed with those of other prompts, without padding and once for
all answers to it; the last one is the first step of decoding. On a GPU a step is one CUDA graph, recorded for a few numbers of
slots, and what it draws stays on the device; the host looks at it every few steps.

`NativeRollout.stream` is the whole way; read it first.

Dimensions: S slots, B of them in use, V vocabulary, T packed tokens.
"""

import gc
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from verl.engine.fsdp import decoder_layers
from verl.engine.logprobs import LogitRule
from verl.errors import UserError
from verl.kernels import has_compiler
from verl.models.linear import multiply, use_whole_cpu
from verl.rollout import DEFAULTS, Completion, Options, Sampling
from verl.rollout._attention import SLOTS, LayerCache, Newest, Packed, Probe, Shape, has_kernel
from verl.rollout._draws import BLOCK, draw, least_allowed, uniforms
from verl.rollout._model import all_stop_ids, borrowed, check_positions, copy_weights, describe_model, load_model, too_little_memory
from verl.rollout._slots import Caches, State, bytes_of_position, to_device

STEPS = 8  # on a GPU, between two looks at what has ended
MOST_SLOTS = {"cuda": 2048, "cpu": 64}  # where memory allows; more make a step as much longer as they add
PREFILL_TOKENS = 32_768  # of prompts that go through the model at a time
WORTH_FREEING = 0.1  # of a GPU's memory: slots that take more are given back while the model trains
SHARE_OF_FREE = 0.8  # of a GPU's free memory, for slots and their logits
_RESIZED_ROPE = {"dynamic", "longrope"}  # these look at the longest position on the host in each step
ROUND = 64  # slots have a multiple of so many positions, so that a few more need no new ones


@dataclass
class Request:
    """One answer that is wanted.

    Attributes:
        number: among all answers.
        limit: tokens at which it is cut.
        uniform_G: random numbers to draw it with.
        steps: of decoding that it has had.
    """

    number: int
    prompt: list[int]
    limit: int
    uniform_G: np.ndarray
    steps: int = 0


class NativeRollout:
    """See `verl.rollout.Rollout`.

    Args:
        model: on its device; its weights are read where they are, and it may be in training in between.
        stop_ids: tokens that end an answer, besides those of the model's generation_config.json.
        is_shared: whether someone else changes the weights; `update_weights` then copies nothing.
    Raises:
        UserError: an architecture that keeps more of a text than keys and values, or attends in a way that this engine does not.
    """

    def __init__(self, model: PreTrainedModel, stop_ids: Sequence[int], options: Options = DEFAULTS, *, is_shared: bool = False):
        self.model, self.version = model, 0
        self.stop_ids = all_stop_ids(stop_ids, model.generation_config)
        self.positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._options, self._is_shared = options, is_shared
        self._device, self._rule = model.device, LogitRule.of(model.config)
        compiles = options.compile if options.compile is not None else is_shared and self._device.type == "cuda" and has_compiler()
        self._decode_layer = torch.compile(_run_layer, fullgraph=True, dynamic=True) if compiles else _run_layer
        self._layers = decoder_layers(model)
        use_whole_cpu(model)
        self._vocabulary = len(model.get_output_embeddings().weight)
        self._most_slots = sys.maxsize
        self._pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None
        self._is_recordable = not _RESIZED_ROPE & _rope_types(model.config)
        self._held: dict[int, list[int]] = {}  # by slot: the prompt of which it holds the keys and values
        self._running: list[Request | None] = []
        self._graphs: dict[tuple[Any, ...], torch.cuda.CUDAGraph] = {}
        self._caches: Caches | None = None
        self._state: State
        self._place: Packed | Newest | None = None
        self._shapes = self._probe()
        self._temperature = torch.zeros(1, device=self._device)
        self._says_logprobs = True

    # --- what a caller sees

    def stream(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> Iterator[list[tuple[int, Completion]]]:
        """See `Rollout.stream`."""
        queue = self._start(prompts, sampling, seeds)
        while queue or any(self._running):
            self._admit(queue)
            ended = self._decode(sampling, STEPS if self._device.type == "cuda" else 1)
            if ended:
                yield self._collect(ended)
                self._close_ranks(queue)

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None) -> list[Completion]:
        """See `Rollout.generate`."""
        done = dict(pair for batch in self.stream(prompts, sampling, seeds) for pair in batch)
        return [done[number] for number in sorted(done)]

    def generate_aloud(self, prompt: list[int], sampling: Sampling, on_token: Callable[[int], None]) -> Completion:
        """One answer, each token of it handed to `on_token` as soon as it is there. What `on_token` raises ends it."""
        queue = self._start([prompt], sampling, None)
        self._admit(queue)
        state, said = self._state, 0
        while not self._decode(sampling, 1):
            on_token(int(state.answer_SG[0, said]))
            said += 1
        on_token(int(state.answer_SG[0, said]))
        [(_, completion)] = self._collect([0])
        return completion

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `Rollout.update_weights`."""
        self.version = version
        self._held.clear()
        if not self._is_shared:
            copy_weights(self.model, named_tensors)

    def sleep(self) -> None:
        """Free slots and graphs, if they are a good part of a GPU's memory: new graphs take a while. The weights stay."""
        if (
            self._device.type != "cuda"
            or self._bytes_of_slots() > WORTH_FREEING * torch.cuda.get_device_properties(self._device).total_memory
        ):
            self._free()

    def wake(self) -> None:
        """Nothing to do: slots are made when they are needed."""

    def close(self) -> None:
        self._free()

    def describe(self) -> str:
        return describe_model(self.model)

    # --- slots

    def _free(self) -> None:
        self._held.clear()
        self._running = []
        self._graphs.clear()
        self._caches = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            self._pool = torch.cuda.graph_pool_handle()  # the old one went with its graphs

    def _bytes_of_slots(self) -> int:
        return 0 if self._caches is None else sum(tensor.nbytes for layer in self._caches.layers for tensor in layer)

    def _start(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None) -> deque[Request]:
        """Requests in the order of their numbers, and slots that are long enough."""
        check_positions(prompts, sampling, self.positions)
        longest = max(map(len, prompts), default=0) + sampling.max_new_tokens
        numbers = [(i, k) for i in range(len(prompts)) for k in range(sampling.n)]
        self._make_slots(len(numbers), longest, sampling.max_new_tokens)
        self._held.clear()  # what is shared may have changed without a word
        self._running = []
        self._state.active_S.zero_()
        self._state.position_S.zero_()
        self._temperature.fill_(sampling.temperature)
        self._says_logprobs = sampling.logprobs
        seed_of = range(len(prompts)) if seeds is None else seeds
        nothing = np.zeros(0, dtype=np.float32)
        return deque(
            Request(
                i * sampling.n + k,
                prompts[i],
                sampling.max_new_tokens,
                uniforms(sampling, seed_of[i], k) if sampling.temperature > 0 else nothing,
            )
            for i, k in numbers
        )

    def _make_slots(self, wanted: int, longest: int, longest_answer: int) -> None:
        """Slots for so many answers, or as many as fit; those that are there stay if they serve."""
        wanted = min(wanted, self._options.max_sequences or MOST_SLOTS[self._device.type])
        positions = max(longest, self._options.max_positions or 0)
        if self._caches is not None:
            slots, has_positions = self._caches.layers[0].key.shape[0], self._caches.layers[0].key.shape[2]
            if slots >= min(wanted, self._most_slots) and has_positions >= positions and self._state.answer_SG.shape[1] >= longest_answer:
                return
            wanted, positions = max(wanted, slots), max(positions, has_positions)
            self._free()
        if self._device.type == "cuda":
            positions = -(-positions // ROUND) * ROUND
        slots = min(wanted, self._slots_that_fit(positions))
        self._most_slots = slots if slots < wanted else sys.maxsize
        try:
            self._caches = Caches(self._shapes, slots, positions, self.model.dtype, self._device)
            self._state = State.empty(slots, longest_answer, self.stop_ids, self._device)
        except torch.OutOfMemoryError as error:
            raise too_little_memory(slots, self._options) from error

    def _slots_that_fit(self, positions: int) -> int:
        if self._device.type != "cuda":
            return sys.maxsize
        free, _ = torch.cuda.mem_get_info(self._device)
        free += torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        each = positions * bytes_of_position(self._shapes, self.model.dtype) + self._vocabulary * (self.model.dtype.itemsize + 1)
        return max(1, int(free * SHARE_OF_FREE) // each)

    # --- prompts

    def _admit(self, queue: deque[Request]) -> None:
        """Fill free slots from the queue, once there are enough of them to make it worth while."""
        slots = len(self._state.active_S)
        free = [slot for slot in range(slots) if slot >= len(self._running) or self._running[slot] is None]
        enough = 1 if self._device.type == "cpu" else max(1, min(slots // 8, len(queue)))
        if not queue or (len(free) < enough and any(self._running)):
            return
        taken = self._seat(free, [queue.popleft() for _ in range(min(len(free), len(queue)))])
        self._running += [None] * (max(slot for slot, _ in taken) + 1 - len(self._running))
        for slot, request in taken:
            self._running[slot] = request
        self._prefill([(slot, request.prompt) for slot, request in taken if self._held.get(slot) != request.prompt])
        self._state.begin(
            [slot for slot, _ in taken],
            [request.prompt[-1] for _, request in taken],
            [len(request.prompt) - 1 for _, request in taken],
            [request.limit for _, request in taken],
            np.stack([request.uniform_G for _, request in taken]),
        )

    def _seat(self, free: list[int], requests: list[Request]) -> list[tuple[int, Request]]:
        """A free slot for each request, one that holds its prompt if there is one."""
        holders: dict[tuple[int, ...], list[int]] = {}
        for slot in free:
            holders.setdefault(tuple(self._held.get(slot, ())), []).append(slot)
        seated = [(found.pop(0), request) for request in requests if (found := holders.get(tuple(request.prompt)))]
        taken, served = {slot for slot, _ in seated}, {request.number for _, request in seated}
        others = (slot for slot in free if slot not in taken)
        return seated + [(next(others), request) for request in requests if request.number not in served]

    def _prefill(self, wanted: list[tuple[int, list[int]]]) -> None:
        """Put prompts' keys and values into slots: from another slot that holds them, or else through the model."""
        for slot, _ in wanted:
            self._held.pop(slot, None)
        held = {tuple(prompt): slot for slot, prompt in self._held.items()}
        targets: dict[tuple[int, ...], list[int]] = {}
        copies: list[tuple[int, int, int]] = []
        for slot, prompt in wanted:
            if tuple(prompt) in held:
                copies.append((held[tuple(prompt)], slot, len(prompt)))
            elif len(prompt) > 1:
                targets.setdefault(tuple(prompt), []).append(slot)
            self._held[slot] = prompt
        if copies:
            source_R, target_R = (to_device([copy[side] for copy in copies], self._device) for side in (0, 1))
            assert self._caches is not None
            self._caches.move(source_R, target_R, max(length for _, _, length in copies))
        batch: list[tuple[tuple[int, ...], list[int]]] = []
        for each in targets.items():
            if batch and sum(len(p) for p, _ in batch) + len(each[0]) > PREFILL_TOKENS:
                self._prefill_batch(batch)
                batch = []
            batch.append(each)
        if batch:
            self._prefill_batch(batch)

    @torch.no_grad()
    def _prefill_batch(self, batch: list[tuple[tuple[int, ...], list[int]]]) -> None:
        """Prompts, all but their last tokens, side by side through the model."""
        ids = [np.array(prompt[:-1], dtype=np.int64) for prompt, _ in batch]
        starts = np.cumsum([0, *map(len, ids)])
        position_T = np.concatenate([np.arange(len(x)) for x in ids])
        source_R = np.concatenate(
            [np.tile(start + np.arange(len(x)), len(slots)) for x, start, (_, slots) in zip(ids, starts[:-1], batch, strict=True)]
        )
        slot_R = np.concatenate([np.repeat(slots, len(x)) for x, (_, slots) in zip(ids, batch, strict=True)])
        place = Packed(
            to_device(starts.astype(np.int32), self._device),
            max(map(len, ids)),
            to_device(source_R, self._device),
            to_device(slot_R, self._device),
            to_device(position_T[source_R], self._device),
        )
        try:
            self._place = place
            with self._borrowed(_run_layer):
                self._forward(to_device(np.concatenate(ids)[None], self._device), to_device(position_T[None], self._device))
        except torch.OutOfMemoryError as error:
            raise too_little_memory(len(self._state.active_S), self._options) from error

    # --- tokens

    @torch.no_grad()
    def _decode(self, sampling: Sampling, steps: int) -> list[int]:
        """Some tokens for each slot in use. Returns the slots whose answers have ended."""
        running = self._running
        steps = min(steps, max(request.limit - request.steps for request in running if request is not None))
        for request in running:
            if request is not None:
                request.steps += steps
        try:
            for _ in range(steps):
                self._step(sampling)
        except torch.OutOfMemoryError as error:
            raise too_little_memory(len(self._state.active_S), self._options) from error
        active = self._state.active_S[: len(running)].tolist()
        return [slot for slot, request in enumerate(running) if request is not None and not active[slot]]

    def _step(self, sampling: Sampling) -> None:
        if not has_kernel(self._device):
            self._step_plainly(len(self._running), sampling)
            return
        rows = self._bucket(len(self._running))
        key = (rows, sampling.is_cut and (sampling.top_k, sampling.top_p))
        if key in self._graphs:
            self._graphs[key].replay()
            return
        with self._borrowed(self._decode_layer):
            self._step_on_device(rows, sampling)  # the first time by itself: kernels are compiled and loaded
            if self._is_recordable:
                self._graphs[key] = _record(partial(self._step_on_device, rows, sampling), self._pool)

    def _bucket(self, rows: int) -> int:
        """All slots, or the next power of two, so that a few graphs serve."""
        slots = len(self._state.active_S)
        return min(slots, max(4, 1 << (rows - 1).bit_length()))

    def _step_on_device(self, rows: int, sampling: Sampling) -> None:
        from verl.rollout import _draws_triton

        logits_BV = self.model.get_output_embeddings()(self._hidden(rows, None))
        least_B = None
        if sampling.is_cut:
            token_B = least_allowed(self._rule(logits_BV) / self._temperature, sampling)
            least_B = logits_BV.gather(1, token_B[:, None]).squeeze(1)  # as the model says it: a kernel may divide otherwise
        _draws_triton.step(logits_BV, self._state, self._temperature, least_B, self._rule.factor, self._rule.soft_cap)

    def _step_plainly(self, rows: int, sampling: Sampling) -> None:
        state = self._state
        with self._borrowed(self._decode_layer):
            hidden_BH = self._hidden(rows, int(state.position_S[:rows].max()) + 1)
            uniform_B = state.uniform_SG[:rows].gather(1, state.generated_S[:rows, None].long().clamp(max=state.uniform_SG.shape[1] - 1))
            state.advance(*draw(self._logit_blocks(hidden_BH, kept=sampling.temperature > 0), sampling, uniform_B.squeeze(1)))

    def _hidden(self, rows: int, longest: int | None) -> Tensor:
        """hidden_BH behind the newest token of each slot."""
        self._place = Newest(self._state.position_S[:rows], longest)
        hidden_B1H = self._forward(self._state.token_S[:rows, None], self._state.position_S[:rows, None])
        return hidden_B1H[:, 0]

    def _logit_blocks(self, hidden_BH: Tensor, *, kept: bool) -> Iterator[Tensor]:
        """Blocks of logits_BC; unless they are kept, each may lie where the last one was."""
        head = self.model.get_output_embeddings()
        if type(head) is nn.Linear:
            hidden_BH = hidden_BH.T.contiguous().T
            space_CB = hidden_BH.new_empty(self._vocabulary if kept else BLOCK, len(hidden_BH))
            for start in range(0, self._vocabulary, BLOCK):
                rows = slice(start, start + BLOCK)
                weight_CH, first = head.weight[rows], start if kept else 0
                # This way round, with the vocabulary outside, a CPU is a third faster.
                logits_CB = multiply(weight_CH, hidden_BH, out=space_CB[first : first + len(weight_CH)])
                yield self._rule((logits_CB if head.bias is None else logits_CB.add_(head.bias[rows, None])).T)
        else:
            yield from self._rule(head(hidden_BH)).clone().split(BLOCK, 1)

    def _collect(self, ended: list[int]) -> list[tuple[int, Completion]]:
        """Take finished answers out of their slots."""
        state, slot_R = self._state, to_device(ended, self._device)
        counts = state.generated_S[slot_R].tolist()
        longest = max(counts)
        answers, logprobs = state.answer_SG[slot_R, :longest].tolist(), state.logprob_SG[slot_R, :longest].tolist()
        done = []
        for slot, count, token_ids, each in zip(ended, counts, answers, logprobs, strict=True):
            request, self._running[slot] = self._running[slot], None
            assert request is not None
            stopped = token_ids[count - 1] in self.stop_ids
            said = each[:count] if self._says_logprobs else None
            done.append((request.number, Completion(token_ids[:count], "stop" if stopped else "length", said, self.version)))
        return done

    def _close_ranks(self, queue: deque[Request]) -> None:
        """With nothing left to fill holes with, move the last answers into them, so that steps become smaller."""
        while self._running and self._running[-1] is None:
            self._running.pop()
        holes = [slot for slot, request in enumerate(self._running) if request is None]
        left = len(self._running) - len(holes)
        if queue or not holes or (self._device.type == "cuda" and self._bucket(left) == self._bucket(len(self._running))):
            return
        sources = [slot for slot in range(left, len(self._running)) if self._running[slot] is not None]
        targets = holes[: len(sources)]
        source_R, target_R = to_device(sources, self._device), to_device(targets, self._device)
        assert self._caches is not None
        self._caches.move(source_R, target_R, max(len(self._request(slot).prompt) + self._request(slot).limit for slot in sources))
        self._state.move(source_R, target_R)
        for source, target in zip(sources, targets, strict=True):
            self._running[target] = self._running[source]
            self._held[target] = self._held[source]
        self._running = self._running[:left]
        self._state.active_S[left:] = 0
        self._state.position_S[left:] = 0  # a step that includes them then reads little of them
        self._held = {slot: prompt for slot, prompt in self._held.items() if slot < left}

    # --- the model

    def _borrowed(self, run: Callable[..., Any]) -> AbstractContextManager[None]:
        """The model, with the slots of each layer handed to its attention."""
        assert self._caches is not None
        return self._with_caches(run, self._caches.layers)

    def _with_caches(self, run: Callable[..., Any], caches: Sequence[LayerCache | Probe]) -> AbstractContextManager[None]:
        def forward_of(layer: nn.Module, cache: LayerCache | Probe) -> Callable[..., Any]:
            return lambda *args, **kwargs: run(layer, *args, slot_cache=cache, slot_place=self._place, **kwargs)

        return borrowed(self.model, SLOTS, [forward_of(layer, cache) for layer, cache in zip(self._layers, caches, strict=True)])

    def _forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        decoder = self.model.get_decoder()
        out = decoder(input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False)
        hidden: Tensor = out.last_hidden_state
        return hidden

    @torch.no_grad()
    def _probe(self) -> list[Shape]:
        """What each layer keeps of a token, found by putting two through the model."""
        probes, kind = [Probe([]) for _ in self._layers], type(self.model).__name__
        index_T = torch.arange(2, device=self._device)
        self._place = Packed(torch.tensor([0, 2], dtype=torch.int32, device=self._device), 2, index_T, index_T, index_T)
        fix = "set rollout.name=hf, which works with every model"
        try:
            with self._with_caches(_run_layer, probes):
                self._forward(index_T[None], index_T[None])
        except UserError as error:
            raise UserError(f"{kind} cannot be run by the native engine: {error.what}", where="rollout.name", fix=fix) from error
        if not probes or any(len(probe.shapes) != 1 for probe in probes):
            raise UserError(f"{kind} keeps more of a text than keys and values", where="rollout.name", fix=fix)
        return [probe.shapes[0] for probe in probes]

    def _request(self, slot: int) -> Request:
        request = self._running[slot]
        assert request is not None
        return request


def load(path: str, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], options: Options) -> NativeRollout:
    """See `verl.rollout.load_rollout`."""
    return NativeRollout(load_model(path, tokenizer, options), stop_ids, options)


def share(
    model: PreTrainedModel, path: str, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], options: Options
) -> NativeRollout:
    """See `verl.rollout.share`: the trainer's weights themselves."""
    return NativeRollout(model, stop_ids, options, is_shared=True)


def _run_layer(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A decoder layer as its class wrote it, whatever stands before it in this instance."""
    return type(layer).forward(layer, *args, **kwargs)


def _rope_types(config: PretrainedConfig) -> set[str]:
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    each = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {str(one["rope_type"]) for one in each if "rope_type" in one}


def _record(function: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """What a function launches, as a CUDA graph; nothing of it runs now."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    was_on = gc.isenabled()
    gc.disable()  # what it frees, such as another graph, cannot be freed while one is recorded
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=pool)
            try:
                function()
            finally:
                graph.capture_end()
    finally:
        if was_on:
            gc.enable()
    torch.cuda.current_stream().wait_stream(stream)
    return graph
