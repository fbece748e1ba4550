"""Writes the tables of docs/scaling.md from formulas and the measured rates: python docs/scaling.py

Bytes are those that one GPU receives in an optimizer step; it sends as many. GB is 10^9 bytes, Ki 1,024.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).with_name("scaling.md")
LOGS = PAGE.parents[1] / "benchmarks" / "logs"
GPUS = (1, 8, 64, 256, 1024)
GPUS_A_NODE = 8
NVLINK, INFINIBAND = 450e9, 50e9  # bytes/s and direction: of a GPU to those of its node, and of its own adapter (400 Gb/s)
# Seconds before a collective moves anything, and of one hop of its ring or tree, as NCCL itself reckons (src/graph/tuning.cc, "Simple").
START, HOP_NVLINK, HOP_NETWORK = 8.4e-6, 3.4e-6, 14e-6
GRADIENT_CHUNK_ROWS = 4096  # rows of logits that are held at a time
BUDGET = 16 * 1024  # tokens of a GPU and step, where a table needs one
ROOM = 75e9  # bytes of a GPU of 80 GB that a step may take
GSM8K_ROWS, GSM8K_TOKENS_A_ROW = 7473, 212.8


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    tied: bool

    @property
    def layer(self) -> int:
        """Parameters of a layer: attention with biases on query, key and value, SwiGLU, two norms."""
        wide, narrow = self.heads * self.head_size, self.key_heads * self.head_size
        return self.hidden * (2 * wide + 2 * narrow + 3 * self.intermediate + 2) + wide + 2 * narrow

    @property
    def table(self) -> int:
        """Parameters of one table of the vocabulary."""
        return self.vocabulary * self.hidden

    @property
    def root(self) -> int:
        """Parameters outside of the layers, which FSDP2 gathers together: one table or two, and the last norm."""
        return self.table * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.root


SHAPES = (
    Shape("0.5B", 24, 896, 4864, 14, 2, 64, 151936, tied=True),
    Shape("1.5B", 28, 1536, 8960, 12, 2, 128, 151936, tied=True),
    Shape("7B", 28, 3584, 18944, 28, 4, 128, 152064, tied=False),
    Shape("32B", 64, 5120, 27648, 40, 8, 128, 152064, tied=False),
    Shape("72B", 80, 8192, 29568, 64, 8, 128, 152064, tied=False),
)


def measured(name: str) -> tuple[float, float]:
    """Tokens/s of verl on one H200 in a log of benchmarks/, and the share of them that was trained."""
    verl = json.loads((LOGS / name).read_text(encoding="utf-8"))["results"][0]
    assert verl["name"] == "verl"
    return verl["tokens_per_second"], verl["supervised_tokens_per_second"] / verl["tokens_per_second"]


RATES = {"0.5B": measured("2026-11-23-h200-0.5b-64ki.json"), "1.5B": measured("2026-11-23-h200-1.5b-32ki.json")}


def flops(shape: Shape) -> float:
    """FLOP of a token, forward and backward, as in verl/engine/flops.py: matrices alone; the output layer meets trained tokens only."""
    norms, biases = 2 * shape.hidden, (shape.heads + 2 * shape.key_heads) * shape.head_size
    return 6.0 * (shape.parameters - shape.root - shape.layers * (norms + biases) + shape.table * RATES["1.5B"][1])


def tokens_per_second(shape: Shape) -> float:
    """Of one GPU alone: measured, or the arithmetic rate of the largest measured model."""
    if shape.name in RATES:
        return RATES[shape.name][0]
    (largest,) = (other for other in SHAPES if other.name == "1.5B")
    return RATES["1.5B"][0] * flops(largest) / flops(shape)


def rate_basis(shape: Shape) -> str:
    return "measured" if shape.name in RATES else "arithmetic: 1.5B's measured FLOP/s"


# Memory.


def state_bytes(shape: Shape, shards: int) -> float:
    """Weights, gradients and two moments, all float32, of one GPU."""
    return 16 * shape.parameters / shards


def gathered_bytes(shape: Shape) -> float:
    """What is whole for a while on many GPUs: the root and two layers in bfloat16, gradients of the root and one layer twice."""
    return 8 * shape.root + 10 * shape.layer


def activation_bytes(shape: Shape, tokens: int) -> float:
    """With checkpointing: each layer's input, one layer's insides, one chunk of logits."""
    inside = 10 * shape.hidden + 4 * shape.intermediate
    return 2.0 * (tokens * (shape.layers * shape.hidden + inside) + GRADIENT_CHUNK_ROWS * shape.vocabulary)


def memory(shape: Shape, shards: int, tokens: int = BUDGET) -> float:
    """Bytes on one GPU; one GPU alone holds a bfloat16 copy in place of what is gathered."""
    beside = gathered_bytes(shape) if shards > 1 else 2 * shape.parameters
    return state_bytes(shape, shards) + beside + activation_bytes(shape, tokens)


def longest_document(shape: Shape, shards: int) -> int:
    """Tokens of the longest document that fits a GPU of 80 GB."""
    tokens = 1024
    while memory(shape, shards, tokens + 1024) <= ROOM:
        tokens += 1024
    return tokens


def shard_size(shape: Shape) -> int:
    """The smallest group, a node or several, whose GPUs hold a step within 80 GB."""
    size = GPUS_A_NODE
    while memory(shape, size) > ROOM:
        size *= 2
    return size


# Time on the links.


@dataclass(frozen=True)
class Traffic:
    """Of one GPU in one step of one micro-batch.

    Attributes:
        gathered: bytes of weights, bfloat16.
        reduced: bytes of gradients, float32.
        moving: seconds that the links take for the bytes.
        waiting: seconds of hops.
    """

    gathered: float = 0.0
    reduced: float = 0.0
    moving: float = 0.0
    waiting: float = 0.0

    @property
    def seconds(self) -> float:
        return self.moving + self.waiting


def ring_speed(ranks: int) -> float:
    """Bytes/s of a ring. Between nodes it is eight rings side by side, each through an adapter of its own."""
    return NVLINK if ranks <= GPUS_A_NODE else min(NVLINK, GPUS_A_NODE * INFINIBAND)


def ring_wait(ranks: int) -> float:
    nodes = ranks // GPUS_A_NODE if ranks > GPUS_A_NODE else 0
    return START + (ranks - 1 - nodes) * HOP_NVLINK + nodes * HOP_NETWORK


def sharded(shape: Shape, ranks: int) -> Traffic:
    """FSDP2 over all ranks: layers gathered forward and again backward, the root once; every gradient reduced and shared out."""
    if ranks == 1:
        return Traffic()
    part = (ranks - 1) / ranks
    gathered = part * 2 * (2 * shape.layers * shape.layer + shape.root)
    reduced = part * 4 * shape.parameters
    collectives = 3 * shape.layers + 2
    return Traffic(gathered, reduced, (gathered + reduced) / ring_speed(ranks), collectives * ring_wait(ranks))


def hybrid(shape: Shape, ranks: int, size: int) -> Traffic:
    """HSDP: FSDP2 in groups of `size`, then each GPU's part of the gradients summed over the groups."""
    inside = sharded(shape, min(size, ranks))
    groups = ranks // size
    if groups <= 1:
        return inside
    summed = 2 * (groups - 1) / groups * 4 * shape.parameters / size
    hops = min(2 * (groups - 1), 2 * math.ceil(math.log2(groups)))  # ring, or tree
    waiting = (shape.layers + 1) * (START + hops * HOP_NETWORK)
    return Traffic(inside.gathered, inside.reduced + summed, inside.moving + summed / INFINIBAND, inside.waiting + waiting)


