"""The engine's invariants, on a real small Qwen2: how rows are cut up, packed and spread changes nothing."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engines import engine_of, gradient, largest_difference, relative
from places import run_ranks
from tiny import RandomDocuments, qwen2_config, unequal_documents, write_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    get_scheduler,
)

from verl.algorithms import sft
from verl.config.shared import OptimConfig
from verl.data.batch import Batch
from verl.data.loader import Loader, Packing, micro_batches
from verl.data.pack import collate
from verl.engine.contract import LossOut, Slope, TokenOut
from verl.engine.engine import Engine
from verl.engine.logprobs import LogitRule, logprobs_and_entropy, token_scores
from verl.engine.optim import learning_rate, optimizer_state
from verl.engine.scorers import TokenScorer
from verl.engine.trial import check_scorer
from verl.errors import UserError
from verl.models.load import load_for_training

pytestmark = pytest.mark.usefixtures("process_group")

ROWS = np.arange(8)
CUTS = {
    "one micro-batch": Packing(8, 8 * 60),
    "several": Packing(1, 100),
    "one document each": Packing(1, None),
    "padded, three rows each": Packing(3, None),
    "padded, all": Packing(8, None),
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plain(model_path: Path) -> tuple[float, Tensor]:
    """Token-mean loss over eight documents and its gradient by transformers alone: its own attention, one document at a time."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, attn_implementation="eager")
    documents = RandomDocuments()
    total, tokens = torch.zeros(()), 0
    for index in ROWS:
        ids, mask = documents.document(int(index))
        labels = torch.where(torch.from_numpy(mask), torch.from_numpy(ids).long(), -100)[None]
        logits = model(torch.from_numpy(ids).long()[None]).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum", ignore_index=-100)
        tokens += int((labels[0, 1:] != -100).sum())
    (total / tokens).backward()
    return total.item() / tokens, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.fixture
def plain_loss(plain: tuple[float, Tensor]) -> float:
    return plain[0]


@pytest.fixture
def plain_gradient(plain: tuple[float, Tensor]) -> Tensor:
    return plain[1]


@pytest.mark.parametrize("cut", CUTS)
def test_the_gradient_is_that_of_the_mean_over_all_tokens_however_rows_are_cut(cut: str, model_path: Path, plain_gradient: Tensor) -> None:
    batches = micro_batches(RandomDocuments(), ROWS, CUTS[cut])
    assert relative(gradient(engine_of(model_path), batches), plain_gradient) < 1e-5


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_documents_of_3_to_300_tokens_have_one_gradient_in_micro_batches_of_any_size(rows: int, model_path: Path) -> None:
    documents = unequal_documents()
    whole = gradient(engine_of(model_path), [collate(documents, range(8))])
    cut = [collate(documents[first : first + rows], range(rows)) for first in range(0, 8, rows)]
    assert relative(gradient(engine_of(model_path), cut), whole) < 1e-5
    assert relative(gradient(engine_of(model_path), cut, mean_of_means(cut)), whole) > 1e-2, "the usual wrong formula would not be seen"


@pytest.mark.parametrize("cut", CUTS)
def test_the_logged_loss_is_the_mean_over_all_tokens_however_rows_are_cut(cut: str, model_path: Path, plain_loss: float) -> None:
    engine = engine_of(model_path)
    batches = micro_batches(RandomDocuments(), ROWS, CUTS[cut])
    means = [-out.logprob_M.mean().item() for out in engine.score(batches)]
    assert engine.train_step(batches, sft, 0)["loss"].item() == pytest.approx(plain_loss, rel=1e-5)
    # The wrong ways: the means of micro-batches added up, their mean, and the token mean divided once more by their number.
    if len(batches) > 1:
        for wrong in (sum(means), sum(means) / len(means), plain_loss / len(means)):
            assert wrong != pytest.approx(plain_loss, rel=1e-4)


