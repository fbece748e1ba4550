"""Checks of the keys of a teacher. Each raises a UserError that names the key."""

from verl.config.shared import TeacherConfig
from verl.config.unused import check_unused
from verl.errors import UserError, at_least, one_of


def check_teacher(teacher: TeacherConfig, plain: TeacherConfig) -> None:
    """Check the keys of a teacher; `plain` has the command's defaults."""
    one_of("teacher.divergence", teacher.divergence, ("reverse", "forward", "mix"))
    at_least("teacher.top_k", teacher.top_k, 1)
    if not 0.0 < teacher.weight <= 1.0:
        fix = "give a number above 0, up to 1, which is the share of the teacher in the loss"
        raise UserError(f"found {teacher.weight}", where="teacher.weight", fix=fix)
    if not 0.0 < teacher.beta < 1.0:
        fix = "give a number above 0 and below 1, such as 0.5; teacher.divergence=forward and reverse are the two ends"
        raise UserError(f"found {teacher.beta}", where="teacher.beta", fix=fix)
    if not 0.0 < teacher.temperature < float("inf"):
        raise UserError(f"{teacher.temperature} is not positive", where="teacher.temperature", fix="give a number above 0, such as 1.0")
    given = teacher.partial_pretrain
    if given is not None and not given.strip():
        raise UserError("is empty", where="teacher.partial_pretrain", fix="give a model directory or Hub name, or leave the key out")
    if given is None:
        check_unused(teacher, plain, "teacher", "teacher.partial_pretrain")
    if teacher.beta != plain.beta and teacher.divergence != "mix":
        fix = "set teacher.divergence=mix, or remove this key"
        raise UserError(f"has no effect with teacher.divergence={teacher.divergence}", where="teacher.beta", fix=fix)


def is_alone(teacher: TeacherConfig) -> bool:
    """Return whether a model learns from its teacher alone, and from no reward or answer beside it."""
    return teacher.partial_pretrain is not None and teacher.weight == 1.0
