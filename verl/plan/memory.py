"""Estimate of a training step's GPU memory by formula, without loading a model or using a GPU.

The peak is the maximum over a few points of a step. At each point, tensors are counted one by one. For a compiled layer, these are the
tensors that PyTorch's partitioner saves, which a test reads from the compiled graphs; for an uncompiled layer, those that autograd saves.

All results are bytes per GPU. Dimensions: T tokens of a micro-batch on this GPU, M trained tokens, H hidden size, F feed-forward width,
Q all query heads (heads × head size), K all key heads, V vocabulary, R sum of the ranks of a layer's adapters.
"""

from dataclasses import dataclass
from typing import Literal

from verl.engine.decisions import Checkpointing
from verl.engine.divergence import CHUNK_LOGITS as COMPARED_LOGITS
from verl.engine.hardware import GIB
from verl.engine.logprobs import CHUNK_LOGITS, CHUNK_LOGITS_HALF
from verl.engine.weights import BUCKET

FLOAT32 = 4
KINDS = ("weights", "gradients", "optimizer", "activations", "loss")
FOUR_BIT = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes per NF4 weight: code, an 8-bit scale per 64 weights, a float32 scale per 256 scales
# Estimates, not counted by tensor: the CUDA context, cuBLAS's workspace (in PyTorch's memory), NCCL's buffers, and the fraction of
# memory lost to fragmentation.
CONTEXT, WORKSPACE, NCCL, UNUSED_SHARE = 0.6 * GIB, 0.06 * GIB, 0.5 * GIB, 0.03


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder model. Weights are counted in numbers, not bytes.

    Attributes:
        intermediate: feed-forward width.
        trained: number of trained weights, including adapters.
        frozen: number of frozen weights.
        quantized: number of 4-bit weights among the frozen ones.
        root: number of weights outside the layers.
        root_trained: number of trained weights outside the layers.
        head_trained: whether the output embedding is trained.
        tied: whether input and output embedding share one weight.
        ranks: sum of the ranks of a layer's adapters.
        mlp_trained: whether any weight of the feed-forward part is trained.
        fused_mlp: whether the feed-forward part is one fused operator, which does not save the product silu(gate) × up.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    trained: int
    root: int
    root_trained: int
    tied: bool
    frozen: int = 0
    quantized: int = 0
    head_trained: bool = True
    ranks: float = 0.0
    mlp_trained: bool = True
    fused_mlp: bool = False

    @property
    def query(self) -> int:
        return self.heads * self.head_size

    @property
    def key(self) -> int:
        return self.key_heads * self.head_size

    @property
    def table(self) -> int:
        """Number of weights of one embedding."""
        return self.vocabulary * self.hidden

    @property
    def layer(self) -> float:
        """Number of weights per layer."""
        return (self.trained + self.frozen - self.root) / self.layers

    @property
    def layer_trained(self) -> float:
        return (self.trained - self.root_trained) / self.layers


@dataclass(frozen=True)
class Work:
    """Settings of a training step that determine its memory.

    Attributes:
        tokens: tokens of the largest micro-batch on one GPU, including filler.
        trained_tokens: trained tokens among them.
        micro_batches: micro-batches per GPU and step.
        param_bytes: bytes per weight that the optimizer updates.
        compute_bytes: bytes per number in the forward pass.
        state_bytes: bytes of optimizer state per weight; 8 for AdamW with float32 moments.
        checkpointing: which activations of a layer are recomputed.
        compiled: whether the layers are compiled.
        strategy: "ddp" replicates all weights on each GPU, "fsdp2" shards them. One GPU without offloading does neither.
        gpus: GPUs of the run.
        shards: GPUs that share one copy of the weights.
        resharded: whether a layer's gathered weights are freed between forward and backward pass.
        offload: whether weights, gradients and optimizer state are in host memory.
        captured: whether micro-batches are captured in CUDA graphs, which keep the gradients from step to step.
        teacher: number of weights of a teacher, which is frozen and distributed like the model; 0: none. What its layers need for a moment
            is not counted.
    """

    tokens: int
    trained_tokens: int
    micro_batches: int = 1
    param_bytes: int = FLOAT32
    compute_bytes: int = 2
    state_bytes: float = 2 * FLOAT32
    checkpointing: Checkpointing = "none"
    compiled: bool = True
    strategy: Literal["ddp", "fsdp2"] = "fsdp2"
    gpus: int = 1
    shards: int = 1
    resharded: bool = True
    offload: bool = False
    captured: bool = False
    teacher: int = 0

    @property
    def sharded(self) -> bool:
        return self.strategy == "fsdp2" and (self.gpus > 1 or self.offload)


