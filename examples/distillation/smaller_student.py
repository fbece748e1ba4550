"""A smaller student of the demo's model: fine-tuned to the end, or from some step on taught by the larger model on its own answers.

    python examples/distillation/smaller_student.py [FOLDER] [key=value …]

On a CPU, offline. The teacher is trained as the demo's model is, and the student, which has a third of its weights, on the same rows. From
step `first` on, a copy of the student goes on with `verl ppo algorithm.name=distill`: it answers the questions of these rows, and the
teacher says at each token what is likelier. Both answer the held-out problems after every so many steps. The last lines say after how many
they answered SHARE of what the teacher answers. A command that was stopped goes on.

Keys: rows, steps, first, own_steps, prompts, answers, every, test_rows, asked, seed.
"""

import sys
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import verl
from verl.demo.problems import write_problems
from verl.demo.run import RECIPE, RL_RECIPE
from verl.models.tiny import tiny_model, tiny_tokenizer
from verl.run import read_metrics

SHARE = 0.9
DEFAULTS = {
    "rows": 24000,
    "steps": 1500,
    "first": 600,
    "own_steps": 240,
    "prompts": 16,
    "answers": 4,
    "every": 100,
    "test_rows": 400,
    "asked": 200,
    "seed": 1,
}
STUDENT = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
Matches = dict[int, float]  # exact match on the held-out problems, by the number of steps


def main(argv: list[str]) -> tuple[float, Matches, Matches]:
    """Train all three, print what came of it, and return the exact match of the teacher, of fine-tuning, and of its own answers."""
    given = dict(word.split("=", 1) for word in argv if "=" in word)
    if wrong := given.keys() - DEFAULTS.keys():
        raise SystemExit(f"{wrong.pop()}: no such key; there are {', '.join(DEFAULTS)}")
    keys = DEFAULTS | {name: int(value) for name, value in given.items()}
    folder = Path(next((word for word in argv if "=" not in word), "distillation-run"))
    folder.mkdir(parents=True, exist_ok=True)
    write_models(folder, keys)
    fine_tune(folder, "teacher", "large", keys, "trainer.save_freq=-1")
    fine_tuned = fine_tune(folder, "fine-tuned", "small", keys, f"trainer.save_freq={keys['first']}", *held_out(folder, keys))
    of_teacher = measure(folder, keys)
    own = teach(folder, keys)
    aim = SHARE * of_teacher
    print(f"the teacher answers {of_teacher:.1%} of the held-out problems; {SHARE:.0%} of that is {aim:.1%}")
    for name, found in {"fine-tuned": fine_tuned, "taught on its own answers": own}.items():
        first = next((step for step, match in found.items() if match >= aim), None)
        print(f"{name}: {'not' if first is None else f'after {first} steps'}; {list(found.values())[-1]:.1%} after {max(found)}")
    return of_teacher, fine_tuned, own


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


def fine_tune(folder: Path, name: str, model: str, keys: dict[str, int], *more: str) -> Matches:
    words = [
        f"data.train_files={folder}/train.jsonl",
        f"data.cache_dir={folder}/cache",
        f"model.partial_pretrain={folder}/{model}",
        f"trainer.default_local_dir={folder}/{name}",
        f"trainer.total_training_steps={keys['steps']}",
        f"trainer.seed={keys['seed']}",
    ]
    verl.sft(*words, *RECIPE, *more)
    return matches(folder / name)


def teach(folder: Path, keys: dict[str, int]) -> Matches:
    """Go on from step `first` of fine-tuning, on the student's own answers; rewards are only logged."""
    words = [
        f"data.train_files={folder}/train.jsonl",
        f"data.val_files={folder}/test.jsonl",
        f"data.val_max_samples={keys['asked']}",
        f"model.partial_pretrain={folder}/fine-tuned/global_step_{keys['first']}",
        f"teacher.partial_pretrain={folder}/teacher/global_step_{keys['steps']}",
        f"trainer.default_local_dir={folder}/own",
        f"trainer.total_training_steps={keys['own_steps']}",
        f"trainer.test_freq={max(1, keys['every'] // 5)}",
        f"trainer.seed={keys['seed']}",
    ]
    more = [
        "algorithm.name=distill",
        "teacher.divergence=forward",
        f"data.prompts_per_step={keys['prompts']}",
        f"rollout.samples_per_prompt={keys['answers']}",
    ]
    verl.ppo(*words, *RL_RECIPE, *more, "optim.lr=1e-3", "optim.lr_scheduler=linear", "optim.warmup_steps_ratio=0.05")
    return {keys["first"] + step: match for step, match in matches(folder / "own").items()}


def held_out(folder: Path, keys: dict[str, int]) -> list[str]:
    """The keys by which a student answers some of the held-out problems after every so many steps."""
    words = [f"data.val_files={folder}/test.jsonl", f"data.val_max_samples={keys['asked']}", f"trainer.test_freq={keys['every']}"]
    return [*words, f"samples.rows={keys['asked']}", "samples.max_new_tokens=64"]


def measure(folder: Path, keys: dict[str, int]) -> float:
    """Exact match of the teacher on all held-out problems."""
    words = [f"model_path={folder}/teacher/global_step_{keys['steps']}", f"test_file={folder}/test.jsonl", f"output_dir={folder}/eval"]
    found: float = verl.evaluate(*words, "max_new_tokens=64", "batch_size=100", "overwrite=true").scores["exact_match"]
    return found


def matches(run: Path) -> Matches:
    return {int(line["step"]): line["val/exact_match"] for line in read_metrics(run) if "val/exact_match" in line}


if __name__ == "__main__":
    main(sys.argv[1:])
