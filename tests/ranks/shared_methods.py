"""Each method's loss on answers that share their prompts, cut up in several ways, on one process or several.

On several ranks it saves every method's gradient: shared_methods.py MODEL FILE, the processes having other groups.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from ranks.methods import SHARING, engine_of, fields_of_answers, gradient

from verl import dist
from verl.data.batch import Batch
from verl.data.groups import collate_groups, grouped, pack_groups
from verl.data.pack import Document, collate

# Prompts, and their answers by number. The last prompt is too short to share. Answers 2k and 2k + 1 are a pair, too.
PROMPTS: Mapping[int, tuple[int, ...]] = {40: (0, 1, 2, 3), 24: (4, 5), 31: (6, 7), 9: (8, 9)}
ANSWERS = 10
# The groups of each micro-batch; filler alone is one, too.
Cut = Sequence[Sequence[Sequence[int]]]
CUTS: Mapping[str, Cut] = {
    "one micro-batch": [list(PROMPTS.values())],
    "a micro-batch for each prompt": [[numbers] for numbers in PROMPTS.values()],
    "a group in two micro-batches": [[(0, 1), (4, 5)], [(2, 3)], [(6, 7), (8, 9)], []],
    "some share none": [[(8, 9), (0, 1)], [(2, 3), (4, 5), (6, 7)]],
}
SINGLE: Cut = [[(0, 1), (2,), (3,)], [(4,), (5,), (6, 7)], [(8,), (9,)]]  # a pair is never torn apart


def answers() -> list[Document]:
    """Two tokens inside answers are not trained, as replies of a tool are not."""
    random, found = np.random.default_rng(5), list[Document]()
    for prompt, numbers in PROMPTS.items():
        ids = random.integers(0, 512, prompt)
        for _ in numbers:
            own = random.integers(0, 512, int(random.integers(4, 20)))
            mask = np.arange(prompt + len(own)) >= prompt
            mask[prompt + 2 : prompt + 4] = False
            found.append((np.concatenate([ids, own]).astype(np.int32), mask))
    return found


def shared_batches(cut: Cut, fields: Mapping[str, Sequence[np.ndarray]]) -> list[Batch]:
    documents, batches = answers(), []
    for rows in cut:
        groups = [grouped(numbers, documents.__getitem__) for numbers in rows]
        (ordered,) = pack_groups(groups, token_budget=10**6, multiple_of=1)
        batches.append(collate_groups(ordered, documents.__getitem__, multiple_of_tokens=8, values=fields))
    return batches


def unshared_batch(fields: Mapping[str, Sequence[np.ndarray]]) -> Batch:
    return collate(answers(), range(ANSWERS), values=fields)


def main(model: str, saved: str) -> None:
    dist.start()
    fields = fields_of_answers(Path(model), answers())
    mine: Cut = [[(6, 7)], []] if dist.rank() else [[(0, 1, 2, 3)], [(4, 5), (8, 9)]]
    found = {name: gradient(engine_of(name, Path(model)), shared_batches(mine, fields), method) for name, method in SHARING.items()}
    if dist.is_main():
        torch.save(found, saved)
    dist.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
