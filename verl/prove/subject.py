"""What the proofs work on: a model directory, documents, rows, and runs that several proofs look at."""

import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from verl.config.objects import config_of
from verl.config.ppo import PPOConfig
from verl.config.sft import SFTConfig
from verl.config.shared import ModelConfig, OptimConfig
from verl.data.pack import Document
from verl.data.render import Renderer
from verl.engine.build import Built, build
from verl.engine.decisions import Workload, choose_spread, decide
from verl.engine.hardware import measure
from verl.engine.outline import Outline
from verl.models.load import load_tokenizer
from verl.prove import plain
from verl.prove.plain import experts_in
from verl.run import TrainResult
from verl.trainer import fsdp_sft_trainer, ppo_trainer

LOOPS = 8  # plain ones, whose weights differ by rounding
STEPS, LR = 3, 1e-3
MODELS = ("twin", "still", "auxiliary-loss", "random")  # in the scratch folder
DECODED = 20  # tokens
LENGTHS = (3, 70, 17, 5, 40, 23, 9, 52)  # tokens: shorter and longer than a twin's window of 16 and its short positions of 48
QUESTIONS = ["What is 17 + 25?", "Name a color.", "Is the sky blue today, or is it grey as it was the day before?", "Why?"]
ANSWERS = ["42", "Red, or green, or any of the others that a rainbow has.", "Blue.", "Because nobody has asked before; now somebody did."]
HELD_OUT = [
    {"question": "Who are you?", "answer": "A twin."},
    {"question": "Count to five, please.", "answer": "One, two, three, four, five."},
]


