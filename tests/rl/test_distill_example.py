"""The worked example of docs/distillation.md: at small size, and with `make learning` as the page has it."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from places import ROOT

SMALL = "rows=64 steps=4 first=2 own_steps=2 prompts=2 answers=2 every=2 test_rows=4 asked=4".split()


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("smaller_student", ROOT / "examples" / "distillation" / "smaller_student.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_the_example_trains_a_teacher_and_goes_on_from_the_same_step_in_two_ways(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_teacher, fine_tuned, own = example.main([str(tmp_path), *SMALL])
    assert 0.0 <= of_teacher <= 1.0 and list(fine_tuned) == [2, 4] and list(own) == [2, 3, 4]
    assert own[2] == fine_tuned[2]
    assert "of the held-out problems; 90% of that is" in capsys.readouterr().out


def test_an_unknown_key_of_the_example_is_told(example: ModuleType) -> None:
    with pytest.raises(SystemExit, match="step: no such key; there are rows, steps"):
        example.main(["step=3"])


@pytest.mark.learning
@pytest.mark.timeout(3600)
def test_with_the_same_number_of_updates_a_taught_student_is_ahead_of_a_fine_tuned_one(example: ModuleType, tmp_path: Path) -> None:
    of_teacher, fine_tuned, own = example.main([str(tmp_path)])
    print(f"teacher {of_teacher:.3f}; own answers {own}; fine-tuning {fine_tuned}")
    assert of_teacher > 0.95 and own[600] == fine_tuned[600]
    assert own[700] > fine_tuned[700] + 0.1 and own[800] > fine_tuned[800] + 0.1
