"""docs/scaling.md: its tables are what docs/scaling.py computes, and what that computes is so where it can be looked at."""

import dataclasses
import functools
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
from places import ROOT, run_ranks
from tiny import qwen2_config

from verl.plan import memory


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "docs" / "scaling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_the_page_are_current_and_a_typed_number_is_noticed(scaling: ModuleType) -> None:
    text = scaling.PAGE.read_text(encoding="utf-8")
    assert text == scaling.page(text), "run: python docs/scaling.py"
    assert all(f"<!-- {name} -->\n|" in text for name in scaling.TABLES)
    typed = text.replace("| 7B | 64 | 27.8 |", "| 7B | 64 | 20.0 |")
    assert typed != text and scaling.page(typed) == text


def test_each_line_of_a_table_says_whether_it_is_measured(scaling: ModuleType) -> None:
    for table in scaling.TABLES.values():
        _, _, *lines = table()
        assert lines and all("measured" in line.split("|")[-2] or "arithmetic" in line.split("|")[-2] for line in lines)


def test_the_shapes_are_those_of_the_published_models(scaling: ModuleType) -> None:
    published = {"0.5B": 0.494, "1.5B": 1.544, "7B": 7.616, "32B": 32.764, "72B": 72.706}  # 10^9 parameters
    assert {shape.name: round(shape.sizes.trained / 1e9, 3) for shape in scaling.SHAPES} == published
    assert {shape.sizes.head_size for shape in scaling.SHAPES} == {64, 128}
    for shape in scaling.SHAPES:
        of_all = 6 * (shape.sizes.trained - shape.sizes.root + scaling.TRAINED * shape.sizes.table)
        assert shape.flops == pytest.approx(of_all, rel=1e-3), "norms and biases are all that is not counted"


def test_the_formula_of_memory_gives_what_was_measured_on_one_gpu(scaling: ModuleType) -> None:
    """13.9 GiB: 0.5B, micro-batches of 68,608 tokens, checkpointing on (benchmarks/README.md)."""
    allocated = memory.peak(scaling.SHAPES[0].sizes, scaling.work(1, 68608)).total + memory.WORKSPACE
    assert allocated / 2**30 == pytest.approx(13.9, rel=0.08)
    assert f"the formula gives {allocated / 2**30:.1f} GiB" in scaling.PAGE.read_text(encoding="utf-8")


def test_a_gpu_has_room_for_the_longest_document_and_the_smallest_group_of_shards(scaling: ModuleType) -> None:
    for shape in scaling.SHAPES:
        longest, size = scaling.longest_document(shape, 64), scaling.shard_size(shape)
        assert scaling.needed(shape, 64, longest) <= scaling.ROOM < scaling.needed(shape, 64, longest + 1024)
        assert scaling.needed(shape, size) <= scaling.ROOM
        assert size == scaling.GPUS_A_NODE or scaling.needed(shape, size // 2) > scaling.ROOM


@functools.cache
def counted_in_step(ranks: int, *, tokens: int = 480) -> dict[str, int]:
    """Calls and bytes of each collective, with at most so many tokens in a micro-batch."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "counted.json"
        run_ranks("bytes_of_step.py", ranks, tokens, file, processes=1)
        counted: dict[str, int] = json.loads(file.read_text())
    return counted


@pytest.mark.parametrize("ranks", [2, 8])
def test_fsdp_moves_the_bytes_of_the_formula(ranks: int, scaling: ModuleType) -> None:
    counted = counted_in_step(ranks)
    c = qwen2_config(tie_word_embeddings=False)
    sizes = scaling.shape("tiny", c.num_hidden_layers, c.hidden_size, c.intermediate_size, 4, 2, c.vocab_size, tied=False).sizes
    assert counted["parameters"] == sizes.trained and counted["micro_batches"] == 1
    traffic = scaling.sharded(sizes, ranks)
    assert counted["allgather_base torch.bfloat16 bytes"] == traffic.gathered
    assert counted["reduce_scatter_base torch.float32 bytes"] == traffic.reduced
    calls = counted["allgather_base torch.bfloat16 calls"] + counted["reduce_scatter_base torch.float32 calls"]
    assert traffic.waiting == pytest.approx(calls * scaling.ring_wait(ranks))
    assert sum(name.endswith("calls") for name in counted) == 2
    one_table = dataclasses.replace(sizes, root=sizes.root - sizes.table)  # the known wrong count
    assert scaling.sharded(one_table, ranks).gathered != counted["allgather_base torch.bfloat16 bytes"]


def test_fsdp_reduces_gradients_once_however_many_micro_batches_a_step_has() -> None:
    one, several = counted_in_step(2), counted_in_step(2, tokens=80)
    assert one["micro_batches"] == 1 and several["micro_batches"] > 1
    for what in ("bytes", "calls"):
        assert several[f"reduce_scatter_base torch.float32 {what}"] == one[f"reduce_scatter_base torch.float32 {what}"] > 0
        gathered = f"allgather_base torch.bfloat16 {what}"
        assert several[gathered] > one[gathered]  # which each micro-batch needs: the counting sees them all


def test_what_the_page_says_of_ethernet_follows_from_the_formulas(scaling: ModuleType) -> None:
    seven = scaling.SHAPES[2]
    traffic = scaling.sharded(seven.sizes, 64)
    slower = dataclasses.replace(traffic, moving=traffic.moving * scaling.ring_speed(64) / 12.5e9)
    assert f"from about {scaling.rounded(scaling.hides_from(seven, slower))} tokens" in scaling.PAGE.read_text(encoding="utf-8")
