"""The memory of a GPU after each step of closing vLLM in this process: vllm_close.py MODEL [--vllm-alone].

With `--vllm-alone`, the model's memory is not freed before vLLM shuts down.
"""

import gc
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from served import STOP_IDS, tokenizer_of

from verl.models.load import load_for_training
from verl.rollout import Options, Sampling, share
from verl.rollout import vllm as rollout_vllm

GIB = 2**30


def main(path: Path, vllm_alone: bool) -> None:
    model = load_for_training(str(path), device="cuda" if torch.cuda.is_available() else "cpu", dtype=torch.bfloat16).model
    say("with the trainer's model")
    options = Options(max_positions=512, max_sequences=64, gpu_memory_utilization=0.4)
    rollout: Any = share("vllm", model, str(path), tokenizer_of(path), STOP_IDS, options)
    rollout.generate([[5, 6, 7]] * 8, Sampling(16))
    say(f"started: {rollout.describe()}")
    rollout.update_weights(model.named_parameters(), 1)
    rollout.generate([[5, 6, 7]] * 8, Sampling(16))
    rollout.sleep()
    say("asleep")
    rollout.wake()
    say("awake")
    llm, rollout._llm = rollout._llm, None
    if not vllm_alone:
        llm.apply_model(partial(free, ("kv_cache",)))
        say("keys and values freed")
        llm.apply_model(rollout_vllm._free)
        say("weights freed, hooks removed")
    llm.llm_engine.engine_core.shutdown()
    say("engine shut down")
    del llm
    gc.collect()
    say("engine collected")
    layers = [o for o in gc.get_objects() if issubclass(type(o), torch.nn.Module) and type(o).__module__.startswith("vllm")]
    print("layers of vLLM that are left:", Counter(type(layer).__name__ for layer in layers).most_common(), flush=True)
    from vllm.compilation.cuda_graph import CUDAGraphWrapper

    CUDAGraphWrapper.clear_all_graphs()
    gc.collect()
    say("CUDA graphs cleared")
    if torch.cuda.is_available():
        from vllm.device_allocator.cumem import CuMemAllocator

        left = list(CuMemAllocator.instance.pointer_to_data.values())
        gib = {tag: round(sum(data.handle[1] for data in left if data.tag == tag) / GIB, 2) for tag in {data.tag for data in left}}
        print("GiB that vLLM's allocator still maps:", gib, flush=True)


def free(names: tuple[str, ...], model: torch.nn.Module) -> None:
    for module in model.modules():
        for name in names:
            for tensor in rollout_vllm._tensors(getattr(module, name, None)):
                tensor.untyped_storage().resize_(0)


def say(what: str) -> None:
    if not torch.cuda.is_available():
        print(what, flush=True)
        return
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free_bytes, total = torch.cuda.mem_get_info()
    print(
        f"{(total - free_bytes) / GIB:7.2f} GiB in use, {torch.cuda.memory_allocated() / GIB:6.2f} allocated by PyTorch: {what}", flush=True
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--vllm-alone" in sys.argv)
