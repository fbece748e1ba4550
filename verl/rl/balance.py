"""Balances the update over ranks: whole groups of answers move from ranks with more tokens to ranks with fewer.

A rank answers its share of the prompts, and its answers may be longer than those of others, which then wait for it in every pass of the
update. The engine divides by counts over all ranks, so the gradient does not depend on which rank has a group (invariant I1). Groups stay
whole, because advantages compare the answers to a prompt with each other. The plan depends on the lengths alone.

Dimensions: R ranks; F, E groups of the fullest and of another rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from verl import dist
from verl.rl.answering import Collected
from verl.rl.samples import Sample

TOLERANCE = 0.01  # of the mean: groups move until the fullest rank has at most so many tokens more, or no move helps

Cells = Mapping[object, Mapping[int, tuple[int, int]]]  # by the pass that groups share: by their numbers, rank and tokens


def balanced(collected: Collected, updates: int, *, separate: bool, share_prompts: bool) -> Collected:
    """Return the answers of a step with whole groups exchanged between ranks. Every rank calls it.

    Args:
        updates: updates of the step; each is balanced for itself.
        separate: whether the update leaves out groups with equal rewards, so that these are balanced for themselves too.
        share_prompts: whether the update computes a prompt once for all of its answers.
    """
    if dist.world_size() == 1 or not collected.kept:
        return collected
    place = {number: position * updates // len(collected.kept) for position, number in enumerate(collected.kept)}
    mine: dict[int, list[Sample]] = {}
    for sample in collected.samples:
        mine.setdefault(sample.group, []).append(sample)
    rows = [
        (number, trained_on(of, share_prompts=share_prompts), separate and len({sample.reward for sample in of}) == 1)
        for number, of in mine.items()
    ]
    cells: dict[object, dict[int, tuple[int, int]]] = {}
    for rank, of_rank in enumerate(dist.gathered(rows)):
        for number, tokens, is_flat in of_rank:
            cells.setdefault((place[number], is_flat), {})[number] = (rank, tokens)
    moves = plan_moves(cells, dist.world_size())
    if not moves:
        return collected
    leaving = {number: mine.pop(number) for number in list(mine) if number in moves}
    for moved in dist.gathered(leaving):
        mine |= {number: samples for number, samples in moved.items() if moves[number] == dist.rank()}
    return replace(collected, samples=[sample for number in sorted(mine) for sample in mine[number]])


def plan_moves(cells: Cells, ranks: int) -> dict[int, int]:
    """Return the groups that move, with their new ranks. Every rank computes the same plan.

    Args:
        cells: groups whose passes are separate, such as those of one update; ranks are balanced in each.
    """
    moves: dict[int, int] = {}
    for _, groups in sorted(cells.items(), key=lambda cell: str(cell[0])):
        places = {number: rank for number, (rank, _) in groups.items()}
        tokens = {number: count for number, (_, count) in sorted(groups.items())}
        while (better := _better(places, tokens, ranks)) is not None:
            places |= better
        moves |= {number: rank for number, rank in places.items() if rank != groups[number][0]}
    return moves


def _better(places: Mapping[int, int], tokens: Mapping[int, int], ranks: int) -> dict[int, int] | None:
    """Return a move of one group, or an exchange of two, that brings the fullest rank and another one nearest to each other."""
    members: list[list[int]] = [[] for _ in range(ranks)]
    for number in tokens:
        members[places[number]].append(number)
    load_R = np.array([sum(tokens[number] for number in of) for of in members])
    fullest, most = int(load_R.argmax()), float(load_R.mean()) * (1 + TOLERANCE)
    if load_R[fullest] <= most:
        return None
    count_F = np.array([tokens[number] for number in members[fullest]])
    for rank in np.argsort(load_R, kind="stable")[:-1].tolist():
        count_E = np.array([*(tokens[number] for number in members[rank]), 0])  # the last: nothing comes back
        gap = int(load_R[fullest] - load_R[rank])
        off_FE = np.abs(2 * (count_F[:, None] - count_E[None, :]) - gap)
        given, taken = np.unravel_index(int(off_FE.argmin()), off_FE.shape)
        if off_FE[given, taken] < gap * (1 - TOLERANCE):  # else it would hardly help, and be taken back
            back = {} if taken == len(members[rank]) else {members[rank][int(taken)]: fullest}
            return {members[fullest][int(given)]: rank, **back}
    return None


def trained_on(samples: Sequence[Sample], *, share_prompts: bool) -> int:
    """Return the number of tokens that the update computes for these answers."""
    found = [trajectory for sample in samples for trajectory in sample.trajectories]
    prompts = {trajectory.asked: len(trajectory.prompt_ids) for trajectory in found}
    in_prompts = sum(prompts.values()) if share_prompts else sum(len(trajectory.prompt_ids) for trajectory in found)
    return in_prompts + sum(len(trajectory.answer_ids) for trajectory in found)
