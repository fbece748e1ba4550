"""benchmarks/rl.py: what it measures, what it says of what is missing or fails, and its one command on a CPU."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from places import ROOT
from rich.console import Console
from tiny import write_problems_and_model

from verl.errors import UserError

sys.path.insert(0, str(ROOT / "benchmarks"))

from peers import settings  # type: ignore[import-not-found]


def loaded() -> Any:
    """The module under another name: tests/rl is called rl, too."""
    spec = importlib.util.spec_from_file_location("rl_benchmark", ROOT / "benchmarks" / "rl.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rl = loaded()


def options(*words: str) -> argparse.Namespace:
    return rl.arguments(["--tokenizer", "t", "--data", "d", *words])


def chosen(*words: str) -> list[tuple[str, str]]:
    return list(rl.choose(options(*words)))


def test_each_case_is_measured_on_each_engine_and_trl_only_if_asked() -> None:
    assert chosen("--only", "0.5b-full,7b-lora") == [(case, e) for case in ("0.5b-full", "7b-lora") for e in ("native", "vllm")]
    assert chosen("--only", "1.5b-lora", "--peers", "--engines", "native,trl") == [("1.5b-lora", "native"), ("1.5b-lora", "trl")]
    assert {case for case, _ in chosen()} == set(rl.CASES)


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["--only", "0.5b"], "--only"),
        (["--only", "3b-full"], "--only"),
        (["--only", "7b-full"], "--only"),
        (["--engines", "sglang"], "--engines"),
        (["--answers", "0"], "--answers"),
        (["--peer-steps", "0"], "--peer-steps"),
    ],
)
def test_what_cannot_be_measured_is_an_error(words: list[str], where: str) -> None:
    with pytest.raises(UserError) as error:
        chosen(*words)
    assert error.value.where == where


def test_data_and_tokenizer_are_needed_but_to_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="--tokenizer"):
        list(rl.choose(rl.arguments([])))
    rl.main(["--list", "--peers", "--only", "0.5b-full"])
    lines = capsys.readouterr().out.splitlines()
    trl = rl.VLLM_STARTS + len(settings.trl_grpo("0.5b", on_gpu=True)) * rl.EXPECTED["0.5b"][2]
    assert [line.split()[:2] for line in lines[:3]] == [["0.5b-full", engine] for engine in rl.ENGINES]
    assert f"about {trl} s" in lines[2] and f"about {sum(rl.EXPECTED['0.5b'][:2]) + trl} s" in lines[3]


def test_adapters_and_engines_have_their_keys() -> None:
    words = options("--lora-rank", "8", "--keys", "optim.lr=1e-5")
    lora = rl.verl_keys("0.5b-lora", "vllm", True, words)
    assert {"model.lora_rank=8", "rollout.name=vllm", "rollout.max_sequences=512", "model.compile=true"} <= set(lora)
    assert lora[-1] == "optim.lr=1e-5"  # a user's key is the last one, so it decides
    full = rl.verl_keys("0.5b-full", "native", False, words)
    assert not any(key.startswith(("model.lora_rank", "rollout.sleep", "model.compile", "trainer.profile_step")) for key in full)
    assert f"trainer.profile_step={3 + 8 + 2}" in rl.verl_keys("0.5b-full", "native", False, options("--phases"))


# What is read and said


def setting(name: str, *seconds: float) -> dict[str, object]:
    phases = {"generate": 1.0, "score": 0.0, "logprobs": 0.1, "update_actor": 2.0, "update_rollout": 0.2}
    return {"setting": name, "seconds": seconds, "tokens": [600] * len(seconds), "phases": phases, "peak_gib": 5.0}


def test_the_fastest_setting_counts_and_the_others_are_named() -> None:
    found = [setting("16", 4.0, 9.0, 4.1), {"setting": "64", "failed": "OutOfMemoryError: no room"}, setting("32:liger", 3.0, 3.1, 2.9)]
    best = rl.best_of_trl("tiny-full", "vllm", "c", found, 10.0, 7.0, None)
    assert (best.setting, best.step_seconds, best.tokens_per_second, best.device_gib) == ("32:liger", 3.0, 200.0, 7.0)
    assert best.tried == {"16": 4.1, "64": "OutOfMemoryError: no room", "32:liger": 3.0} and best.failed is None
    assert "64: OutOfMemoryError: no room" in rl.line(best)


def test_a_peer_that_is_stopped_keeps_the_settings_before_and_one_without_any_says_why() -> None:
    late = rl.best_of_trl("tiny-full", "vllm", "c", [setting("16", 4.0)], 10.0, None, "did not end within 400 s")
    assert late.step_seconds == 4.0 and late.tried["the next one"] == "did not end within 400 s"
    failed = rl.best_of_trl("tiny-full", "vllm", "c", [{"setting": "16", "failed": "ValueError: no"}], None, None, None)
    assert failed.step_seconds is None and failed.failed == "16: ValueError: no"
    assert rl.best_of_trl("tiny-full", "vllm", "c", [], None, None, "ImportError: x (exit code 1)").failed == "ImportError: x (exit code 1)"


def result(engine: str, seconds: float | None, case: str = "0.5b-full", **more: object) -> Any:
    phases = {"generate": 0.25, "update_actor": 1.0, "logprobs": 0.5, "update_rollout": 0.125}
    return rl.Result(case, engine, "words", "c", step_seconds=seconds, phases=phases, tokens_per_second=1000.0, **more)


def test_verl_is_compared_with_trl_of_the_same_case() -> None:
    results = [result("native", 2.0), result("vllm", 4.0), result("trl, vllm", 8.0), result("native", 1.0, "7b-lora")]
    assert rl.ratios(results) == {"0.5b-full native": 0.25, "0.5b-full vllm": 0.5}
    assert rl.ratios([result("native", 2.0), result("trl, vllm", None, failed="no")]) == {}


def test_the_tables_show_phases_memory_and_failures() -> None:
    console = Console(width=220, record=True)
    results = [result("native", 2.0, peak_gib=41.84, device_gib=44.0), result("trl, vllm", 8.0), result("vllm", None, failed="no [room]")]
    console.print(rl.table(results))
    console.print(rl.phases_table(results))
    text = console.export_text()
    native, *_ = [line for line in text.splitlines() if "native" in line]
    assert [word for word in native.split() if word[0].isdigit()][1:] == ["2.00", "0.25", "1.50", "0.12", "1,000", "41.8", "44.0", "0.250"]
    assert "no [room]" in text
    by_phase = [line for line in text.splitlines() if "native" in line][1]
    assert "0.125" in by_phase and "2.000" in by_phase  # the last one is the step; 2.0 - 1.875 is left over


# The command


def test_one_command_measures_a_step_and_names_what_is_not_installed(tmp_path: Path) -> None:
    """Without TRL and vLLM, which are hidden."""
    write_problems_and_model(tmp_path)
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\nreal = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name in ('trl', 'vllm') else real(name, *rest)\n"
    )
    shape = "--cpu --peers --phases --only tiny-lora --prompts 2 --answers 2 --new-tokens 8 --warmup 1 --steps 2".split()
    inputs = [f"--tokenizer={tmp_path / 'model'}", f"--data={tmp_path / 'train.jsonl'}", f"--out={tmp_path / 'results.json'}"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, str(ROOT / "benchmarks" / "rl.py"), *shape, *inputs]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "results.json").read_text())
    native, vllm, trl = found["results"]
    assert native["failed"] is None and len(native["seconds"]) == 2 and native["tokens_per_second"] > 0
    assert {"generate", "score", "update_actor", "update_rollout"} <= set(native["phases"])
    assert sum(native["phases"].values()) <= max(native["seconds"])
    assert "profile of steps" in native["profile"] and native["seconds_to_first_step"] > 0
    assert (vllm["failed"], trl["failed"]) == ("skipped: vllm not installed", "skipped: trl not installed")
    assert found["ratios"] == {} and "CPU cores" in found["machine"] and "seconds of a step" in done.stdout
