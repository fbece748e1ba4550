"""Writes the tables of docs/scaling.md: python docs/scaling.py

Memory is that of verl/plan/memory.py, arithmetic that of verl/engine/outline.py; the formulas of the links are here, and the rates are
measured. Bytes on links are those that one GPU receives in an optimizer step; it sends as many. GB is 10^9 bytes, Ki 1,024.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from verl.config.shared import ModelConfig
from verl.engine.outline import Outline, training_flops
from verl.plan import memory
from verl.plan.memory import Decoder, Work
from verl.plan.sizes import decoder

PAGE = Path(__file__).with_name("scaling.md")
LOGS = PAGE.parents[1] / "benchmarks" / "logs"
GPUS = (1, 8, 64, 256, 1024)
GPUS_A_NODE = 8
NVLINK, INFINIBAND = 450e9, 50e9  # bytes/s and direction: of a GPU to those of its node, and of its own adapter (400 Gb/s)
# Seconds before a collective moves anything, and of one hop of its ring or tree, as NCCL itself reckons (src/graph/tuning.cc, "Simple").
START, HOP_NVLINK, HOP_NETWORK = 8.4e-6, 3.4e-6, 14e-6
BUDGET = 16 * 1024  # tokens of a GPU and step, where a table needs one
ROOM = 75e9  # bytes of a GPU of 80 GB that a step may be planned for: the peak may be 8% above the planned one
GSM8K_ROWS, GSM8K_TOKENS_A_ROW = 7473, 212.8


def measured(name: str) -> tuple[float, float]:
    """Tokens/s of verl on one H200 in a log of benchmarks/, and the share of them that was trained."""
    verl = json.loads((LOGS / name).read_text(encoding="utf-8"))["results"][0]
    assert verl["name"] == "verl"
    return verl["tokens_per_second"], verl["supervised_tokens_per_second"] / verl["tokens_per_second"]


RATES = {"0.5B": measured("2026-11-23-h200-0.5b-64ki.json"), "1.5B": measured("2026-11-23-h200-1.5b-32ki.json")}


@dataclass(frozen=True)
class Shape:
    """A model of Qwen2.5.

    Attributes:
        flops: of a token, forward and backward; the output layer meets trained tokens only.
    """

    name: str
    sizes: Decoder
    flops: float


def shape(name: str, layers: int, hidden: int, intermediate: int, heads: int, key_heads: int, vocabulary: int, *, tied: bool) -> Shape:
    config = Qwen2Config(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tokens = 10**6
    flops = training_flops(model)(tokens, round(TRAINED * tokens)) / tokens
    return Shape(name, decoder(Outline(ModelConfig(), model)), flops)


TRAINED = RATES["1.5B"][1]  # share of the tokens
SHAPES = (
    shape("0.5B", 24, 896, 4864, 14, 2, 151936, tied=True),
    shape("1.5B", 28, 1536, 8960, 12, 2, 151936, tied=True),
    shape("7B", 28, 3584, 18944, 28, 4, 152064, tied=False),
    shape("32B", 64, 5120, 27648, 40, 8, 152064, tied=False),
    shape("72B", 80, 8192, 29568, 64, 8, 152064, tied=False),
)


def tokens_per_second(shape: Shape) -> float:
    """Of one GPU alone: measured, or the arithmetic rate of the largest measured model."""
    if shape.name in RATES:
        return RATES[shape.name][0]
    (largest,) = (other for other in SHAPES if other.name == "1.5B")
    return RATES["1.5B"][0] * largest.flops / shape.flops


def rate_basis(shape: Shape) -> str:
    return "measured" if shape.name in RATES else "arithmetic: 1.5B's measured FLOP/s"


# Memory.


def work(shards: int, tokens: int) -> Work:
    """A step of one micro-batch with checkpointing, sharded over all of so many GPUs."""
    return Work(tokens, round(TRAINED * tokens), checkpointing="full", gpus=shards, shards=shards)


def needed(shape: Shape, shards: int, tokens: int = BUDGET) -> float:
    """Bytes of one GPU."""
    step = work(shards, tokens)
    peak = memory.peak(shape.sizes, step).total
    return peak + memory.overhead_bytes(step, peak)


def longest_document(shape: Shape, shards: int) -> int:
    """Tokens of the longest document that fits a GPU of 80 GB."""
    tokens = 1024
    while needed(shape, shards, tokens + 1024) <= ROOM:
        tokens += 1024
    return tokens


def shard_size(shape: Shape) -> int:
    """The smallest group, a node or several, whose GPUs hold a step within 80 GB."""
    size = GPUS_A_NODE
    while needed(shape, size) > ROOM:
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


def sharded(sizes: Decoder, ranks: int) -> Traffic:
    """FSDP2 over all ranks: layers gathered forward and again backward, the root once; every gradient reduced and shared out."""
    if ranks == 1:
        return Traffic()
    part = (ranks - 1) / ranks
    gathered = part * 2 * (2 * sizes.layers * sizes.layer + sizes.root)
    reduced = part * 4 * sizes.trained
    collectives = 3 * sizes.layers + 2
    return Traffic(gathered, reduced, (gathered + reduced) / ring_speed(ranks), collectives * ring_wait(ranks))


def hybrid(sizes: Decoder, ranks: int, size: int) -> Traffic:
    """HSDP: FSDP2 in groups of `size`, then each GPU's part of the gradients summed over the groups."""
    inside = sharded(sizes, min(size, ranks))
    groups = ranks // size
    if groups <= 1:
        return inside
    summed = 2 * (groups - 1) / groups * 4 * sizes.trained / size
    hops = min(2 * (groups - 1), 2 * math.ceil(math.log2(groups)))  # ring, or tree
    waiting = (sizes.layers + 1) * (START + hops * HOP_NETWORK)
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
        d = s.sizes
        heads, tables = f"{d.heads}, {d.key_heads} × {d.head_size}", f"{d.root / d.trained:.0%}, {'one' if d.tied else 'two'}"
        sizes = f"{d.layers} × {d.hidden:,} × {d.intermediate:,}"
        yield (
            f"| {s.name} | {sizes} | {heads} | {d.vocabulary:,} | {d.trained:,} | {tables} | {s.flops / 1e9:,.1f} "
            f"| {rounded(tokens_per_second(s), 3)} | {rate_basis(s)} |"
        )


