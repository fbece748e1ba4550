"""A classifier on a CPU, in about a minute: which operations does a word problem need?

    python examples/classification/operations.py FOLDER [key=value …]

It writes questions with their label (`add`, `subtract`, `add then add`, …) and a small model with random weights into FOLDER, trains it,
and evaluates it on problems that it has not seen. The keys are those of `verl reward`.
"""

import json
import sys
from pathlib import Path

import verl
from verl.demo.problems import Problem, make_problems
from verl.models.tiny import write_tiny_model

NAMES = {"+": "add", "-": "subtract"}


def row_of(problem: Problem) -> dict[str, str]:
    return {"text": problem.question, "label": " then ".join(NAMES[step.operator] for step in problem.steps)}


def main(folder: Path, words: list[str]) -> float:
    """Return the accuracy on the test problems."""
    folder.mkdir(parents=True, exist_ok=True)
    train, test = make_problems(2000, 400, seed=1)
    for name, problems in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row_of(problem)) + "\n" for problem in problems))
    write_tiny_model(folder / "model", [problem.question for problem in train])
    keys = {
        "algorithm.name": "classify",
        "data.train_files": str(folder / "train.jsonl"),
        "data.train_batch_size": 32,
        "data.max_length": 256,
        "model.partial_pretrain": str(folder / "model"),
        "optim.lr": 1e-3,
        "trainer.default_local_dir": str(folder / "run"),
        "trainer.save_freq": -1,
    }
    run = verl.reward(keys, *words)
    found = verl.evaluate(f"model_path={run.checkpoint}", f"test_file={folder / 'test.jsonl'}", f"output_dir={folder / 'eval'}")
    return float(found.scores["accuracy"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
