"""EleutherAI's evaluation harness reads a checkpoint of verl by the command in docs/evaluation.md, here on a task that needs no network."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from learned import ROWS, write_rows
from places import ROOT

TASK = """\
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer.split('#### ')[1]}}}}"
generation_kwargs: {{until: ["<nothing>"], max_gen_toks: 40, do_sample: false}}
filter_list:
  - {{name: number, filter: [{{function: regex, regex_pattern: "#### ([0-9,]+)"}}, {{function: take_first}}]}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


def documented() -> list[str]:
    """The words of the first lm_eval command of the page."""
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    found = re.search(r"^lm_eval (?:.*\\\n)*.*$", page, re.MULTILINE)
    assert found is not None
    return shlex.split(found[0].replace("\\\n", " "))


def test_the_documented_command_evaluates_a_checkpoint(tmp_path: Path, learned_checkpoint: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "sums.yaml").write_text(TASK.format(rows=write_rows(tmp_path / "rows.jsonl", [*ROWS[:3], {**ROWS[3], "answer": "#### 8"}])))
    words = documented()[1:]
    changed = {
        "--model_args": f"pretrained={learned_checkpoint},dtype=float32",
        "--tasks": "sums",
        "--include_path": str(tmp_path),
        "--output_path": str(tmp_path / "out"),
        "--device": "cpu",
        "--batch_size": "2",
    }
    for name, value in changed.items():
        if name in words:
            words[words.index(name) + 1] = value
        else:
            words += [name, value]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_CACHE": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lm_eval", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PATH": "/usr/bin:/bin", **offline})
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(file.read_text())
    assert found["results"]["sums"]["exact_match,number"] == 0.75
    assert found["chat_template"] and "--apply_chat_template" in words