@dataclass(frozen=True)
class MemoryUse:
    """Bytes in use at one point of a step, by KINDS.

    Attributes:
        name: the point, as in "at the end of the forward pass".
    """

    name: str
    weights: float
    gradients: float
    optimizer: float
    activations: float = 0.0
    loss: float = 0.0

    @property
    def total(self) -> float:
        total: float = sum(getattr(self, kind) for kind in KINDS)
        return total


def peak(model: Decoder, work: Work) -> MemoryUse:
    """Return the point with the most memory. It estimates `torch.cuda.max_memory_allocated`, without cuBLAS's workspace."""
    return max(candidate_peaks(model, work), key=lambda use: use.total)


def candidate_peaks(model: Decoder, work: Work) -> list[MemoryUse]:
    """Return the memory at each point that can be the peak of a run."""
    held = weights(model, work)
    unsharded = unsharded_weights(model, work)
    accumulated = accumulated_gradients(model, work)
    state = optimizer(model, work)
    saved = model.layers * work.tokens * saved_by_layer(model, work) + work.tokens * saved_outside_layers(model, work)
    return [
        MemoryUse("while the model is loaded", weights_while_loading(model, work), 0, 0),
        MemoryUse(
            "at the end of the forward pass",
            held + unsharded,
            accumulated,
            state,
            saved + work.tokens * saved_by_final_norm(model),
            loss(model, work),
        ),
        MemoryUse(
            "at the start of the backward pass",
            held + unsharded,
            accumulated + head_gradient(model, work) + layer_gradients(model, work),
            state,
            saved + work.tokens * (layer_backward(model, work) - saved_by_layer(model, work) + work.compute_bytes * model.hidden),
        ),
        MemoryUse("at the end of the backward pass", held + unsharded, gradients_after_backward(model, work), state),
        MemoryUse("in the optimizer's step", held, gradients_in_update(model, work), state),
    ]


def state_bytes(model: Decoder, work: Work) -> float:
    """Return the bytes of weights, gradients and optimizer state in the optimizer's step, which contain no estimates."""
    return candidate_peaks(model, work)[-1].total


def overhead_bytes(work: Work, peak_bytes: float) -> float:
    """Estimate the bytes that CUDA and PyTorch need in addition to the tensors."""
    return CONTEXT + WORKSPACE + (NCCL if work.gpus > 1 else 0.0) + UNUSED_SHARE * peak_bytes


# Weights, gradients and optimizer state.


def weights_while_loading(model: Decoder, work: Work) -> float:
    """Return the bytes of weights while the model is loaded.

    Full fine-tuning loads float32 weights, because the model is checked in float32; sharded weights are loaded as shards. With adapters,
    frozen weights are loaded in the compute dtype, and a float32 model with two of their layers is checked instead. (DoRA loads them in
    float32; the formula ignores this.) 4-bit weights are loaded in 4 bits, and then the others in float32.
    """
    adapters = model.frozen > 0
    if work.offload:
        return 0.0
    if work.sharded and not adapters:
        return work.param_bytes * model.trained / work.shards
    if adapters and not model.quantized:
        return work.compute_bytes * model.frozen + FLOAT32 * (model.trained + 2 * model.layer)
    return FOUR_BIT * model.quantized + FLOAT32 * (model.trained + model.frozen - model.quantized)


