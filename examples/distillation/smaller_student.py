"""A smaller student of the demo's model: fine-tuned on rows, and on the same rows with a teacher. On a CPU:

    python examples/distillation/smaller_student.py [FOLDER] [key=value …]

The teacher is trained first, as the demo's model is. Then the same student, with the same rows in the same order, is trained three times: on the
answers alone, on the teacher's probabilities of them, and on the teacher's probabilities of its own answers. After every so many steps it answers
the held-out problems. The table says after how many steps a student answered as many as SHARE of what the teacher does.
Keys: teacher_rows, rows, steps, own_steps, every, test_rows, seed.
"""

import shlex
import sys
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from verl.config.commands import EvalConfig
from verl.demo.problems import write_problems
from verl.demo.run import RECIPE
from verl.eval.sft_evaluator import evaluate
from verl.models.load import load_tokenizer
from verl.models.tiny import tiny_model, write_tiny_model
from verl.run import read_metrics
from verl.trainer import fsdp_sft_trainer, ppo_trainer

SHARE = 0.9
SIZES = {"teacher_rows": 24_000, "rows": 4000, "steps": 2000, "own_steps": 200, "every": 100, "test_rows": 200, "seed": 1}
STUDENT = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
QUIET = ["trainer.logger=[]", "trainer.save_freq=-1"]


def main(argv: list[str]) -> None:
    words = dict(word.split("=") for word in argv if "=" in word)
    sizes = SIZES | {name: int(words.pop(name)) for name in SIZES if name in words}
    folder = Path(next((word for word in argv if "=" not in word), "distillation-run"))
    teacher, student = make_models(folder, sizes)
    teachers = [f"teacher.partial_pretrain={teacher}"]
    aim = SHARE * exact_match(folder, teacher, sizes)
    print(f"the teacher answers {aim / SHARE:.3f} of the held-out problems; {SHARE:.0%} of it is {aim:.3f}", flush=True)
    for name, more in {"fine-tuned": [], "with a teacher": teachers}.items():
        directory = fine_tune(folder, name.replace(" ", "-"), student, sizes, more)
        report(name, directory, aim)


def make_models(folder: Path, sizes: dict[str, int]) -> tuple[Path, Path]:
    """Write the problems, train the teacher on all of them, and write the student, which has seen nothing."""
    train, _ = write_problems(folder / "all.jsonl", folder / "test.jsonl", sizes["teacher_rows"], sizes["test_rows"], sizes["seed"])
    lines = (folder / "all.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[: sizes["rows"]]), encoding="utf-8")
    write_tiny_model(folder / "untrained", (text for row in train for text in (row.question, row.answer)), seed=sizes["seed"])
    run(fsdp_sft_trainer, folder, "teacher", [f"data.train_files={folder}/all.jsonl", f"model.partial_pretrain={folder}/untrained"], sizes)
    tokenizer = load_tokenizer(str(folder / "untrained"))
    torch.manual_seed(sizes["seed"])
    config = Qwen2Config(**{**tiny_model(tokenizer).config.to_dict(), **STUDENT, "layer_types": None, "initializer_range": 0.1})
    Qwen2ForCausalLM(config).save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    return newest(folder / "teacher"), folder / "student"
