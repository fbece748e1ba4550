"""docs/scaling.md: its tables are what docs/scaling.py computes, and what that computes is so where it can be looked at."""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from places import ROOT
from tiny import qwen2_config
from transformers import Qwen2Config, Qwen2ForCausalLM

from verl.engine.flops import training_flops


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


def test_the_shapes_are_those_of_the_models(scaling: ModuleType) -> None:
    for shape in scaling.SHAPES:
        config = Qwen2Config(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_heads,
            tie_word_embeddings=shape.tied,
        )
        with torch.device("meta"):
            model = Qwen2ForCausalLM(config)
        assert config.hidden_size // config.num_attention_heads == shape.head_size
        assert model.num_parameters() == shape.parameters
        share = scaling.RATES["1.5B"][1]
        assert scaling.flops(shape) == pytest.approx(training_flops(model)(1, share), rel=1e-6)


def test_the_formula_of_memory_gives_what_was_measured_on_one_gpu(scaling: ModuleType) -> None:
    """12.3 GiB: 0.5B, micro-batches of 32 Ki tokens, checkpointing on (benchmarks/README.md)."""
    assert scaling.memory(scaling.SHAPES[0], 1, 32768) / 2**30 == pytest.approx(12.3, rel=0.08)


@functools.cache
def counted_in_step(ranks: int, *, tokens: int = 480) -> dict[str, int]:
    """Calls and bytes of each collective, with at most so many tokens in a micro-batch."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    script = [sys.executable, str(ROOT / "tests" / "ranks" / "bytes_of_step.py"), str(ranks), str(tokens)]
    done = subprocess.run(script, env=environment, check=True, capture_output=True, text=True)
    counted: dict[str, int] = json.loads(done.stdout)
    return counted


@pytest.mark.parametrize("ranks", [2, 8])
def test_fsdp_moves_the_bytes_of_the_formula(ranks: int, scaling: ModuleType) -> None:
    counted = counted_in_step(ranks)
    c = qwen2_config(tie_word_embeddings=False)
    shape = scaling.Shape(
        "tiny", c.num_hidden_layers, c.hidden_size, c.intermediate_size, 4, 2, c.hidden_size // 4, c.vocab_size, tied=False
    )
    assert counted["parameters"] == shape.parameters and counted["micro_batches"] == 1
    traffic = scaling.sharded(shape, ranks)
    assert counted["allgather_base torch.bfloat16 bytes"] == traffic.gathered
    assert counted["reduce_scatter_base torch.float32 bytes"] == traffic.reduced
    calls = counted["allgather_base torch.bfloat16 calls"] + counted["reduce_scatter_base torch.float32 calls"]
    assert traffic.waiting == pytest.approx(calls * scaling.ring_wait(ranks))
    assert sum(name.endswith("calls") for name in counted) == 2
    tied = dataclasses.replace(shape, tied=True)  # the known wrong count
    assert scaling.sharded(tied, ranks).gathered != counted["allgather_base torch.bfloat16 bytes"]


def test_fsdp_reduces_gradients_once_however_many_micro_batches_a_step_has() -> None:
    one, several = counted_in_step(2), counted_in_step(2, tokens=80)
    assert one["micro_batches"] == 1 and several["micro_batches"] > 1
    for what in ("bytes", "calls"):
        assert several[f"reduce_scatter_base torch.float32 {what}"] == one[f"reduce_scatter_base torch.float32 {what}"] > 0
        gathered = f"allgather_base torch.bfloat16 {what}"
        assert several[gathered] > one[gathered]  # which each micro-batch needs: the counting sees them all


def test_what_the_page_says_of_ethernet_follows_from_the_formulas(scaling: ModuleType) -> None:
    seven = scaling.SHAPES[2]
    traffic = scaling.sharded(seven, 64)
    slower = dataclasses.replace(traffic, moving=traffic.moving * scaling.ring_speed(64) / 12.5e9)
    assert f"from about {scaling.rounded(scaling.hides_from(seven, slower))} tokens" in scaling.PAGE.read_text(encoding="utf-8")