def weights(model: Decoder, work: Work) -> float:
    """Return the bytes of trained weights with their working copies, and of frozen weights, which exist once, in the compute dtype."""
    if work.offload:
        return 0.0
    frozen = work.compute_bytes * (model.frozen - model.quantized + work.teacher) + FOUR_BIT * model.quantized
    if work.sharded:
        return (work.param_bytes * model.trained + frozen) / work.shards
    copies = work.compute_bytes if work.compute_bytes != work.param_bytes else 0
    return (work.param_bytes + copies) * model.trained + frozen


def unsharded_weights(model: Decoder, work: Work) -> float:
    """Return the bytes of gathered weights, if they are sharded.

    These are the weights outside the layers, and three layers: the current one, the next one and the all-gather's buffer. Without
    resharding, these are all layers and the buffer. Offloaded weights are copied from the host one by one; the largest is one of the
    feed-forward part.
    """
    if not work.sharded:
        return 0.0
    layers = 3 if work.resharded else model.layers + 1
    from_host = work.param_bytes * model.hidden * model.intermediate / work.shards if work.offload else 0.0
    return work.compute_bytes * (model.root + layers * model.layer) + from_host


def optimizer(model: Decoder, work: Work) -> float:
    """Return the bytes of the optimizer's state, such as AdamW's two moments."""
    return 0.0 if work.offload else work.state_bytes * model.trained / (work.shards if work.sharded else 1)


def accumulated_gradients(model: Decoder, work: Work) -> float:
    """Return the bytes of the gradients from earlier micro-batches of the step, during the forward pass of the last one.

    Gradients of the first micro-batch keep the compute dtype; accumulated ones have the dtype of the weights, or float32 in FSDP2, which
    reduces them after the last micro-batch. CUDA graphs keep their gradient tensors from step to step.
    """
    if work.captured:
        return gradients_of_one_pass(model, work)
    if work.micro_batches == 1:
        return 0.0
    if work.sharded:
        return FLOAT32 * model.trained
    return (work.compute_bytes if work.micro_batches == 2 else work.param_bytes) * model.trained


def head_gradient(model: Decoder, work: Work) -> float:
    """Return the bytes of the output embedding's gradient [V, H], which is computed together with the loss."""
    return work.compute_bytes * model.table if model.head_trained else 0.0


def layer_gradients(model: Decoder, work: Work) -> float:
    """Return the bytes of gradients that FSDP2 is reducing: one layer's in both dtypes, and the float32 buffer of the previous layer.

    With offloading, the backward pass waits until the host has the gradients, and only the float32 buffer remains.
    """
    if not work.sharded:
        return 0.0
    return (FLOAT32 if work.offload else work.compute_bytes + 2 * FLOAT32) * model.layer_trained


def gradients_after_backward(model: Decoder, work: Work) -> float:
    """Return the bytes of all gradients. A tied embedding has a second gradient until both are added: one as input, one as output."""
    twice = work.compute_bytes * model.table if model.tied and model.head_trained else 0.0
    if work.captured:
        return gradients_of_one_pass(model, work) + head_gradient(model, work) + twice
    if not work.sharded:
        earlier = accumulated_gradients(model, work) * (work.strategy != "ddp" or work.gpus == 1)
        return earlier + gradients_of_one_pass(model, work) + twice
    shards = 0.0 if work.offload else FLOAT32 * model.trained / work.shards
    return shards + (work.compute_bytes + FLOAT32) * model.root_trained + twice


def gradients_of_one_pass(model: Decoder, work: Work) -> float:
    """Return the bytes of one backward pass's gradients. ddp averages them in float32, and has a bucket of them in both dtypes."""
    if work.strategy == "ddp" and work.gpus > 1:
        return FLOAT32 * model.trained + work.compute_bytes * min(BUCKET + model.table, model.trained)
    return work.compute_bytes * model.trained


def gradients_in_update(model: Decoder, work: Work) -> float:
    """Return the bytes of the gradients that the optimizer reads."""
    if work.offload:
        return 0.0
    if work.sharded:
        return FLOAT32 * model.trained / work.shards
    if work.strategy == "ddp" and work.gpus > 1:
        return FLOAT32 * model.trained
    return (work.compute_bytes if work.micro_batches == 1 else work.param_bytes) * model.trained


