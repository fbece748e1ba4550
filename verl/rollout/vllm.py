"""Generation with vLLM: in this process, with new weights handed over as they are, or by a server, which reads them from files.

In this process vLLM holds a copy of the weights and each process has an engine of its own; the trainer and it take turns on the
GPU. A server is started apart:

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs

Without the development mode it generates, but takes no new weights.
"""

import gc
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from verl import dist
from verl.errors import UserError
from verl.models.load import outline, resolve
from verl.rollout import Completion, Options, Rollout, Sampling
from verl.rollout._http import WEIGHTS_SECONDS, WORK_SECONDS, RefusedError, Server, check_model, place_for_weights, publish
from verl.rollout._requests import check_whole, numbered, side_by_side, stop_ids_of

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import CompletionOutput

BUCKET_BYTES = 2**28  # weights handed over at a time
CPU_CACHE_BYTES = 2**30  # keys and values of an engine on a CPU
SEQUENCES = 256  # asked of a server at a time, where nothing else is said; it makes batches of them itself


def load(path: str, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], options: Options) -> Rollout:
    """See `verl.rollout.load_rollout`."""
    check_whole(path, "vLLM")
    kind = VllmRollout if options.url is None else VllmServer
    return kind(path, stop_ids_of(path, stop_ids), options)


def share(model: PreTrainedModel, path: str, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], options: Options) -> Rollout:
    """See `verl.rollout.share`. It holds the weights of `path` until `update_weights`."""
    return load(path, tokenizer, stop_ids, options)


class VllmRollout:
    """vLLM in this process.

    Args:
        path: a model directory or Hub name.
        stop_ids: tokens that end an answer; the model's own are not added.
    """

    def __init__(self, path: str, stop_ids: Sequence[int], options: Options):
        self.stop_ids, self._tied = list(stop_ids), outline(path, trust_remote_code=options.trust_remote_code).all_tied_weights_keys
        self._asleep: set[str] = set()
        self._version = 0
        self._llm = _start(resolve(path), options)
        self._llm.init_weight_transfer_engine({"init_info": {}})
        self.positions: int | None = self._llm.model_config.max_model_len

    def stream(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> Iterator[list[tuple[int, Completion]]]:
        """See `Rollout.stream`."""
        requests = numbered(prompts, sampling, seeds, self.positions)
        self.wake()
        engine, due = self._llm.llm_engine, set()
        try:
            for number, (prompt, seed) in enumerate(requests):
                engine.add_request(str(number), _tokens(prompt), _params(sampling, seed, self.stop_ids))
                due.add(str(number))
            while due:
                # On a CPU vLLM draws from torch's own generator too, and then again from that of the request.
                with torch.random.fork_rng(devices=[]):
                    finished = [output for output in engine.step() if output.finished]
                due -= {output.request_id for output in finished}
                if finished:
                    yield [(int(output.request_id), self._completion(output.outputs[0], sampling)) for output in finished]
        finally:
            engine.abort_request(list(due))  # whoever reads has left

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None) -> list[Completion]:
        """See `Rollout.generate`."""
        done = dict(pair for some in self.stream(prompts, sampling, seeds) for pair in some)
        return [done[number] for number in sorted(done)]

    def _completion(self, output: "CompletionOutput", sampling: Sampling) -> Completion:
        token_ids = list(output.token_ids)
        logprobs = None
        if not sampling.is_cut:  # vLLM's are of the distribution after the cut
            logprobs = [position[token].logprob for position, token in zip(output.logprobs or [], token_ids, strict=True)]
        return Completion(token_ids, "stop" if output.finish_reason == "stop" else "length", logprobs, self._version)

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `Rollout.update_weights`. A tensor must keep its values until this is done."""
        self._wake("weights")
        self._llm.start_weight_update()
        for bucket in _buckets(with_tied(named_tensors, self._tied)):
            self._llm.update_weights({"update_info": {"named_tensors": bucket}})
        self._llm.finish_weight_update(str(version))
        self._llm.reset_prefix_cache()  # keys and values of prompts are the old weights'
        self._version = version

    def sleep(self) -> None:
        """See `Rollout.sleep`. Weights go to host memory, keys and values are forgotten; on a CPU nothing is to be won."""
        if torch.cuda.is_available() and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = {"weights", "kv_cache"}

    def wake(self) -> None:
        """See `Rollout.wake`."""
        self._wake("weights", "kv_cache")

    def _wake(self, *tags: str) -> None:
        due = [tag for tag in tags if tag in self._asleep]
        if due:
            torch.cuda.empty_cache()  # what the trainer has freed, PyTorch keeps for itself, and vLLM's pool lies beside that
            self._llm.wake_up(tags=due)
            self._asleep -= set(due)

    def close(self) -> None:
        """See `Rollout.close`."""
        if self._llm is None:
            return
        from vllm.distributed.parallel_state import destroy_model_parallel

        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        destroy_model_parallel()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def describe(self) -> str:
        """See `Rollout.describe`."""
        import vllm

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = str(self._llm.model_config.dtype).removeprefix("torch.")
        return f"vLLM {vllm.__version__}, {dist.describe_device(device)}, {dtype}"


def _start(path: str, options: Options) -> Any:
    """vLLM's engine, in this process and with weights that can be handed to it."""
    dist.start()  # or vLLM would make a process group of its own
    if dist.group() is not None:
        fix = "leave mapping.rollout at all, or start a server and set rollout.url"
        raise UserError("vLLM in this process takes part on all processes, not on some", where="mapping.rollout", fix=fix)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # or the run's own lines are lost among hundreds
    try:
        from vllm import LLM

        from verl.rollout._vllm_weights import BACKEND
    except ImportError as error:
        raise UserError(f"vLLM is not installed, or not the release that is needed: {error}", fix='pip install "verl[vllm]"') from error
    on_gpu = torch.cuda.is_available()
    try:
        with _as_it_was():
            return LLM(
                model=path,
                dtype="auto" if on_gpu else "float32",
                enforce_eager=not on_gpu,
                logprobs_mode="processed_logprobs",
                generation_config="vllm",  # the model's own defaults, such as a repetition penalty, are put aside
                max_num_seqs=options.max_sequences,
                max_model_len=options.max_positions,
                gpu_memory_utilization=options.gpu_memory_utilization,
                kv_cache_memory_bytes=None if on_gpu else CPU_CACHE_BYTES,
                enable_sleep_mode=on_gpu,
                weight_transfer_config={"backend": BACKEND},
                distributed_executor_backend="external_launcher" if "RANK" in os.environ else None,
                trust_remote_code=options.trust_remote_code,
            )
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        fix = "rollout.gpu_memory_utilization is its share of the GPU; else rollout.name=native serves more models"
        raise UserError(f"vLLM cannot start with it: {error}", where=path, fix=fix) from error


