"""Greedy decoding and sampling of one of verl's engines beside plain transformers."""

import numpy as np

from verl.prove import plain
from verl.prove.outcome import Outcome, compared_beside_rounding
from verl.prove.subject import Subject
from verl.rollout import Options, Sampling, load_rollout

PROMPTS, TOKENS = (5, 33, 14, 60), 20  # tokens of the prompts, and of the answers: across windows, short positions and a batch's padding


def decoded(subject: Subject, engine: str, group: str, name: str) -> Outcome:
    """Compare an engine's greedy answers to several prompts at once with those of a plain loop without cache, one prompt at a time."""
    random = np.random.default_rng(11)
    prompts = [random.integers(0, min(subject.vocabulary, 256), length).tolist() for length in PROMPTS]
    stop_ids = [int(subject.tokenizer.eos_token_id)]
    rollout = load_rollout(engine, str(subject.model), subject.tokenizer, stop_ids, Options())
    answers = rollout.generate(prompts, Sampling(TOKENS))
    path = rollout.describe()
    rollout.close()
    model, equal, difference = plain.load(subject.model), 0, 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens, logprobs = plain.greedy(model, prompt, tokens=TOKENS, stop_ids=rollout.stop_ids)
        same = answer.token_ids == tokens
        equal += same
        if same:
            difference = max(difference, *(abs(a - b) for a, b in zip(answer.logprobs or [], logprobs, strict=True)))
    differences = {"log-probabilities": difference, **({} if equal == len(prompts) else {"other answers": float(len(prompts) - equal)})}
    path = f"{equal} of {len(prompts)} answers equal; {path}"
    return compared_beside_rounding(group, name, differences, lambda: subject.rounding_of_decoding, path=path)