# Activations, in bytes per token.


def saved_by_layer(model: Decoder, work: Work) -> float:
    """Return the bytes per token that a layer saves for its backward pass. Its output is not included: the next layer saves it as input."""
    c, h, q, k, f = work.compute_bytes, model.hidden, model.query, model.key, model.intermediate
    logsumexp = FLOAT32 * model.heads
    if work.checkpointing == "full":
        return c * h
    if work.checkpointing == "selective":
        if model.ranks and model.fused_mlp:  # the input, q, k, v and the outputs of their LoRA A matrices, attention, the output projection
            return c * (2 * h + 2 * q + 2 * k + model.ranks * 4 / 7) + logsumexp
        down = 0 if work.compiled else h  # the compiler sees that the backward pass does not need it
        return c * (h + 2 * q + k + f + down) + logsumexp  # the input, q, v, attention, gate
    return layer_backward(model, work) - c * f * temporary_mlp_tensors(model, work)


def layer_backward(model: Decoder, work: Work) -> float:
    """Return the bytes per token in use in a layer's backward pass, when the gradients of gate and up are computed."""
    c, h, q, k = work.compute_bytes, model.hidden, model.query, model.key
    scalars = 2 * FLOAT32 + FLOAT32 * model.heads  # 1 / root mean square of two norms, logsumexp of the attention
    attention = c * (2 * q + 2 * k)  # q, k, v and the output
    # A compiled layer saves its input, the output of attention's output projection, and the outputs of the norms. An uncompiled layer
    # saves the inputs of both norms in float32, their outputs, and, unless the norms' weights are frozen, their normalized inputs.
    outputs = c * h * (2 if model.mlp_trained else 1)
    streams = outputs + (2 * c * h if work.compiled else 2 * h * (FLOAT32 + (0 if model.frozen else c)))
    widths = saved_mlp_tensors(model, work) + temporary_mlp_tensors(model, work)
    return streams + attention + scalars + c * model.ranks + c * model.intermediate * widths


def saved_mlp_tensors(model: Decoder, work: Work) -> int:
    """Return the number of tensors [T, F] that the feed-forward part saves.

    They are gate and up; silu(gate) in an uncompiled layer; and silu(gate) × up if the backward pass needs it.
    """
    product = model.mlp_trained and not model.fused_mlp
    return 2 + product + (not work.compiled and not model.fused_mlp)


def temporary_mlp_tensors(model: Decoder, work: Work) -> int:
    """Return the number of further tensors [T, F] in the feed-forward part's backward pass.

    They are the gradients of silu(gate) × up, of gate and of up. A saved product is freed before two of them are allocated.
    """
    return (5 if work.compiled else 6) - saved_mlp_tensors(model, work)


def saved_outside_layers(model: Decoder, work: Work) -> float:
    """Return the bytes per token of ids, positions, targets, and cosine and sine of the rotary angles. Both passes need them."""
    return 3 * 8 + 1 + 2 * work.compute_bytes * model.head_size


def saved_by_final_norm(model: Decoder) -> float:
    """Return the bytes per token that the final norm saves: its input in float32, and its normalized input. It is not compiled."""
    return (FLOAT32 + 2) * model.hidden + FLOAT32


def loss(model: Decoder, work: Work) -> float:
    """Return the bytes of the loss.

    They are the final hidden states [T, H], those of trained tokens and their gradient [M, H], a chunk of logits, and the output
    embedding's gradient [V, H]. With a teacher, some eight tensors of the size of a chunk are in memory, in float32.
    """
    limit = CHUNK_LOGITS if work.compute_bytes == FLOAT32 else CHUNK_LOGITS_HALF
    logits = work.compute_bytes * model.vocabulary * min(work.trained_tokens, limit // model.vocabulary)
    if work.teacher:
        logits = 8 * FLOAT32 * model.vocabulary * min(work.trained_tokens, COMPARED_LOGITS // model.vocabulary)
    hidden = work.compute_bytes * model.hidden * (work.tokens + 2 * work.trained_tokens)
    return hidden + logits + head_gradient(model, work)
