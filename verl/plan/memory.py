"""What a training step takes of a GPU's memory, by formula: no model is loaded and no GPU is asked.

The peak of a step is at one of a few points. What is in memory at each is counted tensor by tensor: a compiled layer keeps what
PyTorch's partitioner chooses, which a test reads from its graphs, and a layer as written keeps what autograd saves.

All results are bytes of one GPU. Dimensions in comments: T tokens of a micro-batch on this GPU, M trained ones among them, H hidden
size, F width of the feed-forward part, Q and K all query heads and all key heads side by side, V vocabulary, R ranks of a layer's
adapters, all together.
"""

from dataclasses import dataclass
from typing import Literal

from verl.engine.decisions import Checkpointing
from verl.engine.hardware import GIB
from verl.engine.logprobs import CHUNK_LOGITS, CHUNK_LOGITS_HALF
from verl.engine.weights import BUCKET

FLOAT32 = 4
KINDS = ("weights", "gradients", "optimizer", "activations", "loss")
FOUR_BIT = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes of a weight in NF4: its code, a scale of 8 bits for 64, one of 32 bits for 256 scales
# Not counted tensor by tensor: what CUDA keeps for itself, cuBLAS's workspace in PyTorch's memory, and what lies unused between tensors.
CONTEXT, WORKSPACE, NCCL, UNUSED_SHARE = 0.6 * GIB, 0.06 * GIB, 0.5 * GIB, 0.03


@dataclass(frozen=True)
class Decoder:
    """A model's sizes.

    Attributes:
        intermediate: width of the feed-forward part.
        frozen: weights that are not trained, `trained` those that are, adapters among them; `quantized` of the frozen are in 4 bits.
        root, root_trained: weights outside of the layers, and how many of them are trained.
        head_trained: whether the output embedding is.
        tied: whether the input embedding is the output embedding.
        ranks: of a layer's adapters, all together.
        mlp_trained: something in the feed-forward part is trained.
        mlp_is_one: it is one operator, which keeps no product of gate and up.
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
    mlp_is_one: bool = False

    @property
    def query(self) -> int:
        return self.heads * self.head_size

    @property
    def key(self) -> int:
        return self.key_heads * self.head_size

    @property
    def table(self) -> int:
        """Weights of one embedding."""
        return self.vocabulary * self.hidden

    @property
    def layer(self) -> float:
        """Weights of a layer."""
        return (self.trained + self.frozen - self.root) / self.layers

    @property
    def layer_trained(self) -> float:
        return (self.trained - self.root_trained) / self.layers


@dataclass(frozen=True)
class Work:
    """How a step is done.

    Attributes:
        tokens, trained_tokens: on one GPU, of the largest micro-batch, filler included in the first.
        micro_batches: of one GPU in a step.
        param_bytes: of a weight that the optimizer updates.
        compute_bytes: of a number of the forward pass.
        state_bytes: of the optimizer, for a weight; float32 moments of AdamW are 8.
        checkpointing: what of a layer is computed again.
        compiled: the layers.
        strategy: "ddp": all weights on each GPU; "fsdp2": sharded. One GPU without offloading does neither.
        gpus: of the run.
        shards: GPUs that share one copy of the weights.
        resharded: a layer's whole weights are given away between the passes.
        offload: weights, gradients and optimizer state are in host memory.
        captured: small micro-batches are CUDA graphs, which keep the gradients from step to step.
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

    @property
    def sharded(self) -> bool:
        return self.strategy == "fsdp2" and (self.gpus > 1 or self.offload)


@dataclass(frozen=True)
class MemoryUse:
    """What is in memory at a point of a step, by KINDS."""

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
    """The point of the most memory, as `torch.cuda.max_memory_allocated` reads it but for the workspace of cuBLAS."""
    return max(uses(model, work), key=lambda use: use.total)


