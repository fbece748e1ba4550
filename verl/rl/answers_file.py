"""Answers of the next step in a checkpoint: trainer/answers.safetensors, in runs with `rollout.staleness=1`.

They were drawn by weights that the checkpoint does not have, so a run that resumes from it could not draw them again.

Dimensions: A answers, T tokens of all answers together.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from verl.errors import UserError
from verl.regular_file import open_file
from verl.rollout import Completion

NAME = "trainer/answers.safetensors"
UNFINISHED = 2  # in place of a number of REASONS
REASONS: tuple[Literal["stop", "length"], ...] = ("stop", "length")
DTYPES = {
    "number_A": torch.int64,
    "length_A": torch.int64,
    "reason_A": torch.int64,
    "oldest_A": torch.int64,
    "token_T": torch.int32,
    "logprob_T": torch.float64,
    "version_T": torch.int64,
}

Drawn = Mapping[int, list[Completion]]  # answers to each prompt, by the prompt's number


def write_answers(path: Path, drawn: Drawn) -> None:
    """Write answers with their log-probabilities, exactly. Raises OSError or SafetensorError: the disk is full or fails."""
    answers = [(number, answer) for number in sorted(drawn) for answer in drawn[number]]
    columns: dict[str, list[Any]] = {
        "number_A": [number for number, _ in answers],
        "length_A": [len(answer.token_ids) for _, answer in answers],
        "reason_A": [REASONS.index(answer.finish_reason) if answer.is_finished else UNFINISHED for _, answer in answers],
        "oldest_A": [answer.version for _, answer in answers],
        "token_T": [token for _, answer in answers for token in answer.token_ids],
        "logprob_T": [logprob for _, answer in answers for logprob in answer.logprobs or []],
        "version_T": [version for _, answer in answers for version in answer.versions or [answer.version] * len(answer.token_ids)],
    }
    save_file({name: torch.tensor(values, dtype=DTYPES[name]) for name, values in columns.items()}, path)


def read_answers(checkpoint: Path) -> dict[int, list[Completion]]:
    """Return the answers of a checkpoint by the number of their prompt; none if it has no file of them.

    Raises:
        UserError: the file is damaged.
    """
    path = checkpoint / NAME
    if not path.exists():
        return {}
    try:
        with os.fdopen(open_file(path), "rb") as file:
            return _answers(load(file.read()))
    except (OSError, SafetensorError, KeyError, ValueError, IndexError) as error:
        fix = "resume from another checkpoint: trainer.resume_mode=resume_path trainer.resume_from_path=…/global_step_N"
        raise UserError(f"the checkpoint is damaged: {NAME}: {error}", where=str(checkpoint), fix=fix) from error


def _answers(found: Mapping[str, Tensor]) -> dict[int, list[Completion]]:
    columns = {name: found[name].tolist() for name in DTYPES}
    if any(found[name].dtype != dtype for name, dtype in DTYPES.items()):
        raise ValueError("its tensors have other dtypes than were written")
    lengths, tokens = columns["length_A"], len(columns["token_T"])
    if min(lengths, default=0) < 0 or {sum(lengths), len(columns["logprob_T"]), len(columns["version_T"])} != {tokens}:
        raise ValueError("the lengths of its answers are not those of its tokens")
    drawn: dict[int, list[Completion]] = {}
    start = 0
    rows = zip(columns["number_A"], lengths, columns["reason_A"], columns["oldest_A"], strict=True)
    for number, length, reason, oldest in rows:
        part = slice(start, start := start + length)
        versions = columns["version_T"][part]
        drawn.setdefault(number, []).append(
            Completion(
                columns["token_T"][part],
                "length" if reason == UNFINISHED else REASONS[reason],
                columns["logprob_T"][part],
                oldest,
                None if set(versions) <= {oldest} else versions,
                reason != UNFINISHED,
            )
        )
    return drawn
