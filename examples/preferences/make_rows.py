"""Rows with a preference that a small model learns on a CPU, and that model: python examples/preferences/make_rows.py [FOLDER]

The questions are word problems. The better answer shows its steps, and the worse one has the result alone. The model is random; rows for
fine-tuning (sft.jsonl) have an answer of either kind, half of each, so that it has no preference before.

    pairs.jsonl      {"prompt": …, "chosen": …, "rejected": …}
    margins.jsonl    the same with {"margin": …}, the number of steps that the better answer shows
    labels.jsonl     {"prompt": …, "completion": …, "label": true or false}
    *-test.jsonl     the same of other questions; questions-test.jsonl has them with the better answer
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

from verl.demo.problems import Problem, make_problems
from verl.models.tiny import write_tiny_model

TRAIN, TEST = 512, 100


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    train, test = make_problems(TRAIN, TEST, seed=1)
    for ending, problems in (("", train), ("-test", test)):
        pairs = [pair_of(problem) for problem in problems]
        write(folder / f"margins{ending}.jsonl", pairs)
        write(folder / f"pairs{ending}.jsonl", [{key: pair[key] for key in ("prompt", "chosen", "rejected")} for pair in pairs])
        sides = [(pair, side) for pair in pairs for side in ("chosen", "rejected")]
        write(
            folder / f"labels{ending}.jsonl",
            [{"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"} for pair, side in sides],
        )
    draw = random.Random(0)
    either = [{"question": pair["prompt"], "answer": pair[draw.choice(("chosen", "rejected"))]} for pair in map(pair_of, train)]
    write(folder / "sft.jsonl", either)
    write(folder / "questions-test.jsonl", [{"question": pair["prompt"], "answer": pair["chosen"]} for pair in map(pair_of, test)])
    write_tiny_model(folder / "model", [f"{problem.question}\n{problem.answer}" for problem in train])
    print(f"written to {folder}: {TRAIN} pairs and {TEST} of other questions, and a model")


def pair_of(problem: Problem) -> dict[str, Any]:
    *steps, result = problem.answer.splitlines()
    return {"prompt": problem.question, "chosen": problem.answer, "rejected": result, "margin": len(steps)}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "preferences"))
