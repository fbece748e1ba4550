"""Adapters of mixtures of experts: as peft has them, read wherever training writes them, and none on routers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import qwen2_config
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PretrainedConfig, Qwen2ForCausalLM

from verl.config.commands import ExportConfig
from verl.config.load import load_config
from verl.config.shared import ModelConfig
from verl.engine.outline import Outline
from verl.errors import UserError
from verl.models import export as exporting
from verl.models.adapters import files, routers, targets
from verl.models.adapters.lora import add_adapters, check_adapters, lora_config
from verl.models.adapters.merged import merged_tensors
from verl.models.adapters.operators import use_operators
from verl.models.inference import load_for_inference
from verl.models.load import load_for_training, outline
from verl.models.saved import export_adapter
from verl.models.tiny import tiny_tokenizer
from verl.prove.twin import random_model, twin_config

# peft looks for the ranks of experts among modules, does not find them there, and says so; it applies them all the same.
FALSE = "ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"
pytestmark = [pytest.mark.usefixtures("process_group"), pytest.mark.filterwarnings(FALSE)]

IDS = torch.arange(3, 23)[None]
SMALL: dict[str, Any] = dict(
    vocab_size=448, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
)  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    # A layer without experts, and shared experts, whose linear layers have names that peft takes for those of experts.
    "deepseek_v3": dict(
        num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
        first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    ),
    "qwen2_moe": dict(moe_intermediate_size=16, shared_expert_intermediate_size=24, num_experts=4, num_experts_per_tok=2),
    # Matrices of experts are [experts, inputs, outputs].
    "llama4_text": dict(
        intermediate_size=16, intermediate_size_mlp=48, num_local_experts=4, num_experts_per_tok=1, head_dim=8, attention_chunk_size=64
    ),
    # Routers are linear layers: of a class of its own, and plain ones.
    "phimoe": dict(num_local_experts=4, num_experts_per_tok=2),
    "jetmoe": dict(num_local_experts=4, num_experts_per_tok=2, kv_channels=8, num_key_value_heads=2, num_attention_heads=4),
    # The pattern that renames shared_expert while the model is loaded also fits shared_experts.
    "laguna": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16, head_dim=8),
}  # fmt: skip


def config(name: str) -> PretrainedConfig:
    return AutoConfig.for_model(name, **{**SMALL, **FAMILIES[name]})


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(request.param, tmp_path_factory.mktemp("base") / request.param)


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("deepseek_v3", tmp_path_factory.mktemp("base") / "deepseek_v3")


def write(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3) if parameter.dim() > 1 else None
    model.save_pretrained(folder)
    tiny_tokenizer(["to be or not to be"], vocab_size=400).save_pretrained(folder)
    return folder


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    model.eval()
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    inner.set_attn_implementation("sdpa")
    result: Tensor = model(input_ids=IDS, use_cache=False).logits[0]
    return result


def trained(folder: Path, **changes: Any) -> PeftModel:
    """A model with adapters, after what would be some steps."""
    settings = ModelConfig(**{"partial_pretrain": str(folder), "lora_rank": 4, "lora_alpha": 8, **changes})
    adapted = add_adapters(load_for_training(str(folder)).model, settings, compute_dtype=torch.float32, seed=1)
    use_operators(adapted)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return adapted


def saved(adapted: PeftModel, folder: Path) -> Path:
    folder.mkdir()
    export_adapter(folder, adapted)
    return folder


def test_what_training_writes_gives_the_same_logits_wherever_it_is_loaded(base: Path, tmp_path: Path) -> None:
    adapted = trained(base)
    expected, folder = logits(adapted), saved(adapted, tmp_path / "adapter")
    assert (logits(plain(base)) - expected).abs().max() > 1e-2

    def same(found: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)

    with_peft = PeftModel.from_pretrained(plain(base), folder)
    same(logits(with_peft))
    merged = dict(merged_tensors(adapted))
    for name, parameter in with_peft.merge_and_unload().named_parameters():
        torch.testing.assert_close(merged.pop(name), parameter.data)
    assert not merged
    same(logits(plain(folder)))
    same(logits(load_for_inference(str(folder), device="cpu", dtype=torch.float32)))
    going_on = ModelConfig(partial_pretrain=str(base), lora_adapter_path=str(folder))
    again = add_adapters(load_for_training(str(base)).model, going_on, compute_dtype=torch.float32, seed=3)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {n for n, p in adapted.named_parameters() if p.requires_grad}
    same(logits(again))
    exported = exporting.export(load_config(ExportConfig, exporting.keyed([str(folder), str(tmp_path / "out")])))
    same(logits(plain(exported)))


def test_layers_with_transposed_weights_are_merged_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = GPT2Config(vocab_size=448, n_embd=32, n_layer=1, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(settings).save_pretrained(tmp_path)
    adapted = trained(tmp_path, target_modules=["c_attn", "c_fc"])
    merged = {name: tensor.clone() for name, tensor in merged_tensors(adapted)}
    for name, parameter in adapted.merge_and_unload().named_parameters():
        torch.testing.assert_close(merged[name], parameter.data)


def test_every_linear_layer_and_all_experts_are_trained_and_no_router(base: Path) -> None:
    adapted = trained(base)
    adapted.train()
    adapted.get_base_model().set_attn_implementation("sdpa")  # type: ignore[operator]
    torch.manual_seed(3)
    loss = adapted(input_ids=torch.randint(3, 400, (4, 32)), use_cache=False).logits.float().logsumexp(-1).square().mean()
    loss.backward()
    still = [name for name, p in adapted.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not still
    names = {files._PREFIX + targets.kind_of(name) for name in routers.router_weights(plain(base))}
    assert names
    owners = {name.rpartition(".")[0] for name in names}
    assert not any(
        targets.kind_of(name).startswith(tuple(f"{owner}." for owner in owners))
        for name, _ in adapted.named_parameters()
        if "lora_" in name
    )
    model = plain(base)
    linear = {n for n, m in model.named_modules() if type(m) is nn.Linear and "router" not in n and n != "lm_head" and len(m.weight) > 1}
    found = {n.removeprefix(files._PREFIX).partition(".lora_")[0] for n, _ in adapted.named_parameters() if ".lora_" in n}
    assert linear <= found
    assert sum("experts" in name for name in found) >= 2


ROUTERS = {
    "deepseek_v3": {"model.layers.*.mlp.gate.weight"},
    "qwen2_moe": {"model.layers.*.mlp.gate.weight"},
    "llama4_text": {"model.layers.*.feed_forward.router.weight"},
    "phimoe": {"model.layers.*.mlp.router.weight"},
    "laguna": {"model.layers.*.mlp.gate.e_score_correction_bias", "model.layers.*.mlp.gate.weight"},
    "jetmoe": {"model.layers.*.mlp.router.layer.weight", "model.layers.*.self_attention.experts.router.layer.weight"},
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("way", ["by the choice", "by the structure"])
def test_routers_are_found_without_their_names(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "by the structure":
        monkeypatch.setattr(routers, "_followed_back", lambda model: (set(), False))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(name))
    found = {targets.kind_of(found) for found in routers.router_weights(model)}
    assert found == {weight for weight in ROUTERS[name] if way == "by the choice" or weight.endswith(".weight")}  # or also biases


def test_what_is_left_out_is_named_and_counted(tmp_path: Path) -> None:
    base = write("qwen2_moe", tmp_path / "base")
    assert trained(base).left_out == (
        "all-linear leaves out: 2 with one output (model.layers.*.mlp.shared_expert_gate); 2 routers (model.layers.*.mlp.gate.weight)"
    )
    note = trained(base, use_dora=True).left_out
    assert "4 experts, which have neither DoRA nor dropout (model.layers.*.mlp.experts.down_proj, " in str(note)


def test_a_rank_above_the_size_of_layers_is_no_reason_to_refuse_and_gates_are_left_out_and_named(tmp_path: Path) -> None:
    """peft trains such an adapter, too. Of a gate with one output, no rank makes a smaller one."""
    base = write("qwen2_moe", tmp_path / "base")
    adapted = trained(base, lora_rank=64)  # above the width of 32
    assert "2 with one output (model.layers.*.mlp.shared_expert_gate)" in str(adapted.left_out)
    names = {name for name, _ in adapted.named_parameters() if "lora_" in name}
    assert not any("shared_expert_gate" in name for name in names)
    assert any("q_proj" in name for name in names) and any("mlp.experts" in name for name in names)
    expected, folder = logits(adapted), saved(adapted, tmp_path / "adapter")
    assert (logits(load_for_inference(str(folder), device="cpu", dtype=torch.float32)) - expected).abs().max() < 1e-4


def test_experts_in_another_form_are_named() -> None:
    from transformers import DbrxConfig
    from transformers.models.dbrx.configuration_dbrx import DbrxAttentionConfig, DbrxFFNConfig

    ffn = DbrxFFNConfig(ffn_hidden_size=16, moe_num_experts=4, moe_top_k=2)
    attention: Any = DbrxAttentionConfig(kv_n_heads=2)
    attention.rope_theta = 1e4
    settings = DbrxConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=64, max_seq_len=64, attn_config=attention, ffn_config=ffn)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    chosen = targets.all_linear(model, LoraConfig(r=4))
    assert chosen.modules == ["Wqkv", "out_proj"] and not chosen.parameters
    assert chosen.describe_left_out() == (
        "all-linear leaves out: 2 routers (transformer.blocks.*.ffn.router.layer.weight); 6 experts that are not stacked matrices "
        "(transformer.blocks.*.ffn.experts.mlp.v1, transformer.blocks.*.ffn.experts.mlp.w1, transformer.blocks.*.ffn.experts.mlp.w2)"
    )


def names_of_the_last_release(base: Path, folder: Path) -> Path:
    """An adapter of all-linear as peft makes it: on experts and routers, but on no layer of shared experts."""
    torch.manual_seed(1)
    adapted = get_peft_model(plain(base), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(str(folder))
    return folder


def test_adapters_that_peft_makes_are_read(deepseek: Path, tmp_path: Path) -> None:
    folder = names_of_the_last_release(deepseek, tmp_path / "peft")
    assert any("mlp.gate." in name for name in load_file(folder / files.WEIGHTS))
    expected = logits(PeftModel.from_pretrained(plain(deepseek), folder))
    found = load_for_inference(str(folder), device="cpu", dtype=torch.float32)
    torch.testing.assert_close(logits(found), expected, rtol=1e-5, atol=2e-5)
    going_on = ModelConfig(partial_pretrain=str(deepseek), lora_adapter_path=str(folder))
    again = add_adapters(load_for_training(str(deepseek)).model, going_on, compute_dtype=torch.float32, seed=3)
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=2e-5)


def test_peft_alone_would_leave_shared_experts_out(deepseek: Path, tmp_path: Path) -> None:
    """Negative control of `names_as_they_are`, and of what is written for peft."""
    names = load_file(names_of_the_last_release(deepseek, tmp_path / "peft") / files.WEIGHTS)
    assert not any("shared_experts" in name for name in names)
    folder = saved(trained(deepseek), tmp_path / "ours")
    assert any("shared_experts" in name for name in load_file(folder / files.WEIGHTS))
    settings = json.loads((folder / files.CONFIG).read_text())
    layers = [name for name in settings["target_parameters"] if name.endswith(".weight")]
    settings["target_parameters"] = sorted(set(settings["target_parameters"]) - set(layers))
    settings["target_modules"] += [name.removesuffix(".weight") for name in layers]
    (folder / files.CONFIG).write_text(json.dumps(settings))
    with_peft = PeftModel.from_pretrained(plain(deepseek), folder)
    assert not any("shared_experts" in name and "lora_" in name for name, _ in with_peft.named_parameters())


@pytest.mark.parametrize(
    ("change", "chosen"),
    [
        ({"target_modules": ["q_proj", "gate_up_proj"]}, {"self_attn.q_proj", "mlp.experts"}),
        ({"target_modules": ["shared_experts.down_proj"]}, {"mlp.shared_experts.down_proj"}),
        ({"target_modules": r".*\.experts\..*_proj"}, {"mlp.experts", "mlp.experts.base_layer"}),
    ],
)
def test_experts_are_named_like_modules(change: dict[str, Any], chosen: set[str], deepseek: Path, tmp_path: Path) -> None:
    adapted = trained(deepseek, **change)
    found = {name.partition(".lora_")[0].split("layers.")[1][2:] for name, _ in adapted.named_parameters() if ".lora_" in name}
    assert found == chosen
    folder = saved(adapted, tmp_path / "adapter")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(plain(deepseek), folder)), logits(adapted), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"target_modules": ["gate_up_proj"], "use_dora": True},
            r"model.use_dora: experts \(gate_up_proj\) cannot have adapters with DoRA",
        ),
        ({"target_modules": ["gate_up_proj"], "lora_dropout": 0.1}, r"model.lora_dropout: experts \(gate_up_proj\)"),
        ({"target_modules": ["nothing"]}, r"no module matches 'nothing'\n.*\[down_proj,gate_proj,gate_up_proj,kv"),
    ],
)
def test_what_experts_cannot_have_is_refused(change: dict[str, Any], message: str, deepseek: Path) -> None:
    settings = ModelConfig(**{"partial_pretrain": str(deepseek), "lora_rank": 4, **change})
    with pytest.raises(UserError, match=message):
        check_adapters(outline(str(deepseek)), settings, tiny_tokenizer(["to be"], vocab_size=400))


def test_a_router_with_a_class_of_its_own_is_refused_by_name(tmp_path: Path) -> None:
    base = write("phimoe", tmp_path / "base")
    with pytest.raises(UserError, match=r"mlp\.router is a PhimoeTopKRouter, whose output is not its input times its weight"):
        trained(base, target_modules=["router"])


def test_names_that_peft_would_change_are_written_as_in_the_models_files(tmp_path: Path) -> None:
    adapted = trained(write("laguna", tmp_path / "base"))
    folder = saved(adapted, tmp_path / "adapter")
    names = load_file(folder / files.WEIGHTS).keys()
    assert any(".mlp.shared_expert.up_proj" in name for name in names) and not any("shared_experts" in name for name in names)
    own = {name.replace("shared_expert.", "shared_experts."): tensor for name, tensor in load_file(folder / files.WEIGHTS).items()}
    save_file(own, folder / files.WEIGHTS, metadata={"format": "pt"})  # names of the model in memory, as another program may write them
    found = load_for_inference(str(folder), device="cpu", dtype=torch.float32)
    torch.testing.assert_close(logits(found), logits(adapted), rtol=1e-5, atol=2e-5)


def test_an_adapter_without_one_of_its_matrices_is_refused(deepseek: Path, tmp_path: Path) -> None:
    folder = saved(trained(deepseek), tmp_path / "adapter")
    weights = load_file(folder / files.WEIGHTS)
    del weights["base_model.model.model.layers.1.mlp.experts.lora_B.weight"]
    save_file(weights, folder / files.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"has no model.layers.1.mlp.experts.lora_B.weight"):
        load_for_inference(str(folder), device="cpu", dtype=torch.float32)


def test_layers_that_share_a_weight_have_no_adapter_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(qwen2_config(num_hidden_layers=2))
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    chosen = targets.all_linear(model, LoraConfig(r=4))
    assert chosen.left_out == {targets.SHARED: ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]}
    assert "up_proj" not in chosen.modules and "gate_proj" in chosen.modules
    asked = ModelConfig(partial_pretrain=str(tmp_path), lora_rank=4, target_modules=["up_proj"])
    with pytest.raises(UserError, match="has its weight in common with other layers"):
        lora_config(model, asked, None, ())


def test_a_layer_whose_adapter_peft_would_look_for_under_another_name_has_none(tmp_path: Path) -> None:
    """transformers reads `sconv.weight_proj` of a file as `sconv.weight_proj.weight`, and so changes the names of the layer's adapter."""
    if "inkling2_text" not in CONFIG_MAPPING:
        pytest.skip("this transformers does not have Inkling 2")
    model = random_model(twin_config(CONFIG_MAPPING["inkling2_text"](), 448), seed=0)
    chosen = targets.all_linear(model, LoraConfig(r=4))
    assert "model.layers.*.self_attn.k_sconv.weight_proj" in {targets.kind_of(name) for name in chosen.left_out[targets.RENAMED]}
    assert not any("weight_proj" in name for name in chosen.modules)
    asked = ModelConfig(partial_pretrain=str(tmp_path), lora_rank=4, target_modules=["weight_proj"])
    with pytest.raises(UserError, match=r"peft would look for the adapter of model.layers.\d+.self_attn.k_sconv.weight_proj under another"):
        lora_config(model, asked, None, ())