def hides_from(shape: Shape, traffic: Traffic) -> float:
    """Tokens of a GPU and step whose arithmetic takes as long as the links."""
    return traffic.seconds * tokens_per_second(shape)


# Tables.


def models() -> Iterator[str]:
    sizes = "layers × hidden × intermediate | query, key heads × size | vocabulary"
    yield f"| Qwen2.5 | {sizes} | parameters | in tables | GFLOP a token | tokens/s | rate |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for s in SHAPES:
        heads, tables = f"{s.heads}, {s.key_heads} × {s.head_size}", f"{s.root / s.parameters:.0%}, {'one' if s.tied else 'two'}"
        sizes = f"{s.layers} × {s.hidden:,} × {s.intermediate:,}"
        yield (
            f"| {s.name} | {sizes} | {heads} | {s.vocabulary:,} | {s.parameters:,} | {tables} | {flops(s) / 1e9:,.1f} "
            f"| {rounded(tokens_per_second(s), 3)} | {rate_basis(s)} |"
        )


def memories() -> Iterator[str]:
    yield f"| GB a GPU, of | {' | '.join(f'{n:,}' for n in GPUS)} | shard size for HSDP | GB a GPU with it | |"
    yield "|---" * (len(GPUS) + 4) + "|"
    for s in SHAPES:
        over, size = " | ".join(f"{memory(s, n) / 1e9:,.0f}" for n in GPUS), shard_size(s)
        yield f"| {s.name} | {over} | {size} | {memory(s, size) / 1e9:,.0f} | arithmetic |"