@contextmanager
def _as_it_was() -> Iterator[None]:
    """vLLM sets every seed and reads its settings from the environment; neither is to be seen outside."""
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # in this process, where tensors can be handed over
    before = {name: os.environ.get(name) for name in settings}
    numpy_state, python_state = np.random.get_state(), random.getstate()
    os.environ.update(settings)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _tokens(prompt: list[int]) -> Any:
    from vllm.inputs import tokens_input

    return tokens_input(prompt)


def _params(sampling: Sampling, seed: int, stop_ids: list[int]) -> "SamplingParams":
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=seed,
        logprobs=0,  # of the token that was drawn, and no other
        ignore_eos=True,  # the stop tokens are these and no others
        stop_token_ids=stop_ids,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _buckets(named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in named_tensors:
        bucket.append((name, tensor.detach()))
        size += tensor.nbytes
        if size >= BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def with_tied(named_tensors: Iterable[tuple[str, Tensor]], tied: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, those that are tied under both of their names.

    vLLM's output layer may have a copy of the input embedding, in an order of its own, and would keep the old one.

    Args:
        tied: names that a trainer's tensors do not come under, with those that they come under.
    """
    others = {source: name for name, source in tied.items()}
    for name, tensor in named_tensors:
        yield name, tensor
        if name in others:
            yield others[name], tensor


class VllmServer:
    """A vLLM server, whose weights are replaced by files.

    Args:
        path: the model that it has to serve.
        stop_ids: tokens that end an answer.
        work_seconds: after so long without an answer it is taken to hang.
    Raises:
        UserError: not reached, or another model.
    """

    def __init__(self, path: str, stop_ids: Sequence[int], options: Options, *, work_seconds: float = WORK_SECONDS):
        assert options.url is not None
        start = f"VLLM_SERVER_DEV_MODE=1 vllm serve {path} --logprobs-mode processed_logprobs"
        self._server = Server(options.url, start=start, work_seconds=work_seconds)
        self.stop_ids, self._width = list(stop_ids), options.max_sequences or SEQUENCES
        self._weights_folder = options.weights_folder
        self._tied = outline(path, trust_remote_code=options.trust_remote_code).all_tied_weights_keys
        self._version = 0
        self._temperature_is_known = self._asleep = False
        served = self._served()
        check_model(path, [served["id"], served.get("root") or served["id"]], start=start, url=options.url)
        self._model: str = served["id"]
        self.positions: int | None = served.get("max_model_len")

    def _served(self) -> dict[str, Any]:
        answer = self._server.get("/v1/models")
        models = answer.get("data") if isinstance(answer, dict) else None
        if not models or "id" not in models[0]:
            raise UserError("names no model at /v1/models", where=self._server.url, fix=f"start it with: {self._server.start}")
        return dict(models[0])

    def _settings(self) -> dict[str, Any]:
        """How the server was started, which it tells in its development mode alone; without that it takes no new weights."""
        try:
            answer = self._server.get("/server_info?config_format=json")
        except RefusedError as error:
            what = "takes no new weights: it is not in its development mode"
            raise UserError(what, where=self._server.url, fix=f"start it with: {self._server.start}") from error
        return dict(answer["vllm_config"]["model_config"])

    def stream(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> Iterator[list[tuple[int, Completion]]]:
        """See `Rollout.stream`."""
        self.wake()
        requests = numbered(prompts, sampling, seeds, self.positions)
        if requests and not self._temperature_is_known and sampling.temperature not in (0.0, 1.0):
            self._check_temperature(requests[0][0])
        yield from side_by_side(lambda number: self._ask(*requests[number], sampling), len(requests), self._width)

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None) -> list[Completion]:
        """See `Rollout.generate`."""
        done = dict(pair for some in self.stream(prompts, sampling, seeds) for pair in some)
        return [done[number] for number in sorted(done)]

    def _ask(self, prompt: list[int], seed: int, sampling: Sampling) -> Completion:
        answer = self._server.post("/v1/completions", self._request(prompt, seed, sampling))
        choice = answer["choices"][0]
        token_ids = choice.get("token_ids")
        if token_ids is None:
            fix = f"it has to be vLLM, of a release near 0.32: {self._server.start}"
            raise UserError("answers without token ids", where=self._server.url, fix=fix)
        if choice["finish_reason"] not in ("stop", "length"):
            raise UserError(f"gave up an answer: {choice['finish_reason']}", where=self._server.url, fix="its log says more")
        said = choice.get("logprobs") or {"token_logprobs": None if token_ids else []}  # of no token there may be none at all
        return Completion(token_ids, choice["finish_reason"], None if sampling.is_cut else said["token_logprobs"], self._version)

    def _request(self, prompt: list[int], seed: int, sampling: Sampling) -> dict[str, Any]:
        """All that the model's generation_config.json could change is said."""
        return {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": seed,
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "ignore_eos": True,
            "stop_token_ids": self.stop_ids,
        }

    def _check_temperature(self, prompt: list[int]) -> None:
        """Whether log-probabilities are those of the temperature: the likeliest token's has to differ between two.

        A server that answers with no token says nothing of it yet.
        """
        highest = set()
        for temperature in (1.0, 2.0):
            request = {**self._request(prompt, 0, Sampling(1, temperature=temperature)), "logprobs": 1}
            choice = self._server.post("/v1/completions", request)["choices"][0]
            if not choice.get("token_ids"):
                return
            highest.add(max(choice["logprobs"]["top_logprobs"][0].values()))
        if len(highest) == 1:
            raise UserError(
                "gives log-probabilities of temperature 1 whatever the temperature",
                where=self._server.url,
                fix=f"start it with --logprobs-mode processed_logprobs: {self._server.start}",
            )
        self._temperature_is_known = True

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `Rollout.update_weights`. Every process that generates calls it; the first one writes the files."""
        self._settings()
        self.wake()
        place = place_for_weights(self._server, self._weights_folder)
        publish(with_tied(named_tensors, self._tied), place, lambda folder: self._load(folder, version))
        self._version = version

    def _load(self, folder: Path, version: int) -> None:
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self._server.post("/collective_rpc", reload, at_most_seconds=WEIGHTS_SECONDS)
        self._server.post("/reset_prefix_cache")
        self._server.post("/update_weight_version", {"new_version": str(version)})

    def sleep(self) -> None:
        """See `Rollout.sleep`. Nothing where the server was not started with --enable-sleep-mode: its GPUs are its own."""
        if not self._asleep and self._settings().get("enable_sleep_mode"):
            dist.barrier()  # nobody's answers are left
            dist.together(lambda: self._server.post("/sleep?level=1") if dist.is_main() else None)
            self._asleep = True

    def wake(self) -> None:
        """See `Rollout.wake`. Each process asks for it; a server that is awake stays so."""
        if self._asleep:
            torch.cuda.empty_cache()  # a server that sleeps shares the trainer's GPU
            self._server.post("/wake_up")
            self._asleep = False

    def close(self) -> None:
        """See `Rollout.close`. The server stays."""

    def describe(self) -> str:
        """See `Rollout.describe`."""
        return f"vLLM {self._server.get('/version')['version']} at {self._server.url}, {self._model}"