def test_the_last_step_of_an_epoch_is_divided_by_its_own_tokens(model_path: Path) -> None:
    """Of 8 rows in steps of 3, the last step has 2. Each row is a micro-batch."""
    documents, engine = RandomDocuments(8), engine_of(model_path)
    loader = Loader(documents, Packing(1, None), rows_per_step=3, seed=1)
    for step in loader.steps(0, 3):
        engine.optimizer.zero_grad()
        found = gradient(engine, step.micro_batches)
    rows = loader.rows(2).tolist()
    expected = gradient(engine_of(model_path), [collate([documents.document(row) for row in rows], rows)])
    assert len(step.micro_batches) == 2
    assert relative(found, expected) < 1e-5
    assert relative(found * 2 / 3, expected) > 1e-2, "a division by the micro-batches of a full step would not be seen"


def test_no_mask_is_made_for_which_the_host_would_wait(model_path: Path, plain_gradient: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def looks_for_documents(position_ids: Tensor) -> None:
        raise AssertionError("transformers looks for documents in the positions")

    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", looks_for_documents)
    batches = micro_batches(RandomDocuments(), ROWS, CUTS["several"])
    assert relative(gradient(engine_of(model_path), batches), plain_gradient) < 1e-5


@pytest.mark.parametrize("checkpointing", [True, "selective"])
def test_recomputed_activations_give_the_same_gradient(checkpointing: bool | str, model_path: Path, plain_gradient: Tensor) -> None:
    batches = micro_batches(RandomDocuments(), ROWS, CUTS["several"])
    assert relative(gradient(engine_of(model_path, checkpointing=checkpointing), batches), plain_gradient) < 1e-5


def test_each_kind_of_checkpointing_computes_less_again(model_path: Path) -> None:
    def products(checkpointing: bool | str) -> int:
        batches = micro_batches(RandomDocuments(), ROWS, CUTS["one micro-batch"])
        engine = engine_of(model_path, checkpointing=checkpointing)
        with FlopCounterMode(display=False) as counter:
            engine.backward(batches, sft)
        return counter.get_total_flops()

    none, selective, full = (products(kind) for kind in (False, "selective", True))
    assert none < selective <= (none + full) / 2


def test_the_mean_of_micro_batch_means_is_another_gradient(model_path: Path, plain_gradient: Tensor) -> None:
    """Negative control: the usual wrong formula."""
    engine = engine_of(model_path)
    batches = micro_batches(RandomDocuments(), ROWS, CUTS["several"])
    assert relative(gradient(engine, batches, mean_of_means(batches)), plain_gradient) > 1e-2


def mean_of_means(batches: list[Batch]) -> SimpleNamespace:
    """Supervised fine-tuning whose loss is the mean over micro-batches of their means over tokens."""
    tokens = sum(len(batch.trained_M) for batch in batches)

    def loss(out: TokenOut, batch: Batch) -> LossOut:
        wrong = -out.logprob_M.mean() / len(batches) * tokens
        return LossOut(wrong, {"loss": wrong.detach()})

    return SimpleNamespace(loss=loss, slope=lambda batch: None)


def test_two_processes_give_the_same_gradient(model_path: Path, plain_gradient: Tensor, tmp_path: Path) -> None:
    for processes in (1, 2):
        saved = gradient_on_ranks(processes, model_path, tmp_path / f"{processes}.pt", wrong=False)
        assert relative(saved, plain_gradient) < 1e-5


def test_the_mean_over_ranks_is_another_gradient(model_path: Path, plain_gradient: Tensor, tmp_path: Path) -> None:
    """Negative control: each rank divides by its own tokens and FSDP takes the mean."""
    assert relative(gradient_on_ranks(2, model_path, tmp_path / "wrong.pt", wrong=True), plain_gradient) > 1e-2


@pytest.mark.parametrize("processes", [2, 4])
def test_a_rank_with_one_trained_token_counts_for_one_token(processes: int, model_path: Path, tmp_path: Path) -> None:
    """The gradient and its logged norm are those of one process; the wrong ways would not be."""
    expected = gradient(engine_of(model_path), [collate(unequal_documents(), range(8))])
    run_ranks("gradient.py", model_path, tmp_path / "found.pt", "unequal", processes=processes)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert relative(found["gradient"], expected) < 1e-5
    assert relative(found["mean over ranks"], expected) > 1e-2
    assert found["norm"].item() == pytest.approx(expected.norm().item(), rel=1e-5)
    assert found["norm of one shard"].item() != pytest.approx(expected.norm().item(), rel=1e-2)


def gradient_on_ranks(processes: int, model_path: Path, saved: Path, *, wrong: bool) -> Tensor:
    run_ranks("gradient.py", model_path, saved, "wrong" if wrong else "right", processes=processes)
    return torch.load(saved, weights_only=True)


# Each architecture brings its own attention, norms, windows, experts or logit rules.
ARCHITECTURES = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "mistral with a sliding window": (MistralForCausalLM, MistralConfig, {"sliding_window": 3}),
    "gemma3 with sliding windows": (Gemma3ForCausalLM, Gemma3TextConfig, {"sliding_window": 3, "head_dim": 16}),
    "cohere with scaled logits": (CohereForCausalLM, CohereConfig, {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "granite with scaled logits": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 8.0}),
    "qwen3 with experts": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_documents_packed_have_the_logprobs_they_have_alone(name: str, tmp_path: Path) -> None:
    kind, config, changes = ARCHITECTURES[name]
    shape = qwen2_config().to_dict()
    shape = {
        key: shape[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    }
    path = write_model(tmp_path, config(**shape, vocab_size=512, **changes), kind=kind)  # type: ignore[arg-type]
    scorer = TokenScorer(load_for_training(str(path)).model)
    check_scorer(scorer)
    alone = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    assert largest_difference(scorer.eval(), alone) < 2e-5


def test_gpt2_with_learned_positions_is_served_too(tmp_path: Path) -> None:
    path = write_model(
        tmp_path,
        GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=512, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0),
        kind=GPT2LMHeadModel,
    )
    alone = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    scorer = TokenScorer(load_for_training(str(path)).model).eval()
    assert largest_difference(scorer, alone) < 2e-5
    batch = collate([RandomDocuments().document(i) for i in range(4)], range(4))
    counted_on = replace(batch, position_ids_T=torch.arange(len(batch.input_ids_T)))
    with torch.no_grad():
        difference = scorer(counted_on).logprob_M - scorer(batch).logprob_M
    assert difference.abs().max() > 1e-2, "positions that do not begin anew with each document would not be seen"


def test_without_document_bounds_packed_logprobs_differ(model_path: Path) -> None:
    """Negative control: one long sequence in place of documents."""
    scorer = TokenScorer(load_for_training(str(model_path)).model).eval()
    batch = collate([RandomDocuments().document(i) for i in range(4)], range(4))
    with torch.no_grad():
        right = scorer(batch).logprob_M
        batch.cu_seqlens = torch.tensor([0, len(batch.input_ids_T)], dtype=torch.int32)
        assert (scorer(batch).logprob_M - right).abs().max() > 1e-2


def test_a_token_of_one_document_does_not_move_another(model_path: Path) -> None:
    scorer = TokenScorer(load_for_training(str(model_path)).model).eval()
    (first, mask), other = RandomDocuments().document(0), RandomDocuments().document(1)
    with torch.no_grad():
        before = scorer(collate([(first, mask), other], [0, 1])).logprob_M[-int(other[1][1:].sum()) :]
        after = scorer(collate([((first + 1) % 512, mask), other], [0, 1])).logprob_M[-int(other[1][1:].sum()) :]
    torch.testing.assert_close(before, after, rtol=0, atol=0)


def test_an_architecture_that_mixes_documents_is_refused_before_training(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = TokenScorer(load_for_training(str(model_path)).model)
    monkeypatch.setattr(
        "verl.engine.scorers.packed_kwargs", lambda batch: {"cu_seq_lens_q": torch.tensor([0, len(batch.input_ids_T)]), "max_length_q": 8}
    )
    with pytest.raises(UserError, match="in packed batches differ from those of single documents"):
        check_scorer(scorer)


@pytest.mark.parametrize("known", [False, True], ids=["slope unknown", "slope known"])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_chunked_logprobs_and_their_gradients_are_those_of_whole_logits(
    known: bool, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verl.engine.logprobs.CHUNK_LOGITS", 50 * 7)
    torch.manual_seed(0)
    inputs = torch.randn(20, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True), torch.randn(50, requires_grad=True)
    target, slope = torch.randint(0, 50, (20,)), torch.randn(20)
    found = token_scores(*inputs, target, LogitRule(factor), slope if known else None).logprob_M
    hidden, weight, bias = inputs
    whole = torch.log_softmax((hidden @ weight.T + bias) * factor, -1).gather(1, target[:, None]).squeeze(1)
    torch.testing.assert_close(found, whole)
    mine, theirs = (torch.autograd.grad((logprob * slope).sum(), inputs) for logprob in (found, whole))
    torch.testing.assert_close(mine, theirs)


def test_a_known_slope_is_the_derivative_of_the_loss() -> None:
    """The backward pass takes the slope's word for it, so an algorithm that gave a wrong one would train something else."""
    batch = collate([RandomDocuments().document(0)], [0])
    logprob = torch.randn(len(batch.trained_M), requires_grad=True)
    (derivative,) = torch.autograd.grad(sft.loss(TokenOut(logprob), batch).sum, logprob)
    assert torch.equal(sft.slope(batch), derivative)


def test_frozen_weights_get_no_gradient(model_path: Path) -> None:
    """Adapters train without the output layer's gradient, which would be the largest of all."""
    hidden, weight = torch.randn(5, 16, requires_grad=True), torch.randn(50, 16)
    token_scores(hidden, weight, None, torch.arange(5), slope=torch.ones(5)).logprob_M.sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_a_rank_without_rows_takes_part_and_adds_nothing(model_path: Path) -> None:
    batches = micro_batches(RandomDocuments(), ROWS, CUTS["one micro-batch"])
    alone = gradient(engine_of(model_path), batches)
    with_filler = gradient(engine_of(model_path), [*batches, collate([], [])])
    torch.testing.assert_close(with_filler, alone, rtol=1e-6, atol=1e-9)


def test_at_learning_rate_zero_nothing_moves(model_path: Path) -> None:
    before, after = weights_around_training(engine_of(model_path, config=OptimConfig(lr=0.0)), steps=3)
    assert all(torch.equal(b, a) for b, a in zip(before, after, strict=True))


def test_every_trained_tensor_moves_at_a_learning_rate_of_one_in_a_million(model_path: Path) -> None:
    config = OptimConfig(lr=1e-6, lr_scheduler="constant", warmup_steps_ratio=0.0, weight_decay=0.0)
    before, after = weights_around_training(engine_of(model_path, config=config), steps=100)
    assert all(not torch.equal(b, a) for b, a in zip(before, after, strict=True))


def test_pure_bfloat16_weights_would_not_all_move(model_path: Path) -> None:
    """Negative control: updates of 1e-6 are rounded away in weights near 1 such as those of the norms."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    ids = torch.from_numpy(RandomDocuments().document(0)[0]).long()[None]
    for _ in range(100):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert any(torch.equal(b, a) for b, a in zip(before, model.parameters(), strict=True))


def weights_around_training(engine: Engine, steps: int) -> tuple[list[Tensor], list[Tensor]]:
    before = [p.detach().clone() for p in engine.trained]
    batches = micro_batches(RandomDocuments(), ROWS, CUTS["one micro-batch"])
    for step in range(steps):
        engine.train_step(batches, sft, step)
    return before, [p.detach() for p in engine.trained]


def test_the_logged_norm_is_the_global_one_before_clipping(model_path: Path, plain_gradient: Tensor) -> None:
    metrics = engine_of(model_path, config=OptimConfig(clip_grad=0.1)).train_step(
        micro_batches(RandomDocuments(), ROWS, CUTS["several"]), sft, 0
    )
    assert metrics["grad_norm"].item() == pytest.approx(plain_gradient.norm().item(), rel=1e-5)


class Broken:
    """Supervised fine-tuning with a loss or a gradient that is not finite."""

    def __init__(self, loss: float = 1.0, gradient: float = 1.0):
        self._loss, self._gradient = loss, gradient

    def loss(self, out: TokenOut, batch: Batch) -> LossOut:
        right = -out.logprob_M.sum()
        if not math.isfinite(self._gradient):
            right = right * self._gradient
        return LossOut(right - right.detach() + right.detach().nan_to_num() * self._loss, {})

    def slope(self, batch: Batch) -> None:
        return None


@pytest.mark.parametrize("broken", [Broken(loss=math.nan), Broken(loss=math.inf), Broken(gradient=math.nan), Broken(gradient=math.inf)])
def test_a_step_that_is_not_finite_is_not_taken(broken: Broken, model_path: Path) -> None:
    """Weights, moments and their count are afterwards those of a run without it."""
    config = OptimConfig(lr=1e-3, lr_scheduler="constant", warmup_steps_ratio=0.0)
    batches = micro_batches(RandomDocuments(), ROWS, CUTS["several"])
    skipping, plain = engine_of(model_path, config=config), engine_of(model_path, config=config)
    steps: list[tuple[Engine, list[Any]]] = [(skipping, [sft, broken, sft]), (plain, [sft, sft])]
    for engine, algorithms in steps:
        found = [engine.train_step(batches, algorithm, 0) for algorithm in algorithms]
        assert [float(metrics["skipped"]) for metrics in found] == [float(algorithm is broken) for algorithm in algorithms]
    for p, other in zip(skipping.trained, plain.trained, strict=True):
        assert torch.equal(p, other) and p.grad is None
        state, expected = (optimizer_state(e.optimizer, q) for e, q in ((skipping, p), (plain, other)))
        assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_without_the_check_such_a_step_would_ruin_the_weights(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    monkeypatch.setattr(Tensor, "isfinite", lambda tensor: torch.ones_like(tensor, dtype=torch.bool))
    engine = engine_of(model_path)
    engine.train_step(micro_batches(RandomDocuments(), ROWS, CUTS["several"]), Broken(gradient=math.nan), 0)
    assert all(p.isnan().any() for p in engine.trained)


def test_a_step_that_is_not_taken_uses_up_no_learning_rate(model_path: Path) -> None:
    config = OptimConfig(lr=1e-3, lr_scheduler="linear", warmup_steps_ratio=0.0)
    batches = micro_batches(RandomDocuments(), ROWS, CUTS["one micro-batch"])

    def weights_after(*algorithms: tuple[int, Any]) -> Tensor:
        engine = engine_of(model_path, config=config)
        for step, algorithm in algorithms:
            engine.train_step(batches, algorithm, step)
        return torch.cat([p.detach().flatten() for p in engine.trained])

    skipping = weights_after((0, sft), (1, Broken(loss=math.nan)), (2, sft))
    assert torch.equal(skipping, weights_after((0, sft), (1, sft)))
    assert not torch.equal(skipping, weights_after((0, sft), (2, sft))), "a schedule that goes on would not be seen"


def test_scores_are_those_of_training_to_the_bit_and_have_no_gradient(model_path: Path) -> None:
    engine = engine_of(model_path)
    batches = micro_batches(RandomDocuments(), ROWS, CUTS["several"])
    scored = engine.score(batches)
    for batch, out in zip(batches, scored, strict=True):
        assert torch.equal(out.logprob_M, engine.scorer(batch).logprob_M.detach()) and not out.logprob_M.requires_grad
    assert engine.scorer.training


def test_a_frozen_model_scores_and_has_no_optimizer(model_path: Path) -> None:
    cpu = torch.device("cpu")
    frozen = Engine(TokenScorer(load_for_training(str(model_path)).model), None, total_steps=0, device=cpu, compute_dtype=torch.float32)
    batches = micro_batches(RandomDocuments(), ROWS, CUTS["several"])
    expected = engine_of(model_path).score(batches)
    assert all(torch.equal(a.logprob_M, b.logprob_M) for a, b in zip(frozen.score(batches), expected, strict=True))
    assert frozen.trained == [] and not hasattr(frozen, "optimizer")


@pytest.mark.parametrize("known", [False, True], ids=["slope unknown", "slope known"])
def test_temperature_and_entropy_are_those_of_whole_logits(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verl.engine.logprobs.CHUNK_LOGITS", 50 * 7)
    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    target, slope = torch.randint(0, 50, (20,)), torch.randn(20)
    rule = LogitRule(factor=0.5, temperature=0.7)
    found = token_scores(hidden, weight, None, target, rule, slope if known else None, True if known else "gradient")
    whole = torch.log_softmax(hidden @ weight.T * 0.5 / 0.7, -1)
    entropy = -(whole.exp() * whole).sum(-1)
    torch.testing.assert_close(found.logprob_M, whole.gather(1, target[:, None]).squeeze(1))
    torch.testing.assert_close(found.entropy_M, entropy)
    mine = (found.logprob_M * slope).sum() + (0.0 if known else (found.entropy_M * slope).sum())
    theirs = (whole.gather(1, target[:, None]).squeeze(1) * slope).sum() + (0.0 if known else (entropy * slope).sum())
    gradients = (torch.autograd.grad(total, (hidden, weight)) for total in (mine, theirs))
    torch.testing.assert_close(*gradients)
    assert known is not found.entropy_M.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_log_probabilities_and_entropies_are_those_of_whole_logits(dtype: torch.dtype) -> None:
    """In blocks of columns, the last of them not full; a logit far above the others, and one that rules its token out."""
    torch.manual_seed(0)
    logits_CV = (5 * torch.randn(7, 40_000)).to("cuda", dtype)
    logits_CV[1, -1], logits_CV[2, 5] = 90.0, -math.inf
    target_C = torch.randint(0, 40_000, (7,), device="cuda")
    whole = torch.log_softmax(logits_CV.double() * 0.7, -1)
    logprob_C, entropy_C = logprobs_and_entropy(logits_CV, target_C, 0.7)
    torch.testing.assert_close(logprob_C.double(), whole.gather(1, target_C[:, None]).squeeze(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy_C.double(), -torch.special.xlogy(whole.exp(), whole.exp()).sum(-1), rtol=1e-4, atol=1e-4)


class WithDropout(TokenScorer):
    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, batch: Batch, slope_M: Slope | None = None) -> TokenOut:
        out = super().forward(batch, slope_M)
        return TokenOut(self.dropout(out.logprob_M))


def test_scores_are_without_dropout(model_path: Path) -> None:
    cpu, batches = torch.device("cpu"), micro_batches(RandomDocuments(), ROWS, CUTS["several"])
    scorer = WithDropout(load_for_training(str(model_path)).model)
    engine = Engine(scorer, OptimConfig(), total_steps=1, device=cpu, compute_dtype=torch.float32)
    expected = engine_of(model_path).score(batches)
    assert all(torch.equal(a.logprob_M, b.logprob_M) for a, b in zip(engine.score(batches), expected, strict=True))
    assert engine.scorer.training and scorer.dropout.training


def test_a_soft_cap_comes_before_the_temperature() -> None:
    logits = torch.tensor([[3.0, -8.0]])
    torch.testing.assert_close(LogitRule(soft_cap=5.0, temperature=2.0)(logits), 5 * torch.tanh(logits / 5) / 2)


def test_validation_loss_is_the_mean_over_all_tokens(model_path: Path) -> None:
    engine = engine_of(model_path)
    whole = engine.evaluate(micro_batches(RandomDocuments(), ROWS, CUTS["one micro-batch"]), sft)["loss"].item()
    cut = engine.evaluate(micro_batches(RandomDocuments(), ROWS, CUTS["several"]), sft)["loss"].item()
    assert cut == pytest.approx(whole, rel=1e-6)
    assert engine.scorer.training


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_schedules_are_those_of_transformers_without_their_first_point(name: str) -> None:
    config = OptimConfig(lr=1e-3, lr_scheduler=name, warmup_steps_ratio=0.2)
    kind = "constant_with_warmup" if name == "constant" else name
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=4, num_training_steps=21)
    mine = learning_rate(config, total_steps=20)
    for step in range(20):
        optimizer.step()
        theirs.step()
        assert mine(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)


def test_wsd_is_stable_and_then_falls_to_its_floor() -> None:
    rate = learning_rate(
        OptimConfig(lr=1.0, lr_scheduler="wsd", warmup_steps_ratio=0.1, stable_ratio=0.5, min_lr_ratio=0.1), total_steps=100
    )
    curve = [rate(step) for step in range(100)]
    assert curve[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert curve[10:54] == [1.0] * 44
    assert all(a > b for a, b in pairwise(curve[56:])) and 0.1 < curve[-1] < 0.11
    assert math.isclose(max(curve), 1.0)
