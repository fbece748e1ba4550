"""The load-balancing loss of routers: that of transformers on the whole batch, however rows are cut up."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rl_runs
import sft_runs
import torch
from engines import engine_of, relative
from places import run_ranks
from tiny import VOCABULARY, RandomDocuments, write_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from verl.algorithms import sft
from verl.data.loader import Packing, micro_batches
from verl.engine.engine import Engine
from verl.engine.router_loss import RouterLoss, find_router_loss
from verl.errors import UserError
from verl.models.attention.packed import ForwardPath
from verl.models.load import load_for_training, load_tokenizer

pytestmark = pytest.mark.usefixtures("process_group")

COEF = 0.5  # so large that the gradient shows it
ROWS = np.arange(8)
CUTS = {
    "one micro-batch": Packing(8, 8 * 60),
    "several": Packing(1, 100),
    "one document each, with filler": Packing(1, None, 32),
    "padded, three rows each": Packing(3, None),
}
SHAPE: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
EXPERTS: dict[str, Any] = dict(num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=COEF)
MIXTRAL: dict[str, Any] = {**SHAPE, **EXPERTS, "num_local_experts": 4}
FAMILIES: dict[type[PreTrainedModel], Any] = {
    MixtralForCausalLM: MixtralConfig(**MIXTRAL),
    Qwen3MoeForCausalLM: Qwen3MoeConfig(
        **{**SHAPE, "head_dim": 8}, **EXPERTS, num_experts=6, moe_intermediate_size=16, mlp_only_layers=[1]
    ),
    Qwen2MoeForCausalLM: Qwen2MoeConfig(**SHAPE, **EXPERTS, num_experts=6, moe_intermediate_size=16, shared_expert_intermediate_size=16),
    OlmoeForCausalLM: OlmoeConfig(**SHAPE, **EXPERTS, num_experts=6),
    GraniteMoeForCausalLM: GraniteMoeConfig(**SHAPE, **EXPERTS, num_local_experts=4),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("routers")


def path_of(kind: type[PreTrainedModel], folder: Path) -> Path:
    path = folder / kind.__name__
    return path if path.exists() else write_model(path, FAMILIES[kind], kind=kind)


def plain(path: Path) -> tuple[float, Tensor]:
    """The router loss and the gradient of the whole loss by transformers alone: one padded batch, with its own attention."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager")
    documents = [RandomDocuments().document(int(row)) for row in ROWS]
    longest = max(len(ids) for ids, _ in documents)
    ids_ST, labels_ST, mask_ST = torch.zeros(3, len(documents), longest, dtype=torch.int64)
    for row, (ids, mask) in enumerate(documents):
        ids_ST[row, : len(ids)], mask_ST[row, : len(ids)] = torch.from_numpy(ids), 1
        labels_ST[row] = -100
        labels_ST[row, : len(ids)] = torch.where(torch.from_numpy(mask), torch.from_numpy(ids).long(), -100)
    labels_ST[:, 0] = -100
    out = model(input_ids=ids_ST, attention_mask=mask_ST, labels=labels_ST)
    out.loss.backward()
    return float(out.aux_loss.detach()), torch.cat([p.grad.flatten() for p in model.parameters()])


def trained_engine(path: Path, *, checkpointing: bool = False, coef: float | None = None) -> Engine:
    engine = engine_of(path, checkpointing=checkpointing)
    engine.router_loss, _ = find_router_loss(engine.scorer.model, coef)
    assert engine.router_loss is not None
    return engine


def backward(engine: Engine, cut: Packing) -> tuple[float, Tensor]:
    found = engine.backward(micro_batches(RandomDocuments(), ROWS, cut), sft)
    return float(found["router_aux_loss"]), torch.cat([p.grad.flatten() for p in engine.trained])


@pytest.mark.parametrize("kind", FAMILIES, ids=lambda kind: kind.__name__)
def test_loss_and_gradient_are_those_of_transformers_on_the_whole_batch(kind: type[PreTrainedModel], folder: Path) -> None:
    path = path_of(kind, folder)
    loss, expected = plain(path)
    found, gradient = backward(trained_engine(path), CUTS["several"])
    assert found == pytest.approx(loss, abs=1e-6) and relative(gradient, expected) < 1e-5


@pytest.mark.parametrize("cut", CUTS)
def test_it_is_the_same_however_rows_are_cut(cut: str, folder: Path) -> None:
    path = path_of(MixtralForCausalLM, folder)
    loss, expected = plain(path)
    found, gradient = backward(trained_engine(path), CUTS[cut])
    assert found == pytest.approx(loss, abs=1e-6) and relative(gradient, expected) < 1e-5


def test_the_mean_over_micro_batches_and_no_loss_at_all_are_other_gradients(folder: Path) -> None:
    """Negative controls: the usual wrong formula, and what is silently left out."""
    path = path_of(MixtralForCausalLM, folder)
    _, expected = plain(path)
    batches = micro_batches(RandomDocuments(), ROWS, CUTS["several"])
    without, alone = engine_of(path), trained_engine(path)
    without.backward(batches, sft)
    assert relative(torch.cat([p.grad.flatten() for p in without.trained]), expected) > 1e-2
    assert alone.router_loss is not None
    of = alone.router_loss.of

    def of_one(batch: Any) -> Tensor:
        alone.router_loss._counts_E, alone.router_loss._ahead = None, []
        return of(batch) / len(batches)

    alone.router_loss.of = of_one
    _, gradient = backward(alone, CUTS["several"])
    assert relative(gradient, expected) > 1e-3


