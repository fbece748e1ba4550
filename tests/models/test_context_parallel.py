"""Documents spread over two processes: what each has of a batch, that the numbers are those of one process, and the trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import relative
from places import run_ranks
from ranks.context import CASES, Results, results
from runs import SFT, Metrics, command, losses, metrics_of
from sft_runs import words
from tiny import RandomDocuments, qwen2_config, write_model, write_problems_and_model

from verl import dist
from verl.config.sft import DataConfig
from verl.config.shared import ModelConfig
from verl.data.loader import Packing, micro_batches
from verl.data.pack import collate
from verl.engine.build import check_context
from verl.engine.hardware import measure
from verl.engine.outline import Outline
from verl.errors import UserError, exit_on_user_error
from verl.models.attention.flash import Heads
from verl.models.attention.packed import packed_attention
from verl.trainer import fsdp_sft_trainer

# Of PyTorch's own making, while it traces.
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
STEPS = 6


@pytest.mark.parametrize("packing", [Packing(4, 240), Packing(4, 240, multiple_of_tokens=16), Packing(3, None)])
@pytest.mark.parametrize("parts", [2, 3])
def test_the_parts_of_a_batch_are_the_whole_of_it(parts: int, packing: Packing) -> None:
    rows = np.arange(7)
    whole = micro_batches(RandomDocuments(), rows, packing)
    spread = [micro_batches(RandomDocuments(), rows, packing, part=part, parts=parts) for part in range(parts)]
    for number, expected in enumerate(whole):
        batches = [batches[number] for batches in spread]
        tokens, real = len(batches[0].input_ids_T), len(expected.input_ids_T)
        assert {len(batch.input_ids_T) for batch in batches} == {tokens} and tokens % packing.multiple_of_tokens == 0
        for name in ("input_ids_T", "position_ids_T", "target_T", "loss_mask_T"):
            assert torch.equal(torch.cat([getattr(batch, name) for batch in batches])[:real], getattr(expected, name)[:real]), name
        trained = torch.cat([batch.trained_M + part * tokens for part, batch in enumerate(batches)])
        assert torch.equal(trained, expected.trained_M)
        for batch in batches:
            assert (
                batch.cu_seqlens[-1] == parts * tokens and batch.max_seqlen == int(batch.cu_seqlens.diff().max()) and batch.parts == parts
            )


def test_a_rank_without_rows_has_filler_for_every_part() -> None:
    batch = collate([], [], multiple_of_tokens=6)
    assert len(batch.part(1, 2).input_ids_T) == 3 and len(batch.part(1, 2).trained_M) == 0
    assert batch.cu_seqlens.tolist() == [0, 6] and batch.sample_ids_S.tolist() == [-1]


@pytest.mark.parametrize(
    ("query", "key_value", "size", "expected"), [(14, 2, 2, (7, 1)), (14, 2, 7, (2, 2)), (6, 3, 2, (3, 3)), (8, 1, 4, (2, 1))]
)
def test_each_process_has_the_key_heads_of_its_query_heads(query: int, key_value: int, size: int, expected: tuple[int, int]) -> None:
    heads = Heads(query, key_value, 64).of_each(size)
    assert (heads.query, heads.key_value) == expected


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each case's results by two processes that share each micro-batch, and those without an exchange."""
    folder = tmp_path_factory.mktemp("two")
    run_ranks("context.py", folder, *CASES)
    found: dict[str, Any] = torch.load(folder / "found.pt")
    return found


@pytest.fixture(scope="module")
def of_one(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Results]:
    """By the name of a case: the results of one process that neither compiles nor computes anything again."""
    return lambda name: results(tmp_path_factory.mktemp("one"), CASES[name].plain())


@pytest.mark.parametrize("name", CASES)
def test_two_processes_with_half_of_each_batch_have_the_gradient_and_the_losses_of_one(
    name: str, of_two: dict[str, Any], of_one: Callable[[str], Results]
) -> None:
    expected, found = of_one(name), Results(*of_two[name])
    assert relative(found.gradient, expected.gradient) < 1e-5
    assert found.losses == pytest.approx(expected.losses, rel=1e-5) and found.losses[-1] < found.losses[0]


def test_a_compiled_layer_is_one_graph_with_the_exchange_inside(of_two: dict[str, Any]) -> None:
    found = Results(*of_two["compiled"])
    assert found.graphs == 1 and found.graph_breaks == 0


