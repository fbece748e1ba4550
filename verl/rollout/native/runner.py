"""The model of the native engine: prefill, and decode steps as CUDA graphs.

The model is not copied. During a forward pass, its decoder layers use the caches of the slots, by `attention.py` and `recurrent.py`.
Afterwards, the model is restored for its trainer.

Dimensions: S slots, B rows of a decode step (the first B slots), T packed tokens, R stored tokens, H hidden size, V vocabulary, C tokens of
a vocabulary block.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from verl.engine.layers import decoder_layers
from verl.engine.logprobs import LogitRule
from verl.errors import UserError
from verl.models.attention.delta_rule import keep_documents_apart
from verl.models.linear import multiply, use_whole_cpu
from verl.rollout import Sampling
from verl.rollout._model import generation_mode
from verl.rollout._sampler import BLOCK, lowest_kept_token, sample
from verl.rollout.native.attention import (
    SLOTS,
    DecodeBatch,
    KVShape,
    LayerCache,
    PrefillBatch,
    RecurrentShape,
    ShapeProbe,
    StateCache,
    has_kernel,
)
from verl.rollout.native.joined import join_linears
from verl.rollout.native.recurrent import SlotState
from verl.rollout.native.scheduler import Prefill
from verl.rollout.native.slots import Slots, State, to_device

RESIZED_ROPE = {"dynamic", "longrope"}  # these compute on the host from the largest position: a recorded step would keep the first result
OTHER_STATE = (
    "it has other decode state than, in each layer, keys and values of one attention or the state of one delta rule or convolution"
)
COMPILED_PROMPTS = 16_384  # prompt tokens of a forward pass for which compiled layers repay their compilation
USE_HF = "set rollout.name=auto or hf: transformers' own code generates, slower and exact"


class Runner:
    """Prefill and decoding of a model.

    Args:
        model: model on its device.
        compiles: whether to compile the decoder layers for decoding, and for long prefills.
    Attributes:
        device: device of the model.
        shapes: for each layer, shapes of the keys and values of one token, or of its recurrent state.
        why_eager: why decode steps are not recorded as CUDA graphs, which makes them slower; None: they are, or there is no GPU.
    Raises:
        UserError: the architecture has other decode state than these, or its attention is not supported.
    """

    def __init__(self, model: PreTrainedModel, *, compiles: bool):
        self.model, self.device, self._rule = model, model.device, LogitRule.of(model.config.get_text_config())
        self._fast_layer = torch.compile(_run_layer, fullgraph=True, dynamic=True) if compiles else _run_layer
        self._layers = decoder_layers(model.get_decoder())  # a model that sees has others too, which text does not pass through
        self._joined = join_linears(self._layers) if has_kernel(self.device) else []
        self.refresh()
        use_whole_cpu(model)
        self._can_record = not RESIZED_ROPE & _rope_types(model.config)
        self.why_eager = None if self._can_record else "its rotary embeddings are computed on the host"
        self._graphs: dict[tuple[Any, ...], torch.cuda.CUDAGraph] = {}
        self._pool = _graph_pool(self.device)
        self.shapes = self._probe()
        self._temperature = torch.zeros(1, device=self.device)

    @torch.no_grad()
    def _probe(self) -> list[KVShape | RecurrentShape]:
        """Return the shapes of what each layer keeps, from a forward pass of two tokens."""
        probes, kind = [ShapeProbe() for _ in self._layers], type(self.model).__name__
        keep_documents_apart(self.model)
        index_T, first_P = torch.arange(2, device=self.device), torch.zeros(1, dtype=torch.int64, device=self.device)
        bounds = torch.tensor([0, 2], dtype=torch.int32, device=self.device)
        batch = PrefillBatch(bounds, 2, index_T, index_T, index_T, first_P, first_P)
        try:
            if getattr(self.model.get_output_embeddings(), "weight", None) is None:
                raise UserError("it has no output layer with weights")
            if self.model.get_decoder() is self.model:
                raise UserError("it has no decoder apart from its output layer")
            if not self.model._can_set_attn_implementation():
                raise UserError("its attention is its own code, without transformers' attention interface")
            with self._attending(_run_layer, probes, batch):
                self._forward(index_T[None], index_T[None])
            shapes = [shape for probe in probes if (shape := probe.found()) is not None]
            if not probes or len(shapes) < len(probes):
                raise UserError(OTHER_STATE)
            return shapes
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model's code may raise anything where it is run in a way that it does not expect
            raised = f"its code does not take packed texts ({type(error).__name__}: {error})".replace("\n", " ")
            what = error.what if isinstance(error, UserError) else raised
            raise UserError(f"{kind} cannot be run by the native engine: {what}", where="rollout.name=native", fix=USE_HF) from error

    @torch.no_grad()
    def try_recording(self, slots: Slots) -> None:
        """Record a decode step of one row and drop it, to find out whether the model's code can be a CUDA graph. The row is overwritten.

        Code that waits for the GPU or copies from the host cannot, such as a loop over experts, or their grouped product in float32.
        """
        if not (has_kernel(self.device) and self._can_record):
            return
        try:
            with self._attending(_run_layer, slots.layers, DecodeBatch(slots.state.position_S[:1], None)):
                _record(partial(self._launch, slots.state, 1, Sampling(1)), self._pool)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # PyTorch has no type for it, and a model's code may raise anything
            self._can_record, self.why_eager = False, str(error).partition("\n")[0]
        self.drop_graphs()

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Neither compile layers nor record CUDA graphs in this context."""
        before = self._fast_layer, self._can_record
        self._fast_layer, self._can_record = _run_layer, False
        try:
            yield
        finally:
            self._fast_layer, self._can_record = before

    def refresh(self) -> None:
        """Copy weights that are kept twice, which may have changed."""
        for joined in self._joined:
            joined.refresh()

    def set_temperature(self, temperature: float) -> None:
        """Set the temperature of the next steps. It is a tensor on the device, so that CUDA graphs work for every temperature."""
        self._temperature.fill_(temperature)

    def drop_graphs(self) -> None:
        """Drop the CUDA graphs. Call this before the slots are freed, because graphs use their addresses."""
        self._graphs.clear()
        self._pool = _graph_pool(self.device)  # the old pool is freed with its graphs

    # --- prefill

    @torch.no_grad()
    def prefill(self, prefills: Sequence[Prefill], slots: Slots) -> None:
        """Run packed prompts, without their last tokens, through the model, and store what its layers keep in the slots."""
        ids = [np.array(prefill.prompt[:-1], dtype=np.int64) for prefill in prefills]
        position_T = np.concatenate([np.arange(len(x)) for x in ids])
        batch = _prefill_batch(list(map(len, ids)), position_T, [prefill.slots for prefill in prefills], self.device)
        run_layer = self._fast_layer if len(position_T) >= COMPILED_PROMPTS else _run_layer
        with self._attending(run_layer, slots.layers, batch):
            self._forward(to_device(np.concatenate(ids)[None], self.device), to_device(position_T[None], self.device))

    # --- decode

    @torch.no_grad()
    def decode(self, slots: Slots, rows: int, steps: int, sampling: Sampling) -> None:
        """Take `steps` decode steps. Each adds a token to those of the first `rows` slots whose responses have not ended."""
        step = self._step_on_gpu if has_kernel(self.device) else self._step
        for _ in range(steps):
            step(slots, rows, sampling)

    def _step_on_gpu(self, slots: Slots, rows: int, sampling: Sampling) -> None:
        """Take a step without waiting for the device. From the second step of a kind on, it is a CUDA graph."""
        key = (rows, sampling.is_filtered and (sampling.top_k, sampling.top_p))
        if key in self._graphs:
            self._graphs[key].replay()
            return
        with self._attending(self._fast_layer, slots.layers, DecodeBatch(slots.state.position_S[:rows], None)):
            self._launch(slots.state, rows, sampling)  # run it once before recording, to compile and load the kernels
            if self._can_record:
                self._graphs[key] = _record(partial(self._launch, slots.state, rows, sampling), self._pool)

    def _launch(self, state: State, rows: int, sampling: Sampling) -> None:
        from verl.rollout.native import sampler_triton

        logits_BV = self.model.get_output_embeddings()(self._hidden(state, rows))
        least_B = None
        if sampling.is_filtered:
            token_B = lowest_kept_token(self._rule(logits_BV) / self._temperature, sampling)
            least_B = logits_BV.gather(1, token_B[:, None]).squeeze(1)  # unscaled, because the kernel may round the division differently
        sampler_triton.sample(logits_BV, state, self._temperature, least_B, self._rule.factor, self._rule.soft_cap)

    def _step(self, slots: Slots, rows: int, sampling: Sampling) -> None:
        """Take a step in plain PyTorch."""
        state = slots.state
        position_B = state.position_S[:rows]
        with self._attending(self._fast_layer, slots.layers, DecodeBatch(position_B, int(position_B.max()) + 1)):
            hidden_BH = self._hidden(state, rows)
            uniform_B = state.uniform_SG[:rows].gather(1, state.generated_S[:rows, None].long().clamp(max=state.uniform_SG.shape[1] - 1))
            state.advance(*sample(self._logit_blocks(hidden_BH, keep=sampling.temperature > 0), sampling, uniform_B.squeeze(1)))

    def _hidden(self, state: State, rows: int) -> Tensor:
        """Return hidden_BH, the last hidden states of the newest token of each row."""
        return self._forward(state.token_S[:rows, None], state.position_S[:rows, None])[:, 0]

    def _logit_blocks(self, hidden_BH: Tensor, *, keep: bool) -> Iterator[Tensor]:
        """Yield logits_BC for each block of the vocabulary. If not `keep`, a block may overwrite the previous one."""
        head = self.model.get_output_embeddings()
        if type(head) is nn.Linear:
            vocabulary = len(head.weight)
            hidden_BH = hidden_BH.T.contiguous().T
            space_CB = hidden_BH.new_empty(vocabulary if keep else BLOCK, len(hidden_BH))
            for start in range(0, vocabulary, BLOCK):
                tokens = slice(start, start + BLOCK)
                weight_CH, first = head.weight[tokens], start if keep else 0
                # With the vocabulary as the outer dimension, the matmul is a third faster on a CPU.
                logits_CB = multiply(weight_CH, hidden_BH, out=space_CB[first : first + len(weight_CH)])
                yield self._rule((logits_CB if head.bias is None else logits_CB.add_(head.bias[tokens, None])).T)
        else:
            yield from self._rule(head(hidden_BH)).clone().split(BLOCK, 1)

    # --- the model

    @contextmanager
    def _attending(
        self, run_layer: Callable[..., Any], caches: Sequence[LayerCache | StateCache | ShapeProbe], batch: PrefillBatch | DecodeBatch
    ) -> Iterator[None]:
        """Put the model into generation mode in this context; `run_layer` runs its layers, which use these caches."""

        def forward_of(layer: nn.Module, cache: LayerCache | StateCache | ShapeProbe) -> Callable[..., Any]:
            if isinstance(cache, LayerCache):
                return lambda *args, **kwargs: run_layer(layer, *args, slot_cache=cache, slot_batch=batch, **kwargs)
            carried = SlotState(cache, batch)
            if isinstance(cache, StateCache):  # not compiled, because the rules of transformers are not
                return lambda *args, **kwargs: _run_layer(layer, *args, carried=carried, **kwargs)
            return lambda *args, **kwargs: run_layer(layer, *args, slot_cache=cache, slot_batch=batch, carried=carried, **kwargs)

        forwards = {layer: forward_of(layer, cache) for layer, cache in zip(self._layers, caches, strict=True)}
        with generation_mode(self.model, SLOTS, forwards), ExitStack() as stack:
            for joined in self._joined:
                stack.enter_context(joined.in_model())
            yield

    def _forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Return the last hidden states."""
        decoder = self.model.get_decoder()
        out = decoder(input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False)
        hidden: Tensor = out.last_hidden_state
        return hidden


def _prefill_batch(lengths: list[int], position_T: np.ndarray, slots: list[list[int]], device: torch.device) -> PrefillBatch:
    """Return the positions of packed prompts in the slots.

    Args:
        lengths: lengths of the prompts without their last tokens.
        position_T: position of each packed token in its prompt.
        slots: slots of each prompt.
    """
    starts = np.cumsum([0, *lengths])
    source_R = np.concatenate(
        [np.tile(start + np.arange(length), len(own)) for start, length, own in zip(starts[:-1], lengths, slots, strict=True)]
    )
    slot_R = np.concatenate([np.repeat(own, length) for length, own in zip(lengths, slots, strict=True)])
    prompt_P = np.repeat(np.arange(len(slots)), list(map(len, slots)))
    return PrefillBatch(
        to_device(starts.astype(np.int32), device),
        max(lengths),
        to_device(source_R, device),
        to_device(slot_R, device),
        to_device(position_T[source_R], device),
        to_device(prompt_P, device),
        to_device(np.concatenate(slots), device),
    )


def _run_layer(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run the forward function of a decoder layer's class, even if the trainer has replaced the layer's `forward`."""
    return type(layer).forward(layer, *args, **kwargs)


def _rope_types(config: PretrainedConfig) -> set[str]:
    """Return the types of a model's rotary embeddings."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    each = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {str(one["rope_type"]) for one in each if "rope_type" in one}


def _graph_pool(device: torch.device) -> Any:
    """Return the handle of a memory pool that all graphs share."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def _record(launch: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """Record the kernels that a function launches as a CUDA graph, without running them."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    was_on = gc.isenabled()
    gc.disable()  # the garbage collector might free another graph, which is not allowed during recording
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=pool)
            try:
                launch()
            finally:
                graph.capture_end()
    finally:
        if was_on:
            gc.enable()
    torch.cuda.current_stream().wait_stream(stream)
    return graph
