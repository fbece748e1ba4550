"""Files of a step: rollouts/step_N.jsonl with every answer and its reward."""

import json
from collections.abc import Collection, Sequence
from itertools import groupby
from typing import Any

from verl import dist
from verl.rl.outcome import ENDINGS
from verl.rl.samples import Sample
from verl.run import Run


def write_samples(run: Run, name: str, samples: Sequence[Sample], trained: Collection[int] | None = None) -> None:
    """Write the answers of all ranks into `rollouts/NAME.jsonl`, one JSON object per line, in the order of the prompts' numbers.

    Every rank calls it; rank 0 writes. If the disk fails, this is told once, and the run continues.

    Args:
        trained: numbers of the prompts to train on, for the field `trained` of each line; None: the lines have no such field.
    """
    mine = [_line(sample) | ({} if trained is None else {"trained": sample.group in trained}) for sample in samples]
    lines = [line for of_rank in dist.gathered(mine) for line in of_rank]
    if dist.is_main():
        lines.sort(key=lambda line: line["number"])  # stable: keeps the order of the answers to one prompt
        run.replace(f"rollouts/{name}.jsonl", "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines))


def _line(sample: Sample) -> dict[str, Any]:
    return {
        "where": sample.prompt.where,
        "number": sample.group,
        "prompt": sample.prompt.text,
        **({"earlier_turns": sample.earlier} if sample.earlier else {}),
        "response": sample.text,
        "reference": sample.prompt.row.get("reference"),
        "reward": sample.reward,
        **{f"reward/{name}": value for name, value in sample.parts.items()},
        "tokens": sample.trained_tokens,
        "finish_reason": sample.finish_reason,
        "turns": sample.turns,
        **({} if sample.outcome is None else {"ending": ENDINGS[sample.outcome.ending], "turn_rewards": sample.outcome.rewards}),
        "version": sample.version,
        **({} if sample.versions is None else {"versions": [[each, len(list(run))] for each, run in groupby(sample.trained_versions)]}),
    }
