"""How evenly the update's work lies on ranks when answers have long tails, with and without the exchange of groups (verl/rl/balance.py).

    python benchmarks/packing.py

It needs no GPU and no model. Lengths are drawn from a lognormal distribution with the given mean, cut at the longest answer; answers to one
prompt have a part of their length in common. Each line is the mean over many steps:

    fullest       tokens of the fullest rank over the mean of all ranks; 1: the other ranks never wait
    squares       the same for the sums of squared lengths, to which the cost of attention is proportional
    in lockstep   the sum over micro-batches of the largest one of all ranks, over the mean of all ranks' tokens: what FSDP2 waits for,
                  as its ranks exchange weights in every micro-batch
    micro-batches of each rank, and the share of them that is filler alone
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from verl.data.pack import pack  # noqa: E402
from verl.rl.balance import plan_moves  # noqa: E402

Rank = list[list[int]]  # lengths of the answers of each group


def draw(random: np.random.Generator, options: argparse.Namespace) -> list[list[int]]:
    """Return the lengths of a step's answers with their prompts, by group."""
    groups = options.answers // options.samples
    shared, own = (
        random.normal(0, options.spread * share**0.5, size) for share, size in ((0.5, (groups, 1)), (0.5, (groups, options.samples)))
    )
    lengths = np.exp(shared + own)
    answers = np.minimum(options.longest, np.maximum(1, lengths * options.mean / np.exp(options.spread**2 / 2))).astype(int)
    return (answers + options.prompt).tolist()


def work(ranks: Sequence[Rank], budget: int) -> tuple[float, ...]:
    """Return the numbers of a line."""
    flat = [[length for group in rank for length in group] for rank in ranks]
    tokens, squares = (np.array([sum(length**power for length in rank) for rank in flat]) for power in (1, 2))
    packed = [pack(rank, token_budget=budget, multiple_of=1) if rank else [] for rank in flat]
    most = max(map(len, packed))
    filled = [[sum(rank[i] for i in bin_) for bin_ in bins] + [0] * (most - len(bins)) for rank, bins in zip(flat, packed, strict=True)]
    filler = sum(most - len(bins) for bins in packed) / (most * len(packed))
    lockstep = np.array(filled).max(0).sum() / tokens.mean()
    return tokens.max() / tokens.mean(), squares.max() / squares.mean(), lockstep, most, filler


def exchanged(ranks: Sequence[Rank]) -> list[Rank]:
    """Return the groups after their exchange."""
    groups = [(rank, group) for rank, of in enumerate(ranks) for group in of]
    moves = plan_moves({0: {number: (rank, sum(group)) for number, (rank, group) in enumerate(groups)}}, len(ranks))
    found: list[Rank] = [[] for _ in ranks]
    for number, (rank, group) in enumerate(groups):
        found[moves.get(number, rank)].append(group)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"answers": 512, "samples": 8, "mean": 400, "longest": 2048, "prompt": 100, "budget": 16384, "steps": 50}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--spread", type=float, default=1.0, help="standard deviation of the logarithm of a length")
    options = parser.parse_args()
    print(f"{'ranks':>5}  {'':<9} {'fullest':>7}  {'squares':>7}  {'in lockstep':>11}  {'micro-batches':>13}  {'filler':>6}")
    for ranks in (1, 2, 4, 8):
        random = np.random.default_rng(0)
        lines: dict[str, list[tuple[float, ...]]] = {"as drawn": [], "exchanged": []}
        for _ in range(options.steps):
            groups = draw(random, options)
            of_ranks = [groups[rank::ranks] for rank in range(ranks)]
            lines["as drawn"].append(work(of_ranks, options.budget))
            lines["exchanged"].append(work(exchanged(of_ranks), options.budget))
        for name, found in lines.items():
            fullest, squares, lockstep, most, filler = np.mean(found, 0)
            print(f"{ranks:>5}  {name:<9} {fullest:>7.3f}  {squares:>7.3f}  {lockstep:>11.3f}  {most:>13.2f}  {filler:>6.1%}")


if __name__ == "__main__":
    main()