def test_it_is_the_same_with_recomputed_activations(folder: Path) -> None:
    path = path_of(MixtralForCausalLM, folder)
    expected = backward(trained_engine(path), CUTS["several"])
    loss, gradient = backward(trained_engine(path, checkpointing=True), CUTS["several"])
    assert loss == pytest.approx(expected[0], abs=1e-6) and relative(gradient, expected[1]) < 1e-5


def test_it_is_the_same_where_documents_are_read_one_at_a_time(folder: Path) -> None:
    """As for models that cannot read packed batches: the decoder runs several times on one micro-batch, and not on filler."""
    path = path_of(MixtralForCausalLM, folder)
    expected = backward(trained_engine(path), CUTS["several"])
    engine = trained_engine(path)
    engine.scorer.path = ForwardPath(packed=False, attention="eager")
    engine.scorer.model.set_attn_implementation("eager")
    loss, gradient = backward(engine, Packing(1, 100, 32))
    assert loss == pytest.approx(expected[0], abs=1e-6) and relative(gradient, expected[1]) < 1e-5


def test_with_jitter_the_experts_that_are_counted_are_those_that_are_trained(folder: Path) -> None:
    """Each micro-batch draws the same random numbers twice, and the next step others."""
    path = write_model(folder / "jitter", MixtralConfig(**MIXTRAL, router_jitter_noise=0.5), kind=MixtralForCausalLM)
    engine = trained_engine(path)
    assert engine.router_loss is not None
    batches = micro_batches(RandomDocuments(), ROWS, CUTS["several"])
    counted: list[list[Tensor]] = []
    sums = RouterLoss._sums

    def remember(self: RouterLoss, batch: Any) -> Any:
        found = sums(self, batch)
        counted[-1].append(found.counts_E)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RouterLoss, "_sums", remember)
        for _ in range(2):
            counted.append([])
            engine.backward(batches, sft)
    ahead = len(batches) - 1
    for step in counted:
        assert all(torch.equal(a, b) for a, b in zip(step[:ahead], step[ahead + 1 :], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(*counted, strict=True))


def test_two_processes_give_the_same_gradient(folder: Path) -> None:
    path = path_of(MixtralForCausalLM, folder)
    loss, expected = plain(path)
    run_ranks("router_loss.py", path, folder / "found.pt", processes=2)
    found = torch.load(folder / "found.pt", weights_only=True)
    assert float(found["loss"]) == pytest.approx(loss, abs=1e-6) and relative(found["gradient"], expected) < 1e-5


def test_the_validation_loss_and_the_training_loss_are_without_it(folder: Path) -> None:
    path = path_of(MixtralForCausalLM, folder)
    batches = micro_batches(RandomDocuments(), ROWS, CUTS["several"])
    engine, without = trained_engine(path), engine_of(path)
    expected = without.backward(batches, sft)["loss"]
    assert torch.equal(engine.backward(batches, sft)["loss"], expected)
    assert set(engine.evaluate(batches, sft)) == set(without.evaluate(batches, sft))
    assert engine.evaluate(batches, sft)["loss"] == pytest.approx(float(expected), rel=1e-6)


def test_the_config_says_whether_it_is_trained_and_the_key_how_much(folder: Path) -> None:
    off = write_model(folder / "off", MixtralConfig(**{**MIXTRAL, "output_router_logits": False}), kind=MixtralForCausalLM)
    for path, coef, expected in ((off, None, None), (off, 0.1, 0.1), (path_of(MixtralForCausalLM, folder), None, COEF)):
        loss, notes = find_router_loss(load_for_training(str(path)).model, coef)
        assert (loss and loss.coef) == expected and bool(notes) == (expected is not None)
        assert expected is None or f"trained with coefficient {expected:g} (" in notes[0]
    assert find_router_loss(load_for_training(str(path)).model, 0.0)[0] is None


@pytest.mark.parametrize(
    ("kind", "config", "why"),
    [
        (
            DogeForCausalLM,
            DogeConfig(**SHAPE, is_moe=True, num_experts=16, num_experts_per_tok=2, output_router_logits=True),
            "another kind",
        ),
    ],
)
def test_a_loss_of_another_kind_is_named_and_its_coefficient_refused(kind: type[PreTrainedModel], config: Any, why: str) -> None:
    model = kind(config)
    loss, (note,) = find_router_loss(model, None)
    assert loss is None and note.startswith("warning:") and why in note
    with pytest.raises(UserError, match=why) as caught:
        find_router_loss(model, 0.01)
    assert caught.value.where == "model.router_aux_loss_coef=0.01"


def test_every_trainer_trains_logs_and_says_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rl_runs.write_folder(folder)
    tokenizer = load_tokenizer(str(folder / "model"))
    own = dict(vocab_size=len(tokenizer), max_position_embeddings=256, bos_token_id=None, eos_token_id=None)
    path = write_model(folder / "mixture", MixtralConfig(**{**MIXTRAL, **own}), kind=MixtralForCausalLM)
    tokenizer.save_pretrained(path)
    mixture: dict[str, object] = {"model__partial_pretrain": path, "trainer__total_training_steps": 2, "trainer__save_freq": "never"}
    for line in sft_runs.train(folder, "sft", **mixture):
        assert 1.0 < line["train/router_aux_loss"] < 4.0
    said = capsys.readouterr().out
    assert "load-balancing loss is trained with coefficient 0.5 (config.json)" in said and "K active)" in said
    same = rl_runs.train(folder, "rl", **mixture, reward__name=folder / "vowels.py", model__router_aux_loss_coef=0.25)
    assert all(1.0 < line["rl/router_aux_loss"] < 4.0 for line in same)
    assert "load-balancing loss is trained with coefficient 0.25 (model.router_aux_loss_coef)" in capsys.readouterr().out