def uses(model: Decoder, work: Work) -> list[MemoryUse]:
    """The points that can be the peak of a run."""
    held = weights(model, work)
    whole = gathered(model, work)
    before = gradients_before(model, work)
    state = optimizer(model, work)
    kept = model.layers * work.tokens * kept_of_layer(model, work) + work.tokens * kept_once(model, work)
    return [
        MemoryUse("while the model is loaded", loading(model, work), 0, 0),
        MemoryUse(
            "at the end of the forward pass", held + whole, before, state, kept + work.tokens * kept_by_norm(model), loss(model, work)
        ),
        MemoryUse(
            "at the start of the backward pass",
            held + whole,
            before + head_gradient(model, work) + gradient_of_layer(model, work),
            state,
            kept + work.tokens * (inside_layer(model, work) - kept_of_layer(model, work) + work.compute_bytes * model.hidden),
        ),
        MemoryUse("at the end of the backward pass", held + whole, gradients_after(model, work), state),
        MemoryUse("in the optimizer's step", held, gradients_in_update(model, work), state),
    ]


def state_bytes(model: Decoder, work: Work) -> float:
    """What no estimate can be wrong about: weights, gradients and optimizer state in the optimizer's step."""
    return uses(model, work)[-1].total


def overhead_bytes(work: Work, peak_bytes: float) -> float:
    """An estimate of what CUDA and PyTorch take besides."""
    return CONTEXT + WORKSPACE + (NCCL if work.gpus > 1 else 0.0) + UNUSED_SHARE * peak_bytes


# Weights and what belongs to them.


def loading(model: Decoder, work: Work) -> float:
    """Weights arrive in float32, in which the model is checked, those in 4 bits as such; what is sharded arrives as shards.

    What stays frozen arrives in the compute dtype (with DoRA in float32 after all), and two layers like its own are checked.
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
    """What the optimizer updates, its working copies, and what is frozen, which exists once in the compute dtype."""
    if work.offload:
        return 0.0
    frozen = work.compute_bytes * (model.frozen - model.quantized) + FOUR_BIT * model.quantized
    if work.sharded:
        return (work.param_bytes * model.trained + frozen) / work.shards
    copies = work.compute_bytes if work.compute_bytes != work.param_bytes else 0
    return (work.param_bytes + copies) * model.trained + frozen


def gathered(model: Decoder, work: Work) -> float:
    """Whole for a while where weights are sharded: the root, and the layer at work, the next one and its message, or all layers.

    From the host they come one after the other, the widest being the feed-forward part's.
    """
    if not work.sharded:
        return 0.0
    layers = 3 if work.resharded else model.layers + 1
    from_host = work.param_bytes * model.hidden * model.intermediate / work.shards if work.offload else 0.0
    return work.compute_bytes * (model.root + layers * model.layer) + from_host


def optimizer(model: Decoder, work: Work) -> float:
    """Its state, such as AdamW's two moments."""
    return 0.0 if work.offload else work.state_bytes * model.trained / (work.shards if work.sharded else 1)


def gradients_before(model: Decoder, work: Work) -> float:
    """Of the step's earlier micro-batches, while the last one's forward pass runs.

    Those of the first are left as they are; added up, they have the dtype of the weights, and float32 before FSDP2 reduces them.
    CUDA graphs add to the same tensors in every step.
    """
    if work.captured:
        return one_pass(model, work)
    if work.micro_batches == 1:
        return 0.0
    if work.sharded:
        return FLOAT32 * model.trained
    return (work.compute_bytes if work.micro_batches == 2 else work.param_bytes) * model.trained


def head_gradient(model: Decoder, work: Work) -> float:
    """[V, H], known with the loss."""
    return work.compute_bytes * model.table if model.head_trained else 0.0


def gradient_of_layer(model: Decoder, work: Work) -> float:
    """Where weights are sharded: of one layer as it comes, in float32 to be reduced, and of the layer before on its way.

    The backward pass waits until the host has them, and only the message to be reduced is left.
    """
    if not work.sharded:
        return 0.0
    return (FLOAT32 if work.offload else work.compute_bytes + 2 * FLOAT32) * model.layer_trained


def gradients_after(model: Decoder, work: Work) -> float:
    """Of everything, and of the embedding once more, where input and output each have one for the same weights."""
    twice = work.compute_bytes * model.table if model.tied and model.head_trained else 0.0
    if work.captured:
        return one_pass(model, work) + head_gradient(model, work) + twice
    if not work.sharded:
        return gradients_before(model, work) * (work.strategy != "ddp" or work.gpus == 1) + one_pass(model, work) + twice
    shards = 0.0 if work.offload else FLOAT32 * model.trained / work.shards
    return shards + (work.compute_bytes + FLOAT32) * model.root_trained + twice


