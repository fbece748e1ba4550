"""Helpers of engines with one request per response: seeds, stop tokens, and concurrent requests to a server."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from transformers import GenerationConfig

from verl.errors import UserError
from verl.models.load import read_adapter_config, resolve
from verl.rollout import Completion, Sampling
from verl.rollout._model import check_positions, merge_stop_ids

WORD = 2**64 - 1


def answer_seed(sampling: Sampling, prompt_seed: int, answer: int) -> int:
    """Return the seed of response number `answer` to a prompt, from 0 to 2**63 - 1."""
    words = np.random.SeedSequence([sampling.seed & WORD, prompt_seed & WORD, answer]).generate_state(1, np.uint64)
    return int(words[0]) >> 1


def seeded_requests(
    prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None, positions: int | None
) -> list[tuple[list[int], int]]:
    """Return the prompt and seed of each response, in the order of their indices.

    Args:
        seeds: seed of each prompt; None: its index.
        positions: maximum tokens of a prompt with its response.
    Raises:
        UserError: a prompt with its response is longer.
    """
    check_positions(prompts, sampling, positions)
    prompt_seeds = range(len(prompts)) if seeds is None else seeds
    return [
        (prompt, answer_seed(sampling, prompt_seed, answer))
        for prompt, prompt_seed in zip(prompts, prompt_seeds, strict=True)
        for answer in range(sampling.n)
    ]


def read_stop_ids(path: str, stop_ids: Sequence[int]) -> list[int]:
    """Return the given stop tokens and those of the checkpoint's generation_config.json, without duplicates."""
    try:
        generation = GenerationConfig.from_pretrained(resolve(path))
    except OSError:  # the checkpoint has no generation config
        generation = None
    return merge_stop_ids(stop_ids, generation)


def check_no_adapter(path: str, engine: str) -> None:
    """Raise UserError if the path is an adapter directory, which the engine cannot load."""
    if read_adapter_config(path) is not None:
        raise UserError(f"is an adapter; {engine} loads only whole models", where=path, fix=f"run `verl export {path} DIR`, and give DIR")


def run_concurrently(ask: Callable[[int], Completion], number: int, width: int) -> Iterator[list[tuple[int, Completion]]]:
    """Call `ask` for responses 0 to `number` - 1 in threads, at most `width` at a time.

    The threads are daemons, so that a server that hangs does not keep the process from exiting.

    Yields:
        index and response, as responses arrive.
    Raises:
        the first exception of `ask`; no more calls are started then.
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
            except Exception as error:  # raised again in the calling thread
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
