"""The examples that are one file of one's own: a method, a preference loss, a teacher, a reward, an optimizer. Each beside its formula."""

import json
from collections.abc import Iterator
from math import cos, log, pi
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from places import ROOT, run_ranks
from tiny import write_model, write_problems_and_model
from torch import Tensor

from verl import dist, plugin
from verl.algorithms.answers import Answers
from verl.config.load import load_config
from verl.config.ppo import PPOConfig
from verl.config.shared import OptimConfig
from verl.data.batch import Batch
from verl.data.pack import collate
from verl.demo.problems import make_problems
from verl.engine.contract import TokenOut
from verl.engine.optim import build_optimizer, state_bytes
from verl.errors import UserError
from verl.models.tiny import write_tiny_model
from verl.trainer import fsdp_sft_trainer, ppo_trainer, reward_trainer

EXAMPLES = ROOT / "examples"
ASYMRE, CPO, DISTILLATION = (EXAMPLES / "algorithms" / f"{name}.py" for name in ("asymre", "cpo", "distillation"))
COSINE, LION = EXAMPLES / "rewards" / "cosine_length.py", EXAMPLES / "optimizers" / "lion.py"
PAIRS: dict[str, object] = {"data.train_batch_size": 4, "data.max_length": 256}
ANSWERS: dict[str, object] = {
    "data.prompts_per_step": 4,
    "data.max_prompt_length": 128,
    "rollout.samples_per_prompt": 2,
    "rollout.max_new_tokens": 8,
    "reward.name": COSINE,
    "reward.longest": 8,
}


