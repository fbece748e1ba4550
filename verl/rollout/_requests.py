"""What engines that answer one request at a time share: each answer's seed, which tokens end it, and how much fits."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from transformers import GenerationConfig

from verl.errors import UserError
from verl.models.load import read_adapter_config, resolve
from verl.rollout import Completion, Sampling
from verl.rollout._model import all_stop_ids, check_positions

WORD = 2**64 - 1


def seed_of(sampling: Sampling, prompt_seed: int, answer: int) -> int:
    """The seed of answer number `answer` to a prompt, from 0 to 2**63 - 1."""
    words = np.random.SeedSequence([sampling.seed & WORD, prompt_seed & WORD, answer]).generate_state(1, np.uint64)
    return int(words[0]) >> 1


def numbered(
    prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None, positions: int | None
) -> list[tuple[list[int], int]]:
    """The prompt and seed of each answer, by its number.

    Args:
        seeds: of the prompts; None: their numbers.
        positions: longest prompt and answer together.
    Raises:
        UserError: one that does not fit.
    """
    check_positions(prompts, sampling, positions)
    prompt_seeds = range(len(prompts)) if seeds is None else seeds
    return [
        (prompt, seed_of(sampling, prompt_seed, answer))
        for prompt, prompt_seed in zip(prompts, prompt_seeds, strict=True)
        for answer in range(sampling.n)
    ]


def stop_ids_of(path: str, stop_ids: Sequence[int]) -> list[int]:
    """The chat template's stop tokens and those of the model's generation_config.json, each once."""
    try:
        generation = GenerationConfig.from_pretrained(resolve(path))
    except OSError:  # it has none
        generation = None
    return all_stop_ids(stop_ids, generation)


def check_whole(path: str, engine: str) -> None:
    """Raises UserError if it is an adapter, which the engine cannot load."""
    if read_adapter_config(path) is not None:
        raise UserError(f"{engine} takes whole models, and this is an adapter", where=path, fix=f"verl export {path} DIR, and give DIR")


def side_by_side(ask: Callable[[int], Completion], number: int, width: int) -> Iterator[list[tuple[int, Completion]]]:
    """Ask for answers 0 to `number` - 1, at most `width` at a time, each in a thread of its own.

    The threads do not outlive the process, so that a server which hangs does not keep it from ending.

    Yields:
        numbered answers, as they come.
    Raises:
        what `ask` raises, once; then no more is asked for.
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Completion | Exception]] = queue.SimpleQueue()
    stop = threading.Event()
    for i in range(number):
        todo.put(i)

    def work() -> None:
        while not stop.is_set():
            try:
                i = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((i, ask(i)))
            except Exception as error:  # handed to the thread that waits
                done.put((i, error))

    for _ in range(min(width, number)):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in range(number):
            i, answer = done.get()
            if isinstance(answer, Exception):
                raise answer
            yield [(i, answer)]
    finally:
        stop.set()
