"""Who shares prompts: exact in every family that does, and the reason of every one that does not."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decided import decided
from part_kernels import backward_part, forward_part
from tiny import write_model
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OlmoeConfig,
    OlmoeForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
)

from verl import dist
from verl.config.shared import ModelConfig, OptimConfig
from verl.data.batch import Batch
from verl.data.groups import collate_groups, grouped, pack_groups, pieces_of, shared_tokens
from verl.data.pack import Document, collate
from verl.data.prefixes import Prefixes
from verl.engine import shared_prompts, trial
from verl.engine.engine import Engine
from verl.engine.layers import compile_layers, recompute_activations
from verl.engine.router_loss import RouterLoss
from verl.engine.scorers import TokenScorer
from verl.engine.shared_prompts import PromptSharing, choose_sharing
from verl.engine.trial import choose_path, why_not_shared
from verl.models.attention import packed, plain, shared
from verl.models.attention.packed import PACKED

pytestmark = pytest.mark.usefixtures("process_group")

SIZES: dict[str, Any] = dict(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16
)
NAMES: dict[str, Any] = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
WINDOW = 12  # shorter than the prompts
RULE: dict[str, Any] = dict(
    layer_types=["linear_attention", "full_attention"],
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
)
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
SHARED: dict[str, PretrainedConfig] = {
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "llama": LlamaConfig(**SIZES),
    "mistral with a window": MistralConfig(**SIZES, sliding_window=WINDOW),
    "qwen2 with a window in one layer": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1, layer_types=["full_attention", "sliding_attention"]
    ),
    "gemma2, soft-capped, with windows": Gemma2Config(**SIZES, **NAMES, sliding_window=WINDOW, attn_logit_softcapping=2.0),
    "gemma3, with windows": Gemma3TextConfig(**SIZES, **NAMES, sliding_window=WINDOW),
    "gpt-oss, with sinks, windows and experts": GptOssConfig(
        **SIZES, **NAMES, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW
    ),
    "olmoe": OlmoeConfig(**SIZES, **NAMES, num_experts=4, num_experts_per_tok=2),
}
PROMPTS = ((30, (9, 1, 17)), (18, (5, 12)), (25, (7,)), (6, (8, 3)))  # tokens of each prompt and of its answers


def model_of(config: PretrainedConfig, attention: str) -> PreTrainedModel:
    """Weights far enough from zero that a wrong token shows."""
    torch.manual_seed(0)
    options = {"attn_implementation": attention, "experts_implementation": "eager"}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config), **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def documents_and_groups() -> tuple[list[Document], list[tuple[int, ...]]]:
    random, documents, groups = np.random.default_rng(0), list[Document](), []
    for prompt, answers in PROMPTS:
        ids = random.integers(0, 512, prompt)
        groups.append(tuple(range(len(documents), len(documents) + len(answers))))
        for answer in answers:
            whole = np.concatenate([ids, random.integers(0, 512, answer)]).astype(np.int32)
            documents.append((whole, np.arange(len(whole)) >= prompt))
    return documents, groups


def scores_and_gradients(scorer: TokenScorer, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    scorer.zero_grad()
    logprob_M = scorer(batch).logprob_M
    (logprob_M * torch.arange(len(logprob_M)).sin()).sum().backward()
    return logprob_M.detach(), torch.cat([p.grad.flatten() for p in scorer.parameters() if p.grad is not None])


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", SHARED)
def test_log_probabilities_and_gradients_are_those_of_documents_alone(name: str) -> None:
    config = SHARED[name]
    assert why_not_shared(config, "here") is None
    model = model_of(config, PACKED)
    scorer = TokenScorer(model)
    documents, rows = documents_and_groups()
    (groups,) = pack_groups([grouped(row, documents.__getitem__) for row in rows], token_budget=1000, multiple_of=1)
    batch = collate_groups(groups, documents.__getitem__, multiple_of_tokens=16)
    assert batch.prefixes is not None and batch.prefixes.numbers.prefix_tokens == 29 + 17
    found = scores_and_gradients(scorer, batch)
    numbers = batch.sample_ids_S[: batch.documents].tolist()
    expected = scores_and_gradients(scorer, collate([documents[n] for n in numbers], numbers))
    assert relative(found[0], expected[0]) < 1e-5 and relative(found[1], expected[1]) < 1e-5


@pytest.mark.parametrize("name", ["qwen2", "gemma2, soft-capped, with windows"])
def test_the_trial_sees_answers_that_do_not_see_their_prompt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    monkeypatch.setattr(trial, "_whether_shared", {})
    monkeypatch.setattr(Prefixes, "prefix_of_segment", lambda prefixes: {})
    assert "shared prompts change what it computes" in str(why_not_shared(SHARED[name], "here"))


def test_the_trial_sees_windows_that_do_not_reach_into_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the window is counted from the beginning of the answer."""
    right = plain._mask
    monkeypatch.setattr(trial, "_whether_shared", {})
    monkeypatch.setattr(plain, "_mask", lambda queries, keys, window, device: right(queries, keys, window + keys - queries, device))
    assert "shared prompts change what it computes" in str(why_not_shared(SHARED["mistral with a window"], "here"))


