"""The example of an environment of one's own, examples/environments/countdown.py, played by somebody who says what the test tells."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from episodes import Table, endings, write_talk
from places import ROOT

from verl.errors import UserError
from verl.rollout import Completion, Sampling

FILE = str(ROOT / "examples" / "environments" / "countdown.py")


class Says:
    """A rollout that says one text after the other."""

    positions = None

    def __init__(self, table: Table, texts: list[str]):
        self._table, self._texts, self.stop_ids = table, iter(texts), table.chatter.stop_ids

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None) -> list[Completion]:
        encode = self._table.tokenizer
        ids = [[*encode(next(self._texts), add_special_tokens=False)["input_ids"], self.stop_ids[0]] for _ in prompts]
        return [Completion(one, "stop", [-0.5] * len(one), 0) for one in ids]


@pytest.mark.parametrize(
    ("said", "rewards", "solved"),
    [(["3", "4"], [0.0, 1.0], 1.0), (["4", "four", "4"], [0.0, -0.1, 0.0], 0.0), (["6", "5", "2"], [-0.1, 0.0, 1.0], 1.0)],
)
def test_it_is_played_from_its_file_alone(said: list[str], rewards: list[float], solved: float, tmp_path: Path) -> None:
    table = Table(write_talk(tmp_path), FILE)
    table.chatter = Says(table, said)
    [sample] = table.play({"target": 7})
    assert endings([sample]) == ["done"] and sample.outcome is not None
    assert sample.outcome.rewards == pytest.approx(rewards) and sample.outcome.metrics == {"solved": solved}


def test_its_keys_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"environment.most"):
        Table(write_talk(tmp_path), FILE, environment__most=0)
