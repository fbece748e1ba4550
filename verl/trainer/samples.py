"""Sample answers: the model in training answers a few fixed validation rows, greedily, and the answers are graded.

Nothing that is trained depends on it: the random state is put back, and the weights are only read. What fails while answers are generated
or graded is told once, and the run continues without samples.
"""

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from verl import dist, rollout, signals
from verl.config.commands import GraderConfig
from verl.config.ppo import PromptConfig
from verl.config.sft import DataConfig, SFTConfig
from verl.data.prompts import Prompt, load_prompts
from verl.engine.build import Built
from verl.errors import AbandonedError, UserError
from verl.plugin import Plugins
from verl.rewards import _scoring
from verl.rewards._fitting import Asked, choose
from verl.rollout import Options, Rollout, Sampling
from verl.run import Run
from verl.workers.calls import Failure

AT_ONCE = 64  # answers that are generated at the same time
NO_LIMIT = 2**31  # tokens of a prompt; the model's positions are the limit


@dataclass
class _GraderKeys(GraderConfig):
    plugins: ClassVar[Plugins] = replace(GraderConfig.plugins, named_by="samples.metric")


def read_samples(config: SFTConfig, tokenizer: PreTrainedTokenizerBase, run: Run) -> "Samples | None":
    """Read the rows to answer, the same on every rank; None if there are none to be. Every rank calls it.

    Raises:
        UserError: on all ranks: a row is no question, or the metric does not exist or cannot read the right answer of a row.
    """
    if config.samples.rows == 0:
        return None
    most, limit = config.samples.rows, config.data.val_max_samples
    most = most if limit in (None, -1) else min(most, limit or most)
    found: list[Prompt] = []
    run.enter("reading the rows to answer")
    dist.together(lambda: found.extend(_read(config.data, most, tokenizer)) if dist.is_main() else None)
    prompts = dist.from_main(found)
    metric = config.samples.metric or _fitting_metric(prompts)
    samples = Samples(prompts, config, tokenizer, run)
    if metric is not None:
        dist.together(lambda: samples.use(metric))
    return samples


def _fitting_metric(prompts: Sequence[Prompt]) -> str | None:
    """Return the metric that `verl eval` would choose; None for texts, of which f1 only says how alike they are, not which are right."""
    name = choose([Asked(prompt.text, str(prompt.row["reference"]), prompt.messages) for prompt in prompts]).name
    return None if name == "f1" else name