def test_the_trial_sees_layers_that_carry_a_state() -> None:
    """Though the decision names them before."""
    assert why_not_shared(Qwen3_5TextConfig(**SIZES, **NAMES, **RULE), "here") is not None
    assert why_not_shared(Lfm2Config(**SIZES, **NAMES, layer_types=["conv", "full_attention"]), "here") is not None


def test_a_model_without_a_twin_is_said_to_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_whether_shared", {})
    monkeypatch.setattr(trial, "random_model", failing)
    assert why_not_shared(SHARED["qwen2"], "here") == "no tiny twin of it can be tried (ValueError: too large)"
    bert = BertConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    monkeypatch.undo()
    assert "is no causal language model" in str(why_not_shared(bert, "here"))


def failing(*_: Any) -> Any:
    raise ValueError("too large")


# The decision


def engine_of(config: PretrainedConfig, *, train: bool = False) -> Engine:
    path = choose_path(config, "here")
    model = model_of(config, path.attention)
    optim = OptimConfig() if train else None
    return Engine(TokenScorer(model, path=path), optim, total_steps=1, device=torch.device("cpu"), compute_dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def choice(folder: Path, *engines: Engine, setting: str = "auto", longest: int = 1000) -> PromptSharing:
    return choose_sharing(setting, engines, decided(ModelConfig(str(folder))), longest, trusted=False)


@pytest.mark.parametrize("name", SHARED)
def test_these_share_prompts(name: str, folder: Path) -> None:
    found = choice(folder, engine_of(SHARED[name]))
    assert found.on and found.describe().startswith("prompts: shared; a micro-batch has a prompt once for all of its answers")


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (Qwen3_5TextConfig(**SIZES, **NAMES, **RULE), "the layers of this qwen3_5_text model carry a state from token to token"),
        (Lfm2Config(**SIZES, **NAMES, layer_types=["conv", "full_attention"]), "the layers of this lfm2 model carry a state"),
        (MambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2, state_size=8, **NAMES), "this mamba model runs one document at"),
        (LlamaConfig(**SIZES, max_position_embeddings=32, rope_parameters=DYNAMIC), "the rotary embeddings of this llama model depend on"),
        (
            FalconConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=True, **NAMES),
            "this falcon model runs one document at a time",
        ),
    ],
    ids=lambda value: value.model_type if isinstance(value, PretrainedConfig) else "",
)
def test_these_do_not_and_the_reason_is_said(config: PretrainedConfig, why: str, folder: Path) -> None:
    found = choice(folder, engine_of(config))
    assert not found.on and why in found.describe() and found.describe().startswith("prompts: not shared")


