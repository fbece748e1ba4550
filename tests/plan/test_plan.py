"""The plan before the run: its formulas against measured runs, traced layers and a real engine; its advice; the command."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from tiny import RandomDocuments, qwen2_config, write_problems_and_model
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    CTRLConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from verl import cli, dist
from verl.algorithms import sft
from verl.config.assignments import argument
from verl.config.sft import DataConfig, SFTConfig
from verl.config.shared import ModelConfig, OptimConfig
from verl.data.loader import Loader
from verl.engine.decisions import packing_of
from verl.engine.engine import Engine
from verl.engine.hardware import ASSUMED, CARDS, GIB
from verl.engine.layers import compile_layers, recompute_activations
from verl.engine.optim import optimizer_state
from verl.engine.outline import Outline
from verl.engine.scorers import TokenScorer
from verl.errors import UserError
from verl.models.attention.packed import PACKED, packed_attention
from verl.plan import memory
from verl.plan.memory import WORKSPACE, Decoder, Work
from verl.plan.plan import MicroBatch, Plan, plan_run, work_of
from verl.plan.remedies import adviser, changed, hints
from verl.plan.report import check_room, describe
from verl.plan.sizes import decoder
from verl.trainer import fsdp_sft_trainer

# Of PyTorch's own making, while it traces and when its compiler is first imported.
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


# --- measured on one H200: `perf/peak_memory_gib`, the largest micro-batch of each run from its rows (benchmarks/README.md and logs)


def qwen(
    hidden: int, intermediate: int, layers: int, heads: int, key_heads: int, *, vocabulary: int = 151936, tied: bool = True
) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
    )


SMALL, MIDDLE = qwen(896, 4864, 24, 14, 2), qwen(1536, 8960, 28, 12, 2)
LARGE = qwen(3584, 18944, 28, 28, 4, vocabulary=152064, tied=False)
STEP = Work(tokens=68608, trained_tokens=39583)  # 308 rows
MEASURED: dict[str, tuple[Qwen2Config, dict[str, Any], Work, float]] = {
    "0.5B": (SMALL, {}, STEP, 70.7),
    "0.5B, selective": (SMALL, {}, replace(STEP, checkpointing="selective"), 33.4),
    "0.5B, checkpointed": (SMALL, {}, replace(STEP, checkpointing="full"), 13.9),
    "0.5B, 16 rows": (SMALL, {}, Work(4352, 2706), 11.5),
    "0.5B, 16 rows, recorded": (SMALL, {}, Work(5120, 3200, captured=True), 13.2),
    "0.5B, 16 rows, recorded and checkpointed": (SMALL, {}, Work(4096, 2560, checkpointing="full", captured=True), 8.7),
    "0.5B, LoRA, 16 rows, recorded and checkpointed": (
        SMALL,
        {"lora_rank": 64},
        Work(4096, 2560, checkpointing="full", captured=True),
        2.5,
    ),
    "0.5B, two documents of 32,768 tokens": (SMALL, {}, Work(32768, 32768, micro_batches=2), 40.2),
    "1.5B": (MIDDLE, {}, Work(33792, 19864), 87.1),
    "7B, 77 rows": (LARGE, {}, Work(17664, 10426, param_bytes=2, state_bytes=2.0625), 104.9),
    "7B, 75 rows": (LARGE, {}, Work(17152, 10030, param_bytes=2, state_bytes=2.0625), 102.8),
    "0.5B, LoRA, one operator for the feed-forward part": (SMALL, {"lora_rank": 64}, STEP, 52.1),
    "7B, all of it in host memory": (LARGE, {}, Work(16648, 9856, checkpointing="full", compiled=False, offload=True), 12.4),
    "7B, LoRA": (LARGE, {"lora_rank": 64}, Work(17664, 10426), 74.3),
    # The feed-forward part was three operators then, which dropout makes of it now.
    "0.5B, LoRA": (SMALL, {"lora_rank": 64, "lora_dropout": 0.1}, STEP, 65.6),
    "0.5B, LoRA as peft has it": (SMALL, {"lora_rank": 64, "lora_dropout": 0.1}, STEP, 67.1),
}


def sizes_of(config: PretrainedConfig, **settings: Any) -> Decoder:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return decoder(Outline(ModelConfig(partial_pretrain="x", **settings), model))


@pytest.mark.parametrize("name", MEASURED)
def test_the_planned_peak_is_within_8_percent_of_the_measured_one(name: str) -> None:
    config, settings, work, gib = MEASURED[name]
    planned = (memory.peak(sizes_of(config, **settings), work).total + WORKSPACE) / GIB
    assert planned == pytest.approx(gib, rel=0.08)


def test_a_formula_that_forgets_one_wide_tensor_of_a_layer_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "saved_mlp_tensors", lambda model, work: 2)
    config, settings, work, gib = MEASURED["0.5B"]
    assert (memory.peak(sizes_of(config, **settings), work).total + WORKSPACE) / GIB != pytest.approx(gib, rel=0.08)


# --- what layers keep


@torch.library.custom_op("verl_test::plan_flash_attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    return [query.clone(), query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)]


@torch.library.custom_op("verl_test::plan_flash_attention_backward", mutates_args=())
def attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor) -> list[Tensor]:
    return [torch.zeros_like(x) for x in (query, key, value)]


def _gradients(ctx: Any, gradients: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(attention_backward(gradients[0].contiguous(), *ctx.saved_tensors))


attention.register_fake(lambda q, k, v: [torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)])
attention_backward.register_fake(lambda g, q, k, v, o, s: [torch.empty_like(x) for x in (q, k, v)])
attention.register_autograd(_gradients, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output))


def as_on_a_gpu(module: Any, query_1NTD: Tensor, key_1KTD: Tensor, value_1KTD: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
    return attention(*(x.squeeze(0).transpose(0, 1) for x in (query_1NTD, key_1KTD, value_1KTD)))[0].unsqueeze(0), None


@pytest.fixture
def opaque_attention() -> Iterator[None]:
    torch._dynamo.reset()
    AttentionInterface.register(PACKED, as_on_a_gpu)
    yield
    AttentionInterface.register(PACKED, packed_attention)
    torch._dynamo.reset()


TOKENS = 37  # a number that no other size has
WIDE = {"hidden_size": 96, "intermediate_size": 448, "num_attention_heads": 6, "num_key_value_heads": 2}
NARROW = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 4}


def build(shape: dict[str, Any], *, layers: int = 2, **settings: Any) -> tuple[PreTrainedModel, Decoder]:
    """A model in bfloat16 with adapters in place, as a run has it, and its sizes."""
    config = Qwen2Config(**shape, num_hidden_layers=layers, vocab_size=512, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED, dtype=torch.bfloat16)
    if settings:
        from verl.models.adapters.lora import add_adapters
        from verl.models.adapters.operators import use_operators

        adapted = add_adapters(model, ModelConfig(partial_pretrain="x", **settings), compute_dtype=torch.bfloat16, seed=1)
        use_operators(adapted.to(torch.bfloat16))
        model.enable_input_require_grads()
    return model.train(), sizes_of(config, **settings)


def forward(model: PreTrainedModel) -> Tensor:
    ids, positions = torch.arange(TOKENS)[None], torch.arange(TOKENS)[None]
    output: Tensor = model.get_decoder()(input_ids=ids, position_ids=positions, attention_mask=None, use_cache=False).last_hidden_state
    return output


def bytes_a_token(tensors: list[Tensor]) -> float:
    """Of those with a dimension of tokens, storages that several share counted once."""
    shapes = [[size if isinstance(size, int) else size.node.hint for size in x.shape] for x in tensors]
    return sum(x.element_size() * torch.Size(shape).numel() / TOKENS for x, shape in zip(tensors, shapes, strict=True) if TOKENS in shape)


@pytest.mark.usefixtures("opaque_attention")
@pytest.mark.parametrize(
    ("shape", "checkpointing", "settings"),
    [
        (WIDE, "none", {}),
        (WIDE, "selective", {}),
        (WIDE, "full", {}),
        (NARROW, "none", {}),
        (NARROW, "selective", {}),
        (WIDE, "none", {"lora_rank": 8}),
        (NARROW, "none", {"lora_rank": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    ],
)
def test_a_compiled_layer_keeps_what_the_formula_counts(shape: dict[str, int], checkpointing: Any, settings: dict[str, Any]) -> None:
    model, sizes = build(shape, **settings)
    kept: list[float] = []

    def look(graph: Any, inputs: Any) -> Any:
        (results,) = (node.args[0] for node in graph.graph.nodes if node.op == "output")
        kept.append(bytes_a_token([x for node in results if node is not None and isinstance(x := node.meta["val"], Tensor)]))
        return make_boxed_func(graph.forward)

    if checkpointing != "none":
        recompute_activations(model, selective=checkpointing == "selective")
    backend = aot_autograd(
        fw_compiler=look,
        bw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    compile_layers(model, backend=backend)
    forward(model).sum().backward()
    (found,) = set(kept)
    its_output, angles = 2 * sizes.hidden, 2 * 2 * sizes.head_size  # the next layer's input, and what all layers share
    assert found - its_output - angles == memory.saved_by_layer(sizes, Work(TOKENS, TOKENS, checkpointing=checkpointing))


@pytest.mark.usefixtures("opaque_attention")
@pytest.mark.parametrize("settings", [{}, {"lora_rank": 8}], ids=["full", "adapters"])
def test_a_layer_as_written_keeps_what_the_formula_counts(settings: dict[str, Any]) -> None:
    def kept(layers: int) -> float:
        model, _ = build(WIDE, layers=layers, **settings)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own and TOKENS in tensor.shape:
                storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            forward(model)
        return bytes_a_token(list(storages.values()))

    _, sizes = build(WIDE, **settings)
    assert kept(3) - kept(2) == memory.saved_by_layer(sizes, Work(TOKENS, TOKENS, compiled=False))


# --- sizes, weights, gradients, optimizer


@pytest.mark.parametrize("config", [SMALL, LARGE, LlamaConfig(num_hidden_layers=2), Qwen3Config(num_hidden_layers=2)])
def test_parameters_are_those_of_the_model(config: PretrainedConfig) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes = sizes_of(config)
    assert sizes.trained == sum(p.numel() for p in model.parameters())
    assert sizes.layer * sizes.layers + sizes.root == sizes.trained
    assert sizes.root == sizes.table * (1 if sizes.tied else 2) + sizes.hidden


@pytest.mark.parametrize(
    ("config", "width"), [(GPT2Config(n_layer=3), 4 * 768), (OPTConfig(num_hidden_layers=3), 3072), (CTRLConfig(n_layer=3), 8192)]
)
def test_models_with_other_names_for_their_sizes_are_planned_too(config: PretrainedConfig, width: int) -> None:
    sizes = sizes_of(config)
    assert (sizes.layers, sizes.hidden, sizes.intermediate) == (3, config.hidden_size, width)
    assert sizes.layer * sizes.layers + sizes.root == sizes.trained


def test_adapters_are_counted_as_peft_makes_them() -> None:
    sizes = sizes_of(SMALL, lora_rank=64)
    assert (sizes.trained, sizes.ranks, sizes.fused_mlp) == (35_192_832, 7 * 64, True)
    assert sizes.frozen == 494_032_768
    assert not sizes_of(SMALL, lora_rank=64, lora_dropout=0.1).fused_mlp


def test_weights_gradients_and_moments_are_those_of_an_engine() -> None:
    dist.start()
    try:
        config = qwen2_config()
        model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED)
        documents = RandomDocuments(8)
        engine = Engine(TokenScorer(model), OptimConfig(), total_steps=1, device=torch.device("cpu"), compute_dtype=torch.bfloat16)
        settings = SFTConfig(data=DataConfig(train_files="x", micro_batch_size_per_gpu=8, max_length=64))
        loader = Loader(documents, packing_of(settings.data, ASSUMED), rows_per_step=8, seed=1)
        engine.backward(loader.step(0).micro_batches, sft)
    finally:
        dist.stop()
    sizes, work = sizes_of(config), Work(1, 1)
    held = {id(p): p for p in (*engine.trained, *engine.weights.copies.values())}
    moments = [x for p in engine.trained for name, x in optimizer_state(engine.optimizer, p).items() if name != "step"]
    assert nbytes(list(held.values())) == memory.weights(sizes, work)
    assert nbytes(moments) == memory.optimizer(sizes, work)
    assert nbytes([p.grad for p in engine.trained if p.grad is not None]) == memory.gradients_in_update(sizes, work)


def nbytes(tensors: list[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def test_shards_offloading_and_whole_copies_differ_as_they_should() -> None:
    sizes, one = sizes_of(LARGE), Work(8192, 4096)
    sharded, halves = replace(one, gpus=16, shards=8), replace(one, gpus=16, shards=2)
    for part in (memory.weights, memory.optimizer, memory.gradients_in_update):
        assert part(sizes, sharded) == part(sizes, halves) / 4 > 0
    whole = replace(one, gpus=16, strategy="ddp")
    for part in (memory.weights, memory.optimizer):
        assert part(sizes, whole) == part(sizes, one) > part(sizes, halves)
    assert memory.gradients_in_update(sizes, whole) == 2 * memory.gradients_in_update(sizes, halves)
    offloaded = replace(one, offload=True)
    assert memory.weights(sizes, offloaded) == memory.optimizer(sizes, offloaded) == memory.state_bytes(sizes, offloaded) == 0
    assert memory.unsharded_weights(sizes, replace(sharded, resharded=False)) > memory.unsharded_weights(sizes, sharded) > 0


# --- the plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems in train.jsonl, and a small model without its weights beside a tokenizer."""
    folder = write_problems_and_model(tmp_path_factory.mktemp("plan"))
    (folder / "model" / "model.safetensors").unlink()
    qwen2_large = folder / "large"
    LARGE.save_pretrained(qwen2_large)
    return folder