def links() -> Iterator[str]:
    yield (
        f"| | GPUs | gathered GB | reduced GB | moving ms | hops ms | {BUDGET // 1024} Ki tokens ms | hides from tokens a GPU "
        "| tokens a step then | HSDP hides from | links; rate |"
    )
    yield "|---" * 11 + "|"
    for s in SHAPES:
        spent = f"{BUDGET / tokens_per_second(s) * 1e3:,.0f}"
        yield f"| {s.name} | 1 | – | – | – | – | {spent} | – | – | – | {rate_basis(s).partition(':')[0]} |"
        for n in GPUS[1:]:
            whole, groups = sharded(s, n), hybrid(s, n, shard_size(s))
            least, least_groups = hides_from(s, whole), hides_from(s, groups)
            yield (
                f"| {s.name} | {n:,} | {whole.gathered / 1e9:,.1f} | {whole.reduced / 1e9:,.1f} | {whole.moving * 1e3:,.0f} "
                f"| {whole.waiting * 1e3:,.0f} | {spent} | {rounded(least)} | {rounded(least * n)} "
                f"| {rounded(least_groups) if n > shard_size(s) else 'same'} | arithmetic; {rate_basis(s).partition(':')[0]} |"
            )


def rows() -> Iterator[str]:
    gsm8k = "GSM8K's steps an epoch | rows like GSM8K's for 1,000 steps"
    yield f"| GPUs | rows a step, at least | tokens a step at {BUDGET // 1024} Ki | {gsm8k} | |"
    yield "|---" * 6 + "|"
    for n in GPUS:
        step = n * BUDGET
        epoch = math.ceil(GSM8K_ROWS * GSM8K_TOKENS_A_ROW / step)
        yield f"| {n:,} | {n:,} | {step:,} | {epoch:,} | {rounded(1000 * step / GSM8K_TOKENS_A_ROW)} | arithmetic |"


def documents() -> Iterator[str]:
    lengths = (8, 32, 128)
    yield f"| | longest document on 80 GB of one of 64 GPUs | {' | '.join(f'attention at {n} Ki' for n in lengths)} | |"
    yield "|---" * 6 + "|"
    for s in SHAPES:
        share = [attention_flops(s, n * 1024) / (flops(s) + attention_flops(s, n * 1024)) for n in lengths]
        longest = longest_document(s, 64)
        yield f"| {s.name} | {longest // 1024:,} Ki tokens | {' | '.join(f'{part:.0%}' for part in share)} | arithmetic |"


def attention_flops(shape: Shape, length: int) -> float:
    """FLOP of a token in a document of that length, forward and backward: two products over the half that lies before it."""
    return 6.0 * shape.layers * shape.heads * shape.head_size * length


def checkpoints() -> Iterator[str]:
    speeds = (1, 5, 20)
    yield f"| | GB | of them the model | {' | '.join(f's at {n} GB/s' for n in speeds)} | read again at 2 GB/s, s | |"
    yield "|---" * 8 + "|"
    for s in SHAPES:
        model, whole = 2 * s.parameters / 1e9, 14 * s.parameters / 1e9
        times = " | ".join(f"{whole / n:,.0f}" for n in speeds)
        yield f"| {s.name} | {whole:,.0f} | {model:,.0f} | {times} | {whole / 2:,.0f} | arithmetic |"


def rounded(number: float, digits: int = 2) -> str:
    """To so many digits that mean something."""
    size = 10 ** max(0, math.floor(math.log10(number)) + 1 - digits)
    return f"{round(number / size) * size:,.0f}"


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "models": models,
    "memory": memories,
    "links": links,
    "rows": rows,
    "documents": documents,
    "checkpoints": checkpoints,
}


def page(text: str) -> str:
    """The page with its tables made anew; each stands between `<!-- NAME -->` and `<!-- end -->`."""

    def table(match: re.Match[str]) -> str:
        return "\n".join([f"<!-- {match[1]} -->", *TABLES[match[1]](), "<!-- end -->"])

    return re.sub(r"<!-- (\w+) -->\n(?:.*\n)*?<!-- end -->", table, text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
