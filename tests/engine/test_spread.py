"""However the weights lie on the processes, training is the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from decided import decided
from places import free_port, run_ranks
from runs import command
from tiny import qwen2_config, write_model
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from verl import dist
from verl.config import checks
from verl.config.shared import FsdpConfig, ModelConfig
from verl.engine import build as building
from verl.engine.decisions import choose_spread
from verl.engine.hardware import Hardware
from verl.engine.layers import decoder_layers
from verl.engine.outline import Outline
from verl.engine.scorers import TokenScorer
from verl.engine.sharding import shard
from verl.engine.trial import check_scorer
from verl.errors import UserError
from verl.models.attention.packed import packed_attention
from verl.models.load import load_for_training
from verl.models.shards import load_without_values, small_twin

SPREADS = [
    "fsdp2",
    "fsdp2, read by shards",
    "fsdp2 kept",
    "groups",
    "groups, read by shards",
    "ddp",
    "ddp, many buckets",
    "offload",
    "offload, read by shards",
]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), qwen2_config(), dtype=torch.bfloat16)


def run(processes: int, model_path: Path, folder: Path) -> dict[str, Any]:
    run_ranks("spread.py", model_path, folder, processes=processes)
    found: dict[str, Any] = torch.load(folder / "found.pt", weights_only=True)
    return found


@pytest.fixture(scope="module")
def one(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(1, model_path, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(model_path: Path, two_folder: Path) -> dict[str, Any]:
    return run(2, model_path, two_folder)


@pytest.mark.parametrize("name", SPREADS)
def test_two_processes_train_as_one(name: str, one: dict[str, Any], two: dict[str, Any]) -> None:
    expected = one["fsdp2"]  # which on one process is no sharding at all
    for found in (one.get(name, expected), two[name]):
        assert (found["gradient"] - expected["gradient"]).norm() < 1e-5 * expected["gradient"].norm()
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)


def test_a_checkpoint_goes_on_however_the_weights_lie(one: dict[str, Any], two: dict[str, Any]) -> None:
    for found in (two["rest"], two["ddp after fsdp2"], two["fsdp2 after ddp"]):
        assert found == pytest.approx(one["rest"], rel=1e-5)


def test_what_was_read_by_shards_is_written_as_it_was(two: dict[str, Any], two_folder: Path, model_path: Path) -> None:
    written = AutoModelForCausalLM.from_pretrained(two_folder / "sharded" / "global_step_6")
    original = AutoModelForCausalLM.from_pretrained(model_path)
    assert {n: (p.shape, p.dtype) for n, p in written.state_dict().items()} == {
        n: (p.shape, p.dtype) for n, p in original.state_dict().items()
    }
    assert written.generation_config.to_dict() == original.generation_config.to_dict()


def test_micro_batches_before_the_last_send_nothing(two: dict[str, Any]) -> None:
    assert two["messages a step"] == 1


def test_files_of_another_layout_are_left_to_transformers(model_path: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in model_path.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    values = load_file(model_path / "model.safetensors")
    save_file({name.replace("q_proj", "query"): value for name, value in values.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    assert load_without_values(str(tmp_path), dtype=torch.float32) is None


def test_the_small_twin_stands_for_its_architecture(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    kinds = ["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"] * 4
    windowed = Gemma3TextConfig(**shape, num_hidden_layers=8, layer_types=kinds, vocab_size=5000, sliding_window=3)
    path = write_model(tmp_path, windowed, kind=Gemma3ForCausalLM)
    twin = small_twin(load_for_training(str(path)).model, torch.device("cpu"))
    assert (twin.config.num_hidden_layers, twin.config.vocab_size) == (4, 1024)
    check_scorer(TokenScorer(twin))

    def mixed(*words: Any, **options: Any) -> Any:
        """Sees all documents as one."""
        bounds = options["cu_seq_lens_q"]
        return packed_attention(*words, **{**options, "cu_seq_lens_q": bounds[[0, -1]], "max_length_q": int(bounds[-1])})

    from transformers import AttentionInterface

    from verl.models.attention.packed import PACKED

    twin = small_twin(load_for_training(str(model_path)).model, torch.device("cpu"))
    check_scorer(TokenScorer(twin))
    AttentionInterface.register(PACKED, mixed)
    try:
        with pytest.raises(UserError, match="packed batches"):
            check_scorer(TokenScorer(twin))
    finally:
        AttentionInterface.register(PACKED, packed_attention)


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("size", [None, 2])
def test_the_keys_of_sharding_reach_fsdp2(reshard: bool, size: int | None, model_path: Path) -> None:
    keys = FsdpConfig(reshard_after_forward=reshard, shard_size=size)
    outline = Outline(ModelConfig(partial_pretrain=str(model_path), fsdp_config=keys))
    spread = choose_spread(outline, Hardware(torch.device("cpu"), processes=4))
    assert spread.strategy == "fsdp2"
    assert (spread.sharding.reshard_after_forward, spread.sharding.size) == (reshard, size)


@pytest.mark.parametrize(
    ("processes", "changes", "read_later"),
    [
        (2, {}, True),
        (1, {}, False),
        (1, {"fsdp_config": FsdpConfig(cpu_offload=True)}, True),
        (2, {"strategy": "ddp"}, False),
        (2, {"lora_rank": 4}, True),
        (2, {"lora_rank": 4, "use_dora": True}, False),  # which starts from the norms of the weights' rows
    ],
)
def test_a_model_that_will_be_sharded_is_never_whole_on_a_process(
    processes: int, changes: dict[str, Any], read_later: bool, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "world_size", lambda: processes)
    settings = ModelConfig(partial_pretrain=str(model_path), **changes)
    loaded, scorer = building._load(settings, decided(settings))
    assert (loaded.fill is not None) == read_later
    assert {parameter.is_meta for parameter in scorer.parameters()} == {read_later}


def test_while_a_layer_computes_the_weights_of_the_next_are_on_their_way(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, list[Any]] = {"forward": [], "backward": []}
    for way, pairs in asked.items():
        monkeypatch.setattr(FSDPModule, f"set_modules_to_{way}_prefetch", lambda layer, others, pairs=pairs: pairs.append((layer, *others)))
    dist.start()
    model = load_for_training(str(model_path)).model
    first, second = decoder_layers(model)
    shard(TokenScorer(model), torch.device("cpu"), compute_dtype=torch.float32)
    assert asked == {"forward": [(first, second)], "backward": [(second, first)]}


def test_groups_must_divide_the_processes(model_path: Path) -> None:
    outline = Outline(ModelConfig(partial_pretrain=str(model_path), fsdp_config=FsdpConfig(shard_size=4)))
    with pytest.raises(UserError, match="6 processes are not a multiple of 4") as error:
        choose_spread(outline, Hardware(torch.device("cpu"), processes=6))
    assert "1, 2, 3, 6" in str(error.value) and error.value.where == "model.fsdp_config.shard_size=4"


@pytest.mark.parametrize(
    ("memory", "local", "fits", "pins"),
    [(2.1, 1, True, False), (3.1, 1, True, True), (1.9, 1, False, False), (2.1, 2, False, False), (4.2, 2, True, False)],
)
def test_offloading_without_room_is_an_error_with_the_numbers(memory: float, local: int, fits: bool, pins: bool, model_path: Path) -> None:
    outline = Outline(ModelConfig(partial_pretrain=str(model_path), fsdp_config=FsdpConfig(cpu_offload=True)))
    there = int(memory * outline.parameters)  # bytes; 8 processes have 2 a parameter each
    hardware = Hardware(torch.device("cuda", 0), processes=8, local_processes=local, gpu_bytes=10**9, host_bytes=there)
    if fits:
        sharding = choose_spread(outline, hardware).sharding
        assert sharding.cpu_offload and sharding.pin == pins  # pinned, tensors may take twice their size
        return
    with pytest.raises(UserError, match=r"take .* GiB of this machine's memory, which has"):
        choose_spread(outline, hardware)
    choose_spread(outline, replace(hardware, device=torch.device("cpu")))


@pytest.mark.parametrize("changes", [{"fsdp_config": FsdpConfig(cpu_offload=True)}, {"param_dtype": "bfloat16"}])
def test_ddp_with_what_it_cannot_do_is_an_error(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="ddp"):
        checks.check_strategy(ModelConfig(strategy="ddp", **changes))


LARGE_PAGES = """
import os
import torch
from verl import dist

if os.environ["WORLD_SIZE"] == "2" and os.fork() == 0:
    os.environ.update(RANK="1", LOCAL_RANK="1")
dist.start(large_pages=True)
dist.from_main("what the processes tell one another are tensors too")
taken = torch.ones(2**24)
inside = False
for line in open("/proc/self/smaps"):
    first, _, rest = line.partition(" ")
    if "-" in first:
        begin, end = (int(number, 16) for number in first.split("-"))
        inside = begin <= taken.data_ptr() + 2**25 < end
    elif inside and first == "VmFlags:":
        assert "hg" in rest.split(), rest
        print("in large pages")
dist.stop()
if os.environ["WORLD_SIZE"] == "2" and os.environ["RANK"] == "0":
    assert os.wait()[1] == 0
"""


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a system without pages of 2 MiB")
@pytest.mark.parametrize("processes", [1, 2])
def test_host_memory_is_taken_in_large_pages_before_it_is_too_late(monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = command("-c", LARGE_PAGES, env=rank)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("in large pages") == processes