def test_without_the_exchange_the_gradient_is_another_and_the_check_before_training_says_so(
    of_two: dict[str, Any], of_one: Callable[[str], Results]
) -> None:
    """Negative control: each process takes its part of a document for a document."""
    found, expected = Results(*of_two["wrong"]), of_one("two key heads")
    assert relative(found.gradient, expected.gradient) > 1e-2
    assert found.losses != pytest.approx(expected.losses, rel=1e-3)
    assert "split over several processes" in of_two["said of wrong"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_problems_and_model(tmp_path_factory.mktemp("sft"))


def config(folder: Path, output: str, **changes: object) -> list[str]:
    steps = {"trainer__total_training_steps": STEPS, "trainer__save_freq": 2, "data__val_files": folder / "test.jsonl"}
    return words(folder, output, **{**steps, "optim__lr_scheduler": "constant", **changes})


def goes_on(folder: Path, output: str, source: str, step: int) -> list[str]:
    return config(folder, output, trainer__resume_mode="resume_path", trainer__resume_from_path=folder / source / f"global_step_{step}")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Metrics:
    fsdp_sft_trainer.main(config(folder, "plain"))
    return metrics_of(folder / "plain")


@pytest.fixture(scope="module")
def shared(folder: Path, plain: Metrics) -> str:
    """Two pairs of processes go on from the second step of one; each pair has rows of its own, and shares them. What they say."""
    arguments = [*goes_on(folder, "shared", "plain", 2), "model.context_parallel_size=2"]
    return run_ranks(*SFT, *arguments, processes=4)


def assert_same_run(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    for key in ("train/loss", "train/tokens", "train/supervised_tokens"):
        assert [line[key] for line in found] == pytest.approx([line[key] for line in expected], rel=1e-5)
    assert found[-1]["val/loss"] == pytest.approx(expected[-1]["val/loss"], rel=1e-5)


def test_pairs_that_share_documents_go_on_as_one_process_does(folder: Path, plain: Metrics, shared: str) -> None:
    found = metrics_of(folder / "shared")
    assert_same_run(found, plain[2:])
    for line, before in zip(found, [plain[1], *found], strict=False):
        tokens = line["train/tokens"] - before["train/tokens"]
        assert line["perf/tokens_per_second_per_gpu"] == pytest.approx(tokens / line["perf/step_seconds"] / 4)
    assert "on each of 2 groups of 2 processes" in shared


def test_one_process_goes_on_as_pairs_that_shared_documents(folder: Path, plain: Metrics, shared: str) -> None:
    fsdp_sft_trainer.main(goes_on(folder, "shared-then-plain", "shared", 4))
    assert_same_run(metrics_of(folder / "shared-then-plain"), plain[4:])


def test_without_a_batch_size_processes_that_share_a_micro_batch_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "world_size", lambda: 4)
    monkeypatch.setattr(dist, "rank", lambda: 3)
    monkeypatch.setattr(dist, "_context_size", 2)
    hardware = measure(torch.device("cpu"))
    loader = fsdp_sft_trainer.build_loader(DataConfig(micro_batch_size_per_gpu=3), RandomDocuments(), 1, hardware)  # type: ignore[arg-type]
    assert (loader.rows_per_step, loader.rank, loader.world_size, loader.part, loader.parts) == (6, 1, 2, 1, 2)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(0, "model.context_parallel_size: found 0"), (2, "1 processes are not a multiple of 2"), ("two", "model.context_parallel_size")],
)
def test_a_wrong_size_is_a_users_error_before_the_data_is_read(
    size: object, expected: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        exit_on_user_error(fsdp_sft_trainer.main, config(folder, "bad", model__context_parallel_size=size))
    said = capfd.readouterr()
    assert end.value.code == 2 and expected in said.err and "fix: " in said.err and "Traceback" not in said.err
    assert not (folder / "bad").exists()


def test_an_architecture_that_keeps_what_it_is_given_from_its_attention_is_a_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each process would take its part for the whole."""
    monkeypatch.setattr(dist, "_context_size", 2)
    row_1NTD, bounds = torch.zeros(1, 4, 6, 8), torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(UserError, match="does not pass its arguments on"):
        packed_attention(torch.nn.Module(), row_1NTD, row_1NTD, row_1NTD, None, cu_seq_lens_q=bounds, max_length_q=6)
    found, _ = packed_attention(torch.nn.Module(), row_1NTD, row_1NTD, row_1NTD, None, cu_seq_lens_q=bounds, max_length_q=6, context="")
    assert found.shape == (1, 6, 4, 8)


def test_heads_that_cannot_be_shared_out_are_a_users_error_with_the_sizes_that_do(tmp_path: Path) -> None:
    model = str(write_model(tmp_path, qwen2_config(num_attention_heads=4)))
    check_context(Outline(ModelConfig(partial_pretrain=model, context_parallel_size=4)))
    with pytest.raises(UserError) as error:
        check_context(Outline(ModelConfig(partial_pretrain=model, context_parallel_size=3)))
    assert "the 4 attention heads" in error.value.what and error.value.where == "model.context_parallel_size=3"
    assert error.value.fix == "set one of 1, 2, 4"


@pytest.mark.gpu
def test_two_gpus_that_share_documents_give_the_losses_of_one(folder: Path) -> None:
    """In bfloat16 with FlashAttention and NCCL."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for name, processes in (("one-gpu", 1), ("two-gpus", 2)):
        done = command(*SFT, *config(folder, name, model__context_parallel_size=processes), processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (losses(metrics_of(folder / name)) for name in ("one-gpu", "two-gpus"))
    assert two[0] == pytest.approx(one[0], rel=1e-3) and two == pytest.approx(one, rel=1e-2)
