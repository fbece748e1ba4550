"""Run under torchrun by test_vllm: vllm_engine.py MODEL FILE. Each process has an engine and answers prompts of its own, then
with new weights; rank 0 saves how far log-probabilities are from the trainer's, on all ranks."""

import json
import sys
from pathlib import Path

from served import PROMPTS, STOP_IDS, largest_difference, move, tokenizer_of, trained_model

from verl import dist
from verl.rollout import Options, Sampling, load_rollout

WARM = Sampling(8, temperature=0.7, n=2)


def main(path: Path, file: Path) -> None:
    dist.start()
    rollout, model = load_rollout("vllm", str(path), tokenizer_of(path), STOP_IDS, Options(max_positions=64)), trained_model(path)
    mine = PROMPTS[dist.rank() :: 2]
    before = largest_difference(model, mine, rollout.generate(mine, WARM), temperature=0.7)
    move(model)
    stale = largest_difference(model, mine, rollout.generate(mine, WARM), temperature=0.7)
    rollout.update_weights(model.named_parameters(), 1)
    more = mine * (1 + 4 * dist.rank())  # not as many on each
    after = largest_difference(model, more, rollout.generate(more, WARM), temperature=0.7)
    differences = dist.gathered([before, stale, after])
    rollout.close()
    if dist.is_main():
        file.write_text(json.dumps(differences))
    dist.stop()


main(Path(sys.argv[1]), Path(sys.argv[2]))
