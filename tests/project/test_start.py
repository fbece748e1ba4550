"""What a run pays before its first step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from places import SHARED

TOKENIZER = SHARED / "models" / "qwen2.5"

START = """
import sys
from transformers import AutoTokenizer
import verl.trainer.fsdp_sft_trainer
from verl.config.sft import DataConfig
from verl.data.documents import load_documents
from verl.data.tables import Columns
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
for _ in range(2):  # written to the cache, and read from it
    data = DataConfig(cache_dir=sys.argv[3])
    load_documents(data, Columns.of(data), sys.argv[2], tokenizer)
print(*sys.modules)
"""


@pytest.mark.skipif(not TOKENIZER.is_dir(), reason=f"no tokenizer in {TOKENIZER}")
def test_a_run_on_a_file_imports_nothing_that_it_does_not_use(tmp_path: Path) -> None:
    """Each of these takes from a fifth of a second to over one."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{n} + 1 = ?", "answer": str(n + 1)}) + "\n" for n in range(20)))
    command = [sys.executable, "-c", START, str(TOKENIZER), str(rows), str(tmp_path / "cache")]
    imported = set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert "torch" in imported
    assert not imported & {"datasets", "pandas", "peft", "trl", "wandb", "tensorboard", "liger_kernel"}