def example(path: Path) -> Any:
    return plugin.load("verl.algorithms", str(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems, pairs of answers to them, and a small model."""
    folder = write_problems_and_model(tmp_path_factory.mktemp("plugins"), narrow=False)
    problems, _ = make_problems(80, 1, seed=5)
    others = [*problems[1:], problems[0]]
    rows = [{"prompt": a.question, "chosen": a.answer, "rejected": b.answer} for a, b in zip(problems, others, strict=True)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(trainer: ModuleType, folder: Path, output: str, **changes: object) -> list[dict[str, float]]:
    """Run in this process; the metrics of each step."""
    keys: dict[str, object] = {
        "data.train_files": folder / ("pairs.jsonl" if trainer is reward_trainer else "train.jsonl"),
        "model.partial_pretrain": folder / "model",
        "trainer.total_training_steps": 2,
        "trainer.default_local_dir": folder / output,
        "optim.lr": 1e-3,
    }
    trainer.main([f"{key.replace('__', '.')}={value}" for key, value in {**keys, **changes}.items()])
    return [json.loads(line) for line in (folder / output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.start()
    yield
    dist.stop()


def batch_of(lengths: list[int], **values: Tensor) -> Batch:
    """Answers behind prompts of two tokens, with a value for each trained token."""
    documents = [(np.arange(n + 2, dtype=np.int32), np.arange(n + 2) >= 2) for n in lengths]
    split = {f"{name}_M": [part.numpy() for part in tensor.split(lengths)] for name, tensor in values.items()}
    return collate(documents, range(len(lengths)), values=split)


# A method with a key of its own


@pytest.mark.usefixtures("process_group")
def test_asymre_compares_answers_with_the_shifted_mean_of_their_group() -> None:
    """r - (V + δV), V the mean of the group; groups of rewards 1 0 0 0 and 0 4."""
    reward_A, group_A = np.array([1, 0, 0, 0, 0, 4], dtype=np.float32), np.array([7, 7, 7, 7, 3, 3])
    answers = Answers(reward_A, group_A, np.array([1, 2, 3, 1, 2, 1]), np.zeros(6, dtype=bool), max_new_tokens=10)
    method = example(ASYMRE)
    for shift in (0.0, -0.5):
        learned = method.advantages(answers, method.Settings(baseline_shift=shift)).advantages
        expected = [1 - 0.25, -0.25, -0.25, -0.25, -2, 2]
        assert [tokens.tolist() for tokens in learned] == [
            pytest.approx([value - shift] * n) for value, n in zip(expected, answers.lengths_A, strict=True)
        ]


def test_asymre_trains_by_its_key(folder: Path) -> None:
    found = [
        run(ppo_trainer, folder, f"asymre{shift}", **ANSWERS, algorithm__name=ASYMRE, algorithm__baseline_shift=shift)[0]
        for shift in (0.0, -5.0)
    ]
    assert found[0]["rl/reward"] == found[1]["rl/reward"], "the same answers"
    assert found[1]["train/loss"] - found[0]["train/loss"] == pytest.approx(-5.0, rel=1e-4), "minus the mean advantage"


# A preference loss


@pytest.mark.usefixtures("process_group")
def test_cpo_is_its_formula() -> None:
    """-log σ(β log π(y_w) - β log π(y_l)) - α mean log π(y_w), with its gradient, of answers of 2 and 3, and 1 and 2 tokens."""
    lengths = [2, 3, 1, 2]
    logprob_M = torch.tensor([-1.0, -2.0, -0.5, -1.5, -1.0, -3.0, -0.25, -0.75], requires_grad=True)
    method = example(CPO)
    loss = method.Loss(method.Settings(beta=0.5, nll_weight=2.0))
    out = loss.loss(TokenOut(logprob_M), batch_of(lengths))
    chosen, rejected, other_chosen, other_rejected = logprob_M.split(lengths)
    margins = 0.5 * torch.stack([chosen.sum() - rejected.sum(), other_chosen.sum() - other_rejected.sum()])
    expected = -torch.sigmoid(margins).log().sum() - 2.0 * (chosen.mean() + other_chosen.mean())
    torch.testing.assert_close(out.sum, expected)
    found_gradient, gradient = (torch.autograd.grad(value, logprob_M, retain_graph=True)[0] for value in (out.sum, expected))
    torch.testing.assert_close(found_gradient, gradient)
    assert float(out.count_sums["accuracy"]) == 0 and loss.count(batch_of(lengths)) == 2


def test_cpo_trains_without_a_reference(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys: dict[str, object] = {
        "algorithm.name": CPO,
        "algorithm.beta": 0.5,
        "data.train_max_samples": 4,
        "trainer.total_training_steps": 8,
    }
    metrics = run(reward_trainer, folder, "cpo", **PAIRS, **keys)
    said = capsys.readouterr().out
    assert "plan: a policy by CPO" in said and "reference:" not in said
    assert metrics[-1]["train/margin"] > metrics[0]["train/margin"] + 0.5 and metrics[-1]["train/loss"] < metrics[0]["train/loss"]
    assert "beta: 0.5" in (folder / "cpo" / "config.yaml").read_text()


# A teacher


def test_distillation_has_the_gradient_of_the_divergence_from_the_teacher() -> None:
    """On average over the tokens that the student draws; also where it has moved since it drew them, by the ratio."""
    student, moved, teacher = (torch.randn(5, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in range(3))
    method = example(DISTILLATION)
    loss = method.Loss(method.Settings(teacher="t"), 10)
    for drawn, now in ((student, student), (student, moved)):
        logits = now.clone().requires_grad_()
        logprob_M = logits.log_softmax(-1)
        divergence = (logprob_M.exp() * (logprob_M - teacher.log_softmax(-1))).sum()
        (expected,) = torch.autograd.grad(divergence, logits, retain_graph=True)
        batch = batch_of([5], ref_logprob=teacher.log_softmax(-1).float(), old_logprob=drawn.log_softmax(-1).float())
        (by_token,) = torch.autograd.grad(loss.loss(TokenOut(logprob_M), batch).sum, logprob_M, retain_graph=True)
        (found,) = torch.autograd.grad(logprob_M, logits, drawn.softmax(-1) * by_token, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        slope = loss.slope(batch)
        torch.testing.assert_close(torch.cat([slope(logprob_M[rows].detach(), rows) for rows in (slice(0, 2), slice(2, 5))]), by_token)
    own = batch_of([5], ref_logprob=teacher.log_softmax(-1).float())
    (by_token,) = torch.autograd.grad(loss.loss(TokenOut(logprob_M), own).sum, logprob_M)
    torch.testing.assert_close(loss.slope(own)(logprob_M.detach(), slice(0, 5)), by_token)


def test_a_student_comes_nearer_to_its_teacher(folder: Path) -> None:
    learned = run(fsdp_sft_trainer, folder, "teacher", **PAIRS, trainer__total_training_steps=30, optim__lr=3e-3)
    assert learned[-1]["train/loss"] < 3, "else it has nothing to teach"
    keys: dict[str, object] = {**ANSWERS, "algorithm.name": DISTILLATION, "data.prompts_per_step": 8, "optim.lr": 2e-3}
    teacher = {"algorithm.teacher": folder / "teacher" / "global_step_30"}
    gaps = [step["rl/teacher_gap"] for step in run(ppo_trainer, folder, "student", **keys, **teacher, trainer__total_training_steps=10)]
    assert np.mean(gaps[-3:]) < 0.75 * np.mean(gaps[:2])
    (same,) = run(ppo_trainer, folder, "own", **keys, algorithm__teacher=folder / "model", trainer__total_training_steps=1)
    assert same["rl/teacher_gap"] == pytest.approx(0, abs=1e-5) and same["train/grad_norm"] < 1e-4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["algorithm.teacher=./nowhere"], r"no such model directory"),
        (["algorithm.teacher={other}"], r"of the actor's tokens have other ids in this model"),
        (["algorithm.teacher={teacher}", "algorithm.keep_reference=false"], r"algorithm\.keep_reference=false with algorithm\.name="),
        ([], r"algorithm\.teacher must be given"),
    ],
)
def test_a_teacher_that_cannot_be_is_refused(words: list[str], said: str, folder: Path) -> None:
    write_tiny_model(folder / "other", ["a whole other text, with words of its own"])
    places = {"other": folder / "other", "teacher": folder / "model"}
    with pytest.raises(UserError, match=said):
        run(
            ppo_trainer,
            folder,
            "refused",
            **ANSWERS,
            algorithm__name=DISTILLATION,
            **dict(word.format(**places).split("=") for word in words),
        )


# A reward with keys


@pytest.mark.parametrize("words", [0, 100, 400])
@pytest.mark.parametrize("right", [True, False])
def test_the_cosine_reward_is_its_formula(words: int, right: bool) -> None:
    """η_min + (η_max - η_min) / 2 × (1 + cos(t π / T)), of a right answer from 2 to 1, of a wrong one from -10 to 0."""
    reward = example(COSINE)
    response = " ".join(["so"] * (words - 2) + ["####", "5" if right else "6"]) if words else ""
    first, last = (2.0, 1.0) if right and words else (-10.0, 0.0)
    expected = last + (first - last) / 2 * (1 + cos(words * pi / 400))
    assert reward.score("?", response, {"reference": "#### 5"}, reward.Settings()) == pytest.approx(expected)


def test_a_reward_reads_its_keys_from_the_config(folder: Path) -> None:
    assert example(COSINE).score("?", "so it is #### 5", {"reference": "5"}, example(COSINE).Settings(longest=4)) == -10.0
    metrics = run(
        ppo_trainer, folder, "rewarded", **{**ANSWERS, "reward.longest": 1, "reward.too_long": -3, "trainer.total_training_steps": 1}
    )
    assert metrics[0]["reward/cosine_length"] < -2, "nearly all answers are longer than a word"
    with pytest.raises(UserError, match=r"reward\.longest"):
        load_config(PPOConfig, ["data.train_files=t", "model.partial_pretrain=m", "reward.longest=3"])


# An optimizer


def test_lion_is_its_formula() -> None:
    """c = β1 m + (1 - β1) g; w -= lr (sign c + λ w); m = β2 m + (1 - β2) g. Weights of one dimension do not decay."""
    torch.manual_seed(0)
    matrix, vector = (torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 2), (4,)))
    expected, momentum = [matrix.detach().clone(), vector.detach().clone()], [torch.zeros(3, 2), torch.zeros(4)]
    optimizer = build_optimizer([matrix, vector], OptimConfig(str(LION), lr=0.1, weight_decay=0.5))
    for _ in range(3):
        for number, (p, decay) in enumerate(((matrix, 0.5), (vector, 0.0))):
            p.grad = torch.randn_like(p)
            direction = (0.9 * momentum[number] + 0.1 * p.grad).sign()
            expected[number] = expected[number] - 0.1 * (direction + decay * expected[number])
            momentum[number] = 0.99 * momentum[number] + 0.01 * p.grad
        optimizer.step()
    torch.testing.assert_close([matrix.detach(), vector.detach()], expected)
    assert state_bytes(OptimConfig(str(LION))) == 4.0


def test_a_run_with_lion_resumes_bit_for_bit(folder: Path) -> None:
    keys: dict[str, object] = {
        "optim.name": LION,
        "optim.betas": "[0.8,0.98]",
        "data.train_batch_size": 4,
        "trainer.total_training_steps": 6,
    }
    whole = run(fsdp_sft_trainer, folder, "lion", **keys, trainer__save_freq=3)
    half = {"trainer.resume_mode": "resume_path", "trainer.resume_from_path": folder / "lion" / "global_step_3"}
    rest = run(fsdp_sft_trainer, folder, "lion-rest", **keys, **half)
    assert [step["train/loss"] for step in rest] == [step["train/loss"] for step in whole[3:]]
    final = [(folder / name / "global_step_6" / "model.safetensors").read_bytes() for name in ("lion", "lion-rest")]
    assert final[0] == final[1] and whole[-1]["train/loss"] < whole[0]["train/loss"]


def test_lion_trains_and_resumes_on_two_processes_as_copies_and_as_shards(tmp_path: Path) -> None:
    run_ranks("own_optimizer.py", write_model(tmp_path / "model"), tmp_path, LION)
    found = json.loads((tmp_path / "found.json").read_text())
    for strategy in ("ddp", "fsdp2"):
        assert found[strategy]["resumed"] == found[strategy]["whole"]
    assert found["ddp"]["begun"] == pytest.approx(found["fsdp2"]["begun"], rel=1e-4)


LAZY = """
import torch

def state_bytes():
    return 0.0

def build(groups, settings, *, lr, copies):
    return torch.optim.SGD(groups, lr=lr, momentum=0.9)
"""


def test_an_optimizer_that_cannot_do_what_is_asked_for_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "lazy.py").write_text(LAZY)
    with pytest.raises(UserError, match="no state that a checkpoint can hold") as caught:
        run(fsdp_sft_trainer, folder, "lazy", optim__name=tmp_path / "lazy.py")
    assert "in __init__, as examples/optimizers/lion.py does" in str(caught.value.fix)
    for word, said in (
        ("model.param_dtype=bfloat16", "does not round stochastically"),
        ("model.fsdp_config.cpu_offload=true", "with offloading, the optimizer is AdamW"),
        ("optim.name=lions", "no optimizers named 'lions'"),
        ("optim.beta=[0,0]", r"did you mean optim\.betas\?"),
    ):
        key, _, value = word.partition("=")
        with pytest.raises(UserError, match=said):
            run(fsdp_sft_trainer, folder, "refused", **{"optim.name": LION, "data.train_batch_size": 4, key: value})


def test_log_2_is_where_a_model_begins_that_prefers_neither() -> None:
    """So that a formula of pairs that is compared with itself would be noticed."""
    method = example(CPO)
    out = method.Loss(method.Settings(nll_weight=0.0)).loss(TokenOut(torch.full((4,), -1.0)), batch_of([2, 2]))
    assert float(out.sum) == pytest.approx(log(2))