def _read(data: DataConfig, most: int, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Read the first validation rows as prompts, with the columns of the training rows."""
    names = ("prompt_key", "response_key", "messages_key", "tools_key", "chat_template_kwargs_key")
    columns = PromptConfig(max_prompt_length=NO_LIMIT, **{name: getattr(data, name) for name in names})
    return load_prompts(columns, data.val_files, tokenizer, key="data.val_files", max_samples=most).prompts


@dataclass
class Samples:
    """The rows to answer, and how they are answered and graded. Every rank calls its methods, after the same steps.

    Attributes:
        names: names of the metrics.
    """

    prompts: list[Prompt]
    config: SFTConfig
    tokenizer: PreTrainedTokenizerBase
    run: Run
    names: ClassVar[tuple[str, ...]] = ("val/exact_match",)
    _grader: _scoring.Grader | None = None
    _measure: str = "the same text"
    _built: Built | None = None
    _rollout: Rollout | None = None  # shares the weights; None: they are sharded, and a copy is loaded each time
    _failed: bool = field(default=False, init=False)

    def use(self, metric: str) -> None:
        """Grade with a module of verl/rewards or a user's own file. Raises UserError: it does not exist, or cannot read a right answer."""
        keys = _GraderKeys()
        self._grader = _scoring.Grader(_scoring.load_grader(keys, metric), f"metric {metric}", keys, self.run)
        self._measure = metric
        for function in ("check_reference", "reference_answer"):
            if self._grader.has(function):
                references, places = [prompt.row["reference"] for prompt in self.prompts], [prompt.where for prompt in self.prompts]
                self._grader.check_references(references, places, function)
                break

    def begin(self, built: Built) -> None:
        """Prepare to generate with the model in training. Raises UserError: it cannot generate."""
        self._built = built
        if built.is_whole:
            with self._unchanged():
                self._rollout = rollout.share("auto", built.loaded.model, self._path, self.tokenizer, built.stop_ids, self._options)
        rows = f"{len(self.prompts):,} validation row{'s' if len(self.prompts) != 1 else ''}"
        how = "" if built.is_whole else "; the weights are sharded, so each rank loads a copy of the model for it"
        most = self.config.samples.max_new_tokens
        self.run.say(f"samples: {rows} answered at each validation, in up to {most:,} tokens, graded by {self._measure}{how}")

    def answer(self, step: int) -> dict[str, float] | None:
        """Answer and grade the rows, and write samples/step_N.jsonl. None: the run stops meanwhile."""
        if self._failed:
            return {}
        self.run.enter("answering sample rows", step)
        try:
            with self._unchanged():
                mine = self._graded(self._answered(step))
        except AbandonedError:  # on every rank
            return None
        except UserError as error:  # on every rank
            self._failed = True
            self.run.say(f"warning: sample answers after step {step} failed: {error}\n  The run continues without them (samples.rows)")
            return {}
        lines = sorted((line for of_rank in dist.gathered(mine) for line in of_rank), key=lambda line: line["number"])
        right = sum(line["right"] for line in lines)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        if dist.is_main():
            self.run.replace(name := f"samples/step_{step}.jsonl", text)
            self.run.say(f"step {step}: {right:,} of {len(lines):,} sample answers right ({self._measure}); {self.run.directory / name}")
        return {"val/exact_match": right / len(lines)}

    @property
    def _path(self) -> str:
        return self.config.model.partial_pretrain

    @property
    def _options(self) -> Options:
        trusted = self.config.model.trust_remote_code
        return Options(max_sequences=min(AT_ONCE, len(self.prompts)), compile=False, trust_remote_code=trusted, key="samples.rows")

    def _answered(self, step: int) -> list[dict[str, Any]]:
        """Generate this rank's share of the answers. Raises UserError on all ranks, AbandonedError after a signal."""
        done: list[dict[str, Any]] = []
        engine = self._rollout if self._rollout is not None else self._copy(step)
        try:
            dist.together(lambda: done.extend(_memory_checked(lambda: self._generate(engine))))
        finally:
            engine.close()
        return done

    def _copy(self, step: int) -> Rollout:
        """Load a copy of the model, and copy the current weights into it. Every rank calls it."""
        assert self._built is not None
        found: list[Rollout] = []
        options, stop_ids = self._options, self._built.stop_ids
        load = lambda: rollout.load_rollout("auto", self._path, self.tokenizer, stop_ids, options)  # noqa: E731
        dist.together(lambda: found.append(_memory_checked(load)))
        found[0].update_weights(self._built.named_weights(), step)
        return found[0]

    def _generate(self, engine: Rollout) -> list[dict[str, Any]]:
        numbers = range(dist.rank(), len(self.prompts), dist.world_size())
        mine, most = [self.prompts[number] for number in numbers], self.config.samples.max_new_tokens
        if not mine:
            return []
        longest = max(range(len(mine)), key=lambda number: len(mine[number].token_ids))
        if engine.positions is not None:
            most = min(most, engine.positions - len(mine[longest].token_ids))
        if most < 1:
            what = f"the prompt's {len(mine[longest].token_ids):,} tokens do not fit into the model's {engine.positions:,} positions"
            raise UserError(what, where=mine[longest].where, fix="shorten the question, or remove the row")
        with signals.abandoning():
            answers = engine.generate([prompt.token_ids for prompt in mine], Sampling(most, logprobs=False))
        return [
            {
                "number": number,
                "where": prompt.where,
                "prompt": prompt.text,
                "answer": answer.text(self.tokenizer),
                "reference": prompt.row["reference"],
                "finish_reason": answer.finish_reason,
                "tokens": len(answer.token_ids),
            }
            for number, prompt, answer in zip(numbers, mine, answers, strict=True)
        ]

    def _graded(self, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Add whether each answer is right. Raises UserError on all ranks if the grader fails."""
        right: list[bool] = []
        dist.together(lambda: right.extend(self._right(lines)))
        return [line | {"right": is_right} for line, is_right in zip(lines, right, strict=True)]

    def _right(self, lines: list[dict[str, Any]]) -> list[bool]:
        if self._grader is None:
            return [line["answer"].strip() == line["reference"].strip() for line in lines]
        rows = [self.prompts[line["number"]].row for line in lines]
        questions, answers = [line["prompt"] for line in lines], [line["answer"] for line in lines]
        with signals.abandoning():
            scores = self._grader.scores(questions, answers, rows, list(range(len(lines))), until_failure=True)
        for line, score in zip(lines, scores, strict=True):
            if isinstance(score, Failure):
                raise _scoring.error_of(self._grader.what, score, line["where"], "correct samples.metric or the row")
        return [score == 1 for score in scores]

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """In this context, random numbers may be drawn; after it, the generators are as before."""
        python, numpy = random.getstate(), np.random.get_state()
        gpus = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        try:
            with torch.random.fork_rng(devices=gpus):
                yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)

    def close(self) -> None:
        """End the processes of a user's own metric."""
        if self._grader is not None:
            self._grader.close()


def _memory_checked(work: Any) -> Any:
    """Return what the work returns. Raises UserError if the GPU's memory does not suffice."""
    try:
        return work()
    except torch.OutOfMemoryError as error:
        with suppress(RuntimeError):
            torch.cuda.empty_cache()
        raise UserError("the GPU's memory does not suffice beside training", where="samples.rows", fix="give fewer rows") from error
