"""A smaller student of the demo's model, fine-tuned on rows alone, and on the same rows with a teacher. On a CPU, offline:

    python examples/distillation/smaller_student.py [FOLDER] [key=value …]

The teacher is trained first, as the demo's model is. The student has a third of its weights. It is trained twice from the same random
weights, on the same rows in the same order, and answers the held-out problems after every so many steps. The last lines say after how many
it answered SHARE of what the teacher answers. Keys: rows, steps, every, test_rows, seed, temperature.
"""

import sys
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import verl
from verl.demo.problems import write_problems
from verl.demo.run import RECIPE
from verl.models.tiny import tiny_model, tiny_tokenizer
from verl.run import read_metrics

SHARE = 0.9
DEFAULTS = {"rows": 24000, "steps": 1500, "every": 100, "test_rows": 200, "seed": 1, "temperature": 4}
STUDENT = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}


def main(argv: list[str]) -> dict[str, dict[int, float]]:
    """Train all three, print what came of it, and return the exact match by the number of steps, of each."""
    given = dict(word.split("=", 1) for word in argv if "=" in word)
    if wrong := given.keys() - DEFAULTS.keys():
        raise SystemExit(f"{wrong.pop()}: no such key; there are {', '.join(DEFAULTS)}")
    keys = DEFAULTS | {name: int(value) for name, value in given.items()}
    folder = Path(next((word for word in argv if "=" not in word), "distillation-run"))
    write_models(folder, keys)
    found = {"teacher": train(folder, "teacher", folder / "large", keys, "samples.rows=0")}
    teacher = next((folder / "teacher").glob("global_step_*"))
    of_teacher: float = verl.evaluate(f"model_path={teacher}", *evaluation(folder)).scores["exact_match"]
    aim = SHARE * of_teacher
    taught = (f"teacher.partial_pretrain={teacher}", f"teacher.temperature={keys['temperature']}")
    found["fine-tuned"] = train(folder, "fine-tuned", folder / "small", keys)
    found["distilled"] = train(folder, "distilled", folder / "small", keys, *taught)
    print(f"the teacher answers {of_teacher:.1%} of the held-out problems; {SHARE:.0%} of that is {aim:.1%}")
    for name in ("fine-tuned", "distilled"):
        first = next((step for step, match in found[name].items() if match >= aim), None)
        print(f"{name}: {'not' if first is None else f'after {first} steps'}; {list(found[name].values())[-1]:.1%} in the end")
    return found


def write_models(folder: Path, keys: dict[str, int]) -> None:
    """Write the problems, and the two models with random weights and the same tokenizer."""
    train, _ = write_problems(folder / "train.jsonl", folder / "test.jsonl", keys["rows"], keys["test_rows"], keys["seed"])
    tokenizer = tiny_tokenizer(text for problem in train for text in (problem.question, problem.answer))
    large = tiny_model(tokenizer, seed=keys["seed"])
    torch.manual_seed(keys["seed"])
    small = Qwen2ForCausalLM(Qwen2Config(**{**large.config.to_dict(), **STUDENT, "layer_types": None, "initializer_range": 0.08}))
    for name, model in {"large": large, "small": small}.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def train(folder: Path, name: str, model: Path, keys: dict[str, int], *more: str) -> dict[int, float]:
    """Fine-tune a model on the rows, and return its exact match on the held-out problems by the number of steps."""
    words = [
        f"data.train_files={folder}/train.jsonl",
        f"data.val_files={folder}/test.jsonl",
        f"data.cache_dir={folder}/cache",
        f"model.partial_pretrain={model}",
        f"trainer.default_local_dir={folder}/{name}",
        f"trainer.total_training_steps={keys['steps']}",
        f"trainer.test_freq={keys['every']}",
        f"trainer.seed={keys['seed']}",
        "trainer.save_freq=-1",
        "samples.max_new_tokens=64",
        f"samples.rows={keys['test_rows']}",
    ]
    verl.sft(*words, *RECIPE, *more)
    return {int(line["step"]): line["val/exact_match"] for line in read_metrics(folder / name) if "val/exact_match" in line}


def evaluation(folder: Path) -> tuple[str, ...]:
    return f"test_file={folder}/test.jsonl", f"output_dir={folder}/eval", "max_new_tokens=64", "batch_size=100", "overwrite=true"


if __name__ == "__main__":
    main(sys.argv[1:])
