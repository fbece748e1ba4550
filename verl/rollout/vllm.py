"""Generation with vLLM, in this process or on a server.

In this process, vLLM has its own copy of the weights, and gets new weights as tensors. Each process has its own engine, which takes turns
with the trainer on the GPU. A server reads new weights from files. It is started separately:

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs

Without development mode, a server generates but does not accept new weights.
"""

import gc
import os
import random
import time
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
from verl.rollout._http import (
    GENERATE_TIMEOUT,
    WEIGHTS_TIMEOUT,
    RefusedError,
    Server,
    check_served_model,
    find_weights_folder,
    send_weights,
)
from verl.rollout._requests import check_no_adapter, read_stop_ids, run_concurrently, seeded_requests

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import CompletionOutput

BUCKET_BYTES = 2**28  # weights passed to vLLM at a time
CPU_CACHE_BYTES = 2**30  # KV cache of an engine on a CPU
RESETS, RESET_SECONDS = 20, 0.1  # a server cannot reset its prefix cache while it answers
SEQUENCES = 256  # default number of concurrent requests to a server, which batches them itself


def load(path: str, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], options: Options) -> Rollout:
    """See `verl.rollout.load_rollout`."""
    check_no_adapter(path, "vLLM")
    kind = VllmRollout if options.url is None else VllmServer
    return kind(path, read_stop_ids(path, stop_ids), options)


def share(model: PreTrainedModel, path: str, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], options: Options) -> Rollout:
    """See `verl.rollout.share`. Until `update_weights`, the engine has the weights of `path`."""
    return load(path, tokenizer, stop_ids, options)


