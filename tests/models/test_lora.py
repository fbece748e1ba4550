"""Adapters: as peft has them, exact to resume, read by peft and transformers, and refused with a reason where they do not fit."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sft_runs
import torch
import transformers
from forked import run_forked
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from places import run_ranks
from ranks import train_adapters
from runs import SFT, losses
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, RandomDocuments, qwen2_config, sharp, write_model, write_problems_and_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CTRLConfig, CTRLLMHeadModel, PreTrainedModel, Qwen2Tokenizer

from verl import dist
from verl.algorithms import sft
from verl.config.checks import check_lora
from verl.config.shared import FsdpConfig, ModelConfig, OptimConfig
from verl.data.loader import Loader, Packing
from verl.engine import checkpoint, restore
from verl.engine.checkpoint import Position
from verl.engine.engine import Engine
from verl.engine.scorers import TokenScorer
from verl.errors import UserError
from verl.models.adapters import files, lora
from verl.models.adapters.lora import add_adapters
from verl.models.adapters.operators import use_operators
from verl.models.adapters.trained_tokens import token_ids, untrained_stop_tokens
from verl.models.inference import load_for_inference
from verl.models.load import Loaded, load_for_training, outline
from verl.models.saved import export_adapter
from verl.models.tiny import tiny_tokenizer
from verl.trainer import fsdp_sft_trainer

pytestmark = pytest.mark.usefixtures("process_group")

WHERE = Position(step=3, tokens=100, supervised_tokens=50, rows=24, rows_per_step=4, seed=1, data_fingerprint="f")
IDS = torch.arange(3, 15)[None]
STOP = 7


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    return tiny_tokenizer(["to be or not to be"], vocab_size=400)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"), qwen2_config(tie_word_embeddings=request.param))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("untied"), qwen2_config(tie_word_embeddings=False))


def settings(path: Path, **changes: object) -> ModelConfig:
    return ModelConfig(**{"partial_pretrain": str(path), "lora_rank": 4, "lora_alpha": 8, **changes})  # type: ignore[arg-type]


class Run:
    """An adapter beside a small model, and the engine that trains it."""

    def __init__(self, config: ModelConfig, tokenizer: Qwen2Tokenizer, *, lr: float = 1e-2):
        self.loaded: Loaded = load_for_training(config.partial_pretrain)
        self.adapted = add_adapters(self.model, config, compute_dtype=torch.float32, seed=1, tokenizer=tokenizer, stop_ids=[STOP])
        use_operators(self.adapted)
        torch.manual_seed(5)  # of dropout
        scorer, cpu = TokenScorer(self.model), torch.device("cpu")
        self.engine = Engine(scorer, OptimConfig(lr=lr), total_steps=8, device=cpu, compute_dtype=torch.float32)

    @property
    def model(self) -> PreTrainedModel:
        return self.loaded.model

    def train(self, start: int, stop: int) -> list[float]:
        loader = Loader(RandomDocuments(), Packing(4, 240), rows_per_step=4, seed=1)
        return [float(self.engine.train_step(step.micro_batches, sft, step.number)["loss"]) for step in loader.steps(start, stop)]

    def save(self, root: Path) -> Path:
        return checkpoint.save(root, self.engine, WHERE, partial(export_adapter, adapted=self.adapted))

    @torch.no_grad()
    def logits(self) -> Tensor:
        return logits(self.model)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    model.eval()
    plain: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    plain.set_attn_implementation("sdpa")
    return model(IDS).logits[0]


KINDS: dict[str, dict[str, object]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "trained tokens": {"trainable_tokens": "stop"},
    "all of it": {
        "use_dora": True,
        "use_rslora": True,
        "lora_dropout": 0.1,
        "trainable_tokens": "stop",
        "target_modules": r".*\.[qv]_proj",
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_gives_peft_and_transformers_the_logits_of_training(
    kind: str, base: Path, tokenizer: Qwen2Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(settings(base, **KINDS[kind]), tokenizer)
    run.train(0, 3)
    saved = run.save(tmp_path)
    expected = run.logits()
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert (logits(plain) - expected).abs().max() > 1e-2
    monkeypatch.chdir(tmp_path)  # the base is found from anywhere
    torch.testing.assert_close(logits(PeftModel.from_pretrained(plain, saved)), expected, rtol=1e-5, atol=1e-5)
    if "trainable_tokens" not in KINDS[kind] or Version(transformers.__version__) >= Version("5.20"):  # older ones leave them out
        torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(saved)), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(load_for_inference(str(saved), device="cpu")), expected, rtol=1e-4, atol=1e-4)


def test_transformers_would_not_read_dora_under_pefts_own_name(tied: Path, tokenizer: Qwen2Tokenizer, tmp_path: Path) -> None:
    """Negative control: the magnitudes would be those of an untrained adapter."""
    run = Run(settings(tied, use_dora=True), tokenizer)
    run.train(0, 3)
    file = run.save(tmp_path) / files.WEIGHTS
    renamed = {name.replace("magnitude_vector.weight", "magnitude_vector"): tensor for name, tensor in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
    assert (logits(AutoModelForCausalLM.from_pretrained(file.parent)) - run.logits()).abs().max() > 1e-3


def test_an_adapter_trains_beside_code_that_changes_its_input_in_place(tmp_path: Path) -> None:
    folder = write_problems_and_model(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    shape: dict[str, Any] = dict(n_positions=512, n_embd=48, dff=56, n_layer=2, n_head=4)
    config = CTRLConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **shape)
    sharp(CTRLLMHeadModel, config).save_pretrained(folder / "model")
    found = losses(sft_runs.train(folder, "run", model__lora_rank=4, trainer__total_training_steps=6, optim__lr=1e-2))
    assert found[-1] < found[0] - 0.1


@pytest.mark.parametrize("kind", ["dora", "trained tokens", "all of it"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(kind: str, base: Path, tokenizer: Qwen2Tokenizer, tmp_path: Path) -> None:
    config = settings(base, **KINDS[kind])
    first = Run(config, tokenizer)
    first.train(0, 3)
    first.save(tmp_path)
    rest = first.train(3, 6)
    resumed = Run(config, tokenizer)
    restore.load(tmp_path / "global_step_3", resumed.engine)
    assert resumed.train(3, 6) == rest


@pytest.mark.parametrize("wrong", [lambda: torch.manual_seed(6), lambda: torch.rand(1)], ids=["lost", "drawn from before training"])
def test_dropout_without_its_random_state_shows(wrong: Callable[[], object], tied: Path, tokenizer: Qwen2Tokenizer, tmp_path: Path) -> None:
    """Negative control of resuming: also of batches that are skipped only after the state is restored, and draw from it."""
    config = settings(tied, lora_dropout=0.1)
    first = Run(config, tokenizer)
    first.train(0, 3)
    first.save(tmp_path)
    rest = first.train(3, 5)
    resumed = Run(config, tokenizer)
    restore.load(tmp_path / "global_step_3", resumed.engine)
    wrong()
    assert resumed.train(3, 5) != rest


def test_only_adapters_and_the_named_rows_are_trained_and_in_float32(base: Path, tokenizer: Qwen2Tokenizer) -> None:
    loaded = load_for_training(str(base))
    frozen = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    config = settings(base, trainable_tokens="stop")
    adapted = add_adapters(loaded.model, config, compute_dtype=torch.bfloat16, seed=1, tokenizer=tokenizer, stop_ids=[STOP])
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "trainable_tokens_delta" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for p in adapted.parameters() if not p.requires_grad} == {torch.bfloat16}
    rows = [p for name, p in trained.items() if "trainable_tokens" in name]
    assert len(rows) == (1 if loaded.model.config.tie_word_embeddings else 2) and all(p.shape == (1, 64) for p in rows)

    run = Run(config, tokenizer)
    run.train(0, 3)
    for name, tensor in run.model.state_dict().items():
        original = name.replace("token_adapter.", "").replace("base_layer.", "")
        if original in frozen:
            assert torch.equal(tensor, frozen[original]), name
    embedding = load_with_tokens(run, "embed_tokens")
    changed = (embedding != frozen["model.embed_tokens.weight"]).any(1).nonzero().flatten().tolist()
    assert changed == [STOP]


def load_with_tokens(run: Run, name: str) -> Tensor:
    (module,) = (module for key, module in run.model.named_modules() if key.endswith(name))
    return module.weight.detach()


def test_an_adapter_beside_a_base_in_bfloat16_goes_on_with_its_own_values(tied: Path, tmp_path: Path) -> None:
    first = add_adapters(load_for_training(str(tied)).model, settings(tied), compute_dtype=torch.float32, seed=1)
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    export_adapter(tmp_path, first)
    base = load_for_training(str(tied), dtype=torch.bfloat16).model
    going_on = add_adapters(base, ModelConfig(lora_adapter_path=str(tmp_path)), compute_dtype=torch.bfloat16, seed=1)
    expected = {name: p for name, p in first.named_parameters() if "lora_" in name}
    found = {name: p for name, p in going_on.named_parameters() if "lora_" in name}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], p) for name, p in expected.items())
    assert {p.dtype for name, p in going_on.named_parameters() if "lora_" not in name} == {torch.bfloat16}


def test_an_adapter_on_an_untied_output_layer_is_in_the_loss(untied: Path, tokenizer: Qwen2Tokenizer, tmp_path: Path) -> None:
    run = Run(settings(untied, target_modules=["lm_head"]), tokenizer)
    before = run.train(0, 1)[0]
    run.train(1, 6)
    saved = run.save(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(untied), saved)), run.logits())
    (step,) = Loader(RandomDocuments(), Packing(4, 240), rows_per_step=4, seed=1).steps(0, 1)
    batch = step.micro_batches[0]
    run.model.set_attn_implementation(load_for_training(str(untied)).model.config._attn_implementation)
    with torch.no_grad():
        found_M = run.engine.scorer.eval()(batch).logprob_M
        weight_VH = merged_head(run)
        head: nn.Linear = run.model.get_output_embeddings().base_layer
        run.adapted.unload()
        head.weight.copy_(weight_VH)
        torch.testing.assert_close(run.engine.scorer(batch).logprob_M, found_M, rtol=1e-4, atol=1e-4)
    assert -float(found_M.mean()) < before


def merged_head(run: Run) -> Tensor:
    head = run.model.get_output_embeddings()
    delta: Callable[[str], Tensor] = head.get_delta_weight
    weight: Tensor = head.base_layer.weight
    return weight + delta("default")


@pytest.fixture(scope="module")
def adapter(tied: Path, tokenizer: Qwen2Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dist.start()
    run = Run(settings(tied, use_rslora=True, trainable_tokens="stop", target_modules=["q_proj", "up_proj"]), tokenizer)
    run.train(0, 3)
    return run.save(tmp_path_factory.mktemp("adapter"))


def test_a_run_goes_on_from_an_adapter(adapter: Path, tied: Path, tokenizer: Qwen2Tokenizer) -> None:
    run = Run(ModelConfig(partial_pretrain=str(tied), lora_adapter_path=str(adapter)), tokenizer)
    torch.testing.assert_close(run.logits(), logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tied), adapter)))
    run = Run(ModelConfig(partial_pretrain=str(tied), lora_adapter_path=str(adapter), lora_dropout=0.2), tokenizer)
    new: Any = run.adapted.peft_config["default"]
    assert (new.r, new.lora_alpha, new.use_rslora, new.lora_dropout) == (4, 8, True, 0.2)
    assert new.trainable_token_indices == [STOP] and new.base_model_name_or_path == str(tied)
    assert {p.dtype for p in run.engine.trained} == {torch.float32}
    run.train(3, 4)


def check_adapters(config: ModelConfig, tokenizer: Qwen2Tokenizer) -> None:
    lora.check_adapters(outline(config.partial_pretrain), config, tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_rank": 8}, "model.lora_rank=8: the adapter .* has 4"),
        ({"lora_alpha": 4}, "model.lora_alpha=4: the adapter .* has 8"),
        ({"use_dora": True}, "model.use_dora=True: the adapter .* has False"),
        ({"target_modules": ["q_proj"]}, r"model.target_modules=\['q_proj'\]: the adapter .* has \['q_proj', 'up_proj'\]"),
        ({"trainable_tokens": ["<|im_start|>"]}, "model.trainable_tokens"),
    ],
)
def test_other_values_than_the_adapters_are_refused(
    change: dict[str, object], message: str, adapter: Path, tied: Path, tokenizer: Qwen2Tokenizer
) -> None:
    same = {"lora_rank": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["up_proj", "q_proj"]}
    check_adapters(settings(tied, lora_adapter_path=str(adapter), **same), tokenizer)
    with pytest.raises(UserError, match=message):
        check_adapters(settings(tied, lora_adapter_path=str(adapter), **{**same, **change}), tokenizer)


def test_an_adapter_of_another_base_is_refused_and_both_are_named(
    adapter: Path, tied: Path, untied: Path, tokenizer: Qwen2Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"was made for {tied}, but the model is {untied}"):
        check_adapters(ModelConfig(partial_pretrain=str(untied), lora_adapter_path=str(adapter)), tokenizer)
    wider = write_model(tmp_path / "wider", qwen2_config(hidden_size=96))
    (tmp_path / "copy").mkdir()
    for name in (files.CONFIG, files.WEIGHTS):
        (tmp_path / "copy" / name).write_bytes((adapter / name).read_bytes())
    config = json.loads((adapter / files.CONFIG).read_text())
    (tmp_path / "copy" / files.CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "someone/wider"}))
    with pytest.raises(UserError, match=rf"lora_A.weight of .*made for someone/wider, has shape \[4, 64\].*{wider} maps 96 to"):
        check_adapters(ModelConfig(partial_pretrain=str(wider), lora_adapter_path=str(tmp_path / "copy")), tokenizer)


def test_what_is_no_adapter_is_refused(tied: Path, tokenizer: Qwen2Tokenizer) -> None:
    with pytest.raises(UserError, match=r"adapter_config.json is missing"):
        check_adapters(ModelConfig(partial_pretrain=str(tied), lora_adapter_path=str(tied)), tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_modules": ["nothing"]}, r"no module matches 'nothing'\n.*\[down_proj,gate_proj,k_proj"),
        ({"target_modules": ["q_proj", "nothing", "none"]}, "no module matches 'nothing', 'none'"),
        ({"target_modules": r".*\.w[qkv]"}, "no module matches"),
        ({"target_modules": "(("}, "neither a module nor a regular expression"),
        ({"target_modules": []}, r"found \[\]"),
        ({"target_modules": ["lm_head"]}, r"lm_head shares its weight with the input embedding \(tied embeddings\)"),
        ({"target_modules": ["embed_tokens"]}, "shares its weight with the output layer"),
        ({"target_modules": ["mlp"]}, "is a Qwen2MLP, which cannot have an adapter"),
        ({"trainable_tokens": ["to be or"]}, "'to be or' is . tokens in this tokenizer, not one"),
        ({"trainable_tokens": 5}, "found 5"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_it_is_loaded(
    change: dict[str, object], message: str, tied: Path, tokenizer: Qwen2Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(UserError, match=message):
        check_adapters(settings(tied, **change), tokenizer)


@pytest.mark.parametrize(
    "change",
    [{"lora_rank": 65}, {"target_modules": "q_proj"}, {"target_modules": r".*\.[qk]_proj"}, {"target_modules": ["layers.0.mlp.up_proj"]}],
)
def test_what_fits_is_taken(change: dict[str, object], tied: Path, tokenizer: Qwen2Tokenizer) -> None:
    check_adapters(settings(tied, **change), tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_rank": -1}, "0 to train all weights"),
        ({"lora_alpha": 0}, "model.lora_alpha: 0 is not positive"),
        ({"lora_alpha": -16}, "model.lora_alpha"),
        ({"lora_dropout": 1.0}, "model.lora_dropout: 1.0 is not a share"),
        ({"lora_dropout": -0.1}, "model.lora_dropout"),
        ({"lora_rank": 0, "use_dora": True}, "model.use_dora: is only for adapters, but model.lora_rank=0 trains all weights"),
        ({"lora_rank": 0, "trainable_tokens": "stop"}, "model.trainable_tokens"),
        ({"load_in_4bit": True, "fsdp_config": FsdpConfig(cpu_offload=True)}, "4-bit weights cannot be offloaded"),
    ],
)
def test_values_out_of_range_are_refused(change: dict[str, object], message: str) -> None:
    check_lora(ModelConfig(lora_rank=4))
    with pytest.raises(UserError, match=message):
        check_lora(ModelConfig(**{"lora_rank": 4, **change}))  # type: ignore[arg-type]


def test_a_wrong_adapter_setting_ends_the_command_with_exit_code_2_before_the_data_is_read(tied: Path, tokenizer: Qwen2Tokenizer) -> None:
    tokenizer.save_pretrained(tied)
    words = ["data.train_files=nowhere.jsonl", f"model.partial_pretrain={tied}", "model.lora_rank=4", "model.target_modules=[qq]"]
    done = run_forked(*SFT, *words, f"trainer.default_local_dir={tied}/run", folder=tied)
    assert done.returncode == 2 and "error: model.target_modules: no module matches 'qq'" in done.stderr, done.stderr[-2000:]
    assert "Traceback" not in done.stderr


def test_tokens_are_named_as_they_are_written(tokenizer: Qwen2Tokenizer) -> None:
    end, start = (tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<|im_start|>"))
    assert token_ids(["<|im_end|>", "<|im_start|>", "<|im_end|>"], tokenizer, []) == sorted([end, start])
    assert token_ids("<|im_end|>", tokenizer, []) == [end]
    assert token_ids("stop", tokenizer, [9, 4]) == [4, 9]
    assert token_ids(None, tokenizer, [9]) == []


def model_with_unused_rows(tokenizer: Qwen2Tokenizer, *, cloud: float, stop: str) -> tuple[PreTrainedModel, int]:
    """A model whose rows behind the tokenizer's last id lie around one point, and its stop token's row among them or not."""
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(qwen2_config())
    end: Any = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():
        weight_VH = model.get_output_embeddings().weight
        unused = [*range(len(tokenizer), VOCABULARY), *([end] if stop == "unused" else [])]
        weight_VH[unused] = 0.005 * torch.randn(64) + cloud * torch.randn(len(unused), 64)
    return model, end


@pytest.mark.parametrize("cloud", [0.0, 1e-3, 5e-3])
def test_a_stop_token_among_rows_that_were_never_trained_is_found(cloud: float, tokenizer: Qwen2Tokenizer) -> None:
    model, end = model_with_unused_rows(tokenizer, cloud=cloud, stop="unused")
    assert untrained_stop_tokens(model.get_output_embeddings().weight, tokenizer, [end]) == ["<|im_end|>"]
    trained, _ = model_with_unused_rows(tokenizer, cloud=cloud, stop="trained")
    assert untrained_stop_tokens(trained.get_output_embeddings().weight, tokenizer, [end]) == []


def test_a_run_warns_of_a_stop_token_that_was_never_trained(
    tokenizer: Qwen2Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = model_with_unused_rows(tokenizer, cloud=1e-3, stop="unused")
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "train.jsonl").write_text('{"question": "to be?", "answer": "or not"}\n')
    for number, (words, warns) in enumerate(
        [(["model.lora_rank=4"], True), (["model.lora_rank=4", "model.trainable_tokens=stop"], False), (["model.lora_rank=0"], False)]
    ):
        dist.stop()
        fsdp_sft_trainer.main(
            [
                f"data.train_files={tmp_path / 'train.jsonl'}",
                f"data.cache_dir={tmp_path / 'cache'}",
                "data.num_workers=1",
                f"model.partial_pretrain={tmp_path / 'base'}",
                f"trainer.default_local_dir={tmp_path / str(number)}",
                "trainer.save_freq=never",
                *words,
            ]
        )
        said = capsys.readouterr().out
        assert ("warning: the embedding of the stop token <|im_end|> was never trained" in said) is warns


def test_a_model_with_random_weights_raises_no_alarm(tokenizer: Qwen2Tokenizer) -> None:
    for stop in ("trained", "unused"):
        model, end = model_with_unused_rows(tokenizer, cloud=0.02, stop=stop)
        assert untrained_stop_tokens(model.get_output_embeddings().weight, tokenizer, [end]) == []


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
def test_an_adapter_of_peft_on_a_tied_output_layer_is_merged_into_that_side_alone(tied: Path, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tied)
    foreign = get_peft_model(plain, LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
    foreign.save_pretrained(str(tmp_path), save_embedding_layers=False)
    torch.testing.assert_close(logits(load_for_inference(str(tmp_path), device="cpu")), logits(foreign), rtol=1e-4, atol=1e-4)


def test_adapters_train_beside_weights_in_4_bits(tied: Path, tokenizer: Qwen2Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason='needs the extra "4bit"')
    from verl.models.load import is_quantized, numel
    from verl.models.quantize import load_in_4bit

    config = settings(tied, load_in_4bit=True)
    losses, sizes = [], []
    for compute_dtype in (torch.float32, torch.bfloat16):
        loaded = load_in_4bit(config, compute_dtype=compute_dtype)
        adapted = add_adapters(loaded.model, config, compute_dtype=compute_dtype, seed=1)
        codes = [p for p in adapted.parameters() if is_quantized(p)]
        assert len(codes) == 14 and sum(map(numel, codes)) == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
        sizes.append(sum(p.numel() * p.element_size() for p in codes) / sum(map(numel, codes)))
        engine = Engine(
            TokenScorer(loaded.model), OptimConfig(lr=1e-2), total_steps=8, device=torch.device("cpu"), compute_dtype=compute_dtype
        )
        loader = Loader(RandomDocuments(), Packing(4, 240), rows_per_step=4, seed=1)
        losses.append([float(engine.train_step(step.micro_batches, sft, step.number)["loss"]) for step in loader.steps(0, 6)])
        assert all(p.any() for name, p in adapted.named_parameters() if "lora_B" in name)
        engine.evaluate(next(iter(loader.steps(0, 1))).micro_batches, sft)
        saved = checkpoint.save(tmp_path, engine, replace(WHERE, step=6), partial(export_adapter, adapted=adapted))
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tied), saved)
    assert sizes == [0.5, 0.5]  # bytes a weight
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_4_bits_without_the_library_name_the_extra(tied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.models import quantize

    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs bitsandbytes") as error:
        quantize.four_bit(settings(tied, load_in_4bit=True), torch.float32)
    assert 'pip install "verl[4bit]"' in str(error.value)
    assert quantize.four_bit(settings(tied), torch.float32) is None


def test_two_processes_train_save_and_resume_as_one(tied: Path, tokenizer: Qwen2Tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tied)
    train_adapters.main(str(tied), str(tmp_path / "1"))
    run_ranks("train_adapters.py", tied, tmp_path / "2")
    one, two = (json.loads((tmp_path / n / "losses.json").read_text()) for n in ("1", "2"))
    for dropout in ("0.0", "0.1"):
        assert two[f"resumed {dropout}"] == two[f"gone on {dropout}"]
    assert two["gone on 0.1"] != two["gone on 0.0"]
    for part in ("begun 0.0", "gone on 0.0"):
        assert two[part] == pytest.approx(one[part], rel=1e-5)
    written = [load_file(tmp_path / str(n) / "dropout_0.0" / "global_step_3" / files.WEIGHTS) for n in (1, 2)]
    assert written[0].keys() == written[1].keys()
    for name, tensor in written[0].items():
        torch.testing.assert_close(written[1][name], tensor, rtol=1e-3, atol=1e-4)


def _adapter_of_peft(tied: Path, to: Path, **changes: object) -> Path:
    """Write an adapter of peft with changes in its adapter_config.json; None removes a field."""
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tied), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    adapted.save_pretrained(str(to))
    config = json.loads((to / files.CONFIG).read_text())
    (to / files.CONFIG).write_text(json.dumps({**config, **changes}))
    return to


HANGS = "(([a-z._0-9]+)+)+X"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, expected a finite number"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"r": "4"}, "r is '4', expected a number from 1"),
        ({"r": 10**12}, "r is 1000000000000"),
        ({"lora_dropout": [0.1]}, "lora_dropout is"),
        ({"target_modules": 7}, "target_modules is 7"),
        ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern is"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path is 5"),
        ({"layers_to_transform": [99]}, "does not fit the model|do not belong together"),
        ({"layers_to_transform": [0]}, "do not belong together"),
        ({"target_modules": ["q_proj"]}, "do not belong together"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "does not fit the model|do not belong together"),
        ({"modules_to_save": ["lm_head"]}, "does not fit the model"),
        ({"target_modules": "(q_proj"}, "is not a regular expression"),
    ],
)
def test_a_damaged_adapter_config_is_refused(changes: dict[str, object], message: str, tied: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        files.attach(outline_with_weights(tied), str(_adapter_of_peft(tied, tmp_path, **changes)))
    assert str(tmp_path) in str(caught.value.where) and caught.value.fix


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": HANGS},
        {"rank_pattern": {HANGS: 2}},
        {"alpha_pattern": {"(.*.*)*X": 2}},
        {"modules_to_save": [HANGS]},
        {"layers_pattern": HANGS, "layers_to_transform": [0]},
    ],
    ids=str,
)
def test_a_regular_expression_of_an_adapter_has_a_time_limit(
    changes: dict[str, object], tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verl.models.adapter_settings.SECONDS", 0.5)
    with pytest.raises(UserError, match="takes longer than"):
        files.attach(outline_with_weights(tied), str(_adapter_of_peft(tied, tmp_path, **changes)))


@pytest.mark.parametrize("changes", [{"target_modules": r".*\.(q|v)_proj"}, {"rank_pattern": {r"layers\.\d+\.self_attn\.q_proj": 2}}])
def test_an_ordinary_regular_expression_of_an_adapter_works(changes: dict[str, object], tied: Path, tmp_path: Path) -> None:
    files.attach(outline_with_weights(tied), str(_adapter_of_peft(tied, tmp_path, **changes)))


def outline_with_weights(path: Path) -> PreTrainedModel:
    return load_for_training(str(path)).model
