"""What fine-tuning learns: the answers, or also the probabilities of a teacher at each of their tokens."""

from transformers import PreTrainedTokenizerBase

from verl.algorithms import sft
from verl.config.shared import TeacherConfig
from verl.engine.build import Built
from verl.engine.contract import Algorithm
from verl.engine.scorers import TokenScorer
from verl.models.attention.flash import Heads
from verl.run import Run


def heads_of_teacher(config: TeacherConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Heads, ...]:
    """Check the teacher, if there is one, before rows are read, and return its attention heads.

    Raises:
        UserError: there is no such model, or it has another tokenizer than the student.
    """
    if config.partial_pretrain is None:
        return ()
    from verl.engine import teachers  # few runs have one

    teachers.check_teacher_model(config, tokenizer)
    return teachers.heads_of_teacher(config)


def find_algorithm(config: TeacherConfig, built: Built, run: Run) -> Algorithm:
    """Return the loss. A teacher is loaded, and scores whatever the student computes from now on.

    Raises:
        UserError: the teacher cannot be used.
    """
    if config.partial_pretrain is None:
        return sft
    from verl.algorithms.distill import FixedLoss  # as above
    from verl.engine.teachers import build_teacher

    run.enter("loading the teacher")
    teacher = build_teacher(config, built)
    run.say(teacher.describe())
    scorer = built.engine.scorer
    assert isinstance(scorer, TokenScorer)
    scorer.teacher = teacher.scores
    return FixedLoss(config)