def memories() -> Iterator[str]:
    yield f"| GB a GPU, of | {' | '.join(f'{n:,}' for n in GPUS)} | shard size for HSDP | GB a GPU with it | |"
    yield "|---" * (len(GPUS) + 4) + "|"
    for s in SHAPES:
        over, size = " | ".join(f"{needed(s, n) / 1e9:,.0f}" for n in GPUS), shard_size(s)
        yield f"| {s.name} | {over} | {size} | {needed(s, size) / 1e9:,.0f} | arithmetic |"


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
            whole, groups = sharded(s.sizes, n), hybrid(s.sizes, n, shard_size(s))
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
        share = [attention_flops(s.sizes, n * 1024) / (s.flops + attention_flops(s.sizes, n * 1024)) for n in lengths]
        longest = longest_document(s, 64)
        yield f"| {s.name} | {longest // 1024:,} Ki tokens | {' | '.join(f'{part:.0%}' for part in share)} | arithmetic |"


def attention_flops(sizes: Decoder, length: int) -> float:
    """FLOP of a token in a document of that length, forward and backward: two products over the half that lies before it."""
    return 6.0 * sizes.layers * sizes.query * length


def checkpoints() -> Iterator[str]:
    speeds = (1, 5, 20)
    yield f"| | GB | of them the model | {' | '.join(f's at {n} GB/s' for n in speeds)} | read again at 2 GB/s, s | |"
    yield "|---" * 8 + "|"
    for s in SHAPES:
        model, whole = 2 * s.sizes.trained / 1e9, 14 * s.sizes.trained / 1e9
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
