"""Generation with an SGLang server, over its own `/generate`: token ids in and out.

It is started apart, and reads new weights from files:

    python -m sglang.launch_server --model-path MODEL --enable-deterministic-inference

Without deterministic inference it takes no seeds, and answers are not drawn again. With --enable-memory-saver it gives its memory
back while a trainer on the same GPU works.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from verl import dist
from verl.errors import UserError
from verl.models.load import outline
from verl.rollout import Completion, Options, Rollout, Sampling
from verl.rollout._http import WEIGHTS_SECONDS, WORK_SECONDS, RefusedError, Server, check_model, place_for_weights, publish
from verl.rollout._requests import check_whole, numbered, side_by_side, stop_ids_of

SEQUENCES = 256  # asked of the server at a time, where nothing else is said; it makes batches of them itself


def load(path: str, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], options: Options) -> Rollout:
    """See `verl.rollout.load_rollout`."""
    check_whole(path, "SGLang")
    return SglangServer(path, stop_ids_of(path, stop_ids), options)


def share(model: PreTrainedModel, path: str, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], options: Options) -> Rollout:
    """See `verl.rollout.share`. The server has the weights that it was started with until `update_weights`."""
    return load(path, tokenizer, stop_ids, options)


class SglangServer:
    """An SGLang server, whose weights are replaced by files.

    Args:
        path: the model that it has to serve.
        stop_ids: tokens that end an answer; SGLang adds the model's own.
        work_seconds: after so long without an answer it is taken to hang.
    Raises:
        UserError: no address, not reached, or another model.
    """

    def __init__(self, path: str, stop_ids: Sequence[int], options: Options, *, work_seconds: float = WORK_SECONDS):
        start = f"python -m sglang.launch_server --model-path {path} --enable-deterministic-inference"
        if options.url is None:
            raise UserError(
                "sglang generates in a server of its own", where="rollout.url=null", fix=f"start one and give its address: {start}"
            )
        self._server = Server(options.url, start=start, work_seconds=work_seconds)
        self.stop_ids, self._width = list(stop_ids), options.max_sequences or SEQUENCES
        self._version, self._asleep = 0, False
        self._model = self._served(path)
        info = self._ask_about("server_info")
        self._sleeps, self._takes_seeds = bool(info.get("enable_memory_saver")), bool(info.get("enable_deterministic_inference"))
        config = outline(path, trust_remote_code=options.trust_remote_code).config.get_text_config()
        self.positions: int | None = info.get("context_length") or getattr(config, "max_position_embeddings", None)
        self._weights_folder = options.weights_folder

    def _served(self, path: str) -> str:
        """The model's name. Once it was given new weights it is called by their folder; its tokenizer's name stays."""
        info = self._ask_about("model_info")
        names = [str(info[key]) for key in ("served_model_name", "model_path", "tokenizer_path") if info.get(key)]
        check_model(path, names, start=self._server.start, url=self._server.url)
        return names[0]

    def _ask_about(self, what: str) -> dict[str, Any]:
        """What is at /model_info and /server_info, which older releases have under get_."""
        try:
            answer = self._server.get(f"/{what}")
        except RefusedError as error:
            if error.status != 404:
                raise
            answer = self._server.get(f"/get_{what}")
        if not isinstance(answer, dict):
            raise UserError(f"/{what} does not describe a server", where=self._server.url, fix=f"start one: {self._server.start}")
        return answer

    def stream(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> Iterator[list[tuple[int, Completion]]]:
        """See `Rollout.stream`."""
        requests = numbered(prompts, sampling, seeds, self.positions)
        self.wake()
        yield from side_by_side(lambda number: self._answer(*requests[number], sampling), len(requests), self._width)

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None) -> list[Completion]:
        """See `Rollout.generate`."""
        done = dict(pair for some in self.stream(prompts, sampling, seeds) for pair in some)
        return [done[number] for number in sorted(done)]

    def _answer(self, prompt: list[int], seed: int, sampling: Sampling) -> Completion:
        answer = self._server.post("/generate", self._request(prompt, seed, sampling))
        about = answer.get("meta_info", {})
        reason = about.get("finish_reason", {}).get("type")
        if reason not in ("stop", "length"):
            raise UserError(f"gave up an answer: {about.get('finish_reason')}", where=self._server.url, fix="its log says more")
        drawn = about.get("output_token_logprobs")
        if drawn is None:
            raise UserError("answers without token ids", where=self._server.url, fix=f"it has to be SGLang: {self._server.start}")
        return Completion([token for _, token, *_ in drawn], reason, [logprob for logprob, *_ in drawn], self._version)

    def _request(self, prompt: list[int], seed: int, sampling: Sampling) -> dict[str, Any]:
        """SGLang's log-probabilities are those of the temperature, before top_k and top_p; greedy ones are of temperature 1."""
        params: dict[str, Any] = {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or -1,
            "top_p": sampling.top_p,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": self.stop_ids,
        }
        if self._takes_seeds:
            params["sampling_seed"] = seed
        return {"input_ids": prompt, "sampling_params": params, "return_logprob": True}

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `Rollout.update_weights`. Every process that generates calls it; the first one writes the files."""
        self.wake()
        publish(named_tensors, place_for_weights(self._server, self._weights_folder), lambda folder: self._load(folder, version))
        self._version = version

    def _load(self, folder: Path, version: int) -> None:
        wanted = {"model_path": str(folder), "flush_cache": True, "weight_version": str(version)}
        answer = self._server.post("/update_weights_from_disk", wanted, at_most_seconds=WEIGHTS_SECONDS)
        if not answer.get("success"):
            raise UserError(f"did not take new weights: {answer.get('message')}", where=self._server.url, fix="its log says more")

    def sleep(self) -> None:
        """See `Rollout.sleep`. Nothing where the server was not started with --enable-memory-saver: its GPUs are its own."""
        if self._sleeps and not self._asleep:
            dist.barrier()  # nobody's answers are left
            dist.together(lambda: self._server.post("/release_memory_occupation") if dist.is_main() else None)
            self._asleep = True

    def wake(self) -> None:
        """See `Rollout.wake`."""
        if self._asleep:
            torch.cuda.empty_cache()  # a server that sleeps shares the trainer's GPU
            dist.together(lambda: self._server.post("/resume_memory_occupation") if dist.is_main() else None)
            self._asleep = False

    def close(self) -> None:
        """See `Rollout.close`. The server stays."""

    def describe(self) -> str:
        """See `Rollout.describe`."""
        return f"SGLang {self._ask_about('server_info').get('version', '')} at {self._server.url}, {self._model}"
