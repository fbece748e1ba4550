"""Folders that tests name, and scripts of tests/ranks under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SHARED = ROOT.parent / "shared"  # real data and tokenizers, where somebody put them beside the project


def torchrun(script: str, *words: object, processes: int = 2, timeout: float | None = None) -> None:
    """Run a script of tests/ranks on so many processes, one core each."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launcher, str(TESTS / "ranks" / script), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, TESTS, *filter(None, sys.path))))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