def test_one_model_that_cannot_decides_for_all(folder: Path) -> None:
    other = engine_of(LlamaConfig(**SIZES, max_position_embeddings=32, rope_parameters=DYNAMIC))
    assert not choice(folder, engine_of(SHARED["qwen2"]), other).on


def test_it_can_be_switched_off(folder: Path) -> None:
    assert choice(folder, engine_of(SHARED["qwen2"]), setting="never").refused == "data.share_prompts=never"


def test_dropout_is_drawn_for_each_answer(folder: Path) -> None:
    """In training; reinforcement learning switches it off."""
    engine = engine_of(GptOssConfig(**SIZES, **NAMES, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW), train=True)
    assert choice(folder, engine).on
    engine.scorer.model.config.resid_pdrop = 0.1
    assert choice(folder, engine).refused == "dropout is drawn for each answer"
    engine.scorer.eval()
    assert choice(folder, engine).on


def test_the_loss_of_routers_counts_tokens(folder: Path) -> None:
    engine = engine_of(SHARED["olmoe"])
    assert isinstance(engine.scorer.model, OlmoeForCausalLM)
    engine.router_loss = RouterLoss(engine.scorer.model, 0.01)
    assert "load-balancing loss counts the tokens of each answer" in choice(folder, engine).describe()


def test_processes_that_share_documents_share_no_prompts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "context_size", lambda: 2)
    assert choose_sharing("auto", [], decided(ModelConfig(str(folder))), 100, trusted=False).refused is not None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """FlashAttention computes; the trials of kernels are noted."""
    tried: list[Any] = []
    monkeypatch.setattr(shared_prompts, "has_flash", lambda *_: True)
    monkeypatch.setattr("verl.models.attention.shared_trial.refusal", lambda device, dtype, *heads, short: tried.append(heads))
    return tried


def test_on_a_gpu_a_window_that_documents_reach_is_refused(gpu: list[Any], folder: Path) -> None:
    engine = engine_of(SHARED["mistral with a window"])
    assert "windows of 12 tokens, and an answer with its prompt may have 1,000" in choice(folder, engine).describe()
    assert choice(folder, engine, longest=12).on
    assert not choice(folder, engine_of(SHARED["qwen2 with a window in one layer"])).on
    assert choice(folder, engine_of(Qwen2Config(**SIZES, sliding_window=WINDOW, use_sliding_window=False))).on