@dataclass
class Subject:
    """A model to prove.

    Attributes:
        name: what the user named.
        model: its directory: the tiny twin, or the model itself.
        folder: a scratch folder.
        config: that of `model`.
        given: that of what the user named; the twin's is smaller.
        origin: the directory or Hub name whose tokenizer and chat template are proved; None: a config came alone.
        random: what makes training random in the model's config, such as dropout; `model` has none of it.
    """

    name: str
    model: Path
    folder: Path
    config: PretrainedConfig
    given: PretrainedConfig
    origin: str | None = None
    random: dict[str, float] = field(default_factory=dict)

    def rounded(self, seeds: Iterable[int] = range(4)) -> Iterator[PreTrainedModel]:
        """Yield plain models whose weights differ by float32's rounding, one for each seed; with seed 0, as they are."""
        for seed in seeds:
            model, generator = plain.load(self.model), torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for weight in model.parameters() if seed else ():
                    weight.mul_(1 + torch.finfo(torch.float32).eps * torch.randn(weight.shape, generator=generator))
            yield model

    @cached_property
    def rounding(self) -> float:
        """How far log-probabilities and gradients are apart of plain models whose weights differ by rounding."""
        logprobs, gradients = [], []
        for model in self.rounded():
            with torch.no_grad():
                logprobs.append(plain.trained_logprobs(model, self.documents))
            gradients.append(plain.gradients(model, self.documents)[1])
        of_gradients = max(plain.relative(found, gradients[0]) for found in gradients[1:])
        return max(of_gradients, *(float((found - logprobs[0]).abs().max()) for found in logprobs[1:]))

    @cached_property
    def rounding_of_decoding(self) -> float:
        """`rounding`, or how far transformers' decoding of a document is from its forward pass, if that is more.

        State-space models decode by a recurrence what they train by chunks, in float32 in any case.
        """
        model = plain.load(self.model)
        try:
            found = [plain.decoding_difference(model, ids.tolist(), tokens=DECODED) for ids, _ in self.documents]
        except Exception:  # transformers itself cannot decode this one with a cache
            found = []
        return max([self.rounding, *found])

    @cached_property
    def rounding_after_steps(self) -> float:
        """How far losses of plain loops are apart that begin with weights that differ by rounding: what AdamW makes of it.

        A weight whose gradient is near 0 moves by the learning rate in any direction, and a token may then have another expert.
        """
        return float(np.ptp([self.plain_losses(model) for model in self.rounded()], axis=0).max())

    def plain_losses(self, model: PreTrainedModel) -> list[float]:
        """Train a plain model. Return its loss in each step, and that of other rows afterwards."""
        documents, others = self.rendered(self.train_file), self.rendered(self.test_file)
        return [*plain.train(model, documents, steps=STEPS, lr=LR, weight_decay=0.01, clip=1e6), plain.mean_loss(model, others)]

    def variant(self, name: str, changes: dict[str, Any]) -> "Subject":
        """Return the same model with other values in its config."""
        values = json.loads((self.model / "config.json").read_text(encoding="utf-8"))
        place = values["text_config"] if isinstance(values.get("text_config"), dict) else values
        place.update(changes)
        folder = self.folder / f"{name}-runs"
        folder.mkdir()
        return replace(self, model=with_config(self.model, values, self.folder / name), folder=folder)

    def named(self, text: str) -> str:
        """Return a text in which the models in the scratch folder, which is gone afterwards, have the name that the user gave."""
        for folder in (self.folder.resolve(), self.folder):
            models = "|".join(re.escape(name) for name in MODELS)
            text = re.sub(rf"{re.escape(str(folder))}/({models})(?![\w-])", self.name, text)
            text = text.replace(f"{folder}/", "")
        return text

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(str(self.model))

    @cached_property
    def vocabulary(self) -> int:
        return int(self.config.get_text_config().vocab_size)

    @cached_property
    def documents(self) -> list[Document]:
        """Documents of random tokens of text; most of each is trained."""
        random = np.random.default_rng(7)
        most = min(self.vocabulary, 256)
        return [(random.integers(0, most, n).astype(np.int32), np.arange(n) >= int(random.integers(1, 3))) for n in LENGTHS]

    @cached_property
    def train_file(self) -> Path:
        rows = [{"question": q, "answer": a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
        return self._rows("train.jsonl", rows)

    @cached_property
    def test_file(self) -> Path:
        return self._rows("test.jsonl", HELD_OUT)

    def _rows(self, name: str, rows: list[dict[str, str]]) -> Path:
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    def rendered(self, file: Path) -> list[Document]:
        """Return the documents of a file of rows, as training has them."""
        renderer = Renderer(self.tokenizer)
        found = []
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            chat = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
            document = renderer.chat(chat)
            found.append((np.array(document.input_ids, dtype=np.int32), np.array(document.loss_mask)))
        return found

    def build(self, dtype: torch.dtype = torch.float32, **settings: Any) -> Built:
        """Build an engine as fine-tuning does, with its checks and its choice of a path.

        Args:
            dtype: of weights and arithmetic. float64 is not for users: it shows that a difference is rounding.
        """
        chosen: dict[str, Any] = {"compile": False, "enable_gradient_checkpointing": False, "compute_dtype": "float32"} | settings
        model = ModelConfig(partial_pretrain=str(self.model), **chosen)
        outline, hardware = Outline(model), measure(torch.device("cpu"))
        workload = Workload(total_steps=STEPS, total_tokens=sum(LENGTHS) * STEPS, document_tokens=30.0, token_budget=sum(LENGTHS))
        decisions = decide(outline, hardware, workload, choose_spread(outline, hardware))
        decisions = replace(decisions, compute_dtype=dtype, param_dtype=dtype)
        stop_ids = Renderer(self.tokenizer).stop_ids
        built = build(model, OptimConfig(clip_grad=1e9), self.tokenizer, decisions, stop_ids=stop_ids, seed=1)
        experts_in(dtype, built.loaded.model)
        return built

    def fine_tune(self, name: str, **keys: Any) -> TrainResult:
        """Run `verl sft` on the rows, all of them in each step."""
        given = (
            {
                "data": {"train_files": str(self.train_file), "val_files": str(self.test_file), "train_batch_size": len(QUESTIONS)},
                "model": {"partial_pretrain": str(self.model), "compute_dtype": "float32", "compile": False},
                "optim": {"lr": LR, "lr_scheduler": "constant", "warmup_steps_ratio": 0.0, "clip_grad": 1e6},
                "trainer": {"total_training_steps": STEPS, "save_freq": -1, "test_freq": -1, "logger": []},
            },
            {"data.max_length": 128, "data.num_workers": 1, "data.cache_dir": str(self.folder / "cache")},
            {"trainer.default_local_dir": str(self.folder / name), **keys},
        )
        with silent():
            return fsdp_sft_trainer.train(config_of(SFTConfig, given))

    def reinforce(self, name: str, reward: Path, **keys: Any) -> TrainResult:
        """Run `verl ppo` with GRPO on the questions."""
        given = (
            {
                "data": {"train_files": str(self.train_file), "prompts_per_step": 2, "max_prompt_length": 96},
                "model": {"partial_pretrain": str(self.model), "compute_dtype": "float32", "compile": False},
                "algorithm": {"name": "grpo"},
                "optim": {"lr": LR},
                "reward": {"name": str(reward)},
                "rollout": {"samples_per_prompt": 3, "max_new_tokens": 24},
                "trainer": {"save_freq": "never", "logger": []},
            },
            {"trainer.default_local_dir": str(self.folder / name), **keys},
        )
        with silent():
            return ppo_trainer.train(config_of(PPOConfig, given))

    def describe(self) -> str:
        """Return the architecture, the layers and the size of what is proved."""
        text = self.config.get_text_config()
        layers = getattr(text, "num_hidden_layers", None) or "?"
        kinds = ", ".join(dict.fromkeys(getattr(text, "layer_types", None) or []))
        return f"{self.config.model_type}, {layers} layers{f' ({kinds})' if kinds else ''}"

    def path_of(self, built: Built) -> str:
        """Return the path that an engine takes, as the first lines of a run say it."""
        return built.describe().splitlines()[0].partition("attention: ")[2]

    @cached_property
    def tuned(self) -> Callable[[], TrainResult]:
        return _once(lambda: self.fine_tune("tuned"))

    @cached_property
    def adapter(self) -> Callable[[], TrainResult]:
        return _once(lambda: self.fine_tune("adapter", **{"model.lora_rank": 4, "optim.lr": 1e-2}))


def with_config(model: Path, values: dict[str, Any], target: Path) -> Path:
    """Write a model directory with other values in its config.json. The weights are the same files, if the file system allows."""
    others = shutil.ignore_patterns("config.json", "manifest.json")  # a manifest is of the config as it was
    shutil.copytree(model, target, ignore=others, copy_function=_link)
    (target / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return target


def _link(source: Any, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another file system
        shutil.copy2(source, target)


@contextmanager
def silent() -> Iterator[None]:
    """Keep what a run prints from the table."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def _once(run: Callable[[], TrainResult]) -> Callable[[], TrainResult]:
    """Return a function that runs once, and gives its result, or raises its error, to each caller."""
    kept: list[TrainResult | Exception] = []

    def result() -> TrainResult:
        if not kept:
            try:
                kept.append(run())
            except Exception as error:
                kept.append(error)
        if isinstance(kept[0], Exception):
            raise kept[0]
        return kept[0]

    return result
