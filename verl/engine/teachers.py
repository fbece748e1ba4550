"""Teachers: frozen models that score each trained position of a student's micro-batch, while the student computes it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from verl import dist
from verl.config.shared import ModelConfig, TeacherConfig
from verl.data.batch import Batch
from verl.engine import divergence
from verl.engine.build import Built, check_context, make_engine
from verl.engine.contract import Slope, TokenOut
from verl.engine.divergence import Divergence, Head, Scored
from verl.engine.engine import Engine
from verl.engine.logprobs import LogitRule
from verl.engine.outline import Outline, count
from verl.engine.references import load_frozen
from verl.engine.scorers import Scorer, TokenScorer
from verl.errors import UserError
from verl.models.attention.flash import Heads
from verl.models.attention.packed import ForwardPath
from verl.models.kind import ADAPTER, LANGUAGE_MODEL, check_kind
from verl.models.load import check_vocabulary, load_tokenizer, read_adapter_config, resolve

BETAS = {"forward": 0.0, "reverse": 1.0}


class TeacherScorer(Scorer):
    """A model that compares a student with itself at the trained positions of a batch.

    Both heads are multiplied here, where a sharded teacher has its own head whole.
    """

    def __init__(self, model: PreTrainedModel, kind: Divergence, path: ForwardPath):
        super().__init__(model, path)
        self.kind, self.rule = kind, LogitRule.of(model.config)

    def forward(self, batch: Batch, student: Head, target_M: Tensor, slope: Slope | None, entropy: bool) -> Scored:
        hidden_MH = self.hidden(batch).index_select(0, batch.trained_M)
        head: Any = self.model.get_output_embeddings()
        mine = Head(hidden_MH, head.weight, getattr(head, "bias", None), self.rule)
        assert not isinstance(slope, Tensor)
        return divergence.score(student, mine, target_M, self.kind, slope, entropy=entropy)


@dataclass(frozen=True)
class Teacher:
    """A teacher of a run.

    Attributes:
        name: path or name of the model.
    """

    name: str
    engine: Engine

    def scores(self, batch: Batch, student: tuple[Any, ...], target_M: Tensor, slope: Slope | None, entropy: bool) -> TokenOut:
        """Score the student's trained tokens, as `verl.engine.scorers.TokenScorer.teacher`.

        Args:
            student: the parts of a Head.
            slope: function that returns both derivatives (`verl.engine.divergence.Slopes`); None: no gradient is needed.
        """
        assert slope is not None or not torch.is_grad_enabled(), "a loss with a teacher must have a slope"
        head, scorer = Head(*student), self.engine.scorer
        with torch.no_grad():
            scored: Scored = scorer(batch, head, target_M, slope, entropy)
        if isinstance(scorer, FSDPModule):
            scorer.reshard()
        return divergence.attached(head, scored)

    @contextmanager
    def teaching(self, student: Engine) -> Iterator[None]:
        """In this context, the student's outputs have their divergence from this teacher."""
        scorer = student.scorer
        assert isinstance(scorer, TokenScorer)
        scorer.teacher = self.scores
        try:
            yield
        finally:
            scorer.teacher = None

    def describe(self) -> str:
        """Return the model and what is compared, as one line for the log."""
        scorer = self.engine.scorer
        assert isinstance(scorer, TeacherScorer)
        kind, model = scorer.kind, scorer.model
        names = {beta: name for name, beta in BETAS.items()}
        tokens = "all tokens" if kind.top_k is None else f"its {kind.top_k} likeliest tokens, the others as one"
        compared = f"{names.get(kind.beta, f'mix (beta {kind.beta:g})')} divergence over {tokens}, temperature {kind.temperature:g}"
        return f"teacher: {self.name}, {type(model).__name__}, {count(model):,} weights, frozen; {compared}"


def check_teacher_model(config: TeacherConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check what a teacher's files tell, before any weights are read.

    Raises:
        UserError: there is no such model, it is of another kind, or has another tokenizer than the student.
    """
    assert config.partial_pretrain is not None
    path, where = config.partial_pretrain, f"teacher.partial_pretrain={config.partial_pretrain}"
    resolve(path)
    check_kind(path, (LANGUAGE_MODEL, ADAPTER), where=where)
    theirs = load_tokenizer(path, trust_remote_code=config.trust_remote_code)
    _check_same_tokenizer(tokenizer, theirs, where)
    check_context(outline := _outline(config))
    if outline.path.own_logits:
        raise _own_logits(where)


def _check_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, where: str) -> None:
    """Raise UserError unless both have the same tokens with the same ids: a teacher reads the student's ids, and its own are learned."""
    mine, theirs = student.get_vocab(), teacher.get_vocab()
    odd = sorted(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token))
    if odd:
        ids = (str(vocabulary.get(odd[0], "no token")) for vocabulary in (mine, theirs))
        what = f"it has another tokenizer than the student: {len(odd):,} tokens differ, such as {odd[0]!r}, {' and '.join(ids)}"
        raise UserError(
            f"{what} (student and teacher)",
            where=where,
            fix="give a teacher of the student's family; or let another one write answers, and fine-tune on them",
        )


def _own_logits(where: str) -> UserError:
    what = "this architecture computes its logits by code of its own, which cannot be compared in chunks"
    return UserError(what, where=where, fix="choose a model of another architecture")


def heads_of_teacher(config: TeacherConfig) -> tuple[Heads, ...]:
    """Return the attention heads of the teacher, if there is one."""
    return () if config.partial_pretrain is None else _outline(config).heads


def weights_of_teacher(config: TeacherConfig) -> int:
    """Return the number of weights of the teacher; 0 if there is none. Of an adapter, they are those of its base model."""
    return 0 if config.partial_pretrain is None else _outline(config).parameters


def build_teacher(config: TeacherConfig, student: Built) -> Teacher:
    """Build the teacher in the compute dtype, distributed like the student.

    Raises:
        UserError: no such model, it has another tokenizer or lacks some of its tokens, or one of the two computes its logits by itself.
    """
    assert config.partial_pretrain is not None
    path, outline, decisions = config.partial_pretrain, _outline(config), replace(student.decisions, graph_tokens=0)
    check_teacher_model(config, student.tokenizer)
    if student.engine.scorer.path.own_logits:
        raise _own_logits("model.partial_pretrain with a teacher")
    adapter = path if read_adapter_config(path) is not None else None
    source = outline.settings.partial_pretrain
    loaded = load_frozen(source, adapter, decisions, outline.path, trust_remote_code=config.trust_remote_code)
    check_vocabulary(loaded.model, student.tokenizer, path)
    kind = Divergence(BETAS.get(config.divergence, config.beta), config.top_k, config.temperature)
    return Teacher(path, make_engine(TeacherScorer(loaded.model, kind, outline.path), None, loaded, decisions))


def _outline(config: TeacherConfig) -> Outline:
    """Return the outline of the teacher, or of the base model of a teacher that is an adapter."""
    path = str(config.partial_pretrain)
    adapter = read_adapter_config(path)
    base = path if adapter is None else str(adapter["base_model_name_or_path"])
    settings = ModelConfig(partial_pretrain=base, trust_remote_code=config.trust_remote_code, context_parallel_size=dist.context_size())
    return Outline(settings)