class VllmRollout:
    """vLLM in this process.

    Args:
        path: model directory or Hub name.
        stop_ids: all tokens that end a response.
    """

    def __init__(self, path: str, stop_ids: Sequence[int], options: Options):
        self.stop_ids, self._tied = list(stop_ids), outline(path, trust_remote_code=options.trust_remote_code).all_tied_weights_keys
        self._asleep: set[str] = set()
        self._version = 0
        self._unfinished: dict[int, int] = {}
        self._llm = _start(resolve(path), options)
        self._llm.init_weight_transfer_engine({"init_info": {}})
        self.positions: int | None = self._llm.model_config.max_model_len

    def stream(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> Iterator[list[tuple[int, Completion]]]:
        """See `Rollout.stream`."""
        requests = seeded_requests(prompts, sampling, seeds, self.positions)
        self.wake()
        engine, due = self._llm.llm_engine, set()
        self._unfinished = dict.fromkeys(range(len(requests)), 0)
        try:
            for number, (prompt, seed) in enumerate(requests):
                engine.add_request(str(number), _tokens(prompt), _params(sampling, seed, self.stop_ids))
                due.add(str(number))
            while due:
                # On a CPU, vLLM also draws from torch's global random generator, before it uses that of the request.
                with torch.random.fork_rng(devices=[]):
                    outputs = engine.step()
                self._unfinished |= {int(output.request_id): len(output.outputs[0].token_ids) for output in outputs}
                finished = [output for output in outputs if output.finished]
                due -= {output.request_id for output in finished}
                for output in finished:
                    del self._unfinished[int(output.request_id)]
                if finished or sampling.progress:
                    yield [(int(output.request_id), self._completion(output.outputs[0], sampling)) for output in finished]
        finally:
            engine.abort_request(list(due))  # the caller may stop reading early

    def unfinished_tokens(self) -> dict[int, int]:
        """See `Rollout`."""
        return self._unfinished

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None) -> list[Completion]:
        """See `Rollout.generate`."""
        done = dict(pair for some in self.stream(prompts, sampling, seeds) for pair in some)
        return [done[number] for number in sorted(done)]

    def _completion(self, output: "CompletionOutput", sampling: Sampling) -> Completion:
        token_ids = list(output.token_ids)
        logprobs = None
        if not sampling.is_filtered:  # vLLM returns log-probabilities after top_k and top_p
            logprobs = [position[token].logprob for position, token in zip(output.logprobs or [], token_ids, strict=True)]
        return Completion(token_ids, "stop" if output.finish_reason == "stop" else "length", logprobs, self._version)

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `Rollout.update_weights`. The tensors must not change before this returns."""
        self._wake("weights")
        self._llm.start_weight_update()
        for bucket in _buckets(with_tied(named_tensors, self._tied)):
            self._llm.update_weights({"update_info": {"named_tensors": bucket}})
        self._llm.finish_weight_update()
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM's prefix cache still holds keys and values that were computed with the old weights")
        self._version = version

    def sleep(self) -> None:
        """See `Rollout.sleep`. Weights are moved to host memory, and the KV cache is freed. On a CPU this does nothing."""
        if torch.cuda.is_available() and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = {"weights", "kv_cache"}

    def wake(self) -> None:
        """See `Rollout.wake`."""
        self._wake("weights", "kv_cache")

    def _wake(self, *tags: str) -> None:
        due = [tag for tag in tags if tag in self._asleep]
        if due:
            torch.cuda.empty_cache()  # vLLM's memory pool cannot use memory that PyTorch caches
            self._llm.wake_up(tags=due)
            self._asleep -= set(due)

    def close(self) -> None:
        """See `Rollout.close`."""
        if self._llm is None:
            return
        from vllm.distributed.parallel_state import destroy_model_parallel

        self.wake()  # vLLM's allocator frees each address once more if it sleeps; after that error, it frees nothing else
        self._llm.apply_model(_free)  # before vLLM drops its memory pools: memory that is freed later stays with the process
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
    """Start vLLM's engine in this process, with a backend that receives weights as tensors."""
    dist.start()  # otherwise vLLM would create its own process group
    if dist.group() is not None:
        fix = "leave mapping.rollout=all, or start a server and set rollout.url"
        raise UserError("vLLM in this process must generate on all processes", where="mapping.rollout", fix=fix)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # else vLLM logs hundreds of lines
    try:
        from vllm import LLM, __version__

        from verl.rollout._vllm_weights import BACKEND
    except ImportError as error:
        raise UserError(f"vLLM is not installed, or is not the required release: {error}", fix='pip install "verl[vllm]"') from error
    if __version__.startswith("0.28."):
        fix = "install another one of 0.26 to 0.33"
        raise UserError("vLLM 0.28 gives no new weights to an output layer that is tied to the embedding", fix=fix)
    on_gpu = torch.cuda.is_available()
    try:
        with _restored_globals():
            return LLM(
                model=path,
                dtype="auto" if on_gpu else "float32",
                enforce_eager=not on_gpu,
                logprobs_mode="processed_logprobs",
                generation_config="vllm",  # ignore the model's own defaults, such as a repetition penalty
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
        fix = "change rollout.gpu_memory_utilization, vLLM's share of GPU memory; or set rollout.name=native, which supports more models"
        raise UserError(f"vLLM cannot start with this model: {error}", where=path, fix=fix) from error


@contextmanager
def _restored_globals() -> Iterator[None]:
    """Set vLLM's environment variables in this context. At its end, restore them and the global random state, which vLLM seeds."""
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # run the engine in this process, so that tensors can be passed to it
    before = {name: os.environ.get(name) for name in settings}
    numpy_state, python_state = np.random.get_state(), random.getstate()
    os.environ.update(settings)
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _free(model: torch.nn.Module) -> None:
    """Free the memory of the weights, keys and values of vLLM's model.

    The model outlives its engine: hooks of torch.compile refer to it, and so do the functions that load its weights. vLLM 0.26 leaves its
    keys and values with it, and all releases its weights.
    """
    for module in model.modules():
        if (hook := getattr(module, "_bytecode_hook_handle", None)) is not None:
            hook.remove()
        for tensor in [*module.parameters(recurse=False), *_tensors(getattr(module, "kv_cache", None))]:
            if (storage := tensor.untyped_storage()).resizable():
                storage.resize_(0)


def _tensors(cache: Any) -> Iterator[Tensor]:
    """Yield the tensors of a layer's `kv_cache`: one, or several in lists."""
    if isinstance(cache, Tensor):
        yield cache
    elif isinstance(cache, list | tuple):
        for part in cache:
            yield from _tensors(part)


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
        logprobs=0,  # only that of the sampled token
        ignore_eos=True,  # only `stop_token_ids` end a response
        stop_token_ids=stop_ids,
        detokenize=False,
        output_kind=RequestOutputKind.CUMULATIVE if sampling.progress else RequestOutputKind.FINAL_ONLY,
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
    """Yield the same tensors, and each tied tensor also under its other name.

    vLLM's output layer may be a reordered copy of the input embedding, which would otherwise keep its old values.

    Args:
        tied: for each tied tensor, the name that is missing in `named_tensors`, mapped to the name that is in it.
    """
    others = {source: name for name, source in tied.items()}
    for name, tensor in named_tensors:
        yield name, tensor
        if name in others:
            yield others[name], tensor


class VllmServer:
    """A vLLM server, which reads new weights from files.

    Args:
        path: model directory or Hub name of the model that the server must serve.
        stop_ids: all tokens that end a response.
        timeout: maximum seconds of a request.
    Raises:
        UserError: the server cannot be reached, or serves another model.
    """

    def __init__(self, path: str, stop_ids: Sequence[int], options: Options, *, timeout: float = GENERATE_TIMEOUT):
        assert options.url is not None
        start = f"VLLM_SERVER_DEV_MODE=1 vllm serve {path} --logprobs-mode processed_logprobs"
        self._server = Server(options.url, start=start, timeout=timeout)
        self.stop_ids, self._width = list(stop_ids), options.max_sequences or SEQUENCES
        self._weights_folder = options.weights_folder
        self._tied = outline(path, trust_remote_code=options.trust_remote_code).all_tied_weights_keys
        self._version = 0
        self._temperature_is_known = self._asleep = False
        served = self._served()
        check_served_model(path, [served["id"], served.get("root") or served["id"]], start=start, url=options.url)
        self._model: str = served["id"]
        self.positions: int | None = served.get("max_model_len")

    def _served(self) -> dict[str, Any]:
        answer = self._server.get("/v1/models")
        models = answer.get("data") if isinstance(answer, dict) else None
        if not models or "id" not in models[0]:
            raise UserError("lists no model at /v1/models", where=self._server.url, fix=f"start it with: {self._server.start}")
        return dict(models[0])

    def _settings(self) -> dict[str, Any]:
        """Return the server's model settings. Raise UserError if it is not in development mode, which new weights need too."""
        try:
            answer = self._server.get("/server_info?config_format=json")
        except RefusedError as error:
            if error.status != 404:
                raise
            what = "does not accept new weights, because it is not in development mode"
            raise UserError(what, where=self._server.url, fix=f"start it with: {self._server.start}") from error
        return dict(answer["vllm_config"]["model_config"])

    def stream(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> Iterator[list[tuple[int, Completion]]]:
        """See `Rollout.stream`."""
        self.wake()
        requests = seeded_requests(prompts, sampling, seeds, self.positions)
        if requests and not self._temperature_is_known and sampling.temperature not in (0.0, 1.0):
            self._check_temperature(requests[0][0])
        yield from run_concurrently(lambda number: self._ask(*requests[number], sampling), len(requests), self._width)

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None) -> list[Completion]:
        """See `Rollout.generate`."""
        done = dict(pair for some in self.stream(prompts, sampling, seeds) for pair in some)
        return [done[number] for number in sorted(done)]

    def _ask(self, prompt: list[int], seed: int, sampling: Sampling) -> Completion:
        answer = self._server.post("/v1/completions", self._request(prompt, seed, sampling))
        choice = answer["choices"][0]
        token_ids = choice.get("token_ids")
        if token_ids is None:
            fix = f"start vLLM 0.26 to 0.33: {self._server.start}"
            raise UserError("does not return token ids", where=self._server.url, fix=fix)
        if choice["finish_reason"] not in ("stop", "length"):
            raise UserError(f"aborted a response: {choice['finish_reason']}", where=self._server.url, fix="read the server's log")
        logprobs = choice.get("logprobs") or {"token_logprobs": None if token_ids else []}  # may be missing for an empty response
        kept = None if sampling.is_filtered else logprobs["token_logprobs"]
        return Completion(token_ids, choice["finish_reason"], kept, self._version)

    def _request(self, prompt: list[int], seed: int, sampling: Sampling) -> dict[str, Any]:
        """Build a request. It sets every parameter that the model's generation_config.json could change."""
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
        """Check that the server's log-probabilities depend on the temperature.

        The log-probability of the most likely token must differ between two temperatures. If the server returns no token, the next call
        checks again.

        Raises:
            UserError: it does not differ.
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
                "returns log-probabilities at temperature 1 for every temperature",
                where=self._server.url,
                fix=f"start it with --logprobs-mode processed_logprobs: {self._server.start}",
            )
        self._temperature_is_known = True

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `Rollout.update_weights`. Every process that generates calls it; rank 0 writes the files."""
        dist.together(self._settings)
        dist.together(self.wake)
        place = find_weights_folder(self._server, self._weights_folder)
        send_weights(with_tied(named_tensors, self._tied), place, self._load)
        self._version = version

    def _load(self, folder: Path) -> None:
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self._server.post("/collective_rpc", reload, timeout=WEIGHTS_TIMEOUT)
        for _ in range(RESETS):
            if self._server.post("/reset_prefix_cache")["success"]:
                return
            time.sleep(RESET_SECONDS)
        what = "keeps keys and values that were computed with the old weights, because it answers others' requests too"
        raise UserError(what, where=self._server.url, fix="give this run a server of its own")

    def sleep(self) -> None:
        """See `Rollout.sleep`. Do nothing if the server was started without --enable-sleep-mode, as on GPUs of its own."""
        if self._asleep:
            return
        found: list[dict[str, Any]] = []
        dist.together(lambda: found.append(self._settings()))  # by now, no process generates
        if found[0].get("enable_sleep_mode"):
            dist.together(lambda: self._server.post("/sleep?level=1") if dist.is_main() else None)
            self._asleep = True

    def wake(self) -> None:
        """See `Rollout.wake`. Every process calls the server; waking it more than once is harmless."""
        if self._asleep:
            torch.cuda.empty_cache()  # the server may share the trainer's GPU
            self._server.post("/wake_up")
            self._asleep = False

    def close(self) -> None:
        """See `Rollout.close`. The server keeps running."""

    def describe(self) -> str:
        """See `Rollout.describe`."""
        return f"vLLM {self._server.get('/version')['version']} at {self._server.url}, {self._model}"
