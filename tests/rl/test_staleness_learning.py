"""Answers that are drawn one step ahead teach as much: exact match on the demo's own problems, at equal steps, from three seeds.

Twenty minutes a seed on two cores, so only `make learning` runs it. With `-s` it tells where each run ended.
"""

import pytest
from demo_start import GRPO, Start
from places import run_ranks
from runs import PPO

pytestmark = [pytest.mark.learning, pytest.mark.timeout(4800)]

AHEAD = (
    "rollout.staleness=1 algorithm.importance_weights=truncate "
    "mapping.actor=[0] mapping.critic=[0] mapping.reference=[0] mapping.reward=[0] mapping.rollout=[1]"
).split()
WITHIN = 0.03


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda seed: f"seed {seed}")
def start(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Start:
    return Start(tmp_path_factory.mktemp("staleness"), request.param)


def after_two_processes(start: Start, output: str, words: list[str]) -> float:
    """Exact match after reinforcement learning on two processes, of which one generates."""
    directory = start.folder / output
    files = [f"data.train_files={start.folder}/train.jsonl", f"model.partial_pretrain={start.checkpoint}"]
    own = [f"trainer.default_local_dir={directory}", f"trainer.seed={start.seed}"]
    run_ranks(*PPO, *files, *GRPO, *words, *own, timeout=2400)
    found = start.measure(directory / "global_step_100")
    print(f"seed {start.seed}: {output} {start.exact_match:.4f} -> {found:.4f}")
    return found


def test_one_step_off_learns_as_much_as_the_synchronous_run(start: Start) -> None:
    synchronous = start.after("synchronous", GRPO)
    assert synchronous >= start.exact_match + 0.1, "else there is nothing to compare"
    assert after_two_processes(start, "ahead", AHEAD) == pytest.approx(synchronous, abs=WITHIN)
    assert after_two_processes(start, "partial", [*AHEAD, "rollout.partial=true"]) == pytest.approx(synchronous, abs=WITHIN)