def test_on_a_gpu_the_kernels_are_tried_with_the_models_heads(gpu: list[Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice(folder, engine_of(SHARED["qwen2"])).on and len(gpu) == 1
    assert choice(folder, engine_of(SHARED["gemma2, soft-capped, with windows"]), longest=10).on and len(gpu) == 1  # no FlashAttention
    monkeypatch.setattr("verl.models.attention.shared_trial.refusal", lambda *_, short: "its attention fails on this machine: no")
    assert "its attention fails on this machine: no" in choice(folder, engine_of(SHARED["qwen2"])).describe()


# Packing


def row(prompt: int, *answers: int, start: int = 0) -> list[Document]:
    ids = np.arange(start, start + prompt)
    return [(np.concatenate([ids, np.full(n, 500 + k)]).astype(np.int32), np.arange(prompt + n) >= prompt) for k, n in enumerate(answers)]


def test_the_prefix_is_the_prompt_without_its_last_token() -> None:
    assert shared_tokens(row(40, 5, 9)) == 39
    assert shared_tokens(row(40, 5)) == 0
    assert shared_tokens([*row(40, 5), *row(40, 5, start=1)]) == 0  # other prompts
    assert shared_tokens(row(16, 5, 9)) == 0  # 15 tokens
    assert shared_tokens(row(20, 5, 900)) == 0  # too little is saved


def test_equal_beginnings_of_answers_are_not_shared() -> None:
    first, second = row(40, 5, 5)
    assert shared_tokens([first, (first[0].copy(), second[1])]) == 39


def test_what_is_trained_in_one_document_is_in_no_prefix() -> None:
    (ids, mask), other = row(40, 5, 5)
    early = mask.copy()
    early[30] = True
    assert shared_tokens([(ids, early), other]) == 29


def test_documents_without_trained_tokens_keep_one_token() -> None:
    ids = np.arange(40, dtype=np.int32)
    nothing = np.zeros(40, dtype=bool)
    assert shared_tokens([(ids, nothing), (ids, nothing)]) == 39


def test_a_group_beyond_the_budget_is_divided_and_each_piece_has_the_prompt() -> None:
    documents = row(101, *[50] * 8)
    pieces = pieces_of(range(8), documents.__getitem__, 320)
    assert sorted(n for piece in pieces for n in piece.numbers) == list(range(8))
    assert [(len(piece.numbers), piece.shared, piece.tokens) for piece in pieces] == [(4, 100, 304)] * 2
    assert [piece.tokens for piece in pieces_of(range(8), documents.__getitem__, 151)] == [151] * 8  # each alone
    for budget in range(151, 700, 7):
        packed = pieces_of(range(8), documents.__getitem__, budget)
        assert all(piece.tokens <= budget for piece in packed) and sum(len(piece.numbers) for piece in packed) == 8


def test_a_group_that_fits_stays_together() -> None:
    documents = row(101, *[50] * 8)
    (piece,) = pieces_of(range(8), documents.__getitem__, 508)
    assert piece.tokens == 100 + 8 * 51


def test_a_slice_of_a_batch_with_prefixes_is_refused() -> None:
    documents = row(40, 5, 9)
    batch = collate_groups([grouped((0, 1), documents.__getitem__)], documents.__getitem__)
    with pytest.raises(AssertionError, match="share a prefix"):
        replace(batch).part(0, 1)


def test_a_copy_has_copies_of_the_prefixes_offsets() -> None:
    documents = row(40, 5, 9)
    batch = collate_groups([grouped((0, 1), documents.__getitem__)], documents.__getitem__)
    copy = batch.to("meta")
    assert copy.prefixes is not None and batch.prefixes is not None
    assert all(offsets.is_meta for offsets in copy.prefixes[:3])
    assert copy.prefixes.numbers == batch.prefixes.numbers  # in host memory


# Compiled layers


@pytest.fixture
def flash_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers call the operator, as on a GPU."""
    monkeypatch.setattr(packed, "has_flash", lambda *_: True)
    monkeypatch.setattr(packed, "_kernel", "fa2")
    monkeypatch.setattr(shared, "forward_part", forward_part)
    monkeypatch.setattr(shared, "backward_part", backward_part)


def batch_of(prompts: Sequence[tuple[int, tuple[int, ...]]]) -> Batch:
    documents, groups = list[Document](), []
    for start, (prompt, answers) in enumerate(prompts):
        groups.append(range(len(documents), len(documents) + len(answers)))
        documents += row(prompt, *answers, start=start)
    return collate_groups([grouped(numbers, documents.__getitem__) for numbers in groups], documents.__getitem__, multiple_of_tokens=16)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("checkpointing", [None, "selective", "full"])
def test_compiled_layers_share_prompts_and_are_not_compiled_for_each_batch(flash_stand_in: None, checkpointing: str | None) -> None:
    scorer, plain_scorer = (TokenScorer(model_of(SHARED["qwen2"], PACKED)) for _ in range(2))
    if checkpointing:
        recompute_activations(scorer.model, selective=checkpointing == "selective")
    compile_layers(scorer.model, backend="aot_eager")
    graphs = []
    for prompts in (((40, (9, 20)),), ((33, (5, 60, 7)), (50, (8, 8))), ((64, (5, 60, 7, 2)), (41, (30, 5, 6)), (20, (1, 1)))):
        batch = batch_of(prompts)
        found, expected = (scores_and_gradients(each, batch) for each in (scorer, plain_scorer))
        assert relative(found[0], expected[0]) < 1e-5 and relative(found[1], expected[1]) < 1e-5
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1]
