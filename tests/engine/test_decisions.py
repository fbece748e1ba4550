"""Every choice of a run: a table of decisions on both sides of each threshold, and that moving any threshold moves the table."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from decided import decided
from tiny import RandomDocuments, qwen2_config, write_model, write_problems_and_model
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, BartConfig, OPTConfig, PretrainedConfig, Qwen2Config

from verl import dist
from verl.config.pairs import PairsConfig
from verl.config.ppo import PPOConfig, longest_sample
from verl.config.sft import DataConfig, SFTConfig
from verl.config.shared import FsdpConfig, ModelConfig, OptimConfig
from verl.engine import build as building
from verl.engine import decisions
from verl.engine.decisions import (
    Decisions,
    Workload,
    choose_spread,
    decide,
    packing_of,
    packing_of_pairs,
    token_budget_of_answers,
)
from verl.engine.hardware import ASSUMED, Hardware, measure
from verl.engine.layers import decoder_layers
from verl.engine.outline import Outline, training_flops
from verl.errors import UserError
from verl.models.attention import packed
from verl.models.attention.flash import NOT_INSTALLED, Heads
from verl.models.attention.packed import PACKED_PATH, AttentionChoice
from verl.models.load import load_tokenizer
from verl.models.randomness import left_out_layers
from verl.plan.plan import plan_run
from verl.trainer import fsdp_sft_trainer

CPU = torch.device("cpu")


def qwen(hidden: int, intermediate: int, layers: int, heads: int) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    )


MODELS = {
    "0.5B": qwen(896, 4864, 24, 14),  # 494,032,768 parameters
    "1.5B": qwen(1536, 8960, 28, 12),  # 1,543,714,304
    "3B": qwen(2048, 11008, 36, 16),  # 3,085,938,688
    "tiny": qwen2_config(),
}


OUTLINES: dict[str, Outline] = {}  # made once, as in a run


def outline_of(model: str, **settings: Any) -> Outline:
    key = f"{model} {settings}"
    if key not in OUTLINES:
        if settings:
            OUTLINES[key] = outline_of(model).with_settings(ModelConfig(partial_pretrain=model, **settings))
        else:
            with torch.device("meta"):
                OUTLINES[key] = Outline(ModelConfig(partial_pretrain=model), AutoModelForCausalLM.from_config(MODELS[model]))
    return OUTLINES[key]


GPU = Hardware(torch.device("cuda"), gpu_bytes=80 * 2**30, peak_flops=1e12, capability=9)
CPUS = Hardware(CPU)
RUN = Workload(total_steps=100, total_tokens=10**9, document_tokens=5000.0, token_budget=65536)
OFFLOADED = {"fsdp_config": FsdpConfig(cpu_offload=True)}


@dataclass
class Case:
    """What is decided for, where it differs from a long run of a model of 0.5B on one GPU, and the fields that are expected."""

    expected: dict[str, Any] | type[UserError]
    settings: dict[str, Any] = field(default_factory=dict)
    model: str = "0.5B"
    hardware: Hardware = GPU
    run: Workload = RUN
    scalar_head: bool = False

    def found(self) -> dict[str, Any] | type[UserError]:
        """Those fields, as they are decided now."""
        outline = outline_of(self.model, **self.settings)
        try:
            found = decide(outline, self.hardware, self.run, choose_spread(outline, self.hardware), scalar_head=self.scalar_head)
        except UserError:
            return UserError
        looked_at = flat(found)
        return looked_at if self.expected is UserError else {name: looked_at[name] for name in self.expected}  # type: ignore[union-attr]


def flat(found: Decisions) -> dict[str, Any]:
    names = {name: getattr(found, name) for name in ("compiled", "graph_tokens", "compute_dtype", "param_dtype", "checkpointing", "shards")}
    return {**names, "strategy": found.spread.strategy, "pin": found.spread.sharding.pin, "kernel": found.attention.kernel}


def gpus(**changes: Any) -> Hardware:
    return replace(GPU, **{"processes": 2, "local_processes": 2, **changes})


def run_of(**changes: Any) -> Workload:
    return replace(RUN, **changes)


TABLE = {
    # 18 bytes a parameter in a quarter of a GPU; 2 where it is frozen
    "all weights on each GPU": Case({"strategy": "ddp", "shards": 1}, hardware=gpus(gpu_bytes=35_570_359_296)),
    "sharded, by a byte": Case({"strategy": "fsdp2", "shards": 2}, hardware=gpus(gpu_bytes=35_570_359_295)),
    "frozen weights on each GPU": Case({"strategy": "ddp"}, {"lora_rank": 8}, hardware=gpus(gpu_bytes=3_952_262_144)),
    "frozen and sharded, by a byte": Case({"strategy": "fsdp2"}, {"lora_rank": 8}, hardware=gpus(gpu_bytes=3_952_262_143)),
    "as asked for": Case({"strategy": "fsdp2"}, {"strategy": "fsdp2"}, "tiny", hardware=gpus()),
    "bfloat16 weights are sharded": Case({"strategy": "fsdp2", "param_dtype": torch.bfloat16}, {"param_dtype": "bfloat16"}, "tiny", gpus()),
    "in groups": Case({"strategy": "fsdp2", "shards": 1}, {"fsdp_config": FsdpConfig(shard_size=1)}, "tiny", gpus()),
    "groups that do not divide": Case(UserError, {"fsdp_config": FsdpConfig(shard_size=3)}, hardware=gpus()),
    # 16 bytes a parameter in host memory, half of them of each of two processes, and 8 more where they are pinned
    "offloaded and pinned": Case({"pin": True}, OFFLOADED, hardware=gpus(host_bytes=11_856_786_432)),
    "offloaded, not pinned": Case({"pin": False}, OFFLOADED, hardware=gpus(host_bytes=11_856_786_431)),
    "offloaded, just": Case({"pin": False}, OFFLOADED, hardware=gpus(host_bytes=7_904_524_288)),
    "no room to offload": Case(UserError, OFFLOADED, hardware=gpus(host_bytes=7_904_524_287)),
    "offloaded beside adapters, just": Case({"pin": False}, {**OFFLOADED, "lora_rank": 8}, hardware=gpus(host_bytes=988_065_536)),
    "no room beside adapters": Case(UserError, {**OFFLOADED, "lora_rank": 8}, hardware=gpus(host_bytes=988_065_535)),
    # 15 seconds at the GPU's rate
    "long enough to compile": Case({"compiled": True}, run=run_of(total_tokens=5062)),
    "too short to compile": Case({"compiled": False, "graph_tokens": 0}, run=run_of(total_tokens=5061)),
    "long enough, of two": Case({"compiled": True}, hardware=gpus(), run=run_of(total_tokens=10_124)),
    "too short, of two": Case({"compiled": False}, hardware=gpus(), run=run_of(total_tokens=10_123)),
    "adapters, long enough": Case({"compiled": True}, {"lora_rank": 8}, run=run_of(total_tokens=7492)),
    "adapters, too short": Case({"compiled": False}, {"lora_rank": 8}, run=run_of(total_tokens=7491)),
    "a critic, long enough": Case({"compiled": True, "graph_tokens": 0}, run=run_of(total_tokens=6987), scalar_head=True),
    "a critic, too short": Case({"compiled": False}, run=run_of(total_tokens=6986), scalar_head=True),
    "compiled because asked for": Case({"compiled": True}, {"compile": True}, run=run_of(total_tokens=1)),
    "not compiled because asked for": Case({"compiled": False, "graph_tokens": 0}, {"compile": False}),
    "a GPU of unknown speed": Case({"compiled": False}, hardware=replace(GPU, peak_flops=None)),
    "no C compiler": Case({"compiled": False}, hardware=replace(GPU, has_compiler=False)),
    "no C compiler, but asked for": Case(UserError, {"compile": True}, hardware=replace(GPU, has_compiler=False)),
    # tokens × parameters of a layer, and bytes of gradients
    "recorded": Case({"graph_tokens": 9715}),
    "adapters, recorded": Case({"graph_tokens": 9630}, {"lora_rank": 8}),
    "weights in 4 bits, recorded": Case({"graph_tokens": 9819}, {"lora_rank": 8, "load_in_4bit": True}, "1.5B"),
    "at most so many tokens": Case({"graph_tokens": 16384}, model="tiny", run=run_of(total_tokens=10**12)),
    "gradients of 3 GB": Case({"graph_tokens": 3627}, model="1.5B"),
    "gradients of 6 GB": Case({"graph_tokens": 0, "compiled": True}, model="3B"),
    "not recorded because asked for": Case({"graph_tokens": 0, "compiled": True}, {"cuda_graphs": False}),
    "not recorded on several GPUs": Case({"graph_tokens": 0, "compiled": True}, hardware=gpus()),
    "not recorded where offloaded": Case({"graph_tokens": 0, "compiled": True}, OFFLOADED),
    "not recorded in float32": Case({"graph_tokens": 0, "compute_dtype": torch.float32}, {"compute_dtype": "float32"}),
    "not recorded without FlashAttention": Case({"graph_tokens": 0, "kernel": "sdpa"}, {"attn_implementation": "sdpa"}),
    # documents of 1,024 tokens in micro-batches of 16 Ki
    "short documents": Case({"kernel": "short"}, run=run_of(document_tokens=1024.0, token_budget=16384)),
    "longer documents": Case({"kernel": "fa3"}, run=run_of(document_tokens=1024.5, token_budget=16384)),
    "short documents, small batches": Case({"kernel": "fa3"}, run=run_of(document_tokens=1024.0, token_budget=16383)),
    "short documents on another GPU": Case({"kernel": "fa4"}, hardware=replace(GPU, capability=10), run=run_of(document_tokens=100.0)),
    "an older GPU": Case({"kernel": "fa2"}, hardware=replace(GPU, capability=8)),
    "asked for, and not here": Case(
        UserError, {"attn_implementation": "fa4"}, hardware=replace(GPU, refusal=lambda kernel, dtype, *heads: NOT_INSTALLED)
    ),
    "asked for on a CPU": Case(UserError, {"attn_implementation": "fa2"}, hardware=CPUS),
    # the rest is read from the config
    "a GPU": Case({"compute_dtype": torch.bfloat16, "param_dtype": torch.float32, "checkpointing": "full"}),
    "a CPU": Case({"compute_dtype": torch.float32, "compiled": False, "strategy": "fsdp2", "kernel": "fa2"}, hardware=CPUS),
    "some of it again": Case({"checkpointing": "selective"}, {"enable_gradient_checkpointing": "selective"}),
    "nothing again": Case({"checkpointing": "none"}, {"enable_gradient_checkpointing": False}),
}
DATA = DataConfig(micro_batch_size_per_gpu=3, max_length=500)
PAIRS = PairsConfig(micro_batch_size_per_gpu=3, max_length=500)


def answers(prompt: int, budget: int | None = None) -> int:
    config = PPOConfig()
    config.data.max_prompt_length, config.rollout.max_new_tokens, config.data.max_tokens_per_micro_batch = prompt, 24, budget
    return token_budget_of_answers(config.data.max_tokens_per_micro_batch, longest_sample(config))


BUDGETS = {
    "fine-tuning": lambda: packing_of(DATA, GPU),
    "padded": lambda: packing_of(replace(DATA, packing=False), GPU),
    "on a CPU": lambda: packing_of(replace(DATA, max_tokens_per_micro_batch=4000), CPUS),
    "pairs": lambda: packing_of_pairs(PAIRS, GPU),
    "answers": lambda: answers(1000),
    "long answers": lambda: answers(20_000),
    "asked for": lambda: answers(1000, 2048),
}
EXPECTED_BUDGETS = {
    "fine-tuning": decisions.Packing(3, 1500, 128),
    "padded": decisions.Packing(3, None, 128),
    "on a CPU": decisions.Packing(3, 4000, 1),
    "pairs": decisions.Packing(3, 3000, 128),
    "answers": 16384,
    "long answers": 20_024,
    "asked for": 2048,
}


@pytest.mark.parametrize("name", TABLE)
def test_each_case_is_decided_as_the_table_says(name: str) -> None:
    assert TABLE[name].found() == TABLE[name].expected


@pytest.mark.parametrize("name", BUDGETS)
def test_micro_batches_are_as_large_as_the_table_says(name: str) -> None:
    assert BUDGETS[name]() == EXPECTED_BUDGETS[name]


def thresholds() -> list[str]:
    """Names of the numbers by which something is decided."""
    values = {name: value for name, value in vars(decisions).items() if name.isupper()}
    by_capability = [name for name, value in values.items() if isinstance(value, dict) and all(type(v) is int for v in value.values())]
    return [name for name, value in values.items() if type(value) in (int, float)] + by_capability


@pytest.mark.parametrize("factor", [2, 0.5])
@pytest.mark.parametrize("name", [name for name in thresholds() if name != "GIB"])
def test_moving_any_threshold_changes_the_table(name: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    value = getattr(decisions, name)
    moved = {key: type(old)(old * factor) for key, old in value.items()} if isinstance(value, dict) else type(value)(value * factor)
    monkeypatch.setattr(decisions, name, moved)
    found = {key: case.found() for key, case in TABLE.items()} | {key: budget() for key, budget in BUDGETS.items()}
    assert found != {key: case.expected for key, case in TABLE.items()} | EXPECTED_BUDGETS


def test_the_thresholds_are_found_by_their_form() -> None:
    assert {"SMALL_SHARE", "WORTH_SECONDS", "SHORT_TOKENS", "TILE"} <= set(thresholds())


# --- what decisions are made from


@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 3, "tie_word_embeddings": False}])
def test_the_outline_of_a_critic_counts_the_arithmetic_of_one(changes: dict[str, object]) -> None:
    config = qwen2_config(**changes)

    def model(kind: Any, of: PretrainedConfig) -> Any:
        with torch.device("meta"):
            return kind.from_config(of)

    outline = Outline(ModelConfig(partial_pretrain="x"), model(AutoModelForCausalLM, config))
    critic = model(AutoModelForTokenClassification, qwen2_config(**changes, num_labels=1))
    assert outline.flops(1000, scalar_head=True) == training_flops(critic)(1000, 1000)
    assert outline.flops(1000) == training_flops(outline.model)(1000, 1000) > outline.flops(1000, scalar_head=True)


def test_adapters_are_put_beside_a_copy_of_the_outline() -> None:
    outline = outline_of("tiny", lora_rank=8)
    assert outline.parameters == outline_of("tiny").parameters == sum(p.numel() for p in outline.model.parameters())
    assert outline.trained_parameters == sum(p.numel() for p in outline.adapted.parameters()) - outline.parameters > 0
    assert all(p.is_meta for p in outline.adapted.parameters())


def test_without_a_gpu_nothing_asks_for_the_models_shapes() -> None:
    outline = Outline(ModelConfig(partial_pretrain="/nowhere"))
    outline.heads, outline.path = (Heads(4, 2, 16),), PACKED_PATH  # from the config alone
    assert not decide(outline, CPUS, RUN, choose_spread(outline, CPUS)).compiled


def test_one_attention_serves_all_models_of_a_process() -> None:
    asked: list[tuple[Heads, ...]] = []
    hardware = replace(GPU, refusal=lambda kernel, dtype, *heads: asked.append(heads))
    other = Heads(2, 1, 32)
    decide(outline_of("tiny"), hardware, RUN, choose_spread(outline_of("tiny"), hardware), other_heads=[other, Heads(4, 2, 16), other])
    assert set(asked) == {(Heads(4, 2, 16), other)}


@pytest.mark.parametrize("keys", [{}, {"context_parallel_size": 2, "strategy": "ddp"}])
def test_processes_that_would_leave_out_different_layers_are_refused(keys: dict[str, Any], tmp_path: Path) -> None:
    """Each would wait for another one in a layer that only one of them computes."""
    OPTConfig(layerdrop=0.5).save_pretrained(tmp_path)
    ranks, dropping = Hardware(CPU, processes=2), Outline(ModelConfig(partial_pretrain=str(tmp_path), **keys))
    with pytest.raises(UserError, match=r"opt model leaves out layers at random in training \(layerdrop=0.5\)") as error:
        choose_spread(dropping, ranks)
    assert "layerdrop=0 in its config.json" in str(error.value.fix) and ("ddp" in str(error.value.fix)) == (not keys)
    choose_spread(dropping, CPUS)
    choose_spread(dropping, ranks, holds_still=True)
    choose_spread(Outline(ModelConfig(partial_pretrain=str(tmp_path), strategy="ddp")), ranks)
    assert left_out_layers(BartConfig(decoder_layerdrop=0.1)) == {"decoder_layerdrop": 0.1}
    assert not left_out_layers(BartConfig(encoder_layerdrop=0.1))  # a causal language model has no encoder


def test_what_is_here_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "world_size", lambda: 6)
    monkeypatch.setattr(dist, "host_memory", lambda: 10**9)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr("verl.dist.shutil.which", lambda name: None)
    assert measure(CPU) == Hardware(CPU, processes=6, local_processes=3, host_bytes=10**9, has_compiler=False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("", (), {"total_memory": 7}))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    found = measure(torch.device("cuda", 1))
    assert (found.gpu_bytes, found.peak_flops, found.capability, found.is_here) == (7, 312e12, 8, True)


def test_a_plan_for_gpus_that_are_not_here_trusts_that_their_hosts_have_memory() -> None:
    here = replace(GPU, host_bytes=1, refusal=lambda *_: NOT_INSTALLED)
    there = here.planned(4)
    assert (there.processes, there.host_bytes, there.gpu_bytes) == (4, None, here.gpu_bytes)
    assert here.planned(1).host_bytes == 1 and here.planned(1).refusal("fa3", torch.bfloat16) is None
    assert not ASSUMED.is_here and ASSUMED.has_gpu


# --- who reads them


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_problems_and_model(tmp_path_factory.mktemp("decisions"))


class LookedAt(Exception):  # noqa: N818
    """Ends a run where its model would be loaded."""


def decided_by_run(words: list[str], hardware: Hardware, monkeypatch: pytest.MonkeyPatch) -> Decisions:
    def stop(settings: ModelConfig, optim: OptimConfig, tokenizer: Any, found: Decisions, **options: Any) -> None:
        raise LookedAt(found)

    monkeypatch.setattr(fsdp_sft_trainer, "build", stop)
    monkeypatch.setattr(fsdp_sft_trainer, "measure", lambda device: hardware)
    with pytest.raises(LookedAt) as caught:
        fsdp_sft_trainer.main(words)
    found: Decisions = caught.value.args[0]
    return found


def decided_by_plan(words: list[str], hardware: Hardware, monkeypatch: pytest.MonkeyPatch) -> Decisions:
    plans: list[Any] = []
    monkeypatch.setattr(fsdp_sft_trainer, "ASSUMED", hardware)
    monkeypatch.setattr("verl.plan.report.describe", lambda plan, *words: plans.append(plan))
    fsdp_sft_trainer.main([*words, "trainer.dry_run=true"])
    found: Decisions = plans[0].decisions
    return found


@pytest.mark.parametrize(
    ("changes", "hardware"),
    [
        ("", GPU),
        ("", replace(GPU, peak_flops=1e6, gpu_bytes=2**26)),
        ("model.lora_rank=4", replace(GPU, peak_flops=1e6, capability=10)),
        ("model.strategy=ddp model.compile=false trainer.total_epochs=7 data.train_batch_size=5", GPU),
        ("model.enable_gradient_checkpointing=selective model.param_dtype=bfloat16 data.packing=false", replace(GPU, peak_flops=1e6)),
        ("model.fsdp_config.cpu_offload=true", replace(GPU, host_bytes=10**9)),
    ],
)
def test_a_plan_decides_what_the_run_does(changes: str, hardware: Hardware, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"data.train_files": "train.jsonl", "data.cache_dir": "cache", "model.partial_pretrain": "model"}
    words = [*(f"{key}={folder / name}" for key, name in files.items()), f"trainer.default_local_dir={folder / 'run'}", *changes.split()]
    of_run = decided_by_run(words, hardware, monkeypatch)
    assert decided_by_plan(words, hardware, monkeypatch) == of_run
    assert of_run != decided_by_plan([*words, "model.attn_implementation=sdpa"], hardware, monkeypatch)  # they can differ


def test_a_plan_cuts_rows_up_as_the_loaders_of_many_processes_do(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware, documents = replace(GPU, processes=4), RandomDocuments(50)
    config = SFTConfig(data=DataConfig(micro_batch_size_per_gpu=2), model=ModelConfig(partial_pretrain="tiny"))
    planned = plan_run(config, documents, outline_of("tiny"), hardware)
    monkeypatch.setattr(dist, "world_size", lambda: 4)
    loader = fsdp_sft_trainer.build_loader(config.data, documents, 1, hardware)  # type: ignore[arg-type]
    assert (loader.rows_per_step, loader.steps_per_epoch) == (planned.steps.rows, planned.steps.per_epoch) == (8, 7)
    assert Workload.of(documents.lengths_N, 7, 7, loader.packing) == planned.decisions.workload
    assert planned.decisions.workload.total_tokens == documents.lengths_N.sum()


def test_a_run_is_as_long_and_its_documents_as_those_that_train() -> None:
    lengths = RandomDocuments(5).lengths_N
    workload = Workload.of(lengths, 30, 10, packing_of(DATA, CPUS))
    assert workload.total_tokens == 3 * lengths.sum() and workload.token_budget == 1500
    assert workload.document_tokens == pytest.approx(sum(n * n for n in lengths.tolist()) / lengths.sum())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own making, when its compiler is first imported
def test_an_engine_is_built_as_it_was_decided(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ModelConfig(partial_pretrain=str(folder / "model"))
    tokenizer, device = load_tokenizer(settings.partial_pretrain), dist.start()
    try:
        plain = decided(settings)

        def build(**changes: Any) -> building.Built:
            return building.build(settings, OptimConfig(), tokenizer, replace(plain, **changes), stop_ids=[1], seed=1)

        built = build()
        assert built.engine.captured is None and built.engine.compute_dtype == torch.float32 and built.engine.device == device
        assert not any(layer._compiled_call_impl for layer in decoder_layers(built.loaded.model))
        forward = decoder_layers(built.loaded.model)[0].forward
        assert forward.__qualname__.startswith("_recomputed"), "model.enable_gradient_checkpointing is true"
        assert "not compiled (auto: no GPU whose speed is known)" in built.describe() and packed._kernel == "fa2"

        monkeypatch.setattr(packed, "_kernel", "fa2")
        other = build(
            checkpointing="none",
            compiled=True,
            why_compiled="because",
            graph_tokens=1234,
            compute_dtype=torch.bfloat16,
            param_dtype=torch.bfloat16,
            attention=AttentionChoice("sdpa"),
        )
        assert packed._kernel == "sdpa"
        assert all(layer._compiled_call_impl for layer in decoder_layers(other.loaded.model))
        assert "_recomputed" not in decoder_layers(other.loaded.model)[0].forward.__qualname__
        assert other.engine.captured is not None and other.engine.captured._largest_tokens == 1234
        assert {p.dtype for p in other.engine.trained} == {torch.bfloat16} and other.engine.compute_dtype == torch.bfloat16
        assert "layers compiled (because)" in other.describe()
    finally:
        dist.stop()


def test_a_critic_is_spread_as_its_actor_is(tmp_path: Path) -> None:
    path = write_model(tmp_path, qwen2_config(num_attention_heads=2, num_key_value_heads=1))
    outline = Outline(ModelConfig(partial_pretrain=str(path)))
    spread = choose_spread(outline_of("3B"), gpus())
    found = decide(outline, gpus(), RUN, spread, scalar_head=True)
    assert found.spread == spread and found.is_sharded and found.shards == 2