def one_pass(model: Decoder, work: Work) -> float:
    """Gradients of one backward pass; ddp averages them in float32, and has a bucket of them in both dtypes."""
    if work.strategy == "ddp" and work.gpus > 1:
        return FLOAT32 * model.trained + work.compute_bytes * min(BUCKET + model.table, model.trained)
    return work.compute_bytes * model.trained


def gradients_in_update(model: Decoder, work: Work) -> float:
    if work.offload:
        return 0.0
    if work.sharded:
        return FLOAT32 * model.trained / work.shards
    if work.strategy == "ddp" and work.gpus > 1:
        return FLOAT32 * model.trained
    return (work.compute_bytes if work.micro_batches == 1 else work.param_bytes) * model.trained


# Activations, by token.


def kept_of_layer(model: Decoder, work: Work) -> float:
    """Bytes a token that a layer keeps for its backward pass; its output is the next one's input, and counted there."""
    c, h, q, k, f = work.compute_bytes, model.hidden, model.query, model.key, model.intermediate
    logsumexp = FLOAT32 * model.heads
    if work.checkpointing == "full":
        return c * h
    if work.checkpointing == "selective":
        if model.ranks and model.mlp_is_one:  # adapters: the input, q, k, v and what their adapters make, attention, the output layer
            return c * (2 * h + 2 * q + 2 * k + model.ranks * 4 / 7) + logsumexp
        down = 0 if work.compiled else h  # compiled, it is known that nothing needs it
        return c * (h + 2 * q + k + f + down) + logsumexp  # the input, q, v, attention, gate
    return inside_layer(model, work) - c * f * passing_widths(model, work)


def inside_layer(model: Decoder, work: Work) -> float:
    """Bytes a token of all that a layer's backward pass works with, when the gradients of gate and up are made."""
    c, h, q, k = work.compute_bytes, model.hidden, model.query, model.key
    numbers = 2 * FLOAT32 + FLOAT32 * model.heads  # 1 / root mean square of two norms, logsumexp of the attention
    attention = c * (2 * q + 2 * k)  # q, k, v and the output
    # Compiled: the layer's input, what attention's last product adds to it, and the output of the norms. As written: the input of both
    # norms in float32, their output, and before it what their weights were multiplied with, which nobody needs where those are frozen.
    outputs = c * h * (2 if model.mlp_trained else 1)
    streams = outputs + (2 * c * h if work.compiled else 2 * h * (FLOAT32 + (0 if model.frozen else c)))
    widths = kept_widths(model, work) + passing_widths(model, work)
    return streams + attention + numbers + c * model.ranks + c * model.intermediate * widths


def kept_widths(model: Decoder, work: Work) -> int:
    """[T, F] that the feed-forward part keeps: gate, up, as written silu(gate), and their product where what follows needs it."""
    product = model.mlp_trained and not model.mlp_is_one
    return 2 + product + (not work.compiled and not model.mlp_is_one)


def passing_widths(model: Decoder, work: Work) -> int:
    """[T, F] more in its backward pass: gradients of the product, of gate and of up; a kept product is given away before two of them."""
    return (5 if work.compiled else 6) - kept_widths(model, work)


def kept_once(model: Decoder, work: Work) -> float:
    """Bytes a token outside of the layers in both passes: ids, positions, targets, and the rotary angles' cosine and sine."""
    return 3 * 8 + 1 + 2 * work.compute_bytes * model.head_size


def kept_by_norm(model: Decoder) -> float:
    """Bytes a token of the last norm, which is not compiled: its input in float32, and what it makes before its weights."""
    return (FLOAT32 + 2) * model.hidden + FLOAT32


def loss(model: Decoder, work: Work) -> float:
    """Last hidden states, those of trained tokens and their gradient, a chunk of logits, and the output embedding's gradient."""
    limit = CHUNK_LOGITS if work.compute_bytes == FLOAT32 else CHUNK_LOGITS_HALF
    logits = work.compute_bytes * model.vocabulary * min(work.trained_tokens, limit // model.vocabulary)
    hidden = work.compute_bytes * model.hidden * (work.tokens + 2 * work.trained_tokens)
    return hidden + logits + head_gradient(model, work)