def config_of(folder: Path, **changes: Any) -> SFTConfig:
    data = DataConfig(train_files="x", max_length=2048, micro_batch_size_per_gpu=16)
    config = SFTConfig(data=data, model=ModelConfig(partial_pretrain=str(folder / "large"), compile=True))
    return changed(config, {key.replace("__", "."): value for key, value in changes.items()})


def plan_of(config: SFTConfig, gpus: int = 1) -> Plan:
    return plan_run(config, DOCUMENTS, Outline(config.model), ASSUMED.planned(gpus))


DOCUMENTS = RandomDocuments(200, longest=2000)


@pytest.mark.parametrize(("groups", "context"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("packing", [True, False])
def test_the_largest_micro_batch_is_that_of_the_loader(packing: bool, groups: int, context: int, folder: Path) -> None:
    settings = {
        "data.packing": packing,
        "data.max_tokens_per_micro_batch": 4096 if packing else None,
        "model.context_parallel_size": context,
    }
    config = changed(config_of(folder), settings)
    planned = plan_of(changed(config, {"data.train_batch_size": 30}), groups * context)
    loaders = [Loader(DOCUMENTS, packing_of(config.data, ASSUMED), 30, 1, rank, groups, 0, context) for rank in range(groups)]
    batches = [loader.step(number).micro_batches for loader in loaders for number in range(planned.steps.total)]
    assert planned.work.tokens == max(len(batch.input_ids_T) for step in batches for batch in step)
    assert planned.steps.total == planned.steps.per_epoch == loaders[0].steps_per_epoch


@pytest.mark.parametrize("tokens", [1024, 9000])
def test_micro_batches_that_are_recorded_are_as_large_as_their_recording(tokens: int, folder: Path) -> None:
    config = config_of(folder, data__train_batch_size=1)
    decided = replace(plan_of(config).decisions, graph_tokens=2048)
    sizes, largest = sizes_of(SMALL), MicroBatch(tokens, 700, 1)
    work = work_of(config, sizes, decided, largest)
    assert (work.captured, work.tokens, work.trained_tokens) == ((True, 1024, 768) if tokens == 1024 else (False, tokens, 700))
    assert not work_of(config, sizes, decided, largest._replace(in_step=2)).captured
    assert not work_of(config, sizes, replace(decided, graph_tokens=0), largest).captured


CHANGES = [
    {},
    {"model__enable_gradient_checkpointing": False},
    {"model__lora_rank": 16},
    {"model__strategy": "ddp", "model__param_dtype": "float32"},
    {"data__packing": False, "optim__name": "adamw_8bit", "model__param_dtype": "bfloat16"},
    {"model__fsdp_config.cpu_offload": True},
]


@pytest.fixture(scope="module")
def outlines(folder: Path) -> Outline:
    """The large model, built once for all settings."""
    return Outline(config_of(folder).model)


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("changes", CHANGES)
def test_what_the_plan_advises_makes_the_run_fit(changes: dict[str, Any], gpus: int, folder: Path, outlines: Outline) -> None:
    config = config_of(folder, **changes)
    outline = outlines.with_settings(config.model)
    planned = plan_run(config, DOCUMENTS, outline, ASSUMED.planned(gpus))
    lines = describe(planned, config, DOCUMENTS, outline).splitlines()
    for size, gib in CARDS.items():
        (line,) = (line for line in lines if line.startswith(f"{size:>5} GB: "))
        assert ("does not fit" not in line) == planned.fits(gib * GIB)
        if "does not fit" in line:
            better, gpus_then = followed(line.partition("does not fit; ")[2], config, gpus)
            assert (better, gpus_then) != (config, gpus)
            better.check()
            assert plan_run(better, DOCUMENTS, outlines.with_settings(better.model), ASSUMED.planned(gpus_then)).fits(gib * GIB)


def followed(advice: str, config: SFTConfig, gpus: int) -> tuple[SFTConfig, int]:
    """The config as advised, and the number of GPUs."""
    words = advice.partition(" (-")[0].split()
    pairs = [word.split("=") for word in words if "=" in word]
    return changed(config, {key: argument(key, text).value for key, text in pairs}), int(words[0]) if words[1:2] == ["GPUs"] else gpus


def test_the_mildest_change_that_fits_is_named(folder: Path) -> None:
    """For a full run of 7B without checkpointing, by the GiB of a GPU."""
    config = config_of(folder, model__enable_gradient_checkpointing=False)
    advice = adviser(config, DOCUMENTS, Outline(config.model), plan_of(config))
    found = {gib: advice(gib * GIB).partition(" (-")[0] for gib in (150, 139.7, 79.1, 39.4, 15.6, 8.0, 2.0)}
    assert found == {
        150: "model.enable_gradient_checkpointing=selective",
        139.7: "model.enable_gradient_checkpointing=true",
        79.1: "optim.name=adamw_8bit model.enable_gradient_checkpointing=true",
        39.4: "model.fsdp_config.cpu_offload=true model.enable_gradient_checkpointing=true",
        15.6: "model.fsdp_config.cpu_offload=true model.enable_gradient_checkpointing=true data.max_tokens_per_micro_batch=16384",
        8.0: "model.fsdp_config.cpu_offload=true model.lora_rank=32 model.enable_gradient_checkpointing=true "
        "data.max_tokens_per_micro_batch=4096",
        2.0: "a smaller model, or shorter rows",
    }


def test_hints_leave_alone_what_is_so_already_and_what_this_machine_cannot_do(folder: Path) -> None:
    config = config_of(folder, optim__name="adamw_8bit", model__lora_rank=8)
    for changes, gpus in hints(config, 1):
        assert gpus >= 1 and changes.get("model.lora_rank") is None
    planned = plan_of(config_of(folder))
    small = replace(planned, decisions=replace(planned.decisions, hardware=replace(ASSUMED, host_bytes=10**9)))
    config = config_of(folder)
    assert "cpu_offload" in adviser(config, DOCUMENTS, Outline(config.model), planned)(22 * GIB)
    assert "cpu_offload" not in adviser(config, DOCUMENTS, Outline(config.model), small)(22 * GIB)


def on_a_gpu(gib: float, planned: Plan) -> Plan:
    hardware = replace(planned.hardware, gpu_bytes=int(gib * GIB), is_here=True)
    return replace(planned, decisions=replace(planned.decisions, hardware=hardware))


def test_an_estimate_warns_and_only_what_is_certain_stops_a_run(folder: Path) -> None:
    config = config_of(folder, model__enable_gradient_checkpointing=False)
    planned, outline = plan_of(config), Outline(config.model)
    certain = memory.state_bytes(planned.decoder, planned.work) / GIB
    needed = planned.needed / GIB
    assert certain < needed
    assert check_room(on_a_gpu(needed + 1, planned), config, DOCUMENTS, outline) is None
    warning = check_room(on_a_gpu(certain + 1, planned), config, DOCUMENTS, outline)
    assert warning is not None and f"{needed:.1f} GiB" in warning and "model.enable_gradient_checkpointing=" in warning
    with pytest.raises(UserError, match=f"take {certain:.1f} GiB") as found:
        check_room(on_a_gpu(certain - 1, planned), config, DOCUMENTS, outline)
    assert found.value.fix


def test_the_gpu_that_is_here_has_a_line_of_its_own(folder: Path) -> None:
    config = config_of(folder)
    planned = on_a_gpu(500, plan_of(config))
    assert describe(planned, config, DOCUMENTS, Outline(config.model)).endswith("this GPU: fits")
    assert "this GPU" not in describe(plan_of(config), config, DOCUMENTS, Outline(config.model))


def test_auto_keeps_small_models_whole_and_shards_large_ones(folder: Path) -> None:
    assert plan_of(config_of(folder, model__partial_pretrain=str(folder / "model")), 4).work.strategy == "ddp"
    large = plan_of(config_of(folder), 4).work
    assert (large.strategy, large.shards) == ("fsdp2", 4)


# --- the command


def words(folder: Path, **changes: object) -> list[str]:
    keys: dict[str, object] = {
        "data.train_files": folder / "train.jsonl",
        "data.cache_dir": folder / "cache",
        "data.train_batch_size": 6,
        "model.partial_pretrain": folder / "model",
        "trainer.default_local_dir": folder / "run",
    }
    return [f"{key}={value}" for key, value in (keys | {key.replace("__", "."): value for key, value in changes.items()}).items()]


def call(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["verl", *argv])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    dist.stop()
    return int(ended.value.code or 0)


def test_dry_run_and_the_command_print_the_same_write_nothing_and_read_no_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "plan", *words(folder)) == 0
    printed = capsys.readouterr().out
    before = sorted(folder.rglob("*"))
    fsdp_sft_trainer.main(words(folder, trainer__dry_run="true"))
    assert capsys.readouterr().out == printed
    assert sorted(folder.rglob("*")) == before
    assert not (folder / "run").exists()
    assert "steps: 14 (14 per epoch) of 6 rows" in printed and "16 GB: fits" in printed


def test_the_command_plans_for_gpus_that_are_not_here(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "plan", "--gpus", "8", *words(folder, model__strategy="fsdp2", data__train_batch_size="null")) == 0
    printed = capsys.readouterr().out
    assert "8 GPUs, weights sharded over 8" in printed and "of 32 rows" in printed


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model__partial_pretrain": "/nowhere"}, "no such model directory"),
        ({"model__fsdp_config__shard_size": 2}, "1 processes are not a multiple of 2"),
        ({"model__context_parallel_size": 2}, "1 processes are not a multiple of 2"),
        ({"model__lora_rank": 4, "model__target_modules": "[nowhere]"}, "no module matches 'nowhere'"),
        ({"data__max_length": 8}, "longer than data.max_length"),
    ],
)
def test_a_wrong_input_is_a_user_error(
    changes: dict[str, Any], what: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "plan", *words(folder, **changes)) == 2
    assert what in capsys.readouterr().err


def test_a_teacher_is_counted_once_and_shared_by_shards(folder: Path) -> None:
    """In bfloat16, without gradients and optimizer; no step is a CUDA graph then, and a chunk of logits is compared in float32."""
    teacher = {"teacher__partial_pretrain": str(folder / "model")}
    weights = Outline(ModelConfig(partial_pretrain=str(folder / "model"))).parameters
    for gpus, strategy in ((1, "auto"), (4, "fsdp2")):
        plain, taught = (plan_of(config_of(folder, model__strategy=strategy, **changes), gpus) for changes in ({}, teacher))
        assert taught.work.teacher == weights and not taught.work.captured
        more = memory.weights(taught.decoder, taught.work) - memory.weights(plain.decoder, plain.work)
        assert more == 2 * weights / (1 if gpus == 1 else 4)
        assert memory.optimizer(taught.decoder, taught.work) == memory.optimizer(plain.decoder, plain.work)
        assert memory.loss(taught.decoder, taught.work) > memory.loss(plain.decoder, plain.work)
    config = config_of(folder, **teacher)
    assert f"with a teacher of {weights:,} weights" in describe(plan_of(config), config, DOCUMENTS, Outline(config.model))