def test_a_layer_whose_weight_a_kernel_reads_has_no_adapter() -> None:
    """The code of a state-space model gives the weight of out_proj to a kernel, and calls the layer only without that kernel."""
    settings = AutoConfig.for_model("bamba", **{**SMALL, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    chosen = targets.all_linear(model, LoraConfig(r=4))
    assert chosen.left_out == {targets.READ_DIRECTLY: ["model.layers.0.mamba.out_proj"]}
    assert {"mamba.in_proj", "in_proj"} & set(chosen.modules)


def test_a_class_of_its_own_that_multiplies_as_a_linear_layer_does_gets_adapters_and_another_one_does_not() -> None:
    settings = AutoConfig.for_model("falcon", vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    assert targets.all_linear(model, LoraConfig(r=4)) == targets.Targets(targets.ALL_LINEAR)
    kind = type(model.transformer.h[0].mlp.dense_h_to_4h)
    doubled = type("Doubled", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})
    for layer in (part for part in model.modules() if isinstance(part, kind)):
        layer.__class__ = doubled
    with pytest.raises(UserError, match=r"all-linear leaves out: 8 that are no plain product .* nothing is left") as error:
        targets.all_linear(model, LoraConfig(r=4))
    assert error.value.where == "model.target_modules" and "model.lora_rank=0" in (error.value.fix or "")


def test_a_plan_counts_the_adapters_of_experts(deepseek: Path) -> None:
    settings = ModelConfig(partial_pretrain=str(deepseek), lora_rank=4, lora_alpha=8)
    assert Outline(settings).trained_parameters == sum(p.numel() for p in trained(deepseek).parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "wrong", [lambda name: name.replace("experts.base_layer", "experts.other"), lambda name: name.replace("q_proj", "r_proj")]
)
def test_an_adapter_with_weights_for_modules_that_are_not_there_is_refused(
    wrong: Callable[[str], str], deepseek: Path, tmp_path: Path
) -> None:
    folder = saved(trained(deepseek), tmp_path / "adapter")
    weights = {wrong(name): tensor for name, tensor in load_file(folder / files.WEIGHTS).items()}
    save_file(weights, folder / files.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"do not belong together|no such module|does not fit"):
        load_for_inference(str(folder), device="cpu", dtype=torch.float32)
