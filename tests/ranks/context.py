"""Gradients and losses of tiny models whose documents are spread over the processes. Run on several ranks by test_context_parallel,
which calls `results` by itself for what one process gives."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tiny import RandomDocuments, qwen2_config, write_model
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from transformers import MistralConfig, MistralForCausalLM, PretrainedConfig, Qwen2ForCausalLM

from verl import dist
from verl.algorithms import sft
from verl.config.shared import ModelConfig, OptimConfig
from verl.data.batch import Batch
from verl.data.loader import Loader, Packing
from verl.engine.engine import Engine
from verl.engine.layers import compile_layers, recompute_activations
from verl.engine.scorers import TokenScorer
from verl.engine.trial import check_parts, check_scorer
from verl.engine.weights import SHARDED, Spread
from verl.errors import UserError
from verl.models.adapters.lora import add_adapters
from verl.models.adapters.operators import use_operators
from verl.models.attention import packed
from verl.models.load import load_for_training

STEPS = 5
CPU = torch.device("cpu")
PACKED = Packing(4, 240)


def nothing(model: Any) -> None:
    pass


def adapted(model: Any) -> None:
    use_operators(add_adapters(model, ModelConfig(lora_rank=4, lora_alpha=8), compute_dtype=torch.float32, seed=1, stop_ids=[]))
    model.enable_input_require_grads()


def recomputed(model: Any) -> None:
    recompute_activations(model)


def partly_recomputed(model: Any) -> None:
    recompute_activations(model, selective=True)


def compiled(model: Any) -> None:
    """With an attention that a graph can hold, as FlashAttention on a GPU is, and activations computed again inside it."""
    packed.has_flash = lambda *_: True
    packed.flash.flash_attention = lambda query, key, value, bounds, longest, **_: masked(query, key, value, bounds)
    counters.clear()
    recomputed(model)
    compile_layers(model, backend="aot_eager")


def ended() -> None:
    """Attention as it was."""
    packed.has_flash, packed.flash.flash_attention = HAS_FLASH, FLASH_ATTENTION


HAS_FLASH, FLASH_ATTENTION = packed.has_flash, packed.flash.flash_attention


def masked(query_TND: Tensor, key_TKD: Tensor, value_TKD: Tensor, cu_seqlens: Tensor) -> Tensor:
    position_T = torch.arange(query_TND.shape[0])
    document_T = torch.bucketize(position_T, cu_seqlens[1:], right=True)
    mask_TT = (document_T[:, None] == document_T) & (position_T[:, None] >= position_T)
    query, key, value = (x.transpose(0, 1)[None] for x in (query_TND, key_TKD, value_TKD))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask_TT, enable_gqa=True)[0].transpose(0, 1)


@dataclass
class Case:
    config: PretrainedConfig = field(default_factory=qwen2_config)
    change: Callable[[Any], None] = nothing
    packing: Packing = PACKED
    spread: Spread = SHARDED

    def plain(self) -> "Case":
        """The same run without what must not change its numbers."""
        return replace(self, change=adapted if self.change is adapted else nothing, spread=SHARDED)


WINDOWS = MistralConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=512,
    sliding_window=7,
)
CASES = {
    "two key heads": Case(),
    "one key head": Case(qwen2_config(num_key_value_heads=1)),
    "three key heads": Case(qwen2_config(hidden_size=96, num_attention_heads=6, num_key_value_heads=3)),
    "sliding windows": Case(WINDOWS),
    "padded rows": Case(packing=Packing(3, None)),
    "adapters": Case(change=adapted),
    "all weights on each process": Case(spread=Spread("ddp")),
    "recomputed": Case(change=recomputed),
    "partly recomputed": Case(change=partly_recomputed),
    "compiled": Case(qwen2_config(num_key_value_heads=1), compiled),
}


class Results(NamedTuple):
    """Of five steps: the first one's gradient, each one's loss, then the first batch's without training; what was compiled."""

    gradient: Tensor
    losses: list[float]
    graphs: int
    graph_breaks: int


def results(folder: Path, case: Case, *, check: bool = True) -> Results:
    if dist.is_main():
        write_model(folder, case.config, kind=MistralForCausalLM if case.config is WINDOWS else Qwen2ForCausalLM)
    dist.barrier()
    scorer = TokenScorer(load_for_training(str(folder)).model)
    check_scorer(scorer)
    if check:
        check_parts(scorer)
    case.change(scorer.model)
    engine = Engine(scorer, OptimConfig(lr=1e-3), total_steps=STEPS, device=CPU, compute_dtype=torch.float32, spread=case.spread)
    places: dict[str, Any] = {
        "rank": dist.data_rank(),
        "world_size": dist.data_size(),
        "part": dist.context_rank(),
        "parts": dist.context_size(),
    }
    loader = Loader(RandomDocuments(), case.packing, rows_per_step=4, seed=1, **places)
    steps = list(loader.steps(0, STEPS))
    engine.backward(steps[0].micro_batches, sft)
    gradients = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in engine.trained]
    engine.optimizer.zero_grad()
    losses = [float(engine.train_step(step.micro_batches, sft, step.number)["loss"]) for step in steps]
    losses.append(float(engine.evaluate(steps[0].micro_batches, sft)["loss"]))
    ended()
    gradient = torch.cat([g.flatten() for g in gradients])
    return Results(gradient, losses, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))


def cut_documents(batch: Batch, number: int, parts: int) -> Batch:
    """The known wrong way: each process takes its tokens for whole documents."""
    part = batch_part(batch, number, parts)
    tokens = len(part.input_ids_T)
    inside = (batch.cu_seqlens - number * tokens).clamp(0, tokens).unique()
    return replace(part, cu_seqlens=inside.int(), parts=1)


batch_part = Batch.part


def check_without_exchange(folder: Path) -> str:
    """What the check before training says of it."""
    try:
        results(folder, Case())
    except UserError as error:
        return error.what
    return ""


def main(folder: str, *names: str) -> None:
    dist.start()
    dist.share_micro_batches(2)
    place = Path(folder)
    found: dict[str, Any] = {name: tuple(results(place / str(number), CASES[name])) for number, name in enumerate(names)}
    Batch.part = cut_documents  # type: ignore[assignment]
    found["said of wrong"] = check_without_exchange(place / "wrong")
    found["wrong"] = tuple(results(place / "wrong", Case(), check=False))
    if dist.is_main():
        torch.save(found, place / "found.pt")
    dist.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
